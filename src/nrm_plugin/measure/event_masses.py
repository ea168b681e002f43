"""Masses and heat maps of events, computed in one pass from the output to the inputs.

The pass propagates one relevance vector for each undecided node of a decision diagram, which states what remains to be
decided about a walk.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..events.event import Atom, Event
from ..recording.places import Buffer, Edge, Place, Sink
from ..recording.propagation import Cost, Vectors, pull
from ..recording.recording import Recording
from .attention_events import plain
from .conditionals import Conditionals
from .decision_diagram import FALSE, TRUE, DecisionDiagram
from .masked_vectors import add_to, masked
from .memory_budget import in_chunks, width_of

Pair = tuple[int, int]
"""Pair ``(event, diagram node)``."""
Pairs = frozenset[Pair]
"""Set of pairs that share one relevance vector."""


@dataclass(frozen=True)
class EventResult:
    """Mass and variation of one event, and its joint relevance with the neurons of selected layers.

    Attributes:
        mass: ``μ(event)``, of shape ``(N,)``.
        variation: Σ|μ| over the neurons at which it is decided that walks belong to the event, of shape ``(N,)``.
        maps: ``μ(j & event)`` for the neurons ``j`` of each selected layer, of shape ``(N, *shape)``.
    """

    mass: Tensor
    variation: Tensor
    maps: list[Tensor]


class EventPass:
    """Pass from the output to the inputs. A walk is followed no further once it is decided which events contain it.

    Args:
        diagram: The decision diagram for the events.
        start: The relevance of the outputs.
        stored: The taps for which a map of each event is computed.

    Attributes:
        mass: μ of each event, of shape ``(E, N)``.
        variation: Σ|μ| over the neurons at which it is decided that walks belong to each event, of shape ``(E, N)``.
    """

    def __init__(self, diagram: DecisionDiagram, start: Tensor, stored: Iterable[Place] = ()) -> None:
        recording = diagram.recording
        self.diagram, self.recording = diagram, recording
        self.stored = frozenset(stored)
        self.mass = start.new_zeros((len(diagram.roots), recording.samples.count))
        self.variation = torch.zeros_like(self.mass)
        self.maps: dict[tuple[Place, Pair], Tensor] = {}
        self._stored_below = recording.graph.marks_below(dict.fromkeys(self.stored, 1)).below_vertex
        pairs = frozenset(enumerate(diagram.roots))
        self._count_decided(pairs, start)
        self.cost = pull(recording.graph, [(recording.graph.output, {pairs: start})], self)

    def at_buffer(self, buffer: Buffer, vectors: Vectors[Pairs]) -> Vectors[Pairs]:
        return self._undecided(self._cross(buffer, vectors), buffer)

    def at_edge(self, edge: Edge, vectors: Vectors[Pairs]) -> Vectors[Pairs]:
        return self._cross(edge, vectors)

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[Pairs], share: Tensor) -> None:
        for pairs, vector in vectors.items():
            absorbed = None
            for event, node in pairs:
                if node <= TRUE:
                    continue
                for left, mask in self.diagram.absorb(node, sink.vertex):
                    if left == TRUE:
                        absorbed = vector * share if absorbed is None else absorbed
                        self._count(event, masked(absorbed, mask), Buffer(sink.vertex, number))

    def _cross(self, place: Place, vectors: Vectors[Pairs]) -> Vectors[Pairs]:
        level = self.diagram.levels.get(place)
        result: Vectors[Pairs] = {}
        for pairs, vector in vectors.items():
            if level is None:
                add_to(result, pairs, vector)
                continue
            untouched = frozenset(p for p in pairs if not self.diagram.nodes.is_touched(p[1], level))
            if untouched:
                add_to(result, untouched, vector)
            for event, node in pairs - untouched:
                for left, mask in self.diagram.cross(node, level):
                    part = masked(vector, mask)
                    if left == TRUE:
                        self._count(event, part, place)
                    if left != FALSE:
                        add_to(result, frozenset({(event, left)}), part)
        if place in self.stored:
            for pairs, vector in result.items():
                for pair in pairs:
                    add_to(self.maps, (place, pair), vector)
        return result

    def _undecided(self, vectors: Vectors[Pairs], buffer: Buffer) -> Vectors[Pairs]:
        """Drops the vectors of walks whose membership is decided, unless they can still cross a stored tap."""
        vertex = buffer.vertex
        result: Vectors[Pairs] = {}
        for pairs, vector in vectors.items():
            undecided = set()
            for event, node in pairs:
                left = self.diagram.settle(node, vertex)
                if left == TRUE and node != TRUE:
                    self._count(event, vector, buffer)
                if left > TRUE or (left == TRUE and self._stored_below[vertex]):
                    undecided.add((event, left))
            if undecided:
                add_to(result, frozenset(undecided), vector)
        return result

    def _count_decided(self, pairs: Pairs, start: Tensor) -> None:
        for event, node in pairs:
            if node == TRUE:
                self._count(event, start, self.recording.graph.output)

    def _count(self, event: int, vector: Tensor, place: Place) -> None:
        sums = self.recording.samples.checked_sums
        where, home = "the tap where an event is decided", self.mass.device
        self.mass[event] += sums(vector, where, place).to(home)
        self.variation[event] += sums(vector.abs(), where, place).to(home)

    def result(self, event: int, places: Sequence[Place]) -> EventResult:
        """Returns the mass, variation and maps of one event."""
        return EventResult(self.mass[event], self.variation[event], [self.map(place, event) for place in places])

    def map(self, place: Place, event: int) -> Tensor:
        """Returns ``μ(j & event)`` for every neuron ``j`` of a stored tap, in shape ``(N, *shape)``."""
        tap = self.recording.taps.at(place)
        total = self.mass.new_zeros(tap.tensor_shape, device=self.recording.graph.device(place))
        arrived = {pair[1]: v for (at, pair), v in self.maps.items() if at == place and pair[0] == event}
        below = Conditionals(self.diagram, [place], [node for node in arrived if node > TRUE], self.mass)
        self.cost += below.cost
        for node, vector in arrived.items():
            total = total + vector * below.value(place, node)
        return tap.layout.unfold(total)


def event_results(
    recording: Recording,
    start: Tensor,
    events: Sequence[Event],
    places: Sequence[Place] = (),
    max_memory: int | None = None,
) -> tuple[list[EventResult], Cost]:
    """Computes the mass, variation and maps of events, with as many events per pass as fit into memory.

    Args:
        recording: The recording of the forward pass.
        start: The relevance of the outputs.
        events: The events to evaluate.
        places: The taps for which a map of each event is computed.
        max_memory: Memory budget in bytes, or None for the default of the device.

    Returns:
        One result per event and the cost of all passes.
    """
    costs: list[Cost] = []

    def run(chunk: Sequence[Event]) -> list[EventResult]:
        one = EventPass(DecisionDiagram(recording, chunk), start, places)
        results = [one.result(number, places) for number in range(len(chunk))]
        costs.append(one.cost)
        return results

    width = width_of(recording, max_memory, _named_places(recording, events, places))
    results = in_chunks(list(events), width, run, "events")
    return results, sum(costs, start=Cost())


def _named_places(recording: Recording, events: Sequence[Event], places: Sequence[Place]) -> list[Place] | None:
    """Returns the places to which events and queries refer, or None if any place is possible, as for sinks."""
    parts = [part for event in events for atom in event.atoms() for part in plain(atom, recording).atoms()]
    if not all(isinstance(part, Atom) and part.side != "sink" for part in parts):
        return None
    atoms = {replace(part, index=None) for part in parts if isinstance(part, Atom)}
    taps = [tap for atom in atoms for tap in recording.taps.find(atom.layer, atom.side, atom.call, atom.item)]
    return [*places, *(tap.place for tap in taps)]
