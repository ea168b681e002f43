"""The user's own hooks, on modules or on all modules, change no number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.modules.module as all_modules
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from nrm_plugin import FuseBatchNorm, NRMDefault, RelevanceMeasure
from nrm_plugin.composites import Normalized
from tests.conftest import in_turn

COMPOSITES: dict[str, Callable[[], Any]] = {
    "default": NRMDefault,
    "fused": lambda: EpsilonPlus(canonizers=[FuseBatchNorm()]),
}


class Net(nn.Module):
    """A skip connection, a gate, an activation in place and a batch normalization."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 4, 1), nn.Sigmoid())
        self.pool, self.flat, self.head = nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = x + self.block(x)
        return self.head(self.flat(self.pool(x * self.gate(x))))


def build() -> Net:
    torch.manual_seed(0)
    net = Net().double().eval()
    with torch.no_grad():
        net.norm.running_mean.normal_()
        net.norm.weight.normal_()
    return net


X = torch.randn((2, 2, 4, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def answers(net: nn.Module, kind: str) -> list[Tensor]:
    """Queries of a measure, and relevance in the context of the composite."""
    mu = RelevanceMeasure(net, X, 1, composite=COMPOSITES[kind]())
    x = X.clone().requires_grad_()
    with Normalized(COMPOSITES[kind]()).context(net) as hooked:
        (relevance,) = torch.autograd.grad(hooked(x)[:, 1].sum(), x)
    return [
        *mu.marginal(["input", "block", "conv", "gate"]).values(),
        mu.sink("input"),
        mu.joint("head", "block"),
        relevance,
    ]


def check_same(net: nn.Module) -> None:
    for kind in COMPOSITES:
        for found, expected in zip(answers(net, kind), answers(build(), kind), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


ON_MODULES: dict[str, Callable[[nn.Module], Any]] = {
    "full backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "full backward pre": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
    "several": lambda m: [
        m.register_full_backward_hook(lambda *_: None),
        m.register_full_backward_hook(lambda module, below, above: below),
        m.register_full_backward_pre_hook(lambda *_: None),
        m.register_forward_hook(lambda module, args, output: output),
    ],
    "forward, returns the output": lambda m: m.register_forward_hook(lambda module, args, output: output),
    "forward, returns a copy": lambda m: m.register_forward_hook(lambda module, args, output: output.clone()),
    "forward, returns a view": lambda m: m.register_forward_hook(lambda module, args, output: output.view_as(output)),
    "forward, first": lambda m: m.register_forward_hook(lambda module, args, output: output, prepend=True),
    "forward, with keywords": lambda m: m.register_forward_hook(lambda m, args, kwargs, output: None, with_kwargs=True),
    "forward, keeps a gradient": lambda m: m.register_forward_hook(lambda module, args, output: output.retain_grad()),
    "pre, returns the arguments": lambda m: m.register_forward_pre_hook(lambda module, args: args),
    "pre, returns a copy": lambda m: m.register_forward_pre_hook(lambda module, args: args[0].clone()),
    "pre, with keywords": lambda m: m.register_forward_pre_hook(
        lambda m, args, kwargs: (args, kwargs), with_kwargs=True
    ),
}

PLACES: dict[str, Callable[[Net], list[nn.Module]]] = {
    "root": lambda net: [net],
    "layer": lambda net: [net.conv],
    "activation in place": lambda net: [net.relu],
    "container": lambda net: [net.block],
    "children of a container": lambda net: list(net.block),
    "gate": lambda net: [net.gate, net.gate[2]],
    "all": lambda net: list(net.modules()),
}


@pytest.mark.medium
@pytest.mark.parametrize(("hook", "place"), in_turn(ON_MODULES, PLACES))
def test_hooks_on_modules_change_no_number(hook, place):
    net = build()
    for module in PLACES[place](net):
        ON_MODULES[hook](module)
    check_same(net)


ON_ALL_MODULES = {
    "full backward": lambda: all_modules.register_module_full_backward_hook(lambda *_: None),
    "full backward pre": lambda: all_modules.register_module_full_backward_pre_hook(lambda *_: None),
    "forward": lambda: all_modules.register_module_forward_hook(lambda module, args, output: output),
    "pre": lambda: all_modules.register_module_forward_pre_hook(lambda module, args: args),
}


@contextmanager
def registered(register: Callable[[], Any]) -> Iterator[None]:
    handle = register()
    try:
        yield
    finally:
        handle.remove()


@pytest.mark.medium
@pytest.mark.parametrize("hook", ON_ALL_MODULES)
def test_hooks_on_all_modules_change_no_number(hook):
    plain = {kind: answers(build(), kind) for kind in COMPOSITES}
    with registered(ON_ALL_MODULES[hook]):
        for kind, expected in plain.items():
            for found, value in zip(answers(build(), kind), expected, strict=True):
                torch.testing.assert_close(found, value, rtol=0, atol=1e-12)


def test_hooks_are_kept_and_a_measure_runs_no_backward_hook():
    net, called = build(), []
    handle = net.conv.register_full_backward_hook(lambda *_: called.append("backward"))
    RelevanceMeasure(net, X, 1).marginal("input")
    assert not called
    net(X.clone().requires_grad_()).sum().backward()
    assert called == ["backward"]
    handle.remove()
    assert not net.conv._backward_hooks


def test_a_backward_hook_sees_relevance_in_the_context_as_in_zennit():
    net, seen = build(), []
    net.head.register_full_backward_hook(lambda module, below, above: seen.append(below[0]))
    x = X.clone().requires_grad_()
    with Normalized(EpsilonPlus()).context(net) as hooked:
        hooked(x)[:, 1].sum().backward()
    mu = RelevanceMeasure(build(), X, 1, composite=EpsilonPlus())
    torch.testing.assert_close(seen[0], mu.marginal("flat"), rtol=0, atol=1e-12)
