"""What is known of the forward pass that a thread is in: who listens, what is inside what, what outlives a write."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from zennit.core import Hook


class Saved:
    """A tensor that a step will need when relevance arrives; it survives later writes into its memory.

    Args:
        tensor: The tensor.
        values: Whether its values are needed; else only its shape, and no copy is made.
    """

    def __init__(self, tensor: Tensor, values: bool = True) -> None:
        self.tensor = tensor.detach()
        if values:
            self._register(tensor)

    def _register(self, tensor: Tensor) -> None:
        RUNNING.saved.setdefault(tensor.untyped_storage().data_ptr(), []).append(weakref.ref(self))


def is_saved(tensor: Tensor) -> bool:
    """Whether a step needs what is in this memory."""
    return any(saved() is not None for saved in RUNNING.saved.get(tensor.untyped_storage().data_ptr(), ()))


def before_writing(tensor: Tensor) -> None:
    """Gives every step that saved this memory a copy of its own; to be called before an in-place operation."""
    for reference in RUNNING.saved.pop(tensor.untyped_storage().data_ptr(), ()):
        saved = reference()
        if saved is not None:
            saved.tensor = saved.tensor.clone()


def write(target: Tensor, result: Tensor) -> Tensor:
    """Writes a result over a tensor; returns the tensor that has the result as its history."""
    before_writing(target)
    try:
        return target.copy_(result)
    except RuntimeError:
        # Autograd refuses leaves and what chunk, split and unbind return, so no such model was ever trained that
        # way. The values are right for all who read them, the history only for those who read what is returned.
        target.data.copy_(result.detach())
        return result


class _Running(threading.local):
    """State of the forward pass of this thread.

    Attributes:
        entered: The modules with a rule that are running, outermost first, each with its hook and what that keeps of
            the call: inside them nothing is a step of its own.
        unseen: How many blocks of :func:`unseen` are open.
        saved: What steps saved, by memory.
        listener: Is told of every step and tap.
    """

    def __init__(self) -> None:
        self.entered: list[tuple[Hook, nn.Module, Any]] = []
        self.unseen = 0
        self.saved: dict[int, list[weakref.ref[Saved]]] = {}
        self.listener: Listener | None = None


class Listener(Protocol):
    """Is told what happens in a forward pass."""

    def on_step(self, module: nn.Module | None, step: Any) -> None:
        """A step of a module, or of a function."""

    def on_function(self, name: str, call: int, output: Tensor, channel_dim: int | None) -> None:
        """A function returned a tensor that carries relevance."""


RUNNING = _Running()


def is_inside_step() -> bool:
    """Whether a module with a rule is running right now."""
    return RUNNING.unseen > 0 or bool(RUNNING.entered)


@contextmanager
def unseen() -> Iterator[None]:
    """What is done in here is no part of the model."""
    RUNNING.unseen += 1
    try:
        yield
    finally:
        RUNNING.unseen -= 1


R = TypeVar("R")
P = ParamSpec("P")


def among_ourselves(hook: Callable[P, R]) -> Callable[P, R]:
    """A hook whose own operations are handed to no mode, which takes longer than most of them.

    Tensors of subclasses need the hand-over.
    """

    @functools.wraps(hook)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(_is_subclass(value) for value in args):
            return hook(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return hook(*args, **kwargs)

    return run


def _is_subclass(value: object) -> bool:
    if isinstance(value, Tensor):
        return type(value) is not Tensor and type(value) is not nn.Parameter
    items = value if type(value) in (list, tuple) else value.values() if type(value) is dict else ()
    return any(_is_subclass(item) for item in items)  # type: ignore[attr-defined]


def listener() -> Listener | None:
    """Who listens to the forward pass of this thread."""
    return RUNNING.listener


@contextmanager
def forward_pass(listener: Listener | None) -> Iterator[None]:
    """A fresh state for one forward pass, so that a pass that raised leaves nothing behind."""
    kept = dict(RUNNING.__dict__)
    RUNNING.__dict__.update(entered=[], unseen=0, saved={}, listener=listener)
    try:
        yield
    finally:
        RUNNING.__dict__.update(kept)


def leave_mode(mode: TorchFunctionMode) -> None:
    """Leaves a mode of this thread, and first those entered after it that an interrupt kept from being left."""
    while mode in (stack := _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        stack[-1].__exit__(None, None, None)
