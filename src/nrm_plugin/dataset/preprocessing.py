"""From pixels to what a model is fed, and back to what a person is shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor
from torchvision.models import ResNet18_Weights

from ..errors import NRMError

STANDARD: Callable[..., Any] = ResNet18_Weights.IMAGENET1K_V1.transforms
"""Preparation of most networks: short side to 256, the middle 224, mean and deviation of ImageNet."""


class PreparationError(NRMError, ValueError):
    """Settings that no picture can be prepared by."""


@dataclass(frozen=True)
class Preparation:
    """How pictures are made into inputs of a model.

    Attributes:
        transform: torchvision's preset: resize, cut the middle, scale to [0, 1], subtract the mean, divide.
    """

    transform: Any

    @property
    def mean(self) -> list[float]:
        """One for each channel."""
        return [float(value) for value in self.transform.mean]

    @property
    def std(self) -> list[float]:
        """One for each channel."""
        return [float(value) for value in self.transform.std]

    @property
    def size(self) -> int:
        """Height and width of an input."""
        return int(self.transform.crop_size[0])

    @property
    def settings(self) -> dict[str, Any]:
        """Whatever changes an input."""
        return {
            "resize": int(self.transform.resize_size[0]),
            "size": self.size,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.transform.interpolation.value,
        }

    def __call__(self, image: Image.Image) -> Tensor:
        """The input ``(1, C, S, S)`` of a picture in mode RGB."""
        tensor: Tensor = self.transform(image if len(self.mean) == 3 else image.convert("L"))[None]
        return tensor

    def undone(self, inputs: Tensor) -> Tensor:
        """The picture ``(3, S, S)`` in [0, 1] that an input ``(1, C, S, S)`` was made from."""
        mean, std = (inputs.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        return (inputs[0] * std + mean).clamp(0, 1).expand(3, -1, -1).contiguous()

    def bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Inputs of black and of white, ``(1, C, 1, 1)`` each, on the device of ``like``."""
        mean, std = (like.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return -mean / std, (1 - mean) / std


def preparation(
    make: Callable[..., Any] = STANDARD,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Preparation:
    """The preparation of some weights, with what a user wants otherwise.

    Args:
        make: ``transforms`` of torchvision's weights.
        size: The short side is scaled to this and the middle square of it is taken; None for that of the weights.
        mean: Subtracted, one number for each channel: three for colours, one for grey; None for that of the weights.
        std: Divided by, likewise.

    Raises:
        PreparationError: Mean and deviation are not of one or three channels both.
    """
    changes: dict[str, Any] = {} if size is None else {"crop_size": size, "resize_size": size}
    counts = {len(values) for values in (mean, std) if values is not None}
    if len(counts) > 1 or not counts <= {1, 3} or (counts == {1} and None in (mean, std)):
        raise PreparationError(
            "--mean and --std take three numbers for a model of colours, or one each for a model of grey pictures: "
            f"got mean {mean} and std {std}."
        )
    if std is not None and min(std) <= 0:
        raise PreparationError(f"--std divides, so its numbers are above 0: got {std}.")
    if mean is not None:
        changes["mean"] = tuple(mean)
    if std is not None:
        changes["std"] = tuple(std)
    return Preparation(make(**changes))
