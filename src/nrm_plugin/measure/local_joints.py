r"""An estimate of joint relevance between two layers from their marginals, without any pass.

In image networks, most walks stay close to their position between two layers. If they stayed at their position ``p``
exactly, and the channels that a walk crosses there were independent, the joint relevance of two channels would be

.. math:: \tilde J_{ij} = \sum_p \frac{\mu(i, p) \, \mu(j, p)}{\mu(p)}

The search for groups starts from this estimate, and then uses exact joint relevance. Source: new in this package.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ..recording.taps import Tap
from .groups import Over, labels_of

GRID = 7
"""Largest number of cells along each grid side when the positions of two layers are compared."""
CANCELLED = 1e-3
"""Smallest relevance of a cell, as a fraction of its absolute relevance, that is used as a divisor."""


def local_joint(
    upper: Tap, lower: Tap, above: Tensor, below: Tensor, parts: Over | None = None, count: int = 0
) -> Tensor | None:
    """Returns an estimate of joint relevance between the channels of two layers, ``(N, upper, lower)``.

    The result is None if the layers have no positions in common.

    Args:
        upper: The upper layer.
        lower: The lower layer.
        above: Marginal of the upper layer, ``(N, *shape)``.
        below: Marginal of the lower layer, ``(N, *shape)``.
        parts: The part of the image to which each neuron of the lower layer belongs, to be used in place of channels.
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
    """Returns, for each neuron of a tap, the part of an image to which its position belongs.

    The tap and the image have two dimensions of positions; a position belongs to the part that contains its central
    pixel. The result is None if the parts separate the channels of a pixel.
    """
    labels = labels_of(image, kind)
    if labels.ndim != 3 or not bool((labels == labels[:1]).all()):
        return None
    rows, columns = (
        ((torch.arange(count) + 0.5) * size / count).long()
        for size, count in zip(image.shape[2:], tap.shape[2:], strict=True)
    )
    return labels[0][rows][:, columns].expand(tap.shape[1:])
