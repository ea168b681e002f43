"""Photographs of single objects with masks, their backgrounds, and Fashion-MNIST.

The photographs are the stamps of Tux Paint: PNG files whose alpha channel is the mask of the object.
"""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .packages import fetched

STAMPS = "usr/share/tuxpaint/stamps"
GREY = 0.5
MARGIN = 0.06
"""Free space on each side of an object, relative to the side of the image."""
Background = Literal["grey", "china", "flower"]


@dataclass(frozen=True)
class Stamp:
    """A photograph of one object, cut out.

    Args:
        path: The PNG file.
        folder: Its folder relative to the stamps, such as ``animals/mammals/equines``.
    """

    path: Path
    folder: str

    @property
    def name(self) -> str:
        """Name of the object."""
        return self.path.stem

    @property
    def label(self) -> str:
        """The first two folders, such as ``animals/mammals``."""
        return "/".join(self.folder.split("/")[:2])

    def cut_out(self, height: int, width: int) -> Tensor:
        """Returns red, green, blue and mask in [0, 1], ``(4, height, width)``, centered and scaled to the margin."""
        with Image.open(self.path) as file:
            image = file.convert("RGBA")
        box = image.getchannel("A").getbbox()
        image = image.crop(box) if box else image
        free = 1 - 2 * MARGIN
        scale = min(free * height / image.height, free * width / image.width)
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        canvas = Image.new("RGBA", (width, height))
        canvas.paste(image.resize(size, Image.Resampling.BICUBIC), ((width - size[0]) // 2, (height - size[1]) // 2))
        return torch.from_numpy(np.array(canvas)).permute(2, 0, 1).float() / 255


@cache
def stamps() -> tuple[Stamp, ...]:
    """Returns all stamps except cartoons and mirrored copies, ordered by path."""
    root = fetched("tuxpaint-stamps-default") / STAMPS
    paths = sorted(root.rglob("*.png"))
    found = (Stamp(path, path.parent.relative_to(root).as_posix()) for path in paths)
    return tuple(stamp for stamp in found if "cartoon" not in stamp.folder and "mirror" not in stamp.name)


@cache
def background(name: Background, height: int, width: int) -> Tensor:
    """Returns a landscape of scikit-learn, cropped to the shape, or gray, ``(3, height, width)`` in [0, 1]."""
    if name == "grey":
        return torch.full((3, height, width), GREY)
    from sklearn.datasets import load_sample_image

    photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
    scale = max(height / photo.height, width / photo.width)
    photo = photo.resize((round(photo.width * scale), round(photo.height * scale)), Image.Resampling.BICUBIC)
    left, top = (photo.width - width) // 2, (photo.height - height) // 2
    return torch.from_numpy(np.array(photo.crop((left, top, left + width, top + height)))).permute(2, 0, 1) / 255


def placed(cut_out: Tensor, ground: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the object in front of a background, ``(3, H, W)``, and its mask, boolean ``(H, W)``."""
    alpha = cut_out[3]
    return alpha * cut_out[:3] + (1 - alpha) * ground, alpha > 0.5


FASHION = ("T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


@cache
def fashion(split: Literal["train", "t10k"]) -> tuple[Tensor, Tensor]:
    """Returns Fashion-MNIST: images ``(N, 1, 28, 28)`` in [0, 1], and labels ``(N,)``."""
    root = fetched("dataset-fashion-mnist")

    def read(kind: str, header: int) -> np.ndarray:
        (path,) = root.rglob(f"{split}-{kind}-ubyte*")
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return np.frombuffer(data, np.uint8, offset=header).copy()

    images = torch.from_numpy(read("images-idx3", 16)).reshape(-1, 1, 28, 28).float() / 255
    return images, torch.from_numpy(read("labels-idx1", 8)).long()
