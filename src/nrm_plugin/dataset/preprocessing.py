"""Conversion of images to model inputs and back."""

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
"""Default preprocessing: resize to 256, center crop of 224, mean and standard deviation of ImageNet."""


class PreprocessingError(NRMError, ValueError):
    """Raised if preprocessing settings are invalid."""


@dataclass(frozen=True)
class Preprocessing:
    """Conversion of images to model inputs.

    Attributes:
        transform: The preset of torchvision, which resizes an image, crops its center, scales it to [0, 1], and
            normalizes it with the mean and standard deviation.
        fit: ``"crop"`` for the center square, as in the preset; ``"pad"`` for the whole image with a margin in the mean
            color; or ``"squeeze"`` for the whole image, stretched to a square.
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
        """Height and width of the inputs."""
        return int(self.transform.crop_size[0])

    @property
    def settings(self) -> dict[str, Any]:
        """All settings that affect the inputs."""
        return {
            "resize": int(self.transform.resize_size[0]),
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.transform.interpolation.value,
            **({} if self.fit == "crop" else {"fit": self.fit}),
        }

    def seen(self, size: tuple[int, int]) -> tuple[float, float, float, float]:
        """Returns the part of an image that the model sees, as fractions (left, top, right, bottom) of the image size.

        Args:
            size: Width and height of the image.
        """
        if self.fit != "crop":
            return (0.0, 0.0, 1.0, 1.0)
        shorter = int(self.transform.resize_size[0])
        halves = [min(1.0, self.size / shorter * min(size) / length) / 2 for length in size]
        return (0.5 - halves[0], 0.5 - halves[1], 0.5 + halves[0], 0.5 + halves[1])

    def __call__(self, image: Image.Image) -> Tensor:
        """Converts an RGB image to an input of shape ``(1, C, S, S)``."""
        image = image if self.fit == "crop" else self._fitted(image)
        tensor: Tensor = self.transform(image if len(self.mean) == 3 else image.convert("L"))[None]
        return tensor

    def _fitted(self, image: Image.Image) -> Image.Image:
        """Pads or stretches an image to a square whose center crop contains the whole image."""
        inner = self.size if self.fit == "squeeze" else max(image.size)
        whole = image.resize((inner, inner), Image.Resampling.BICUBIC) if self.fit == "squeeze" else image
        side = math.ceil(inner * int(self.transform.resize_size[0]) / self.size)
        mean = self.mean if len(self.mean) == 3 else self.mean * 3
        red, green, blue = (round(255 * value) for value in mean)
        square = Image.new("RGB", (side, side), (red, green, blue))
        square.paste(whole, ((side - whole.width) // 2, (side - whole.height) // 2))
        return square

    def inverse(self, inputs: Tensor) -> Tensor:
        """Converts an input of shape ``(1, C, S, S)`` to an image of shape ``(3, S, S)`` with values in [0, 1]."""
        mean, std = (inputs.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (inputs[0] * std + mean).clamp(0, 1).expand(3, -1, -1).contiguous()

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the inputs for black and white pixels, in shape ``(1, C, 1, 1)`` and on the device of ``like``."""
        mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return -mean / std, (1 - mean) / std


def preprocessing(
    make: Callable[..., Any] = STANDARD,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    fit: str = "crop",
) -> Preprocessing:
    """Creates the preprocessing for torchvision weights, with optional changes.

    Args:
        make: Factory of the preset: ``transforms`` of torchvision weights.
        size: Length of the shorter side after resizing and side length of the center crop. Defaults to the values that
            the weights specify.
        mean: Mean of each channel: three values for RGB, one for grayscale. Defaults to the values that the weights
            specify.
        std: Standard deviation of each channel, with as many values as ``mean``.
        fit: As in :class:`Preprocessing`.

    Raises:
        PreprocessingError: If ``mean`` and ``std`` do not both have one or three values, or a standard deviation is not
            positive.
    """
    changes: dict[str, Any] = {} if size is None else {"crop_size": size, "resize_size": size}
    counts = {len(values) for values in (mean, std) if values is not None}
    if len(counts) > 1 or not counts <= {1, 3} or (counts == {1} and None in (mean, std)):
        raise PreprocessingError(
            "--mean and --std take three numbers each for an RGB model, or one each for a grayscale model; "
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
