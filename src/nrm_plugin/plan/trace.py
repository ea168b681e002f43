"""Traces: the tensor operations executed in a computation, as a flat list, with an index for every tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


class Value:
    """Placeholder in the arguments of a traced operation for the tensor with index ``number``."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __eq__(self, other: object) -> bool:
        return other.__class__ is Value and other.number == self.number

    def __hash__(self) -> int:
        return self.number

    def __repr__(self) -> str:
        return f"v{self.number}"


UNKNOWN: Any = object()


@dataclass(slots=True)
class Operation:
    """One tensor operation in a trace.

    Attributes:
        function: The torch operator that was called.
        args: Positional arguments, with a :class:`Value` in place of each tensor.
        kwargs: Keyword arguments, with a :class:`Value` in place of each tensor.
        results: Indices of the returned tensors, with None in place of other return values.
        is_sequence: Whether the operation returned several tensors.
        writes: Indices of the overwritten tensors.
        expected: Python number or boolean that the operation returned during recording, or None if it returned tensors.
            A replay must reproduce it, because the computation may depend on it.
        shapes: Shapes of the results if they depend on values, or None. A replay must reproduce them.
        origin: Where ``expected`` or ``shapes`` was needed: the shortcut (a computation that is valid only under a
            condition on values) whose condition was evaluated, or the line of code that read the value.
        reads: Indices of the tensors among the arguments.
        query: Index of the query that executed the operation, or 0 for the recording.
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
    reads: tuple[int, ...] = UNKNOWN
    query: int = 0

    def __post_init__(self) -> None:
        if self.reads is UNKNOWN:
            self.reads = tuple(numbers_in((*self.args, *self.kwargs.values())))

    def renamed(self, new: Callable[[int], int]) -> Operation:
        """Returns the operation with new indices for the tensors that it reads. Its results keep their indices."""
        numbers = {number: new(number) for number in self.reads}
        if all(number == other for number, other in numbers.items()):
            return self

        def changed(value: Any) -> Any:
            return Value(numbers[value.number]) if value.__class__ is Value else value

        args, kwargs = mapped(changed, (self.args, self.kwargs))
        writes = tuple(numbers[number] for number in self.writes)
        results = tuple(numbers[n] if n in self.writes else n for n in self.results)
        facts = (self.expected, self.shapes, self.origin, UNKNOWN, self.query)
        return Operation(self.function, args, kwargs, results, self.is_sequence, writes, *facts)


def needed(operations: Sequence[Operation], results: Iterable[int], memory: Callable[[int], int]) -> list[Operation]:
    """Returns the operations needed to compute the given results, or the values that Python reads.

    Args:
        operations: The operations to filter.
        results: Indices of the result tensors.
        memory: Function that identifies the memory of a tensor; see :meth:`Trace.memory`.
    """
    live: set[int | None] = set(results)
    memories = {memory(number) for number in live if number is not None}
    kept: list[Operation] = []
    for one in reversed(operations):
        if (
            not live.isdisjoint(one.results)
            or one.expected is not None
            or one.shapes is not None
            or (one.writes and not memories.isdisjoint(map(memory, one.writes)))
        ):
            kept.append(one)
            live.update(one.reads)
            memories.update(map(memory, one.reads))
    return kept[::-1]


def numbers_in(values: Iterable[Any]) -> Iterator[int]:
    """Yields the indices of the tensors in nested arguments."""
    for value in values:
        if value.__class__ is Value:
            yield value.number
        elif isinstance(value, (tuple, list)):
            yield from numbers_in(value)


def mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Applies a function to every leaf of nested arguments."""
    if isinstance(value, (tuple, list)):
        return type(value)([mapped(change, item) for item in value])
    if isinstance(value, dict):
        return {key: mapped(change, item) for key, item in value.items()}
    return change(value)


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
    """

    operations: list[Operation] = field(default_factory=list)
    constants: dict[int, Tensor] = field(default_factory=dict)
    placeholders: list[int] = field(default_factory=list)
    forms: dict[int, Any] = field(default_factory=dict)
    aliases: dict[int, int] = field(default_factory=dict)
    count: int = 0
    reasons_not_replayable: list[str] = field(default_factory=list)

    def memory(self, number: int) -> int:
        """Returns the index of the first tensor that may share memory with a tensor. It identifies the memory."""
        while number in self.aliases:
            number = self.aliases[number]
        return number


FILLED = frozenset(
    getattr(torch.ops.aten, name)
    for name in """
    new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like zeros ones full empty empty_strided
    new_empty_strided
    """.split()
)
"""Operations that create tensors and read at most the shape of an argument."""


def is_drawn(one: Operation) -> bool:
    """Returns True if an operation draws random numbers."""
    return draws(one.function)


def draws(function: Any) -> bool:
    """Returns True if a torch operator draws random numbers."""
    return torch.Tag.nondeterministic_seeded in function.tags and not str(function).startswith(_DETERMINISTIC)


_DETERMINISTIC = ("aten._scaled_dot_product", "aten.native_dropout")
"""Operations that draw random numbers only in training mode. Measures are computed in evaluation mode."""
