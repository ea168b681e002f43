"""Programs: traces (lists of tensor operations) that were simplified and compiled to functions of tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..measure.marginals import copied
from ..model.autocast import exact
from ..model.devices import on_one_device
from .program_source import ProgramSource
from .simplify import Simplifier
from .trace import Operation, Trace

aten = torch.ops.aten


class ChangedValueError(Exception):
    """Raised if a replay reads a number or shape that differs from the one during recording.

    Attributes:
        reads: The lines of code that read these values, or the shortcuts whose conditions depend on them.
    """

    def __init__(self, reads: list[str]) -> None:
        super().__init__(", ".join(reads))
        self.reads = reads


class Program:
    """Tensor operations of a forward pass and its queries, simplified and compiled to two functions.

    The first stage computes the outputs from the inputs and is shared by all queries. The second stage computes the
    results of a query from the relevance of the outputs.

    Args:
        trace: The traced operations of both stages.
        inputs: Indices of the inputs.
        outputs: Indices of the tensors returned by the first stage.
        start: Indices of the tensors that start the second stage, such as the relevance of the outputs.
        results: Indices of the tensors that the second stage returns for each query.

    Attributes:
        operations: Operations that remain after simplification.
        constants: The constant tensors that the operations read, keyed by index.
        until: Number of operations in the first stage.
        inputs: Indices of the inputs in the simplified trace.
        outputs: Indices of the outputs in the simplified trace.
        start: Indices of the start tensors in the simplified trace.
        results: Indices of the results in the simplified trace.
        reason_not_replayable: Reason why the operations cannot be replayed, or an empty string. If it is not empty, no
            other attribute is set.
    """

    def __init__(
        self,
        trace: Trace,
        inputs: Sequence[int],
        outputs: Sequence[int],
        start: Sequence[int],
        results: Sequence[Sequence[int]],
    ) -> None:
        simple = Simplifier(trace, [*outputs, *(number for some in results for number in some)])
        self.reason_not_replayable = simple.reason_not_replayable
        if self.reason_not_replayable:
            return
        renamed = iter(simple.results)
        self.operations, self.constants = simple.operations, simple.constants
        outputs = list(islice(renamed, len(outputs)))
        self.results = [list(islice(renamed, len(some))) for some in results]
        self._forms, self._roots = simple.trace.forms, simple.trace.roots()
        self._given = {*trace.constants, *trace.placeholders}
        self.operations = _early(self.operations, outputs, self._roots)
        made = _makers(self.operations)
        until = max((made[number] + 1 for number in outputs if number in made), default=0)
        self.until = max(until, _last_check(self.operations, set(start)) + 1)
        self.inputs, self.outputs, self.start = list(inputs), outputs, start

    @cached_property
    def _code(self) -> _Code:
        """The compiled functions. A program that is replaced before it runs, as by a further query, is not compiled."""
        writer = ProgramSource(self.operations, self.constants, self.until, self._roots, self._given)
        source = writer.written(self.inputs, self.outputs, self.start, self.results)
        scope = writer.scope
        exec(compile(source, "<plan>", "exec"), scope)
        used = [self._roots[number] for number in writer.passed]
        overwritten = [{at for at, one in enumerate(used) if one in written} for written in writer.overwritten]
        shared = {one for one, count in Counter(used).items() if count > 1}
        return _Code(
            source,
            scope["forward"],
            [scope[f"relevance{number}"] for number in range(len(self.results))],
            overwritten,
            size=sum(_bytes(self._forms[number]) for number in set(used)),
            is_shareable=not any(used[at] in shared for places in overwritten for at in places),
        )

    @property
    def is_shareable(self) -> bool:
        """True if several queries may read the same state (tensors kept from the first stage)."""
        return self._code.is_shareable

    @property
    def size(self) -> int:
        """Size of this state in bytes."""
        return self._code.size

    @property
    def source(self) -> str:
        """Python source of both stages."""
        return self._code.source

    def forward(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Any]]:
        """Runs the first stage. Returns the outputs and the state, the tensors that the second stage reads."""
        with _plain():
            outputs, state, checks = _run(self._code.forward, *inputs)
        _check(checks)
        return outputs, list(state)

    def relevance(
        self, state: list[Any], start: Sequence[Tensor], query: int = 0, is_kept: bool = False
    ) -> list[Tensor]:
        """Runs the second stage for one query.

        Args:
            state: The state returned by :meth:`forward`. It is emptied to free memory early.
            start: The tensors at which the stage starts.
            query: Index of the query.
            is_kept: Whether later queries need the tensors of the state.

        Returns:
            The results of the query.
        """
        with _plain():
            for at in self._code.overwritten[query] if is_kept else ():
                state[at] = copied(state[at])
            results, checks = _run(self._code.relevance[query], state, *start)
        _check(checks)
        return list(results)


@dataclass(frozen=True)
class _Code:
    """Compiled functions of a program.

    Attributes:
        source: Python source of both stages.
        forward: The first stage.
        relevance: The second stage of each query.
        overwritten: Positions of the tensors in the state that each query overwrites.
        size: As in :class:`Program`.
        is_shareable: As in :class:`Program`.
    """

    source: str
    forward: Callable[..., Any]
    relevance: list[Callable[..., Any]]
    overwritten: list[set[int]]
    size: int
    is_shareable: bool


def _bytes(form: Any) -> int:
    """Returns the size in bytes of a tensor with the given form."""
    return int(math.prod(form[0]) * form[3].itemsize)


def _makers(operations: Sequence[Operation]) -> dict[int | None, int]:
    return {number: index for index, one in enumerate(operations) for number in one.results}


def _early(operations: list[Operation], outputs: Sequence[int], roots: Sequence[int]) -> list[Operation]:
    """Moves the operations that return the outputs to the earliest possible position.

    Simplification restores the shapes of all results at the end, after the operations of the second stage. An operation
    stays after all earlier writes to the memory that it reads.
    """
    for number in dict.fromkeys(outputs):
        made = _makers(operations)
        if number in made and not operations[made[number]].writes:
            one, at = operations[made[number]], made[number]
            read = {roots[number] for number in one.reads}
            before = [made[number] for number in one.reads if number in made]
            before += [i for i in range(at) if not read.isdisjoint([roots[n] for n in operations[i].writes])]
            first = max(before, default=-1) + 1
            if first < at:
                rest = [other for other in operations if other is not one]
                operations = [*rest[:first], one, *rest[first:]]
    return operations


def _last_check(operations: list[Operation], start: set[int]) -> int:
    """Returns the index of the last check before ``start`` is read, or -1. The outputs may depend on this check."""
    begin = next((index for index, one in enumerate(operations) if start & set(one.reads)), len(operations))
    checks = [i for i, one in enumerate(operations[:begin]) if one.expected is not None or one.shapes is not None]
    return max(checks, default=-1)


def _run(stage: Callable[..., Any], *args: Any) -> Any:
    """Runs a stage. Operations can fail for changed values; such errors are raised as ChangedValueError."""
    try:
        return stage(*args)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError) as error:
        raise ChangedValueError([f"an operation failed: {error}"]) from error


@contextmanager
def _plain() -> Iterator[None]:
    """Context manager in which operations run exactly as traced, whatever the modes of the caller."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch._C.DisableTorchFunction(),
        exact(),
        torch._C._AutoDispatchBelowAutograd(),  # skips a layer of the dispatcher in every operation
    ):
        yield


def _check(checks: Sequence[tuple[Any, Any, str]]) -> None:
    """Raises :class:`ChangedValueError` if a value is not the expected one. All tensors are read in one transfer."""
    tensors = [value for value, _, _ in checks if isinstance(value, Tensor)]
    if any(one.dtype is not torch.bool for one in tensors):
        tensors = [one.double() for one in tensors]
    values = iter(torch.stack(on_one_device(tensors)).tolist() if tensors else ())
    bad = []
    for value, expected, origin in checks:
        if not _is_same(next(values) if isinstance(value, Tensor) else value, expected):
            bad.append(origin)
    if bad:
        raise ChangedValueError(bad)


def _is_same(value: Any, expected: Any) -> bool:
    return bool(value == expected) or (isinstance(value, float) and math.isnan(value) and math.isnan(expected))
