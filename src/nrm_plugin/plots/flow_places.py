"""Descriptions of where a region is located in an image."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

THIRDS = (
    ("upper left", "top", "upper right"),
    ("left", "center", "right"),
    ("lower left", "bottom", "lower right"),
)
SIDES = ("top", "bottom", "left", "right")
EDGES, SPREAD = "along the edges", "spread out"
TOUCHED = 0.5
"""Smallest covered fraction of an image side at which a region lies along this side."""
MOST = 0.5
"""Fraction of a region's relevance above which a single ninth of the image is named as its location."""
THERE, ASIDE = 0.2, 0.6
"""Smallest fraction of a region's relevance in the ninth with its center of mass, and in a half of the image, at which
they are named as its location.
"""


def place_name(region: NDArray[np.bool_], relevance: NDArray[np.float64] | None = None) -> str:
    """Describes the location of a region in an image: "upper left", "center", …, "along the edges" or "spread out".

    The location is the ninth of the image that contains more than half of the region's relevance. If there is none, it
    is "along the edges" if the region covers at least half of three or more sides of the image, and otherwise the ninth
    that contains its center of mass. A large region may have little relevance there: its location is then the half of
    the image that contains most of it, or "spread out" if no half contains clearly more than the other.

    Args:
        region: Boolean mask of the region, of shape ``(H, W)``.
        relevance: Relevance of the pixels, of shape ``(H, W)``; by default, all pixels have equal weight.

    Examples:
        >>> region = np.zeros((9, 9), bool)
        >>> region[:3, :3] = True
        >>> place_name(region), place_name(~region)
        ('upper left', 'along the edges')
    """
    region = np.asarray(region, dtype=bool)
    if not region.any():
        return ""
    weights = region.astype(float)
    if relevance is not None and relevance.shape == region.shape and (np.abs(relevance) * region).any():
        weights *= np.abs(relevance)
    weights /= weights.sum()
    rows, columns = (np.arange(length) * 3 // length for length in region.shape)
    ninths = np.zeros((3, 3))
    np.add.at(ninths, (rows[:, None], columns), weights)
    sides = (region[0], region[-1], region[:, 0], region[:, -1])
    if ninths.max() > MOST:
        place = divmod(int(ninths.argmax()), 3)
    elif sum(float(side.mean()) >= TOUCHED for side in sides) >= 3:
        return EDGES
    else:
        centers = [
            float((weights.sum(1 - axis) * (np.arange(length) + 0.5)).sum()) / length
            for axis, length in enumerate(region.shape)
        ]
        place = min(int(3 * centers[0]), 2), min(int(3 * centers[1]), 2)
        if ninths[place] < THERE:
            return _side(weights)
    return THIRDS[place[0]][place[1]]


def _side(weights: NDArray[np.float64]) -> str:
    """Returns the half of an image that contains most of the weights, or "spread out"."""
    height, width = weights.shape
    halves = (weights[: height // 2], weights[-(height // 2) :], weights[:, : width // 2], weights[:, -(width // 2) :])
    shares = [float(half.sum()) for half in halves]
    return SIDES[int(np.argmax(shares))] if max(shares) >= ASIDE else SPREAD


__all__ = ["EDGES", "place_name"]
