"""Cache of compiled programs for model calls with the same shapes and non-tensor arguments."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Container, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..measure.layer_loops import Loops
from ..model.trace_guards import kind_of
from ..recording.propagation import Cost
from .program import ChangedValueError, Program
from .tracer import Tracer

Key = tuple[Hashable, ...]
"""Key of a query: method name and arguments."""
MOST = 32
"""Maximum number of programs for calls of one form."""
AGAIN = 8
"""Number of times that a query is recorded after its program was dropped, before it is traced again.

Otherwise, a loop over more queries than there are programs would trace each of them for every input."""
FAILURES = 3
"""Number of failed replays after which a failing shortcut is disabled in all layers.

If the model or a rule reads a changed value, every call is recorded after this number of failures."""
OF_SUMS = frozenset(["large column sums", "restored columns", "sums of one"])
"""Shortcuts that are disabled in all layers after a single failure of any of them.

They save at most a few percent of a plan's time, and making a plan again takes many times as long."""


@dataclass
class QueryProgram:
    """One query of a compiled program, with its cost and the structure of its results.

    Attributes:
        program: The compiled program, shared by all queries of one recording.
        number: Index of the query in the program.
        form: How the results are nested in tuples, lists and dictionaries.
        cost: The cost of the query, in kernel evaluations and propagated vectors.
    """

    program: Program
    number: int
    form: TreeSpec
    cost: Cost

    def answer(self, results: Sequence[Tensor]) -> Any:
        """Restores the nested structure of the program's results."""
        return tree_unflatten(results, self.form)


@dataclass
class TracedQueries:
    """Queries that were traced on one recording and are compiled to one program.

    Attributes:
        tracer: The object that traced the operations of the recording and the queries.
        inputs: As in :class:`~nrm_plugin.plan.program.Program`.
        outputs: As in :class:`~nrm_plugin.plan.program.Program`.
        start: As in :class:`~nrm_plugin.plan.program.Program`.
        results: Indices of each query's results.
        queries: The queries that have a program.
    """

    tracer: Tracer
    inputs: Sequence[int]
    outputs: Sequence[int]
    start: Sequence[int]
    results: list[list[int]] = field(default_factory=list)
    queries: list[QueryProgram] = field(default_factory=list)

    def with_query(self, results: list[int]) -> Program:
        """Compiles a program for the previous queries and one more, given the indices of its results."""
        self.results.append(results)
        return Program(self.tracer.trace, self.inputs, self.outputs, self.start, self.results)


class Programs:
    """Cache of the programs for calls of one form (same shapes and non-tensor arguments), keyed by query.

    Attributes:
        disabled_shortcuts: Shortcuts (faster computations that are valid only under a condition on values) that are no
            longer taken because their conditions failed for some inputs. A shortcut whose condition failed in several
            calls, in the same layer or in different layers, is disabled in all layers. Those of :data:`OF_SUMS` are
            disabled in all layers after one failure.
        reason_not_replayable: Reason why calls of this form cannot be replayed and must be recorded each time, or an
            empty string.
        answers: Cached properties that do not depend on values, such as names and shapes.
        recordings: Number of recordings since a program was last used.
        latest: The most recently used program, which the next measure is expected to use.
        asks_again: Whether a measure has received more than one query. The tensors of the first stage (the forward
            pass) are then kept for further queries.
        loops: Counts of the layers of which all measures have been asked a query.
    """

    def __init__(self) -> None:
        self.disabled_shortcuts: frozenset[str] = frozenset()
        self.reason_not_replayable = ""
        self.answers: dict[Hashable, Any] = {}
        self.recordings = 0
        self.latest: Program | None = None
        self.asks_again = False
        self.loops = Loops()
        self.lock = threading.RLock()
        self._programs: OrderedDict[Key, QueryProgram] = OrderedDict()
        self._seen: set[Key] = set()
        self._recorded: dict[Key, str] = {}
        self._dropped: dict[Key, int] = {}
        self._failures = 0
        self._rejected: Counter[str] = Counter()

    def find(self, key: Key, is_used: bool = True) -> QueryProgram | None:
        """Returns the program of a query, or None if there is none.

        Args:
            key: Key of the query.
            is_used: Whether the program is going to run.
        """
        with self.lock:
            query = self._programs.get(key)
            if query is not None and is_used:
                self._programs.move_to_end(key)
                self.latest = query.program
            return query

    def is_worth(self, key: Key, is_certain: bool) -> bool:
        """Returns True if a query should be traced, either because it is certain to recur or because it is repeated."""
        with self.lock:
            worth = (is_certain or key in self._seen) and key not in self._recorded
            self._seen.add(key)
            if key in self._dropped:
                self._dropped[key] -= 1
                if self._dropped[key] < 0:
                    del self._dropped[key]
            return worth and key not in self._dropped and not self.reason_not_replayable

    def add(
        self,
        key: Key,
        traced: TracedQueries,
        answer: Any,
        cost: Cost,
    ) -> None:
        """Compiles and stores a program for a query and the earlier queries of the same recording."""
        leaves, form = tree_flatten(answer)
        if not all(isinstance(leaf, Tensor) for leaf in leaves):
            return
        if traced.tracer.trace.reasons_not_replayable:
            self._seen.discard(key)
            self._recorded[key] = traced.tracer.trace.reasons_not_replayable[0]
            return
        program = traced.with_query([traced.tracer.number(leaf) for leaf in leaves])
        with self.lock:
            if program.reason_not_replayable:
                self.reason_not_replayable = program.reason_not_replayable
                return
            query = QueryProgram(program, len(traced.queries), form, cost)
            traced.queries.append(query)
            for one in traced.queries:
                one.program = program
            self.asks_again = self.asks_again or len(traced.queries) > 1
            self._programs[key], self.latest = query, program
            while len(self._programs) > MOST:
                dropped, _ = self._programs.popitem(last=False)
                self._dropped[dropped] = AGAIN

    def reject(self, error: ChangedValueError) -> None:
        """Discards all programs. Called if a value on which they depend has changed."""
        with self.lock:
            names = frozenset(read for read in error.reads if " in " in read)
            kinds = {kind_of(name) for name in names}
            self._rejected.update(kinds)
            self.disabled_shortcuts |= names | {kind for kind in kinds if self._rejected[kind] >= FAILURES}
            if not kinds.isdisjoint(OF_SUMS):
                self.disabled_shortcuts |= OF_SUMS
            if not names:
                self._failures += 1
            if self._failures >= FAILURES:
                self.reason_not_replayable = f"the model or a rule reads values: {error.reads[0]}"
            self._programs.clear()
            self._dropped.clear()
            self.latest = None

    def constants(self) -> list[Tensor]:
        """Returns the constants of all programs."""
        with self.lock:
            programs = {id(one.program): one.program for one in self._programs.values()}
            return [value for program in programs.values() for value in program.constants.values()]

    def lines(self, own: Container[int]) -> list[str]:
        """Describes the program of each query in one line.

        Args:
            own: Storage addresses of the model's tensors.
        """
        with self.lock:
            if self.reason_not_replayable:
                return [f"recorded every time: {self.reason_not_replayable}"]
            recorded = [f"{key[0]}: recorded every time: {why}" for key, why in self._recorded.items()]
            return recorded + [f"{key[0]}: {_described(one.program, own)}" for key, one in self._programs.items()]

    def __len__(self) -> int:
        return len(self._programs)


def _described(program: Program, own: Container[int]) -> str:
    size = memory_of(program.constants.values(), own) / 2**20
    origins = dict.fromkeys(one.origin for one in program.operations if one.expected is not None or one.shapes)
    checked = f", if as planned: {'; '.join(origins)}" if origins else ""
    return f"{len(program.operations)} operations, {size:.1f} MiB of constants{checked}"


def memory_of(tensors: Iterable[Tensor], own: Container[int]) -> int:
    """Returns the total size of tensors in bytes, excluding tensors with the given storage addresses."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    sizes = {one.data_ptr(): one.nbytes() for one in storages}
    return sum(size for address, size in sizes.items() if address not in own)
