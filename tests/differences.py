"""Nets and oracles for differences from a reference. The oracles share no code with the package.

A walk of a difference has the mass ``Δx · Π slope · s / Σ s Δf``. The oracles below compute slopes as dense matrices
from their definitions, or propagate multipliers by ``torch.autograd`` through functions that are defined here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Head(nn.Module):
    """A linear layer, an operation, and a weighted sum of everything that it returns, ``(N, 1)``."""

    def __init__(self, operation: Callable[[Tensor], Tensor], features: int = 6) -> None:
        super().__init__()
        self.first = nn.Linear(5, features).double()
        with torch.no_grad():
            self.first.weight.copy_(draw(features, 5, seed=1) / 2)
            self.first.bias.copy_(draw(features, seed=2) / 2)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        h = self.operation(self.first(x))
        weight = torch.cos(torch.arange(h[0].numel(), dtype=h.dtype) + 0.3)
        return (h.reshape(len(h), -1) * weight).sum(1, keepdim=True)


# -- multipliers, for pairs of tensors (2, …) that hold input and reference ------------------------------------------


class Slope(torch.autograd.Function):
    """An elementwise function of pairs."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        y, run = f(z), z[0] - z[1]
        assert bool((run != 0).all()), "the oracle has no derivatives"
        ctx.slope = (y[0] - y[1]) / run
        return y

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        return torch.stack([above[0][0] * ctx.slope, torch.zeros_like(ctx.slope)]), None


class Product(torch.autograd.Function):
    """A product of pairs of matrices."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        (a, b), (m, _) = ctx.saved_tensors, above[0]
        first, second = m @ ((b[0] + b[1]) / 2).mT, ((a[0] + a[1]) / 2).mT @ m
        return torch.stack([first, torch.zeros_like(first)]), torch.stack([second, torch.zeros_like(second)])


class Times(torch.autograd.Function):
    """An elementwise product of pairs."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a * b

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> Any:
        (a, b), (m, _) = ctx.saved_tensors, above[0]
        first, second = m * (b[0] + b[1]) / 2, m * (a[0] + a[1]) / 2
        return torch.stack([first, torch.zeros_like(first)]), torch.stack([second, torch.zeros_like(second)])


def slope(z: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    result: Tensor = Slope.apply(z, f)
    return result


def softmax(z: Tensor) -> Tensor:
    """``exp(z - log Σ exp z)``."""
    total = slope(slope(z, torch.exp).sum(-1, keepdim=True), torch.log)
    return slope(z - total, torch.exp)


def layer_norm(z: Tensor, eps: float = 1e-5) -> Tensor:
    centred = z - z.mean(-1, keepdim=True)
    variance = Times.apply(centred, centred).mean(-1, keepdim=True) + eps
    result: Tensor = Times.apply(centred, slope(variance, torch.rsqrt).expand_as(centred))
    return result


def multipliers(f: Callable[[Tensor], Tensor], x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """The multiplier of each input entry of one sample, for a function of pairs to ``(2,)``; and the difference."""
    pair = torch.stack([x, reference]).requires_grad_()
    output = f(pair)
    (gradient,) = torch.autograd.grad(output[0], pair)
    return gradient[0], (output[0] - output[1]).detach()
