"""Parts of an image that are connected regions."""

from __future__ import annotations

import pytest
import torch

from nrm_plugin.measure.contiguous_groups import connected_parts
from nrm_plugin.measure.partitions import patches

GRID = patches((12, 12), 4)
"""Sixteen squares, numbered row by row."""


def is_connected(region: torch.Tensor) -> bool:
    """Returns True if a flood fill from one pixel of a region reaches all of its pixels."""
    reached = torch.zeros_like(region)
    reached.view(-1)[int(region.flatten().nonzero()[0])] = True
    for _ in range(region.numel()):
        wider = reached.clone()
        wider[1:] |= reached[:-1]
        wider[:-1] |= reached[1:]
        wider[:, 1:] |= reached[:, :-1]
        wider[:, :-1] |= reached[:, 1:]
        reached = wider & region
    return bool((reached == region).all())


@pytest.mark.parametrize("seed", range(10))
def test_every_part_is_connected_and_keeps_its_heaviest_region(seed):
    draw = torch.Generator().manual_seed(seed)
    labels, weights = torch.randint(4, (16,), generator=draw), torch.rand(16, generator=draw)
    new = connected_parts(labels, GRID, weights)
    assert set(new.tolist()) == set(labels.tolist())
    for group in labels.unique().tolist():
        assert is_connected((new == group)[GRID])
        heaviest = int((weights * (labels == group)).argmax())
        alone = weights[(labels == group) & (torch.arange(16) != heaviest)].sum() < weights[heaviest]
        assert not alone or new[heaviest] == group


def test_connected_parts_are_left_as_they_are():
    labels = torch.tensor([0, 0, 1, 1] * 4)
    assert torch.equal(connected_parts(labels, GRID, torch.ones(16)), labels)


def test_a_fragment_goes_to_the_group_with_the_longest_border():
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 2, 2, 0, 1, 2, 1, 2, 2, 2, 2])  # square 11 is enclosed by 2
    new = connected_parts(labels, GRID, torch.ones(16))
    assert new[11] == 2
    assert torch.equal(new[:11], labels[:11])


def test_members_without_any_border_keep_their_group():
    members = torch.tensor([[0, 0, 1, 1]])
    assert connected_parts(torch.tensor([0, 1, 0]), members, torch.tensor([1.0, 1.0, 0.0])).tolist() == [0, 1, 0]
