"""The command ``nrm-plugin`` and its subcommands. The module of a subcommand is imported only to run it.

To keep ``--help`` and ``--version`` fast, neither this module nor the argument parsers import torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import itertools
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import NRMError, is_out_of_memory
from .failures import FAILED, INTERRUPTED, line, quiet, remembered_interrupts
from .options import joined

COMMANDS = {
    "demo": "explain held-out digits with a bundled network",
    "explain": "explain images with a torchvision classifier or your own model",
    "explain-text": "explain texts with a Hugging Face Transformers model",
    "flow": "plot how relevance flows through several layers",
    "layers": "list the layers of a model, for --layer and --given",
    "sweep": "query every image of a folder or a dataset and store the results",
    "references": "list the images of a sweep in which a channel has the most relevance",
}
"""Summary of each command for ``--help``.

Each command is a module of the same name in this package, with ``_`` for ``-``, that defines ``DESCRIPTION``,
``EXAMPLES``, ``add_arguments(parser)`` and ``run(options)``, which returns the exit status.
"""

EPILOG = "nrm-plugin COMMAND --help describes the options of a command, with examples. Start with: nrm-plugin demo"
UNKNOWN = re.compile(r"argument COMMAND: invalid choice: '(.*)' \(")


class Help(argparse.HelpFormatter):
    """Help formatter that wraps prose to the width of the terminal and leaves command lines unbroken."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        lines: list[str] = []
        for kind, group in itertools.groupby(text.splitlines(), _indentation):
            if kind is None:
                lines += group
                continue
            for paragraph in [" ".join(group)] if not kind else group:
                lines += textwrap.wrap(paragraph, width, subsequent_indent=kind, break_on_hyphens=False)
        return "".join(f"{indent}{line}\n" for line in lines)


def _indentation(line: str) -> str | None:
    """Returns the indentation of a line's continuation, or None for an empty line or a command."""
    own = line[: len(line) - len(line.lstrip())]
    is_command = bool(own) and line.lstrip().startswith(("nrm-plugin", "torchrun"))
    is_kept = not line.strip() or is_command or line.endswith(":")
    aligned = re.match(r"\s+\S+(, \S+)*\s{2,}", line)
    return None if is_kept else " " * len(aligned[0]) if aligned else own


class Parser(argparse.ArgumentParser):
    """Argument parser that prints errors on a single line and imports the selected subcommand while parsing."""

    def __init__(self, command: str = "", **arguments: Any) -> None:
        super().__init__(formatter_class=Help, **arguments)
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Adds the arguments of the selected subcommand before parsing."""
        if self._command:
            module: Any = importlib.import_module(f".{self._command.replace('-', '_')}", __package__)
            self.description, self.epilog, self._command = module.DESCRIPTION, module.EXAMPLES, ""
            module.add_arguments(self)
            self.set_defaults(run=module.run)
            self.add_argument("--quiet", action="store_true",
                              help="print only errors; no results, warnings or progress")  # fmt: skip
            self.add_argument("--debug", action="store_true", help="print the traceback of an error")
            args = joined(args)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = UNKNOWN.match(message)
        near = difflib.get_close_matches(unknown[1], COMMANDS, n=1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")


def parser() -> Parser:
    """Builds the parser for ``nrm-plugin`` with all subcommands."""
    root = Parser(prog="nrm-plugin", description="The normalized relevance measure of neural networks.", epilog=EPILOG)
    version = importlib.import_module("nrm_plugin").__version__
    root.add_argument("--version", action="version", version=f"nrm-plugin {version}")
    commands = root.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, command=name)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        argv: Command-line arguments. Defaults to ``sys.argv[1:]``.

    Returns:
        The exit status: 0 on success; 1 if an image could not be explained or if an error stopped the command; 2 if the
        options are invalid, with a one-line reason on stderr; 130 after an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # file names may contain characters that a terminal cannot encode
    with remembered_interrupts() as interrupts:
        options = argparse.Namespace(debug=False)
        try:
            parser().parse_args(argv, options)
            with quiet(options.quiet):
                return _status(options)
        except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except (Exception, KeyboardInterrupt) as error:
            return _ended(error, options, bool(interrupts))


def _status(options: argparse.Namespace) -> int:
    try:
        status: int = options.run(options)
        return status
    except SystemExit as error:  # raised by the user's model or data, since parsing has finished
        raise RuntimeError(f"sys.exit({error.code!r}) was called") from error


def _ended(error: BaseException, options: argparse.Namespace, is_interrupted: bool) -> int:
    """Prints why a command stopped and returns its exit status."""
    if options.debug:
        traceback.print_exception(error, file=sys.stderr)
    if is_interrupted or isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    print(line(error, options), file=sys.stderr)
    is_of_options = isinstance(error, (NRMError, OSError)) and not is_out_of_memory(error)
    return 2 if is_of_options and type(error).__name__ != "OutputError" else FAILED
