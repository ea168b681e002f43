"""Messages of errors are short, name what was given, and say what to do.

Covers: nrm_plugin.errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import (
    NRM,
    JointNRM,
    LayerNRM,
    NeuronNRM,
    Normalized,
    NRMAttributor,
    NRMDefault,
    RelevanceMeasure,
    at,
    errors,
)
from nrm_plugin.errors import brief

LONGEST = 700
X = torch.randn((2, 8), generator=torch.Generator().manual_seed(0))
HUGE = torch.zeros(64, 64, 3)


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(30)), nn.Linear(8, 3)).eval()


NET = chain()
MU = RelevanceMeasure(NET, X, 1)
EVENT = at("3.0")[1]
VALUES: dict[str, Any] = {
    "mask": torch.ones(2, 3, dtype=torch.bool),
    "tensor": HUGE,
    "integers": HUGE.long(),
    "array": np.zeros((100, 100)),
    "numbers": list(range(5000)),
    "tensors": [HUGE] * 5,
    "pair of tensors": (HUGE, HUGE),
    "mapping": {key: HUGE for key in range(20)},
    "set": set(range(5000)),
    "text": "a" * 5000,
    "names": [f"layer{number}" for number in range(3000)],
    "bytes": b"x" * 3000,
    "modules": nn.ModuleList(NET),
    "class": nn.Linear,
    "object": object(),
}
ASKED: dict[str, Callable[[Any], Any]] = {
    "target": lambda v: RelevanceMeasure(NET, X, v),
    "target function": lambda v: RelevanceMeasure(NET, X, lambda outputs: v),
    "start": lambda v: RelevanceMeasure(NET, X, start=lambda outputs: v),
    "model": lambda v: RelevanceMeasure(v, X, 1) if not isinstance(v, nn.Module) else RelevanceMeasure(nn.Linear, X),
    "composite": lambda v: RelevanceMeasure(NET, X, 1, composite=v),
    "residual": lambda v: RelevanceMeasure(NET, X, 1, residual=v),
    "gain limit": lambda v: RelevanceMeasure(NET, X, 1, gain_limit=v),
    "uncovered": lambda v: RelevanceMeasure(NET, X, 1, uncovered=v),
    "memory": lambda v: RelevanceMeasure(NET, X, 1, max_memory=v),
    "marginal": lambda v: MU.marginal([v]),
    "over": lambda v: MU.marginal("3", v),
    "given": lambda v: MU.marginal("3", given=v),
    "sink": lambda v: MU.sink(v),
    "sink kind": lambda v: MU.sink("3", v),
    "mass": lambda v: MU([v]),
    "joint": lambda v: MU.joint(v, "3"),
    "joints": lambda v: MU.joints([v, "3"]),
    "flow": lambda v: MU.flow([v, "3"]),
    "flow top": lambda v: MU.flow(["output", "3"], top=v, sample=0),
    "flow mass": lambda v: MU.flow(["output", "3"], min_mass=v, sample=0),
    "flow share": lambda v: MU.flow(["output", "3"], coverage=v, sample=0),
    "flow sample": lambda v: MU.flow(["output", "3"], sample=v),
    "index": lambda v: MU(at("3")[v]),
    "side": lambda v: at("3", side=v),
    "and": lambda v: EVENT & v,
    "unit": lambda v: NRM(NET).attribute(X, 1, unit=v),
    "layer": lambda v: LayerNRM(NET, [v]).attribute(X, 1),
    "neurons": lambda v: NeuronNRM(NET, "3").attribute(X, v),
    "joint layers": lambda v: JointNRM(NET, v, "3").attribute(X, 1),
    "attributor": lambda v: NRMAttributor(NET)(X, lambda outputs: v),
    "sums": lambda v: Normalized(NRMDefault(), sums=v),
    "attention": lambda v: Normalized(NRMDefault(), attention=v),
}


VALID = {("index", "integers"), ("start", "mask"), ("attributor", "mask"), ("neurons", "array")}
FUNCTIONS = {("target", "modules"), ("neurons", "modules")}
"""A module is called as a function of the outputs."""
CASES = [case for case in itertools.product(ASKED, VALUES) if case not in VALID | FUNCTIONS]


@pytest.mark.medium
@pytest.mark.parametrize(("asked", "value"), CASES)
def test_messages_are_short(asked, value):
    with pytest.raises((errors.NRMError, TypeError, ValueError)) as caught:
        ASKED[asked](VALUES[value])
    assert 20 < len(str(caught.value)) < LONGEST


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, "3"),
        ("name", "'name'"),
        ((1, 2), "(1, 2)"),
        ((1,), "(1,)"),
        ([], "[]"),
        ({"a": 1}, "{'a': 1}"),
        (list(range(50)), "[0, 1, 2, 3, 4, 5, 6, 7, … 42 more]"),
        (torch.zeros(2, 3), "<Tensor of shape (2, 3), torch.float32>"),
        (np.zeros(4), "<ndarray of shape (4,), float64>"),
        (nn.Linear(2, 2), "<Linear>"),
        (nn.Linear, "the class Linear"),
        ([torch.zeros(9)], "[<Tensor of shape (9,), torch.float32>]"),
    ],
)
def test_a_value_is_shown_in_brief(value, expected):
    assert brief(value) == expected


class Returns(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.function = nn.Linear(8, 3), function

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.linear(x))


@pytest.mark.parametrize(
    ("function", "count", "words"),
    [
        (lambda h: h.sum(), 1, ("(N,)", "(1, …)", "one number")),
        (lambda h: h.sum(), 2, ("(N,)", "loss", "2 samples")),
        (lambda h: h.argmax(1), 2, ("int64", "scores")),
        (lambda h: h[:, :0], 2, ("(2, 0)", "no entries")),
        (lambda h: torch.complex(h, h), 2, ("complex64", "magnitude")),
    ],
)
def test_the_advice_on_outputs_fits_them(function, count, words):
    with pytest.raises(errors.InputError) as caught:
        RelevanceMeasure(Returns(function).eval(), X[:count])
    assert not [word for word in words if word not in str(caught.value)], str(caught.value)
    assert "unsqueeze" not in str(caught.value)


COLLECTIONS = {"tuple": tuple, "list": list, "iterator": iter, "keys": lambda names: dict.fromkeys(names).keys()}


@pytest.mark.medium
@pytest.mark.parametrize("collect", COLLECTIONS.values(), ids=COLLECTIONS)
def test_several_layers_come_in_any_collection(collect):
    names = ["9", "3.0"]
    assert set(MU.marginal(collect(names))) == set(names)
    for found, expected in zip(MU.joints(collect(names)), MU.joints(names), strict=True):
        torch.testing.assert_close(found, expected)
    assert len(MU.flow(collect(names), sample=0).joints) == 1
    relevance = LayerNRM(NET, collect(names)).attribute(X, 1)
    assert [tuple(part.shape) for part in relevance] == [(2, 8), (2, 8)]
    modules = collect([NET[9], NET[3]])
    assert set(MU.marginal(modules)) == {NET[9], NET[3]}


def test_one_layer_where_several_are_needed_is_an_error():
    for ask in (lambda: MU.joints("9"), lambda: MU.flow("9", sample=0), lambda: MU.flow(NET[3], sample=0)):
        with pytest.raises(errors.EventError, match="several layers"):
            ask()
