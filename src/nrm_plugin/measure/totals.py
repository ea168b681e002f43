"""Sums of relevance over each recorded tensor (tap), each sink and each edge, accumulated in one pass."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from ..kernels.cache_blocks import WHOLE, block_of, blocks
from ..model.targets import one_row, sample_norms, sample_sums
from ..recording.places import Buffer, Edge, Place, Sink
from ..recording.propagation import Cost, Vectors, pull
from ..recording.recording import Recording
from ..recording.taps import Tap

Key = TypeVar("Key", bound=Hashable)


@dataclass
class Totals:
    """Sums of relevance over each recorded tensor (tap), each sink and each edge, accumulated in one pass.

    Sums have shape ``(N,)`` and are None if the samples cannot be distinguished within a tensor.

    Attributes:
        recording: The recording of the forward pass.
        start: The relevance of the outputs.
        stored: The taps whose relevance is stored.
        mass: ``Σ_j μ(j)``, keyed by tap.
        absolute: ``Σ_j |μ(j)|``, keyed by tap.
        sinks: Absorbed mass, keyed by ``(vertex, kind)``.
        absolute_sinks: Sum of the absolute values of absorbed relevance, keyed by ``(vertex, kind)``.
        branches: Mass propagated along each edge of a vertex with several edges, such as the summands of a sum.
        maps: Relevance of the taps in ``stored``.
        cost: Number of evaluated kernels and of propagated vectors.
        has_sums: Whether masses are accumulated. Otherwise, relevance is only stored.
    """

    recording: Recording
    start: Tensor
    stored: frozenset[Place]
    mass: dict[Place, Tensor | None] = field(default_factory=dict)
    absolute: dict[Place, Tensor | None] = field(default_factory=dict)
    sinks: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)
    absolute_sinks: dict[tuple[int, str], Tensor | None] = field(default_factory=dict)
    branches: dict[Edge, Tensor | None] = field(default_factory=dict)
    maps: dict[Place, Tensor] = field(default_factory=dict)
    cost: Cost = field(default_factory=Cost)
    has_sums: bool = True
    _last: tuple[Tensor, Tensor | None, Tensor | None] | None = None

    def relevance(self, tap: Tap) -> Tensor:
        """Returns the relevance of a tap in ``stored``, in shape ``(N, *shape)``, or zeros if none arrived."""
        if tap.place in self.maps:
            return self.maps[tap.place]
        return self.start.new_zeros(tap.shape, device=self.recording.graph.device(tap.place))

    def at_buffer(self, buffer: Buffer, vectors: Vectors[str]) -> Vectors[str]:
        for vector in vectors.values():
            self._enter(buffer, vector)
        return self._further(vectors)

    def at_edge(self, edge: Edge, vectors: Vectors[str]) -> Vectors[str]:
        for vector in vectors.values():
            self._enter(edge, vector)
            if self.has_sums and len(self.recording.graph.vertices[edge.vertex].edges) > 1:
                self.branches[edge] = self.mass[edge] if edge in self.mass else self._sum(vector, edge)
        return self._further(vectors)

    def _further(self, vectors: Vectors[str]) -> Vectors[str]:
        """Returns the vectors to propagate further, or none if all stored taps are reached and no masses are summed."""
        return vectors if self.has_sums or not self.stored or len(self.maps) < len(self.stored) else {}

    def at_sink(self, sink: Sink, number: int, kind: str, vectors: Vectors[str], share: Tensor) -> None:
        for vector in vectors.values() if self.has_sums else ():
            total, absolute = self._sum_pair(vector, Buffer(sink.vertex, number), share)
            _accumulate(self.sinks, (sink.vertex, kind), total)
            _accumulate(self.absolute_sinks, (sink.vertex, kind), absolute)

    def _enter(self, place: Place, vector: Tensor) -> None:
        if self.has_sums and place in self.recording.taps.index:
            self.mass[place], self.absolute[place] = self._sums(vector, place)
        if place in self.stored:
            self.maps[place] = self.recording.samples.layout(place).unfold(vector)

    def _sums(self, vector: Tensor, place: Place) -> tuple[Tensor | None, Tensor | None]:
        """Returns the sum and the absolute sum of a vector. Cached for vertices that do not change the vector."""
        if self._last is not None and vector is self._last[0]:
            return self._last[1:]
        self._last = (vector, *self._sum_pair(vector, place))
        return self._last[1:]

    def _sum(self, vector: Tensor, place: Place) -> Tensor | None:
        return self._at_home(self._summed(vector, place))

    def _summed(self, vector: Tensor, place: Place) -> Tensor | None:
        return self.recording.samples.sums(vector, place)

    def _sum_pair(
        self, vector: Tensor, place: Place, share: Tensor | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Sums relevance, or a fraction of it, and its absolute values for each sample on the device of the outputs."""
        total, absolute = self._sums_there(vector, place, share)
        return self._at_home(total), self._at_home(absolute)

    def _at_home(self, value: Tensor | None) -> Tensor | None:
        return value if value is None else value.to(self.start.device)

    def _sums_there(self, vector: Tensor, place: Place, share: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if self.recording.samples.count > 1 and not self.recording.samples.is_plain:
            values = vector if share is None else vector * share
            return self._summed(values, place), self._summed(values.abs(), place)
        if share is None:
            return self._summed(vector, place), self._norm(vector)
        total = vector.new_zeros(self.recording.samples.count)
        absolute = torch.zeros_like(total)
        single = self.recording.samples.count == 1
        for at in blocks(vector):  # blocks that fit into the CPU cache
            part = block_of(vector, at) * block_of(share, at)
            rows = slice(None) if single or at == WHOLE else at[0]
            total[rows] += part.sum() if single else sample_sums(part)
            absolute[rows] += self._norm(part)
        return total, absolute

    def _norm(self, vector: Tensor) -> Tensor:
        return sample_norms(one_row(vector) if self.recording.samples.count == 1 else vector)


def _accumulate(total: dict[Key, Tensor | None], key: Key, value: Tensor | None) -> None:
    old = total.get(key, value)
    total[key] = value if key not in total else (None if old is None or value is None else old + value)


def pass_totals(
    recording: Recording, start: Tensor, stored: Iterable[Place] = (), absolute: bool = False, sums: bool = True
) -> Totals:
    """Propagates all relevance in one pass and returns its totals.

    Args:
        recording: The recording of the forward pass.
        start: The relevance of the outputs.
        stored: The taps whose relevance is stored.
        absolute: Whether to propagate with the absolute values of all kernels.
        sums: Whether to accumulate masses.
    """
    result = Totals(recording, start, frozenset(stored), has_sums=sums)
    result.cost = pull(recording.graph, [(recording.graph.output, {"": start})], result, absolute)
    return result
