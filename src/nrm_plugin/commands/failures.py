"""Error messages of the commands: one line on stderr that ``--quiet`` does not suppress. Does not import torch."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TextIO

from ..errors import NRMError, is_out_of_memory, printable

FAILED, INTERRUPTED = 1, 130
"""Exit statuses after an error other than invalid options and after an interrupt."""
ARGUMENTS = ("target", "against", "reference", "position", "composite", "residual", "gain_limit", "device")
"""Python arguments that correspond to an option of the same name."""
LOWER = {"batch_size": "--batch-size", "workers": "--workers", "size": "--size", "channels": "--channels",
         "patches": "--patches", "top": "--top", "rows": "--rows", "k": "--k"}  # fmt: skip
"""Options that save memory when reduced, keyed by attribute."""

_quieted: list[TextIO] = []


@contextlib.contextmanager
def quiet(is_quiet: bool) -> Iterator[None]:
    """Context manager that suppresses all output to stdout and stderr except through :func:`errors`."""
    if not is_quiet:
        yield
        return
    _quieted.append(sys.stderr)
    try:
        with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
            yield
    finally:
        _quieted.pop()


def errors() -> TextIO:
    """Returns the error stream. ``--quiet`` does not suppress it."""
    return _quieted[-1] if _quieted else sys.stderr


def line(error: BaseException, options: argparse.Namespace) -> str:
    """Formats an error as a one-line message."""
    text = _with_options(" ".join(str(error).split()), options)
    if is_out_of_memory(error):
        lower = [option for name, option in LOWER.items() if getattr(options, name, None)]
        text = f"out of memory: {text[:300] or type(error).__name__}. Lower {' or '.join(lower) or 'the input size'}."
    elif not isinstance(error, (NRMError, OSError)):
        text = f"unexpected {type(error).__name__}: {text[:300]} (--debug prints the traceback)"
    return f"nrm-plugin {options.name}: error: {printable(text)}"


def _with_options(text: str, options: argparse.Namespace) -> str:
    """Rewrites Python arguments in a message, such as ``gain_limit=3``, as command-line options."""
    for name in filter(options.__contains__, ARGUMENTS):
        option = f"--{name.replace('_', '-')}"
        text = re.sub(rf"\b{name}=(?=[^\s.,:;])", f"{option} ", text)
        text = re.sub(rf"\b{name}=", option, text)
    return text


@contextlib.contextmanager
def remembered_interrupts() -> Iterator[list[int]]:
    """Context manager that records interrupts. Interrupting an import can raise an unrelated error."""
    seen: list[int] = []

    def interrupt(number: int, _: object) -> None:
        seen.append(number)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield seen
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
