"""Conditional mass of an event given each neuron of a tap above it, from one transposed pass (from the inputs upward).

Source: docs/measure.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..errors import EventError
from ..events.event import Event
from ..recording.places import Buffer, Edge, Place
from ..recording.propagation import Cost
from ..recording.taps import Tap
from .decision_diagram import FALSE, TRUE, DecisionDiagram
from .layer_taps import is_below
from .masked_vectors import masked


class Conditionals:
    """Upward pass that computes ``μ(event given j)`` for every neuron ``j`` of each tap (named tensor).

    Conditional masses are propagated from the inputs upward through the recorded graph, by transposed kernels. A
    decision diagram states what remains to be decided about a walk; there is one mass per neuron and undecided node of
    the diagram. The pass starts at the vertices of the graph that decide whether a walk belongs to the event.

    Args:
        diagram: The decision diagram for the events.
        places: Taps at which to compute conditional masses.
        nodes: The nodes of the diagram that a walk can reach by crossing one of these taps.
        like: A tensor with the same dtype as the relevance.
    """

    def __init__(self, diagram: DecisionDiagram, places: Sequence[Place], nodes: Iterable[int], like: Tensor) -> None:
        self.diagram, self.graph, self.like = diagram, diagram.recording.graph, like
        self.cost = Cost()
        self._values: dict[tuple[Buffer, int], Tensor | None] = {}
        needed = self._needed(places, set(nodes))
        for vertex in sorted(needed, reverse=True):
            self._push(vertex, sorted(needed[vertex]))

    def value(self, place: Place, node: int) -> Tensor:
        """Returns the conditional mass of a diagram node given each neuron of one tap, in shape ``(N, *shape)``."""
        if isinstance(place, Buffer):
            value, shape = self._after(place, node), self.graph.shape(place)
        else:
            edge = self.graph.buffer(place)
            value, shape = self._before(edge, node), self.graph.shape(edge)
        return self.like.new_zeros(shape, device=self.graph.device(place)) if value is None else value

    def _needed(self, places: Sequence[Place], nodes: set[int]) -> dict[int, set[int]]:
        needed: dict[int, set[int]] = {}
        todo: list[tuple[int, int]] = []

        def require(buffer: Buffer, node: int) -> None:
            left = self.diagram.settle(node, buffer.vertex)
            if left > TRUE and left not in needed.setdefault(buffer.vertex, set()):
                needed[buffer.vertex].add(left)
                todo.append((buffer.vertex, left))

        def require_before(buffer: Buffer, node: int) -> None:
            for left, _ in self._crossing(buffer, node):
                require(buffer, left)

        for place, node in itertools.product(places, nodes):
            if isinstance(place, Buffer):
                require(place, node)
            else:
                require_before(self.graph.buffer(place), node)
        while todo:
            vertex, node = todo.pop()
            for number, edge in enumerate(self.graph.vertices[vertex].edges):
                if edge is not None:
                    for left, _ in self._crossing(Edge(vertex, number), node):
                        require_before(edge, left)
        return needed

    def _crossing(self, place: Place, node: int) -> list[tuple[int, Tensor | None]]:
        level = self.diagram.levels.get(place)
        return [(node, None)] if level is None else self.diagram.cross(node, level)

    def _after(self, buffer: Buffer, node: int) -> Tensor | None:
        """Returns the conditional mass of a diagram node after crossing the tap at a buffer, or None for zero."""
        left = self.diagram.settle(node, buffer.vertex)
        if left <= TRUE:
            return None if left == FALSE else self._ones(buffer)
        return self._values[buffer, left]

    def _ones(self, buffer: Buffer) -> Tensor:
        return self.like.new_ones((), device=self.graph.device(buffer)).expand(self.graph.shape(buffer))

    def _mixed(self, crossing: list[tuple[int, Tensor | None]], value: dict[int, Tensor | None]) -> Tensor | None:
        total = None
        for left, mask in crossing:
            part = value[left]
            if part is not None:
                part = masked(part, mask)
                total = part if total is None else total + part
        return total

    def _before(self, buffer: Buffer, node: int) -> Tensor | None:
        crossing = self._crossing(buffer, node)
        return self._mixed(crossing, {left: self._after(buffer, left) for left, _ in crossing})

    def _through(self, vertex: int, number: int, node: int) -> Tensor | None:
        edge = self.graph.vertices[vertex].edges[number]
        if edge is None:
            return None
        crossing = self._crossing(Edge(vertex, number), node)
        return self._mixed(crossing, {left: self._before(edge, left) for left, _ in crossing})

    def _absorbed(self, vertex: int, number: int, node: int) -> Tensor | None:
        ones = self._ones(Buffer(vertex, number))
        crossing = self.diagram.absorb(node, vertex)
        return self._mixed(crossing, {left: ones if left == TRUE else None for left, _ in crossing})

    def _push(self, index: int, nodes: list[int]) -> None:
        vertex = self.graph.vertices[index]
        edges = range(len(vertex.edges))
        values = [_rows([self._through(index, number, node) for node in nodes]) for number in edges]
        outputs = range(len(vertex.shapes))
        absorbed = [_rows([self._absorbed(index, number, node) for node in nodes]) for number in outputs]
        self.cost += Cost(1, len(nodes)) if vertex.step is not None else Cost()
        pushed = vertex.push(values, absorbed)
        shares = vertex.constant_share()
        for number, rows in enumerate(pushed):
            constant = absorbed[number]
            if shares is not None and constant is not None:
                rest = constant * shares[number]
                rows = rest if rows is None else rows + rest
            for k, node in enumerate(nodes):
                self._values[Buffer(index, number), node] = None if rows is None else rows[k]


def _rows(parts: list[Tensor | None]) -> Tensor | None:
    like = next((part for part in parts if part is not None), None)
    if like is None:
        return None
    return torch.stack([torch.zeros_like(like) if part is None else part for part in parts])


def check_below(diagram: DecisionDiagram, tap: Tap, event: Event, layer: object) -> None:
    """Raises :class:`EventError` if an event refers to a tap not below the given tap."""
    if not are_below(diagram, tap):
        raise EventError(
            f"{event} refers to a tap that is not below {tap.names[0] if tap.names else layer!r}; the conditional "
            "given each neuron of a tap needs taps below it. For taps above, use marginal(layer, given=event)."
        )


def are_below(diagram: DecisionDiagram, tap: Tap) -> bool:
    """Returns True if all taps that the events refer to are below the given tap."""
    return all(is_below(diagram.recording, key, tap) for key in diagram.levels)
