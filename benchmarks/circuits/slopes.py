"""Slopes of the non-linear operations of the nets: derivatives, secants against a reference, and those of RelP.

Plain PyTorch, without the package. Every operation has its usual value; only its slope, by which a backward pass
multiplies, is replaced: ``value + slope * (z - z.detach())`` with value and slope detached.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

EPS = 1e-5
"""Constant of layer normalization."""
MASKED = -1e4
"""Attention logit of a later position; its exponential is zero."""


class Tangents:
    """Derivatives, so that a backward pass yields the gradient."""

    def activation(self, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return function(z)

    def pool(self, z: Tensor) -> Tensor:
        """Applies max pooling over 2 × 2 pixels."""
        return functional.max_pool2d(z, 2)

    def norm(self, h: Tensor) -> Tensor:
        """Applies layer normalization over the last dimension, without gain and bias."""
        return functional.layer_norm(h, h.shape[-1:], eps=EPS)

    def rms_norm(self, h: Tensor, eps: float) -> Tensor:
        """Applies root-mean-square normalization over the last dimension, without gain."""
        return h * ((h * h).mean(-1, keepdim=True) + eps).rsqrt()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the product of a gate and a signal."""
        return a * b

    def softmax(self, s: Tensor) -> Tensor:
        return s.softmax(-1)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


class RelP(Tangents):
    """LN-rule, Identity-rule, Half-rule of gates, the 0-rule elsewhere; with ``is_frozen`` the AH-rule, attention
    weights as constants.

    Source: arXiv 2508.21258, and the propagation rules in the README of its code.
    """

    def __init__(self, is_frozen: bool = False) -> None:
        self.is_frozen = is_frozen

    def activation(self, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        return with_slope(function(z), ratio(function(z), z, torch.zeros_like(z)), z)

    def norm(self, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred * ((centred**2).mean(-1, keepdim=True) + EPS).rsqrt().detach()

    def rms_norm(self, h: Tensor, eps: float) -> Tensor:
        return h * ((h * h).mean(-1, keepdim=True) + eps).rsqrt().detach()

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        change = (a - a.detach()) * b.detach() + a.detach() * (b - b.detach())
        return (a * b).detach() + change / 2

    def softmax(self, s: Tensor) -> Tensor:
        return s.softmax(-1).detach() if self.is_frozen else s.softmax(-1)


class Secants(Tangents):
    """Secants between the first half of the batch, the inputs, and the second half, their references.

    Products have the mean of the two values of the other factor as slope, so that ``Σ slope Δz`` is the difference of
    the outputs for every operation. Start the backward pass at the first half.
    """

    def activation(self, z: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        y, (slope,) = _value_and_derivative(z, function)
        x, x0 = z.detach().chunk(2)
        return with_slope(y, twice(ratio(y.chunk(2)[0] - y.chunk(2)[1], x - x0, slope.chunk(2)[0])), z)

    def pool(self, z: Tensor) -> Tensor:
        patches = z.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).transpose(3, 4).flatten(4)
        return with_slope(patches.amax(-1), twice(max_slopes(*patches.detach().chunk(2))), patches, summed=True)

    def norm(self, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        variance = self.product(centred, centred).mean(-1, keepdim=True)
        return self.product(centred, self.activation(variance, lambda v: (v + EPS).rsqrt()))

    def rms_norm(self, h: Tensor, eps: float) -> Tensor:
        square = self.product(h, h).mean(-1, keepdim=True)
        return self.product(h, self.activation(square, lambda v: (v + eps).rsqrt()))

    def softmax(self, s: Tensor) -> Tensor:
        """Applies ``exp(s − log Σ exp s)``, with secants of both exponentials and of the logarithm."""
        s = s - twice(torch.maximum(*s.detach().chunk(2)).amax(-1, keepdim=True))
        total = self.activation(s, torch.exp).sum(-1, keepdim=True)
        return self.activation(s - self.activation(total, torch.log), torch.exp)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        value = (a @ b).detach()
        return value + (a - a.detach()) @ halfway(b) + halfway(a) @ (b - b.detach())

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        value = (a * b).detach()
        return value + (a - a.detach()) * halfway(b) + halfway(a) * (b - b.detach())


def with_slope(value: Tensor, slope: Tensor, z: Tensor, summed: bool = False) -> Tensor:
    """Returns a tensor with the given value and slope; with ``summed``, summed over the last dimension of ``z``."""
    change = slope.detach() * (z - z.detach())
    return value.detach() + (change.sum(-1) if summed else change)


def ratio(rise: Tensor, run: Tensor, otherwise: Tensor) -> Tensor:
    """Returns ``rise / run``, or ``otherwise`` where the run is no larger than its rounding error."""
    is_small = run.abs() < 1e-9
    return torch.where(is_small, otherwise, rise / torch.where(is_small, 1.0, run)).detach()


def twice(half: Tensor) -> Tensor:
    return torch.cat([half, half])


def halfway(a: Tensor) -> Tensor:
    """Returns the mean of input and reference, for both halves."""
    x, x0 = a.detach().chunk(2)
    return twice((x + x0) / 2)


def _value_and_derivative(z: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        value = function(leaf)
        return value.detach(), torch.autograd.grad(value.sum(), leaf)


def max_slopes(x: Tensor, x0: Tensor) -> Tensor:
    """Computes slopes of the maximum over the last dimension, averaged over both orders of switching arguments.

    With ``m`` the argument at ``x`` and ``m0`` the one at ``x0``, all other entries have slope 0.
    """
    m, m0 = x.argmax(-1, keepdim=True), x0.argmax(-1, keepdim=True)
    start, end = x0.gather(-1, m0), x.gather(-1, m)
    first = torch.maximum(end, start) - start  # if m is switched first; the rest of the difference goes to m0
    last = end - torch.maximum(x.gather(-1, m0), x0.gather(-1, m))  # if m is switched after m0
    part = torch.where(m == m0, end - start, (first + last) / 2)
    slopes = torch.zeros_like(x)
    for place, share in ((m, part), (m0, end - start - part)):
        run = x.gather(-1, place) - x0.gather(-1, place)
        slopes = slopes.scatter_add(-1, place, ratio(share, run, torch.zeros_like(run)))
    return slopes
