"""Checkpointed, compiled, scripted, wrapped and transformed models: right numbers, or an error with a remedy.

Covers: nrm_plugin.model.saved_tensor_hooks.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint
from zennit.composites import EpsilonPlus

from nrm_plugin import NRM, LayerNRM, Normalized, RelevanceMeasure
from nrm_plugin.errors import GradModeError, InputError, ModelStateError, StorageError, UnsupportedOperationError

X = torch.randn((3, 4), generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.a, self.b, self.c, self.reentrant = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2), reentrant

    def block(self, x: Tensor) -> Tensor:
        return self.b(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        is_plain = self.reentrant is None
        return self.c(self.block(x) if is_plain else checkpoint(self.block, x, use_reentrant=self.reentrant))


def build(reentrant: bool | None = None) -> Net:
    torch.manual_seed(0)
    return Net(reentrant).eval()


def measured(net: nn.Module, x: Tensor = X) -> Tensor:
    return RelevanceMeasure(net, x, 1, composite=EpsilonPlus()).marginal("input")


def in_context(net: nn.Module, x: Tensor = X) -> Tensor:
    leaf = x.clone().requires_grad_()
    with Normalized(EpsilonPlus()).context(net) as hooked:
        return torch.autograd.grad(hooked(leaf)[:, 1].sum(), leaf)[0]


def attributed(net: nn.Module, x: Tensor = X) -> Tensor:
    return NRM(net, EpsilonPlus()).attribute(x, 1, unit="measure")


ENTRIES = [measured, in_context, attributed]


class Functional(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        weights = {name: weight.detach().clone() for name, weight in self.net.named_parameters()}
        return torch.func.functional_call(self.net, weights, (x,))


def compiled_in_place() -> nn.Module:
    net = build()
    net.compile(backend="eager")
    net(X), net(X.clone().requires_grad_())  # compiled without hooks
    return net


RIGHT: dict[str, Callable[[], nn.Module]] = {
    "checkpoint": lambda: build(reentrant=False),
    "functional_call": lambda: Functional(build()).eval(),
    "module.compile": compiled_in_place,
    "DataParallel": lambda: nn.DataParallel(build()),
}


@pytest.mark.medium
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", RIGHT)
def test_the_numbers_are_those_of_the_plain_model(kind, entry):
    torch.testing.assert_close(entry(RIGHT[kind]()), measured(build()))


class Routed(nn.Module):
    """A checkpointed function of which autograd saves indices and masks."""

    def __init__(self, checkpoints: bool) -> None:
        super().__init__()
        self.a, self.checkpoints = nn.Linear(4, 4), checkpoints

    def block(self, x: Tensor) -> Tensor:
        h = self.a(x).masked_fill(torch.tensor([True, False, True, False]), 0.0)[:, [2, 1, 0, 3]]
        h = torch.where(h > 0, h, torch.zeros(()))
        return h + F.max_pool1d(x.unsqueeze(1), 2).squeeze(1).repeat(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.a(checkpoint(self.block, x, use_reentrant=False) if self.checkpoints else self.block(x))


def routed(checkpoints: bool) -> Routed:
    torch.manual_seed(0)
    return Routed(checkpoints).eval()


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_checkpoint_of_operations_with_saved_indices(entry):
    torch.testing.assert_close(entry(routed(True)), entry(routed(False)), rtol=0, atol=0)


@pytest.mark.parametrize("max_memory", [None, 1, 500])
def test_all_taps_inside_a_checkpoint(max_memory):
    whole, mu = (RelevanceMeasure(routed(on), X, 1, max_memory=max_memory if on else None) for on in (False, True))
    assert mu.layers == whole.layers
    torch.testing.assert_close(mu.marginal(mu.layers), whole.marginal(mu.layers), rtol=0, atol=0)


def test_a_mask_that_is_overwritten_inside_a_checkpoint_is_an_error():
    class Overwriting(nn.Module):
        def block(self, x: Tensor) -> Tensor:
            mask = x > 0
            x = x.masked_fill(mask, 0.0)
            mask &= False
            return x

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    with pytest.raises(UnsupportedOperationError, match="overwrites an index or a mask"):
        RelevanceMeasure(Overwriting(), X, 1).marginal("input")


@pytest.fixture
def distributed(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_a_distributed_model_is_unwrapped(distributed):
    net = nn.parallel.DistributedDataParallel(build())
    torch.testing.assert_close(attributed(net), measured(build()))
    for layer in ("a", "module.a", net.module.a):
        assert LayerNRM(net, layer, composite=EpsilonPlus()).attribute(X, 1).shape == (3, 6)


def compiled_forward() -> nn.Module:
    net = build()
    net.forward = torch.compile(net.forward, backend="eager")
    return net


REJECTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "torch.compile": (lambda: torch.compile(build(), backend="eager"), "_orig_mod"),
    "compiled layer": (
        lambda: nn.Sequential(torch.compile(nn.Linear(4, 6), backend="eager"), nn.Linear(6, 2)),
        "_orig",
    ),
    "compiled forward": (compiled_forward, "del module.forward"),
    "traced": (lambda: torch.jit.trace(build(), X), "Python module"),
    "scripted layer": (lambda: nn.Sequential(torch.jit.script(nn.Linear(4, 6)), nn.Linear(6, 2)), "Python module"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("kind", REJECTED)
def test_models_without_hooks_are_rejected(kind, entry):
    make, remedy = REJECTED[kind]
    with pytest.raises(ModelStateError, match=remedy):
        entry(make().eval())


@pytest.mark.parametrize("entry", [measured, attributed])
def test_a_reentrant_checkpoint_is_rejected(entry):
    with pytest.raises(UnsupportedOperationError, match="use_reentrant=False"):
        entry(build(reentrant=True))


@pytest.mark.parametrize("entry", [measured, attributed])
def test_a_measure_inside_a_transform_of_torch_func_is_rejected(entry):
    net = build()
    for transform in (torch.vmap, torch.func.jacrev):
        with pytest.raises(GradModeError, match="outside"):
            transform(lambda x: entry(net, x.reshape(-1, 4)))(X)


def test_a_context_inside_a_transform_of_torch_func_is_rejected():
    with (
        Normalized(EpsilonPlus()).context(build()) as hooked,
        pytest.raises(GradModeError, match="jacrev"),
    ):
        torch.func.grad(lambda x: hooked(x)[:, 1].sum())(X)


def test_modes_without_gradients():
    mu = RelevanceMeasure(build(), X, 1, composite=EpsilonPlus())
    with torch.no_grad():
        torch.testing.assert_close(attributed(build()), mu.marginal("input"))
        with pytest.raises(GradModeError, match="no_grad"):
            measured(build())
    with torch.inference_mode():
        made = torch.zeros(3, 4)
        torch.testing.assert_close(mu.marginal("input"), measured_outside)
        with pytest.raises(GradModeError, match="inference_mode"):
            measured(build())
    with pytest.raises(InputError, match="inference_mode"):
        measured(build(), made)


measured_outside = measured(build())


@pytest.mark.parametrize("store", [copy.copy, copy.deepcopy, pickle.dumps])
def test_a_measure_is_not_stored(store):
    mu = RelevanceMeasure(build(), X, 1)
    with pytest.raises(StorageError, match="marginal"):
        store(mu)
    with pytest.raises(StorageError):
        store([mu])[0] if store is not copy.copy else store(mu)
    assert mu.marginal("input").shape == X.shape
