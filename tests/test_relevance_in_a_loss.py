"""Relevance under ``Normalized`` is linear in the start; its gradient by weights and activations raises, never zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Composite

from nrm_plugin import RelevanceMeasure
from nrm_plugin.composites import Normalized
from nrm_plugin.errors import UnsupportedOperationError

COMPOSITES: dict[str, Callable[[], Composite]] = {
    "plus": EpsilonPlus,
    "flat": EpsilonPlusFlat,
    "box": lambda: EpsilonGammaBox(-3.0, 3.0),
    "alpha beta": EpsilonAlpha2Beta1,
}
POOLS: dict[str, Callable[[], nn.Module]] = {
    "max": lambda: nn.MaxPool2d(2),
    "average": lambda: nn.AvgPool2d(2),
    "adaptive": lambda: nn.AdaptiveAvgPool2d(2),
    "none": lambda: nn.Sequential(nn.Identity(), nn.Conv2d(4, 4, 3)),
    "norm": lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
    "skip": lambda: Skip(),
}


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu_(x + self.conv(x))


def build(pool: str) -> tuple[nn.Module, Tensor]:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), POOLS[pool](), nn.Flatten(), nn.LazyLinear(2)).eval()
    x = torch.rand(1, 1, 6, 6)
    net(x)
    return net, x.requires_grad_()


def relevance_of(net: nn.Module, x: Tensor, composite: Composite, start: Any = None) -> tuple[Tensor, Tensor]:
    with Gradient(net, composite, create_graph=True, retain_graph=True) as attributor:
        output, relevance = attributor(x, torch.eye(2)[[1]] if start is None else start)
    return output, relevance


@pytest.mark.parametrize("residual", ["sink", "redistribute"])
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("composite", COMPOSITES)
def test_its_gradient_raises_by_inputs_and_by_weights(composite, pool, residual):
    net, x = build(pool)
    _, relevance = relevance_of(net, x, Normalized(COMPOSITES[composite](), residual=residual))
    loss = relevance.pow(2).sum()
    for sources in (x, list(net.parameters()), net[0].weight, net[-1].weight):
        with pytest.raises(UnsupportedOperationError, match="without Normalized"):
            torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True)
    with pytest.raises(UnsupportedOperationError, match="without Normalized"):
        loss.backward()


@pytest.mark.parametrize("pool", POOLS)
def test_a_loss_of_which_it_is_one_term_raises(pool):
    net, x = build(pool)
    _, relevance = relevance_of(net, x, Normalized(EpsilonPlus()))
    with pytest.raises(UnsupportedOperationError):
        (net(x).logsumexp(1).sum() + 0.1 * relevance.abs().sum()).backward()
    net.zero_grad()
    (net(x).logsumexp(1).sum() + 0.1 * relevance.detach().abs().sum()).backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_it_raises_by_an_activation_and_by_a_start_that_depends_on_the_output():
    net, x = build("max")
    kept: list[Tensor] = []
    net[1].register_forward_hook(lambda module, args, output: kept.append(output))
    _, relevance = relevance_of(net, x, Normalized(EpsilonPlus()))
    with pytest.raises(UnsupportedOperationError):
        torch.autograd.grad(relevance.sum(), kept[0])
    _, relevance = relevance_of(net, x, Normalized(EpsilonPlus()), lambda output: output)
    with pytest.raises(UnsupportedOperationError):
        torch.autograd.grad(relevance.sum(), x)


@pytest.mark.parametrize("pool", POOLS)
def test_it_is_linear_in_the_start(pool):
    net, x = build(pool)
    start = torch.randn(1, 2, requires_grad=True)
    _, relevance = relevance_of(net, x, Normalized(EpsilonPlus()), start)
    probe = torch.randn_like(relevance)
    (slope,) = torch.autograd.grad((relevance * probe).sum(), start)
    expected = [
        (relevance_of(net, x, Normalized(EpsilonPlus()), row)[1] * probe).sum() for row in torch.eye(2)[:, None]
    ]
    torch.testing.assert_close(slope[0], torch.stack(expected).detach())


def test_queries_of_a_measure_are_constants():
    net, x = build("max")
    mu = RelevanceMeasure(net, x, 1)
    results = [mu.marginal("input"), mu.sink("0"), mu.joint("4", "0"), mu.output, mu.outputs]
    assert not any(result.requires_grad for result in results)
