"""Arguments and entry point of ``nrm-plugin explain``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from .options import (
    CHANNELS,
    add_against,
    add_cells,
    add_computation,
    add_fit,
    add_map,
    add_model,
    add_out,
    add_reference,
    add_target,
    whole_number,
)

if TYPE_CHECKING:
    from ..dataset.images import LoadedImage
    from .image_loop import Printed
    from .model_loading import LoadedModel
    from .request import Request

DESCRIPTION = """\
Shows which parts of an image are evidence for a class, with a torchvision classifier or your own model. The total
relevance is 1; red is positive evidence, blue is negative. A coarse heat map localizes the evidence by the relevance of
late layers; a second one shows the relevance of the pixels. Both explain the difference between the class and the other
classes, unless --against says otherwise."""

EXAMPLES = """\
examples:
  nrm-plugin explain cat.jpg --model vgg16
      the predicted class and its heat maps; the weights are downloaded once
  nrm-plugin explain *.jpg --model resnet50 --target "tiger cat" --out cats
      one class, by name or index, in many images
  nrm-plugin explain cat.jpg --model vgg16 --target tabby --against "tiger cat"
      what makes it one class rather than another; --against none explains the output of the class alone
  nrm-plugin explain cat.jpg --model resnet50 --map layers
      only the coarse heat map, which is faster; --map pixels: only the fine-grained one
  nrm-plugin explain cat.jpg --model vgg16 --weights vgg16-397923af.pth
      without a connection: a state dict or safetensors file; --weights none tries the command with random weights
  nrm-plugin layers --model vgg16
      layer names for the next two commands
  nrm-plugin explain cat.jpg --model vgg16 --layer features.28
      the most relevant channels of a layer, with a heat map for each
  nrm-plugin explain cat.jpg --model vgg16 --given "features.28[3,7]" --given "features.28[3] & ~features.21[40:50]"
      only the walks through channel 3 or 7 of a layer; & and, | or, ~ not
  nrm-plugin explain scan.png --model my_nets.py:make --weights mine.safetensors --size 128 --mean 0.5 --std 0.25
      your own model: a function without arguments that returns a module, here a grayscale model

files for each image NAME
  NAME-relevance.png           the preprocessed image and its heat maps
  NAME-relevance.safetensors   all numbers; model, weights, rules and versions are in the metadata
  NAME-LAYER.png, .csv         with --layer: heat maps of the most relevant channels, mass of every channel
  NAME-given.png               with --given: the conditional heat maps
Results of other settings or another image are never overwritten: the new files are named NAME-2-...

exit status: 0; 1 if some images could not be explained; 2 if none can be explained because of the options"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``explain``."""
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="PNG, JPEG, WebP, TIFF, GIF, …")
    add_model(parser)
    add_fit(parser)
    query = parser.add_argument_group("query")
    add_target(query)
    add_against(query, "rest, if there are several classes")
    add_reference(query, "the plain background of the image, if it has one and little relevance of pixels cancels")
    add_map(query)
    query.add_argument("--layer", action="append", default=[], metavar="LAYER", dest="layers",
                       help="list the most relevant channels of this layer; may be repeated")  # fmt: skip
    query.add_argument("--given", action="append", default=[], metavar="EVENT",
                       help="heat map of the walks through these neurons only, such as 'features.28[3,7]'; "
                       "may be repeated")  # fmt: skip
    query.add_argument("--channels", type=whole_number(64), default=CHANNELS, metavar="N",
                       help="number of channels of a layer to plot (default: %(default)s)")  # fmt: skip
    add_computation(parser, None)
    add_cells(parser)
    add_out(parser, "nrm-explained")


def run(options: argparse.Namespace) -> int:
    """Explains the images and returns the exit status."""
    from .image_loop import explain_each

    return explain_each(
        options, lambda loaded, image, request, out, taken: _explain(loaded, image, request, out, taken, options.cells)
    )


def _explain(
    loaded: LoadedModel, image: LoadedImage, request: Request, out: Path, taken: set[str], cells: int | str
) -> Printed:
    from ..errors import printable
    from . import messages
    from .explanation import explanation
    from .explanation_files import write
    from .image_loop import Printed

    result = explanation(loaded, image, request)
    files = write(loaded, result.request, result, out, taken, cells)
    problems = [
        f"{printable(image.path)}, --given {given.condition.text!r}: {given.problem}"
        for given in result.given
        if given.problem
    ]
    return Printed(list(messages.explained(loaded, result, files)), problems)
