"""The number of relevance vectors that one pass propagates within a memory budget."""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from ..errors import InputError, MemoryBudgetWarning, brief
from ..recording.places import Place
from ..recording.recording import Recording

DEFAULT, DEFAULT_CPU = 1 << 30, 1 << 27
"""Default memory budget of one pass, in bytes. On a CPU, a larger budget saves less time than its allocation costs."""
COPIES = 4
"""Memory that a step needs per vector, in multiples of the largest tap."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_memory(max_memory: object) -> int | None:
    """Returns a memory budget in bytes, or None for the default of the device.

    Raises:
        InputError: If ``max_memory`` is not a positive number.
    """
    if max_memory is None:
        return None
    is_number = isinstance(max_memory, numbers.Real) and not isinstance(max_memory, bool)
    if not is_number or not 0 < float(max_memory) < math.inf:  # type: ignore[arg-type]
        raise InputError(f"max_memory={brief(max_memory)} must be a positive number of bytes, or None.")
    return int(max_memory)  # type: ignore[call-overload, no-any-return]


def width_of(recording: Recording, max_memory: int | None, places: Iterable[Place] | None) -> int:
    """Returns the number of vectors that fit into memory, at least one.

    Args:
        recording: The recording.
        max_memory: Memory budget in bytes.
        places: The places at which vectors start or end, between which they are kept in memory, or None if unknown.
    """
    vertices = [place.vertex for place in places or ()]
    first, last = (min(vertices), max(vertices)) if vertices else (0, len(recording.graph.vertices))
    between = recording.graph.vertices[first : last + 1]
    largest = max((math.prod(shape) for vertex in between for shape in vertex.shapes), default=1)
    default = DEFAULT_CPU if recording.output.device.type == "cpu" else DEFAULT
    return max(1, (max_memory or default) // max(1, COPIES * largest * recording.output.element_size()))


def in_chunks(
    items: Sequence[Item], width: int, run: Callable[[Sequence[Item]], Sequence[Result]], what: str = ""
) -> list[Result]:
    """Returns the results of ``run`` for all items, at most ``width`` per call; the width is halved if memory runs out.

    Args:
        items: The items.
        width: Number of items per call.
        run: Returns one result for each item.
        what: Name of the items in the progress bar, which appears after a few seconds.

    Raises:
        MemoryError: If a single item does not fit into memory.
    """
    results: list[Result] = []
    with tqdm(total=len(items), desc=what, delay=5, leave=False, disable=len(items) <= width) as bar:
        while len(results) < len(items):
            chunk = items[len(results) : len(results) + width]
            try:
                chunk_results = run(chunk)
            except (RuntimeError, MemoryError) as error:
                if len(chunk) == 1 or not _is_out_of_memory(error):
                    raise
                chunk_results = []
            if not chunk_results:  # not in the handler, which keeps tensors alive
                width = max(1, len(chunk) // 2)
                message = f"out of memory with {len(chunk)} at once; retrying with {width}. Pass a smaller max_memory."
                warnings.warn(message, MemoryBudgetWarning, stacklevel=2)
                continue
            results += chunk_results
            bar.update(len(chunk))
    return results


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    # torch has no exception type for exhausted memory on a CPU.
    return "DefaultCPUAllocator" in str(error)
