"""Partition of tensors into blocks that fit into the CPU cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..model.trace_guards import is_traced

Block = tuple[slice, ...]
WHOLE: Block = ()
"""The block that covers an entire tensor."""


def blocks(like: Tensor, size: int = 1 << 16) -> Iterator[Block]:
    """Splits a tensor of shape ``(N, C, …)`` along its first two dimensions into blocks of about ``size`` elements."""
    if like.numel() <= size or like.ndim < 2 or is_traced():
        yield WHOLE
        return
    width = max(1, size // max(1, like[0, 0].numel()))
    step = max(1, width // like.shape[1])
    for sample in range(0, like.shape[0], step):
        for first in range(0, like.shape[1], width):
            yield (slice(sample, sample + step), slice(first, first + width))


def blocks_for(like: Tensor) -> Iterator[Block]:
    """Splits a tensor for elementwise operations: into :func:`blocks` on a CPU, or not at all on other devices."""
    return blocks(like) if like.device.type == "cpu" else iter([WHOLE])


def block_of(tensor: Tensor, at: Block, shape: torch.Size | None = None) -> Tensor:
    """Returns one block of a tensor that broadcasts to ``shape``, or the tensor itself for the whole block."""
    if at == WHOLE:
        return tensor
    return (tensor if shape is None else tensor.expand(shape))[at]
