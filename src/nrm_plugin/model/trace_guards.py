"""Conditions on tensor values during a trace, the list of tensor operations that a plan replays for other values.

A replay evaluates these conditions again and compares their outcomes with those during recording, except for conditions
that cannot affect the result.
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
    """Thread-local state of traces and audits.

    Attributes:
        tracer: The object that traces the operations of this thread, or None.
        audits: Number of active :func:`audit` contexts.
        place: Name of the layer or function whose kernel is being constructed.
        disabled_shortcuts: Computations that a trace must not use, because they are valid only under a condition on
            values and the condition failed for other values.
    """

    tracer: Any = None
    audits = 0
    place = ""
    disabled_shortcuts: frozenset[str] = frozenset()


ACTIVE = _Active()


def is_traced() -> bool:
    """Returns True if the operations of this thread are being traced."""
    return ACTIVE.tracer is not None


def note_not_replayable(reason: str) -> None:
    """Records a reason why the active trace, if any, cannot be replayed for other values."""
    if ACTIVE.tracer is not None:
        ACTIVE.tracer.trace.reasons_not_replayable.append(reason)


@contextmanager
def audit() -> Iterator[None]:
    """Context manager for checks of a model or rule whose result holds for all inputs. Replays omit them."""
    ACTIVE.audits += 1
    try:
        yield
    finally:
        ACTIVE.audits -= 1


@contextmanager
def repeated(place: str = "") -> Iterator[None]:
    """Context manager for computations inside an :func:`audit` that every replay must repeat.

    Args:
        place: Name of the step or layer, used in the names of shortcuts.
    """
    outer, ACTIVE.audits, ACTIVE.place = (ACTIVE.audits, ACTIVE.place), 0, place or ACTIVE.place
    try:
        yield
    finally:
        ACTIVE.audits, ACTIVE.place = outer


@contextmanager
def untraced() -> Iterator[None]:
    """Context manager that suspends tracing, for computations that only check the model."""
    outer, ACTIVE.tracer = ACTIVE.tracer, None
    try:
        with _disable_current_modes() if outer is not None else nullcontext():
            yield
    finally:
        ACTIVE.tracer = outer


def without_modes() -> AbstractContextManager[Any]:
    """Context manager that bypasses ``__torch_function__`` during a trace. The trace observes operations below it."""
    return torch._C.DisableTorchFunction() if is_traced() else nullcontext()


@contextmanager
def unwatched() -> Iterator[None]:
    """Context manager that suspends tracing and observation, for computations that only check the model."""
    with untraced(), torch._C.DisableTorchFunction():
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Context manager that suspends cyclic garbage collection.

    A recording creates many objects. The garbage collector would otherwise traverse all objects of the process several
    times.
    """
    is_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_enabled:
            gc.enable()


@contextmanager
def without_shortcuts(shortcuts: frozenset[str]) -> Iterator[None]:
    """Context manager in which traces take none of the given shortcuts."""
    outer = ACTIVE.disabled_shortcuts
    ACTIVE.disabled_shortcuts = shortcuts
    try:
        yield
    finally:
        ACTIVE.disabled_shortcuts = outer


def kind_of(shortcut: str) -> str:
    """Returns the name of a shortcut without the step in which it was taken."""
    return shortcut.partition(" in ")[0]


def holds(shortcut: str, condition: Callable[[], bool | Tensor]) -> bool:
    """Returns True if a shortcut, a computation that is valid only under a condition on values, can be taken.

    If the condition does not hold, the caller uses the general computation, which is always valid. A trace therefore
    depends on the condition only if it holds.

    Args:
        shortcut: Name of the shortcut.
        condition: Function that evaluates the condition.
    """
    if not is_traced():
        return bool(condition())
    kind, shortcut = shortcut, f"{shortcut} in {ACTIVE.place or 'the graph'}"
    if kind in ACTIVE.disabled_shortcuts or shortcut in ACTIVE.disabled_shortcuts:
        return False
    tracer = ACTIVE.tracer
    before, tracer.shortcut = tracer.position(), shortcut
    try:
        with repeated():
            is_met = bool(condition())
    finally:
        tracer.shortcut = ""
    if not is_met:
        tracer.forget_reads(before)
    return is_met


__all__ = [
    "ACTIVE",
    "audit",
    "holds",
    "is_traced",
    "kind_of",
    "note_not_replayable",
    "repeated",
    "uncollected",
    "untraced",
    "unwatched",
    "without_shortcuts",
]
