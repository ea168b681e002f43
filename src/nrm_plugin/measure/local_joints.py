r"""Estimate of the joint relevance of two layers from their marginals, without any pass.

In image networks, most walks stay close to their position between two layers. If they stayed exactly at their position
``p``, and if the channels that a walk crosses there were independent, the joint relevance of two channels would be

.. math:: \tilde J_{ij} = \sum_p \frac{\mu(i, p) \, \mu(j, p)}{\mu(p)}

The search for groups starts from this estimate before it uses exact joint relevance.

Source: new in this package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..recording.taps import Tap
from .groups import Over, labels_of

GRID = 7
"""Maximum number of cells along each side of the grid used to compare positions in two layers."""
CANCELLED = 1e-3
"""Smallest relevance of a cell, relative to its absolute relevance, that is used as a divisor."""


def local_joint(
    upper: Tap, lower: Tap, above: Tensor, below: Tensor, parts: Over | None = None, count: int = 0
) -> Tensor | None:
    """Estimates the joint relevance of the channels of two layers from their marginals.

    Args:
        upper: Tap of the upper layer.
        lower: Tap of the lower layer.
        above: Marginal of the upper layer, of shape ``(N, *shape)``.
        below: Marginal of the lower layer, of shape ``(N, *shape)``.
        parts: The image part of each neuron of the lower layer, used in place of its channels.
        count: Number of image parts.

    Returns:
        The estimate, of shape ``(N, upper, lower)``, or None if the layers have no positions in common.
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
    """Returns the image part that contains the position of each neuron of a tap.

    The tap and the image must have two spatial dimensions. A position belongs to the part that contains its central
    pixel. Returns None if the channels of a pixel are in different parts.
    """
    labels = labels_of(image, kind)
    if labels.ndim != 3 or not bool((labels == labels[:1]).all()):
        return None
    rows, columns = (
        ((torch.arange(count) + 0.5) * size / count).long()
        for size, count in zip(image.shape[2:], tap.shape[2:], strict=True)
    )
    return labels[0][rows][:, columns].expand(tap.shape[1:])
