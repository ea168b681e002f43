"""Blocks that fit into the cache."""

from __future__ import annotations

import math

import pytest
import torch

from nrm_plugin.kernels.cache_blocks import WHOLE, block_of, blocks


@pytest.mark.parametrize("size", [1, 4, 6, 11, 1000])
@pytest.mark.parametrize(
    "shape", [(), (7,), (20,), (3, 5), (2, 3, 4), (1, 40), (5, 1, 1), (4, 7, 3, 2), (0, 3), (9, 2)]
)
def test_each_entry_is_in_one_block(shape: tuple[int, ...], size: int) -> None:
    like = torch.zeros(shape)
    every = list(blocks(like, size))
    for block in every:
        like[block] += 1
    assert torch.equal(like, torch.ones(shape))
    assert len(every) == 1 or like.numel() > size
    if like.ndim > 1 and like.numel():
        most = max(size, math.prod(shape[2:]))
        assert all(like[block].numel() <= most for block in every)
        assert max(like[block].numel() for block in every) > min(like.numel(), size) / 2


def test_a_tensor_is_sliced_only_if_it_has_several_blocks() -> None:
    tensor = torch.arange(24.0).reshape(2, 3, 4)
    row = torch.arange(4.0)
    assert block_of(tensor, WHOLE) is tensor
    assert block_of(row, WHOLE, tensor.shape) is row
    at = (slice(1, 2), slice(0, 2))
    assert torch.equal(block_of(tensor, at), tensor[1:2, :2])
    assert torch.equal(block_of(row, at, tensor.shape), row.expand(1, 2, 4))
