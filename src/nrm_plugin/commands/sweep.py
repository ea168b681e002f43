"""Arguments and entry point of ``nrm-plugin sweep``, which queries all images of a dataset."""

from __future__ import annotations

import argparse

from .options import add_against, add_computation, add_model, add_out, whole_number

DESCRIPTION = """\
Queries every image of a folder for the relevance of the channels of several layers and stores the results as Parquet.
Stored results are never lost: after an interruption, the same command continues where it stopped."""

EXAMPLES = """\
examples:
  nrm-plugin sweep photos --model vgg16 --layers features.28 features.21 --out swept
      relevance of the channels of two layers, for the predicted class of each image
  nrm-plugin sweep photos --model vgg16 --layers features.28 features.21 --joint --activations --heat-maps --out swept
      the same, and the relevance of all pairs of channels, the largest activations, and heat maps
  nrm-plugin sweep my_data.py:validation --model my_nets.py:make --layers conv5 --target label --batch-size 64
      your own dataset, or a function that returns it, of preprocessed inputs or (inputs, label)
  torchrun --nproc-per-node 4 --no-python nrm-plugin sweep photos --model vgg16 --layers features.28 --out swept
      four processes share the images

files
  manifest.json          queries, settings and progress
  samples.csv            the file of each sample, for a folder of images
  rows/, by-query/       the numbers as Parquet: in order of computation; sorted by query, group and value
  maps/                  with --heat-maps: safetensors
  locks/                 empty files that running processes lock

exit status: 0 complete; 1 stopped by an error; 2 nothing done because of the options; 3 complete except for skipped
samples, which are listed; 130 interrupted. In every case the stored results can be read."""

MANY = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``sweep``."""
    parser.add_argument("data", metavar="FOLDER|DATASET",
                        help="a folder of images, with one subfolder for each class if there are labels; or a dataset "
                        "or a function that returns one, as package.module:name or file.py:name")  # fmt: skip
    add_model(parser)
    query = parser.add_argument_group("query")
    query.add_argument("--layers", nargs="+", required=True, metavar="LAYER",
                       help="relevance of each channel, sink, bypass and variation of these layers")  # fmt: skip
    query.add_argument("--joint", action="store_true",
                       help="joint relevance of all pairs of channels of consecutive layers in --layers, which are "
                       "then listed from the output to the input")  # fmt: skip
    query.add_argument("--activations", action="store_true", help="the largest activation of each channel")
    query.add_argument("--heat-maps", action="store_true", help="a heat map of the input")
    query.add_argument("--event", action="append", default=[], metavar="EVENT", dest="events",
                       help="mass of an event, such as 'features.28[3,7]'; may be repeated")  # fmt: skip
    query.add_argument("--target", default="prediction", metavar="CLASS",
                       help="prediction, label, or the index or name of one class (default: %(default)s)")  # fmt: skip
    add_against(query, "none")
    add_computation(parser)
    add_execution(parser)
    add_out(parser, "nrm-swept")


def add_execution(parser: argparse.ArgumentParser) -> None:
    """Adds options for batching, data loading, failed samples and distributed execution."""
    group = parser.add_argument_group("execution")
    group.add_argument("--batch-size", type=whole_number(MANY), default=16, metavar="N",
                       help="images in a batch (default: %(default)s)")  # fmt: skip
    group.add_argument("--shard-size", type=whole_number(MANY), default=256, metavar="N",
                       help="images per file of results; a killed command loses at most one file (default: "
                       "%(default)s)")  # fmt: skip
    group.add_argument("--workers", type=whole_number(MANY, least=0), default=0, metavar="N",
                       help="processes that load images (default: %(default)s)")  # fmt: skip
    group.add_argument("--on-error", choices=("skip", "raise"), default="skip",
                       help="skip and list images that cannot be read, or stop (default: %(default)s)")  # fmt: skip
    group.add_argument("--retry-failed", action="store_true", help="retry images that were skipped before")
    group.add_argument("--engine", choices=("local", "ray"), default="local",
                       help="run here, or on a Ray cluster (default: %(default)s)")  # fmt: skip
    group.add_argument("--concurrency", type=whole_number(MANY), metavar="N",
                       help="Ray workers (default: one for each slot)")  # fmt: skip
    group.add_argument("--gpus", type=float, metavar="N", help="GPUs of each Ray worker (default: none)")


def run(options: argparse.Namespace) -> int:
    """Runs the sweep and returns the exit status."""
    from .sweep_run import sweep_data

    return sweep_data(options)
