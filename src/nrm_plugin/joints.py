"""Joint relevance of all groups of one tap with all groups of a tap below it."""

from __future__ import annotations

import torch
from torch import Tensor

from .graph import Buffer, Vertex
from .kernels import BranchKernel, IdentityKernel
from .recording import Place, Recording, Tap
from .routes import is_whole, operation
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
    gain = step.gain_for(relevance.unsqueeze(0))
    return step.kernel.channel_edges(relevance if gain is None else relevance * gain)


_KEEPING_CHANNELS = frozenset(
    """
    maxpool1d maxpool2dwithindices maxpool3dwithindices mkldnnmaxpool2d adaptivemaxpool2d adaptivemaxpool3d clone alias
    """.split()
)
"""Routes that hand relevance to the same channel, and lose none."""


def neighbour_matrix(recording: Recording, upper: Tap, lower: Tap, relevance: Tensor) -> tuple[Tensor, Cost] | None:
    """The channel matrix of two taps with one linear step between them, by one weight gradient instead of passes.

    Everything else between them must keep channels and hand down all relevance, so that a walk through a channel of
    the step goes on through the same channel of the tap. None where that is not so.

    Args:
        recording: The recording.
        upper: The tap that walks cross first.
        lower: The tap below.
        relevance: Marginal of the upper tap, ``(N, *shape)``.
    """
    chain = _chain(recording, upper, lower)
    if chain is None:
        return None
    steps = Cost()
    for index in chain:
        vertex = recording.graph.vertices[index]
        if vertex.step is not None:
            steps += Cost(1, 1)
            if isinstance(vertex.step.kernel, BranchKernel):
                return edge_matrix(recording, index, relevance), steps
        arriving = [relevance.unsqueeze(0), *[None] * (len(vertex.shapes) - 1)]
        parts, _ = vertex.pull(arriving)
        part = next((part for part in parts if part is not None), None)
        if part is None:
            return None
        relevance = part.squeeze(0)
    return None


def _chain(recording: Recording, upper: Tap, lower: Tap) -> list[int] | None:
    """The vertices from one tap to the other, where each has one input, one is linear and the rest keep channels."""
    if not isinstance(upper.place, Buffer) or not isinstance(lower.place, Buffer):
        return None
    place, chain, linear = upper.place, [], 0
    while place != lower.place:
        vertex = recording.graph.vertices[place.vertex]
        # Pooling has a second output, of positions, that hands nothing down.
        if place.number != 0 or len([edge for edge in vertex.edges if edge is not None]) != 1:
            return None
        is_linear = _is_linear(vertex, len(upper.shape))
        if not is_linear and not _keeps_channels(recording, vertex):
            return None
        linear += is_linear
        chain.append(place.vertex)
        place = next(edge for edge in vertex.edges if edge is not None)
    fits = all(tap.channel_dim % len(tap.shape) == _channels_of(len(tap.shape)) for tap in (upper, lower))
    return chain if linear == 1 and fits else None


def _channels_of(dims: int) -> int:
    return 1 if dims > 3 else dims - 1


def _is_linear(vertex: Vertex, dims: int) -> bool:
    """A convolution of maps, or a linear layer whose features are the last dimension."""
    kernel = None if vertex.step is None else vertex.step.kernel
    if not isinstance(kernel, BranchKernel) or kernel.weight is None or kernel.rerun is None:
        return False
    return kernel.weight.ndim == (dims if dims > 3 else 2)


def _keeps_channels(recording: Recording, vertex: Vertex) -> bool:
    if vertex.step is not None:
        return isinstance(vertex.step.kernel, IdentityKernel)
    if is_whole(vertex.node):
        same = (tuple(recording.graph.shape(edge)) == tuple(vertex.shapes[0]) for edge in vertex.edges if edge)
        return all(same)
    return operation(vertex.node).lower() in _KEEPING_CHANNELS


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
