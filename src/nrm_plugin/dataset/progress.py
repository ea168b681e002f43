"""Progress bar of a sweep, which also shows memory usage."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tqdm import tqdm

STATM = Path("/proc/self/statm")


class Progress(tqdm):  # type: ignore[type-arg, unused-ignore]
    """Progress bar over samples that shows the memory usage of the process and the GPU.

    Args:
        total: Number of samples, or None if unknown.
        done: Number of samples already stored.
        is_shown: Whether to show the progress bar.
        what: Description of the activity, or None for the evaluation of samples.
    """

    def __init__(self, total: int | None, done: int, is_shown: bool, what: str | None = None) -> None:
        super().__init__(desc=what, total=total, initial=done, unit="sample", disable=not is_shown, dynamic_ncols=True)

    def update(self, n: float | None = 1) -> bool | None:
        """Advances the bar by ``n`` samples and updates the memory usage."""
        if not self.disable:
            self.set_postfix_str(f"memory {memory()}", refresh=False)
        is_refreshed: bool | None = super().update(n)
        return is_refreshed


def resident() -> int | None:
    """Returns the resident memory of this process in bytes, or its peak if the current value is unavailable.

    Returns None on systems without the module ``resource``, such as Windows.
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
    """Formats the memory usage of this process and, if in use, of the GPU."""
    held = resident()
    text = "unknown" if held is None else f"{held / 2**30:.1f} GiB"
    if torch.cuda.is_available() and torch.cuda.memory_allocated():
        text += f", GPU {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return text


__all__ = ["Progress", "memory", "resident"]
