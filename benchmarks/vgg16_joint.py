"""Which channels of VGG16 carry the relevance together? Joint relevance over two and three convolutions.

``python -m benchmarks.vgg16_joint IMAGE … --weights FILE|IMAGENET1K_V1|none``, from the checkout
"""

from __future__ import annotations

import argparse
import contextlib
import pickle
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import safetensors.torch
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, vgg16

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands.joint_relevance import joint_figure, joint_relevance
from nrm_plugin.errors import NRMError
from nrm_plugin.plots.heatmaps import save

ONLINE = VGG16_Weights.IMAGENET1K_V1
LAYERS = ("features.28", "features.21", "features.14")


class VGGError(NRMError, ValueError):
    """An image, weights or arguments that no picture can be made of."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse alone prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class Picture:
    """An image as the network gets it, ``(1, 3, 224, 224)``, and as it is shown, ``(3, 224, 224)`` in [0, 1]."""

    tensor: Tensor
    shown: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Write the pictures; 2 where that was not possible, then one line on stderr says why."""
    options = _parser().parse_args(argv)
    try:
        _check_layers(options.layers)
        _check_names(options.images)
        pictures = [load_picture(path) for path in options.images]
        model = load_vgg16(options.weights, options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        for image, picture in zip(options.images, pictures, strict=True):
            for path in draw(model, picture, image.stem, options):
                print(path, flush=True)
    except (NRMError, OSError) as error:
        print(f"vgg16_joint: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# -- the image ------------------------------------------------------------------------------------------------------


def load_picture(path: Path) -> Picture:
    """An image file in the form that torchvision's VGG16 was trained on: resized, cropped, normalized.

    Raises:
        VGGError: There is no such file, or it is no image, or a damaged one.
    """
    try:
        with Image.open(path) as file:
            image = _colors(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise VGGError(f"there is no image {path}.") from error
    # What PIL raises for a damaged file depends on its format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VGGError(
            f"cannot read {path} as an image: {error}. Give a file that PIL can read, such as PNG or JPEG."
        ) from error
    transform = ONLINE.transforms()
    tensor = transform(image)[None]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    return Picture(tensor, tensor[0] * std + mean)


def _colors(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16 bits of grey: PIL would cut them off at 255.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


# -- the network ----------------------------------------------------------------------------------------------------


def load_vgg16(weights: str, seed: int = 0) -> nn.Module:
    """torchvision's VGG16 in evaluation mode.

    Args:
        weights: ``"none"`` for random ones, ``"IMAGENET1K_V1"`` to download torchvision's, or a file with a state dict.
        seed: Of random weights.

    Raises:
        VGGError: The weights cannot be had, or are not those of a VGG16.
    """
    if weights == "none":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return _plain(vgg16(weights=None))
    state = _online() if weights == ONLINE.name else _from_file(Path(weights))
    last = state.get("classifier.6.bias")
    # Built without storage: 138 million initial weights would be drawn only to be overwritten.
    with torch.device("meta"):
        model = _plain(vgg16(weights=None, num_classes=1000 if last is None else last.numel()))
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise VGGError(f"{weights} does not hold a state dict of torchvision's vgg16. {_first_lines(error)}") from error
    return model.float()


def _plain(model: nn.Module) -> nn.Module:
    return model.eval()


def _online() -> Mapping[str, Tensor]:
    try:
        with contextlib.redirect_stdout(sys.stderr):  # on stdout the download would stand among the pictures
            state: Mapping[str, Tensor] = ONLINE.get_state_dict(progress=True, check_hash=True)
        return state
    except (OSError, RuntimeError) as error:  # no connection, no space; a hash that does not fit
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise VGGError(
            f"the weights {ONLINE.name} are not in {folder} and could not be downloaded ({error}). "
            f"Download {ONLINE.url} where there is a connection, and give the file: --weights FILE."
        ) from error


def _from_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise VGGError(f"there is no file {path}. --weights takes a file with a state dict, {ONLINE.name} or none.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise VGGError(
            f"cannot read weights from {path}: {_first_lines(error)}. Give a state dict that torch.save wrote "
            "(.pth) or a .safetensors file."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VGGError(f"{path} holds no state dict. Save one: torch.save(model.state_dict(), 'vgg16.pth').")
    return state


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else f"{text[:240].rstrip()} …"


# -- the pictures ---------------------------------------------------------------------------------------------------


def draw(model: nn.Module, picture: Picture, name: str, options: argparse.Namespace) -> list[Path]:
    """One picture over the upper two layers, and one over each further layer.

    Raises:
        VGGError: The target is no class of the network.
    """
    with torch.no_grad():
        scores = model(picture.tensor)[0].softmax(0)
    target = int(scores.argmax()) if options.target is None else options.target
    if not 0 <= target < len(scores):
        raise VGGError(
            f"--target {target} is no class of this network, which has {len(scores)} (0 to {len(scores) - 1})."
        )
    mu = RelevanceMeasure(model, picture.tensor, target)
    words = "random weights, " if options.weights == "none" else ""
    heading = f"VGG16, {words}{_class_name(target, len(scores))} ({float(scores[target]):.2g})"
    layers = sorted(options.layers, key=mu.layers.index, reverse=True)
    pixels = mu.marginal("input")[0].sum(0)
    files = []
    for count in range(2, len(layers) + 1):
        found = joint_relevance(mu, layers[:count], options.channels)
        figure = joint_figure(mu, picture.shown, pixels, found, options.marks, heading)
        files.append(save(figure, options.out / f"{name}-{count}-layers.png"))
    return files


def _class_name(target: int, classes: int) -> str:
    names = ONLINE.meta["categories"]
    return f"class {target}: {names[target]}" if classes == len(names) else f"class {target}"


def _check_names(images: Sequence[Path]) -> None:
    names = [path.stem for path in images]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise VGGError(f"two images are called {twice}, and so would be their pictures. Rename one, or use two --out.")


def _check_layers(layers: Sequence[str]) -> None:
    with torch.device("meta"):
        known = [name for name, module in vgg16(weights=None).named_modules() if isinstance(module, nn.Conv2d)]
    wrong = [layer for layer in layers if layer not in known]
    if wrong or len(set(layers)) < len(layers) or len(layers) < 2:
        what = f"{wrong[0]} is none" if wrong else f"got {' '.join(layers)}"
        raise VGGError(f"--layers takes two or more different convolutions, but {what}. There are {', '.join(known)}.")


def _parser() -> Parser:
    parser = Parser(prog="vgg16_joint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="any file that PIL can read")
    parser.add_argument(
        "--weights", required=True, help=f"file with a state dict (.pth, .safetensors), {ONLINE.name} or none"
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        default=LAYERS,
        metavar="LAYER",
        help="two or more convolutions; the first picture is over the two nearest to the output, each further one "
        f"takes in one more (default: {' '.join(LAYERS)})",
    )
    parser.add_argument(
        "--channels", type=_positive, default=5, help="most relevant channels of each layer (default: %(default)s)"
    )
    parser.add_argument(
        "--marks",
        type=_marks,
        default=4,
        help="strongest combinations that get a heat map, at most 26 (default: %(default)s)",
    )
    parser.add_argument("--target", type=int, help="class to explain (default: the top prediction)")
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nrm-vgg16"),
        metavar="DIR",
        help="folder for the pictures (default: %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return value


def _marks(text: str) -> int:
    value = _positive(text)
    if value > 26:
        raise argparse.ArgumentTypeError(f"{text} marks are more than there are letters, 26")
    return value


if __name__ == "__main__":
    sys.exit(main())
