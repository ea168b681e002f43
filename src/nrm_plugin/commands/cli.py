"""The command ``nrm-plugin``: arguments in, words out. What is computed lies elsewhere."""

from __future__ import annotations

import argparse
import difflib
import io
import os
import re
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

from ..dataset.images import shown
from ..errors import NRMError
from .demo import DEFAULT, MISREAD, RULES, Report, Row, run
from .explain import add_explain, add_flow, add_layers
from .output_files import check_folder
from .references import add_from, add_references
from .sweep import add_sweep

COLUMNS = {
    "plain": f"sum of the relevance that Zennit hands to the layer, by its composite {RULES.__name__}",
    "ours": "mass of the walks that cross the layer, by the same composite, normalized",
    "sink": "mass that was absorbed above the layer",
    "bypass": "mass of the walks that go around the layer",
    "variation": "sum of |mass| over neurons and sink; above 1, neurons of opposite sign share the layer",
}

UNKNOWN = re.compile(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)")
EPILOG = """\
nrm-plugin COMMAND --help tells what each takes, with examples. To begin with: nrm-plugin demo"""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse alone prints the usage first."""

    def error(self, message: str) -> NoReturn:
        wrong = UNKNOWN.match(message)
        near = difflib.get_close_matches(wrong[1], re.findall(r"[a-z]+", wrong[2]), n=1) if wrong else []
        hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments; those of the process by default.

    Returns:
        0, or 2 where the command could not do what it was asked; then one line on stderr says why. 1 where it could
        for some pictures and not for others.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # names of files may hold what a terminal cannot show
    options = _parser().parse_args(argv)
    try:
        code: int | None = options.command(options)
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NRMError, OSError) as error:
        print(f"nrm-plugin {options.name}: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return code or 0


def _parser() -> Parser:
    parser = Parser(
        prog="nrm-plugin", description="The normalized relevance measure of neural networks.", epilog=EPILOG
    )
    parser.add_argument("--version", action="version", version=f"nrm-plugin {version('nrm-plugin')}")
    commands = parser.add_subparsers(dest="name", metavar="COMMAND", required=True)
    demo = commands.add_parser(
        "demo",
        help="explain held-out digits with an embedded network",
        description="Explains held-out handwritten digits with an embedded network: a table and pictures.",
    )
    demo.add_argument("--out", type=Path, default=Path("nrm-demo"), metavar="DIR",
                      help="folder for the pictures; made where it is missing (default: %(default)s)")  # fmt: skip
    demo.add_argument("--digits", nargs="+", type=_digit, default=DEFAULT, metavar="N",
                      help=f"0 to 9, or '{MISREAD}' for one that the network gets wrong; the one that the network is "
                      f"surest of is taken, and the next one when repeated (default: {' '.join(DEFAULT)})")  # fmt: skip
    demo.set_defaults(command=_demo)
    add_explain(commands)
    add_from(add_flow(commands))
    add_layers(commands)
    add_sweep(commands)
    add_references(commands)
    return parser


def _digit(text: str) -> str:
    if text == MISREAD or (text.isascii() and text.isdigit() and len(text) == 1):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither a digit from 0 to 9 nor '{MISREAD}'")


def _demo(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    check_folder(options.out)
    report = run(options.digits, options.out)
    for line in (*_table(report), "", *_legend(report.rows), "", *_where(report, options.out)):
        print(line)
    print(f"Took {time.perf_counter() - started:.1f} s.")


def _table(report: Report) -> list[str]:
    """One line for each layer, means over the digits."""
    count = len(report.samples)
    mean = f", mean over these {count} digits" if count > 1 else ""
    names = _columns(report.rows)
    lines = [
        f"A small VGG reads {report.accuracy:.1%} of the held-out digits rightly. Explained here:",
        *(f"  {sample}" for sample in report.samples),
        "",
        f"Relevance of each layer with {RULES.__name__}, output first{mean}",
        f"{'layer':14}" + "".join(f"{name:>11}" for name in names),
    ]
    for row in report.rows:
        lines.append(f"{row.layer:14}" + "".join(f"{_mean(row, name):11.3f}" for name in names))
    return lines


def _columns(rows: Sequence[Row]) -> list[str]:
    """Names of the columns; bypass only where there is any."""
    return [name for name in COLUMNS if name != "bypass" or any(bool(row.bypass.any()) for row in rows)]


def _mean(row: Row, name: str) -> float:
    # Adding zero turns a -0.0004 that is rounded to -0.000 into 0.000.
    return round(float(getattr(row, "mass" if name == "ours" else name).mean()), 3) + 0.0


def _legend(rows: Sequence[Row]) -> list[str]:
    names = _columns(rows)
    total = " + ".join(name for name in names if name in ("ours", "sink", "bypass"))
    return [*(f"{name:11}{COLUMNS[name]}" for name in names), f"{'':11}{total} = 1"]


def _where(report: Report, out: Path) -> list[str]:
    first = report.samples[0]
    files = [*report.files, *report.flow]
    pages = sum(path.suffix == ".html" for path in files)
    return [
        f"{len(files) - pages} pictures{' and a page' if pages else ''} are in {out}. Look at these first:",
        f"  {report.files[0]}",
        f"      which channels of two layers say {first.read}, and where they look",
        f"  {report.files[2]}",
        "      what each of the most relevant channels draws on",
        f"  {report.files[-1]}",
        "      how much relevance is left at each layer, here and in plain Zennit",
        *(f"  {path}" for path in report.flow[-1:]),
        *("      how relevance flows through the layers" for _ in report.flow[-1:]),
    ]


def _one_line(error: Exception) -> str:
    return shown(" ".join(str(error).split()))
