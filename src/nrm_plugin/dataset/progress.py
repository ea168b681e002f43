"""Progress bar of a sweep, which also shows memory usage."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tqdm import tqdm

STATM = Path("/proc/self/statm")


class Progress(tqdm):  # type: ignore[type-arg, unused-ignore]
    """A progress bar over samples that also shows the memory of the process and of the accelerator.

    Args:
        total: Number of samples, or None if unknown.
        done: Number of stored samples.
        is_shown: Whether the bar is shown.
        what: Description of the activity, if it is not the evaluation of samples.
    """

    def __init__(self, total: int | None, done: int, is_shown: bool, what: str | None = None) -> None:
        super().__init__(desc=what, total=total, initial=done, unit="sample", disable=not is_shown, dynamic_ncols=True)

    def update(self, n: float | None = 1) -> bool | None:
        """Adds samples and refreshes the memory."""
        if not self.disable:
            self.set_postfix_str(f"memory {memory()}", refresh=False)
        is_refreshed: bool | None = super().update(n)
        return is_refreshed


def resident() -> int | None:
    """Returns the memory of this process in bytes, or its peak if the system does not report the current value.

    The result is None on systems without the module ``resource``, such as Windows.
    """
    try:
        import resource
    except ImportError:
        return None
    if STATM.exists():
        return int(STATM.read_text().split()[1]) * resource.getpagesize()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory() -> str:
    """Returns the memory of this process, and of a used accelerator, as text."""
    held = resident()
    text = "unknown" if held is None else f"{held / 2**30:.1f} GiB"
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


__all__ = ["Progress", "memory", "resident"]
