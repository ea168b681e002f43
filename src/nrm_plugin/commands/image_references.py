"""Reference images, given by name or file."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from ..dataset.images import ImageError, load_image
from ..errors import NRMError, printable
from ..measure.layer_averages import blurred
from ..measure.plain_ground import plain_ground
from .model_loading import LoadedModel

BLUR = "blur"
COLOUR = re.compile(r"#[0-9a-fA-F]{6}")
LUMINANCE = (0.299, 0.587, 0.114)
"""Weights of red, green and blue for grayscale models, as in Pillow."""
NAMES = {
    BLUR: "the blurred image",
    "mean": "its mean color",
    "black": "a black image",
    "white": "a white image",
}
"""Descriptions of named references, which are neither colors nor files."""


class ReferenceImageError(NRMError, ValueError):
    """Raised if a reference is neither a known name nor an image file."""


def reference_image(loaded: LoadedModel, inputs: Tensor, name: str) -> Tensor:
    """Returns the reference for a preprocessed image, in the shape of the inputs.

    Args:
        loaded: The loaded model, with its preprocessing.
        inputs: The preprocessed image, of shape ``(1, C, S, S)``.
        name: One of :data:`NAMES`, a color such as ``#f0f0f0``, or an image file.

    Raises:
        ReferenceImageError: If ``name`` is neither a known name nor an image file.
    """
    if name == BLUR:
        return blurred(inputs)
    if name == "mean":
        return inputs.mean((2, 3), keepdim=True).expand_as(inputs).contiguous()
    if name in ("black", "white"):
        return loaded.preprocessing.bounds(inputs)[name == "white"].expand_as(inputs).contiguous()
    if COLOUR.fullmatch(name):
        return _of_color(loaded, inputs, name)
    try:
        return loaded.preprocessing(load_image(Path(name)).image).to(inputs)
    except ImageError as error:
        raise ReferenceImageError(
            f"--reference {printable(name)} is neither {', '.join(NAMES)}, a color such as #f0f0f0, nor an image that "
            f"can be read: {error}"
        ) from error


def reference_words(name: str | None) -> str:
    """Describes a reference for a title. Returns an empty string if there is none."""
    if name is None:
        return ""
    words = f"a plain image of {name}" if COLOUR.fullmatch(name) else printable(Path(name).name)
    return f", compared with {NAMES.get(name, words)}"


def ground_name(loaded: LoadedModel, inputs: Tensor) -> str | None:
    """Returns the plain background of a preprocessed image as the name of a reference, or None if there is none.

    Args:
        loaded: The loaded model, with its preprocessing.
        inputs: The preprocessed image, of shape ``(1, C, S, S)``.
    """
    color = plain_ground(loaded.preprocessing.inverse(inputs))
    if color is None:
        return None
    name = "#" + "".join(f"{round(255 * float(value)):02x}" for value in color)
    return {"#000000": "black", "#ffffff": "white"}.get(name, name)


def _of_color(loaded: LoadedModel, inputs: Tensor, name: str) -> Tensor:
    """Returns a plain image of a color, with the shape of the inputs."""
    values = inputs.new_tensor([int(name[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    if inputs.shape[1] == 1:
        values = (values * values.new_tensor(LUMINANCE)).sum(0, keepdim=True)
    black, white = loaded.preprocessing.bounds(inputs)
    return (black + values.reshape(1, -1, 1, 1) * (white - black)).expand_as(inputs).contiguous()
