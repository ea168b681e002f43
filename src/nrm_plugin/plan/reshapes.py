"""Removal of views that move no data, such as the leading dimension of a single relevance vector."""

from __future__ import annotations

import math
from typing import Any

import torch

from .trace import HOLE, Operation, Trace, Value

aten = torch.ops.aten


class ViewRemover:
    """Rewrites a trace so that operations read tensors in their original shape, without views or broadcasting.

    Args:
        trace: The trace (list of tensor operations) to rewrite. Reshaped tensors are added to it.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self._root: dict[int, int] = {}
        self._made: set[int] = set()
        self._written: list[Operation] = []
        self._narrow: dict[int, int] = {}

    def rewritten(self, operations: list[Operation], results: list[int]) -> tuple[list[Operation], list[int]]:
        """Returns equivalent operations and the indices of the results."""
        for one in operations:
            source = self._source(one)
            if source is not None and one.results[0] is not None:
                self._root[one.results[0]] = self._root.get(source, source)
                continue
            stripped = self._stripped(one)
            made = self._unstripped(one) if stripped is None else stripped
            if made.call.facts.function is aten.expand.default and made.results[0] is not None and made.reads:
                self._note_broadcast(made.results[0], made.reads[0])
            self._written.append(self._unexpanded(made))
        renamed = [self._made_view(number) for number in results]
        return self._written, renamed

    # -- views ----------------------------------------------------------------------------------------------------

    def _source(self, one: Operation) -> int | None:
        """Returns the source of a view of all elements in memory order, or None for any other operation."""
        if len(one.results) != 1 or one.results[0] is None or one.writes or one.shapes is not None:
            return None
        number = one.results[0]
        if number in self._root or number not in self.trace.aliases:
            return None
        memory = self.trace.memory(number)
        source = next((other for other in one.reads if self.trace.memory(other) == memory), None)
        if source is None:
            return None
        new, old = self.trace.forms[number], self.trace.forms[source]
        is_same = new[2:] == old[2:] and math.prod(new[0]) == math.prod(old[0]) > 0
        return source if is_same and is_contiguous(new) and is_contiguous(old) else None

    def _unstripped(self, one: Operation) -> Operation:
        """Returns an operation that reads tensors in their traced shapes."""
        if self._root.keys().isdisjoint(one.reads):
            return one
        return one.renamed({number: self._made_view(number) for number in one.reads})

    def _made_view(self, number: int) -> int:
        """Returns the index of a tensor in its traced shape, creating the view if necessary."""
        root = self._root.get(number)
        if root is None:
            return number
        if self.trace.forms[root][0] == self.trace.forms[number][0]:
            return root
        if number not in self._made:
            self._made.add(number)
            shape = list(self.trace.forms[number][0])
            self._written.append(self.trace.operation(aten.view.default, (Value(root), shape), (number,)))
        return number

    # -- leading dimensions of size one ---------------------------------------------------------------------------

    def _stripped(self, one: Operation) -> Operation | None:
        """Returns an elementwise operation without its leading dimension, or None for other operations.

        All arguments must exist without this dimension.
        """
        facts = one.call.facts
        if facts.is_reduction or facts.function is aten.expand.default:
            return self._stripped_of_one(one)
        if not facts.is_elementwise or len(one.results) != 1 or one.shapes is not None:
            return None
        number = one.results[0]
        if number is None or len(one.writes) > 1 or (one.writes and one.writes[0] != number):
            return None
        form = self.trace.forms[number]
        if len(form[0]) < 2 or form[0][0] != 1 or not is_contiguous(form):
            return None
        without: dict[int, int] = {}
        for read in one.reads:
            if read not in without:
                new = self._without(read, len(form[0]))
                if new is None:
                    return None
                without[read] = new
        if all(new == read for read, new in without.items()):
            return None
        made = without[number] if one.writes else self._new(number)
        reads = tuple([without[read] for read in one.reads])
        return one.changed(reads, (made,), (made,) if one.writes else ())

    def _stripped_of_one(self, one: Operation) -> Operation | None:
        """Returns a broadcast, or a reduction over other dimensions, without its leading dimension, or None."""
        number = one.results[0]
        args = one.call.args
        if number is None or one.call.kwargs or len(args) < 2 or not isinstance(args[1], (list, tuple)):
            return None
        (source,), (_, sizes, *rest) = one.reads, args
        before = self.trace.forms[source][0]
        if len(before) < 2 or before[0] != 1 or self.trace.forms[number][0][:1] != (1,):
            return None
        if one.function is aten.expand.default:
            is_inner = len(before) == len(sizes)
            sizes = sizes[1:]
        else:
            is_inner = bool(sizes) and all(-len(before) < size < 0 for size in sizes)
        root = self._root.get(source, source)
        if not is_inner or self.trace.forms[root][0] != before[1:]:
            return None
        call = self.trace.call(one.call.facts, (HOLE, sizes, *rest), {})
        return one.changed((root,), (self._new(number),), (), call)

    # -- broadcasts -----------------------------------------------------------------------------------------------

    def _note_broadcast(self, number: int, source: int) -> None:
        if self.trace.forms[source][0]:  # type promotion differs for tensors without dimensions
            self._narrow[number] = source

    def _unexpanded(self, one: Operation) -> Operation:
        """Returns an elementwise operation that reads tensors before broadcasting, if its result stays the same."""
        if not one.call.facts.is_elementwise or self._narrow.keys().isdisjoint(one.reads):
            return one
        forms = self.trace.forms
        number = one.results[0] if len(one.results) == 1 else None
        if number is None or one.shapes is not None or not is_contiguous(forms[number]):
            return one
        wide = [n for n in one.reads if n not in self._narrow and forms[n][0] == forms[number][0]]
        if not any(is_contiguous(forms[n]) for n in wide):
            return one  # the memory layout of the result may differ

        reads = [n if n in one.writes else self._narrow.get(n, n) for n in one.reads]
        return one.changed(tuple(reads), one.results, one.writes)

    def _without(self, number: int, ndim: int) -> int | None:
        """Returns the index of the tensor that equals tensor ``number`` without its leading dimension, or None.

        Returns None if the trace contains no such tensor, and ``number`` itself if the tensor has fewer than ``ndim``
        dimensions.
        """
        form = self.trace.forms[number]
        if len(form[0]) < ndim:
            return self._made_view(number)
        if form[0][0] != 1:
            return None
        root = self._root.get(number, number)
        return root if self.trace.forms[root][0] == form[0][1:] else None

    def _new(self, number: int) -> int:
        """Adds a tensor without its leading dimension to the trace and returns the new index."""
        trace = self.trace
        made, trace.count = trace.count, trace.count + 1
        shape, stride, *rest = trace.forms[number]
        trace.forms[made] = (shape[1:], stride[1:], *rest)
        trace.aliases[number] = made
        self._root[number] = made
        return made


def is_contiguous(form: Any) -> bool:
    """Returns True if a tensor with the given form is contiguous."""
    shape, stride, *_ = form
    if stride is None:
        return False
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


__all__ = ["ViewRemover", "is_contiguous"]
