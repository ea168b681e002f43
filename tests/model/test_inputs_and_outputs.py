"""Model inputs and outputs: several tensors, keyword arguments, packed outputs, and the errors for invalid ones.

Covers: nrm_plugin.recording.coverage.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from nrm_plugin import ABSORBED, NRM, NRMAbsolute, RelevanceMeasure, at, coverage
from nrm_plugin.errors import EventError, GradModeError, InputError, TargetError, UnknownLayerError
from tests.error_cases import Calls, MeasuredNet, Net, error_cases

Pair = namedtuple("Pair", ["first", "second"])


class Two(nn.Module):
    """Two inputs, a mask and a factor; a function packs the outputs."""

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


def test_every_layer_of_the_measure_can_be_queried():
    mu = RelevanceMeasure(build(), (LEFT, RIGHT), 3)
    assert {"input[0]", "input[1]", "left", "right", "head"} <= set(mu.layers)
    assert len(set(mu.layers)) == len(mu.layers)
    marginals = mu.marginal(mu.layers)
    torch.testing.assert_close(marginals["input[1]"], mu.marginal(at("input", item=1)))
    torch.testing.assert_close(mu(at("input[1]")[2]), mu.marginal("input[1]")[:, 2])
    inputs = total(mu, "input")
    torch.testing.assert_close(inputs + mu(ABSORBED), torch.ones(3).double())
    torch.testing.assert_close(mu(at("input[0]") | at("input[1]")), inputs)


def test_a_query_for_several_inputs_without_item_raises():
    mu = RelevanceMeasure(build(), (LEFT, RIGHT), 3)
    with pytest.raises(UnknownLayerError, match=r"2 tensors: choose one by item="):
        mu.marginal("input")


def test_inputs_by_keyword_equal_positional_ones(by_position):
    mu = RelevanceMeasure(
        build(), {"right": RIGHT, "left": LEFT, "mask": MASK}, 3, additional_forward_kwargs={"factor": 2.0}
    )
    assert {"input[left]", "input[right]"} <= set(mu.layers)
    torch.testing.assert_close(mu.marginal("input[left]"), by_position["input[0]"])
    torch.testing.assert_close(mu.marginal(at("input", item="right")), by_position["input[1]"])
    torch.testing.assert_close(mu.marginal("left"), by_position["left"])


def test_positional_inputs_can_be_combined_with_keyword_arguments(by_position):
    mu = RelevanceMeasure(build(), (LEFT, RIGHT), 3, additional_forward_kwargs={"mask": MASK, "factor": 2.0})
    torch.testing.assert_close(mu.marginal("input[0]"), by_position["input[0]"])


def test_a_single_input_by_keyword_is_named_input():
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
def test_the_explained_output_can_be_part_of_a_structure(case):
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
        (lambda a, b: a.sum(), None, r"one number for 3 samples"),
        (lambda a, b: a.detach(), None, r"does not depend on the inputs"),
    ],
)
def test_an_output_that_is_not_a_single_tensor_raises(pack, output, words):
    with pytest.raises(InputError, match=words):
        RelevanceMeasure(build(pack), (LEFT, RIGHT), 3, output=output)


@pytest.mark.parametrize(
    ("inputs", "kwargs", "words"),
    [
        ({"mask": MASK}, {}, r"none of the inputs is a floating-point tensor.*'mask' \(int64 \(6,\)\)"),
        ({}, {}, r"none of the inputs.*an empty mapping"),
        ((), {}, r"no input was given"),
        ({"left": LEFT, "right": RIGHT}, {"right": RIGHT}, r"\['right'\] are given both"),
        ({"left": LEFT.half(), "right": RIGHT}, {}, r"the input has dtype torch.float16, the model torch.float64"),
        ({"left": LEFT, "right": RIGHT[:2]}, {}, r"input 'right' has 2 samples"),
    ],
)
def test_inconsistent_inputs_raise(inputs, kwargs, words):
    with pytest.raises(InputError, match=words):
        RelevanceMeasure(build(), inputs, 3, additional_forward_kwargs=kwargs)


class Branches(nn.Module):
    """An inner module returns a dictionary."""

    def __init__(self):
        super().__init__()
        self.split, self.head = Split(), nn.Linear(4, 2)

    def forward(self, x):
        parts = self.split(x)
        return self.head(parts["a"] + parts["b"])


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


# -- invalid inputs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


def with_entry(x, value):
    x = x.clone()
    x[1, 0, 2, 2] = value
    return x


@error_cases(
    ("nan", lambda x: with_entry(x, math.nan), InputError, "nan or inf", "(sample 1)", "nan_to_num"),
    ("inf", lambda x: with_entry(x, -math.inf), InputError, "nan or inf", "(sample 1)", "Remove these samples"),
    ("empty batch", lambda x: x[:0], InputError, "(0, 1, 4, 4)", "no sample to explain"),
    ("empty images", lambda x: x[:, :, :0], InputError, "(2, 1, 0, 4)", "no sample to explain"),
    ("scalar", lambda x: x.sum(), InputError, "shape ()", "no sample to explain"),
    ("complex", lambda x: x * 1j, InputError, "complex64", "real floating-point", ".float()"),
    ("integer", lambda x: x.long(), InputError, "int64", "real floating-point", ".float()", "embedding"),
    ("bool", lambda x: x > 0, InputError, "torch.bool", "real floating-point", ".float()"),
    ("half", lambda x: x.half(), InputError, "float16", "the model torch.float32", "`.float()` for both"),
    ("bfloat16", lambda x: x.bfloat16(), InputError, "bfloat16", "the model torch.float32", "`.float()` for both"),
    ("double", lambda x: x.double(), InputError, "float64", "the model torch.float32", "model.double()"),
    ("meta", lambda x: x.to("meta"), InputError, "on device meta", "tensor with values"),
    ("sparse", lambda x: x.to_sparse(), InputError, "sparse", "dense tensor"),
    ("numpy", lambda x: x.numpy(), InputError, "ndarray", "expected a tensor of shape (N, …)"),
    ("none", lambda x: None, InputError, "NoneType", "expected a tensor of shape (N, …)"),
    ("word", lambda x: "image.png", InputError, "str", "expected a tensor of shape (N, …)"),
    ("numbers", lambda x: [1.0, 2.0], InputError, "input 0 is float", "expected a tensor of shape (N, …)"),
    ("nothing", lambda x: (), InputError, "no input", "Pass a tensor"),
    ("no tensors by name", lambda x: {"x": 3}, InputError, "'x' (int)", ".float()"),
    ("batches that differ", lambda x: (x, x[:1]), InputError, "input 1 has 1 samples", "the first one has 2"),
    ("second one bad", lambda x: (x, with_entry(x, math.nan)), InputError, "input 1 has nan", "(sample 1)"),
    ("model first", lambda x: Net(), InputError, "the input is Net", "expected a tensor"),
)
def test_an_invalid_input_raises(measured, case, error, words):
    bad = case(measured.x)
    with measured.raises(error, *words):
        RelevanceMeasure(measured.net, bad, 1)
    with measured.raises(error, *words):
        coverage(measured.net, bad)


def test_an_inference_tensor_as_input_raises(measured):
    with torch.inference_mode():
        x = measured.x.clone()
    with measured.raises(InputError, "torch.inference_mode", ".clone()"):
        RelevanceMeasure(measured.net, x, 1)


@pytest.mark.parametrize(("mode", "name"), [(torch.no_grad, "no_grad"), (torch.inference_mode, "inference_mode")])
def test_a_measure_without_gradients_raises(measured, mode, name):
    for query in (
        lambda: RelevanceMeasure(measured.net, measured.x, 1),
        lambda: coverage(measured.net, measured.x),
    ):
        with measured.raises(GradModeError, f"torch.{name}()", "requires gradients to be enabled", "outside"), mode():
            query()


def test_errors_of_the_model_itself_propagate(measured):
    """They are passed on unchanged, and nothing is left behind on the model."""
    for inputs, arguments, error in (
        (torch.randn(2, 3, 4, 4), {}, RuntimeError),
        ((measured.x, measured.x), {}, TypeError),
        (measured.x, {"additional_forward_args": 3}, TypeError),
        (measured.x, {"additional_forward_kwargs": {"mask": 3}}, TypeError),
    ):
        with measured.raises(error):
            RelevanceMeasure(measured.net, inputs, 1, **arguments)


def test_a_list_of_inputs_is_treated_as_a_tuple(measured):
    relevance = RelevanceMeasure(measured.net, [measured.x], 1).marginal("input")
    torch.testing.assert_close(relevance, measured.mu.marginal("input"), rtol=0, atol=0)
    assert coverage(measured.net, [measured.x]).is_complete


# -- outputs ------------------------------------------------------------------------------------------------------

JOINED = "does not depend on the inputs", "detach"


@error_cases(
    ("tuple", lambda self, x: (x, x), InputError, "tuple of 0 (float32 (2, 4)), 1", "output="),
    ("none", lambda self, x: None, InputError, "NoneType", "one tensor of shape (N, …)"),
    ("words", lambda self, x: "cat", InputError, "str", "one tensor of shape (N, …)"),
    ("scalar", lambda self, x: x.sum(), InputError, "one number for 2 samples", "(N, …)"),
    ("no batch", lambda self, x: x.sum(0), InputError, "2 inputs", "shape (4,)", "must be the batch"),
    ("transposed", lambda self, x: x.T, InputError, "2 inputs", "shape (4, 2)", "must be the batch"),
    ("repeated", lambda self, x: torch.cat([x, x]), InputError, "shape (4, 4)", "must be the batch"),
    ("no outputs", lambda self, x: x[:, :0], InputError, "shape (2, 0)", "no entries"),
    ("classes", lambda self, x: x.argmax(1), InputError, "int64", "Make the model return its scores"),
    ("decisions", lambda self, x: x > 0, InputError, "torch.bool", "Make the model return its scores"),
    ("complex", lambda self, x: torch.complex(x, x), InputError, "complex64", "real numbers"),
    ("constant", lambda self, x: torch.ones(2, 4), InputError, *JOINED),
    ("detached", lambda self, x: x.detach(), InputError, *JOINED),
    ("data", lambda self, x: x.data, InputError, *JOINED),
    ("parameter", lambda self, x: self.lin.bias.expand(2, 4), InputError, *JOINED),
    ("own leaf", lambda self, x: torch.ones(2, 4, requires_grad=True) * 2, InputError, *JOINED),
    ("no gradients", torch.no_grad()(lambda self, x: x * 2), InputError, *JOINED, "torch.no_grad"),
    ("not finite", lambda self, x: x / 0.0, InputError, "nan or inf", "(samples 0, 1)", "division by zero"),
)
def test_an_invalid_model_output_raises(measured, case, error, words):
    torch.manual_seed(0)
    model = Calls(case).eval()
    with measured.raises(error, *words, model=model):
        RelevanceMeasure(model, measured.x, 1)


def test_an_invalid_choice_of_output_raises(measured):
    model = Calls(lambda self, x: {"scores": x, "classes": x.argmax(1), "other": x * 2}).eval()
    with measured.raises(InputError, "'scores' (float32 (2, 4))", "output=", model=model):
        RelevanceMeasure(model, measured.x, 1)
    with measured.raises(InputError, "output='score'", "'scores' (float32 (2, 4))", model=model):
        RelevanceMeasure(model, measured.x, 1, output="score")
    with measured.raises(InputError, "int64", "Make the model return its scores", model=model):
        RelevanceMeasure(model, measured.x, 1, output="classes")
    assert RelevanceMeasure(model, measured.x, 1, output="scores").batch == 2


def test_a_scalar_output_needs_no_target_and_no_second_dimension(measured):
    model = Calls(lambda self, x: x[:, 1]).eval()
    all_outputs = copy.deepcopy(model)
    all_outputs.function = lambda self, x: x
    expected = RelevanceMeasure(all_outputs, measured.x, 1)
    mu = RelevanceMeasure(model, measured.x)
    assert mu.shape("output") == (2,)
    torch.testing.assert_close(mu.output, model(measured.x).detach())
    torch.testing.assert_close(mu(at("lin")) + mu.sink("lin") + mu.bypass("lin"), torch.ones(2))
    torch.testing.assert_close(mu.marginal("output") + mu.sink("output") + mu.bypass("output"), torch.ones(2))
    torch.testing.assert_close(mu.marginal("output", "channel"), torch.ones(2))
    torch.testing.assert_close(mu.variation("output"), torch.ones(2))
    torch.testing.assert_close(mu.joint("output", "lin").shape, torch.Size([2, 1, 4]))
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))
    assert NRM(model).attribute(measured.x, return_convergence_delta=True)[1].abs().max() < 1e-5
    with measured.raises(TargetError, "target 0 has 1 index", "(2,)", "omit target=", model=model):
        RelevanceMeasure(model, measured.x, 0)
    with measured.raises(EventError, "no channels", model=model):
        mu(at("output").channel(0))


class Captioned(nn.Module):
    """Ids and pixels, by keyword; lengths are integers that are not looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.pixels, self.head = nn.Embedding(9, 4), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, ids, pixels, lengths=None):
        joined = torch.cat([self.embedding(ids), self.pixels(pixels)], 1)
        scale = 1.0 if lengths is None else lengths.reshape(-1, 1).float()
        return self.head(torch.relu(joined).mean(1)) * scale


def test_ids_beside_pixels_end_walks_and_other_integers_do_not():
    torch.manual_seed(0)
    model = Captioned().eval()
    ids, pixels = torch.tensor([[1, 2, 5], [3, 3, 0]]), torch.randn(2, 4, 3)
    mu = RelevanceMeasure(model, {"ids": ids, "pixels": pixels, "lengths": torch.tensor([2, 3])}, 1)
    assert mu.ends == ["embedding", "input"]

    class Embedded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows, pixels):
            joined = torch.cat([rows, self.model.pixels(pixels)], 1)
            return self.model.head(torch.relu(joined).mean(1))

    twin = RelevanceMeasure(Embedded().eval(), (model.embedding(ids).detach(), pixels), 1)
    torch.testing.assert_close(mu.marginal("embedding"), twin.marginal("input[0]"))
    torch.testing.assert_close(mu.marginal("input"), twin.marginal("input[1]"))
    # A reference of the pixels alone leaves the words as they are.
    nu = RelevanceMeasure(model, {"ids": ids, "pixels": pixels}, 1, reference={"pixels": 0 * pixels})
    assert float(nu.marginal("embedding").abs().max()) < 1e-9  # differences of 0 count as 1e-18
    torch.testing.assert_close(nu.marginal("input").sum((1, 2)), torch.ones(2))

    # Integers that are not a batch, such as edges, are no ids, and need no lookup.
    class Edges(nn.Module):
        def forward(self, x, edges):
            return x[edges[0]] @ torch.ones(3, 1) + x[edges[1]] @ torch.ones(3, 1)

    graph = RelevanceMeasure(
        Edges(), {"x": pixels[0], "edges": torch.tensor([[0, 1, 2, 3], [1, 2, 3, 0]])}, batched=False, target=(1, 0)
    )
    assert float(graph.marginal("input").sum()) == pytest.approx(1, abs=1e-5)
