"""Detection of a plain image background, such as black or white."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError

TOLERANCE = 8 / 255
"""Maximum difference of a channel from the background color. Noise and compression artifacts stay below it."""
LEAST_OF_IMAGE, LEAST_OF_BORDER, LEAST_OF_SIDE = 1 / 4, 1 / 3, 1 / 10
"""Minimum fraction of the image, of its border, and of each of its four sides that the background covers."""
STRAIGHT = 0.9
"""Minimum fraction of each edge of a rectangle, such as a photograph in a frame, that is not background."""


def plain_ground(image: Tensor) -> Tensor | None:
    """Returns the color of a plain image background, or None if the image has no plain background.

    The candidate is the most frequent color along the border. It is the background if it covers at least a third of the
    border, a tenth of each side and a quarter of the image. A sky is not a background because it does not reach the
    bottom. Neither are frames, or bars above and below a photograph, because they enclose a rectangle.

    Args:
        image: An image of shape ``(C, H, W)`` with values in [0, 1], not normalized.

    Returns:
        The color, of shape ``(C,)``.

    Raises:
        InputError: If the image is not a tensor of shape ``(C, H, W)`` with values in [0, 1].

    Examples:
        >>> image = torch.ones(3, 8, 8)
        >>> image[:, 2:5, 3:6] = torch.rand(3, 3, 3) / 2
        >>> plain_ground(image)
        tensor([1., 1., 1.])
        >>> plain_ground(torch.rand(3, 8, 8)) is None
        True
    """
    if image.ndim != 3 or not bool(((image >= 0) & (image <= 1)).all()):
        raise InputError(
            f"expected an image (C, H, W) with values in [0, 1], got shape {tuple(image.shape)}"
            f"{f' with values from {image.min():.3g} to {image.max():.3g}' if image.numel() else ''}. Undo the "
            "normalization by mean and standard deviation first."
        )
    if min(image.shape) == 0:
        return None
    color = _border_color(image)
    is_ground = _is_near(image, color)
    sides = [is_ground[0], is_ground[-1], is_ground[:, 0], is_ground[:, -1]]
    covers = (
        float(is_ground.float().mean()) >= LEAST_OF_IMAGE
        and float(torch.cat(sides).float().mean()) >= LEAST_OF_BORDER
        and all(float(side.float().mean()) >= LEAST_OF_SIDE for side in sides)
    )
    return color if covers and not bool(is_ground.all()) and not _is_frame(is_ground) else None


def _border_color(image: Tensor) -> Tensor:
    """Returns the most frequent color along the border, up to the tolerance, as a tensor of shape ``(C,)``."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1)
    colors, counts = torch.unique((border * 255).round(), dim=1, return_counts=True)
    similar = _is_near(colors[:, :, None] / 255, colors[:, None] / 255).to(counts.dtype)  # (different, different)
    most = colors[:, (similar @ counts).argmax()] / 255
    return border[:, _is_near(border, most)].median(1).values


def _is_near(image: Tensor, color: Tensor) -> Tensor:
    """Returns True where every channel differs from a color by at most the tolerance. Channels are in dimension 0."""
    color = color.reshape(*color.shape, *[1] * (image.ndim - color.ndim))
    return ((image - color).abs() <= TOLERANCE + 1e-6).all(0)


def _is_frame(is_ground: Tensor) -> bool:
    """Returns True if the background frames a rectangle with straight edges, such as a photograph between bars."""
    rows, columns = ((~is_ground).any(dim).nonzero().flatten() for dim in (1, 0))
    inside = ~is_ground[int(rows[0]) : int(rows[-1]) + 1, int(columns[0]) : int(columns[-1]) + 1]
    edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
    return all(float(edge.float().mean()) >= STRAIGHT for edge in edges)
