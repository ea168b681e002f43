"""Groups of image parts that form connected regions."""

from __future__ import annotations

import torch
from torch import Tensor


def connected_parts(labels: Tensor, members: Tensor, weights: Tensor) -> Tensor:
    """Reassigns the parts of an image so that each group of parts is a connected region.

    Each group keeps its connected component with the largest total weight. The remaining members are reassigned, one at
    a time, to the group with which they share the longest border.

    Args:
        labels: The group of each member, of shape ``(members,)``.
        members: The member (part, such as a superpixel) that contains each pixel, of shape ``(H, W)``.
        weights: The weight of each member, of shape ``(members,)``, such as its absolute relevance.

    Returns:
        The new group of each member, of shape ``(members,)``.

    Examples:
        >>> members = torch.arange(4).expand(2, 4)
        >>> connected_parts(torch.tensor([0, 0, 1, 0]), members, torch.tensor([2.0, 1.0, 1.0, 1.0])).tolist()
        [0, 0, 1, 1]
    """
    borders = _borders(members, len(labels))
    new = torch.full_like(labels, -1)
    for group in sorted(set(labels.tolist())):
        regions = _regions(borders, (labels == group).nonzero().flatten().tolist())
        kept = max(regions, key=lambda region: float(weights[region].sum()))
        new[kept] = group
    count = int(labels.max()) + 1
    while bool((new < 0).any()):
        shared = torch.stack([borders[:, new == group].sum(1) for group in range(count)], 1)
        shared[new >= 0] = 0
        member, group = divmod(int(shared.argmax()), count)
        if not bool(shared.any()):  # the remaining members have no border because some pixels belong to no member
            return torch.where(new < 0, labels, new)
        new[member] = group
    return new


def _borders(members: Tensor, count: int) -> Tensor:
    """Returns the border length between each pair of members, in pixels, as a matrix of shape ``(count, count)``."""
    pairs = [(members[1:], members[:-1]), (members[:, 1:], members[:, :-1])]
    one, other = (torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1))
    borders = torch.bincount(one * count + other, minlength=count**2).reshape(count, count)
    borders = borders + borders.T
    borders.fill_diagonal_(0)
    return borders


def _regions(borders: Tensor, members: list[int]) -> list[list[int]]:
    """Returns the connected components of the given members."""
    left, regions = set(members), []
    while left:
        region, waiting = [], [left.pop()]
        while waiting:
            member = waiting.pop()
            region.append(member)
            near = left.intersection(borders[member].nonzero().flatten().tolist())
            left -= near
            waiting += near
        regions.append(region)
    return regions


__all__ = ["connected_parts"]
