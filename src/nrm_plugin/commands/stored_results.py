"""Common functions of the commands that read a stored sweep."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from ..dataset.images import shown
from ..dataset.sweep_layout import ShardError
from .output_files import check_folder
from .resolved_options import one_line_warnings

ERROR = 1
"""Exit status of a command that is stopped by an error other than invalid options."""


def read_stored(options: argparse.Namespace, command: Callable[[argparse.Namespace], int]) -> int:
    """Runs a command that reads a sweep; damaged files have a different exit status than invalid options."""
    with one_line_warnings():
        check_folder(options.out)
        try:
            return command(options)
        except (ShardError, OSError) as error:
            print(f"nrm-plugin {options.name}: error: {shown(' '.join(str(error).split()))}", file=sys.stderr)
            return ERROR
