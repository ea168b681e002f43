"""Nothing is recognized by its name alone: classes, functions and operators of the user may have names of torch's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from nrm_plugin import FuseBatchNorm, NRMDefault, RelevanceMeasure, errors
from nrm_plugin.functional import registry
from nrm_plugin.functional.registry import register_kernel


def measured(net: nn.Module, x: Tensor, **settings: Any) -> RelevanceMeasure:
    return RelevanceMeasure(net.double().eval(), x, 1, **settings)


X = torch.randn((3, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def own(name: str, forward: Callable[[Any, Tensor], Tensor], **parts: Any) -> nn.Module:
    """A module of a class with this name."""

    def __init__(self: nn.Module) -> None:  # noqa: N807
        nn.Module.__init__(self)
        for key, part in parts.items():
            setattr(self, key, part)

    return type(name, (nn.Module,), {"__init__": __init__, "forward": forward})()


OWN = {
    "MultiheadAttention": {"dropout": nn.Dropout(0.1)},
    "RReLU": {"lower": "low"},
    "StochasticDepth": {"p": "often"},
    "DropPath": {"drop_prob": nn.Identity()},
    "OptimizedModule": {},
    "ScriptModule": {},
    "LSTM": {"num_layers": "two", "dropout": nn.Dropout(0.2)},
    "LayerNorm": {"eps": None},
    "BatchNorm2d": {"running_mean": None, "track_running_stats": False},
    "Softmax": {},
    "Embedding": {},
    "Sum": {},
    "DataParallel": {},
    "Dropout": {"p": "half"},
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_own_classes_with_names_of_torch_are_what_they_compute(name, training):
    torch.manual_seed(0)
    layer, head = nn.Linear(4, 4), nn.Linear(4, 2)
    inner = own(name, lambda self, x: self.inner(x).relu(), inner=layer, **OWN[name])
    net = nn.Sequential(inner, head).double().eval()
    for module in (net, inner):
        module.training = training
    found = RelevanceMeasure(net, X, 1)
    expected = measured(nn.Sequential(layer, nn.ReLU(), head), X)
    torch.testing.assert_close(found.marginal("input"), expected.marginal("input"), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.sink("input"), expected.sink("input"), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["DropPath", "Anything"])
def test_any_class_that_draws_in_training_mode_is_rejected(name):
    def forward(self: nn.Module, x: Tensor) -> Tensor:
        return x * torch.bernoulli(torch.full_like(x, 0.5)) if self.training else x

    net = nn.Sequential(nn.Linear(4, 4), own(name, forward), nn.Linear(4, 2)).double()
    with pytest.raises(errors.ModelStateError, match="draws random numbers"):
        RelevanceMeasure(net, X, 1)
    assert measured(net, X).batch == 3


class Plain(nn.ReLU):
    """A subclass that changes nothing."""


class Twice(nn.Sigmoid):
    """A subclass that is no gate: it is negative as well."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


def test_a_subclass_that_overrides_nothing_is_the_class():
    def net(activation: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(5)
        norm.running_mean.normal_()
        return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), norm, activation, nn.Linear(5, 2))

    rules = EpsilonPlus(canonizers=[FuseBatchNorm()])
    found, expected = (measured(net(kind()), X, composite=rules) for kind in (Plain, nn.ReLU))
    torch.testing.assert_close(found.marginal("input"), expected.marginal("input"), rtol=0, atol=1e-12)


def test_a_subclass_that_overrides_forward_is_not_the_class():
    class Product(nn.Module):
        def __init__(self, gate: nn.Module) -> None:
            super().__init__()
            self.a, self.gate, self.head = nn.Linear(4, 4), gate, nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.a(x) * self.gate(x))

    def net(gate: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        return Product(gate)

    found = measured(net(Twice()), X).marginal("input")
    expected = measured(net(own("Plain", lambda self, x: x * 2)), X).marginal("input")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert not torch.allclose(found, measured(net(nn.Sigmoid()), X).marginal("input"))


@pytest.mark.parametrize("name", ["Clone", "View", "Copy", "Max", "Transpose", "BackwardHookFunction", "Link"])
def test_autograd_functions_with_names_of_torch_are_no_routes(name):
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)

    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    function = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )
    net = nn.Sequential(nn.Linear(4, 4), own("Step", lambda self, x: function.apply(x)), nn.Linear(4, 2))
    with pytest.raises(errors.UnsupportedOperationError, match=name):
        measured(net, X).marginal("input")


@torch.library.custom_op("nrm_tests::relu", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@torch.library.custom_op("nrm_tests::softmax", mutates_args=())
def mixed(x: Tensor) -> Tensor:
    return x.cumsum(1)


for operator in (twice, mixed):
    operator.register_fake(torch.empty_like)
    operator.register_autograd(lambda ctx, gradient: gradient)


@pytest.mark.parametrize("operator", [twice, mixed, torch.ops.nrm_tests.relu, torch.ops.nrm_tests.softmax.default])
def test_custom_operators_with_names_of_torch_have_no_kernel(operator):
    net = nn.Sequential(nn.Linear(4, 4), own("Calls", lambda self, x: operator(x)), nn.Linear(4, 2))
    with pytest.raises(errors.UnsupportedOperationError):
        measured(net, X).marginal("input")


def test_a_kernel_of_a_custom_operator_is_not_that_of_the_function_of_the_same_name(monkeypatch):
    monkeypatch.setattr(registry, "KERNELS", dict(registry.KERNELS))
    monkeypatch.setattr(registry, "KERNELS_BY_FUNCTION", dict(registry.KERNELS_BY_FUNCTION))
    before = registry.KERNELS["softmax"]

    register_kernel(torch.ops.nrm_tests.softmax)(lambda call: call.identity())
    assert registry.KERNELS["softmax"] is before
    net = nn.Sequential(nn.Linear(4, 4), own("Calls", lambda self, x: torch.ops.nrm_tests.softmax(x)), nn.Linear(4, 2))
    assert measured(net, X, composite=NRMDefault()).marginal("input").shape == (3, 4)


def test_an_attribute_named_step_does_not_make_an_autograd_function_a_step():
    class Quantized(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.step = 0.5
            return torch.round(x / 0.5) * 0.5

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            return gradient

    def net(forward: Callable[[Any, Tensor], Tensor]) -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(4, 4)
        return own(
            "Net",
            lambda self, x: self.head(self.inner(self.a(x)) + self.a(x)),
            a=layer,
            inner=own("Q", forward),
            head=nn.Linear(4, 2),
        )

    found = measured(net(lambda self, x: Quantized.apply(x)), X).marginal("input")
    expected = measured(net(lambda self, x: torch.round(x / 0.5) * 0.5), X).marginal("input")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
