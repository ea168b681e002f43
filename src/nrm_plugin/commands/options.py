"""Options shared by several commands and parsers for their values. This module does not import torch."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

CHANNELS = 7
"""Default number of channels per layer that ``explain`` plots."""
AUTO, PIXELS, LAYER_CELLS = "auto", "pixels", "layer"
"""Resolutions of heat maps: automatic (see :data:`MOST_CELLS`), single pixels, or the positions of the layer."""
MOST_CELLS = 56
"""Default number of cells of a heat map along each side, about as many as the eye resolves in a figure."""
BOTH, OF_LAYERS, OF_PIXELS = "both", "layers", "pixels"
"""Choices of ``--map``: both heat maps, only the coarse one of late layers, or only the pixel-wise one."""
DEFAULT_RULES = "nrm_default"
NO_REFERENCE = "none"
"""Value of ``--reference`` that explains outputs without a reference."""
MISCLASSIFIED = "misread"
"""Name of misclassified digits in the demo."""
PER_CHANNEL = ("--mean", "--std")
DOWNLOADED = "torchvision's default, downloaded once"


def add_model(parser: argparse.ArgumentParser, weights: str = DOWNLOADED, required: bool = True) -> None:
    """Adds options for the model and its preprocessing. ``weights`` describes the default weights."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=required, metavar="NAME",
                       help="a torchvision classifier such as vgg16; or your own as package.module:factory or "
                       "file.py:factory: a function without arguments that returns a module, or a module")  # fmt: skip
    group.add_argument("--weights", metavar="NAME|FILE|none",
                       help="name of torchvision weights, such as IMAGENET1K_V1 or DEFAULT; a file with a state dict "
                       f"(.pth, .pt, .safetensors); none: random weights (default: {weights}; your own model keeps "
                       "its weights)")  # fmt: skip
    group.add_argument("--classes", type=Path, metavar="FILE",
                       help="class names, one on each line (default: those of the weights)")  # fmt: skip
    group.add_argument("--size", type=whole_number(8192, "number of pixels"), metavar="PIXELS",
                       help="resize the shorter side to this and take the center square (default: as the weights "
                       "require; for your own model, resize to 256 and take the center 224)")  # fmt: skip
    group.add_argument("--mean", type=channel_values, metavar="R,G,B",
                       help="subtracted from pixel values in [0, 1]; a single number for a grayscale model (default: "
                       "as the weights require; for your own model, that of ImageNet)")  # fmt: skip
    group.add_argument("--std", type=channel_values, metavar="R,G,B",
                       help="divides the pixel values after the mean is subtracted")  # fmt: skip


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Adds the ``--fit`` option, which controls how non-square images are preprocessed."""
    parser.add_argument("--fit", choices=("crop", "pad", "squeeze"), default="crop",
                        help="what the model sees of an image that is not square: its center (crop), the whole image "
                        "with a margin in the mean color (pad), or the whole image stretched to a square (squeeze) "
                        "(default: %(default)s)")  # fmt: skip


def add_cells(parser: Any) -> None:
    """Adds the ``--cells`` option, which sets the resolution of heat maps."""
    parser.add_argument("--cells", type=cells, default=AUTO, metavar="N|pixels|layer",
                        help="draw sums over N × N cells, single pixels, or the cells of the layer of --layer; the "
                        f"numbers are the same (default: {MOST_CELLS}, and the cells of a layer)")  # fmt: skip


def add_reference(group: Any, default: str = NO_REFERENCE) -> None:
    """Adds the ``--reference`` option. ``default`` describes its default."""
    group.add_argument("--reference", metavar="blur|mean|black|white|#RRGGBB|FILE|none",
                       help="explain the difference from the blurred image, an image of its mean color, a black or a "
                       "white one, one of another color, or another image; none: no reference "
                       f"(default: {default})")  # fmt: skip


def add_map(group: Any) -> None:
    """Adds the ``--map`` option, which selects the heat maps."""
    group.add_argument("--map", choices=(BOTH, OF_LAYERS, OF_PIXELS), default=BOTH,
                       help="layers: a coarse map, the mean over late layers, of the difference from the blurred image "
                       "unless --reference or --composite is given; pixels: the fine-grained relevance of the pixels "
                       "(default: %(default)s)")  # fmt: skip


def add_target(group: Any) -> None:
    """Adds the ``--target`` option, which selects the explained class."""
    group.add_argument("--target", metavar="CLASS",
                       help="index or name of the class to explain (default: the predicted class)")  # fmt: skip


def add_against(group: Any, default: str) -> None:
    """Adds the ``--against`` option, which sets the contrast. ``default`` describes its default."""
    group.add_argument("--against", metavar="rest|none|CLASS",
                       help="explain the difference between the class and the other classes, weighted by their softmax "
                       "(rest), or one other class; none: the output of the class alone (default: "
                       f"{default})")  # fmt: skip


def add_composite(parser: Any, default: str | None = DEFAULT_RULES) -> None:
    """Adds the ``--composite`` option. If ``default`` is None, the default depends on the reference."""
    parser.add_argument("--composite", default=default, metavar="RULES",
                        help="name of a composite in Zennit's registry, such as nrm_absolute, epsilon_plus_flat or "
                        f"epsilon_gamma_box; an unknown name lists them all (default: {DEFAULT_RULES}"
                        f"{'' if default else '; with a reference, slopes instead of rules'})")  # fmt: skip


def add_computation(parser: argparse.ArgumentParser, rules: str | None = DEFAULT_RULES) -> None:
    """Adds options for the rules and the device."""
    group = parser.add_argument_group("computation")
    add_composite(group, rules)
    group.add_argument("--residual", choices=("redistribute", "sink"), default="redistribute",
                       help="relevance that a rule does not propagate is redistributed, up to the gain limit, or stays "
                       "in the sink of the layer, as in Zennit's rules (default: %(default)s)")  # fmt: skip
    group.add_argument("--gain-limit", type=gain_limit, metavar="G",
                       help="limit of this redistribution, as a factor: at least 1, or inf (default: 2)")  # fmt: skip
    group.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps, … (default: %(default)s)")


def add_out(parser: argparse.ArgumentParser, folder: str) -> None:
    """Adds the ``--out`` option, which sets the output folder. ``folder`` is the default."""
    parser.add_argument("--out", type=Path, default=Path(folder), metavar="DIR",
                        help="folder for the results; created if missing (default: %(default)s)")  # fmt: skip


# -- values ---------------------------------------------------------------------------------------------------------


def whole_number(most: int, what: str = "number", least: int = 1) -> Callable[[str], int]:
    """Returns an argparse type for integers from ``least`` to ``most``."""

    def number(text: str) -> int:
        if text.isascii() and text.isdecimal() and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is not a {what} from {least} to {most}")

    return number


def fraction(text: str) -> float:
    """Parses a fraction in (0, 1]."""
    value = _real(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fraction above 0 and up to 1, such as 0.9")
    return value


def groups(text: str) -> int | Path:
    """Parses a number of groups or the path of a group file."""
    return whole_number(40, least=2)(text) if text.isdecimal() else Path(text)


def inches(text: str) -> float:
    """Parses a figure width from 2 to 40 inches."""
    value = _real(text)
    if not 2 <= value <= 40:
        raise argparse.ArgumentTypeError(f"{text!r} is not a width from 2 to 40 inches, such as 3.3")
    return value


def cells(text: str) -> int | str:
    """Parses a heat-map resolution."""
    if text in (AUTO, PIXELS, LAYER_CELLS):
        return text
    if text.isascii() and text.isdecimal() and 1 <= int(text) <= 8192:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a number of cells, nor {PIXELS}, nor {LAYER_CELLS}")


def gain_limit(text: str) -> float:
    """Parses a gain limit, at least 1 and possibly infinite."""
    value = _real(text)
    if not value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def joined(words: Sequence[str]) -> list[str]:
    """Joins the space-separated numbers after ``--mean`` or ``--std`` into a single argument."""
    result: list[str] = []
    for word in words:
        name, _, values = (result[-1] if result else "").partition("=")
        if name in PER_CHANNEL and _numbers(word):
            result[-1] = f"{name}={','.join([*_numbers(values), *_numbers(word)])}"
        else:
            result.append(word)
    return result


def _numbers(text: str) -> list[str]:
    """Splits a text into numbers. Returns an empty list if any part is not a number."""
    parts = text.replace(",", " ").split()
    return parts if not any(math.isnan(_real(part)) for part in parts) else []


def channel_values(text: str) -> tuple[float, ...]:
    """Parses one value or three values for red, green and blue."""
    values = tuple(_real(part) for part in text.replace(",", " ").split())
    if len(values) not in (1, 3) or not all(math.isfinite(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r} is neither one number nor three, such as 0.5 or 0.485,0.456,0.406")
    return values


def _real(text: str) -> float:
    """Parses a number. Returns NaN, which fails every comparison, for any other text."""
    try:
        return float(text)
    except ValueError:
        return math.nan
