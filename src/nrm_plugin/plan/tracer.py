"""Tracing of the tensor operations that torch executes below autograd, whatever code calls them."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..model.nested_tensors import tensors_in
from ..model.trace_guards import ACTIVE
from .operators import FACTS, Facts, facts_of
from .trace import Operation, Trace, Value, tensors_among

aten = torch.ops.aten


@dataclass(slots=True, eq=False)
class _Memory:
    """Block of memory that several tensors of a trace share, as a tensor and its views do.

    Attributes:
        root: Index of the first tensor in the block.
        is_traced: Whether operations of the trace write to the block. Otherwise, it is constant.
        views: Indices of the known tensors in this memory, keyed by shape, strides, offset and dtype.
        reference: A weak reference that prevents the id of the memory from being reused.
        varies: Whether the block depends on a placeholder.
        copy: Index of a flat tensor of the whole memory, created when a constant is overwritten, or None.
        is_overwritten: Whether the block contains an overwritten weight or buffer. Constants in it are then copies.
    """

    root: int
    is_traced: bool
    views: dict[Any, int]
    reference: StorageWeakRef | None
    varies: bool = False
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
        self._tensors: dict[int, tuple[weakref.ref[Tensor], int, _Memory]] = {}
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
        number, memory = self._new(tensor, True, _identity(tensor))
        self.trace.placeholders.append(number)
        memory.varies = True
        return number

    def number(self, tensor: Tensor) -> int:
        """Returns the index of a tensor. An unknown tensor is added as a constant."""
        known = self._known(tensor, _identity(tensor))
        return self._constant(tensor) if known is None else known

    def varies(self, tensor: Tensor) -> bool:
        """Returns True if a tensor depends on a placeholder."""
        memory = self._memory_of(tensor)
        return memory is not None and memory.varies

    def _memory_of(self, tensor: Tensor) -> _Memory | None:
        at = _identity(tensor)
        if at:
            return self._memories.get(at)
        known = self._tensors.get(id(tensor))
        return known[2] if known is not None and known[0]() is tensor else None

    def _constant(self, tensor: Tensor) -> int:
        number, _ = self._new(tensor, False, _identity(tensor))
        # Detached, since a tensor may be assigned new memory later: canonizers restore weights and buffers through
        # ``.data``.
        self.trace.constants[number] = tensor.detach()
        return number

    def _known(self, tensor: Tensor, at: int) -> int | None:
        """Returns the index of a tensor of the trace, or None if it is unknown.

        Args:
            tensor: The tensor.
            at: Id of its memory; see :func:`_identity`.
        """
        memory = self._memories.get(at)
        known = self._tensors.get(id(tensor))
        # A tensor object may have been assigned other memory since.
        if known is not None and known[0]() is tensor and (known[2] is memory or not at):
            return known[1]
        if memory is None:
            return None
        # Some PyTorch functions, such as ``nn.Parameter``, create a new object for a tensor without dispatch.
        view = memory.views.get(_form(tensor))
        if view is None and memory.copy is not None:
            view = self._view_of_copy(tensor, memory, memory.copy)
        if view is not None:
            self._tensors[id(tensor)] = (weakref.ref(tensor), view, memory)
        return view

    def _new(self, tensor: Tensor, is_traced: bool, at: int) -> tuple[int, _Memory]:
        """Adds a tensor to the trace. Returns its index and its memory."""
        trace = self.trace
        number = trace.count
        trace.count += 1
        trace.forms[number] = form = _form(tensor)
        memory = self._memories.get(at)
        if memory is None:
            reference = StorageWeakRef(tensor.untyped_storage()) if at else None  # type: ignore[no-untyped-call, unused-ignore]
            memory = _Memory(number, is_traced, {form: number}, reference)
            if at:
                self._memories[at] = memory
        else:
            trace.aliases[number] = memory.root
            memory.views[form] = number
            if not is_traced and memory.is_traced:
                trace.reasons_not_replayable.append(
                    "a tensor shares memory with computed values in a way that was not traced"
                )
        self._tensors[id(tensor)] = (weakref.ref(tensor), number, memory)
        return number, memory

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
            facts = FACTS.get(id(function)) or facts_of(function)
            kwargs = kwargs or {}
            given: list[Tensor] = []
            tensors_among(args, given)
            if kwargs:
                tensors_among(kwargs.values(), given)
            numbers, is_traced, varies = self._looked_up(given)
            if not is_traced and self._is_constant(facts, args, kwargs):
                result = function(*args, **kwargs)
                if facts.makes_memory:
                    self._note_fresh(result, given)
                return result
            writes: tuple[int, ...] = ()
            if facts.writes:
                numbers, writes = self._written(_overwritten(facts, args, kwargs), given, numbers, varies)
            reads = tuple([self.number(t) if n is None else n for n, t in zip(numbers, given, strict=True)])
            result = function(*args, **kwargs)
            if facts.forwarding == "alias":
                self._note_alias(result, given[0], reads[0])
            else:
                self._append(facts, (args, kwargs, reads, varies), result, writes)
            return result

    def _looked_up(self, given: list[Tensor]) -> tuple[list[int | None], bool, bool]:
        """Returns what is known of the tensors among the arguments of an operation.

        Returns:
            The indices of known tensor objects, whether the trace writes to the memory of any tensor, and whether the
            memory of any tensor depends on a placeholder.
        """
        numbers: list[int | None] = []
        is_traced = varies = False
        strided, memories, tensors = torch.strided, self._memories, self._tensors
        for tensor in given:
            at = tensor.untyped_storage()._cdata if tensor.layout is strided else 0  # as in _identity
            memory, known = memories.get(at), tensors.get(id(tensor))
            if known is not None and known[0]() is tensor and (known[2] is memory or not at):
                numbers.append(known[1])
                memory = known[2]
            else:
                numbers.append(None)
            if memory is not None:
                is_traced = is_traced or memory.is_traced
                varies = varies or memory.varies
        return numbers, is_traced, varies

    def _written(
        self, written: list[Tensor], given: list[Tensor], numbers: list[int | None], varies: bool
    ) -> tuple[list[int | None], tuple[int, ...]]:
        """Prepares memory that an operation overwrites.

        Returns:
            The indices of known tensors among the arguments and the indices of the overwritten tensors.
        """
        if any([self._make_writable(tensor) for tensor in written]):
            numbers = [None] * len(given)  # tensors in copied memory have new indices
        writes = []
        for tensor in written:
            number = self.number(tensor)
            memory = self._memory_of(tensor)
            if varies and memory is not None:
                memory.varies = True
            if number not in writes:
                writes.append(number)
        return numbers, tuple(writes)

    def _is_constant(self, facts: Facts, args: Any, kwargs: Any) -> bool:
        """Returns True if an operation reads only constants and need not be traced."""
        if facts.is_recorded:
            return False
        if not facts.writes:
            return True
        identities = [_identity(tensor) for tensor in _overwritten(facts, args, kwargs)]
        return all(at in self._fresh and at not in self._memories for at in identities)

    def _note_fresh(self, result: Any, given: list[Tensor]) -> None:
        """Records the memory that an operation on constants has allocated."""
        for tensor in (result,) if result.__class__ is Tensor else tensors_in(result):
            at = _identity(tensor)
            if at and at not in self._fresh and all(at != _identity(one) for one in given):
                self._fresh[at] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call, unused-ignore]

    def _note_alias(self, result: Tensor, source: Tensor, number: int) -> None:
        """Gives the result of an operation that always returns its argument the index of this argument."""
        self._tensors[id(result)] = (weakref.ref(result), number, self._tensors[id(source)][2])

    def _append(self, facts: Facts, given: Any, result: Any, writes: tuple[int, ...]) -> None:
        args, kwargs, reads, varies = given
        is_tensor = isinstance(result, Tensor)
        is_sequence = not is_tensor and isinstance(result, (tuple, list))
        outputs = result if is_sequence else (result,)
        expected, origin, shapes = None, "", None
        if not is_tensor and not is_sequence and result is not None:
            if not varies or ACTIVE.audits or facts.is_static:
                return
            expected, origin = result, self.shortcut or _line()
        if is_tensor:
            numbers: tuple[int | None, ...] = (self._result(result, writes, varies),)
        else:
            numbers = tuple([self._result(item, writes, varies) for item in outputs])
        if expected is None and not writes and numbers.count(None) == len(numbers):
            return  # the results are known views
        if varies and facts.is_shaped_by_values and not ACTIVE.audits and expected is None:
            origin, shapes = _line(), tuple(item.shape for item in outputs if isinstance(item, Tensor))
        call = self.trace.call(facts, args, kwargs)
        self.trace.operations.append(
            Operation(call, reads, numbers, is_sequence, writes, expected, shapes, origin, self.query)
        )

    def _result(self, item: Any, writes: tuple[int, ...], varies: bool) -> int | None:
        """Returns the index of a result, or None if it is not a tensor or is a known view that was not overwritten."""
        if not isinstance(item, Tensor):
            return None
        at = _identity(item)
        known = None if at and at not in self._memories else self._known(item, at)
        if known is None:
            number, memory = self._new(item, True, at)
            memory.varies = memory.varies or varies
            return number
        return known if known in writes else None

    # -- constants that are overwritten ---------------------------------------------------------------------------

    def _make_writable(self, tensor: Tensor) -> bool:
        """Prepares memory for a traced in-place operation. Returns True if indices of tensors may have changed.

        Constants in this memory are copied first. Memory that the computation itself allocated becomes part of the
        trace.
        """
        at = _identity(tensor)
        old = self._memories.get(at)
        if (at not in self._fresh and old is None) or (old is not None and (old.is_traced or old.is_overwritten)):
            return False
        size = tensor.untyped_storage().nbytes() // tensor.element_size()
        before = tensor.detach().as_strided((size,), (1,), 0).clone()
        for number in [] if old is None else old.views.values():
            shape, stride, offset, dtype, *_ = self.trace.forms[number]
            self.trace.constants[number] = before.view(dtype).as_strided(shape, stride, offset)
        if old is not None and at not in self._fresh:  # a weight or buffer, which must not be read later
            old.is_overwritten = True
            return True
        constant = self._constant(before)
        copy, self.trace.count = self.trace.count, self.trace.count + 1
        self.trace.forms[copy] = _form(before)
        self.trace.operations.append(self.trace.operation(aten.clone.default, (Value(constant),), (copy,)))
        self._memories[at] = _Memory(copy, True, {_form(before): copy}, self._fresh[at], copy=copy)
        return True

    def _view_of_copy(self, tensor: Tensor, memory: _Memory, copy: int) -> int | None:
        form = _form(tensor)
        if form[3] != self.trace.forms[copy][3] or any(form[5:]):
            return None
        number, _ = self._new(tensor, True, _identity(tensor))
        args = (Value(copy), list(form[0]), list(form[1]), form[2])
        self.trace.operations.append(self.trace.operation(aten.as_strided.default, args, (number,)))
        return number


def _overwritten(facts: Facts, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """Returns the tensors that a call overwrites."""
    values = [args[at] if at < len(args) else kwargs.get(name) for at, name in facts.writes]
    return list(tensors_in(values))


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
        if name in _WATCHED:
            if name in _ESCAPES:
                self._note(f"values read by Tensor.{name}()", args[:1])
            else:
                self._note("values of tensors in a list, which became a tensor", _list_entries(args))
        return function(*args, **kwargs) if kwargs else function(*args)

    def _note(self, reason: str, values: Any) -> None:
        if not ACTIVE.audits and any(self._tracer.varies(tensor) for tensor in tensors_in(values)):
            self._tracer.trace.reasons_not_replayable.append(reason)


def _list_entries(args: Any) -> list[Any]:
    """Returns the list arguments of a function. Torch reads the tensors in them without dispatch."""
    nested = [item for value in args if isinstance(value, tuple) for item in value]
    return [value for value in (*args, *nested) if isinstance(value, list)]


_CONVERSIONS = frozenset(["tensor", "as_tensor", "asarray", "new_tensor", "__getitem__", "__setitem__"])
_ESCAPES = frozenset(["tolist", "numpy", "__array__", "__dlpack__", "apply_", "map_", "map2_"])
_WATCHED = _CONVERSIONS | _ESCAPES


__all__ = ["Tracer"]
