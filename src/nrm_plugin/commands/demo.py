"""Arguments and entry point of ``nrm-plugin demo``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .options import MISCLASSIFIED, add_out

if TYPE_CHECKING:
    from .demo_report import Report
    from .demo_values import Row

DIGITS = ("6", "3", "9", MISCLASSIFIED)

DESCRIPTION = """\
Explains held-out handwritten digits with a bundled network: a table of the relevance of each layer, and figures.
With --real, explains a photograph with EfficientNet-Lite0, whose weights (18 MB) are downloaded once."""

EXAMPLES = """\
examples:
  nrm-plugin demo
  nrm-plugin demo --digits 8 8 3 --out digits
  nrm-plugin demo --real
  nrm-plugin demo --real dog.jpg --out dog"""

COLUMNS = {
    "plain": "sum of the relevance at the layer by the plain composite {composite} of Zennit",
    "mass": "mass of the walks that cross the layer, by the same composite, normalized",
    "sink": "mass that was absorbed above the layer",
    "bypass": "mass of the walks that bypass the layer",
    "variation": "sum of |mass| over neurons and sink; above 1 if neurons of opposite sign share the layer",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of ``demo``."""
    parser.add_argument("--digits", nargs="+", type=_digit, default=DIGITS, metavar="N",
                        help=f"0 to 9, or '{MISCLASSIFIED}' for a misclassified digit; selects the most confidently "
                        "predicted digit of a kind and, if the kind is repeated, the next one (default: "
                        f"{' '.join(DIGITS)})")  # fmt: skip
    parser.add_argument("--against", choices=("rest", "none"), default="rest",
                        help="the figures explain the difference between the predicted digit and the others (rest), "
                        "or its output alone (default: %(default)s)")  # fmt: skip
    parser.add_argument("--real", nargs="?", const=True, default=False, type=Path, metavar="IMAGE",
                        help="explain a photograph instead (by default, one of a cat)")  # fmt: skip
    add_out(parser, "nrm-demo")


def _digit(text: str) -> str:
    if text == MISCLASSIFIED or (text.isascii() and text.isdigit() and len(text) == 1):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither a digit from 0 to 9 nor '{MISCLASSIFIED}'")


def run(options: argparse.Namespace) -> int:
    """Explains digits or a photograph and returns the exit status."""
    started = time.perf_counter()
    from .output_files import check_folder

    check_folder(options.out)
    if options.real:
        from .demo_photo import explain_photo

        return explain_photo(None if options.real is True else options.real, options.out)
    from .demo_report import demo_report

    report = demo_report(options.digits, options.out, options.against)
    for line in (*_table(report), "", *_legend(report), "", *_files(report, options.out)):
        print(line)
    print(f"Took {time.perf_counter() - started:.1f} s.")
    return 0


def _table(report: Report) -> Iterator[str]:
    """Yields the lines of the table: one per layer, averaged over the digits."""
    count = len(report.samples)
    mean = f", mean over these {count} digits" if count > 1 else ""
    names = _columns(report.rows)
    yield f"A small VGG classifies {report.accuracy:.1%} of the held-out digits correctly. Explained here:"
    yield from (f"  {sample}" for sample in report.samples)
    yield ""
    yield f"Relevance of each layer for the output of the digit with {report.composite}, output first{mean}"
    yield f"{'layer':14}" + "".join(f"{name:>11}" for name in names)
    for row in report.rows:
        yield f"{row.layer:14}" + "".join(f"{_mean(row, name):11.3f}" for name in names)


def _columns(rows: Sequence[Row]) -> list[str]:
    """Returns the names of the columns, including ``bypass`` only if it is nonzero."""
    return [name for name in COLUMNS if name != "bypass" or any(bool(row.bypass.any()) for row in rows)]


def _mean(row: Row, name: str) -> float:
    # Adding zero turns a -0.0004 that is rounded to -0.000 into 0.000.
    return round(float(getattr(row, name).mean()), 3) + 0.0


def _legend(report: Report) -> Iterator[str]:
    names = _columns(report.rows)
    total = " + ".join(name for name in names if name in ("mass", "sink", "bypass"))
    yield from (f"{name:11}{COLUMNS[name].format(composite=report.composite)}" for name in names)
    yield f"{'':11}{total} = 1"


def _files(report: Report, out: Path) -> Iterator[str]:
    first = report.samples[0]
    files = [*report.figures, *report.flow]
    pages = sum(path.suffix == ".html" for path in files)
    explained = "the output of a digit alone" if report.against == "none" else "a digit rather than the other digits"
    yield f"{len(files) - pages} figures{' and a page' if pages else ''} are in {out}, of {explained}. Start with:"
    for path, content in (
        (report.figures[0], f"the pairs of channels with the largest joint relevance for {first.predicted}"),
        (report.figures[2], "heat maps of the most relevant channels"),
        (report.figures[-1], "relevance of each layer, here and in plain Zennit"),
        (report.flow[-1], "flow of relevance through the layers"),
    ):
        yield f"  {path}"
        yield f"      {content}"
