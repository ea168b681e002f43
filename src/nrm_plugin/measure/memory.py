"""How many relevance vectors are carried at once, so that they fit into memory."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from ..errors import InputError, MemoryBudgetWarning
from ..recording.places import Place
from ..recording.recording import Recording

DEFAULT, DEFAULT_CPU = 1 << 30, 1 << 27
"""Bytes of relevance that a pass may carry where nothing else is said. On a CPU more vectors at once save little, and
fresh memory for them costs more than that."""
COPIES = 4
"""Tensors of the size of the largest tap that one vector takes on its way through a step."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def check_memory(max_memory: object) -> int | None:
    """Bytes of a budget, None for what fits the device.

    Raises:
        InputError: It is no positive number.
    """
    if max_memory is None:
        return None
    is_number = isinstance(max_memory, numbers.Real) and not isinstance(max_memory, bool)
    if not is_number or not 0 < float(max_memory) < math.inf:  # type: ignore[arg-type]
        raise InputError(f"max_memory={max_memory!r} must be a positive number of bytes, or None.")
    return int(max_memory)  # type: ignore[call-overload, no-any-return]


def width_of(recording: Recording, max_memory: int | None, places: Iterable[Place] | None) -> int:
    """Vectors that fit, at least one.

    Args:
        recording: The recording.
        max_memory: Bytes.
        places: Where vectors begin to differ, and where they end: between these they are carried. None for anywhere.
    """
    vertices = [place.vertex for place in places or ()]
    first, last = (min(vertices), max(vertices)) if vertices else (0, len(recording.graph.vertices))
    carried = recording.graph.vertices[first : last + 1]
    largest = max((math.prod(shape) for vertex in carried for shape in vertex.shapes), default=1)
    default = DEFAULT_CPU if recording.output.device.type == "cpu" else DEFAULT
    return max(1, (max_memory or default) // max(1, COPIES * largest * recording.output.element_size()))


def in_chunks(
    items: Sequence[Item], width: int, run: Callable[[Sequence[Item]], Sequence[Found]], what: str = ""
) -> list[Found]:
    """``run`` on all items, at most ``width`` at once; where memory runs out, on half as many.

    Args:
        items: What to run on.
        width: Most at once.
        run: Gives one result for each item.
        what: What the items are, for the progress bar, which only appears where it takes long.

    Raises:
        MemoryError: One alone does not fit.
    """
    found: list[Found] = []
    with tqdm(total=len(items), desc=what, delay=5, leave=False, disable=len(items) <= width) as bar:
        while len(found) < len(items):
            chunk = items[len(found) : len(found) + width]
            try:
                results = run(chunk)
            except (RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or not _is_out_of_memory(error):
                    raise
                results = []
            if not results:  # outside of the handler, which keeps what was allocated alive
                width = max(1, len(chunk) // 2)
                message = f"memory ran out with {len(chunk)} at once; going on with {width}. Pass a smaller max_memory."
                warnings.warn(message, MemoryBudgetWarning, stacklevel=2)
                continue
            found += results
            bar.update(len(chunk))
    return found


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # On a CPU torch has no type of its own for it.
    return "DefaultCPUAllocator" in str(error)
