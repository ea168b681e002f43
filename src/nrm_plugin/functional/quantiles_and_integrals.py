"""Decompositions of quantiles, integrals and derivatives along a dimension into elementary operations.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .registry import decomposition_of

# -- quantiles --------------------------------------------------------------------------------------------------------


@decomposition_of("quantile")
def _quantile(input: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, **options: Any) -> Any:
    result = _nanquantile(input, q, dim, keepdim, **options)
    has_nan = input.detach().isnan().any() if dim is None else input.detach().isnan().any(dim, keepdim)
    return torch.where(has_nan, math.nan, result) if bool(has_nan.any()) else result


@decomposition_of("nanquantile")
def _nanquantile(
    input: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    """Computes quantiles by interpolation between the two adjacent sorted values."""
    quantiles = torch.as_tensor(q, dtype=input.dtype, device=input.device)
    if quantiles.requires_grad:
        return NotImplemented
    along = input.reshape(-1) if dim is None else input.movedim(dim, -1)
    ordered = along.sort(-1).values  # numbers come first, then nan
    count = (~ordered.detach().isnan()).sum(-1, keepdim=True)
    rank = quantiles.reshape(-1) * (count - 1).clamp(min=0)
    result = _at_rank(ordered, rank, interpolation).movedim(-1, 0)
    if keepdim:
        shape = [1] * input.ndim if dim is None else [*input.shape]
        shape[dim or 0] = 1
        result = result.reshape(-1, *shape)
    return result if quantiles.ndim else result.squeeze(0)


def _at_rank(ordered: Tensor, rank: Tensor, interpolation: str) -> Tensor:
    lower, upper = rank.floor().long(), rank.ceil().long()
    if interpolation in ("lower", "higher", "nearest"):
        index = {"lower": lower, "higher": upper, "nearest": rank.round().long()}[interpolation]
        return ordered.gather(-1, index)
    share = (rank - lower) if interpolation == "linear" else (upper != lower).to(rank.dtype) / 2
    return torch.lerp(ordered.gather(-1, lower), ordered.gather(-1, upper), share)


# -- integrals and derivatives ----------------------------------------------------------------------------------------


@decomposition_of("trapezoid", "trapz")
def _trapezoid(y: Tensor, x: Tensor | None = None, *, dx: float = 1, dim: int = -1) -> Tensor:
    return _trapezoids(y, x, dx, dim).sum(dim)


@decomposition_of("cumulative_trapezoid")
def _cumulative_trapezoid(y: Tensor, x: Tensor | None = None, *, dx: float = 1, dim: int = -1) -> Tensor:
    return _trapezoids(y, x, dx, dim).cumsum(dim)


def _trapezoids(y: Tensor, x: Tensor | None, dx: float, dim: int) -> Tensor:
    """Computes the area of each trapezoid between adjacent points."""
    heights = (_after(y, dim) + _before(y, dim)) / 2
    if x is None:
        return heights if dx == 1 else heights * dx
    axis = dim % y.ndim
    if x.ndim == 1:
        x = x.reshape([-1 if number == axis else 1 for number in range(y.ndim)])
    return heights * (_after(x, axis - y.ndim) - _before(x, axis - y.ndim))


def _after(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, 1, x.shape[dim] - 1)


def _before(x: Tensor, dim: int) -> Tensor:
    return x.narrow(dim, 0, x.shape[dim] - 1)


@decomposition_of("gradient")
def _gradient(input: Tensor, *, spacing: Any = 1, dim: Any = None, edge_order: int = 1) -> Any:
    """Computes central differences, with one-sided differences at both ends."""
    dims = list(range(input.ndim)) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    steps = list(spacing) if isinstance(spacing, (list, tuple)) else [spacing] * len(dims)
    if edge_order != 1 or any(isinstance(step, Tensor) for step in steps) or len(steps) != len(dims):
        return NotImplemented
    return [_derivative(input, axis, step) for axis, step in zip(dims, steps, strict=True)]


def _derivative(input: Tensor, dim: int, step: float) -> Tensor:
    size = input.shape[dim]
    difference = _after(input, dim) - _before(input, dim)
    parts = [difference.narrow(dim, 0, 1) / step]
    if size > 2:
        parts.append((input.narrow(dim, 2, size - 2) - input.narrow(dim, 0, size - 2)) / (2 * step))
    return torch.cat([*parts, difference.narrow(dim, size - 2, 1) / step], dim)


__all__: list[str] = []
