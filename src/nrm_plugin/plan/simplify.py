"""Simplification of traces: what is computed from constants is computed once, and what nobody reads is not computed.

A trace may overwrite tensors. Tensors that share memory form a group; an operation on a group that is overwritten keeps
its place among the operations of that group, and is neither merged nor computed beforehand.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .trace import Operation, Trace, Value

aten = torch.ops.aten
_SAME = frozenset([aten.detach.default, aten.alias.default, aten.lift_fresh.default])
"""Operations that return their first argument."""
_VIEWS = frozenset(
    [aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.squeeze.dim, aten.squeeze.default]
)
_COPIES = frozenset([aten.clone.default, aten._lazy_clone.default, aten.lift_fresh_copy.default])
_CREATED_CHEAPLY = 1 << 14
"""Largest number of entries of a tensor without inputs, such as zeros, that is stored rather than made again."""


class Simplifier:
    """The operations of a trace that some results depend on, simplified.

    Args:
        trace: The trace.
        results: The numbers of the tensors that are wanted.

    Attributes:
        operations: The remaining operations, in order.
        constants: The constants that they read, by number.
        results: The numbers of the wanted tensors.
    """

    def __init__(self, trace: Trace, results: list[int]) -> None:
        self.trace = trace
        self._same: dict[int, int] = {}
        self._shapes: dict[int, tuple[int, ...]] = {}
        self.constants: dict[int, Tensor] = dict(trace.constants)
        operations = self._live(trace.operations, results)
        self._overwritten = {trace.memory(number) for one in operations for number in one.writes}
        operations = self._folded(operations)
        operations = self._merged(operations)
        self.results = [self._now(number) for number in results]
        self.operations = self._live(operations, self.results)
        read = {number for one in self.operations for number in one.reads} | set(self.results)
        self.constants = {number: value for number, value in self.constants.items() if number in read}

    def _now(self, number: int) -> int:
        while number in self._same:
            number = self._same[number]
        return number

    def _is_overwritten(self, number: int) -> bool:
        return self.trace.memory(number) in self._overwritten

    def _live(self, operations: list[Operation], results: list[int]) -> list[Operation]:
        """Returns the operations on which the results or a number that the computation read depend."""
        live = {self.trace.memory(number) for number in results}
        kept: list[Operation] = []
        for one in reversed(operations):
            made = {self.trace.memory(number) for number in (*one.results, *one.writes) if number is not None}
            if one.expected is not None or one.shapes is not None or made & live:
                kept.append(one)
                live.update(self.trace.memory(number) for number in one.reads)
        return kept[::-1]

    # -- constants ------------------------------------------------------------------------------------------------

    def _folded(self, operations: list[Operation]) -> list[Operation]:
        """Computes what depends on constants only."""
        varying = set(self.trace.placeholders)
        groups = {self.trace.memory(number) for number in varying}
        changed = True
        marks = [False] * len(operations)
        while changed:  # an overwritten group varies as a whole, also before it is overwritten
            changed = False
            for index, one in enumerate(operations):
                if marks[index]:
                    continue
                read = set(one.reads)
                touched = {self.trace.memory(n) for n in (*read, *(r for r in one.results if r is not None))}
                if read & varying or touched & groups:
                    marks[index] = changed = True
                    varying.update(number for number in one.results if number is not None)
                    groups.update(self.trace.memory(number) for number in one.writes)
        rest = []
        for varies, one in zip(marks, operations, strict=True):
            if varies or self._is_cheap(one):
                rest.append(one)
            else:
                self._compute(one)
        return rest

    def _is_cheap(self, one: Operation) -> bool:
        """Whether an operation only fills a large tensor, which need not be stored."""
        return False

    def _compute(self, one: Operation) -> None:
        args, kwargs = self._with_constants(one.args), self._with_constants(one.kwargs)
        with torch.no_grad():
            result = one.function(*args, **kwargs)
        for number, item in zip(one.results, result if one.is_sequence else [result], strict=True):
            if number is not None:
                self.constants[number] = item

    def _with_constants(self, value: Any) -> Any:
        if isinstance(value, Value):
            return self.constants[value.number]
        if isinstance(value, (tuple, list)):
            return type(value)([self._with_constants(item) for item in value])
        if isinstance(value, dict):
            return {key: self._with_constants(item) for key, item in value.items()}
        return value

    # -- repeated operations --------------------------------------------------------------------------------------

    def _merged(self, operations: list[Operation]) -> list[Operation]:
        """Drops operations that return one of their arguments, or what another operation has computed before."""
        known: dict[Any, Operation] = {}
        rest = []
        for one in operations:
            one = self._renamed(one)
            same = self._same_as(one)
            if same is not None and one.results[0] is not None:
                self._same[one.results[0]] = same
                continue
            key = None if self._has_effects(one) else _key(one)
            earlier = known.get(key) if key is not None else None
            if earlier is not None:
                for number, other in zip(one.results, earlier.results, strict=True):
                    if number is not None and other is not None:
                        self._same[number] = other
                continue
            if key is not None:
                known[key] = one
            rest.append(one)
        return rest

    def _renamed(self, one: Operation) -> Operation:
        def renamed(value: Any) -> Any:
            if isinstance(value, Value):
                return Value(self._now(value.number))
            if isinstance(value, (tuple, list)):
                return type(value)([renamed(item) for item in value])
            if isinstance(value, dict):
                return {key: renamed(item) for key, item in value.items()}
            return value

        return Operation(
            one.function,
            renamed(one.args),
            renamed(one.kwargs),
            one.results,
            one.is_sequence,
            tuple(self._now(number) for number in one.writes),
            one.expected,
            one.shapes,
            one.origin,
        )

    def _same_as(self, one: Operation) -> int | None:
        """Returns the argument that an operation returns, if it does."""
        if one.function in _SAME:
            return next(one.reads)
        if one.function in _COPIES and one.results[0] is not None:
            source = next(one.reads)
            is_free = not self._is_overwritten(source) and not self._is_overwritten(one.results[0])
            return source if is_free and self._has_form_of(one.results[0], source) else None
        if one.function in _VIEWS and one.results[0] is not None:
            source = next(one.reads)
            return source if self._has_form_of(one.results[0], source) else None
        if one.function == aten._to_copy.default and one.results[0] is not None:
            source = next(one.reads)
            is_free = not self._is_overwritten(source) and not self._is_overwritten(one.results[0])
            return source if is_free and self._has_form_of(one.results[0], source) else None
        return None

    def _has_form_of(self, one: int, other: int) -> bool:
        return bool(self.trace.forms[one] == self.trace.forms[other])

    def _has_effects(self, one: Operation) -> bool:
        return (
            bool(one.writes)
            or one.shapes is not None
            or any(self._is_overwritten(number) for number in (*one.reads, *one.results) if number is not None)
        )


def _key(one: Operation) -> Any:
    try:
        key = (one.function, _frozen(one.args), _frozen(one.kwargs))
        hash(key)
    except TypeError:
        return None
    return key


def _frozen(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    return (type(value).__name__, value)
