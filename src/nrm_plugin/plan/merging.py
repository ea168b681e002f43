"""Merging of operations to remove repeated computations and unnecessary copies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

from .trace import Operation, Trace, Value

aten = torch.ops.aten
_FORWARDED = {
    **dict.fromkeys(map(id, [aten.detach.default, aten.alias.default, aten.lift_fresh.default]), "alias"),
    **dict.fromkeys(
        map(
            id,
            [
                aten.view.default,
                aten._unsafe_view.default,
                aten.expand.default,
                aten.squeeze.dim,
                aten.squeeze.default,
                aten.slice.Tensor,
            ],
        ),
        "view",
    ),
    **dict.fromkeys(
        map(
            id,
            [aten.clone.default, aten._lazy_clone.default, aten.lift_fresh_copy.default, aten._to_copy.default],
        ),
        "copy",
    ),
    id(aten.mul.Tensor): "product",
}
"""Operations that may return their first argument, keyed by ``id()``. Hashing PyTorch operations is slow."""


class Merger:
    """Rewrites a trace so that operations which compute identical tensors are executed only once.

    Args:
        trace: The trace (list of tensor operations) to simplify.
        constants: The constants, keyed by index.
        results: Indices of the result tensors.
    """

    def __init__(self, trace: Trace, constants: dict[int, Tensor], results: list[int]) -> None:
        self.trace, self.constants, self._results = trace, constants, results
        self._same: dict[int, int] = {}
        self._versions: Counter[int] = Counter()
        self._writes: Counter[int] = Counter()
        self._sizes: Counter[int] = Counter()
        self._given = {*trace.constants, *trace.placeholders}

    def merged(self, operations: list[Operation]) -> tuple[list[Operation], list[int]]:
        """Returns the remaining operations and the indices of the results."""
        memory = self.trace.memory
        self._writes = Counter(memory(number) for one in operations for number in one.writes)
        made = {number for one in operations for number in one.results if number is not None}
        self._sizes = Counter(memory(number) for number in made if not self._is_same_view(number))
        known: dict[Any, Operation] = {}
        rest = []
        for old in operations:
            one = old.renamed(self._now) if self._same else old
            if self._is_settled(one) or self._is_forwarded(one):
                continue
            key = self._key(one)
            earlier = None if key is None else known.get(key)
            if earlier is not None:
                self._same |= {
                    new: first
                    for new, first in zip(one.results, earlier.results, strict=True)
                    if new is not None and first is not None and new != first
                }
                continue
            if key is not None:
                known[key] = one
            for number in one.writes:
                self._versions[memory(number)] += 1
            rest.append(one)
        return rest, [self._now(number) for number in self._results]

    def _is_same_view(self, number: int) -> bool:
        """Returns True if a tensor is a view of another one, with the same shape and strides."""
        root = self.trace.memory(number)
        return root != number and self.trace.forms[root] == self.trace.forms[number]

    def _now(self, number: int) -> int:
        while number in self._same:
            number = self._same[number]
        return number

    def _is_settled(self, one: Operation) -> bool:
        """Returns True if a value read by Python is the same in every run and need not be verified."""
        if one.expected is None:
            return False
        if one.function is aten.equal.default and one.args[0] == one.args[1]:
            return bool(one.expected)
        return all(number in self.constants for number in one.reads)

    def _is_forwarded(self, one: Operation) -> bool:
        """Replaces the result of an operation with its argument if the two are identical. Returns True if it did."""
        if one.function is aten.copy_.default:
            return self._is_moved(one)
        kind = _FORWARDED.get(id(one.function))
        if kind is None:
            return False
        number = one.results[0] if len(one.results) == 1 else None
        if number is None or one.writes or one.shapes is not None:
            return False
        source = next(iter(one.reads), None)
        if source is None or not self._is_unchanged(one, kind, source, number):
            return False
        if number != source:
            self._same[number] = source
        return True

    def _is_unchanged(self, one: Operation, kind: str, source: int, number: int) -> bool:
        if kind == "alias":
            return True
        if self.trace.forms[source] != self.trace.forms[number]:
            return False
        if kind == "view":
            return True
        is_free = not self._is_written_later(source) and not self._is_written_later(number)
        return is_free and (kind == "copy" or (one.args[1] == 1 and not isinstance(one.args[1], Value)))

    def _is_moved(self, one: Operation) -> bool:
        """Replaces a tensor that a copy overwrites entirely with the source of the copy. Returns True if it did."""
        target, source = one.args[0], one.args[1]
        if target == source:
            return True  # the target is a copy of the source and was replaced by it
        if not isinstance(source, Value) or self.trace.forms[target.number][:2] != self.trace.forms[source.number][:2]:
            return False
        memory = self.trace.memory
        at = memory(target.number)
        if (
            at in self._given
            or at != target.number
            or memory(source.number) in self._given
            or source.number in self.constants
        ):
            return False
        if self.trace.forms[target.number][3:] != self.trace.forms[source.number][3:] or self._sizes[at] > 1:
            return False
        if self._writes[at] - self._versions[at] > 1 or self._is_written_later(source.number):
            return False
        self._versions[at] += 1
        self._same[target.number] = source.number
        return True

    def _is_written_later(self, number: int) -> bool:
        memory = self.trace.memory(number)
        return self._writes[memory] > self._versions[memory]

    def _key(self, one: Operation) -> Any:
        """Returns a key that determines the results of an operation, or None if the operation must not be merged."""
        memory = self.trace.memory
        if one.writes or one.shapes is not None:
            return None
        read = {memory(number) for number in one.reads}
        made = {memory(number) for number in one.results if number is not None}
        if any(self._writes[number] for number in made - read):  # the result is allocated here and overwritten later
            return None
        versions = tuple(self._versions[memory(number)] for number in one.reads)
        try:
            key = (id(one.function), _frozen(one.args), _frozen(one.kwargs) if one.kwargs else None, versions)
            hash(key)
        except TypeError:
            return None
        return key


def _frozen(value: Any) -> Any:
    kind = value.__class__
    if kind is Value:
        return value
    if kind is tuple or kind is list:
        return (kind, *map(_frozen, value))
    if kind is dict:
        return tuple((key, _frozen(item)) for key, item in sorted(value.items()))
    return (kind, value)


__all__ = ["Merger"]
