"""Traces: the tensor operations executed in a computation, as a flat list, with an index for every tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .operators import Facts, facts_of


class Value:
    """Placeholder in the arguments of a traced operation for the tensor with index ``number``."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __repr__(self) -> str:
        return f"v{self.number}"


HOLE: Any = type("Hole", (), {"__slots__": (), "__repr__": lambda self: "·"})()
"""Placeholder for a tensor in the arguments of a :class:`Call`."""

_PLAIN = frozenset(
    [int, bool, float, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Generator]
)
"""Types of arguments that are not tensors and contain none."""


@dataclass(slots=True, eq=False)
class Call:
    """A torch operator and its arguments except tensors. All equal calls of a trace are the same object.

    Attributes:
        facts: Properties of the operator.
        args: Positional arguments, with :data:`HOLE` in place of each tensor.
        kwargs: Keyword arguments, with :data:`HOLE` in place of each tensor.
        is_comparable: Whether equal calls are the same object. False if an argument cannot be hashed.
    """

    facts: Facts
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    is_comparable: bool = True

    def arguments(self, tensors: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns the positional and keyword arguments with the given items in place of tensors."""
        items = iter(tensors)
        args = tuple([_filled(value, items) for value in self.args])
        return args, {key: _filled(value, items) for key, value in self.kwargs.items()}


def _filled(value: Any, items: Iterator[Any]) -> Any:
    if value is HOLE:
        return next(items)
    if isinstance(value, (list, tuple)):
        return type(value)([_filled(item, items) for item in value])
    return value


@dataclass(slots=True, eq=False)
class Operation:
    """One tensor operation in a trace.

    Attributes:
        call: The operator and its arguments except tensors.
        reads: Indices of the tensors among the arguments, in order.
        results: Indices of the returned tensors, with None in place of other return values.
        is_sequence: Whether the operation returned several tensors.
        writes: Indices of the overwritten tensors.
        expected: Python number or boolean that the operation returned during recording, or None if it returned tensors.
            A replay must reproduce it, because the computation may depend on it.
        shapes: Shapes of the results if they depend on values, or None. A replay must reproduce them.
        origin: Where ``expected`` or ``shapes`` was needed: the shortcut (a computation that is valid only under a
            condition on values) whose condition was evaluated, or the line of code that read the value.
        query: Index of the query that executed the operation, or 0 for the recording.
    """

    call: Call
    reads: tuple[int, ...]
    results: tuple[int | None, ...]
    is_sequence: bool = False
    writes: tuple[int, ...] = ()
    expected: Any = None
    shapes: tuple[torch.Size, ...] | None = None
    origin: str = ""
    query: int = 0

    @property
    def function(self) -> Any:
        """The torch operator that was called."""
        return self.call.facts.function

    @property
    def args(self) -> tuple[Any, ...]:
        """Positional arguments, with a :class:`Value` in place of each tensor."""
        return self.call.arguments(map(Value, self.reads))[0]

    def changed(
        self,
        reads: tuple[int, ...],
        results: tuple[int | None, ...],
        writes: tuple[int, ...],
        call: Call | None = None,
    ) -> Operation:
        """Returns the operation with other tensors."""
        facts = (self.expected, self.shapes, self.origin, self.query)
        return Operation(call or self.call, reads, results, self.is_sequence, writes, *facts)

    def renamed(self, new: dict[int, int]) -> Operation:
        """Returns the operation with new indices for the tensors that it reads. Its results keep their indices."""
        reads = tuple([new.get(number, number) for number in self.reads])
        if not self.writes:
            return self.changed(reads, self.results, ())
        writes = tuple([new.get(number, number) for number in self.writes])
        results = tuple([new.get(n, n) if n in self.writes else n for n in self.results])
        return self.changed(reads, results, writes)


def needed(operations: Sequence[Operation], results: Iterable[int], roots: Sequence[int]) -> list[Operation]:
    """Returns the operations needed to compute the given results, or the values that Python reads.

    Args:
        operations: The operations to filter.
        results: Indices of the result tensors.
        roots: Number of the memory of each tensor; see :meth:`Trace.roots`.
    """
    live: set[int | None] = set(results)
    memories = {roots[number] for number in live if number is not None}
    kept: list[Operation] = []
    root = roots.__getitem__
    for one in reversed(operations):
        if (
            not live.isdisjoint(one.results)
            or (one.writes and not memories.isdisjoint(map(root, one.writes)))
            or one.expected is not None
            or one.shapes is not None
        ):
            kept.append(one)
            live.update(one.reads)
            memories.update(map(root, one.reads))
    kept.reverse()
    return kept


def tensors_among(values: Iterable[Any], found: list[Any]) -> None:
    """Appends the tensors, or their placeholders, among the arguments of an operator to a list."""
    for value in values:
        kind = value.__class__
        if kind is Tensor or kind is Value:
            found.append(value)
        elif kind is list or kind is tuple:
            if value and value[0].__class__ is not int:  # an operator has no list of both numbers and tensors
                tensors_among(value, found)
        elif kind not in _PLAIN and isinstance(value, Tensor):
            found.append(value)


def argument_key(value: Any) -> Any:
    """Returns a hashable key of an argument in which all tensors are equal."""
    kind = value.__class__
    if kind is int or kind is bool:
        return (kind, value)
    if value is None:
        return None
    if kind is Value or kind is Tensor:
        return HOLE
    if kind is float:
        return (kind, value.hex())  # 0.0 equals -0.0
    if kind is list or kind is tuple:
        if value and value[0].__class__ is int:
            return (kind, *value)
        return (kind, *[argument_key(item) for item in value])
    return HOLE if value is HOLE or isinstance(value, Tensor) else (kind, value)


def _holed(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)([_holed(item) for item in value])
    return HOLE if value.__class__ is Value or isinstance(value, Tensor) else value


@dataclass
class Trace:
    """Tensor operations executed in a computation, which can be replayed for other input values.

    Attributes:
        operations: The operations, in order.
        constants: Tensors that are the same in every replay, keyed by index.
        placeholders: Indices of the tensors that every replay supplies, such as the inputs.
        forms: Shape, strides, offset, dtype and device of each tensor, and whether it is conjugated or negated.
        aliases: Index of the earlier tensor with which each tensor may share memory.
        count: Number of tensors.
        reasons_not_replayable: Reasons why the operations cannot be replayed for other values.
        calls: The distinct calls of the operations, keyed by operator and arguments.
    """

    operations: list[Operation] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    placeholders: list[int] = field(default_factory=list)
    forms: dict[int, Any] = field(default_factory=dict)
    aliases: dict[int, int] = field(default_factory=dict)
    count: int = 0
    reasons_not_replayable: list[str] = field(default_factory=list)
    calls: dict[Any, Call] = field(default_factory=dict)

    def memory(self, number: int) -> int:
        """Returns the index of the first tensor that may share memory with a tensor. It identifies the memory."""
        while number in self.aliases:
            number = self.aliases[number]
        return number

    def roots(self) -> list[int]:
        """Returns :meth:`memory` of all tensors, in order of their indices."""
        roots = list(range(self.count))
        for number in self.aliases:
            roots[number] = self.memory(number)
        return roots

    def call(self, facts: Facts, args: Sequence[Any], kwargs: dict[str, Any]) -> Call:
        """Returns the call of an operator with the given arguments, whatever tensors are among them."""
        key: Any = [id(facts.function), *[HOLE if v.__class__ is Tensor else argument_key(v) for v in args]]
        if kwargs:
            key.append(tuple([(name, argument_key(value)) for name, value in sorted(kwargs.items())]))
        key = tuple(key)
        try:
            known = self.calls.get(key)
        except TypeError:
            known, key = None, None
        if known is None:
            known = Call(facts, _holed(tuple(args)), {name: _holed(value) for name, value in kwargs.items()})
            if key is None:
                known.is_comparable = False
            else:
                self.calls[key] = known
        return known

    def operation(self, function: Any, args: Sequence[Any], results: tuple[int | None, ...]) -> Operation:
        """Returns an operation, given its arguments with a :class:`Value` in place of each tensor."""
        found: list[Value] = []
        tensors_among(args, found)
        return Operation(self.call(facts_of(function), args, {}), tuple([one.number for one in found]), results)


__all__ = ["HOLE", "Call", "Operation", "Trace", "Value", "argument_key", "needed", "tensors_among"]
