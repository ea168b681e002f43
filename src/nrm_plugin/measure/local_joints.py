r"""An estimate of the joint relevance of two layers from their marginals, which takes no pass.

Walks seldom go far between two layers of an image network. If they stayed at their position ``p``, and the channels
that a walk crosses there were independent, the joint relevance of two channels would be

.. math:: \tilde J_{ij} = \sum_p \frac{\mu(i, p) \, \mu(j, p)}{\mu(p)}

The search for groups starts from it, and then moves members by exact joint relevance. Source: ours.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..recording.taps import Tap
from .groups import Over, labels_of

GRID = 7
"""Most cells along each side of the grid on which the positions of two layers are compared."""
CANCELLED = 1e-3
"""Share of the absolute relevance of a cell below which its sum is no divisor."""


def local_joint(
    upper: Tap, lower: Tap, above: Tensor, below: Tensor, parts: Over | None = None, count: int = 0
) -> Tensor | None:
    """Returns the estimate of the joint relevance of the channels of two layers, ``(N, upper, lower)``.

    None if the layers have no positions in common.

    Args:
        upper: The upper layer.
        lower: The lower layer.
        above: Marginal of the upper layer, ``(N, *shape)``.
        below: Marginal of the lower layer, ``(N, *shape)``.
        parts: Part of the image of each neuron of the lower layer, in place of its channels.
        count: Number of parts.
    """
    one, other = _channels_first(upper, above), _channels_first(lower, below)
    if isinstance(parts, Tensor):
        members = (parts[0].to(other.device) == torch.arange(count, device=other.device)[:, None, None]).to(other)
        other = members.unsqueeze(0).expand(len(one), *members.shape)
    if one.ndim != other.ndim or one.ndim < 3:
        return None
    if one.ndim == 4:
        height, width = (min(GRID, a, b) for a, b in zip(one.shape[2:], other.shape[2:], strict=True))
        one, other = (adaptive_avg_pool2d(each, (height, width)) for each in (one, other))
    elif one.shape[2:] != other.shape[2:]:
        return None
    one, other = one.flatten(2).double(), other.flatten(2).double()
    total, size_of = other.sum(1, keepdim=True), other.abs().sum(1, keepdim=True)
    shares = torch.where(total.abs() > CANCELLED * size_of, other / total, torch.zeros_like(other))
    return one @ shares.transpose(1, 2)


def _channels_first(tap: Tap, values: Tensor) -> Tensor:
    return values.movedim(tap.channel_dim % len(tap.shape), 1)


def at_positions(image: Tap, kind: Over, tap: Tap) -> Tensor | None:
    """Returns the member of each neuron of a tap, for members that are parts of an image.

    The tap and the image have two dimensions of positions, and the member of a position is that of its central pixel.
    None if the members are not made of whole positions.
    """
    labels = labels_of(image, kind)
    if labels.ndim != 3 or not bool((labels == labels[:1]).all()):
        return None
    rows, columns = (
        ((torch.arange(count) + 0.5) * size / count).long()
        for size, count in zip(image.shape[2:], tap.shape[2:], strict=True)
    )
    return labels[0][rows][:, columns].expand(tap.shape[1:])
