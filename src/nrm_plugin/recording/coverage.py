"""Coverage: which rule or kernel propagates relevance through each call of a layer or function in a forward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import nn
from zennit.core import Composite

from ..composites import Normalized, NRMDefault
from ..kernels.layer_step import LayerStep
from ..kernels.step import FunctionStep, Step
from ..model.affine_layers import Weighted
from ..model.inputs_and_outputs import Call, Inputs, Output
from .memory_estimate import MemoryEstimate, memory_estimate
from .recording import Recording


@dataclass(frozen=True)
class Row:
    """Step of a forward pass (call of a layer or function), with the rule or kernel that covers it.

    Attributes:
        name: Layer name, or module path and function.
        call: Index of the call.
        operation: Module type or function.
        rule: The rule assigned by the composite, or the kernel of the function.
        shape: Shape of the output.
        note: Remarks, for example that the step is uncovered or fused, or that the layer is reused or tied.
    """

    name: str
    call: int
    operation: str
    rule: str
    shape: tuple[int, ...]
    note: str = ""


@dataclass(frozen=True)
class Coverage:
    """List of the steps of a forward pass (calls of layers and functions), with the rule that covers each of them.

    Attributes:
        rows: One row per step, in execution order.
        constants: Operations that combine computed values with constants; such operations can absorb relevance.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> [(row.name, row.rule) for row in coverage(net, torch.randn(5, 3)).rows]
        [('0', 'ConservingEpsilon'), ('1', 'Pass'), ('2', 'ConservingEpsilon')]
    """

    rows: tuple[Row, ...]
    constants: tuple[str, ...]

    @property
    def is_complete(self) -> bool:
        """True if every step has a rule or a kernel.

        Examples:
            >>> coverage(nn.Linear(3, 2), torch.randn(5, 3)).is_complete
            True
        """
        return not any(row.note.startswith(("uncovered", "unsupported")) for row in self.rows)

    def __str__(self) -> str:
        header = ("step", "operation", "rule or kernel", "output", "note")
        body = [
            (
                row.name + (f":{row.call}" if row.call else ""),
                row.operation,
                row.rule,
                "×".join(map(str, row.shape)),
                row.note,
            )
            for row in self.rows
        ]
        table = [header, *body]
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        padded = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in table)
        lines = ["  ".join(cells).rstrip() for cells in padded]
        if self.constants:
            lines.append(f"constants that can absorb relevance: {', '.join(self.constants)}")
        lines.append("every step is covered" if self.is_complete else "NOT every step is covered")
        return "\n".join(lines)


@overload
def coverage(
    model: nn.Module,
    inputs: Inputs,
    composite: Composite | None = ...,
    additional_forward_args: Any = ...,
    additional_forward_kwargs: Mapping[str, Any] | None = ...,
    output: Output | None = ...,
    batched: bool = ...,
    *,
    memory: Literal[False] = ...,
) -> Coverage: ...
@overload
def coverage(
    model: nn.Module,
    inputs: Inputs,
    composite: Composite | None = ...,
    additional_forward_args: Any = ...,
    additional_forward_kwargs: Mapping[str, Any] | None = ...,
    output: Output | None = ...,
    batched: bool = ...,
    *,
    memory: Literal[True],
) -> MemoryEstimate: ...
def coverage(
    model: nn.Module,
    inputs: Inputs,
    composite: Composite | None = None,
    additional_forward_args: Any = None,
    additional_forward_kwargs: Mapping[str, Any] | None = None,
    output: Output | None = None,
    batched: bool = True,
    *,
    memory: bool = False,
) -> Coverage | MemoryEstimate:
    """Runs the model once and lists the rule or kernel of every step, or estimates the memory of a measure.

    Args:
        model: The network, in evaluation mode.
        inputs: As in :class:`~nrm_plugin.RelevanceMeasure`.
        composite: A Zennit composite, or None for the default of this package.
        additional_forward_args: As in :class:`~nrm_plugin.RelevanceMeasure`.
        additional_forward_kwargs: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        batched: As in :class:`~nrm_plugin.RelevanceMeasure`.
        memory: If True, returns an estimate of the memory and time of a measure with the default composite instead. The
            model is then not run, and none of its memory is allocated.

    Raises:
        InputError, ModelStateError, GradModeError: As raised by :class:`~nrm_plugin.RelevanceMeasure` for these
            arguments.

    Examples:
        >>> print(coverage(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), torch.randn(5, 3)))
        step  operation  rule or kernel     output  note
        0     Linear     ConservingEpsilon  5×4
        1     ReLU       Pass               5×4
        every step is covered
    """
    if memory:
        return memory_estimate(model, Call(inputs, additional_forward_args, additional_forward_kwargs, batched), output)
    plain = composite.composite if isinstance(composite, Normalized) else composite
    canonized = Normalized(NRMDefault() if plain is None else plain, uncovered="gradient")
    canonized.uncovered = (
        "error"  # reports functions of weights without a rule instead of raising an error; does not affect modules
    )
    call = Call(inputs, additional_forward_args, additional_forward_kwargs, batched)
    recording = Recording(model, call, canonized, output)
    steps = [vertex.step for vertex in reversed(recording.graph.vertices) if vertex.step is not None]
    calls = Counter(step.name for step in steps)
    tied = _tied(model)
    rows = tuple(_row(step, calls[step.name], tied) for step in steps)
    with torch.no_grad():
        constants = [
            recording.taps.name_at(number)
            for number, vertex in enumerate(recording.graph.vertices)
            if vertex.constant_share() is not None
        ]
    return Coverage(rows, tuple(dict.fromkeys(reversed(constants))))


def _row(step: Step, calls: int, tied: dict[str, str]) -> Row:
    operation, rule = step.name.rpartition(".")[2], step.rule
    if isinstance(step, LayerStep):
        rule, module = type(step.layer_call.rule).__name__, step.layer_call.module
        operation = operation if isinstance(module, Weighted) else type(module).__name__
    notes = []
    if rule == "PlainGradient":
        notes.append("uncovered: the composite has no rule for it")
    if isinstance(step, FunctionStep) and step.unsupported_call is not None:
        notes.append("unsupported: raises when relevance arrives")
    if isinstance(step, LayerStep) and step.is_identity:
        notes.append("fused into its neighbor")
    if calls > 1:
        notes.append(f"called {calls} times")
    if step.name in tied:
        notes.append(f"shares weights with {tied[step.name]}")
    return Row(step.name, step.call, operation, rule, tuple(step.shape), "; ".join(notes))


def _tied(model: nn.Module) -> dict[str, str]:
    """Returns the name of the earlier layer with which each layer shares a parameter, keyed by the later layer."""
    owners: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None and owners.setdefault(id(parameter), name) != name:
                tied[name] = owners[id(parameter)]
    return tied
