"""Preprocessing: conversion of images to inputs of a model, and back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.models import ResNet18_Weights

from ..errors import NRMError

STANDARD: Callable[..., Any] = ResNet18_Weights.IMAGENET1K_V1.transforms
"""Preprocessing of most networks: resize to 256, centre crop of 224, mean and standard deviation of ImageNet."""


class PreprocessingError(NRMError, ValueError):
    """Raised if settings for preprocessing are invalid."""


@dataclass(frozen=True)
class Preprocessing:
    """A conversion of images to inputs of a model.

    Attributes:
        transform: torchvision's preset: resize, centre crop, scale to [0, 1], normalize by mean and standard deviation.
        fit: ``"crop"`` for the centre square, as in the preset; ``"pad"`` for the whole image with a margin in the mean
            colour; or ``"squeeze"`` for the whole image stretched to a square.
    """

    transform: Any
    fit: str = "crop"

    @property
    def mean(self) -> list[float]:
        """Mean of each channel."""
        return [float(value) for value in self.transform.mean]

    @property
    def std(self) -> list[float]:
        """Standard deviation of each channel."""
        return [float(value) for value in self.transform.std]

    @property
    def size(self) -> int:
        """Height and width of an input."""
        return int(self.transform.crop_size[0])

    @property
    def settings(self) -> dict[str, Any]:
        """Returns all settings that affect an input."""
        return {
            "resize": int(self.transform.resize_size[0]),
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.transform.interpolation.value,
            **({} if self.fit == "crop" else {"fit": self.fit}),
        }

    def seen(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Returns the part of an image that the model sees: left, top, right, bottom, in [0, 1].

        Args:
            size: Width and height of the image.
        """
        if self.fit != "crop":
            return (0.0, 0.0, 1.0, 1.0)
        shorter = int(self.transform.resize_size[0])
        halves = [min(1.0, self.size / shorter * min(size) / length) / 2 for length in size]
        return (0.5 - halves[0], 0.5 - halves[1], 0.5 + halves[0], 0.5 + halves[1])

    def __call__(self, image: Image.Image) -> Tensor:
        """Converts an image in mode RGB to an input ``(1, C, S, S)``."""
        image = image if self.fit == "crop" else self._fitted(image)
        tensor: Tensor = self.transform(image if len(self.mean) == 3 else image.convert("L"))[None]
        return tensor

    def _fitted(self, image: Image.Image) -> Image.Image:
        """Returns a square image whose centre crop shows the whole given image."""
        inner = self.size if self.fit == "squeeze" else max(image.size)
        whole = image.resize((inner, inner), Image.Resampling.BICUBIC) if self.fit == "squeeze" else image
        side = math.ceil(inner * int(self.transform.resize_size[0]) / self.size)
        mean = self.mean if len(self.mean) == 3 else self.mean * 3
        red, green, blue = (round(255 * value) for value in mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(whole, ((side - whole.width) // 2, (side - whole.height) // 2))
        return square

    def inverse(self, inputs: Tensor) -> Tensor:
        """Converts an input ``(1, C, S, S)`` to an image ``(3, S, S)`` in [0, 1]."""
        mean, std = (inputs.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (inputs[0] * std + mean).clamp(0, 1).expand(3, -1, -1).contiguous()

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs for black and white, ``(1, C, 1, 1)`` each, on the device of ``like``."""
        mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return -mean / std, (1 - mean) / std


def preprocessing(
    make: Callable[..., Any] = STANDARD,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fit: str = "crop",
) -> Preprocessing:
    """Returns the preprocessing of torchvision weights, with the given changes.

    Args:
        make: The ``transforms`` of the weights.
        size: The length to which the shorter side is resized, and the side length of the centre crop, or None for the
            value of the weights.
        mean: Mean of each channel: three for RGB, one for greyscale, or None for the value of the weights.
        std: Standard deviation of each channel, in the same form.
        fit: As in :class:`Preprocessing`.

    Raises:
        PreprocessingError: If mean and standard deviation do not both have one or three channels, or a deviation is not
            positive.
    """
    changes: dict[str, Any] = {} if size is None else {"crop_size": size, "resize_size": size}
    counts = {len(values) for values in (mean, std) if values is not None}
    if len(counts) > 1 or not counts <= {1, 3} or (counts == {1} and None in (mean, std)):
        raise PreprocessingError(
            "--mean and --std take three numbers each for an RGB model, or one each for a greyscale model; "
            f"got mean {mean} and std {std}. For instance: --mean 0.5,0.5,0.5 --std 0.25,0.25,0.25, "
            "or --mean 0.5 --std 0.25."
        )
    if std is not None and min(std) <= 0:
        raise PreprocessingError(f"--std must be positive, got {std}.")
    if mean is not None:
        changes["mean"] = tuple(mean)
    if std is not None:
        changes["std"] = tuple(std)
    return Preprocessing(make(**changes), fit)


__all__ = ["STANDARD", "Preprocessing", "PreprocessingError", "preprocessing"]
