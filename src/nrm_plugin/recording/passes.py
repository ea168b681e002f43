"""Passes over the graph of a recording: relevance down, values up.

Both carry several vectors at once, each under a key of its own, and let a visitor change them where a walk crosses
a tap. Nothing in here knows of events.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from .graph import Buffer, Graph, Place

Key = TypeVar("Key", bound=Hashable)
Vectors = dict[Key, Tensor]


@dataclass(frozen=True)
class Cost:
    """What passes cost: kernels run, and relevance vectors that went through them (several can share a run)."""

    steps: int = 0
    vectors: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.steps + other.steps, self.vectors + other.vectors)


class Visitor(Protocol[Key]):
    """What a pass asks on its way down. Every vector has the shape of its tensor."""

    def at_buffer(self, buffer: Buffer, vectors: Vectors[Key]) -> Vectors[Key]:
        """All relevance of one tensor has arrived; returns what goes on."""

    def at_edge(self, vertex: int, number: int, vectors: Vectors[Key]) -> Vectors[Key]:
        """What one vertex hands down one of its edges; returns what goes on."""

    def at_sink(self, vertex: int, number: int, kind: str, vectors: Vectors[Key], share: Tensor) -> None:
        """A vertex absorbs this share of what arrived at its output; ``kind`` is ``"residual"`` or ``"constants"``."""


def pull(
    graph: Graph, start: Iterable[tuple[Buffer, Vectors[Key]]], visitor: Visitor[Key], absolute: bool = False
) -> Cost:
    """One pass down.

    Args:
        graph: The graph of a recording.
        start: Relevance to begin with, at one or several buffers.
        visitor: Sees, and may change, every vector.
        absolute: Use kernels of absolute values.

    Returns:
        The cost.
    """
    waiting: list[dict[int, Vectors[Key]]] = [{} for _ in graph.vertices]
    for buffer, vectors in start:
        _add(waiting[buffer.vertex].setdefault(buffer.number, {}), vectors)
    cost = Cost()
    for index, vertex in enumerate(graph.vertices):
        arrived = {number: visitor.at_buffer(Buffer(index, number), v) for number, v in waiting[index].items()}
        waiting[index] = {}
        keys = list(dict.fromkeys(key for vectors in arrived.values() for key in vectors))
        if not keys or not vertex.edges:
            continue
        stacked = [_stack(arrived.get(number, {}), keys) for number in range(len(vertex.shapes))]
        parts, share = vertex.pull(stacked, absolute)
        cost += Cost(1, len(keys)) if vertex.step is not None else Cost()
        if share is not None:
            visitor.at_sink(index, 0, "residual", arrived[0], share)
        _absorb_constants(vertex, index, stacked, keys, visitor)
        for number, (part, edge) in enumerate(zip(parts, vertex.edges, strict=True)):
            if part is None or edge is None:
                continue
            shape = graph.shape(edge)
            rows = {key: row.sum_to_size(shape) for key, row in zip(keys, part, strict=True)}
            _add(waiting[edge.vertex].setdefault(edge.number, {}), visitor.at_edge(index, number, rows))
    return cost


def _absorb_constants(vertex, index, stacked, keys, visitor) -> None:  # type: ignore[no-untyped-def]
    like = next(item for item in stacked if item is not None)
    shares = vertex.constant_share(like)
    if shares is None:
        return
    for number, (share, item) in enumerate(zip(shares, stacked, strict=True)):
        if item is not None:
            visitor.at_sink(index, number, "constants", dict(zip(keys, item, strict=True)), share)


def _stack(vectors: Vectors[Key], keys: list[Key]) -> Tensor | None:
    if not vectors:
        return None
    like = next(iter(vectors.values()))
    if len(keys) == 1:
        return like.unsqueeze(0)
    return torch.stack([vectors[key] if key in vectors else torch.zeros_like(like) for key in keys])


def _add(total: Vectors[Key], vectors: Vectors[Key]) -> None:
    for key, vector in vectors.items():
        total[key] = total[key] + vector if key in total else vector


def push(graph: Graph, lower: Place, upper: Place, values: Tensor, bound: bool = False) -> tuple[Tensor | None, Cost]:
    """One pass up: values at the neurons of a tap to what a walk from each neuron of a tap above it collects.

    Args:
        graph: The graph of a recording.
        lower: Where the values are.
        upper: Where they are wanted.
        values: ``(K, N, *shape)`` of the lower tap.
        bound: Use kernels without sign, which are no smaller than the absolute values: for values that have none.

    Returns:
        ``(K, N, *shape)`` of the upper tap, None for zeros, and the cost.
    """
    known: dict[Buffer, Tensor | None] = {}

    def through(vertex: int, number: int) -> Tensor | None:
        edge = graph.vertices[vertex].edges[number]
        if (vertex, number) == lower or edge == lower:
            return values
        return None if edge is None else known.get(edge)

    top = upper.vertex if isinstance(upper, Buffer) else upper[0]
    cost = Cost()
    for index in range(len(graph.vertices) - 1, top - 1, -1):
        vertex = graph.vertices[index]
        arrived = [through(index, number) for number in range(len(vertex.edges))]
        if all(part is None for part in arrived) or (isinstance(upper, tuple) and index == top):
            continue
        pushed: list[Tensor | None]
        if bound and vertex.step is not None:
            pushed = [vertex.step.push_bound(tuple(arrived))]
        else:
            pushed = vertex.push(arrived, [None] * len(vertex.shapes))
        cost += Cost(1, len(values)) if vertex.step is not None else Cost()
        known |= {Buffer(index, number): rows for number, rows in enumerate(pushed)}
    return (known.get(upper) if isinstance(upper, Buffer) else through(*upper)), cost
