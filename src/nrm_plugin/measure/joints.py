"""Joint relevance of the groups of neurons at two taps (hook points), of shape ``(N, K_upper, K_lower)``.

Source: docs/measure.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.base import IdentityKernel
from ..kernels.channel_pairs import channel_edges
from ..kernels.rule_branch_kernel import BranchKernel
from ..model.zero_one_routes import is_whole, operation
from ..recording.graph import Vertex
from ..recording.places import Buffer, Edge, Place
from ..recording.propagation import Cost, Vectors, Visitor, pull, push, stacked
from ..recording.recording import Recording
from ..recording.taps import Tap
from .groups import Over, by_label, labels_of
from .memory_budget import in_chunks, width_of
from .totals import Totals


def joint_matrices(
    totals: Totals, pairs: Sequence[tuple[Tap, Tap]], overs: Sequence[tuple[Over, Over]], max_memory: int | None
) -> tuple[list[Tensor], Cost]:
    """Computes the joint relevance matrix of each pair of taps.

    Args:
        totals: Totals of a pass that stored the relevance of the upper taps.
        pairs: The upper and lower tap of each pair.
        overs: The groups of the upper and of the lower tap of each pair.
        max_memory: Memory budget in bytes, or None for the default of the device.

    Returns:
        One tensor of shape ``(N, K_upper, K_lower)`` per pair, and the total cost.
    """
    recording, cost = totals.recording, totals.cost
    matrices = []
    for (upper, lower), over in zip(pairs, overs, strict=True):
        relevance = totals.relevance(upper)
        by_channel = all(isinstance(one, str) and one == "channel" for one in over)
        direct = neighbor_matrix(recording, upper, lower, relevance) if by_channel else None
        width = width_of(recording, max_memory, [upper.place, lower.place])
        matrix, spent = direct or joint_matrix(recording, upper, lower, relevance, over, width)
        matrices.append(matrix)
        cost += spent
    return matrices, cost


def joint_matrix(
    recording: Recording, upper: Tap, lower: Tap, relevance: Tensor, over: tuple[Over, Over], width: int
) -> tuple[Tensor, Cost]:
    """Computes the joint relevance matrix of two taps, with one vector per group of the tap with fewer groups.

    Vectors are propagated only between the two taps, in passes of ``width`` vectors.

    Args:
        recording: The recording of the forward pass.
        upper: The upper tap, which walks cross first.
        lower: Tap below ``upper``.
        relevance: Marginal of the upper tap, of shape ``(N, *shape)``.
        over: The groups of the upper and of the lower tap.
        width: Number of relevance vectors per pass.

    Returns:
        The joint relevance, of shape ``(N, K_upper, K_lower)``, and the cost.
    """
    rows, columns = labels_of(upper, over[0]), labels_of(lower, over[1])
    relevance = upper.layout.fold(relevance)
    down = int(rows.max()) <= int(columns.max())
    spent: list[Cost] = []

    def run(groups: Sequence[int]) -> list[Tensor]:
        device = recording.graph.device((upper if down else lower).place)
        labels = (rows if down else columns).to(device).unsqueeze(0)
        if down:
            vectors = {group: relevance * upper.layout.fold(labels == group) for group in groups}
            arrived, cost = propagated(recording, upper, lower, vectors)
            sums = by_label(lower.layout.unfold(arrived, 1).flatten(2), columns)
        else:
            members = [lower.layout.fold((labels == group).to(relevance.dtype)) for group in groups]
            masks = torch.stack([mask.expand(lower.tensor_shape) for mask in members])
            collected, cost = push(recording.graph, lower.place, upper.place, masks)
            values = (
                relevance.new_zeros((len(groups), *relevance.shape)) if collected is None else collected * relevance
            )
            sums = by_label(upper.layout.unfold(values, 1).flatten(2), rows)
        spent.append(cost)
        return list(sums)

    count = int((rows if down else columns).max()) + 1
    parts = in_chunks(range(count), width, run, f"joint relevance of {lower.names[0] if lower.names else 'a tap'}")
    return torch.stack(parts, 1 if down else 2), sum(spent, start=Cost())


def propagated(recording: Recording, upper: Tap, lower: Tap, vectors: Vectors[int]) -> tuple[Tensor, Cost]:
    """Propagates ``K`` vectors, in the tensor layout of the model, from a tap to a lower tap."""
    (arrived,), cost = propagated_to(recording, upper, [lower], vectors)
    return arrived, cost


def propagated_to(
    recording: Recording, upper: Tap, lowers: Sequence[Tap], vectors: Vectors[int]
) -> tuple[list[Tensor], Cost]:
    """Propagates vectors from a tap to several lower taps in one pass. The pass stops at the last of them."""
    collect = _Collect(recording, lowers)
    cost = pull(recording.graph, [(recording.graph.buffer(upper.place), vectors)], collect)
    like = next(iter(vectors.values()))
    arrived = []
    for lower in lowers:
        known = collect.vectors.get(lower.place, {})
        empty = like.new_zeros(lower.tensor_shape, device=recording.graph.device(lower.place))
        arrived.append(stacked([known.get(key, empty) for key in vectors]))
    return arrived, cost


def edge_matrix(recording: Recording, vertex: int, relevance: Tensor) -> Tensor:
    """Computes the joint relevance of all channel pairs across a linear step, in shape ``(N, K_upper, K_lower)``.

    Args:
        recording: The recording of the forward pass.
        vertex: Index of a step whose kernel consists of branches with weights.
        relevance: Marginal at the output of the step, of shape ``(N, *out)``.
    """
    step = recording.graph.vertices[vertex].step
    assert step is not None
    assert isinstance(step.kernel, BranchKernel)
    gain = step.gain_for(relevance.unsqueeze(0))
    return channel_edges(step.kernel, relevance if gain is None else relevance * gain)


_KEEPING_CHANNELS = frozenset(
    """
    maxpool1d maxpool2dwithindices maxpool3dwithindices mkldnnmaxpool2d adaptivemaxpool2d adaptivemaxpool3d clone alias
    """.split()
)
"""Operations that propagate the relevance of a channel to the same channel."""


def neighbor_matrix(recording: Recording, upper: Tap, lower: Tap, relevance: Tensor) -> tuple[Tensor, Cost] | None:
    """Computes the joint relevance of the channels of two taps separated by one linear step, from one weight gradient.

    All other operations between the taps must be channelwise: a walk through a channel of the step then crosses the
    same channel of the tap. Otherwise, returns None.

    Args:
        recording: The recording of the forward pass.
        upper: The upper tap, which walks cross first.
        lower: Tap below ``upper``.
        relevance: Marginal of the upper tap, of shape ``(N, *shape)``.

    Returns:
        The joint relevance, of shape ``(N, K_upper, K_lower)``, and the cost; or None.
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
    """Returns the vertices between two taps if they form a chain of one linear step and channelwise operations."""
    if not isinstance(upper.place, Buffer) or not isinstance(lower.place, Buffer) or not _are_plain(upper, lower):
        return None
    place, chain, linear = upper.place, [], 0
    while place != lower.place:
        vertex = recording.graph.vertices[place.vertex]
        # The second output of max pooling, the indices, propagates no relevance.
        if place.number != 0 or len([edge for edge in vertex.edges if edge is not None]) != 1:
            return None
        is_linear = _is_linear(vertex, len(upper.shape))
        if not is_linear and not _keeps_channels(recording, vertex):
            return None
        linear += is_linear
        chain.append(place.vertex)
        place = next(edge for edge in vertex.edges if edge is not None)
    have_channels = all(tap.channel_dim % len(tap.shape) == _channels_of(len(tap.shape)) for tap in (upper, lower))
    return chain if linear == 1 and have_channels else None


def _are_plain(*taps: Tap) -> bool:
    """Returns True if the first dimension of every tap's tensor indexes samples."""
    return all(tap.layout.is_plain for tap in taps)


def _channels_of(dims: int) -> int:
    return 1 if dims > 3 else dims - 1


def _is_linear(vertex: Vertex, dims: int) -> bool:
    """Returns True if a vertex is a convolution or a linear layer applied to the last dimension."""
    kernel = None if vertex.step is None else vertex.step.kernel
    if not isinstance(kernel, BranchKernel) or kernel.layer is None:
        return False
    return kernel.layer.weight.ndim == (dims if dims > 3 else 2)


def _keeps_channels(recording: Recording, vertex: Vertex) -> bool:
    if vertex.step is not None:
        return isinstance(vertex.step.kernel, IdentityKernel)
    if is_whole(vertex.node):
        same = (tuple(recording.graph.shape(edge)) == tuple(vertex.shapes[0]) for edge in vertex.edges if edge)
        return all(same)
    return operation(vertex.node).lower() in _KEEPING_CHANNELS


class _Collect(Visitor[int]):
    """Callbacks of a pass that collect the relevance arriving at several tensors and stop the pass below the last."""

    def __init__(self, recording: Recording, lowers: Sequence[Tap]) -> None:
        self.recording = recording
        self.vectors: dict[Place, Vectors[int]] = {}
        self.bits = {lower.place: 1 << recording.taps.index[lower.place] for lower in lowers}

    def at_buffer(self, buffer: Buffer, vectors: Vectors[int]) -> Vectors[int]:
        return self._collected(buffer, vectors, self.recording.taps.marks.below_vertex[buffer.vertex])

    def at_edge(self, edge: Edge, vectors: Vectors[int]) -> Vectors[int]:
        return self._collected(edge, vectors, self.recording.taps.marks.below_edge[edge.vertex][edge.number])

    def _collected(self, place: Place, vectors: Vectors[int], below: int) -> Vectors[int]:
        if place in self.bits:
            self.vectors[place] = dict(vectors)
        return vectors if any(bit & below for other, bit in self.bits.items() if other != place) else {}
