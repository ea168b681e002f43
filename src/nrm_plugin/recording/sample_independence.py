"""Tests of whether the samples of a batch depend on each other, in the forward pass, in relevance, or in a rule.

Independence is tested if it does not follow from the operations alone. The relevance of each sample is tracked through
the graph. The model is run again with some samples modified, which must not affect the outputs of the other samples or,
if there are unknown rules, their relevance. If values outside the graph may combine samples, the model is also run on
single samples.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from ..errors import FoldingError, NRMError
from ..model.inputs_and_outputs import Change
from .graph import Graph
from .places import Buffer
from .propagation import Vectors, Visitor, pull
from .sample_positions import Samples
from .sample_rows import rules_are_known

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest change of an output, relative to the largest output, that is attributed to rounding."""
TOLERANCE_OF_SHORT = 3e-2
""":data:`TOLERANCE` in bfloat16 and float16."""
TOLERANCE_OF_RULES = 1e-3
"""Largest change of the relevance of an input, relative to the largest, that is attributed to rounding."""


ALONE = 16
"""Maximum number of samples that are run individually."""
SUSPECTS = 4
"""Maximum number of samples that are tested further because their outputs differ when run individually."""


class Exchange(Enum):
    """Kind of the values that replace the inputs of selected samples."""

    OTHERS = "values of other samples, in another order"
    FAR = "large values, which thresholds notice"
    OPPOSITE = "large values of the opposite sign"
    LARGEST = "the largest value of all samples, which remains a valid id"
    SMALLEST = "the smallest value of all samples"
    COPIES = "the values of the first other sample"


SCALES = {Exchange.OTHERS: 0.75, Exchange.FAR: 16.0, Exchange.OPPOSITE: -16.0}
"""Factors of the values of other samples. They differ from 1, so identical samples change as well."""


class Run(Protocol):
    """Interface of a recording."""

    output: Tensor

    @property
    def graph(self) -> Graph: ...
    @property
    def samples(self) -> Samples: ...


class Rerun(Protocol):
    """Interface of objects that run the model again on modified inputs."""

    def recording(self, change: Change) -> Run: ...
    def outputs(self, change: Change, others: Change = ...) -> Tensor: ...
    @property
    def has_hooks(self) -> bool: ...
    def with_hooks(self) -> Rerun: ...


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


def find_samples(recording: Run, start: Tensor, rerun: Rerun) -> None:
    """Locates the samples in each tensor of a recording.

    Args:
        recording: The recording of the forward pass.
        start: Relevance of the outputs.
        rerun: Object that runs the model of the recording again.

    Raises:
        FoldingError: If the samples depend on each other.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(start.shape, generator=generator, dtype=start.dtype).to(start.device) + 0.5
    with torch.inference_mode(False), torch.no_grad():
        if not _is_followed(recording.samples, noise):
            noise = noise * (start != 0)  # the explained outputs may not depend on the operation without a kernel
            if not _is_followed(recording.samples, noise):
                return  # every query below this operation raises the same error
    _check_rows_of_inputs(recording.samples)
    rerun = _with_needed_hooks(recording, rerun)
    are_known = rules_are_known(recording.graph)
    for chosen, exchange in _exchanges(recording):
        _check_outputs(recording, chosen, exchange, rerun)
        if not are_known:
            _check_relevance(recording, noise, chosen, rerun)
    if recording.samples.may_mix:
        _check_alone(recording, rerun)


def _is_followed(samples: Samples, noise: Tensor) -> bool:
    """Locates the samples above all operations without a kernel. Returns True if there are no such operations."""
    try:
        samples.find(noise)
    except FoldingError:
        raise
    except NRMError:
        return False
    return True


def _exchanges(recording: Run) -> Iterator[tuple[Tensor, Exchange]]:
    """Yields masks of the samples to modify (even and odd, first and second half), with the kind of their new values.

    Gates and branches may depend on other samples by thresholds that only large changes cross. If the model looks up
    integer inputs, values remain in range. An out-of-range index crashes the process on some devices.
    """
    count = recording.samples.count
    first, second = _extremes(recording)
    numbers = torch.arange(count)
    yield numbers % 2 == 0, Exchange.OTHERS
    yield numbers % 2 == 1, Exchange.OTHERS
    yield numbers < (count + 1) // 2, first
    yield numbers >= (count + 1) // 2, second


def _extremes(recording: Run) -> tuple[Exchange, Exchange]:
    ends = {number for number, vertex in enumerate(recording.graph.vertices) if vertex.leaf is not None}
    are_free = ends <= recording.samples.inputs
    return (Exchange.FAR, Exchange.OPPOSITE) if are_free else (Exchange.LARGEST, Exchange.SMALLEST)


def _with_needed_hooks(recording: Run, rerun: Rerun) -> Rerun:
    """Returns a rerun that calls the hooks of the user only if the output depends on them."""
    if not rerun.has_hooks:
        return rerun
    try:
        output = rerun.outputs(_unchanged)
    except Exception:
        return rerun.with_hooks()
    every = torch.ones(recording.samples.count, dtype=torch.bool)
    return rerun.with_hooks() if _has_changed(recording, recording.output, output, every) else rerun


def _check_rows_of_inputs(samples: Samples) -> None:
    """Raises an error if the order of the samples differs between inputs and outputs."""
    for vertex in samples.inputs & samples.leaves.keys():
        if not samples.layout(Buffer(vertex, 0)).is_plain:
            raise samples.error("the input, whose order is not that of the outputs,")


def _check_outputs(recording: Run, chosen: Tensor, exchange: Exchange, rerun: Rerun) -> None:
    """Raises an error if the outputs of other samples change when the selected samples are modified."""
    other = _outputs(chosen, exchange, rerun)
    if other is None and exchange is not Exchange.OTHERS:
        other = _outputs(chosen, Exchange.OTHERS, rerun)
    if other is None or not _has_changed(recording, recording.output, other, ~chosen):
        return
    first, second = (rerun.outputs(_unchanged) for _ in range(2))
    if _has_changed(recording, first, other, ~chosen) and not _has_changed(recording, first, second, ~chosen):
        raise recording.samples.error("the output, which changes with the inputs of other samples,")


def _check_alone(recording: Run, rerun: Rerun) -> None:
    """Raises an error if a sample depends on others, as shown by runs on individual samples.

    This detects thresholds over all samples, for example. If a model treats samples differently by their position in
    the batch, its outputs do not follow a permutation of the samples. Only an exchange then shows whether samples
    depend on each other.
    """
    numbers, suspects = torch.arange(recording.samples.count), 0
    for number in range(0, len(numbers), -(-len(numbers) // ALONE)):
        if not _differs(recording, slice(number, number + 1), rerun):
            continue
        if not suspects and not _is_ordered(recording, rerun):
            raise recording.samples.error("the output, which changes without the other samples,")
        suspects += 1
        for exchange in (Exchange.COPIES, *_extremes(recording)):
            _check_outputs(recording, numbers != number, exchange, rerun)
        if suspects == SUSPECTS:
            return


def _is_ordered(recording: Run, rerun: Rerun) -> bool:
    """Returns True if outputs vary between identical runs or do not follow a permutation of the samples."""
    count = recording.samples.count
    return any(_differs(recording, rows, rerun) for rows in (torch.arange(count), torch.arange(count).roll(1)))


def _differs(recording: Run, rows: slice | Tensor, rerun: Rerun) -> bool:
    """Returns True if the outputs differ when the model is run only on the selected rows of its inputs.

    Additional arguments of the model are passed unchanged, or restricted to the selected rows.
    """
    count, layout = recording.samples.count, recording.samples.layout(recording.graph.output)
    expected = layout.unfold(recording.output.detach())[rows]
    differs = False

    def chosen(tensor: Tensor) -> Tensor:
        return tensor.detach()[rows]

    def chosen_of_others(tensor: Tensor) -> Tensor:
        return chosen(tensor) if tensor.shape[:1] == (count,) else tensor

    for others in (_unchanged, chosen_of_others):
        try:
            output = rerun.outputs(chosen, others)
        except Exception:  # a model may not accept a single sample
            continue
        if output.shape == expected.shape:
            if _is_close(output, expected, recording.output):
                return False
            differs = True
    return differs


def _outputs(chosen: Tensor, exchange: Exchange, rerun: Rerun) -> Tensor | None:
    """Returns the outputs after an exchange, or None if the model raises an error or its outputs overflow."""
    try:
        outputs = rerun.outputs(lambda tensor: changed(tensor, chosen, exchange))
    except Exception:
        return None
    return outputs if exchange is Exchange.OTHERS or bool(outputs.isfinite().all()) else None


def _has_changed(recording: Run, output: Tensor, other: Tensor, rows: Tensor) -> bool:
    layout = recording.samples.layout(recording.graph.output)
    if output.shape != other.shape:
        return True
    rows = rows.to(output.device)
    one, two = layout.unfold(output.detach())[rows], layout.unfold(other.detach())[rows]
    return not _is_close(one, two, output)


def _is_close(one: Tensor, two: Tensor, output: Tensor) -> bool:
    """Returns True if two sets of output rows agree, relative to the largest output."""
    return bool(((one - two).abs() <= tolerance_of(output)).all())


def tolerance_of(output: Tensor) -> Tensor:
    """Returns the largest absolute difference between two runs of a sample that is attributed to rounding."""
    return TOLERANCE.get(output.dtype, TOLERANCE_OF_SHORT) * output.detach().abs().max()


def _check_relevance(recording: Run, start: Tensor, chosen: Tensor, rerun: Rerun) -> None:
    """Raises an error if the relevance of other samples changes when the selected samples are modified."""
    try:
        other = rerun.recording(lambda tensor: changed(tensor, chosen))
    except Exception:
        return
    rows, leaves = ~chosen, _Leaves(other.graph)
    with torch.inference_mode(False), torch.no_grad():
        pull(other.graph, [(other.graph.output, {"": start})], leaves)
    for vertex, relevance in recording.samples.leaves.items():
        changed_relevance = leaves.relevance.get(vertex)
        if changed_relevance is None or changed_relevance.shape != relevance.shape:
            continue
        layout = recording.samples.layout(Buffer(vertex, 0))
        own = rows.to(relevance.device)
        one, two = layout.unfold(relevance)[own], layout.unfold(changed_relevance)[own]
        if bool(((one - two).abs() > TOLERANCE_OF_RULES * one.abs().max()).any()):
            raise recording.samples.error("the input, whose relevance changes with other samples by a rule,")


def changed(tensor: Tensor, chosen: Tensor, exchange: Exchange = Exchange.OTHERS) -> Tensor:
    """Replaces the inputs of the selected samples with the values of an exchange."""
    plain, inner = tensor.detach(), list(range(1, tensor.ndim))
    if exchange is Exchange.COPIES:
        other = plain[~chosen.to(tensor.device)][:1]
    elif exchange is Exchange.LARGEST or exchange is Exchange.SMALLEST:
        other = plain.amax(0, keepdim=True) if exchange is Exchange.LARGEST else plain.amin(0, keepdim=True)
    else:
        other = plain.roll(1, 0).flip(inner) if inner else plain.roll(1, 0)
        other = other * SCALES[exchange] if other.is_floating_point() else other
    return torch.where(chosen.to(tensor.device).reshape(-1, *(1,) * len(inner)), other, plain)


class _Leaves(Visitor[str]):
    """Visitor that collects the relevance of the inputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.relevance: dict[int, Tensor] = {}

    def at_buffer(self, buffer: Buffer, vectors: Vectors[str]) -> Vectors[str]:
        if self.graph.vertices[buffer.vertex].leaf is not None:
            self.relevance[buffer.vertex] = vectors[""]
        return vectors


__all__ = ["changed", "find_samples", "tolerance_of"]
