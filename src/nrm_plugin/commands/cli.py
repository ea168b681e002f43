"""The command ``nrm-plugin``, with a table of its commands. The module of a command is imported when it is run.

Neither this module nor the arguments of a command import torch, so that ``--help`` and ``--version`` are fast.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from ..errors import NRMError
from ..version import __version__

COMMANDS = {
    "demo": "explain held-out digits with an embedded network",
    "explain": "explain images with a torchvision classifier or your own model",
    "flow": "plot how relevance flows through several layers",
    "layers": "list the layers of a model, for --layer and --given",
    "sweep": "query every image of a folder or a data set and store the results",
    "references": "list the images of a sweep in which a channel has the most relevance",
}
"""One line of help for each command. The module of the same name in this package has its ``DESCRIPTION``, its
``EXAMPLES``, ``add_arguments(parser)`` and ``run(options)``, which returns the exit status."""

EPILOG = "nrm-plugin COMMAND --help describes the options of a command, with examples. Start with: nrm-plugin demo"
UNKNOWN = re.compile(r"argument COMMAND: invalid choice: '(.*)' \(")


class Parser(argparse.ArgumentParser):
    """A parser that reports errors in one line, without the usage, and adds a command's arguments when it is chosen."""

    def __init__(self, command: str = "", **arguments: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **arguments)
        self._command = command

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Adds the arguments of the command and parses; called by the parser of all commands."""
        if self._command:
            module: Any = importlib.import_module(f".{self._command}", __package__)
            self.description, self.epilog, self._command = module.DESCRIPTION, module.EXAMPLES, ""
            module.add_arguments(self)
            self.set_defaults(run=module.run)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        unknown = UNKNOWN.match(message)
        near = difflib.get_close_matches(unknown[1], COMMANDS, n=1) if unknown else []
        hint = f"; did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (see {self.prog} --help)\n")


def parser() -> Parser:
    """Returns the parser of all commands."""
    root = Parser(prog="nrm-plugin", description="The normalized relevance measure of neural networks.", epilog=EPILOG)
    root.add_argument("--version", action="version", version=f"nrm-plugin {__version__}")
    commands = root.add_subparsers(dest="name", metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, command=name)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: The arguments; by default the arguments of the process.

    Returns:
        The exit status: 0; 1 if only some images could be explained; 2 if the options do not allow the command to run,
        with the reason in one line on stderr; 130 after an interrupt.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # file names may contain characters that a terminal cannot encode
    options = parser().parse_args(argv)
    try:
        status: int = options.run(options)
    except BrokenPipeError:  # the reader of the pipe, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (NRMError, OSError) as error:
        from ..dataset.images import shown

        print(f"nrm-plugin {options.name}: error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status
