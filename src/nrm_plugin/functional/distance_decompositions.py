"""Decompositions of distances, similarities and norms into differences, products and vector norms.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .registry import decomposition_of

_norm: Callable[..., Tensor] = torch.linalg.vector_norm


@decomposition_of("cosine_similarity")
def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    dim = dim if dim < 0 else dim - max(x1.ndim, x2.ndim)  # the inputs may differ in rank
    products = (x1 * x2).sum(dim)
    return products / (_at_least(x1, dim, eps) * _at_least(x2, dim, eps))


def _at_least(x: Tensor, dim: int, eps: float) -> Tensor:
    """Computes vector norms along a dimension, clamped to at least ``eps``."""
    return _norm(x, dim=dim).clamp_min(eps)


@decomposition_of("pairwise_distance")
def _pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    return _norm(x1 - x2 + eps, p, -1, keepdim)


@decomposition_of("cdist")
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    return _norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


@decomposition_of("pdist")
def _pdist(input: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(input), len(input), 1, device=input.device)
    return _norm(input[first] - input[second], p, -1)


@decomposition_of("dist")
def _dist(input: Tensor, other: Tensor, p: float = 2.0) -> Tensor:
    return _norm(input - other, p)


@decomposition_of("linalg_norm")
def _linalg_norm(
    A: Tensor,
    ord: Any = None,
    dim: Any = None,
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    if ord is not None and dim is None and A.ndim == 2:
        dim = (0, 1)
    if ord is None or isinstance(dim, int) or dim is None or len(dim) == 1:
        return _norm(A, 2 if ord is None else ord, dim, keepdim, dtype=dtype)
    return _matrix_norm(A, ord, dim, keepdim, dtype=dtype)


@decomposition_of("matrix_norm")
def _matrix_norm(
    A: Tensor,
    ord: Any = "fro",
    dim: Any = (-2, -1),
    keepdim: bool = False,
    *,
    dtype: torch.dtype | None = None,
) -> Any:
    """Computes a Frobenius, 1- or ∞-norm. Norms defined by singular values have no kernel."""
    if ord == "fro":
        return _norm(A, 2, dim, keepdim, dtype=dtype)
    if ord in ("nuc", 2, -2):
        return NotImplemented
    rows, columns = (axis % A.ndim for axis in dim)
    added, chosen = (rows, columns) if abs(ord) == 1 else (columns, rows)
    sums = A.abs().sum(added, keepdim=True, dtype=dtype)
    result = sums.amax(chosen, keepdim=True) if ord > 0 else sums.amin(chosen, keepdim=True)
    return result if keepdim else result.squeeze((rows, columns))


@decomposition_of("mse_loss")
def _mse_loss(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Any:
    return _reduced((input - target).square(), *args, **options)


@decomposition_of("l1_loss")
def _l1_loss(input: Tensor, target: Tensor, *args: Any, **options: Any) -> Any:
    return _reduced((input - target).abs(), *args, **options)


def _reduced(
    losses: Tensor,
    size_average: Any = None,
    reduce: Any = None,
    reduction: Any = "mean",
    weight: Tensor | None = None,
) -> Any:
    how = {0: "none", 1: "mean", 2: "sum"}.get(reduction, reduction)
    if weight is not None or size_average is not None or reduce is not None or math.prod(losses.shape) == 0:
        return NotImplemented
    return losses if how == "none" else losses.mean() if how == "mean" else losses.sum()


__all__: list[str] = []
