"""Joint relevance of the channels of two and three convolutions of VGG16.

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
    """Raised for an image, weights or arguments that cannot be used."""


class Parser(argparse.ArgumentParser):
    """Reports errors in one line; argparse itself prints the usage first."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


@dataclass(frozen=True)
class InputImage:
    """An image as network input, ``(1, 3, 224, 224)``, and for display, ``(3, 224, 224)`` in [0, 1]."""

    tensor: Tensor
    shown: Tensor


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the figures; on failure, returns 2 and prints one line on stderr."""
    options = _parser().parse_args(argv)
    try:
        _check_layers(options.layers)
        _check_names(options.images)
        images = [load_image(path) for path in options.images]
        model = load_vgg16(options.weights, options.seed)
        options.out.mkdir(parents=True, exist_ok=True)
        for source, image in zip(options.images, images, strict=True):
            for path in draw(model, image, source.stem, options):
                print(path, flush=True)
    except (NRMError, OSError) as error:
        print(f"vgg16_joint: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


# -- the image ------------------------------------------------------------------------------------------------------


def load_image(path: Path) -> InputImage:
    """Returns an image file in the form that torchvision's VGG16 was trained on: resized, cropped, normalized.

    Raises:
        VGGError: The file does not exist, is not an image, or is damaged.
    """
    try:
        with Image.open(path) as file:
            image = _colors(ImageOps.exif_transpose(file))
    except FileNotFoundError as error:
        raise VGGError(f"image {path} does not exist.") from error
    # The error that PIL raises for a damaged file depends on its format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise VGGError(
            f"cannot read {path} as an image: {error}. Pass a file that PIL can read, such as PNG or JPEG."
        ) from error
    transform = ONLINE.transforms()
    tensor = transform(image)[None]
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (transform.mean, transform.std))
    return InputImage(tensor, tensor[0] * std + mean)


def _colors(image: Image.Image) -> Image.Image:
    if image.mode == "I" or image.mode.startswith("I;16"):
        # 16-bit grayscale: PIL would clip at 255.
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


# -- the network ----------------------------------------------------------------------------------------------------


def load_vgg16(weights: str, seed: int = 0) -> nn.Module:
    """Returns torchvision's VGG16 in evaluation mode.

    Args:
        weights: ``"none"`` for random weights, ``"IMAGENET1K_V1"`` to download torchvision's, or a state-dict file.
        seed: Seed of random weights.

    Raises:
        VGGError: The weights are not available, or do not belong to a VGG16.
    """
    if weights == "none":
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            return _plain(vgg16(weights=None))
    state = _online() if weights == ONLINE.name else _from_file(Path(weights))
    last = state.get("classifier.6.bias")
    # Built without storage, to avoid initializing 138 million weights that are overwritten.
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
        with contextlib.redirect_stdout(sys.stderr):  # stdout is reserved for the figure paths
            state: Mapping[str, Tensor] = ONLINE.get_state_dict(progress=True, check_hash=True)
        return state
    except (OSError, RuntimeError) as error:  # no connection, no space, or a hash mismatch
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise VGGError(
            f"the weights {ONLINE.name} are not in {folder} and could not be downloaded ({error}). "
            f"Download {ONLINE.url} on a connected machine, and pass the file: --weights FILE."
        ) from error


def _from_file(path: Path) -> Mapping[str, Tensor]:
    if not path.is_file():
        raise VGGError(f"file {path} does not exist. --weights takes a file with a state dict, {ONLINE.name} or none.")
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise VGGError(
            f"cannot read weights from {path}: {_first_lines(error)}. Pass a state dict saved by torch.save "
            "(.pth) or a .safetensors file."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VGGError(f"{path} does not contain a state dict. Save one: torch.save(model.state_dict(), 'vgg16.pth').")
    return state


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else f"{text[:240].rstrip()} …"


# -- the figures ----------------------------------------------------------------------------------------------------


def draw(model: nn.Module, image: InputImage, name: str, options: argparse.Namespace) -> list[Path]:
    """Draws one figure of the upper two layers, and one more for each further layer.

    Raises:
        VGGError: The target is not a class of the network.
    """
    with torch.no_grad():
        scores = model(image.tensor)[0].softmax(0)
    target = int(scores.argmax()) if options.target is None else options.target
    if not 0 <= target < len(scores):
        raise VGGError(
            f"--target {target} is not a class of this network, which has {len(scores)} (0 to {len(scores) - 1})."
        )
    mu = RelevanceMeasure(model, image.tensor, target)
    origin = "random weights, " if options.weights == "none" else ""
    heading = f"VGG16, {origin}{_class_name(target, len(scores))} ({float(scores[target]):.2g})"
    layers = sorted(options.layers, key=mu.layers.index, reverse=True)
    pixels = mu.marginal("input")[0].sum(0)
    files = []
    for count in range(2, len(layers) + 1):
        joint = joint_relevance(mu, layers[:count], options.channels)
        figure = joint_figure(mu, image.shown, pixels, joint, options.marks, heading)
        files.append(save(figure, options.out / f"{name}-{count}-layers.png"))
    return files


def _class_name(target: int, classes: int) -> str:
    names = ONLINE.meta["categories"]
    return f"class {target}: {names[target]}" if classes == len(names) else f"class {target}"


def _check_names(images: Sequence[Path]) -> None:
    names = [path.stem for path in images]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate is not None:
        raise VGGError(
            f"two images are named {duplicate}, and their figures would collide. Rename one, or use two --out."
        )


def _check_layers(layers: Sequence[str]) -> None:
    with torch.device("meta"):
        known = [name for name, module in vgg16(weights=None).named_modules() if isinstance(module, nn.Conv2d)]
    wrong = [layer for layer in layers if layer not in known]
    if wrong or len(set(layers)) < len(layers) or len(layers) < 2:
        problem = f"{wrong[0]} is not one" if wrong else f"got {' '.join(layers)}"
        raise VGGError(
            f"--layers takes two or more different convolutions, but {problem}. Available: {', '.join(known)}."
        )


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
        help="two or more convolutions; the first figure covers the two closest to the output, each further one "
        f"adds a layer (default: {' '.join(LAYERS)})",
    )
    parser.add_argument(
        "--channels", type=_positive, default=5, help="most relevant channels of each layer (default: %(default)s)"
    )
    parser.add_argument(
        "--marks",
        type=_marks,
        default=4,
        help="strongest combinations with a heat map, at most 26 (default: %(default)s)",
    )
    parser.add_argument("--target", type=int, help="class to explain (default: the top prediction)")
    parser.add_argument("--seed", type=int, default=0, help="seed of random weights (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("nrm-vgg16"),
        metavar="DIR",
        help="folder for the figures (default: %(default)s)",
    )
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return value


def _marks(text: str) -> int:
    value = _positive(text)
    if value > 26:
        raise argparse.ArgumentTypeError(f"{text} marks exceed the number of letters, 26")
    return value


if __name__ == "__main__":
    sys.exit(main())
