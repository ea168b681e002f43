"""Tracing of the tensor operations that torch executes below autograd, whatever code calls them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..model.nested_tensors import tensors_in
from ..model.trace_guards import ACTIVE
from .trace import FILLED, Operation, Trace, Value, draws

aten = torch.ops.aten


@dataclass(slots=True, eq=False)
class _Memory:
    """Block of memory that several tensors of a trace share, as a tensor and its views do.

    Attributes:
        root: Index of the first tensor in the block.
        is_traced: Whether operations of the trace write to the block. Otherwise, it is constant.
        views: The known tensors in this memory, keyed by shape, strides, offset and dtype.
        reference: A weak reference that prevents the id of the memory from being reused.
        copy: Index of a flat tensor of the whole memory, created when a constant is overwritten, or None.
        is_overwritten: Whether the block contains an overwritten weight or buffer. Constants in it are then copies.
    """

    root: int
    is_traced: bool
    views: dict[Any, Value]
    reference: StorageWeakRef | None
    copy: int | None = None
    is_overwritten: bool = False


class Tracer(TorchDispatchMode):
    """Torch dispatch mode that appends the operations of this thread to a trace. It can be entered repeatedly.

    Operations on constants are executed but not appended, and their results are constants. Operations that create
    tensors to be filled later are appended: a tensor is constant only when it has its final values.

    Attributes:
        trace: The trace to which operations are appended.
        shortcut: Name of the shortcut (a computation that is valid only under a condition on values) whose condition is
            being evaluated.
        query: Index of the query in progress; 0 during the recording.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self.trace = Trace()
        self.shortcut = ""
        self.query = 0
        self._tensors: dict[int, tuple[weakref.ref[Tensor], Value, _Memory]] = {}
        self._varying: set[int] = set()
        self._memories: dict[int, _Memory] = {}
        self._fresh: dict[int, StorageWeakRef] = {}
        self._watch = EscapeWatch(self)
        self._outer: list[Any] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # avoids two additional function calls per operation

    def __enter__(self) -> Any:
        self._outer.append(ACTIVE.tracer)
        # If one query calls another, entering the mode twice would append operations twice.
        if ACTIVE.tracer is self:
            return self
        ACTIVE.tracer = self
        self._watch.__enter__()  # type: ignore[no-untyped-call, unused-ignore]
        return super().__enter__()  # type: ignore[no-untyped-call, unused-ignore]

    def __exit__(self, *error: Any) -> None:
        outer = self._outer.pop()
        if outer is self:
            return
        try:
            super().__exit__(*error)  # type: ignore[no-untyped-call, unused-ignore]
            self._watch.__exit__(*error)  # type: ignore[no-untyped-call, unused-ignore]
        finally:
            ACTIVE.tracer = outer

    # -- tensors --------------------------------------------------------------------------------------------------

    def placeholder(self, tensor: Tensor) -> int:
        """Declares a tensor whose values vary between runs. Returns its index."""
        number = self._new(tensor, is_traced=True).number
        self.trace.placeholders.append(number)
        self._vary(number)
        return number

    def number(self, tensor: Tensor) -> int:
        """Returns the index of a tensor. An unknown tensor is added as a constant."""
        return self._value(tensor).number

    def varies(self, tensor: Tensor) -> bool:
        """Returns True if a tensor depends on a placeholder."""
        memory = self._memory_of(tensor)
        return memory is not None and memory.root in self._varying

    def _vary(self, number: int) -> None:
        self._varying.add(self.trace.memory(number))

    def _memory_of(self, tensor: Tensor) -> _Memory | None:
        known = self._by_object(tensor)
        return self._memories.get(_identity(tensor)) if known is None else known[1]

    def _by_object(self, tensor: Tensor) -> tuple[Value, _Memory] | None:
        """Returns the index and memory of a known tensor object, or None if it has been assigned other memory."""
        known = self._tensors.get(id(tensor))
        if known is None or known[0]() is not tensor:
            return None
        at = _identity(tensor)
        return known[1:] if not at or self._memories.get(at) is known[2] else None

    def _value(self, tensor: Tensor) -> Value:
        return self._known(tensor) or self._constant(tensor)

    def _constant(self, tensor: Tensor) -> Value:
        value = self._new(tensor, is_traced=False)
        # Detached, since a tensor may be assigned new memory later: canonizers restore weights and buffers through
        # ``.data``.
        self.trace.constants[value.number] = tensor.detach()
        return value

    def _known(self, tensor: Tensor) -> Value | None:
        """Returns the index of a tensor of the trace, or None if it is unknown."""
        known = self._by_object(tensor)
        if known is not None:
            return known[0]
        memory = self._memories.get(_identity(tensor))
        if memory is None:
            return None
        # Some PyTorch functions, such as ``nn.Parameter``, create a new object for a tensor without dispatch.
        view = memory.views.get(_form(tensor))
        if view is None and memory.copy is not None:
            view = self._view_of_copy(tensor, memory, memory.copy)
        if view is not None:
            self._tensors[id(tensor)] = (weakref.ref(tensor), view, memory)
        return view

    def _new(self, tensor: Tensor, is_traced: bool) -> Value:
        """Adds a tensor to the trace. Returns its index."""
        trace = self.trace
        value = Value(trace.count)
        trace.count += 1
        trace.forms[value.number] = form = _form(tensor)
        at = _identity(tensor)
        memory = self._memories.get(at)
        if memory is None:
            reference = StorageWeakRef(tensor.untyped_storage()) if at else None  # type: ignore[no-untyped-call, unused-ignore]
            memory = _Memory(value.number, is_traced, {}, reference)
            if at:
                self._memories[at] = memory
        else:
            trace.aliases[value.number] = memory.root
            if not is_traced and memory.is_traced:
                trace.reasons_not_replayable.append(
                    "a tensor shares memory with computed values in a way that was not traced"
                )
        memory.views[form] = value
        self._tensors[id(tensor)] = (weakref.ref(tensor), value, memory)
        return value

    # -- values that the computation reads ------------------------------------------------------------------------

    def position(self) -> int:
        """Returns the number of operations in the trace."""
        return len(self.trace.operations)

    def forget_reads(self, position: int) -> None:
        """Discards the values read since the given position. The computation does not depend on them."""
        recent = self.trace.operations[position:]
        self.trace.operations[position:] = [one for one in recent if one.expected is None and one.shapes is None]

    # -- operations -----------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():  # otherwise, EscapeWatch would observe all attribute accesses here
            return self._dispatched(function, args, kwargs or {})

    def _dispatched(self, function: Any, args: Any, kwargs: Any) -> Any:
        facts = _facts(function)
        numbered: dict[int, Value] = {}
        is_traced = self._look_up(args, numbered) if args else False
        if kwargs and self._look_up(kwargs.values(), numbered):
            is_traced = True
        if not is_traced and self._is_constant(facts, args, kwargs):
            result = function(*args, **kwargs)
            if facts.makes_memory:
                self._note_fresh(result, (args, kwargs))
            return result
        written: Sequence[Tensor] = ()
        if facts.writes:
            written = facts.written(args, kwargs)
            for tensor in written:
                self._make_writable(tensor)
            numbered.clear()  # tensors in copied memory have new indices
        reads: list[int] = []
        named = tuple([self._named(value, reads, numbered) for value in args])
        named_by_key = {key: self._named(value, reads, numbered) for key, value in kwargs.items()}
        writes = tuple(dict.fromkeys(map(self.number, written)))
        result = function(*args, **kwargs)
        self._append(facts, (named, named_by_key, tuple(reads)), result, writes)
        return result

    def _is_constant(self, facts: _Facts, args: Any, kwargs: Any) -> bool:
        """Returns True if an operation reads only constants and need not be traced."""
        if facts.is_recorded:
            return False
        if not facts.writes:
            return True
        identities = [_identity(tensor) for tensor in facts.written(args, kwargs)]
        return all(at in self._fresh and at not in self._memories for at in identities)

    def _look_up(self, values: Iterable[Any], numbered: dict[int, Value]) -> bool:
        """Collects the known tensors among the arguments. Returns True if the trace writes to the memory of any."""
        is_traced = False
        for value in values:
            if isinstance(value, Tensor):
                at = _identity(value)
                memory, known = self._memories.get(at), self._tensors.get(id(value))
                if known is not None and known[0]() is value and (known[2] is memory or not at):
                    numbered[id(value)], memory = known[1:]
                is_traced = is_traced or (memory is not None and memory.is_traced)
            elif isinstance(value, (list, tuple)) and self._look_up(value, numbered):
                is_traced = True
        return is_traced

    def _note_fresh(self, result: Any, given: Any) -> None:
        """Records the memory that an operation on constants has allocated."""
        for tensor in tensors_in(result):
            at = _identity(tensor)
            if at and at not in self._fresh and all(at != _identity(one) for one in tensors_in(given)):
                self._fresh[at] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call, unused-ignore]

    def _named(self, value: Any, reads: list[int], numbered: dict[int, Value]) -> Any:
        if isinstance(value, Tensor):
            known = numbered.get(id(value)) or self._value(value)
            reads.append(known.number)
            return known
        if isinstance(value, (list, tuple)):
            return type(value)([self._named(item, reads, numbered) for item in value])
        return value

    def _append(self, facts: _Facts, given: Any, result: Any, writes: tuple[int, ...]) -> None:
        args, kwargs, reads = given
        memory = self.trace.memory
        varies = any(memory(number) in self._varying for number in reads)
        is_sequence = isinstance(result, (tuple, list))
        outputs = result if is_sequence else (result,)
        expected, origin, shapes = None, "", None
        if not is_sequence and not isinstance(result, Tensor) and result is not None:
            if not varies or ACTIVE.audits or facts.is_static:
                return
            expected, origin = result, self.shortcut or _line()
        numbers = tuple([self._result(item, writes) for item in outputs])
        if expected is None and not writes and all(number is None for number in numbers):
            return  # the results are known views
        if varies:
            for number in (*numbers, *writes):
                if number is not None:
                    self._vary(number)
            if facts.is_shaped_by_values and not ACTIVE.audits and expected is None:
                origin, shapes = _line(), tuple(item.shape for item in outputs if isinstance(item, Tensor))
        self.trace.operations.append(
            Operation(
                facts.function, args, kwargs, numbers, is_sequence, writes, expected, shapes, origin, reads, self.query
            )
        )

    def _result(self, item: Any, writes: tuple[int, ...]) -> int | None:
        """Returns the index of a result, or None if it is not a tensor or is a known view that was not overwritten."""
        if not isinstance(item, Tensor):
            return None
        at = _identity(item)
        known = None if at and at not in self._memories else self._known(item)
        if known is None:
            return self._new(item, is_traced=True).number
        return known.number if known.number in writes else None

    # -- constants that are overwritten ---------------------------------------------------------------------------

    def _make_writable(self, tensor: Tensor) -> None:
        """Prepares memory for a traced in-place operation.

        Constants in this memory are copied first. Memory that the computation itself allocated becomes part of the
        trace.
        """
        at = _identity(tensor)
        old = self._memories.get(at)
        if (at not in self._fresh and old is None) or (old is not None and (old.is_traced or old.is_overwritten)):
            return
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        before = tensor.detach().as_strided((size,), (1,), 0).clone()
        for value in [] if old is None else old.views.values():
            shape, stride, offset, dtype, *_ = self.trace.forms[value.number]
            self.trace.constants[value.number] = before.view(dtype).as_strided(shape, stride, offset)
        if old is not None and at not in self._fresh:  # a weight or buffer, which must not be read later
            old.is_overwritten = True
            return
        constant = self._constant(before)
        copy, self.trace.count = self.trace.count, self.trace.count + 1
        self.trace.forms[copy] = _form(before)
        self.trace.operations.append(Operation(aten.clone.default, (constant,), {}, (copy,)))
        self._memories[at] = _Memory(copy, True, {_form(before): Value(copy)}, self._fresh[at], copy)

    def _view_of_copy(self, tensor: Tensor, memory: _Memory, copy: int) -> Value | None:
        form = _form(tensor)
        if form[3] != self.trace.forms[copy][3] or any(form[5:]):
            return None
        value = self._new(tensor, is_traced=True)
        args = (Value(copy), list(form[0]), list(form[1]), form[2])
        self.trace.operations.append(Operation(aten.as_strided.default, args, {}, (value.number,)))
        return value


@dataclass(frozen=True, slots=True, eq=False)
class _Facts:
    """Properties of an operation that determine how it is traced.

    Attributes:
        function: The traced tensor operation.
        writes: Position and name of the overwritten arguments.
        is_recorded: Whether the operation is traced even if it reads only constants.
        makes_memory: Whether the results may be in newly allocated memory.
        is_static: Whether the operation returns numbers that do not depend on values.
        is_shaped_by_values: Whether the shapes of the results depend on values.
    """

    function: Any
    writes: tuple[tuple[int, str], ...]
    is_recorded: bool
    makes_memory: bool
    is_static: bool
    is_shaped_by_values: bool

    def written(self, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
        """Returns the tensors that a call overwrites."""
        values = [args[at] if at < len(args) else kwargs.get(name) for at, name in self.writes]
        return list(tensors_in(values))


_FACTS: dict[int, _Facts] = {}
"""Properties of operations, keyed by ``id()``. Hashing PyTorch operations is slow."""


def _facts(function: Any) -> _Facts:
    known = _FACTS.get(id(function))
    if known is None or known.function is not function:
        known = _FACTS[id(function)] = _facts_of(function)
    return known


def _facts_of(function: Any) -> _Facts:
    schema = function._schema
    arguments = enumerate(schema.arguments)
    writes = [(at, one.name) for at, one in arguments if one.alias_info is not None and one.alias_info.is_write]
    return _Facts(
        function,
        tuple(writes),
        function.overloadpacket in FILLED or draws(function),
        not writes and any(one.alias_info is None for one in schema.returns),
        function in (aten.is_set_to.default, aten.is_same_size.default),
        torch.Tag.dynamic_output_shape in function.tags,
    )


def _line() -> str:
    """Returns the lines of the call stack outside PyTorch at which a value is being read."""
    frame, lines = sys._getframe(1), list[str]()
    while frame is not None and len(lines) < 4:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__:
            lines.append(f"{name.rpartition('/nrm_plugin/')[2]}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(lines)


def _identity(tensor: Tensor) -> int:
    """Returns an id of a tensor's memory, or 0 if the tensor is not strided."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else 0


def _form(tensor: Tensor) -> Any:
    """Returns a key that is equal for tensors with the same elements in the same memory."""
    if tensor.layout is not torch.strided:
        return tensor.shape, None, 0, tensor.dtype, tensor.device
    form = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device
    return (*form, tensor.is_conj(), tensor.is_neg())  # elements may be conjugated or negated only when they are read


class EscapeWatch(TorchFunctionMode):
    """Torch function mode that detects values that leave torch. Computations with them are not traced."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()  # type: ignore[no-untyped-call, unused-ignore]
        self._tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in _ESCAPES:
            self._note(f"values read by Tensor.{name}()", args[:1])
        elif name in _CONVERSIONS:
            self._note("values of tensors in a list, which became a tensor", _list_entries(args))
        return function(*args, **(kwargs or {}))

    def _note(self, reason: str, values: Any) -> None:
        if not ACTIVE.audits and any(self._tracer.varies(tensor) for tensor in tensors_in(values)):
            self._tracer.trace.reasons_not_replayable.append(reason)


def _list_entries(args: Any) -> list[Any]:
    """Returns the list arguments of a function. Torch reads the tensors in them without dispatch."""
    nested = [item for value in args if isinstance(value, tuple) for item in value]
    return [value for value in (*args, *nested) if isinstance(value, list)]


_CONVERSIONS = frozenset(["tensor", "as_tensor", "asarray", "new_tensor", "__getitem__", "__setitem__"])
_ESCAPES = frozenset(["tolist", "numpy", "__array__", "__dlpack__", "apply_", "map_", "map2_"])


__all__ = ["Tracer"]
