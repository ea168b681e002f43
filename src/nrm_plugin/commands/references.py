"""Arguments and entry point of ``nrm-plugin references``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_computation, add_model, add_out, whole_number

MOST_IMAGES = 16
"""Maximum number of rows and columns in a figure, equal to :data:`nrm_plugin.dataset.reference_plots.MOST`."""

DESCRIPTION = """\
Lists the images of a sweep in which each channel has the most relevance, to show what the channel represents. With
--model and --data, also plots these images, cropped to the receptive field of the channel."""

EXAMPLES = """\
examples:
  nrm-plugin references swept --query features.28
      the 8 most relevant channels, with the 9 images in which each has the most relevance; needs no model
  nrm-plugin references swept --query features.28 --groups 5 7 --target 281 --k 4 --by activation
      the 4 images of class 281 that activate two channels most; for a sweep with --activations
  nrm-plugin references swept --query features.28 --model vgg16 --data photos
      also a figure: one row for each channel, its references cropped to the receptive field

files for the layer or query NAME
  NAME-references.json   the references, with all settings
  NAME-references.png    with --model and --data: the figure
Results of another query are never overwritten: the new files are named NAME-2-...

exit status: 0; 1 stopped by an error, such as a damaged file; 2 nothing done because of the options"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``references``."""
    parser.add_argument("sweep", type=Path, metavar="SWEEP", help="folder of nrm-plugin sweep")
    query = parser.add_argument_group("query")
    query.add_argument("--query", required=True, metavar="LAYER|QUERY",
                       help="a layer of the sweep, or one of its queries by name")  # fmt: skip
    query.add_argument("--by", choices=("relevance", "activation"), default="relevance",
                       help="criterion by which images are ranked (default: %(default)s)")  # fmt: skip
    query.add_argument("--groups", nargs="+", type=whole_number(2**31, "channel", least=0), metavar="N",
                       help="channels (default: those whose references have the largest mean)")  # fmt: skip
    query.add_argument("--rows", type=whole_number(MOST_IMAGES), default=8, metavar="N",
                       help="number of channels, without --groups (default: %(default)s)")  # fmt: skip
    query.add_argument("--k", type=whole_number(MOST_IMAGES), default=9, metavar="N",
                       help="images of each channel (default: %(default)s)")  # fmt: skip
    query.add_argument("--target", metavar="CLASS",
                       help="only images for which this class was explained; a name requires --model")  # fmt: skip
    figure = parser.add_argument_group("figure")
    figure.add_argument("--data", metavar="FOLDER|DATASET", help="the data of the sweep")
    figure.add_argument("--style", choices=("mask", "plain", "heat", "both"), default="mask",
                        help="mask pixels without relevance, or show heat maps (default: %(default)s)")  # fmt: skip
    figure.add_argument("--whole", action="store_true",
                        help="whole images instead of crops to the receptive field: faster")  # fmt: skip
    figure.add_argument("--dark", action="store_true", help="for a dark background")
    add_model(parser, required=False)
    add_computation(parser)
    add_out(parser, "nrm-references")


def run(options: argparse.Namespace) -> int:
    """Lists reference examples and returns the exit status."""
    from .damaged_sweeps import read_stored
    from .reference_files import print_references

    return read_stored(options, print_references)
