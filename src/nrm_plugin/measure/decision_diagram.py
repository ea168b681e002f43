"""Decision diagram that decides, while a walk is followed from the output down, which events contain it.

A node of the diagram represents what is still undecided. When the walk crosses a tensor or is absorbed, the diagram
moves to a successor node, and ends at true or false.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..events.diagram import FALSE, TRUE, Diagram
from ..events.event import ABSORBED, Event
from ..recording.places import Buffer, Edge, Sink
from ..recording.recording import Recording
from .located_events import Locator

Crossing = list[tuple[int, Tensor | None]]
"""Successor nodes, each with a mask of the neurons that lead to it; None stands for all neurons."""


class DecisionDiagram:
    """Decision diagram shared by several events over one recording.

    Args:
        recording: The recording of the forward pass.
        events: The events to decide.

    Attributes:
        roots: The root node of each event.
        levels: Position of each tensor or sink that the events refer to (its level), in the order in which walks cross
            them, followed by sinks.
        open: The levels that a walk can still reach below each vertex of the graph, as a bit set.
    """

    def __init__(self, recording: Recording, events: Sequence[Event]) -> None:
        self.recording = recording
        locator = Locator(recording)
        located = [locator(event) for event in events]
        ordered = sorted(locator.atoms_at, key=_order)
        self.levels: dict[Buffer | Edge | Sink, int] = {place: level for level, place in enumerate(ordered)}
        self.absorbed_level = len(ordered)
        atoms = [atom for place in ordered for atom in locator.atoms_at[place]]
        self._masks = [atom.mask for atom in atoms]
        variables: dict[Event, int] = {atom: variable for variable, atom in enumerate(atoms)}
        self.nodes = Diagram([*(self.levels[atom.place] for atom in atoms), self.absorbed_level])
        self.roots = [self.nodes.build(event, {**variables, ABSORBED: len(atoms)}) for event in located]
        self._crossings: dict[tuple[int, int], Crossing] = {}
        self._depends: dict[int, int] = {}
        self.open = self._levels_below()

    def _levels_below(self) -> list[int]:
        graph, absorbed = self.recording.graph, 1 << self.absorbed_level
        marks = {place: 1 << level for place, level in self.levels.items() if not isinstance(place, Sink)}
        levels = graph.marks_below(marks).below_vertex
        for index in range(len(graph.vertices) - 1, -1, -1):
            vertex, sink = graph.vertices[index], Sink(index)
            bits = levels[index]
            if vertex.step is not None or vertex.may_hold_constants:
                bits |= absorbed | (1 << self.levels[sink] if sink in self.levels else 0)
            for buffer in vertex.edges:
                bits |= 0 if buffer is None else levels[buffer.vertex]
            levels[index] = bits
        return levels

    def depends(self, node: int) -> int:
        """Returns the levels that a node depends on, as a bit set."""
        if node not in self._depends:
            levels = {self.nodes.levels[variable] for variable in self.nodes.variables(node)}
            self._depends[node] = sum(1 << level for level in levels)
        return self._depends[node]

    def settle(self, node: int, vertex: int) -> int:
        """Returns the terminal node if nothing below a vertex can change the outcome, and otherwise the node itself."""
        return node if node <= TRUE or self.depends(node) & self.open[vertex] else self.end(node)

    def end(self, node: int) -> int:
        """Returns the terminal node, true or false, for a walk that ends at an input."""
        return self.nodes.step(node, self.absorbed_level, 0)

    def cross(self, node: int, level: int) -> Crossing:
        """Returns the successors of a node for a walk that crosses the tap at a level, each with a neuron mask."""
        if (node, level) not in self._crossings:
            self._crossings[node, level] = self._cross(node, level)
        return self._crossings[node, level]

    def _cross(self, node: int, level: int) -> Crossing:
        if not self.nodes.is_touched(node, level):
            return [(node, None)]
        variables = sorted(v for v in self.nodes.variables(node) if self.nodes.levels[v] == level)
        if not variables:
            return [(self.nodes.step(node, level, 0), None)]
        remaining: dict[int, Tensor] = {}
        for answers, cell in _cells(variables, [self._masks[variable] for variable in variables]):
            left = self.nodes.step(node, level, answers)
            remaining[left] = cell if left not in remaining else remaining[left] | cell
        return list(remaining.items())

    def absorb(self, node: int, vertex: int) -> Crossing:
        """Returns the terminal nodes (true or false) for a walk absorbed at a vertex, each with a neuron mask."""
        answer = 1 << len(self.nodes.levels) - 1
        level = self.levels.get(Sink(vertex))
        crossing = [(node, None)] if level is None else self.cross(node, level)
        return [(self.nodes.step(left, self.absorbed_level, answer), mask) for left, mask in crossing]


def _cells(variables: list[int], masks: list[Tensor]) -> list[tuple[int, Tensor]]:
    """Partitions the neurons of a tap into cells on which every mask is constant.

    Returns:
        The mask of each cell, with a bit set of the variables whose masks contain the cell.
    """
    cells = [(0, torch.ones_like(masks[0]))]
    for variable, mask in zip(variables, masks, strict=True):
        split = [(answers | 1 << variable, cell & mask) for answers, cell in cells]
        split += [(answers, cell & ~mask) for answers, cell in cells]
        cells = [(answers, cell) for answers, cell in split if bool(cell.any())]
    return cells


def _order(place: Buffer | Edge | Sink) -> tuple[int, int, int]:
    """Sort key that orders places as walks cross them, followed by sinks."""
    return (1, place.vertex, 0) if isinstance(place, Sink) else (0, *place.order)


__all__ = ["FALSE", "TRUE", "Crossing", "DecisionDiagram"]
