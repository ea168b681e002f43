"""Kernels of functions with several inputs, some of which may receive no relevance."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.base import Kernel
from ..kernels.vjp_kernel import VjpKernel

_SMALLEST = 1e-30
"""Offset added to absolute values. If all summands are zero, relevance is split equally."""


class BroadcastKernel(Kernel):
    """Kernel that passes all relevance to one input, summed over the dimensions along which this input is broadcast.

    Args:
        shapes: Shape of each input.
        signal: Index of the input that receives all relevance.
    """

    is_stochastic = True

    def __init__(self, shapes: Sequence[torch.Size], signal: int = 0) -> None:
        self.shapes, self.signal = list(shapes), signal

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return with_zeros({self.signal: sum_to_shape(relevance, self.shapes[self.signal])}, relevance, self.shapes)

    pull_absolute = pull


class SplitKernel(Kernel):
    r"""Kernel that splits relevance elementwise among the inputs, :math:`R_k = q_k R`.

    Args:
        shares: Fraction ``q_k`` passed to each input, broadcastable to the shape of the output.
        shapes: Shape of each input.
        magnitude: For a sum, the sum of the absolute values of its summands, read by sums that contain it; or None.
        is_stochastic: Whether the fractions sum to one.
    """

    def __init__(
        self, shares: list[Tensor], shapes: list[torch.Size], magnitude: Tensor | None, is_stochastic: bool
    ) -> None:
        self.shares, self.shapes, self.magnitude, self.is_stochastic = shares, shapes, magnitude, is_stochastic

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.shares, self.shapes, strict=True)
        return tuple(sum_to_shape(relevance * share, shape) for share, shape in pairs)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.shares, self.shapes, strict=True)
        return tuple(sum_to_shape(relevance * share.abs(), shape) for share, shape in pairs)

    def column_sum(self, like: Tensor) -> Tensor:
        return torch.stack([share.expand_as(like) for share in self.shares]).sum(0)


class HalvesKernel(Kernel):
    r"""Kernel of a sum of two tensors, with the fractions :math:`|a| / (|a| + |b|)` and :math:`|b| / (|a| + |b|)`.

    Args:
        sizes: Function that returns the absolute value of each summand.
        shapes: Shape of each input.
    """

    is_stochastic = True

    def __init__(self, sizes: Callable[[], tuple[Tensor, Tensor]], shapes: list[torch.Size]) -> None:
        self._sizes, self.shapes = sizes, shapes
        first, second = sizes()
        # Shares are equal if both summands are zero. Searching for zeros would dominate the run time.
        raised = first + _SMALLEST
        self.share = raised / (second + _SMALLEST + raised)

    @functools.cached_property
    def magnitude(self) -> Tensor:
        """Sum of the absolute values of the summands. It is read by sums that contain this sum."""
        first, second = self._sizes()
        return first + second

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        part = relevance * self.share
        return sum_to_shape(part, self.shapes[0]), sum_to_shape(relevance - part, self.shapes[1])

    pull_absolute = pull


class SingleInputKernel(Kernel):
    """Kernel of a call in which a single input receives relevance.

    Args:
        inner: Kernel for this input.
        number: Index of this input.
        shapes: Shape of each input.
    """

    def __init__(self, inner: Kernel, number: int, shapes: list[torch.Size]) -> None:
        self.inner, self.number, self.shapes = inner, number, shapes
        self.is_stochastic = inner.is_stochastic

    def complete_for(self, relevance: Tensor | None) -> bool:
        return self.inner.complete_for(relevance)

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return with_zeros({self.number: self.inner.pull(relevance)[0]}, relevance, self.shapes)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return with_zeros({self.number: self.inner.pull_absolute(relevance)[0]}, relevance, self.shapes)

    def column_sum(self, like: Tensor) -> Tensor:
        return self.inner.column_sum(like)


class EqualPartsKernel(Kernel):
    """Kernel that splits relevance equally among some factors of a product. The others receive none.

    Args:
        kernels: Kernels of the factors that receive relevance, keyed by the index of the factor.
        shapes: Shape of each factor.
    """

    def __init__(self, kernels: dict[int, Kernel], shapes: list[torch.Size]) -> None:
        self.kernels, self.shapes = kernels, shapes

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        part = relevance / len(self.kernels)
        parts = {number: kernel.pull(part)[0] for number, kernel in self.kernels.items()}
        return with_zeros(parts, relevance, self.shapes)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        part = relevance / len(self.kernels)
        parts = {number: kernel.pull_absolute(part)[0] for number, kernel in self.kernels.items()}
        return with_zeros(parts, relevance, self.shapes)

    def column_sum(self, like: Tensor) -> Tensor:
        return total_of([kernel.column_sum(like) for kernel in self.kernels.values()]) / len(self.kernels)


class RouteKernel(VjpKernel):
    """Kernel that passes relevance to the copied elements and, like autograd, splits it among ties.

    Args:
        function: Gradient of the operation. Maps a tensor of shape ``(N, *out)`` to one of shape ``(N, *in)`` per
            input.
        is_stochastic: Whether every output is copied from an input, without constants.
    """

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], is_stochastic: bool = False) -> None:
        super().__init__(function)
        self.is_stochastic = is_stochastic

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self.pull(relevance)


def with_zeros(parts: dict[int, Tensor], relevance: Tensor, shapes: Sequence[torch.Size]) -> tuple[Tensor, ...]:
    """Returns relevance of shape ``(K, *in)`` for each input, with zeros for inputs that are not in ``parts``."""
    return tuple(
        parts[number] if number in parts else relevance.new_zeros((len(relevance), *shape))
        for number, shape in enumerate(shapes)
    )


def sum_to_shape(relevance: Tensor, shape: torch.Size) -> Tensor:
    """Sums relevance of shape ``(K, *out)`` over the dimensions along which an input of this shape is broadcast."""
    lead = relevance.ndim - 1 - len(shape)
    return relevance.sum_to_size((len(relevance), *(1,) * lead, *shape)).reshape(len(relevance), *shape)


def total_of(parts: Sequence[Tensor]) -> Tensor:
    """Returns the sum of a sequence of tensors."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
