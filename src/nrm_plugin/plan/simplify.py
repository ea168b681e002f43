"""Simplification of traces, which precomputes constants and removes operations whose results are unused.

A trace can overwrite tensors. Tensors that share memory form a group. The order of operations is preserved, and two
operations on a group are merged only if the group is not overwritten between them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .fused_norms import fused
from .merging import Merger
from .pointwise import PointwiseProducts
from .reshapes import ViewRemover
from .trace import Operation, Trace, needed

STORED = 1 << 14
"""Maximum number of elements of a filled tensor that is stored rather than created in each run."""


class Simplifier:
    """Simplified form of a trace: only the operations that are needed to compute given results.

    Args:
        trace: The trace (list of tensor operations) to simplify.
        results: Indices of the result tensors.

    Attributes:
        trace: A copy of the trace, to which simplification adds tensors.
        operations: The remaining operations, in order.
        constants: The constants that the operations read, keyed by index.
        results: Indices of the result tensors.
        reason_not_replayable: Reason why the operations cannot be replayed, or an empty string. If it is not empty,
            there are no operations.
    """

    def __init__(self, trace: Trace, results: list[int]) -> None:
        self.trace = replace(trace, forms=dict(trace.forms), aliases=dict(trace.aliases))
        self.constants: dict[int, Tensor] = dict(trace.constants)
        self.results: list[int] = []
        roots = self.trace.roots()
        operations = needed(trace.operations, results, roots)
        self.reason_not_replayable = self._overwritten(operations, roots)
        if not self.reason_not_replayable:
            # After folding, a tensor that depends only on the shape of random numbers is a constant.
            operations = needed(self._folded(operations, roots), results, roots)
            drawn = (o.function for o in operations if o.call.facts.draws)
            self.reason_not_replayable = next((f"the model draws random numbers ({one})" for one in drawn), "")
        if self.reason_not_replayable:
            self.operations, self.constants = [], {}
            return
        operations, self.results = self._merged(operations, results)
        operations, self.results = ViewRemover(self.trace).rewritten(operations, self.results)
        operations, self.results = self._merged(operations, self.results)
        self.operations = fused(operations, self.trace, self.constants, self.results)
        self.operations = PointwiseProducts(self.trace, self.constants).rewritten(self.operations)
        if self.operations is not operations:
            self.operations, self.results = self._merged(self.operations, self.results)
        read = {number for one in self.operations for number in one.reads} | set(self.results)
        self.constants = {number: value for number, value in self.constants.items() if number in read}

    def _overwritten(self, operations: list[Operation], roots: list[int]) -> str:
        """Returns why operations cannot be replayed: one writes to an input or a weight. Empty if they can."""
        given = {*self.constants, *self.trace.placeholders}
        for one in operations:
            if one.writes and not given.isdisjoint([roots[number] for number in one.writes]):
                return f"the model overwrites one of its inputs or weights ({one.function})"
        return ""

    def _merged(self, operations: list[Operation], results: list[int]) -> tuple[list[Operation], list[int]]:
        merger = Merger(self.trace, self.constants, results)
        operations, results = merger.merged(operations)
        return needed(operations, results, self.trace.roots()), results

    # -- constants ------------------------------------------------------------------------------------------------

    def _folded(self, operations: list[Operation], roots: list[int]) -> list[Operation]:
        """Evaluates all operations on constants. Returns the remaining operations."""
        varying = self._varying(operations, roots)
        written = {roots[number] for one in operations for number in one.writes}
        rest: list[Operation] = []
        made: set[int | None] = set()
        with torch.no_grad():
            for varies, one in zip(varying, operations, strict=True):
                if not varies:
                    self._compute(one)
                if varies or self._is_made_each_time(one, roots, written):
                    rest.append(one)
                    made.update(one.results)
        self.constants = {number: value for number, value in self.constants.items() if number not in made}
        return rest

    def _varying(self, operations: list[Operation], roots: list[int]) -> list[bool]:
        """Returns whether each operation depends on a placeholder or draws random numbers."""
        varying = {roots[number] for number in self.trace.placeholders}
        marked = [False] * len(operations)
        is_changed = True
        while is_changed:  # an overwritten group is variable as a whole, even before it is overwritten
            is_changed = False
            for index, one in enumerate(operations):
                if marked[index]:
                    continue
                facts = one.call.facts
                results = [roots[number] for number in one.results if number is not None]
                if (
                    (facts.is_filled or varying.isdisjoint([roots[number] for number in one.reads]))
                    and varying.isdisjoint(results)
                    and not facts.draws
                ):
                    continue
                marked[index] = True
                writes = [roots[number] for number in one.writes]
                is_changed = is_changed or not varying.issuperset(writes)
                varying.update(results, writes)
        return marked

    def _is_made_each_time(self, one: Operation, roots: list[int], written: set[int]) -> bool:
        number = one.results[0] if len(one.results) == 1 else None
        if not one.call.facts.is_filled or number is None or roots[number] in written:
            return False
        return bool(math.prod(self.trace.forms[number][0]) > STORED)

    def _compute(self, one: Operation) -> None:
        args, kwargs = one.call.arguments([self._stored(number, one) for number in one.reads])
        result = one.function(*args, **kwargs)
        for number, item in zip(one.results, result if one.is_sequence else [result], strict=True):
            if number is not None:
                self.constants[number] = item

    def _stored(self, number: int, one: Operation) -> Tensor:
        """Returns a constant or, if only the shape of a varying tensor is read, an expanded scalar."""
        if number in self.constants:
            return self.constants[number]
        assert one.call.facts.is_filled, f"{one.function} reads a tensor that is not constant"
        shape, _, _, dtype, device, *_ = self.trace.forms[number]
        return torch.empty((), dtype=dtype, device=device).expand(shape)


__all__ = ["Simplifier"]
