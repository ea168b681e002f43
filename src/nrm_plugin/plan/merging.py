"""Merging of operations to remove repeated computations and unnecessary copies."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .operators import Forwarding
from .trace import HOLE, Operation, Trace

aten = torch.ops.aten


class Merger:
    """Rewrites a trace so that operations which compute identical tensors are executed only once.

    Args:
        trace: The trace (list of tensor operations) to simplify.
        constants: The constants, keyed by index.
        results: Indices of the result tensors.
    """

    def __init__(self, trace: Trace, constants: dict[int, Tensor], results: list[int]) -> None:
        self.trace, self.constants, self._results = trace, constants, results
        self._roots = trace.roots()
        self._operations: list[Operation] = []
        self._same: dict[int, int] = {}
        self._versions: Counter[int] = Counter()
        self._writes: Counter[int] = Counter()
        self._given = {*trace.constants, *trace.placeholders}

    def merged(self, operations: list[Operation]) -> tuple[list[Operation], list[int]]:
        """Returns the remaining operations and the indices of the results."""
        self._operations, roots, same = operations, self._roots, self._same
        self._writes = Counter([roots[number] for one in operations for number in one.writes])
        known: dict[Any, Operation] = {}
        rest = []
        for old in operations:
            one = old if same.keys().isdisjoint(old.reads) else old.renamed({n: self._now(n) for n in old.reads})
            if one.expected is not None and self._is_settled(one):
                continue
            kind = one.call.facts.forwarding
            if kind and self._is_forwarded(one, kind):
                continue
            key = self._key(one)
            earlier = None if key is None else known.get(key)
            if earlier is not None:
                for new, first in zip(one.results, earlier.results, strict=True):
                    if new is not None and first is not None and new != first:
                        same[new] = first
                continue
            if key is not None:
                known[key] = one
            for number in one.writes:
                self._versions[roots[number]] += 1
            rest.append(one)
        return rest, [self._now(number) for number in self._results]

    @cached_property
    def _sizes(self) -> Counter[int]:
        """Number of tensors in each memory, without views that have the shape and strides of the whole memory."""
        made = {number for one in self._operations for number in one.results if number is not None}
        roots, forms = self._roots, self.trace.forms
        return Counter([roots[n] for n in made if roots[n] == n or forms[roots[n]] != forms[n]])

    def _now(self, number: int) -> int:
        while number in self._same:
            number = self._same[number]
        return number

    def _is_settled(self, one: Operation) -> bool:
        """Returns True if a value read by Python is the same in every run and need not be verified."""
        if one.function is aten.equal.default and one.reads[0] == one.reads[1]:
            return bool(one.expected)
        return all(number in self.constants for number in one.reads)

    def _is_forwarded(self, one: Operation, kind: Forwarding) -> bool:
        """Replaces the result of an operation with its argument if the two are identical. Returns True if it did."""
        if kind == "move":
            return self._is_moved(one)
        number = one.results[0] if len(one.results) == 1 else None
        if number is None or one.writes or one.shapes is not None or not one.reads:
            return False
        source = one.reads[0]
        if not self._is_unchanged(one, kind, source, number):
            return False
        if number != source:
            self._same[number] = source
        return True

    def _is_unchanged(self, one: Operation, kind: Forwarding, source: int, number: int) -> bool:
        if kind == "alias":
            return True
        if kind == "product" and (one.call.args[1] is HOLE or one.call.args[1] != 1):
            return False
        if self.trace.forms[source] != self.trace.forms[number]:
            return False
        return kind == "view" or not (self._is_written_later(source) or self._is_written_later(number))

    def _is_moved(self, one: Operation) -> bool:
        """Replaces a tensor that a copy overwrites entirely with the source of the copy. Returns True if it did."""
        if one.call.args[1] is not HOLE:
            return False
        target, source, *_ = one.reads
        if target == source:
            return True  # the target is a copy of the source and was replaced by it
        forms, at = self.trace.forms, self._roots[target]
        if forms[target][:2] != forms[source][:2] or forms[target][3:] != forms[source][3:]:
            return False
        if at in self._given or at != target or self._roots[source] in self._given or source in self.constants:
            return False
        if self._writes[at] - self._versions[at] > 1 or self._is_written_later(source) or self._sizes[at] > 1:
            return False
        self._versions[at] += 1
        self._same[target] = source
        return True

    def _is_written_later(self, number: int) -> bool:
        memory = self._roots[number]
        return self._writes.get(memory, 0) > self._versions.get(memory, 0)

    def _key(self, one: Operation) -> Any:
        """Returns a key that determines the results of an operation, or None if the operation must not be merged."""
        if one.writes or one.shapes is not None or not one.call.is_comparable:
            return None
        roots, writes = self._roots, self._writes
        read = [roots[number] for number in one.reads]
        for number in one.results:
            # A result that is allocated here and overwritten later must not be merged.
            if number is not None and roots[number] in writes and roots[number] not in read:
                return None
        if writes.keys().isdisjoint(read):
            return one.call, one.reads
        return one.call, one.reads, tuple([self._versions.get(number, 0) for number in read])


__all__ = ["Merger"]
