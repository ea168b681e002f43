"""Photographs for figures, including the part that the model did not see."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..dataset.images import LoadedImage
from ..plots.flow_thumbnails import Photo
from ..plots.ribbons import short_percent
from .model_loading import LoadedModel

LARGEST = 640
"""Maximum side length of photographs in figures, in pixels."""
LEAST = 0.01
"""Unseen fraction of an image above which a note appears."""


def photo(loaded: LoadedModel, source: LoadedImage, inputs: Tensor) -> Photo:
    """Prepares an image for figures.

    Args:
        loaded: The loaded model, with its preprocessing.
        source: The image file.
        inputs: The preprocessed image, of shape ``(1, C, S, S)``.
    """
    seen = loaded.preprocessing.seen(source.image.size)
    image = loaded.preprocessing.inverse(inputs).cpu()
    if len(loaded.preprocessing.mean) == 1:
        image = image[:1]
    if seen == (0.0, 0.0, 1.0, 1.0):
        return Photo(image, content=_content(source.image.size, loaded) if margins(loaded, source) else None)
    small = source.image.copy()
    small.thumbnail((LARGEST, LARGEST))
    return Photo(image, np.moveaxis(np.asarray(small, dtype=float) / 255, -1, 0), seen)


def side_by_side(first: Photo, second: Photo, regions: Mapping[str, NDArray[np.bool_]]) -> Photo:
    """Returns two images of the same size next to each other, without the parts that the model did not see.

    Args:
        first: The image on the left.
        second: The image on the right.
        regions: Regions of input nodes in one image, of shape ``(H, W)``, keyed by node. They are outlined in both
            images.
    """
    images = [np.asarray(each.image, dtype=float) for each in (first, second)]
    channels, height, width = images[0].shape
    gap = max(1, width // 16)
    between = np.full(
        (channels, height, gap), float(channels > 1)
    )  # white, as values of one channel are drawn inverted
    empty = np.zeros((height, gap), bool)
    both = {key: np.concatenate([mask, empty, mask], 1) for key, mask in regions.items()}
    return Photo(np.concatenate([images[0], between, images[1]], 2), regions=both)


def crop_note(shown: Photo) -> str:
    """Describes how much of an image the model saw. Returns an empty string if it saw all of it."""
    left, top, right, bottom = shown.seen
    share = 1 - (right - left) * (bottom - top)
    if share < LEAST:
        return ""
    return f"The model saw only the framed part, {short_percent(1 - share)} of the image."


def margins(loaded: LoadedModel, source: LoadedImage) -> float:
    """Returns the fraction of the model input that pads an image that is not square."""
    width, height = source.image.size
    return 1 - min(width, height) / max(width, height) if loaded.preprocessing.fit == "pad" else 0.0


def _content(size: tuple[int, int], loaded: LoadedModel) -> NDArray[np.bool_]:
    """Returns a mask of the pixels of a padded model input that show the image."""
    side = loaded.preprocessing.size
    places = np.abs((np.arange(side) + 0.5) / side - 0.5)
    columns, rows = (places <= 0.5 * length / max(size) for length in size)
    result: NDArray[np.bool_] = rows[:, None] & columns
    return result


def margin_note(share: float, relevance: float) -> str:
    """Describes the margins that pad an image. Returns an empty string if there are hardly any.

    Args:
        share: Fraction of the model input that they cover.
        relevance: Fraction of the relevance that comes from them.
    """
    if share < LEAST:
        return ""
    covered = short_percent(share)
    text = f"The margins, {covered} of the model's input, only make the image square. Areas do not count them."
    return text if abs(relevance) < LEAST else f"{text} {short_percent(relevance)} of the relevance comes from them."
