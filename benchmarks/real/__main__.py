"""Explains predictions of trained networks on photographs by many methods, and evaluates the explanations.

``python -m benchmarks.real`` downloads networks and photographs (about 330 MB, once), measures, and writes
``benchmarks/results/real.json`` and the tables of docs/real.md and docs/real-details.md. An interrupted run can be
resumed. ``--quick`` measures a few images of two networks, and writes the results into the cache.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

from benchmarks import tables

from . import packages
from .run import SIZES, run

ROOT = Path(__file__).parents[2]
QUICK_NETS = ("EfficientNet-Lite0", "Fashion-MNIST, VGG")
RESULTS = ROOT / "benchmarks/results/real.json"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--nets", nargs="+", choices=SIZES, default=list(SIZES), help="measure only these networks")
    parser.add_argument("--methods", nargs="+", help="measure only these methods")
    parser.add_argument("--quick", action="store_true", help="few images, in ten minutes")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    nets = QUICK_NETS if options.quick and options.nets == list(SIZES) else options.nets
    out = packages.cache() / "quick.json" if options.quick and options.out == RESULTS else options.out
    run(nets, out, options.quick, options.methods)
    if out == RESULTS:
        tables.write("real")


if __name__ == "__main__":
    main()
