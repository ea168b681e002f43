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
SPREAD = "spread out"
LARGE, LONG = 0.4, 0.8
"""Largest area, and largest extent along a side, of a region whose location can be said in words, as fractions of the
image.
"""
MOST = 0.5
"""Fraction of a region's relevance above which a single ninth of the image is named as its location."""
THERE, ASIDE = 0.2, 0.6
"""Smallest fraction of a region's relevance in the ninth with its center of mass, and in a half of the image, at which
they are named as its location.
"""


def place_name(region: NDArray[np.bool_], relevance: NDArray[np.float64] | None = None) -> str:
    """Describes the location of a region in an image: "upper left", "center", …, "left" or "spread out".

    The location is the ninth of the image that contains more than half of the region's relevance, or otherwise the
    ninth that contains its center of mass. The region may have little relevance there: its location is then the half of
    the image that contains most of it, or "spread out" if no half contains clearly more than the other. The description
    is empty if the region covers more than 40% of the image, spans more than 80% of a side, or does not contain its own
    center. It is also empty if the relevance of the region lies in another row and another column of ninths than its
    area, because a word such as "center" would then not describe what is seen of the region.

    Args:
        region: Boolean mask of the region, of shape ``(H, W)``.
        relevance: Relevance of the pixels, of shape ``(H, W)``; by default, all pixels have equal weight.

    Examples:
        >>> region = np.zeros((9, 9), bool)
        >>> region[:3, :3] = True
        >>> place_name(region), place_name(~region)
        ('upper left', '')
    """
    region = np.asarray(region, dtype=bool)
    if not region.any() or not _is_compact(region):
        return ""
    weights = region.astype(float)
    if relevance is not None and relevance.shape == region.shape and (np.abs(relevance) * region).any():
        weights *= np.abs(relevance)
    weights /= weights.sum()
    place, share = _ninth(weights)
    if share < THERE:
        return _side(weights)
    own, _ = _ninth(region / region.sum())
    return THIRDS[place[0]][place[1]] if place[0] == own[0] or place[1] == own[1] else ""


def half_area(relevance: NDArray[np.float64]) -> float:
    """Returns the smallest fraction of an image that holds half of the positive relevance, or 1 if there is none.

    It is 1/2 if relevance is uniform.

    Args:
        relevance: Heat map of shape ``(H, W)``.

    Examples:
        >>> half_area(np.array([[3.0, 1.0], [1.0, 1.0]]))
        0.25
    """
    values = np.sort(np.asarray(relevance, dtype=float).clip(min=0), axis=None)[::-1].cumsum()
    return float((np.searchsorted(values, values[-1] / 2) + 1) / len(values)) if values[-1] > 0 else 1.0


def _ninth(weights: NDArray[np.float64]) -> tuple[tuple[int, int], float]:
    """Returns the ninth of an image with most of the weights, or else that of their center, and its share of them."""
    rows, columns = (np.arange(length) * 3 // length for length in weights.shape)
    ninths = np.zeros((3, 3))
    np.add.at(ninths, (rows[:, None], columns), weights)
    place = divmod(int(ninths.argmax()), 3)
    if ninths.max() <= MOST:
        centers = [
            float((weights.sum(1 - axis) * (np.arange(length) + 0.5)).sum()) / length
            for axis, length in enumerate(weights.shape)
        ]
        place = min(int(3 * centers[0]), 2), min(int(3 * centers[1]), 2)
    return place, float(ninths[place])


def _is_compact(region: NDArray[np.bool_]) -> bool:
    """Returns True if a word such as "left" can describe where a region is."""
    places = np.nonzero(region)
    spans = [float(np.ptp(along) + 1) / length for along, length in zip(places, region.shape, strict=True)]
    center = tuple(int(along.mean() + 0.5) for along in places)
    return bool(region.mean() <= LARGE and max(spans) <= LONG and region[center])


def _side(weights: NDArray[np.float64]) -> str:
    """Returns the half of an image that contains most of the weights, or "spread out"."""
    height, width = weights.shape
    halves = (weights[: height // 2], weights[-(height // 2) :], weights[:, : width // 2], weights[:, -(width // 2) :])
    shares = [float(half.sum()) for half in halves]
    return SIDES[int(np.argmax(shares))] if max(shares) >= ASIDE else SPREAD


__all__ = ["half_area", "place_name"]
