"""Every entry point gives the same answer to each kind of model: the right numbers, or the same class of error.

A kind is a small model and its oracle: a twin in plain operations, measured one sample at a time, or an error. An entry
point is a function from a kind to the mass of each input neuron.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zennit.canonizers import AttributeCanonizer
from zennit.composites import EpsilonPlus
from zennit.core import Composite
from zennit.layer import Sum

from nrm_plugin import NRM, JointNRM, LayerNRM, NeuronNRM, Normalized, NRMAttributor, RelevanceMeasure, errors
from nrm_plugin.dataset import Maps, sweep

SAMPLES, FEATURES, TARGET = 3, 4, 1


class Calls(nn.Module):
    """A function of two layers: ``function(module, x)``, with the layers ``a`` and ``b`` and further parts."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **parts: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.a, self.b = nn.Linear(FEATURES, 6), nn.Linear(6, 2)
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def plain(self: Any, x: Tensor) -> Tensor:
    return self.b(self.a(x).relu())


def through(change: Callable[[Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """A function between both layers."""
    return lambda self, x: self.b(change(self.a(x).relu()))


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        net: The model.
        twin: A model of the same measure in plain operations; None where there is none.
        error: The class of the error of every entry point instead.
        composite: Its rules.
        samples: Input tensor.
    """

    net: Callable[[], nn.Module]
    twin: Callable[[], nn.Module] | None = lambda: Calls(plain)
    error: type[errors.NRMError] | None = None
    composite: Callable[[], Composite] = EpsilonPlus
    x: Tensor = field(default_factory=lambda: torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))


class Scaled(torch.autograd.Function):
    """An elementwise function of the user."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


class Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class MultiheadAttention(Module):
    """Not torch's."""

    dropout = "none"


class Clone(torch.autograd.Function):
    """Not the operation of that name: it mixes features."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def layers_in_a_list() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(FEATURES, 6), nn.Linear(6, 2)]
    return Module(lambda x: layers[1](layers[0](x).relu()))


def children_with_names_of_taps() -> nn.Module:
    net = Calls(plain)
    parts = nn.ModuleDict({"input": net.a, "output": net.b})
    return Calls(lambda self, x: self.parts["output"](self.parts["input"](x).relu()), parts=parts, a=None, b=None)


def hooked() -> nn.Module:
    net = Calls(plain)
    for module in (net, net.a, net.b):
        module.register_full_backward_hook(lambda *_: None)
        module.register_forward_hook(lambda module, args, output: output.clone())
    return net


def skip(self: Any, x: Tensor) -> Tensor:
    hidden = self.a(x).relu()
    return self.b(hidden + self.c(hidden))


def skip_net(function: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    torch.manual_seed(1)
    return Calls(function, c=nn.Linear(6, 6), **parts)


def with_sum(self: Any, x: Tensor) -> Tensor:
    hidden = self.a(x).relu()
    return self.b(self.join(torch.stack([hidden, self.c(hidden)], -1)))


def joining() -> AttributeCanonizer:
    def attributes(name: str, module: nn.Module) -> dict[str, Any] | None:
        return {"function": with_sum, "join": Sum()} if isinstance(module, Calls) else None

    return AttributeCanonizer(attributes)


KINDS: dict[str, Kind] = {
    "plain": Kind(lambda: Calls(plain)),
    "samples second": Kind(lambda: Calls(lambda s, x: s.b(s.a(x.t().contiguous().t()).relu().t().clone().t()))),
    "layers in a list": Kind(layers_in_a_list),
    "constant that requires a gradient": Kind(
        lambda: Calls(through(lambda h: h + torch.ones(6, requires_grad=True))),
        lambda: Calls(through(lambda h: h + torch.ones(6))),
    ),
    "children with names of taps": Kind(children_with_names_of_taps),
    "hooks of the user": Kind(hooked),
    "own class named as torch's": Kind(lambda: Calls(lambda s, x: s.b(s.m(s.a(x))), m=MultiheadAttention(torch.relu))),
    "own function named as torch's": Kind(lambda: Calls(through(Clone.apply)), None, errors.UnsupportedOperationError),
    "elementwise function": Kind(
        lambda: Calls(lambda s, x: s.b(s.m(s.a(x).relu())), m=Module(Scaled.apply)),
        lambda: Calls(through(lambda h: h * 2)),
    ),
    "canonizer that adds modules": Kind(
        lambda: skip_net(skip),
        lambda: skip_net(with_sum, join=Sum()),
        composite=lambda: EpsilonPlus(canonizers=[joining()]),
    ),
    "unsupported operation": Kind(lambda: Calls(through(torch.special.entr)), None, errors.UnsupportedOperationError),
    "checkpoint": Kind(
        lambda: Calls(through(lambda h: torch.utils.checkpoint.checkpoint(torch.relu, h, use_reentrant=False)))
    ),
    "scripted": Kind(lambda: torch.jit.trace(Calls(plain), torch.randn(3, 4)), None, errors.ModelStateError),
}


def by_measure(kind: Kind, folder: Path) -> Tensor:
    return RelevanceMeasure(kind.net().eval(), kind.x, TARGET, composite=kind.composite()).marginal("input")


def by_inputs(kind: Kind, folder: Path) -> Tensor:
    return NRM(kind.net().eval(), kind.composite()).attribute(kind.x, TARGET, unit="measure")


def by_layer(kind: Kind, folder: Path) -> Tensor:
    method = LayerNRM(kind.net().eval(), composite=kind.composite())
    layers = method.measure(kind.x, TARGET).layers
    return method.attribute(kind.x, TARGET, unit="measure")[layers.index("input")]


def by_neuron(kind: Kind, folder: Path) -> Tensor:
    net = kind.net().eval()
    return NeuronNRM(net, net, composite=kind.composite()).attribute(kind.x, TARGET, unit="measure")


def by_joint(kind: Kind, folder: Path) -> Tensor:
    net = kind.net().eval()
    joint = JointNRM(net, net, "input", kind.composite()).attribute(kind.x, TARGET, over="neuron", unit="measure")
    return joint.sum(1).view_as(kind.x)


def by_attributor(kind: Kind, folder: Path) -> Tensor:
    with NRMAttributor(kind.net().eval(), kind.composite()) as attributor:
        return attributor(kind.x, torch.eye(2)[[TARGET] * len(kind.x)])[1].marginal("input")


def by_context(kind: Kind, folder: Path) -> Tensor:
    x = kind.x.clone().requires_grad_()
    with Normalized(kind.composite()).context(kind.net().eval()) as net:
        return torch.autograd.grad(net(x)[:, TARGET].sum(), x)[0]


def by_sweep(kind: Kind, folder: Path) -> Tensor:
    data, settings = TensorDataset(kind.x), {"composite": kind.composite(), "progress": False, "batch_size": 2}
    found = sweep(kind.net().eval(), data, Maps("input"), folder, target=TARGET, **settings)
    return found.maps("maps(input)", range(len(kind.x)))


ENTRIES = [by_measure, by_inputs, by_layer, by_neuron, by_joint, by_attributor, by_context, by_sweep]


CONSTANTS = ("layers in a list", "constant that requires a gradient")
ROWS = [
    (kind, entry)
    for kind in KINDS
    for entry in ENTRIES
    # In a context, every tensor that requires a gradient carries relevance, and nothing audits the graph, as in Zennit.
    if entry is not by_context or kind not in (*CONSTANTS, "own function named as torch's")
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize(("kind", "entry"), ROWS)
def test_every_entry_point_gives_the_same_answer(kind, entry, tmp_path):
    case = KINDS[kind]
    if case.error is not None:
        with pytest.raises(case.error) as caught:
            entry(case, tmp_path)
        assert type(caught.value) is case.error
        return
    twin = case.twin().eval()
    rows = [RelevanceMeasure(twin, row[None], TARGET, composite=EpsilonPlus()).marginal("input") for row in case.x]
    torch.testing.assert_close(entry(case, tmp_path), torch.cat(rows), rtol=1e-4, atol=1e-5)
