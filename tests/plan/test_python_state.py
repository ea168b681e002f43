"""Automatic plans follow every change of a model: all entries of weights, and the Python objects that it reads.

Covers: nrm_plugin.plan.tensor_sums, nrm_plugin.model.user_code.
"""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.core import BasicHook, stabilize
from zennit.rules import NoMod

from nrm_plugin import Normalized
from nrm_plugin.plan.planned_measure import PlannedMeasure
from nrm_plugin.plan.reuse import Measures
from nrm_plugin.plan.tensor_sums import TensorSums

SCALE = 1.0
SCALES = {"scale": 1.0}


def scaled(h: Tensor) -> Tensor:
    return h * SCALE


@dataclasses.dataclass
class Config:
    scale: float = 1.0


@dataclasses.dataclass(slots=True)
class Slots:
    scale: float = 1.0


class Net(nn.Module):
    def __init__(self, scale: Callable[["Net", Tensor], Tensor], **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 40), nn.Linear(40, 300), nn.Linear(300, 3)
        self.scale = scale
        for name, value in attributes.items():
            setattr(self, name, value)
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.scale(self, self.b(torch.relu(self.a(x))))))


def closed_over(factor: float) -> tuple[Callable[[Net, Tensor], Tensor], Callable[[float], None]]:
    def change(value: float) -> None:
        nonlocal factor
        factor = value

    return lambda net, h: h * factor, change


AROUND, CHANGE = closed_over(1.0)
LAYER = nn.Linear(300, 300).double()


def scale_global(value: float) -> None:
    global SCALE
    SCALE = value


ATTRIBUTES: dict[str, tuple[Callable[[], Net], Callable[[Net, float], Any]]] = {
    "namespace": (
        lambda: Net(lambda net, h: h * net.config.scale, config=types.SimpleNamespace(scale=1.0)),
        lambda net, value: setattr(net.config, "scale", value),
    ),
    "dataclass": (
        lambda: Net(lambda net, h: h * net.config.scale, config=Config()),
        lambda net, value: setattr(net.config, "scale", value),
    ),
    "slots": (
        lambda: Net(lambda net, h: h * net.config.scale, config=Slots()),
        lambda net, value: setattr(net.config, "scale", value),
    ),
    "nested dictionary": (
        lambda: Net(lambda net, h: h * net.config["a"][0]["scale"], config={"a": [{"scale": 1.0}]}),
        lambda net, value: net.config["a"][0].update(scale=value),
    ),
    "array": (
        lambda: Net(lambda net, h: h * float(net.config[0]), config=np.ones(3)),
        lambda net, value: net.config.fill(value),
    ),
    "global": (lambda: Net(lambda net, h: scaled(h)), lambda net, value: scale_global(value)),
    "global dictionary": (
        lambda: Net(lambda net, h: h * SCALES["scale"]),
        lambda net, value: SCALES.update(scale=value),
    ),
    "closure": (lambda: Net(AROUND), lambda net, value: CHANGE(value)),
    "class": (lambda: Net(lambda net, h: h * net.factor), lambda net, value: setattr(Net, "factor", value)),
    "layer that is not registered": (
        lambda: Net(lambda net, h: LAYER(h)),
        lambda net, value: LAYER.weight.data[7].fill_(value),
    ),
}
Net.factor = 1.0  # type: ignore[assignment]


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_plan_follows_the_python_objects_that_a_model_reads(name):
    build, change = ATTRIBUTES[name]
    net, x = build(), torch.randn(2, 4, dtype=torch.float64)
    try:
        check_followed(net, x, lambda: change(net, 3.0))
    finally:
        change(net, 1.0)


def check_followed(net: nn.Module, x: Tensor, change: Callable[[], Any], composite: Normalized | None = None) -> None:
    """A plan is used until the change; afterwards, measures equal those without a plan."""
    measures = Measures()
    kinds = [measures(net, x + shift, 1, composite=composite) for shift in (0.1, 0.2, 0.3, 0.4)]
    before = [mu.marginal("input") for mu in kinds][-1]
    assert isinstance(kinds[-1], PlannedMeasure)
    change()
    expected = Measures()(net, x + 0.4, 1, composite=composite).marginal("input")
    assert float((expected - before).abs().max()) > 1e-6 * float(before.abs().max()), "the change has an effect"
    for _ in range(2):
        found = measures(net, x + 0.4, 1, composite=composite).marginal("input")
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


WRITES: dict[str, Callable[[nn.Module], Any]] = {
    "row": lambda net: net.b.weight.data[7].zero_(),
    "column": lambda net: net.b.weight.data[:, 5].zero_(),
    "entry": lambda net: net.b.weight.data[7, 33].add_(9),
    "exchanged rows": lambda net: net.b.weight.data.copy_(net.b.weight.data.flip(0)),
    "array": lambda net: net.b.weight.detach().numpy()[:, 2].fill(2),
    "bias": lambda net: net.b.bias.data[201].add_(9),
}


@pytest.mark.parametrize("name", WRITES)
@pytest.mark.parametrize("is_transposed", [False, True])
def test_a_plan_follows_every_entry_of_a_weight(name, is_transposed):
    net = Net(lambda net, h: h)
    if is_transposed:  # the rows of the weight are columns in memory
        net.b.weight.data = net.b.weight.data.T.contiguous().T
    check_followed(net, torch.randn(2, 4, dtype=torch.float64), lambda: WRITES[name](net))


class Rule(BasicHook):
    """A rule with a setting of its own."""

    def __init__(self, shift: float = 0.1) -> None:
        self.shift = shift
        super().__init__(
            input_modifiers=[lambda input: input],
            param_modifiers=[NoMod()],
            output_modifiers=[lambda output: output],
            gradient_mapper=lambda gradient, output: gradient / stabilize(output[0], self.shift),
            reducer=lambda inputs, gradients: inputs[0] * gradients[0],
        )

    def copy(self) -> "Rule":
        return Rule(self.shift)


@pytest.mark.medium
def test_a_plan_follows_the_settings_of_a_rule_of_ones_own():
    rule = Rule()
    composite = Normalized(NameMapComposite([(["a", "b", "c"], rule)]), residual="sink")
    net, x = Net(lambda net, h: h), torch.randn(2, 4, dtype=torch.float64)
    check_followed(net, x, lambda: setattr(rule, "shift", 5.0), composite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64])
@pytest.mark.parametrize("shape", [(3,), (40, 30), (70, 80, 3), (300, 500)])
def test_sums_of_tensors_notice_every_entry(dtype, shape):
    draw = torch.Generator().manual_seed(0)
    values = (100 * torch.randn(shape, generator=draw)).to(dtype)
    sums = TensorSums([torch.ones(5).to(dtype), values])
    assert not sums.have_changed()
    flat = values.view(-1)
    for place in (0, 1, len(flat) // 2, len(flat) - 1):
        kept = flat[place].clone()
        flat[place] += 8
        assert sums.have_changed()
        flat[place] = kept
        assert not sums.have_changed()
    first, last = flat[0].clone(), flat[-1].clone()
    flat[0], flat[-1] = last, first
    assert sums.have_changed()


def test_sums_of_tensors_with_infinite_entries_and_of_unusual_layouts():
    mask = torch.full((60, 60), -math.inf).triu(1)
    permuted = torch.randn(20, 30, 40).permute(2, 0, 1)
    expanded, empty = torch.ones(1).expand(5), torch.empty(0)
    sums = TensorSums([mask, permuted, expanded, empty, torch.eye(3).to_sparse()])
    assert not sums.have_changed()
    mask[59, 0] = 1
    assert sums.have_changed()
    mask[59, 0] = 0
    assert not sums.have_changed()
    permuted[3, 4, 5] += 1
    assert sums.have_changed()


def test_a_tensor_without_finite_sums_leaves_those_of_others_compared():
    """Large entries overflow in a sum; entries that are not finite change it to nan, which equals nothing."""
    finite, huge, wrong = torch.ones(5000), torch.full((5000,), 3e38), torch.full((5000,), math.nan)
    sums = TensorSums([finite, huge, wrong])
    assert not sums.have_changed()
    for values in (finite, huge, wrong):
        kept = values[4321].clone()
        values[4321] = 2
        assert sums.have_changed()
        values[4321] = kept
        assert not sums.have_changed()
