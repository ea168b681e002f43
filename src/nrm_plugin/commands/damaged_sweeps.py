"""Exit status of commands that read a stored sweep with possibly damaged files."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from ..dataset.sweep_layout import ShardError
from .failures import FAILED, errors, line
from .output_files import check_folder
from .resolved_options import one_line_warnings


def read_stored(options: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """Runs a command that reads a sweep. Returns :data:`FAILED` if a file is damaged."""
    with one_line_warnings():
        check_folder(options.out)
        try:
            return command(options)
        except (ShardError, OSError) as error:
            print(line(error, options), file=errors())
            return FAILED
