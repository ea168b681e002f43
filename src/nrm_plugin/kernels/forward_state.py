"""Per-thread state of a forward pass: the listener, the running modules, and the tensors saved by steps."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from zennit.core import Hook


class Saved:
    """A tensor that a step needs when relevance arrives. Its values are protected from later in-place operations.

    Args:
        tensor: The tensor.
        values: Whether its values are needed; if not, an in-place operation does not copy them.
    """

    def __init__(self, tensor: Tensor, values: bool = True) -> None:
        self.tensor = tensor.detach()
        if values:
            _protect(tensor, self)


def _protect(tensor: Tensor, holder: Saved | Tensor) -> None:
    RUNNING.saved.setdefault(tensor.untyped_storage().data_ptr(), []).append(weakref.ref(holder))


def protected(value: Any) -> Any:
    """Returns an argument of a step, with its constant tensors copied so that in-place operations cannot change them.

    Parameters are returned unchanged; they keep their values while a model runs.
    """
    if type(value) is Tensor and value.layout == torch.strided:
        own = value.detach()
        _protect(own, own)
        return own
    return type(value)(map(protected, value)) if type(value) in (list, tuple) else value


def protect_weights(module: nn.Module) -> None:
    """Protects the weights of a module that a step created from later in-place operations on the same memory."""
    for weight in module.parameters():
        _protect(weight, weight)


def is_saved(tensor: Tensor) -> bool:
    """Returns whether a step has saved the tensor at this memory address."""
    return any(saved() is not None for saved in RUNNING.saved.get(tensor.untyped_storage().data_ptr(), ()))


def before_writing(tensor: Tensor) -> None:
    """Gives each step that saved a tensor in this memory its own copy. Call this before an in-place operation."""
    for reference in RUNNING.saved.pop(tensor.untyped_storage().data_ptr(), ()):
        saved = reference()
        if isinstance(saved, Tensor):
            saved.data = saved.detach().clone()
        elif saved is not None:
            saved.tensor = saved.tensor.clone()


def write(target: Tensor, result: Tensor) -> Tensor:
    """Copies a result into a tensor in place; returns the tensor with the autograd history of the result."""
    before_writing(target)
    try:
        return target.copy_(result)
    except RuntimeError:
        # Autograd rejects leaves and outputs of chunk, split and unbind, so no model was trained that way. The values
        # are correct for every reader, the history only for readers of the returned tensor.
        target.data.copy_(result.detach())
        return result


@dataclass(frozen=True)
class RunningModule:
    """A module with a rule whose forward pass is in progress.

    Attributes:
        hook: The hook of the module.
        module: The module.
        call: The hook's record of the call, or None if the call is not recorded as a step.
    """

    hook: Hook
    module: nn.Module
    call: Any


class _Running(threading.local):
    """State of the forward pass of this thread.

    Attributes:
        modules: The running modules that have a rule, outermost first; operations inside them are not steps.
        pauses: Number of open contexts of :func:`not_recorded`.
        saved: The tensors that steps have saved, keyed by memory address.
        listener: The object that is notified of every step and tap.
        weights: The parameters of the model that require gradients outside of this pass.
        first_node: Number of the first autograd node of this pass, or None without a listener.
        given: Identities of the parameters among the inputs of the model, without a listener.
        made: Leaves that the model created, keyed by identity, or None if such leaves carry relevance.
        depending: For each autograd node seen in this pass, whether it depends on an input of the model.
        renormalized: The embedding tables that torch would have renormalized in this pass, keyed by identity.
        reference: The pass of the reference, if a difference is explained, or None otherwise.
    """

    def __init__(self) -> None:
        self.modules: list[RunningModule] = []
        self.pauses = 0
        self.saved: dict[int, list[weakref.ref[Saved | Tensor]]] = {}
        self.listener: Listener | None = None
        self.weights: tuple[Tensor, ...] = ()
        self.first_node: int | None = None
        self.given: frozenset[int] = frozenset()
        self.made: dict[int, Tensor] | None = None
        self.depending: dict[Any, bool] = {}
        self.renormalized: dict[int, Tensor] = {}
        self.reference: Any = None


class Listener(Protocol):
    """An object that is notified of the steps and functions of a forward pass.

    Attributes:
        indices: The integer inputs, as the same objects that are passed to the model.
        inputs: The leaves of the floating-point inputs.
        gates: The gates of the forward pass.
    """

    indices: list[Tensor]
    inputs: list[Tensor]
    gates: Any

    def is_leaf(self, tensor: Tensor | None) -> bool:
        """Returns whether relevance ends at a leaf: an input, or rows selected by integer inputs."""

    def on_step(self, module: nn.Module | None, step: Any, output: Tensor) -> None:
        """Called for each step of a module or function, with the output of the call."""

    def on_function(self, name: str, call: int, output: Tensor, channel_dim: int | None) -> None:
        """Called when a function returns a tensor that carries relevance."""

    def on_untracked(self) -> None:
        """Called when values, such as a sort order, depend on the inputs but are not tracked by autograd."""

    def on_read(self, where: str) -> None:
        """Called when the model converts integer inputs to Python or NumPy numbers; ``where`` describes the call."""

    def on_lookup(self, name: str, call: int, rows: Tensor) -> Tensor:
        """Called when integer inputs select rows of a constant; returns the tensor that replaces the rows."""


RUNNING = _Running()


def is_inside_step() -> bool:
    """Returns whether operations are currently not recorded: inside a module with a rule or :class:`not_recorded`."""
    return RUNNING.pauses > 0 or bool(RUNNING.modules)


def is_in_module_step() -> bool:
    """Returns whether results are currently not in the graph: inside a module step or :class:`not_recorded`."""
    return RUNNING.pauses > 0 or any(running.call is not None for running in RUNNING.modules)


class not_recorded:  # noqa: N801  # a class, since a generator takes three times as long to enter
    """Context manager that pauses recording: operations inside it are not recorded."""

    __slots__ = ()

    def __enter__(self) -> None:
        RUNNING.pauses += 1

    def __exit__(self, *error: object) -> None:
        RUNNING.pauses -= 1


R = TypeVar("R")
P = ParamSpec("P")


def without_torch_function(hook: Callable[P, R]) -> Callable[P, R]:
    """Decorates a hook so that its own operations bypass ``__torch_function__``, which costs more than most of them.

    The decorator has no effect if an argument belongs to a subclass of tensor, which needs ``__torch_function__``.
    """

    @functools.wraps(hook)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(map(_is_subclass, args)):
            return hook(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return hook(*args, **kwargs)

    return run


def _is_subclass(value: Any) -> bool:
    kind = type(value)
    if kind is Tensor or kind is nn.Parameter:
        return False
    if kind is dict or kind is tuple or kind is list:
        return any(map(_is_subclass, value.values() if kind is dict else value))
    return isinstance(value, Tensor)


def is_transformed() -> bool:
    """Returns whether a transform of ``torch.func`` runs, such as ``vmap`` or ``grad``; nothing inside of it is a step.

    Relevance raises an error where it arrives at the results of the transform; constants may come from one.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def listener() -> Listener | None:
    """Returns the listener of the forward pass of this thread."""
    return RUNNING.listener


def note_untracked() -> None:
    """Notifies the listener of values that depend on the inputs but are not tracked by autograd."""
    if RUNNING.listener is not None:
        RUNNING.listener.on_untracked()


def is_foreign(tensor: Tensor, is_exact: bool = False) -> bool:
    """Returns whether a tensor requires a gradient although the model did not compute it from its inputs in this pass.

    Examples are a parameter stored in a list or closure, and an initial state; for relevance they are constants. The
    model is called with copies of its inputs, so every leaf is foreign, and so is every tensor computed earlier.
    Without a listener, the caller may read relevance at any leaf, except parameters that are not among the inputs, and
    leaves that the model creates although it is called with inputs that require a gradient.

    Args:
        tensor: Any tensor.
        is_exact: Whether to detect tensors computed in another thread, where autograd nodes are numbered separately.
            The exact test matters for functions of several tensors, and is slower.
    """
    if not tensor.requires_grad:
        return False
    node = tensor.grad_fn
    if RUNNING.first_node is None:
        if node is not None:
            return False
        is_weight = isinstance(tensor, nn.Parameter) and id(tensor) not in RUNNING.given
        return is_weight or (RUNNING.made is not None and id(tensor) in RUNNING.made)
    if node is None or node._sequence_nr() < RUNNING.first_node:
        return True
    return is_exact and not _depends_on_inputs(node)


def _depends_on_inputs(node: Any) -> bool:
    """Returns whether an autograd node depends on an input; each node is visited once per pass."""
    listening, known, stack = RUNNING.listener, RUNNING.depending, [node]
    assert listening is not None, "without a listener, the inputs are not known"
    while stack:
        below = [other for other, _ in stack[-1].next_functions if other is not None] if stack[-1] not in known else []
        unknown = [other for other in below if other not in known]
        if unknown:
            stack += unknown
            continue
        last = stack.pop()
        if last not in known:
            known[last] = any(known[other] for other in below) or listening.is_leaf(getattr(last, "variable", None))
    return known[node]


def known_leaves(values: tuple[Any, ...]) -> set[int]:
    """Returns the identities of the tensors in a function's arguments that already require a gradient."""
    return {id(value) for value in values if isinstance(value, Tensor) and value.requires_grad}


def note_leaves(values: tuple[Any, ...], known: set[int]) -> None:
    """Records the leaves that a function has created, in its result and its arguments."""
    made = RUNNING.made
    if made is None:
        return
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.grad_fn is None and id(value) not in known:
            made[id(value)] = value  # stored, since the identity of a freed tensor may be reused


def constants_detached(value: Any, is_exact: bool = False) -> Any:
    """Detaches all foreign tensors in an argument of a function; returns the same object if there are none."""
    if isinstance(value, Tensor):
        return value.detach() if is_foreign(value, is_exact) else value
    if type(value) in (list, tuple):
        items = [constants_detached(item, is_exact) for item in value]
        is_same = all(new is old for new, old in zip(items, value, strict=True))
        return value if is_same else type(value)(items)
    return value


def next_node() -> int:
    """Returns the number of the next autograd node of this thread."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.enable_grad():
        return torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]


@contextmanager
def forward_pass(listener: Listener | None, reference: Any = None) -> Iterator[None]:
    """Context manager with a new state for one forward pass, so that a pass that raises leaves no state behind.

    Args:
        listener: The object notified of every step; the model must be called with copies of its inputs made inside this
            context. None for a pass without recording.
        reference: A :class:`~nrm_plugin.kernels.reference_pass.ReferencePass`, if a difference is explained.
    """
    outer = dict(RUNNING.__dict__)
    first_node = None
    if listener is not None:
        first_node = next_node()
    RUNNING.__dict__.update(modules=[], pauses=0, saved={}, listener=listener, weights=(), made=None)
    RUNNING.__dict__.update(first_node=first_node, depending={}, reference=reference)
    try:
        yield
    finally:
        RUNNING.__dict__.update(outer)


def leave_mode(mode: TorchFunctionMode) -> None:
    """Exits a mode of this thread, together with any inner modes that an interrupt left open."""
    while mode in (stack := _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        stack[-1].__exit__(None, None, None)
