"""Programs: traces (lists of tensor operations) that were simplified and compiled to functions of tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from ..measure.marginals import copied
from ..model.autocast import exact
from ..model.devices import on_one_device
from .simplify import Simplifier
from .trace import Operation, Trace, Value, needed

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
        is_shareable: Whether several queries may read the same state (tensors kept from the first stage).
        size: Size of this state in bytes.
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
        memory, given = simple.trace.memory, {*trace.constants, *trace.placeholders}
        self.operations = _early(self.operations, outputs, memory)
        made = _makers(self.operations)
        until = max((made[number] + 1 for number in outputs if number in made), default=0)
        until = max(until, _last_check(self.operations, set(start)) + 1)
        writer = _Writer(self.operations, self.constants, until, memory, given)
        self.source, scope = writer.written(list(inputs), outputs, start, self.results)
        exec(compile(self.source, "<plan>", "exec"), scope)
        self.inputs, self.outputs, self.start, self.until = list(inputs), outputs, start, until
        self._forward = scope["forward"]
        self._relevance = [scope[f"relevance{number}"] for number in range(len(results))]
        used = [memory(number) for number in writer.passed]
        self.size = sum(_bytes(simple.trace.forms[number]) for number in set(used))
        self._overwritten = [{at for at, one in enumerate(used) if one in written} for written in writer.overwritten]
        shared = {one for one, count in Counter(used).items() if count > 1}
        self.is_shareable = not any(used[at] in shared for places in self._overwritten for at in places)

    def forward(self, inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], list[Any]]:
        """Runs the first stage. Returns the outputs and the state, the tensors that the second stage reads."""
        with _plain():
            outputs, state, checks = _run(self._forward, *inputs)
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
            for at in self._overwritten[query] if is_kept else ():
                state[at] = copied(state[at])
            results, checks = _run(self._relevance[query], state, *start)
        _check(checks)
        return list(results)


def _bytes(form: Any) -> int:
    """Returns the size in bytes of a tensor with the given form."""
    return int(math.prod(form[0]) * form[3].itemsize)


def _makers(operations: Sequence[Operation]) -> dict[int | None, int]:
    return {number: index for index, one in enumerate(operations) for number in one.results}


def _early(operations: list[Operation], outputs: Sequence[int], memory: Callable[[int], int]) -> list[Operation]:
    """Moves the operations that return the outputs to the earliest possible position.

    Simplification restores the shapes of all results at the end, after the operations of the second stage. An operation
    stays after all earlier writes to the memory that it reads.
    """
    for number in dict.fromkeys(outputs):
        made = _makers(operations)
        if number in made and not operations[made[number]].writes:
            one, at = operations[made[number]], made[number]
            read = set(map(memory, one.reads))
            before = [made[number] for number in one.reads if number in made]
            before += [i for i in range(at) if not read.isdisjoint(map(memory, operations[i].writes))]
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
    ):
        yield


_DIRECT: dict[Any, Any] = {
    aten.view.default: Tensor.view,
    aten.expand.default: Tensor.expand,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.add_.Tensor: Tensor.add_,
    aten.mul_.Tensor: Tensor.mul_,
    aten.abs.default: torch.abs,
    aten.neg.default: torch.neg,
    aten.sign.default: torch.sign,
    aten.copysign.Tensor: torch.copysign,
    aten.reciprocal.default: torch.reciprocal,
    aten.reciprocal_.default: Tensor.reciprocal_,
    aten.maximum.default: torch.maximum,
    aten.minimum.default: torch.minimum,
    aten.clamp.default: torch.clamp,
    aten.nan_to_num.default: torch.nan_to_num,
    aten.addcmul_.default: Tensor.addcmul_,
    aten.relu.default: torch.relu,
    aten.relu_.default: torch.relu_,
    aten.amin.default: torch.amin,
    aten.sum.dim_IntList: torch.sum,
    aten.mean.dim: torch.mean,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.select.int: torch.select,
    aten.permute.default: torch.permute,
    aten.transpose.int: torch.transpose,
    aten.convolution.default: torch.convolution,
    aten.mm.default: torch.mm,
    aten.mv.default: torch.mv,
    aten.bmm.default: torch.bmm,
    aten.addmm.default: torch.addmm,
    aten.copy_.default: Tensor.copy_,
}
"""Functions that are equivalent to these operations and have less overhead per call."""


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


class _Writer:
    """Generator of the Python source of a program."""

    def __init__(
        self,
        operations: list[Operation],
        constants: dict[int, Tensor],
        until: int,
        memory: Callable[[int], int],
        given: set[int],
    ) -> None:
        self.memory, self.given = memory, given
        self.operations, self.constants, self.until = operations, constants, until
        self.scope: dict[str, Any] = {f"c{number}": value for number, value in constants.items()}
        self.passed: list[int] = []
        self.overwritten: list[set[int]] = []
        self._names: dict[Any, str] = {}

    def written(
        self, inputs: list[int], outputs: list[int], start: Sequence[int], results: list[list[int]]
    ) -> tuple[str, dict[str, Any]]:
        """Returns the source code of both stages and the namespace in which it is executed.

        Args:
            inputs: As in :class:`Program`.
            outputs: As in :class:`Program`.
            start: As in :class:`Program`.
            results: As in :class:`Program`.
        """
        first, second = self.operations[: self.until], self.operations[self.until :]
        queries = [
            needed([one for one in second if one.query <= number], some, self.memory)
            for number, some in enumerate(results, start=1)
        ]
        known = set(inputs) | {number for one in first for number in one.results if number is not None}
        self.overwritten = [{self.memory(number) for one in query for number in one.writes} for query in queries]
        read = [
            {n for one in query for n in one.reads}.union(some) for query, some in zip(queries, results, strict=True)
        ]
        self.passed = sorted(known.intersection(set[int]().union(*read)))
        lines = [f"def forward({', '.join(f'v{number}' for number in inputs)}):", "    checks = []"]
        lines += self._body(first, {*outputs, *self.passed})
        lines.append(f"    return ({self._tuple(outputs)}), ({self._tuple(self.passed)}), checks")
        for number, (query, some) in enumerate(zip(queries, results, strict=True)):
            taken = {f"v{one}": f"state[{at}]" for at, one in enumerate(self.passed) if one in read[number]}
            lines += [f"def relevance{number}(state, {', '.join(f'v{one}' for one in start)}):", "    checks = []"]
            lines += [f"    {', '.join(taken)} = {', '.join(taken.values())}"] if taken else []
            lines.append("    state.clear()")
            lines += self._body(query, set(some), {*self.passed, *start})
            lines.append(f"    return ({self._separate(some, start)}), checks")
        return "\n".join(lines), self.scope

    def _separate(self, numbers: Sequence[int], start: Sequence[int]) -> str:
        """Returns code that copies each result that shares memory with another tensor."""
        used = {self.memory(number) for number in (*start, *self.passed)}
        parts = []
        for number in numbers:
            text = self._text(Value(number))
            memory = self.memory(number)
            shared = memory in used or number in self.constants or memory in self.given
            parts.append(f"{self._bound(copied)}({text}), " if shared else f"{text}, ")
            used.add(memory)
        return "".join(parts)

    def _tuple(self, numbers: Sequence[int]) -> str:
        return "".join(f"{self._text(Value(number))}, " for number in numbers)

    def _body(self, operations: list[Operation], kept: set[int], given: set[int] = frozenset()) -> list[str]:  # type: ignore[assignment]
        last: dict[int, int] = {}
        for index, one in enumerate(operations):
            for number in one.reads:
                last[number] = index
        lines = []
        made = set(given)
        for index, one in enumerate(operations):
            call = f"{self._bound(_DIRECT.get(one.function, one.function))}({self._arguments(one)})"
            names = [
                f"v{n}" if n is not None and (one.shapes is not None or n in last or n in kept) else "_"
                for n in one.results
            ]
            if one.function is aten._local_scalar_dense.default:
                lines.append(f"    checks.append(({self._text(one.args[0])}, {one.expected!r}, {one.origin!r}))")
            elif one.expected is not None:
                lines.append(f"    checks.append(({call}, {one.expected!r}, {one.origin!r}))")
            elif (one.writes and one.results and one.results[0] in one.writes) or all(name == "_" for name in names):
                lines.append(f"    {call}")
            else:
                lines.append(f"    {', '.join(names)}{',' if one.is_sequence else ''} = {call}")
            if one.shapes is not None:
                lines.append(f"    checks.append(({names[0]}.shape, {self._bound(one.shapes[0])}, {one.origin!r}))")
            made.update(number for number in one.results if number is not None)
            dead = [f"v{n}" for n in set(one.reads) if last[n] == index and n not in kept and n in made]
            if dead:
                lines.append(f"    {' = '.join(dead)} = None")
        return lines

    def _arguments(self, one: Operation) -> str:
        parts = [self._text(value) for value in one.args]
        parts += [f"{key}={self._text(value)}" for key, value in one.kwargs.items()]
        return ", ".join(parts)

    def _text(self, value: Any) -> str:
        if isinstance(value, Value):
            return f"c{value.number}" if value.number in self.constants else f"v{value.number}"
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        if isinstance(value, (list, tuple)) and any(True for item in value):
            inner = "".join(f"{self._text(item)}, " for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        return self._bound(value)

    def _bound(self, value: Any) -> str:
        try:
            key: Any = (type(value), value)
            hash(key)
        except TypeError:
            key = id(value)
        if key not in self._names:
            self._names[key] = f"k{len(self._names)}"
            self.scope[self._names[key]] = value
        return self._names[key]
