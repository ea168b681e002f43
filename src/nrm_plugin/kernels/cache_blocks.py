"""Blocks of a tensor that fit into the processor cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ..model.value_reads import is_traced

Block = tuple[slice, ...]


def blocks(like: Tensor, size: int = 1 << 16) -> Iterator[Block]:
    """Splits ``(N, C, …)`` by sample and dimension 1 into blocks of about ``size`` entries."""
    if like.numel() <= size or like.ndim < 2 or is_traced():
        yield whole(like)
        return
    width = max(1, size // max(1, like[0, 0].numel()))
    step = max(1, width // like.shape[1])
    for sample in range(0, like.shape[0], step):
        for first in range(0, like.shape[1], width):
            yield (slice(sample, sample + step), slice(first, first + width))


def blocks_for(like: Tensor) -> Iterator[Block]:
    """Splits a tensor for elementwise operations: by :func:`blocks` on a CPU, not at all on other devices."""
    return blocks(like) if like.device.type == "cpu" else iter([whole(like)])


def whole(like: Tensor) -> Block:
    """Returns a single block that covers all entries."""
    return tuple(slice(None) for _ in like.shape)
