"""Explains predictions of trained networks on photographs by many methods, and evaluates the explanations.

``python -m benchmarks.real`` downloads networks and photographs (about 330 MB, once), measures, and writes
``benchmarks/results/real.json`` and the tables of docs/real.md and docs/real-details.md. An interrupted run can be
resumed. ``--quick`` measures a few images of two networks.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

from benchmarks import outputs

from .run import SIZES, run

QUICK_NETS = ("EfficientNet-Lite0", "Fashion-MNIST, VGG")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--nets", nargs="+", choices=SIZES, default=list(SIZES), help="measure only these networks")
    parser.add_argument("--methods", nargs="+", help="measure only these methods")
    parser.add_argument("--quick", action="store_true", help="few images of two networks")
    outputs.add_option(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    nets = QUICK_NETS if options.quick and options.nets == list(SIZES) else options.nets
    files = outputs.chosen(options)
    run(nets, files.results / "real.json", options.quick, options.methods)
    files.render("real")


if __name__ == "__main__":
    main()
