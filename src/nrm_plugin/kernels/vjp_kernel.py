"""Kernels given by an arbitrary linear function of the relevance."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .absolute_kernels import dense_absolute
from .base import Kernel


class VjpKernel(Kernel):
    """Kernel given by a linear function of the relevance, such as a vector-Jacobian product.

    Args:
        function: Function that maps relevance of shape ``(N, *out)`` to ``(N, *in)`` for each input. It must be linear
            and differentiable.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        self.function = function

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        if len(relevance) == 1:
            return tuple(part.unsqueeze(0) for part in self.function(relevance[0]))
        return tuple(torch.vmap(self.function)(relevance))

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return dense_absolute(self, relevance)
