"""Number of relevance vectors per pass that fit into a memory budget."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from ..errors import InputError, MemoryBudgetWarning, brief, is_out_of_memory, warn
from ..recording.places import Place
from ..recording.recording import Recording

DEFAULT, DEFAULT_CPU = 1 << 30, 1 << 27
"""Default memory budget of one pass in bytes. On a CPU, larger allocations cost more time than they save."""
COPIES = 4
"""Memory required by a pass per vector, in multiples of the largest tap."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def check_memory(max_memory: object) -> int | None:
    """Validates a memory budget in bytes. None stands for the default of the device.

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
    """Returns the number of vectors that fit into the memory budget, at least one.

    Args:
        recording: The recording of the forward pass.
        max_memory: Memory budget in bytes, or None for the default of the device.
        places: Places at which vectors start or end; memory is needed only between them. None for the whole graph.
    """
    vertices = [place.vertex for place in places or ()]
    first, last = (min(vertices), max(vertices)) if vertices else (0, len(recording.graph.vertices))
    between = recording.graph.vertices[first : last + 1]
    largest = max((math.prod(shape) for vertex in between for shape in vertex.shapes), default=1)
    budget = budget_of(recording.output.device, max_memory)
    return max(1, budget // max(1, COPIES * largest * recording.output.element_size()))


def budget_of(device: torch.device, max_memory: int | None) -> int:
    """Returns the memory budget of relevance vectors in bytes: ``max_memory``, or the default of the device."""
    return max_memory or (DEFAULT_CPU if device.type == "cpu" else DEFAULT)


def in_chunks(
    items: Sequence[Item], width: int, run: Callable[[Sequence[Item]], Sequence[Result]], what: str = ""
) -> list[Result]:
    """Applies ``run`` to chunks of ``width`` items. The width is halved whenever memory runs out.

    Args:
        items: The items to process.
        width: Number of items per call.
        run: Function that returns one result per item.
        what: Label of a progress bar that appears after a few seconds.

    Returns:
        The results of all items.

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
                if len(chunk) == 1 or not is_out_of_memory(error):
                    raise
                chunk_results = []
            if not chunk_results:  # outside the handler, since its traceback keeps tensors alive
                width = max(1, len(chunk) // 2)
                message = f"out of memory with {len(chunk)} at once; retrying with {width}. Pass a smaller max_memory."
                warn(message, MemoryBudgetWarning)
                continue
            results += chunk_results
            bar.update(len(chunk))
    return results
