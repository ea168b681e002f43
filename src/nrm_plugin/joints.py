"""Joint relevance of all groups of one tap with all groups of a tap below it."""

from __future__ import annotations

import torch
from torch import Tensor

from .graph import Buffer
from .kernels import BranchKernel
from .recording import Place, Recording, Tap
from .sweeps import Cost, Vectors, pull

CHUNK = 16
"""Groups of the upper tap that are carried at once."""


def joint_matrix(
    recording: Recording, upper: Tap, lower: Tap, relevance: Tensor, by_neuron: bool
) -> tuple[Tensor, Cost]:
    """``(N, K_upper, K_lower)`` by partial passes from the masked upper tap, and their cost.

    Args:
        recording: The recording.
        upper: The tap that walks cross first.
        lower: The tap below.
        relevance: Marginal of the upper tap, ``(N, *shape)``.
        by_neuron: Every neuron is a group of its own; else every channel is.
    """
    labels = _labels(upper, by_neuron)
    columns = _labels(lower, by_neuron).to(relevance.device)
    width = int(columns.max()) + 1
    rows, cost = [], Cost()
    for first in range(0, int(labels.max()) + 1, CHUNK):
        groups = range(first, min(first + CHUNK, int(labels.max()) + 1))
        vectors = {group: relevance * (labels == group).to(relevance.device) for group in groups}
        collect = _Collect(lower.place)
        cost += pull(recording.graph, _start(recording, upper.place, vectors), _Prune(recording, lower, collect))
        for group in groups:
            found = collect.vectors.get(group, relevance.new_zeros(lower.shape))
            flat = found.reshape(recording.batch, -1)
            rows.append(flat.new_zeros((recording.batch, width)).index_add_(1, columns.flatten(), flat))
    return torch.stack(rows, 1), cost


def edge_matrix(recording: Recording, vertex: int, relevance: Tensor) -> Tensor:
    """Channel × channel joint across one linear step, ``(N, K_upper, K_lower)``, from weight gradients.

    Args:
        recording: The recording.
        vertex: A step whose kernel has branches with weights.
        relevance: Marginal at its output, ``(N, *out)``.
    """
    step = recording.graph.vertices[vertex].step
    assert step is not None
    assert isinstance(step.kernel, BranchKernel)
    gain = step.gain
    return step.kernel.channel_edges(relevance if gain is None else relevance * gain)


def _labels(tap: Tap, by_neuron: bool) -> Tensor:
    """Group of every neuron of a tap, ``tap.shape[1:]``."""
    inner = tap.shape[1:]
    if by_neuron or not inner:
        return torch.arange(inner.numel()).reshape(inner)
    dim = tap.channel_dim % len(tap.shape) - 1
    view = [1] * len(inner)
    view[dim] = -1
    return torch.arange(inner[dim]).view(view).expand(inner)


def _start(recording: Recording, place: Place, vectors: Vectors[int]) -> list[tuple[Buffer, Vectors[int]]]:
    if isinstance(place, Buffer):
        return [(place, vectors)]
    edge = recording.graph.vertices[place[0]].edges[place[1]]
    assert edge is not None
    return [(edge, vectors)]


class _Collect:
    def __init__(self, place: Place) -> None:
        self.place = place
        self.vectors: Vectors[int] = {}


class _Prune:
    """Stops where the lower tap was crossed, or cannot be reached any more."""

    def __init__(self, recording: Recording, lower: Tap, collect: _Collect) -> None:
        self.recording, self.collect = recording, collect
        self.bit = 1 << recording.index[lower.place]

    def at_buffer(self, buffer: Buffer, vectors: Vectors[int]) -> Vectors[int]:
        if buffer == self.collect.place:
            self.collect.vectors = dict(vectors)
            return {}
        return vectors if self.recording.below[buffer.vertex] & self.bit else {}

    def at_edge(self, vertex: int, number: int, vectors: Vectors[int]) -> Vectors[int]:
        if (vertex, number) == self.collect.place:
            self.collect.vectors = dict(vectors)
            return {}
        return vectors if self.recording.through[vertex][number] & self.bit else {}

    def at_sink(self, vertex: int, number: int, kind: str, vectors: Vectors[int], share: Tensor) -> None:
        """Absorbed walks do not reach the lower tap."""
