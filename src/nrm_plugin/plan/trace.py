"""Traces: the tensor operations that a computation ran, as a flat list in which every tensor has a number.

A trace is taken below autograd, by a ``TorchDispatchMode``, so that hooks, kernels and queries need not know of it.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..model.value_reads import ACTIVE


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor of a trace, by its number."""

    number: int


@dataclass(slots=True)
class Operation:
    """One operation of a trace.

    Attributes:
        function: The operation.
        args, kwargs: Its arguments, in which tensors are a :class:`Value`.
        results: The numbers of the tensors that it returned, None in the place of other results.
        is_sequence: Whether the operation returned several tensors.
        writes: Numbers of the tensors that it overwrote.
        expected: A number or truth value that it returned, on which the computation may have depended; None if it
            returned tensors.
        shapes: The shapes of its results, if they depend on values; else None.
        origin: For such a value, the shortcut that was taken, or the line of code that read the value.
        reads: Numbers of the tensors among the arguments.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    results: tuple[int | None, ...]
    is_sequence: bool = False
    writes: tuple[int, ...] = ()
    expected: Any = None
    shapes: tuple[torch.Size, ...] | None = None
    origin: str = ""
    reads: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.reads = tuple(numbers_in((*self.args, *self.kwargs.values())))


def numbers_in(values: Iterable[Any]) -> Iterator[int]:
    """Yields the numbers of all values in nested arguments."""
    for value in values:
        if value.__class__ is Value:
            yield value.number
        elif isinstance(value, (tuple, list)):
            yield from numbers_in(value)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to all items of nested arguments."""
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    return change(value)


@dataclass
class Trace:
    """The operations of a computation.

    Attributes:
        operations: The operations, in order.
        constants: Tensors that existed before, by number.
        placeholders: Numbers of the tensors that differ from run to run.
        forms: Shape, strides, offset, dtype and device of each tensor.
        aliases: For each tensor, the first tensor whose memory it may share.
        count: Number of tensors.
        obstacles: Reasons why the operations do not describe the computation for other values.
    """

    operations: list[Operation] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    placeholders: list[int] = field(default_factory=list)
    forms: dict[int, Any] = field(default_factory=dict)
    aliases: dict[int, int] = field(default_factory=dict)
    count: int = 0
    obstacles: list[str] = field(default_factory=list)

    def memory(self, number: int) -> int:
        """Returns the first tensor whose memory a tensor may share."""
        while number in self.aliases:
            number = self.aliases[number]
        return number


class Tracer(TorchDispatchMode):
    """Context that appends the operations of this thread to a trace; it may be entered several times.

    Attributes:
        trace: The trace.
        shortcut: Name of the shortcut whose condition is being read.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.trace = Trace()
        self._numbers: Any = WeakTensorKeyDictionary()
        self._varying: set[int] = set()
        self._memories: dict[Any, tuple[StorageWeakRef, list[tuple[int, Any]]]] = {}
        self._watch = EscapeWatch(self)
        self._outer: list[Any] = []
        self.shortcut = ""

    def __enter__(self) -> Any:
        self._outer.append(ACTIVE.tracer)  # a query may ask other queries, each of which enters the trace
        ACTIVE.tracer = self
        self._watch.__enter__()  # type: ignore[no-untyped-call, unused-ignore]
        return super().__enter__()  # type: ignore[no-untyped-call, unused-ignore]

    def __exit__(self, *error: Any) -> None:
        try:
            super().__exit__(*error)  # type: ignore[no-untyped-call, unused-ignore]
            self._watch.__exit__(*error)  # type: ignore[no-untyped-call, unused-ignore]
        finally:
            ACTIVE.tracer = self._outer.pop()

    def placeholder(self, tensor: Tensor) -> int:
        """Declares a tensor that differs from run to run."""
        number = self._new(tensor)
        self._varying.add(number)
        self.trace.placeholders.append(number)
        return number

    def number(self, tensor: Tensor) -> int:
        """Returns the number of a tensor; one that is not known is a constant."""
        known: int | None = self._numbers.get(tensor)
        if known is not None:
            return known
        same = self._same_view(tensor)
        if same is not None:
            self._numbers[tensor] = same
            return same
        number = self._new(tensor)
        self.trace.constants[number] = tensor.detach() if tensor.requires_grad else tensor
        return number

    def _same_view(self, tensor: Tensor) -> int | None:
        """Returns the number of a traced tensor that is the same view of the same memory.

        Some operations of PyTorch make a new Python object for a tensor without dispatch, such as ``nn.Parameter``.
        """
        known = self._memories.get(_memory(tensor))
        if known is None:
            return None
        for number, view in known[1]:
            if view == _form(tensor):
                return number
        if any(number in self._varying for number, _ in known[1]):
            self.trace.obstacles.append("a tensor shares memory with computed values in a way that was not traced")
        return None

    def varies(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on a placeholder."""
        return self._numbers.get(tensor) in self._varying

    def _new(self, tensor: Tensor) -> int:
        number = self.trace.count
        self.trace.count += 1
        self._numbers[tensor] = number
        self.trace.forms[number] = _form(tensor)
        memory = _memory(tensor)
        if memory is not None:
            if memory not in self._memories:
                self._memories[memory] = (StorageWeakRef(tensor.untyped_storage()), [])  # type: ignore[no-untyped-call, unused-ignore]
            self._memories[memory][1].append((number, _form(tensor)))
        return number

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        named_args, named_kwargs = mapped(self._named, tuple(args)), mapped(self._named, kwargs)
        writes = tuple(dict.fromkeys(self._written(function, args, kwargs)))
        result = function(*args, **kwargs)
        self._append(function, named_args, named_kwargs, result, writes, (args, kwargs))
        return result

    def _named(self, value: Any) -> Any:
        return Value(self.number(value)) if isinstance(value, Tensor) else value

    def _written(self, function: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Iterator[int]:
        for position, name in _written_arguments(function):
            value = args[position] if position < len(args) else kwargs.get(name)
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, Tensor):
                    yield self.number(item)

    def _append(self, function: Any, args: Any, kwargs: Any, result: Any, writes: tuple[int, ...], given: Any) -> None:
        trace = self.trace
        read = list(numbers_in((*args, *kwargs.values())))
        varies = any(number in self._varying for number in read)
        if isinstance(result, (tuple, list)):
            outputs, is_sequence = tuple(result), True
        else:
            outputs, is_sequence = (result,), False
        expected, origin = None, ""
        if not is_sequence and not isinstance(result, Tensor) and result is not None:
            if not varies or ACTIVE.audits or function in _STATIC:
                return
            expected = result
            origin = self.shortcut or _line()
        numbers: list[int | None] = []
        for item in outputs:
            if not isinstance(item, Tensor):
                numbers.append(None)
                continue
            known = self._numbers.get(item)
            if known is None:
                known = self._new(item)
                source = self._source(function, read, item, given)
                if source is not None:
                    trace.aliases[known] = source
            numbers.append(known)
            if varies:
                self._varying.add(known)
        shapes = None
        if varies and not ACTIVE.audits and _SHAPED_BY_VALUES & set(function.tags) and expected is None:
            origin = _line()
            shapes = tuple(item.shape for item in outputs if isinstance(item, Tensor))
        if varies:
            self._varying.update(writes)
        trace.operations.append(
            Operation(function, args, kwargs, tuple(numbers), is_sequence, writes, expected, shapes, origin)
        )

    def _source(self, function: Any, read: list[int], item: Tensor, given: Any) -> int | None:
        """Returns the argument whose memory a result shares, if any."""
        if not _may_share_memory(function):
            return None
        memory = item.untyped_storage()._cdata
        for value in _tensors(given):
            if value.untyped_storage()._cdata == memory:
                return int(self._numbers[value])
        return None


_STATIC = frozenset([torch.ops.aten.is_set_to.default, torch.ops.aten.is_same_size.default])
"""Operations that return numbers which do not depend on values."""


def _line() -> str:
    """Returns the line of code that reads a value."""
    frames = [
        frame
        for frame in traceback.extract_stack()
        if not any(part in frame.filename for part in ("/torch/", "plan/trace"))
    ]
    return " < ".join(f"{f.filename.rpartition('/nrm_plugin/')[2]}:{f.lineno}" for f in frames[::-1][:4])


@functools.cache
def _written_arguments(function: Any) -> list[tuple[int, str]]:
    """Returns position and name of the arguments that an operation overwrites."""
    arguments = enumerate(function._schema.arguments)
    return [(number, one.name) for number, one in arguments if one.alias_info is not None and one.alias_info.is_write]


@functools.cache
def _may_share_memory(function: Any) -> bool:
    return function in _MAY_ALIAS or any(one.alias_info is not None for one in function._schema.returns)


def _memory(tensor: Tensor) -> int | None:
    """Returns the identity of the memory of a tensor; the weak reference that is stored with it prevents its reuse."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None


def _form(tensor: Tensor) -> Any:
    if tensor.layout != torch.strided:
        return tensor.shape, None, 0, tensor.dtype, tensor.device
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def is_drawn(one: Operation) -> bool:
    """Whether an operation draws random numbers."""
    return torch.Tag.nondeterministic_seeded in one.function.tags and not str(one.function).startswith(_DETERMINISTIC)


_DETERMINISTIC = ("aten._scaled_dot_product", "aten.native_dropout")
"""Operations that draw numbers only in training mode, in which no measure is taken."""
_SHAPED_BY_VALUES = {torch.Tag.dynamic_output_shape}
_MAY_ALIAS = frozenset(
    [torch.ops.aten._reshape_alias.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.reshape.default]
)


class EscapeWatch(TorchFunctionMode):
    """Notes where values leave torch, so that what is computed from them later is not in the trace."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _ESCAPES:
            self._note(f"values read by Tensor.{name}()", args[:1])
        elif name in _CONVERSIONS:
            self._note("values of tensors in a list, which became a tensor", _listed(args))
        return function(*args, **(kwargs or {}))

    def _note(self, obstacle: str, values: Any) -> None:
        if not ACTIVE.audits and any(self._tracer.varies(tensor) for tensor in _tensors(values)):
            self._tracer.trace.obstacles.append(obstacle)


def _listed(args: Any) -> list[Any]:
    """Returns the lists among the arguments; torch reads the numbers in them without a dispatch."""
    nested = [item for value in args if isinstance(value, tuple) for item in value]
    return [value for value in (*args, *nested) if isinstance(value, list)]


_CONVERSIONS = frozenset(["tensor", "as_tensor", "asarray", "new_tensor", "__getitem__", "__setitem__"])
_ESCAPES = frozenset(["tolist", "numpy", "__array__", "__dlpack__", "apply_", "map_", "map2_"])
