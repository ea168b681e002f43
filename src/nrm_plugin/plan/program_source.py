"""Generation of the Python source of a program."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..measure.marginals import copied
from .trace import HOLE, Call, Operation, argument_key, needed

aten = torch.ops.aten
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
    aten.ge.Scalar: torch.ge,
    aten.lt.Scalar: torch.lt,
    aten.rsub.Scalar: torch.rsub,
    aten.hardswish.default: torch._C._nn.hardswish,
    aten.hardsigmoid.default: torch._C._nn.hardsigmoid,
    aten.gelu.default: torch._C._nn.gelu,
    aten.silu.default: torch._C._nn.silu,
    aten.div.Scalar: torch.div,
    aten.div_.Tensor: Tensor.div_,
    aten.clamp.Tensor: torch.clamp,
    aten.where.self: torch.where,
    aten.reciprocal.out: torch.reciprocal,
    aten.minimum.out: torch.minimum,
    aten.maximum.out: torch.maximum,
    aten.mul.out: torch.mul,
    aten.sub.out: torch.sub,
    aten.sign.out: torch.sign,
    aten.zeros_like.default: torch.zeros_like,
    aten.ones_like.default: torch.ones_like,
    aten.empty_like.default: torch.empty_like,
    aten.native_layer_norm.default: torch.native_layer_norm,
    aten.baddbmm.default: torch.baddbmm,
    aten.sigmoid.default: torch.sigmoid,
    aten.tanh.default: torch.tanh,
    aten.cat.default: torch.cat,
    aten.t.default: torch.t,
    aten.mul.Scalar: torch.mul,
    aten.native_batch_norm.default: torch.native_batch_norm,
    aten.split.Tensor: torch._VF.split,  # type: ignore[attr-defined]
    aten.unbind.int: torch.unbind,
    aten.index_select.default: torch.index_select,
    aten.clone.default: torch.clone,
}
"""Functions that are equivalent to these operations and have less overhead per call."""


class ProgramSource:
    """Generator of the Python source of a program.

    Args:
        operations: The operations of both stages.
        constants: The constants, keyed by index.
        until: Number of operations in the first stage.
        roots: Memory of each tensor; see :meth:`~nrm_plugin.plan.trace.Trace.roots`.
        given: Indices of the constants and placeholders of the trace.

    Attributes:
        scope: The namespace in which the source is executed.
        passed: Indices of the tensors that the first stage passes to the second one.
        overwritten: The memory that each query overwrites.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        constants: dict[int, Tensor],
        until: int,
        roots: Sequence[int],
        given: set[int],
    ) -> None:
        self._operations, self._constants, self._until = operations, constants, until
        self._roots, self._given = roots, given
        self.scope: dict[str, Any] = {f"c{number}": value for number, value in constants.items()}
        self.passed: list[int] = []
        self.overwritten: list[set[int]] = []
        self._names: dict[Any, str] = {}
        self._templates: dict[Call, str] = {}

    def written(
        self, inputs: Sequence[int], outputs: Sequence[int], start: Sequence[int], results: Sequence[Sequence[int]]
    ) -> str:
        """Returns the source code of both stages.

        Args:
            inputs: As in :class:`~nrm_plugin.plan.program.Program`.
            outputs: As in :class:`~nrm_plugin.plan.program.Program`.
            start: As in :class:`~nrm_plugin.plan.program.Program`.
            results: As in :class:`~nrm_plugin.plan.program.Program`.
        """
        first, second = self._operations[: self._until], self._operations[self._until :]
        queries = [
            needed([one for one in second if one.query <= number], some, self._roots)
            for number, some in enumerate(results, start=1)
        ]
        known = set(inputs) | {number for one in first for number in one.results if number is not None}
        self.overwritten = [{self._roots[number] for one in query for number in one.writes} for query in queries]
        read = [
            {n for one in query for n in one.reads}.union(some) for query, some in zip(queries, results, strict=True)
        ]
        self.passed = sorted(known.intersection(set[int]().union(*read)))
        names = _Variables(self._constants, inputs)
        lines = [f"def forward({', '.join(names[number] for number in inputs)}):", "    checks = []"]
        lines += self._body(first, {*outputs, *self.passed}, names)
        lines.append(f"    return ({_tuple(outputs, names)}), ({_tuple(self.passed, names)}), checks")
        for number, (query, some) in enumerate(zip(queries, results, strict=True)):
            taken = {one: at for at, one in enumerate(self.passed) if one in read[number]}
            names = _Variables(self._constants, [*start, *taken])
            parameters = ", ".join(names[one] for one in start)
            lines += [f"def relevance{number}(state, {parameters}):", "    checks = []"]
            lines += [f"    {names[one]} = state[{at}]" for one, at in taken.items()]
            lines.append("    state.clear()")
            lines += self._body(query, set(some), names)
            lines.append(f"    return ({self._separate(some, start, names)}), checks")
        return "\n".join(lines)

    def _separate(self, numbers: Sequence[int], start: Sequence[int], names: _Variables) -> str:
        """Returns code that copies each result that shares memory with another tensor."""
        used = {self._roots[number] for number in (*start, *self.passed)}
        parts = []
        for number in numbers:
            memory = self._roots[number]
            shared = memory in used or number in self._constants or memory in self._given
            parts.append(f"{self._bound(copied)}({names[number]}), " if shared else f"{names[number]}, ")
            used.add(memory)
        return "".join(parts)

    def _body(self, operations: Sequence[Operation], kept: set[int], names: _Variables) -> list[str]:
        """Returns the lines that execute operations. Variables are reused once their tensors are no longer needed.

        Args:
            operations: The operations.
            kept: Indices of the tensors that are needed afterwards.
            names: The variables of the function.
        """
        last = {number: index for index, one in enumerate(operations) for number in one.reads}
        lines = []
        for index, one in enumerate(operations):
            call = self._template(one.call) % tuple([names[number] for number in one.reads])
            value = names[one.reads[0]] if one.function is aten._local_scalar_dense.default else call
            freed = names.freed([n for n in dict.fromkeys(one.reads) if last[n] == index and n not in kept])
            if one.expected is not None:
                lines.append(f"    checks.append(({value}, {self._text(one.expected)}, {one.origin!r}))")
            elif one.writes and one.results and one.results[0] in one.writes:
                lines.append(f"    {call}")
            else:
                is_named = [n is not None and (n in last or n in kept or one.shapes is not None) for n in one.results]
                made = [names.added(n, freed) if named else "_" for n, named in zip(one.results, is_named, strict=True)]
                left = f"{', '.join(made)}{',' if one.is_sequence else ''} = " if any(is_named) else ""
                lines.append(f"    {left}{call}")
                if one.shapes is not None:
                    lines.append(f"    checks.append(({made[0]}.shape, {self._text(one.shapes[0])}, {one.origin!r}))")
            if freed:
                lines.append(f"    {' = '.join(freed)} = None")
                names.release(freed)
        return lines

    def _template(self, call: Call) -> str:
        """Returns the source of a call with ``%s`` in place of each tensor."""
        known = self._templates.get(call)
        if known is None:
            function = call.facts.function
            parts = [self._text(value) for value in call.args]
            parts += [f"{key}={self._text(value)}" for key, value in call.kwargs.items()]
            known = f"{self._bound(_DIRECT.get(function, function))}({', '.join(parts)})"
            self._templates[call] = known
        return known

    def _text(self, value: Any) -> str:
        if value is HOLE:
            return "%s"
        if value is None or isinstance(value, (bool, int)):
            return repr(value)
        if isinstance(value, (list, tuple)) and HOLE in value:
            inner = "".join(f"{self._text(item)}, " for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        return self._bound(value)

    def _bound(self, value: Any) -> str:
        """Returns the name of a constant that is not a tensor."""
        key = argument_key(value)
        try:
            hash(key)
        except TypeError:
            key = id(value)
        if key not in self._names:
            self._names[key] = f"k{len(self._names)}"
            self.scope[self._names[key]] = value
        return self._names[key]


class _Variables:
    """Names of the local variables of a function that hold tensors, and of the constants.

    Args:
        constants: The constants, keyed by index.
        parameters: Indices of the tensors that are given to the function.
    """

    def __init__(self, constants: Iterable[int], parameters: Sequence[int]) -> None:
        self._constants = {number: f"c{number}" for number in constants}
        self._names = self._constants | {number: f"v{at}" for at, number in enumerate(parameters)}
        self._count = len(parameters)
        self._free: list[str] = []

    def __getitem__(self, number: int) -> str:
        return self._names[number]

    def freed(self, numbers: Iterable[int]) -> list[str]:
        """Returns the variables of tensors that are no longer needed."""
        return [self._names[number] for number in numbers if number not in self._constants]

    def added(self, number: int | None, freed: list[str]) -> str:
        """Returns the variable of a new tensor: one that is removed from ``freed``, an empty one or a new one."""
        assert number is not None
        if number not in self._names:
            if not freed and not self._free:
                self._free.append(f"v{self._count}")
                self._count += 1
            self._names[number] = (freed or self._free).pop()
        return self._names[number]

    def release(self, names: Iterable[str]) -> None:
        """Declares variables empty."""
        self._free.extend(names)


def _tuple(numbers: Iterable[int], names: _Variables) -> str:
    return "".join(f"{names[number]}, " for number in numbers)


__all__ = ["ProgramSource"]
