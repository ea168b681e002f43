"""Passes over the graph of a recording, which propagate relevance down to the inputs or values up to the output.

A pass propagates several vectors at once, each identified by a key. In a downward pass, a visitor may modify the
vectors at each tensor. Events are compiled to visitors in the package ``measure``.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from ..model.shapes_without_values import storage_address
from ..model.trace_guards import is_traced
from .graph import Graph, Vertex
from .places import Buffer, Edge, Place, Sink

Key = TypeVar("Key", bound=Hashable)
Vectors = dict[Key, Tensor]


@dataclass(frozen=True)
class Cost:
    """Cost of one or more passes.

    Attributes:
        steps: Number of kernel evaluations.
        vectors: Number of propagated relevance vectors. A kernel can propagate several vectors at once.
    """

    steps: int = 0
    vectors: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.steps + other.steps, self.vectors + other.vectors)


class Visitor(Protocol[Key]):
    """Callbacks of a downward pass, which receive the relevance at each tensor, input of a vertex, and sink.

    By default, they propagate all relevance. Each relevance vector has the shape of its tensor.
    """

    def at_buffer(self, buffer: Buffer, vectors: Vectors[Key]) -> Vectors[Key]:
        """Called when all relevance of a tensor has arrived. Returns the relevance to propagate further."""
        return vectors

    def at_edge(self, edge: Edge, vectors: Vectors[Key]) -> Vectors[Key]:
        """Called when a vertex propagates relevance along an edge. Returns the relevance to propagate further."""
        return vectors

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[Key], share: Tensor) -> None:
        """Called when a vertex absorbs a fraction of the relevance that has arrived at its output ``number``.

        ``kind`` is ``"residual"`` or ``"constants"``.
        """
        return None  # ignore by default


def pull(
    graph: Graph, start: Iterable[tuple[Buffer, Vectors[Key]]], visitor: Visitor[Key], absolute: bool = False
) -> Cost:
    """Runs one downward pass, which propagates relevance toward the inputs.

    Args:
        graph: The graph of a recording.
        start: The initial relevance at one or more buffers.
        visitor: Receives all vectors and may modify them.
        absolute: Whether to propagate by the absolute values of the kernels.

    Returns:
        The cost of the pass.
    """
    waiting: list[dict[int, Vectors[Key]]] = [{} for _ in graph.vertices]
    for buffer, vectors in start:
        _add(waiting[buffer.vertex].setdefault(buffer.number, {}), vectors)
    steps = vectors_of_steps = 0
    for index, vertex in enumerate(graph.vertices):
        arrived = {number: visitor.at_buffer(Buffer(index, number), v) for number, v in waiting[index].items()}
        waiting[index] = {}
        keys = list(dict.fromkeys(key for vectors in arrived.values() for key in vectors))
        if not keys or not vertex.edges:
            continue
        if len(keys) == 1 and vertex.is_route_of_vectors:
            _route(graph, index, keys[0], arrived, visitor, waiting)
            continue
        rows = [_stack(arrived.get(number, {}), keys) for number in range(len(vertex.shapes))]
        parts, share = vertex.pull(rows, absolute)
        if vertex.step is not None:
            steps, vectors_of_steps = steps + 1, vectors_of_steps + len(keys)
        if share is not None:
            visitor.at_sink(Sink(index), 0, "residual", arrived[0], share)
        _absorb_constants(vertex, Sink(index), rows, keys, visitor)
        for number, (part, edge) in enumerate(zip(parts, vertex.edges, strict=True)):
            if part is None or edge is None:
                continue
            shape = graph.shape(edge)
            unchanged = arrived[0].values() if part is rows[0] else part.unbind()
            passed = {key: _of_shape(row, shape) for key, row in zip(keys, unchanged, strict=True)}
            _add(waiting[edge.vertex].setdefault(edge.number, {}), visitor.at_edge(Edge(index, number), passed))
    return Cost(steps, vectors_of_steps)


def _route(
    graph: Graph,
    index: int,
    key: Key,
    arrived: dict[int, Vectors[Key]],
    visitor: Visitor[Key],
    waiting: list[dict[int, Vectors[Key]]],
) -> None:
    """Propagates a single vector through a route, without the leading dimension for several vectors."""
    vertex = graph.vertices[index]
    vectors = [arrived[number].get(key) if number in arrived else None for number in range(len(vertex.shapes))]
    if vertex.may_hold_constants:
        _absorb_constants(vertex, Sink(index), [v if v is None else v.unsqueeze(0) for v in vectors], [key], visitor)
    for number, (part, edge) in enumerate(zip(vertex.route(vectors), vertex.edges, strict=True)):
        if part is not None and edge is not None:
            row = {key: _of_shape(part, graph.shape(edge))}
            _add(waiting[edge.vertex].setdefault(edge.number, {}), visitor.at_edge(Edge(index, number), row))


def _of_shape(row: Tensor, shape: torch.Size) -> Tensor:
    """Sums relevance over the dimensions along which the tensor at an edge is broadcast."""
    return row if row.shape == shape else row.sum_to_size(shape)


def _absorb_constants(
    vertex: Vertex, sink: Sink, stacked: list[Tensor | None], keys: list[Key], visitor: Visitor[Key]
) -> None:
    if not vertex.may_hold_constants:
        return
    shares = vertex.constant_share()
    if shares is None:
        return
    for number, (share, item) in enumerate(zip(shares, stacked, strict=True)):
        if item is not None:
            visitor.at_sink(sink, number, "constants", dict(zip(keys, item, strict=True)), share)


def _stack(vectors: Vectors[Key], keys: list[Key]) -> Tensor | None:
    if not vectors:
        return None
    like = next(iter(vectors.values()))
    return stacked([vectors[key] if key in vectors else torch.zeros_like(like) for key in keys])


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Stacks tensors of the same shape, without a copy if they are consecutive rows of one tensor in memory.

    In a trace, they are always copied. They may be elsewhere in memory when the trace is replayed.
    """
    first = rows[0]
    if len(rows) == 1:
        return first.unsqueeze(0)
    return (
        first.as_strided((len(rows), *first.shape), (first.numel(), *first.stride()))
        if not is_traced() and _adjoin(rows)
        else torch.stack(list(rows))
    )


def _adjoin(rows: Sequence[Tensor]) -> bool:
    """Returns True if tensors are consecutive rows of one tensor in memory."""
    first = rows[0]
    memory, step = storage_address(first), first.numel()
    return step > 0 and all(
        row.is_contiguous()
        and row.shape == first.shape
        and row.dtype == first.dtype
        and storage_address(row) == memory
        and row.storage_offset() == first.storage_offset() + number * step
        for number, row in enumerate(rows)
    )


def _add(total: Vectors[Key], vectors: Vectors[Key]) -> None:
    for key, vector in vectors.items():
        total[key] = total[key] + vector if key in total else vector


def push(graph: Graph, lower: Place, upper: Place, values: Tensor, bound: bool = False) -> tuple[Tensor | None, Cost]:
    """Runs one upward pass, which sums values at a lower tap over all walks from each neuron of an upper tap.

    Args:
        graph: The graph of a recording.
        lower: Place of the tap at which the values are given.
        upper: Place of the tap at which the sums are returned.
        values: The values at the lower tap, of shape ``(K, N, *shape)``.
        bound: Whether to use upper bounds on the absolute kernels, which requires nonnegative values.

    Returns:
        The values at the upper tap, of shape ``(K, N, *shape)``, or None for zeros; and the cost of the pass.
    """
    known: dict[Buffer, Tensor | None] = {}

    def through(edge: Edge) -> Tensor | None:
        buffer = graph.vertices[edge.vertex].edges[edge.number]
        if lower in (edge, buffer):
            return values
        return None if buffer is None else known.get(buffer)

    cost = Cost()
    for index in range(len(graph.vertices) - 1, upper.vertex - 1, -1):
        vertex = graph.vertices[index]
        arrived = [through(Edge(index, number)) for number in range(len(vertex.edges))]
        if all(part is None for part in arrived) or (isinstance(upper, Edge) and index == upper.vertex):
            continue
        pushed: list[Tensor | None]
        if bound and vertex.step is not None:
            pushed = [vertex.step.push_bound(tuple(arrived))]
        else:
            pushed = vertex.push(arrived, [None] * len(vertex.shapes))
        cost += Cost(1, len(values)) if vertex.step is not None else Cost()
        known |= {Buffer(index, number): rows for number, rows in enumerate(pushed)}
    return (known.get(upper) if isinstance(upper, Buffer) else through(upper)), cost
