"""Decompositions of linear algebra into matrix products and elementwise products.

The solution of a linear system with a constant matrix is a product with its inverse. The inverse of a computed matrix
has no kernel.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels.forward_state import not_recorded
from .registry import decomposition_of

# -- products ---------------------------------------------------------------------------------------------------------


@decomposition_of("multi_dot")
def _multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    return functools.reduce(torch.matmul, tensors)


@decomposition_of("chain_matmul")
def _chain_matmul(*matrices: Any) -> Tensor:
    single = len(matrices) == 1 and isinstance(matrices[0], (list, tuple))
    product: Tensor = functools.reduce(torch.matmul, matrices[0] if single else matrices)
    return product


@decomposition_of("matrix_power")
def _matrix_power(input: Tensor, n: int) -> Any:
    return functools.reduce(torch.matmul, [input] * n) if n > 0 else NotImplemented


@decomposition_of("outer", "ger")
def _outer(input: Tensor, vec2: Tensor) -> Tensor:
    return input.unsqueeze(-1) * vec2


@decomposition_of("addr")
def _addr(input: Tensor, vec1: Tensor, vec2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = vec1.unsqueeze(-1) * vec2
    product = product if alpha == 1 else product * alpha
    if beta == 0:  # as in torch, the input is then ignored
        return product
    return product + (input if beta == 1 else input * beta)


@decomposition_of("kron")
def _kron(input: Tensor, other: Tensor) -> Tensor:
    rank = max(input.ndim, other.ndim)
    first = input.reshape((1,) * (rank - input.ndim) + tuple(input.shape))
    second = other.reshape((1,) * (rank - other.ndim) + tuple(other.shape))
    shape = [one * two for one, two in zip(first.shape, second.shape, strict=True)]
    apart = first.reshape([size for one in first.shape for size in (one, 1)])
    return (apart * second.reshape([size for two in second.shape for size in (1, two)])).reshape(shape)


@decomposition_of("cross")
def _cross(input: Tensor, other: Tensor, dim: int | None = None) -> Any:
    if dim is None:
        dim = next(number for number, size in enumerate(input.shape) if size == 3)
    return _cross_along(input, other, dim)


@decomposition_of("linalg_cross")
def _linalg_cross(input: Tensor, other: Tensor, *, dim: int = -1) -> Any:
    return _cross_along(input, other, dim)


def _cross_along(a: Any, b: Any, dim: int) -> Any:
    return a.roll(-1, dim) * b.roll(-2, dim) - a.roll(-2, dim) * b.roll(-1, dim)


@decomposition_of("block_diag")
def _block_diag(*tensors: Any) -> Tensor:
    blocks = [_matrix(block) for block in tensors]
    width = sum(block.shape[1] for block in blocks)
    rows, left = [], 0
    for block in blocks:
        rows.append(nn.functional.pad(block, (left, width - left - block.shape[1])))
        left += block.shape[1]
    return torch.cat(rows)


def _matrix(input: Tensor) -> Tensor:
    return input.reshape(1, -1) if input.ndim < 2 else input


# -- systems of equations ---------------------------------------------------------------------------------------------


@decomposition_of("solve")
def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Any:
    is_vector = B.ndim == 1 or (A.ndim - 1 == B.ndim and B.shape == A.shape[:-1])
    inverse, right = torch.linalg.inv(A), B.unsqueeze(-1) if is_vector else B
    product = inverse @ right if left else right @ inverse
    return product.squeeze(-1) if is_vector else product


def _by_constant(solve: Callable[[Tensor], Tensor], matrix: Tensor, right: Tensor, left: bool = True) -> Any:
    """Solves a linear system with a constant matrix by multiplying the right-hand side by the inverse matrix."""
    if matrix.requires_grad:
        return NotImplemented
    with not_recorded():
        unit = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
        inverse = solve(unit.expand(*matrix.shape[:-2], *unit.shape))
    return inverse @ right if left else right @ inverse


@decomposition_of("solve_triangular")
def _solve_triangular(
    A: Tensor,
    B: Tensor,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Any:
    solve = functools.partial(torch.linalg.solve_triangular, A, upper=upper, unitriangular=unitriangular)
    return _by_constant(solve, A, B, left)


@decomposition_of("cholesky_solve")
def _cholesky_solve(B: Tensor, L: Tensor, upper: bool = False) -> Any:
    return _by_constant(lambda unit: torch.cholesky_solve(unit, L, upper), L, B)


@decomposition_of("linalg_lu_solve")
def _lu_solve(LU: Tensor, pivots: Tensor, B: Tensor, *, left: bool = True, adjoint: bool = False) -> Any:
    return _by_constant(lambda unit: torch.linalg.lu_solve(LU, pivots, unit, adjoint=adjoint), LU, B, left)


@decomposition_of("lstsq")
def _lstsq(A: Tensor, B: Tensor, rcond: float | None = None, *, driver: str | None = None) -> Any:
    if A.requires_grad or B.ndim < 2:
        return NotImplemented
    with not_recorded():
        plain = torch.linalg.lstsq(A, B.detach(), rcond, driver=driver)
        inverse = torch.linalg.pinv(A) if rcond is None else torch.linalg.pinv(A, rtol=rcond)
    return type(plain)((inverse @ B, *plain[1:]))


# -- second moments ---------------------------------------------------------------------------------------------------


@decomposition_of("cov")
def _cov(input: Tensor, *, correction: int = 1, fweights: Tensor | None = None, aweights: Tensor | None = None) -> Any:
    if fweights is not None or aweights is not None:
        return NotImplemented
    centered = _matrix(input) - _matrix(input).mean(1, keepdim=True)
    return ((centered @ centered.T) / (centered.shape[1] - correction)).squeeze()


@decomposition_of("corrcoef")
def _corrcoef(input: Tensor) -> Tensor:
    covariance: Tensor = torch.cov(input)
    if covariance.ndim == 0:
        return covariance / covariance
    deviation = covariance.diagonal().sqrt()
    return covariance / (deviation.unsqueeze(1) * deviation)


__all__: list[str] = []
