"""Value reads: the points at which a computation depends on values, and what a trace of it has to know about them.

A trace repeats the tensor operations of a computation with other values. Every condition that the computation has read
is then evaluated again and compared, unless the result did not depend on it.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes


class _Active(threading.local):
    """The thread-local state of traces and audits.

    Attributes:
        tracer: The tracer of the trace in progress, or None.
        audits: Number of open audits.
        place: The step whose kernel is being built.
        avoided: Shortcuts that a trace must not take, because their conditions did not hold for other values.
    """

    tracer: Any = None
    audits = 0
    place = ""
    avoided: frozenset[str] = frozenset()


ACTIVE = _Active()


def is_traced() -> bool:
    """Returns whether the operations of this thread are traced, to be repeated with other values."""
    return ACTIVE.tracer is not None


def note_obstacle(reason: str) -> None:
    """Notes why the operations of this thread cannot be repeated with other values; without a trace, nothing."""
    if ACTIVE.tracer is not None:
        ACTIVE.tracer.trace.obstacles.append(reason)


@contextmanager
def audit() -> Iterator[None]:
    """Context manager for checks of a model or a rule that need not be repeated for other inputs."""
    ACTIVE.audits += 1
    try:
        yield
    finally:
        ACTIVE.audits -= 1


@contextmanager
def repeated(place: str = "") -> Iterator[None]:
    """Context manager inside an :func:`audit` for computations that are repeated for other inputs.

    Args:
        place: Name of the step or layer, to which the names of shortcuts refer.
    """
    outer, ACTIVE.audits, ACTIVE.place = (ACTIVE.audits, ACTIVE.place), 0, place or ACTIVE.place
    try:
        yield
    finally:
        ACTIVE.audits, ACTIVE.place = outer


@contextmanager
def untraced() -> Iterator[None]:
    """Context manager for computations that only check the model and whose results are not otherwise used."""
    outer, ACTIVE.tracer = ACTIVE.tracer, None
    try:
        with _disable_current_modes() if outer is not None else nullcontext():
            yield
    finally:
        ACTIVE.tracer = outer


def without_modes() -> AbstractContextManager[Any]:
    """Context manager for operations of this package in a trace that read no values outside of torch."""
    return torch._C.DisableTorchFunction() if is_traced() else nullcontext()


@contextmanager
def unwatched() -> Iterator[None]:
    """Context manager for computations that only check the model, and are neither traced nor observed."""
    with untraced(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Context without garbage collection of reference cycles.

    A recording creates many objects, so the garbage collector would traverse all objects of the process several times.
    """
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


@contextmanager
def avoiding(shortcuts: frozenset[str]) -> Iterator[None]:
    """Context manager that keeps a trace from taking the given shortcuts."""
    outer = ACTIVE.avoided
    ACTIVE.avoided = shortcuts
    try:
        yield
    finally:
        ACTIVE.avoided = outer


def holds(shortcut: str, condition: Callable[[], bool | Tensor]) -> bool:
    """Returns whether a shortcut, a computation that is valid only if a condition on values holds, may be taken.

    If the condition does not hold, the general computation is used, which is valid in any case. A trace therefore
    depends on the condition only if it holds.

    Args:
        shortcut: Name of the shortcut.
        condition: Function that reads the values.
    """
    if not is_traced():
        return bool(condition())
    shortcut = f"{shortcut} in {ACTIVE.place or 'the graph'}"
    if shortcut in ACTIVE.avoided:
        return False
    tracer = ACTIVE.tracer
    before, tracer.shortcut = tracer.position(), shortcut
    try:
        with repeated():
            found = bool(condition())
    finally:
        tracer.shortcut = ""
    if not found:
        tracer.forget_reads(before)
    return found


__all__ = [
    "ACTIVE",
    "audit",
    "avoiding",
    "holds",
    "is_traced",
    "note_obstacle",
    "repeated",
    "uncollected",
    "untraced",
    "unwatched",
]
