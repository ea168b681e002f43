"""Conversion of heat maps and images to NumPy arrays of checked shapes."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..errors import InputError

Array = NDArray[np.float64]
Values = Tensor | Array


def as_array(values: Tensor | ArrayLike) -> Array:
    """Converts an array, or a tensor of any floating-point dtype, to a NumPy array in double precision."""
    return np.asarray(values.detach().cpu().double() if isinstance(values, Tensor) else values, dtype=float)


def map_array(values: Values) -> Array:
    """Returns a heat map as an array of shape ``(H, W)``.

    Raises:
        InputError: If it has another shape or contains NaN or infinity.
    """
    array = as_array(values)
    if array.ndim != 2 or not array.size:
        raise InputError(f"a heat map has shape (H, W), got {array.shape}. Select a sample, and sum over channels.")
    if not np.isfinite(array).all():
        raise InputError("this heat map has entries that are nan or infinite.")
    return array


def image_array(image: Values) -> Array:
    """Returns an image as an array of shape ``(C, H, W)``, with one or three channels.

    Raises:
        InputError: If it has another shape.
    """
    array = as_array(image)
    if array.ndim != 3 or len(array) not in (1, 3):
        raise InputError(f"an image has shape (1, H, W) or (3, H, W), got {array.shape}.")
    return array


__all__ = ["Array", "Values", "as_array", "image_array", "map_array"]
