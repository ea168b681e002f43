"""Models with several inputs, keyword arguments, and outputs that are no single tensor."""

from __future__ import annotations

from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from nrm_plugin import ABSORBED, NRMAbsolute, RelevanceMeasure, at, coverage
from nrm_plugin.errors import InputError, UnknownLayerError

Pair = namedtuple("Pair", ["first", "second"])


class Two(nn.Module):
    """Two inputs, a mask and a factor; what comes out is packed by a function."""

    def __init__(self, pack=lambda a, b: a):
        super().__init__()
        self.left, self.right = nn.Linear(4, 6), nn.Linear(3, 6)
        self.head, self.aux = nn.Linear(6, 5), nn.Linear(6, 2)
        self.pack = pack

    def forward(self, left, right, mask=None, factor=1.0):
        hidden = torch.relu(self.left(left) + self.right(right))
        if mask is not None:
            hidden = hidden.masked_fill(mask == 0, 0.0)
        return self.pack(self.head(hidden) * factor, self.aux(hidden))


def build(pack=lambda a, b: a):
    torch.manual_seed(0)
    return Two(pack).double().eval()


LEFT = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).double()
RIGHT = torch.randn(3, 3, generator=torch.Generator().manual_seed(2)).double()
MASK = torch.tensor([1, 1, 0, 1, 1, 1])


def total(mu, layer):
    parts = [mu.marginal(tap).flatten(1).sum(1) for tap in mu.taps_of(layer)]
    return torch.stack(parts).sum(0)


@pytest.fixture
def by_position():
    mu = RelevanceMeasure(build(), (LEFT, RIGHT), 3, additional_forward_args=(MASK, 2.0))
    return mu.marginal(["input[0]", "input[1]", "left", "head"])


def test_every_layer_that_is_listed_can_be_asked_for():
    mu = RelevanceMeasure(build(), (LEFT, RIGHT), 3)
    assert {"input[0]", "input[1]", "left", "right", "head"} <= set(mu.layers)
    assert len(set(mu.layers)) == len(mu.layers)
    marginals = mu.marginal(mu.layers)
    torch.testing.assert_close(marginals["input[1]"], mu.marginal(at("input", item=1)))
    torch.testing.assert_close(mu(at("input[1]")[2]), mu.marginal("input[1]")[:, 2])
    inputs = total(mu, "input")
    torch.testing.assert_close(inputs + mu(ABSORBED), torch.ones(3).double())
    torch.testing.assert_close(mu(at("input[0]") | at("input[1]")), inputs)


def test_several_inputs_without_saying_which_are_an_error():
    mu = RelevanceMeasure(build(), (LEFT, RIGHT), 3)
    with pytest.raises(UnknownLayerError, match=r"2 tensors: say which by item="):
        mu.marginal("input")


def test_keyword_inputs_are_the_same_as_positional_ones(by_position):
    mu = RelevanceMeasure(
        build(), {"right": RIGHT, "left": LEFT, "mask": MASK}, 3, additional_forward_kwargs={"factor": 2.0}
    )
    assert {"input[left]", "input[right]"} <= set(mu.layers)
    torch.testing.assert_close(mu.marginal("input[left]"), by_position["input[0]"])
    torch.testing.assert_close(mu.marginal(at("input", item="right")), by_position["input[1]"])
    torch.testing.assert_close(mu.marginal("left"), by_position["left"])


def test_keyword_arguments_beside_positional_inputs(by_position):
    mu = RelevanceMeasure(build(), (LEFT, RIGHT), 3, additional_forward_kwargs={"mask": MASK, "factor": 2.0})
    torch.testing.assert_close(mu.marginal("input[0]"), by_position["input[0]"])


def test_one_input_by_keyword_is_called_input():
    net = nn.Sequential(OrderedDict(lin=nn.Linear(4, 5))).double().eval()
    mu = RelevanceMeasure(net, {"input": LEFT}, 3)
    torch.testing.assert_close(mu.marginal("input"), RelevanceMeasure(net, LEFT, 3).marginal("input"))


PACKED = {
    "only tensor of a tuple": (lambda a, b: (a, "text", None), None),
    "torchvision": (lambda a, b: OrderedDict(aux=b, out=a), None),
    "transformers": (lambda a, b: {"loss": None, "hidden": b, "logits": a}, None),
    "key": (lambda a, b: {"x": b, "y": a}, "y"),
    "position": (lambda a, b: (b, a), 1),
    "last": (lambda a, b: [b, b, a], -1),
    "attribute": (lambda a, b: Pair(b, a), "second"),
    "function": (lambda a, b: {"deep": [b, (a,)]}, lambda returned: returned["deep"][1][0]),
}


@pytest.mark.parametrize("case", PACKED)
def test_the_explained_output_may_be_packed(case):
    pack, output = PACKED[case]
    expected = RelevanceMeasure(build(), (LEFT, RIGHT), 3)
    mu = RelevanceMeasure(build(pack), (LEFT, RIGHT), 3, output=output)
    torch.testing.assert_close(mu.output, expected.output)
    torch.testing.assert_close(mu.marginal("input[0]"), expected.marginal("input[0]"))
    assert "head" in str(coverage(build(pack), (LEFT, RIGHT), output=output))


@pytest.mark.parametrize(
    ("pack", "output", "words"),
    [
        (lambda a, b: (a, b), None, r"tuple of 0 \(float64 \(3, 5\)\), 1 \(float64 \(3, 2\)\).*output="),
        (lambda a, b: {"x": a, "y": b}, "z", r"output='z' is not in the model's return value, a dict of 'x'"),
        (lambda a, b: {"x": a, "y": "text"}, "y", r"output='y' is str"),
        (lambda a, b: "text", None, r"returned str.*one tensor"),
        (lambda a, b: a.sum(), None, r"first dimension must be the batch"),
        (lambda a, b: a.detach(), None, r"does not depend on the inputs"),
    ],
)
def test_an_output_without_a_measure_is_refused(pack, output, words):
    with pytest.raises(InputError, match=words):
        RelevanceMeasure(build(pack), (LEFT, RIGHT), 3, output=output)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "words"),
    [
        ({"mask": MASK}, {}, r"none of the inputs is a floating point tensor.*'mask' \(int64 \(6,\)\)"),
        ({}, {}, r"none of the inputs.*an empty mapping"),
        ((), {}, r"no input was given"),
        ({"left": LEFT, "right": RIGHT}, {"right": RIGHT}, r"\['right'\] are given both"),
        ({"left": LEFT.half(), "right": RIGHT}, {}, r"input 'left' has dtype torch.float16"),
        ({"left": LEFT, "right": RIGHT[:2]}, {}, r"input 'right' has 2 samples"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, kwargs, words):
    with pytest.raises(InputError, match=words):
        RelevanceMeasure(build(), inputs, 3, additional_forward_kwargs=kwargs)


class Branches(nn.Module):
    """A module in the middle hands on a dictionary."""

    def __init__(self):
        super().__init__()
        self.split, self.head = Split(), nn.Linear(4, 2)

    def forward(self, x):
        found = self.split(x)
        return self.head(found["a"] + found["b"])


class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return {"a": torch.relu(self.a(x)), "b": torch.relu(self.b(x))}


def test_the_tensors_of_a_dictionary_between_modules_are_taps():
    torch.manual_seed(0)
    mu = RelevanceMeasure(Branches().double().eval(), LEFT, 1, composite=NRMAbsolute())
    a, b = mu.marginal("split[a]"), mu.marginal(at("split", item="b"))
    torch.testing.assert_close(a.sum(1) + b.sum(1) + mu.sink("split[a]"), torch.ones(3).double())
    assert float(a.sum(1).min()) > 0
    assert float(b.sum(1).min()) > 0
