"""Every entry point gives the same answer to each kind of model: the right numbers, or the same class of error.

A kind is a small model and its oracle: a twin in plain operations, measured one sample at a time, or an error. An entry
point is a function from a kind to the mass of each input neuron.
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zennit.canonizers import AttributeCanonizer
from zennit.composites import COMPOSITES, EpsilonPlus
from zennit.core import Composite
from zennit.layer import Sum

from nrm_plugin import NRM, JointNRM, LayerNRM, NeuronNRM, Normalized, NRMAttributor, RelevanceMeasure, errors
from nrm_plugin.attribution.concepts import ConceptNRM
from nrm_plugin.attribution.dataloader import DataLoaderNRM
from nrm_plugin.commands.cli import main
from nrm_plugin.dataset import Maps, Sweep, sweep

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
        x: Input tensor.
        tap: The tap that is compared.
        errors_of: The class of the error of single entry points, whose question has no answer.
        is_one: The entry points for which the batch is one sample, since a context has no samples.
    """

    net: Callable[[], nn.Module]
    twin: Callable[[], nn.Module] | None = lambda: Calls(plain)
    error: type[errors.NRMError] | None = None
    composite: Callable[[], Composite] = EpsilonPlus
    x: Tensor = field(default_factory=lambda: torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    tap: str = "input"
    errors_of: dict[str, type[errors.NRMError]] = field(default_factory=dict)
    is_one: tuple[str, ...] = ()


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


class Joining(EpsilonPlus):
    """Rules with a canonizer that adds a module."""

    def __init__(self) -> None:
        super().__init__(canonizers=[AttributeCanonizer(self.attributes)])

    @staticmethod
    def attributes(name: str, module: nn.Module) -> dict[str, Any] | None:
        return {"function": with_sum, "join": Sum()} if isinstance(module, Calls) else None


class Recurrent(nn.Module):
    """A recurrent layer over two times."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.r, self.b, self.first = nn.LSTM(2, 6, batch_first=batch_first), nn.Linear(6, 2), batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 2)
        return self.b(self.r(x)[0][:, -1] if self.first else self.r(x.transpose(0, 1))[0][-1])


class Encoder(nn.Module):
    """A transformer over two tokens."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(2, 1, 6, batch_first=batch_first)
        self.r, self.b = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(2, 2)
        self.first = batch_first

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(-1, 2, 2)
        return self.b(self.r(x).mean(1) if self.first else self.r(x.transpose(0, 1)).mean(0))


class Words(nn.Module):
    """A mean of embeddings."""

    def __init__(self, change: Callable[[Tensor], Tensor], dim: int, **options: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.b, self.change, self.dim = nn.Embedding(12, 6, **options), nn.Linear(6, 2), change, dim

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.e(self.change(ids)).mean(self.dim))


def renormalized() -> nn.Module:
    net = Words(lambda ids: ids, 1)
    net.e.weight.data = torch.renorm(net.e.weight.data, 2, 0, 0.5)
    return net


def gated_by_a_hook() -> nn.Module:
    net = Calls(plain)
    net.a.register_forward_hook(lambda module, args, output: output * (output > output.detach().mean(0)))
    return net


def largest(h: Tensor) -> Tensor:
    """Largest entry of each group of three, with ties."""
    groups = torch.tensor([0, 0, 0, 1, 1, 1]).expand_as(h)
    found = h.new_zeros(len(h), 2).scatter_reduce(1, groups, h.clamp(max=0.2), "amax", include_self=False)
    return torch.cat([found, found, found], 1)


def largest_of_rows(h: Tensor) -> Tensor:
    found = h.clamp(max=0.2).view(len(h), 2, 3).amax(2)
    return torch.cat([found, found, found], 1)


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
        composite=Joining,
    ),
    "unsupported operation": Kind(lambda: Calls(through(torch.special.entr)), None, errors.UnsupportedOperationError),
    "checkpoint": Kind(
        lambda: Calls(through(lambda h: torch.utils.checkpoint.checkpoint(torch.relu, h, use_reentrant=False)))
    ),
    "reentrant checkpoint": Kind(
        lambda: Calls(through(lambda h: torch.utils.checkpoint.checkpoint(torch.relu, h, use_reentrant=True))),
        None,
        errors.UnsupportedOperationError,
    ),
    "vmap": Kind(lambda: Calls(through(torch.vmap(torch.sigmoid))), None, errors.UnsupportedOperationError),
    "state that requires a gradient": Kind(
        lambda: Calls(lambda s, x: s.b(s.a(x).relu() + torch.full((6,), 2.0).requires_grad_())),
        lambda: Calls(through(lambda h: h + torch.full((6,), 2.0))),
    ),
    "samples that mix": Kind(
        lambda: Calls(through(lambda h: h - h.mean(0))), None, errors.FoldingError, is_one=("by_context",)
    ),
    "samples that mix by a threshold": Kind(
        lambda: Calls(through(lambda h: h * (h > h.median(0).values))),
        None,
        errors.FoldingError,
        is_one=("by_context",),
    ),
    "samples that mix by a hook of the user": Kind(gated_by_a_hook, None, errors.FoldingError, is_one=("by_context",)),
    "ids transformed before the lookup": Kind(
        lambda: Words(lambda ids: (ids + 1).t(), 0),
        lambda: Words(lambda ids: ids + 1, 1),
        x=torch.tensor([[0, 3, 1, 10], [7, 7, 2, 5], [9, 0, 4, 4]]),
        tap="e",
        errors_of={"by_inputs": errors.InputError, "by_neuron": errors.InputError},  # relevance of integers
    ),
    "embedding with max_norm": Kind(
        lambda: Words(lambda ids: ids, 1, max_norm=0.5),
        renormalized,
        x=torch.tensor([[0, 3, 1, 10], [7, 7, 2, 5], [9, 0, 4, 4]]),
        tap="e",
        errors_of={"by_inputs": errors.InputError, "by_neuron": errors.InputError},
    ),
    "largest of a scatter, with ties": Kind(lambda: Calls(through(largest)), lambda: Calls(through(largest_of_rows))),
    "promotion to double": Kind(
        lambda: Calls(through(lambda h: (h * torch.full((6,), 2.0, dtype=torch.float64)).float())),
        lambda: Calls(through(lambda h: h * 2)),
    ),
    "recurrent layer with time first": Kind(lambda: Recurrent(False), lambda: Recurrent(True)),
    "transformer with tokens first": Kind(lambda: Encoder(False), lambda: Encoder(True)),
    "scripted": Kind(lambda: torch.jit.trace(Calls(plain), torch.randn(3, 4)), None, errors.ModelStateError),
}


def by_measure(kind: Kind, folder: Path) -> Tensor:
    return RelevanceMeasure(kind.net().eval(), kind.x, TARGET, composite=kind.composite()).marginal(kind.tap)


def by_inputs(kind: Kind, folder: Path) -> Tensor:
    return NRM(kind.net().eval(), kind.composite()).attribute(kind.x, TARGET, unit="measure")


def by_layer(kind: Kind, folder: Path) -> Tensor:
    method = LayerNRM(kind.net().eval(), composite=kind.composite())
    layers = method.measure(kind.x, TARGET).layers
    return method.attribute(kind.x, TARGET, unit="measure")[layers.index(kind.tap)]


def by_neuron(kind: Kind, folder: Path) -> Tensor:
    net = kind.net().eval()
    return NeuronNRM(net, net, composite=kind.composite()).attribute(kind.x, TARGET, unit="measure")


def by_joint(kind: Kind, folder: Path) -> Tensor:
    net = kind.net().eval()
    joint = JointNRM(net, net, kind.tap, kind.composite()).attribute(kind.x, TARGET, over="neuron", unit="measure")
    return joint.sum(1)


def by_attributor(kind: Kind, folder: Path) -> Tensor:
    with NRMAttributor(kind.net().eval(), kind.composite()) as attributor:
        return attributor(kind.x, torch.eye(2)[[TARGET] * len(kind.x)])[1].marginal(kind.tap)


def by_context(kind: Kind, folder: Path) -> Tensor:
    net, x = kind.net().eval(), kind.x.clone()
    ends = [x.requires_grad_()] if x.is_floating_point() else []
    with Normalized(kind.composite()).context(net):
        if not ends:  # walks end where the user makes a leaf

            def end(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                ends.append(output.detach().requires_grad_())
                return ends[0]

            net.get_submodule(kind.tap).register_forward_hook(end)
        relevance = torch.autograd.grad(net(x)[:, TARGET].sum(), ends)[0]
    return relevance if len(relevance) == len(x) else relevance.transpose(0, 1)


def by_sweep(kind: Kind, folder: Path) -> Tensor:
    data, settings = TensorDataset(kind.x), {"composite": kind.composite(), "progress": False, "batch_size": 2}
    found = sweep(kind.net().eval(), data, Maps(kind.tap), folder, target=TARGET, **settings)
    return found.maps(f"maps({kind.tap})", range(len(kind.x)))


def by_command(kind: Kind, folder: Path) -> Tensor:
    """The error is that of the measure if the command prints its message."""
    code = {"net": kind.net, "data": lambda: TensorDataset(kind.x)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "entry_nets", SimpleNamespace(**code))
        patch.setitem(COMPOSITES, "entry_rules", kind.composite)
        errors_of_command = io.StringIO()
        with contextlib.redirect_stderr(errors_of_command), contextlib.redirect_stdout(io.StringIO()):
            status = main(["sweep", "entry_nets:data", "--model", "entry_nets:net", "--layers", kind.tap, "--target",
                           str(TARGET), "--composite", "entry_rules", "--on-error", "raise", "--batch-size", "3",
                           "--quiet", "--out", str(folder / "swept")])  # fmt: skip
    if status:
        with pytest.raises(errors.NRMError) as caught:
            by_measure(kind, folder)
        assert str(caught.value).partition("(")[0] in errors_of_command.getvalue()  # without the place in the source
        raise caught.value
    rows = Sweep.open(folder / "swept").rows(f"marginal({kind.tap})")
    rows = rows.sort_by([("sample", "ascending"), ("group", "ascending")])
    return torch.tensor(rows["value"].to_pylist())


ENTRIES = [by_measure, by_inputs, by_layer, by_neuron, by_joint, by_attributor, by_context, by_sweep, by_command]


@functools.cache
def of_twin(kind: str) -> Tensor:
    """Relevance of each sample alone in the twin of a kind."""
    case = KINDS[kind]
    twin = case.twin().eval()
    rows = [RelevanceMeasure(twin, row[None], TARGET, composite=EpsilonPlus()).marginal(case.tap) for row in case.x]
    return torch.cat(rows)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_entry_point_gives_the_same_answer(kind, entry, tmp_path):
    case, name = KINDS[kind], entry.__name__
    error = None if name in case.is_one else case.errors_of.get(name, case.error)
    if error is not None:
        with pytest.raises(error) as caught:
            entry(case, tmp_path)
        assert type(caught.value) is error
        return
    rules = case.composite()
    if name in case.is_one:  # relevance 1 starts at each sample
        start = torch.eye(2)[[TARGET] * len(case.x)]
        mu = RelevanceMeasure(case.net().eval(), case.x, composite=rules, start=start, batched=False)
        expected = mu.marginal(case.tap)[0] * len(case.x)
    else:
        expected = of_twin(kind)
    if entry is by_command and expected.ndim > 2:  # rows are those of channels
        expected = expected.sum(1)
    torch.testing.assert_close(entry(case, tmp_path).view_as(expected), expected, rtol=1e-4, atol=1e-5)


NO_FLAGS = [torch.tensor(True), torch.tensor([1.0, 0.0]), np.array([True, False]), None, 1, "no"]


@pytest.mark.parametrize("batched", NO_FLAGS, ids=repr)
@pytest.mark.parametrize("entry", [RelevanceMeasure, NRM], ids=["measure", "inputs"])
def test_batched_is_true_or_false(entry, batched):
    more = (torch.randn(3, 4), TARGET) if entry is RelevanceMeasure else ()
    with pytest.raises(errors.InputError, match="neither True nor False"):
        entry(Calls(plain).eval(), *more, batched=batched)


NO_SELECTORS = [np.array(1.0), np.array([1.0]), np.array([1, 2]), np.ones(6, bool), (np.array([1]),), slice(0.5, 2)]


@pytest.mark.parametrize("selector", NO_SELECTORS, ids=repr)
def test_neuron_selectors_are_ints_and_slices(selector):
    net = Calls(plain).eval()
    with pytest.raises(errors.TargetError, match="neuron_selector="):
        NeuronNRM(net, net.a).attribute(torch.randn(3, 4), selector)


def test_a_data_loader_has_batches_of_samples():
    with pytest.raises(errors.InputError, match="data loader"):
        DataLoaderNRM(NRM(Calls(plain), batched=False))


def test_a_data_loader_and_concepts_take_an_output():
    net = Calls(lambda s, x: {"a": s.a(x), "b": s.b(s.a(x).relu())}).eval()
    x, rows = torch.randn(5, 4), NRM(Calls(plain).eval())
    expected = torch.cat([rows.attribute(row[None], target=TARGET) for row in x])
    found = DataLoaderNRM(NRM(net, output="b")).attribute([x[:3], x[3:]], target=TARGET)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(ConceptNRM(net, output="b").attribute(x, [{"y": [TARGET]}])[0], expected)


def test_a_leaf_from_before_the_call_takes_relevance_in_a_context():
    x, probe = torch.randn(3, 4, requires_grad=True), torch.zeros(3, 6, requires_grad=True)
    net = Calls(lambda s, x: s.b(s.a(x).relu() + probe)).eval()
    with Normalized(EpsilonPlus()).context(net):
        assert torch.autograd.grad(net(x)[:, TARGET].sum(), probe)[0].shape == (3, 6)
