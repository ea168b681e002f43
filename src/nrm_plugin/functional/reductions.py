"""Functions that make one number of many and are neither sums nor averages."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from .elementwise import BroadcastKernel, SplitKernel
from .registry import FunctionCall, kernel
from .unknown import Unknown


class ReducedKernel(Kernel):
    """Shares relevance among the entries that were made into one.

    Args:
        share: One for each entry of the input; those of one output sum to one.
        kept: Shape of the output with the reduced dimensions as ones.
    """

    is_stochastic = True

    def __init__(self, share: Tensor, kept: torch.Size) -> None:
        self.share, self.kept = share, kept

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance.reshape(len(relevance), *self.kept) * self.share,)

    pull_absolute = pull


def _shared(sizes: Tensor, dims: Any) -> ReducedKernel:
    """Shares in proportion to sizes; equal ones where all are zero."""
    dims = tuple(range(sizes.ndim)) if dims is None or dims == () else dims
    total = sizes.sum(dims, keepdim=True)
    equal = torch.full_like(total, total.numel() / sizes.numel())
    return ReducedKernel(torch.where(total == 0, equal, sizes / torch.where(total == 0, 1.0, total)), total.shape)


@kernel("logsumexp")
def log_sum_exp(call: FunctionCall) -> Kernel:
    r"""By softmax, which is its derivative: :math:`T_i = e^{x_i} / \sum_j e^{x_j}`."""
    value, dims = call.values[0], call.argument(1, "dim")
    return _shared((value - value.amax(dims, keepdim=True)).exp(), dims)


@kernel("logaddexp", "logaddexp2")
def log_add_exp(call: FunctionCall) -> Kernel:
    """Two by softmax; a constant is a bias."""
    shapes = [value.shape for value in call.values]
    if len(shapes) == 1:
        return BroadcastKernel(shapes)
    factor = math.log(2) if call.name == "logaddexp2" else 1.0
    first = (factor * (call.values[0] - call.values[1])).sigmoid()
    return SplitKernel([first, 1 - first], shapes, None, True)


@kernel("vector_norm")
def vector_norm(call: FunctionCall) -> Kernel:
    r"""By Euler's theorem, which holds for what is homogeneous: :math:`T_i = |x_i|^p / \sum_j |x_j|^p`."""
    value, order, dims = call.values[0], call.argument(1, "ord", 2), call.argument(2, "dim")
    if not 0 < float(order) < math.inf:
        return Unknown(UnsupportedOperationError(_ORDER.format(order=order)), [value.shape])
    size = value.abs()
    return _shared((size / size.max().clamp(min=1e-30)) ** float(order), dims)


_ORDER = "relevance arrived at a norm of order {order}, which has no kernel: it has one for positive, finite orders."

__all__ = ["ReducedKernel"]
