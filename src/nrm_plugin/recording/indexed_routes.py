"""0/1 routes (operations that only copy values) between tensors of lower precision than float32, as index tensors.

Autograd would round relevance to the dtype of these tensors or reject float32 relevance. A route is therefore
represented by the source index of every element that it copies. This is exact in any dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Parts = list[Tensor | None]


@dataclass(frozen=True)
class IndexedRoute:
    """Operation that only copies values, represented by the indices of the input elements that it copies.

    Attributes:
        origins: Index of the input element that each output element copies, starting from 1, or 0 for a constant.
        shapes: Shape of each input, or None for a constant.
    """

    origins: tuple[Tensor, ...]
    shapes: tuple[torch.Size | None, ...]

    @property
    def size(self) -> int:
        """Total number of elements of all inputs."""
        return sum(shape.numel() for shape in self.shapes if shape is not None)

    def pull(self, relevance: Sequence[Tensor | None]) -> Parts:
        """Propagates relevance of shape ``(K, *shape)`` from each output to each input."""
        like = next(item for item in relevance if item is not None)
        total = like.new_zeros(len(like), self.size + 1)
        for origin, item in zip(self.origins, relevance, strict=True):
            if item is not None:
                total.index_add_(1, origin.flatten(), item.reshape(len(like), -1).to(total.dtype))
        sizes = [0 if shape is None else shape.numel() for shape in self.shapes]
        entries = torch.split(total[:, 1:], sizes, 1)
        return [
            None if shape is None else part.reshape(len(like), *shape)
            for part, shape in zip(entries, self.shapes, strict=True)
        ]

    def push(self, values: Sequence[Tensor | None]) -> list[Tensor]:
        """Applies the transpose of :meth:`pull`, from the inputs to the outputs."""
        like = next(value for value in values if value is not None)
        entries = [like.new_zeros(len(like), 1)]
        for shape, value in zip(self.shapes, values, strict=True):
            if shape is not None:
                entries.append(
                    like.new_zeros(len(like), shape.numel()) if value is None else value.reshape(len(like), -1)
                )
        joined = torch.cat(entries, 1)
        return [joined[:, origin.flatten()].reshape(len(like), *origin.shape) for origin in self.origins]


def indexed_route(
    route: Callable[[Parts], Parts], seeds: list[Tensor], is_input: Sequence[bool]
) -> IndexedRoute | None:
    """Converts a route to index form. Returns None if an element is copied from several elements, as for ties.

    The indices are obtained by applying the transpose to each of their binary digits.

    Args:
        route: Function that maps relevance at the outputs to relevance at the inputs.
        seeds: Zeros for each output, in the dtype of the output.
        is_input: Whether each input depends on the model inputs.
    """
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [seed.requires_grad_() for seed in seeds]
        parts = [
            part if known and part is not None and part.requires_grad else None
            for part, known in zip(route(list(leaves)), is_input, strict=True)
        ]
        inputs = [part for part in parts if part is not None]
        numbers = torch.arange(1, 1 + sum(part.numel() for part in inputs), device=seeds[0].device)
        pieces = [
            piece.reshape(part.shape)
            for piece, part in zip(torch.split(numbers, [part.numel() for part in inputs]), inputs, strict=True)
        ]
        origins = [torch.zeros(seed.shape, dtype=torch.long, device=seed.device) for seed in seeds]
        for bit in range(len(numbers).bit_length()):
            digits = [(piece >> bit & 1).to(part) for piece, part in zip(pieces, inputs, strict=True)]
            rows = torch.autograd.grad(inputs, leaves, digits, True, allow_unused=True, materialize_grads=True)
            for origin, row in zip(origins, rows, strict=True):
                if bool(((row != 0) & (row != 1)).any()):
                    return None
                origin += row.long() << bit
    return IndexedRoute(tuple(origins), tuple(None if part is None else part.shape for part in parts))


__all__ = ["IndexedRoute", "indexed_route"]
