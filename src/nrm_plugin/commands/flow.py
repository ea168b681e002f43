"""Arguments and entry point of ``nrm-plugin flow`` for images or, with ``--from``, the mean over a stored sweep."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import (
    add_against,
    add_computation,
    add_fit,
    add_model,
    add_out,
    add_reference,
    add_target,
    fraction,
    groups,
    inches,
    whole_number,
)

MOST_CHANNELS = 40
"""Maximum number of channels per layer in a figure, equal to :data:`nrm_plugin.plots.flow_columns.MAX_GROUPS`."""

DESCRIPTION = """\
Plots the joint relevance of the channels of several layers as a flow from the pixels to the class, compared with the
other classes unless --against says otherwise. Channels that are not shown are merged, so each layer accounts for all of
the relevance, 100%."""

EXAMPLES = """\
examples:
  nrm-plugin flow cat.jpg --model vgg16 --layers input features.14 features.28 output
      the patches, the 8 most relevant channels of two layers, and the class
  nrm-plugin flow cat.jpg --model resnet50 --layers input layer3 layer4 --coverage 0.5 --top 20 --dark
      the fewest channels of each layer that hold half of its relevance, at most 20; for a dark background
  nrm-plugin flow cat.jpg --model vgg16 --layers input features.21 features.28 output --groups 6
      all relevance in six groups of channels of each layer, and six parts of the image
  nrm-plugin flow cat.jpg --model vgg16 --layers input features.28 output --target tabby --minus "tiger cat"
      where the flows of two classes differ; an image in place of the class compares two images
  nrm-plugin layers --model vgg16
      layer names

files for each image NAME
  NAME-flow.png      the flow, or .svg or .pdf
  NAME-flow.html     an interactive page in one file that needs no network
  NAME-flow.json     the numbers, with all settings; FlowGraph.from_json reads them
  NAME-layers.png    mass, sink and bypass of each layer, compared with plain LRP, if a layer loses relevance
  NAME-groups.safetensors  the groups, if --groups found them, for --groups of other images
with --minus, NAME-difference.png, .html and .json
Results of other settings or another image are never overwritten: the new files are named NAME-2-...

exit status: 0; 1 if some images could not be explained; 2 if none can be explained because of the options"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``flow``."""
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="an image, as for explain")
    add_model(parser, required=False)
    add_fit(parser)
    query = parser.add_argument_group("query")
    query.add_argument("--layers", nargs="+", required=True, metavar="LAYER",
                       help="layers in any order, each above or below the others; the input is divided into patches, "
                       "and the output shows the class")  # fmt: skip
    add_target(query)
    add_against(query, "rest, if there are several classes")
    add_reference(query)
    query.add_argument("--top", type=whole_number(MOST_CHANNELS), default=8, metavar="N",
                       help="maximum number of channels of a layer (default: %(default)s)")  # fmt: skip
    query.add_argument("--coverage", type=fraction, metavar="FRACTION",
                       help="show only the fewest channels of each layer that hold this fraction of its relevance, "
                       "such as 0.9 (default: no such limit)")  # fmt: skip
    query.add_argument("--groups", type=groups, metavar="N|FILE",
                       help="divide the channels of each layer, and the image, into at most N groups that keep most of "
                       "the dependence between layers; or apply the file of groups of an earlier flow")  # fmt: skip
    query.add_argument("--patches", type=whole_number(64), default=4, metavar="N",
                       help="patches of the image along each side (default: %(default)s)")  # fmt: skip
    add_computation(parser, None)
    sweep = parser.add_argument_group("mean flow over a dataset, instead of images")
    sweep.add_argument("--from", type=Path, metavar="SWEEP", dest="sweep",
                       help="folder of nrm-plugin sweep --joint with these --layers; needs no model")  # fmt: skip
    parser.add_argument("--minus", metavar="CLASS|IMAGE",
                        help="subtract the flow of another class, or that of the same class in another image; with "
                        "--from, the mean flow of another class")  # fmt: skip
    figure = parser.add_argument_group("figure")
    figure.add_argument("--width", type=inches, metavar="INCHES",
                        help="width of the figure, such as 3.3 for a paper's column (default: from 7.2)")  # fmt: skip
    figure.add_argument("--format", choices=("png", "svg", "pdf"), default="png", dest="kind",
                        help="file type of the figure (default: %(default)s)")  # fmt: skip
    figure.add_argument("--dark", action="store_true", help="figures for a dark background")
    add_out(parser, "nrm-flow")


def run(options: argparse.Namespace) -> int:
    """Plots the flow of images or of a sweep and returns the exit status."""
    from .damaged_sweeps import read_stored
    from .sweep_flow import print_mean_flow

    return _of_images(options) if options.sweep is None else read_stored(options, print_mean_flow)


def _of_images(options: argparse.Namespace) -> int:
    from .flow_difference import explain_difference
    from .flow_groups import FlowOptions
    from .image_flow import explain_flow
    from .image_loop import explain_each
    from .request import RequestError

    missing = [name for name, value in (("IMAGE", options.images), ("--model", options.model)) if not value]
    if missing:
        raise RequestError(f"the following arguments are required: {', '.join(missing)}")
    what = FlowOptions(
        options.top, options.coverage, options.patches, options.dark, options.width, options.kind, options.groups,
        options.minus,
    )  # fmt: skip
    explain = explain_flow if options.minus is None else explain_difference
    return explain_each(options, lambda loaded, image, request, *files: explain(loaded, image, request, what, *files))
