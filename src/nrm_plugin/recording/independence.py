"""Tests of whether the samples of a batch depend on each other: in the forward pass, in relevance, or in a rule.

If the operations do not prove independence, it is tested. Relevance of single samples is tracked through the graph, and
the model runs again with other values of some samples, which must change neither the outputs of the other samples nor,
if a rule is not known, their relevance.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ..errors import FoldingError, NRMError
from ..model.inputs_and_outputs import Change
from .graph import Graph
from .passes import Vectors, pull
from .places import Buffer, Edge, Sink
from .sample_rows import rules_are_known
from .samples import Samples

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Smallest change of outputs, relative to the largest output, that indicates a dependence between samples."""
TOLERANCE_OF_SHORT = 3e-2
"""Tolerance in bfloat16 and float16."""
TOLERANCE_OF_RULES = 1e-3
"""Tolerance for the relevance of the inputs."""
SCALE = 0.75
"""Factor of replacement values, which are taken from other samples, so that equal samples are changed as well."""


class Run(Protocol):
    """Interface of a recording."""

    output: Tensor

    @property
    def graph(self) -> Graph: ...
    @property
    def samples(self) -> Samples: ...


class Rerun(Protocol):
    """Interface of further runs of the model on changed inputs."""

    def recording(self, change: Change) -> Run: ...
    def outputs(self, change: Change) -> Tensor: ...


def find_samples(recording: Run, start: Tensor, rerun: Rerun) -> None:
    """Finds the samples of each tensor of a recording.

    Args:
        recording: The recording.
        start: Relevance of the outputs.
        rerun: Runs the model of the recording again.

    Raises:
        FoldingError: The samples depend on each other.
    """
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(start.shape, generator=generator, dtype=start.dtype).to(start.device) + 0.5
    with torch.inference_mode(False), torch.no_grad():
        try:
            recording.samples.find(noise)
        except FoldingError:
            raise
        except NRMError:  # an operation without a kernel, on which the explained outputs may not depend
            noise = noise * (start != 0)
            recording.samples.find(noise)
    _check_rows_of_inputs(recording.samples)
    are_known = rules_are_known(recording.graph)
    for chosen in _subsets(recording.samples.count):
        _check_outputs(recording, chosen, rerun)
        if not are_known:
            _check_relevance(recording, noise, chosen, rerun)


def _subsets(count: int) -> Iterator[Tensor]:
    """Yields sets of samples to change: every second sample, the first half, and the complements."""
    numbers = torch.arange(count)
    sets = [numbers % 2 == 0, numbers % 2 == 1]
    if count > 2:
        sets += [numbers < (count + 1) // 2, numbers >= (count + 1) // 2]
    yield from sets


def _check_rows_of_inputs(samples: Samples) -> None:
    """Raises unless each output depends on the input of the same sample."""
    for vertex in samples.inputs & samples.leaves.keys():
        if not samples.layout(Buffer(vertex, 0)).is_plain:
            raise samples.error("the input, whose order is not that of the outputs,")


def _check_outputs(recording: Run, chosen: Tensor, rerun: Rerun) -> None:
    """Raises if outputs of other samples depend on the inputs of the chosen samples."""
    try:
        other = rerun.outputs(lambda tensor: changed(tensor, chosen))
    except Exception:
        return
    if not _has_changed(recording, recording.output, other, ~chosen):
        return
    first, second = (rerun.outputs(lambda tensor: tensor) for _ in range(2))
    if _has_changed(recording, first, other, ~chosen) and not _has_changed(recording, first, second, ~chosen):
        raise recording.samples.error("the output, which changes with the inputs of other samples,")


def _has_changed(recording: Run, output: Tensor, other: Tensor, rows: Tensor) -> bool:
    layout = recording.samples.layout(recording.graph.output)
    if output.shape != other.shape:
        return True
    rows = rows.to(output.device)
    one, two = layout.unfold(output.detach())[rows], layout.unfold(other.detach())[rows]
    return not bool(
        ((one - two).abs() <= TOLERANCE.get(output.dtype, TOLERANCE_OF_SHORT) * output.detach().abs().max()).all()
    )


def _check_relevance(recording: Run, start: Tensor, chosen: Tensor, rerun: Rerun) -> None:
    """Raises if relevance of other samples depends on the inputs of the chosen samples."""
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


def changed(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Replaces the chosen samples by values of other samples, in another order, so that inputs remain valid."""
    inner = list(range(1, tensor.ndim))
    other = tensor.detach().roll(1, 0).flip(inner) if inner else tensor.detach().roll(1, 0)
    if other.is_floating_point():
        other = other * SCALE
    return torch.where(chosen.to(tensor.device).reshape(-1, *(1,) * len(inner)), other, tensor.detach())


class _Leaves:
    """The relevance of the inputs."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.relevance: dict[int, Tensor] = {}

    def at_buffer(self, buffer: Buffer, vectors: Vectors[str]) -> Vectors[str]:
        if self.graph.vertices[buffer.vertex].leaf is not None:
            self.relevance[buffer.vertex] = vectors[""]
        return vectors

    def at_edge(self, edge: Edge, vectors: Vectors[str]) -> Vectors[str]:
        return vectors

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[str], share: Tensor) -> None:
        pass


__all__ = ["changed", "find_samples"]
