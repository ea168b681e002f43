"""Kernels of reductions other than sums and averages: log-sum-exp and norms."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from .function_call import FunctionCall
from .function_kernels import SplitKernel
from .registry import decomposition_of, kernel_of
from .unsupported import UnknownKernel


class ReductionKernel(Kernel):
    """Kernel that splits the relevance of each output among the elements that were reduced.

    Args:
        share: Fraction of an output's relevance passed to each input element. The fractions of each output sum to one.
        reduced_shape: Shape of the output with the reduced dimensions kept, at size one.
    """

    is_stochastic = True

    def __init__(self, share: Tensor, reduced_shape: torch.Size) -> None:
        self.share, self.reduced_shape = share, reduced_shape

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance.reshape(len(relevance), *self.reduced_shape) * self.share,)

    pull_absolute = pull


def _proportional(sizes: Tensor, dims: Any) -> ReductionKernel:
    """Returns the kernel that splits relevance in proportion to ``sizes``, or equally if they are all zero."""
    dims = tuple(range(sizes.ndim)) if dims is None or dims == () else dims
    total = sizes.sum(dims, keepdim=True)
    equal = torch.full_like(total, total.numel() / sizes.numel())
    return ReductionKernel(torch.where(total == 0, equal, sizes / torch.where(total == 0, 1.0, total)), total.shape)


@kernel_of("logsumexp")
def log_sum_exp(call: FunctionCall) -> Kernel:
    r"""Returns the kernel of log-sum-exp, which splits relevance by softmax, :math:`T_i = e^{x_i} / \sum_j e^{x_j}`."""
    value, dims = call.values[0], call.argument(1, "dim")
    return _proportional((value - value.amax(dims, keepdim=True)).exp(), dims)


@kernel_of("logaddexp", "logaddexp2")
def log_add_exp(call: FunctionCall) -> Kernel:
    """Returns the kernel of log-add-exp, which splits relevance by softmax. A constant is treated as a bias."""
    if len(call.inputs) == 1:
        return call.identity()
    factor = math.log(2) if call.name == "logaddexp2" else 1.0
    first = (factor * (call.values[0] - call.values[1])).sigmoid()
    return SplitKernel([first, 1 - first], call.shapes, None, True)


@kernel_of("vector_norm")
def vector_norm(call: FunctionCall) -> Kernel:
    r"""Returns the kernel of a vector norm, :math:`T_i = |x_i|^p / \sum_j |x_j|^p`.

    It follows from Euler's theorem on homogeneous functions. The norm of order ∞ (-∞) is the largest (smallest)
    absolute value and passes relevance to the elements that attain it.
    """
    value, order, dims = call.values[0], call.argument(1, "ord", 2), call.argument(2, "dim")
    size = value.abs()
    if abs(float(order)) == math.inf:
        axes = () if dims is None else dims
        extreme = size.amax(axes, keepdim=True) if float(order) > 0 else size.amin(axes, keepdim=True)
        return _proportional((size == extreme).to(size.dtype), dims)
    if not float(order) > 0:
        return UnknownKernel(UnsupportedOperationError(_ORDER.format(order=order)), call.shapes)
    return _proportional((size / size.max().clamp(min=1e-30)) ** float(order), dims)


@decomposition_of("vector_norm")
def _vector_norm(
    x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None
) -> Any:
    """Decomposes a vector norm into powers and a sum, for measures with a reference."""
    dims = tuple(range(x.ndim)) if dim is None else dim
    order, size = float(ord), (x if dtype is None else x.to(dtype)).abs()
    if abs(order) == math.inf:
        return size.amax(dims, keepdim) if order > 0 else size.amin(dims, keepdim)
    if not order > 0:
        return NotImplemented
    if order == 2:
        return size.square().sum(dims, keepdim).sqrt()
    return size.sum(dims, keepdim) if order == 1 else (size**order).sum(dims, keepdim) ** (1 / order)


_ORDER = (
    "relevance arrived at a norm of order {order}, which has no kernel: only positive orders and -inf have one. Use "
    "such an order, or decorate a function with nrm_plugin.register_kernel(torch.linalg.vector_norm)."
)

__all__ = ["ReductionKernel"]
