"""Passes that answer questions: the books of one pass, masses of events, maps of an event over a tap."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kernels.cache_blocks import blocks
from ..model.targets import sample_norms, sample_sums
from ..recording.passes import Cost, Vectors, pull
from ..recording.places import Buffer, Edge, Place, Sink
from ..recording.recording import Recording
from .decision_diagram import FALSE, TRUE, Formulas

Pair = tuple[int, int]
"""``(event, diagram node)``."""
Pairs = frozenset[Pair]
"""All the pairs that share one relevance vector."""


@dataclass
class Books:
    """What one plain pass leaves behind, summed per sample: ``(N,)`` each, or None where a sample cannot be told.

    Attributes:
        mass: By tap.
        absolute: Σ|μ(j)|, by tap.
        sinks: By ``(vertex, kind)``.
        absolute_sinks: Σ of absolute values, by ``(vertex, kind)``.
        flows: Relevance that a vertex with several edges propagates along each.
        maps: Relevance of the taps that were asked for.
        cost: Steps run.
    """

    recording: Recording
    asked: frozenset[Place]
    mass: dict[Place, Tensor | None] = field(default_factory=dict)
    absolute: dict[Place, Tensor | None] = field(default_factory=dict)
    sinks: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)
    absolute_sinks: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)
    flows: dict[Edge, Tensor | None] = field(default_factory=dict)
    maps: dict[Place, Tensor] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    _last: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def at_buffer(self, buffer: Buffer, vectors: Vectors[str]) -> Vectors[str]:
        for vector in vectors.values():
            self._enter(buffer, vector)
        return vectors

    def at_edge(self, edge: Edge, vectors: Vectors[str]) -> Vectors[str]:
        for vector in vectors.values():
            self._enter(edge, vector)
            if len(self.recording.graph.vertices[edge.vertex].edges) > 1:
                self.flows[edge] = self._sum(vector, edge)
        return vectors

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[str], share: Tensor) -> None:
        for vector in vectors.values():
            total, absolute = self._pair(vector, Buffer(sink.vertex, number), share)
            _accumulate(self.sinks, (sink.vertex, kind), total)
            _accumulate(self.absolute_sinks, (sink.vertex, kind), absolute)

    def _enter(self, place: Place, vector: Tensor) -> None:
        if place in self.recording.taps.index:
            self.mass[place], self.absolute[place] = self._sums(vector, place)
        if place in self.asked:
            self.maps[place] = self.recording.samples.with_samples(vector)

    def _sums(self, vector: Tensor, place: Place) -> tuple[Tensor | None, Tensor | None]:
        """Σ and Σ| |; those of the last vector again where a step handed it on as it is."""
        if self._last is not None and vector.is_set_to(self._last[0]):
            return self._last[1:]
        self._last = (vector, *self._pair(vector, place))
        return self._last[1:]

    def _sum(self, vector: Tensor, place: Place) -> Tensor | None:
        return self.recording.samples.sums(vector, place)

    def _is_plain(self, vector: Tensor) -> bool:
        """Whether the rows of a tensor are the samples."""
        return self.recording.samples.count == 1 or (vector.ndim > 0 and len(vector) == self.recording.samples.count)

    def _pair(self, vector: Tensor, place: Place, share: Tensor | None = None) -> tuple[Tensor | None, Tensor | None]:
        """Σ and Σ| | of relevance, or of a share of it, by sample."""
        if self.recording.samples.is_needed:
            values = vector if share is None else vector * share
            return self._sum(values, place), self._sum(values.abs(), place)
        if not self._is_plain(vector):
            return None, None
        if share is None:
            return self._sum(vector, place), self._norm(vector)
        total = vector.new_zeros(self.recording.samples.count)
        absolute = torch.zeros_like(total)
        single = self.recording.samples.count == 1
        for at in blocks(vector):  # in the cache
            part = vector[at] * share[at]
            rows = slice(None) if single else at[0]
            total[rows] += part.sum() if single else sample_sums(part)
            absolute[rows] += self._norm(part)
        return total, absolute

    def _norm(self, vector: Tensor) -> Tensor:
        return sample_norms(vector.reshape(1, -1) if self.recording.samples.count == 1 else vector)


def _accumulate(total: dict, key: object, value: Tensor | None) -> None:  # type: ignore[type-arg]
    old = total.get(key, value)
    total[key] = value if key not in total else (None if old is None or value is None else old + value)


def books(recording: Recording, start: Tensor, asked: Iterable[Place] = (), absolute: bool = False) -> Books:
    """One plain pass: every sink and flow summed, and the maps of the asked taps.

    Args:
        recording: The recording.
        start: The measure over the outputs.
        asked: Taps whose relevance is wanted.
        absolute: Use kernels of absolute values.
    """
    learned = recording.samples.find(start)
    result = Books(recording, frozenset(asked))
    result.cost = learned + pull(recording.graph, [(recording.graph.output, {"": start})], result, absolute)
    return result


@dataclass(frozen=True)
class Decided:
    """One event after a pass.

    Attributes:
        mass: μ, ``(N,)``.
        variation: Σ|μ| over the neurons where it was decided, ``(N,)``.
        maps: Its walks one by one at each asked tap, ``(N, *shape)``.
    """

    mass: Tensor
    variation: Tensor
    maps: list[Tensor]


class Decisions:
    """A pass that decides events on the way down and stops a walk when it is decided.

    Args:
        formulas: The events.
        asked: Taps at which the walks of each event are wanted one by one.

    Attributes:
        mass: μ of each event, ``(E, N)``.
        variation: Σ|μ| over the neurons where each was decided, ``(E, N)``.
    """

    def __init__(self, formulas: Formulas, start: Tensor, asked: Iterable[Place] = ()) -> None:
        recording = formulas.recording
        learned = recording.samples.find(start)
        self.formulas, self.recording = formulas, recording
        self.asked = frozenset(asked)
        self.mass = start.new_zeros((len(formulas.roots), recording.samples.count))
        self.variation = torch.zeros_like(self.mass)
        self.maps: dict[tuple[Place, Pair], Tensor] = {}
        self._wanted = recording.graph.marks_below(dict.fromkeys(self.asked, 1)).below_vertex
        pairs = frozenset(enumerate(formulas.roots))
        self._settled(pairs, start)
        self.cost = learned + pull(recording.graph, [(recording.graph.output, {pairs: start})], self)

    def at_buffer(self, buffer: Buffer, vectors: Vectors[Pairs]) -> Vectors[Pairs]:
        return self._go_on(self._cross(buffer, vectors), buffer)

    def at_edge(self, edge: Edge, vectors: Vectors[Pairs]) -> Vectors[Pairs]:
        return self._cross(edge, vectors)

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[Pairs], share: Tensor) -> None:
        for pairs, vector in vectors.items():
            absorbed = None
            for event, node in pairs:
                if node <= TRUE:
                    continue
                for left, mask in self.formulas.absorb(node, sink.vertex):
                    if left == TRUE:
                        absorbed = vector * share if absorbed is None else absorbed
                        self._count(event, _masked(absorbed, mask), Buffer(sink.vertex, number))

    def _cross(self, place: Place, vectors: Vectors[Pairs]) -> Vectors[Pairs]:
        level = self.formulas.levels.get(place)
        result: Vectors[Pairs] = {}
        for pairs, vector in vectors.items():
            if level is None:
                _sum(result, pairs, vector)
                continue
            untouched = frozenset(p for p in pairs if not self.formulas.diagram.is_touched(p[1], level))
            if untouched:
                _sum(result, untouched, vector)
            for event, node in pairs - untouched:
                for left, mask in self.formulas.cross(node, level):
                    part = _masked(vector, mask)
                    if left == TRUE:
                        self._count(event, part, place)
                    if left != FALSE:
                        _sum(result, frozenset({(event, left)}), part)
        if place in self.asked:
            for pairs, vector in result.items():
                for pair in pairs:
                    _sum(self.maps, (place, pair), vector)
        return result

    def _go_on(self, vectors: Vectors[Pairs], buffer: Buffer) -> Vectors[Pairs]:
        """Drops the walks that are decided and of which nothing more is wanted."""
        vertex = buffer.vertex
        result: Vectors[Pairs] = {}
        for pairs, vector in vectors.items():
            kept = set()
            for event, node in pairs:
                left = self.formulas.settle(node, vertex)
                if left == TRUE and node != TRUE:
                    self._count(event, vector, buffer)
                if left > TRUE or (left == TRUE and self._wanted[vertex]):
                    kept.add((event, left))
            if kept:
                _sum(result, frozenset(kept), vector)
        return result

    def _settled(self, pairs: Pairs, start: Tensor) -> None:
        for event, node in pairs:
            if node == TRUE:
                self._count(event, start, self.recording.graph.output)

    def _count(self, event: int, vector: Tensor, place: Place) -> None:
        self.mass[event] += self.recording.samples.checked_sums(vector, "the tap where an event is decided", place)
        self.variation[event] += self.recording.samples.checked_sums(
            vector.abs(), "the tap where an event is decided", place
        )

    def decided(self, event: int, places: Sequence[Place]) -> Decided:
        """All there is to know of one event."""
        return Decided(self.mass[event], self.variation[event], [self.map(place, event) for place in places])

    def map(self, place: Place, event: int) -> Tensor:
        """``μ(j & event)`` for every neuron ``j`` of an asked tap."""
        tap = self.recording.taps.all[self.recording.taps.index[place]]
        total = self.recording.samples.without_samples(self.mass.new_zeros(tap.shape))
        arrived = {pair[1]: v for (at, pair), v in self.maps.items() if at == place and pair[0] == event}
        below = Below(self.formulas, [place], [node for node in arrived if node > TRUE], self.mass)
        self.cost += below.cost
        for node, vector in arrived.items():
            total = total + vector * below.value(place, node)
        return self.recording.samples.with_samples(total)


class Below:
    """``μ(event given j)`` for every neuron ``j`` of a tap: values that go up from where a walk is decided.

    Args:
        formulas: The events.
        places: The taps.
        nodes: What is left of the events after any of the taps was crossed.
        like: A tensor of the dtype and device of relevance.
    """

    def __init__(self, formulas: Formulas, places: Sequence[Place], nodes: Iterable[int], like: Tensor) -> None:
        self.formulas, self.graph, self.like = formulas, formulas.recording.graph, like
        self.cost = Cost()
        self._values: dict[tuple[Buffer, int], Tensor | None] = {}
        needed = self._needed(places, set(nodes))
        for vertex in sorted(needed, reverse=True):
            self._push(vertex, sorted(needed[vertex]))

    def value(self, place: Place, node: int) -> Tensor:
        """``(N, *shape)`` of one of the taps."""
        if isinstance(place, Buffer):
            found = self._after(place, node)
            shape = self.graph.shape(place)
        else:
            edge = self._read(place)
            found, shape = self._before(edge, node), self.graph.shape(edge)
        return self.like.new_zeros(shape) if found is None else found

    def _read(self, edge: Edge) -> Buffer:
        """The buffer that an edge reads."""
        buffer = self.graph.vertices[edge.vertex].edges[edge.number]
        assert buffer is not None
        return buffer

    def _needed(self, places: Sequence[Place], nodes: set[int]) -> dict[int, set[int]]:
        needed: dict[int, set[int]] = {}
        todo: list[tuple[int, int]] = []

        def ask(buffer: Buffer, node: int) -> None:
            left = self.formulas.settle(node, buffer.vertex)
            if left > TRUE and left not in needed.setdefault(buffer.vertex, set()):
                needed[buffer.vertex].add(left)
                todo.append((buffer.vertex, left))

        def ask_before(buffer: Buffer, node: int) -> None:
            for left, _ in self._crossing(buffer, node):
                ask(buffer, left)

        for place, node in itertools.product(places, nodes):
            if isinstance(place, Buffer):
                ask(place, node)
            else:
                ask_before(self._read(place), node)
        while todo:
            vertex, node = todo.pop()
            for number, edge in enumerate(self.graph.vertices[vertex].edges):
                if edge is not None:
                    for left, _ in self._crossing(Edge(vertex, number), node):
                        ask_before(edge, left)
        return needed

    def _crossing(self, place: Place, node: int) -> list[tuple[int, Tensor | None]]:
        level = self.formulas.levels.get(place)
        return [(node, None)] if level is None else self.formulas.cross(node, level)

    def _after(self, buffer: Buffer, node: int) -> Tensor | None:
        """Value of a node once the tap at a buffer was crossed; None for zero."""
        left = self.formulas.settle(node, buffer.vertex)
        if left <= TRUE:
            return None if left == FALSE else self.like.new_ones(()).expand(self.graph.shape(buffer))
        return self._values[buffer, left]

    def _mixed(self, crossing: list[tuple[int, Tensor | None]], value: dict[int, Tensor | None]) -> Tensor | None:
        total = None
        for left, mask in crossing:
            part = value[left]
            if part is not None:
                part = _masked(part, mask)
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
        shape = self.graph.vertices[vertex].shapes[number]
        ones = self.like.new_ones(()).expand(shape)
        crossing = self.formulas.absorb(node, vertex)
        return self._mixed(crossing, {left: ones if left == TRUE else None for left, _ in crossing})

    def _push(self, index: int, nodes: list[int]) -> None:
        vertex = self.graph.vertices[index]
        edges = range(len(vertex.edges))
        values = [_rows([self._through(index, number, node) for node in nodes]) for number in edges]
        outputs = range(len(vertex.shapes))
        absorbed = [_rows([self._absorbed(index, number, node) for node in nodes]) for number in outputs]
        self.cost += Cost(1, len(nodes)) if vertex.step is not None else Cost()
        pushed = vertex.push(values, absorbed)
        shares = vertex.constant_share(self.like)
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


def _masked(vector: Tensor, mask: Tensor | None) -> Tensor:
    return vector if mask is None else vector * mask.to(vector.device)


def _sum(total: dict, key: object, vector: Tensor) -> None:  # type: ignore[type-arg]
    total[key] = total[key] + vector if key in total else vector
