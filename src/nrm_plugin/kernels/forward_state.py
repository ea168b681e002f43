"""Thread-local state of a forward pass: its listener, the running modules, and the tensors saved by steps."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from zennit.core import Hook

from ..model.model_protection import memory_address
from ..model.shapes_without_values import PLAIN


class Saved:
    """Tensor that a step (call with a kernel) needs in the backward pass, protected from later in-place operations.

    Args:
        tensor: The tensor to save.
        values: Whether the values are needed. If False, the tensor is not copied before an in-place operation.
    """

    def __init__(self, tensor: Tensor, values: bool = True) -> None:
        self.tensor = tensor.detach()
        if values:
            _protect(tensor, self)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor."""
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tensor."""
        return self.tensor.dtype


def _protect(tensor: Tensor, holder: Saved | Tensor) -> None:
    RUNNING.saved.setdefault(memory_address(tensor), []).append(weakref.ref(holder))


def protected(value: Any) -> Any:
    """Detaches the tensors in a constant argument of a step and protects them from later in-place operations.

    Parameters keep their values while a model runs and are returned unchanged.
    """
    if type(value) in PLAIN and value.layout == torch.strided:
        own = value.detach()
        _protect(own, own)
        return own
    return type(value)(map(protected, value)) if type(value) in (list, tuple) else value


def protect_weights(module: nn.Module) -> None:
    """Protects the weights of a module created by a step from in-place operations on the same memory."""
    for weight in module.parameters():
        _protect(weight, weight)


def is_saved(tensor: Tensor) -> bool:
    """Returns True if a step has saved a tensor that shares storage with ``tensor``."""
    return any(saved() is not None for saved in RUNNING.saved.get(memory_address(tensor), ()))


def before_writing(tensor: Tensor) -> None:
    """Copies all saved tensors that share storage with ``tensor``. Called before ``tensor`` is modified in place."""
    for reference in RUNNING.saved.pop(memory_address(tensor), ()):
        saved = reference()
        if isinstance(saved, Tensor):
            saved.data = saved.detach().clone()
        elif saved is not None:
            saved.tensor = saved.tensor.clone()


def write(target: Tensor, result: Tensor) -> Tensor:
    """Copies a result into ``target`` in place and returns a tensor with the autograd history of the result."""
    before_writing(target)
    try:
        return target.copy_(result)
    except RuntimeError:
        # Autograd forbids in-place writes to leaves and to outputs of chunk, split and unbind, so no model can have
        # been trained with them. All readers see the correct values, but only the returned tensor has the correct
        # history.
        target.data.copy_(result.detach())
        return result


@dataclass(frozen=True)
class RunningModule:
    """Module with a rule whose forward pass is in progress.

    Attributes:
        hook: The hook of the module.
        module: The module that is running.
        call: The record of the call, or None if the call is not recorded as a step.
    """

    hook: Hook
    module: nn.Module
    call: Any


class _Running(threading.local):
    """State of the forward pass in the current thread.

    Attributes:
        modules: The running modules with a rule, outermost first; operations inside them are not steps.
        pauses: Number of active :class:`not_recorded` contexts.
        saved: Weak references to the tensors saved by steps, keyed by storage address.
        listener: The object that is notified of every step and tap.
        weights: The parameters of the model that require a gradient outside this pass.
        first_node: Sequence number of the first autograd node of this pass, or None if there is no listener.
        given: Ids of the parameters among the inputs of the model, used if there is no listener.
        made: The leaf tensors created by the model, keyed by ``id()``, or None if they can receive relevance.
        depending: Whether each autograd node visited in this pass depends on an input of the model.
        renormalized: The embedding tables that torch would have renormalized in this pass, keyed by ``id()``.
        reference: The forward pass on the reference, or None if no difference is explained.
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
    """Interface of objects that are notified of the steps (calls with a kernel) and functions of a forward pass.

    Attributes:
        indices: The integer inputs, as the tensor objects that are passed to the model.
        inputs: The leaf tensors of the floating-point inputs.
        gates: The gates of the forward pass.
    """

    indices: list[Tensor]
    inputs: list[Tensor]
    gates: Any

    def is_leaf(self, tensor: Tensor | None) -> bool:
        """Returns True if relevance ends at this leaf tensor: a model input, or rows looked up by an integer input."""

    def on_step(self, module: nn.Module | None, step: Any, output: Tensor) -> None:
        """Called after each step of a module or function, with the output of the call."""

    def on_function(self, name: str, call: int, output: Tensor, channel_dim: int | None) -> None:
        """Called when a function returns a tensor through which relevance passes."""

    def on_draw(self, name: str, where: str) -> None:
        """Called for each call of a function that draws random numbers."""

    def on_untracked(self) -> None:
        """Called when autograd does not track how a result, such as a sort order, depends on the inputs."""

    def on_read(self, where: str) -> None:
        """Called when the model converts integer inputs to Python or NumPy numbers at the call ``where``."""

    def on_lookup(self, name: str, call: int, rows: Tensor) -> Tensor:
        """Called when integer inputs select rows of a constant table. Returns a replacement for these rows."""


RUNNING = _Running()


def is_inside_step() -> bool:
    """Returns True if recording is suspended, inside a module with a rule or inside :class:`not_recorded`."""
    return RUNNING.pauses > 0 or bool(RUNNING.modules)


def is_in_module_step() -> bool:
    """Returns True if results are not attached to the graph, inside a module step or inside :class:`not_recorded`."""
    return RUNNING.pauses > 0 or any(running.call is not None for running in RUNNING.modules)


class not_recorded:  # noqa: N801  # a class, since entering a generator-based context takes three times as long
    """Context manager in which operations are computed but do not become steps of the recording."""

    __slots__ = ()

    def __enter__(self) -> None:
        RUNNING.pauses += 1

    def __exit__(self, *error: object) -> None:
        RUNNING.pauses -= 1


R = TypeVar("R")
P = ParamSpec("P")


def without_torch_function(hook: Callable[P, R]) -> Callable[P, R]:
    """Decorator that disables ``__torch_function__`` inside a hook.

    The overhead of ``__torch_function__`` would exceed the cost of the hook. Tensor subclasses need it, so the
    decorator has no effect if an argument is an instance of one.
    """

    @functools.wraps(hook)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if _has_subclass(args):
            return hook(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return hook(*args, **kwargs)

    return run


def _has_subclass(values: Iterable[Any]) -> bool:
    """Returns True if an instance of a tensor subclass is among the values or in a list, tuple or dictionary."""
    for value in values:
        kind = type(value)
        if kind in PLAIN or kind is nn.Parameter:
            continue
        if kind is dict or kind is tuple or kind is list:
            if value and _has_subclass(value.values() if kind is dict else value):
                return True
        elif isinstance(value, Tensor):
            return True
    return False


def is_transformed() -> bool:
    """Returns True if a ``torch.func`` transform such as ``vmap`` or ``grad`` is active.

    Operations inside a transform are not steps. A transform may compute constants, but an error is raised if relevance
    reaches its results.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def listener() -> Listener | None:
    """Returns the listener of the forward pass in this thread, or None if there is none."""
    return RUNNING.listener


def note_untracked() -> None:
    """Notifies the listener that autograd does not track how a result depends on the inputs."""
    if RUNNING.listener is not None:
        RUNNING.listener.on_untracked()


def is_foreign(tensor: Tensor, is_exact: bool = False) -> bool:
    """Returns True if a tensor requires a gradient but was not computed from the model inputs in this pass.

    Foreign tensors, such as initial states and parameters stored in a list or closure, are treated as constants. With a
    listener, the model is called with copies of its inputs, so all leaf tensors are foreign, as are all tensors
    computed before the pass. Without a listener, the caller may read the relevance of any leaf tensor, so only two
    kinds of leaf tensors are foreign: parameters that are not among the inputs, and tensors that the model creates
    although its inputs require a gradient.

    Args:
        tensor: Tensor to test.
        is_exact: Whether to detect tensors computed in another thread, where autograd nodes are numbered separately.
            This is slower and needed only for functions of several tensors.
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
    """Returns True if an autograd node depends on a model input. Each node is visited once per pass."""
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
    """Returns the ids of the tensors among the arguments of a function that require a gradient before the call."""
    return {id(value) for value in values if isinstance(value, Tensor) and value.requires_grad}


def note_leaves(values: tuple[Any, ...], known: set[int]) -> None:
    """Records the leaf tensors that a function created, given the ids of those ``known`` before the call."""
    made = RUNNING.made
    if made is None:
        return
    for value in values:
        if isinstance(value, Tensor) and value.requires_grad and value.grad_fn is None and id(value) not in known:
            made[id(value)] = value  # kept alive, since the id of a freed tensor may be reused


def constants_detached(value: Any, is_exact: bool = False) -> Any:
    """Detaches the foreign tensors in an argument of a function. Returns any other argument unchanged."""
    if isinstance(value, Tensor):
        return value.detach() if is_foreign(value, is_exact) else value
    if type(value) in (list, tuple):
        items = [constants_detached(item, is_exact) for item in value]
        is_same = all(new is old for new, old in zip(items, value, strict=True))
        return value if is_same else type(value)(items)
    return value


def next_node() -> int:
    """Returns the sequence number that the next autograd node of this thread will receive."""
    with torch._C.DisableTorchFunction(), torch.inference_mode(False), torch.enable_grad():
        return torch.zeros((), requires_grad=True).clone().grad_fn._sequence_nr()  # type: ignore[union-attr]


@contextmanager
def forward_pass(listener: Listener | None, reference: Any = None) -> Iterator[None]:
    """Context manager that provides a fresh state for one forward pass and restores the previous state on exit.

    Args:
        listener: The object notified of every step, or None for a pass without recording. With a listener, the model
            must be called on copies of its inputs made inside this context.
        reference: The :class:`~nrm_plugin.kernels.reference_pass.ReferencePass` if a difference is explained, or None.
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
    """Exits a torch function mode of this thread and any inner modes left active by an interrupt."""
    while mode in (stack := _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        stack[-1].__exit__(None, None, None)
