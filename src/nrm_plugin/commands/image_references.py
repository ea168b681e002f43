"""Reference images, given by a name or a file."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from ..dataset.images import ImageError, load_image
from ..errors import NRMError, printable
from ..measure.layer_averages import blurred
from .model_loading import LoadedModel

BLUR = "blur"
NAMES = {
    BLUR: "the blurred image",
    "mean": "its mean colour",
    "black": "a black image",
    "white": "a white image",
}
"""Descriptions of the references that have a name."""


class ReferenceImageError(NRMError, ValueError):
    """Raised if a reference is neither a known name nor an image file."""


def reference_image(loaded: LoadedModel, inputs: Tensor, name: str) -> Tensor:
    """Returns the reference for a preprocessed image, in the shape of the inputs.

    Args:
        loaded: The model.
        inputs: The preprocessed image, ``(1, C, S, S)``.
        name: One of :data:`NAMES`, or an image file.

    Raises:
        ReferenceImageError: If ``name`` is neither a known name nor an image file.
    """
    if name == BLUR:
        return blurred(inputs)
    if name == "mean":
        return inputs.mean((2, 3), keepdim=True).expand_as(inputs).contiguous()
    if name in ("black", "white"):
        return loaded.preprocessing.bounds(inputs)[name == "white"].expand_as(inputs).contiguous()
    try:
        return loaded.preprocessing(load_image(Path(name)).image).to(inputs)
    except ImageError as error:
        raise ReferenceImageError(
            f"--reference {printable(name)} is neither {', '.join(NAMES)} nor an image that can be read: {error}"
        ) from error


def reference_words(name: str | None) -> str:
    """Describes a reference for a title, or returns an empty string without a reference."""
    return "" if name is None else f", compared with {NAMES.get(name) or printable(Path(name).name)}"
