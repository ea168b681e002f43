"""Places in the graph of a recording at which relevance can be read or absorbed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buffer:
    """Tensor of a recording, identified as output ``number`` of a vertex of its graph."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by which places are ordered as walks cross them."""
        return (self.vertex, 0)


@dataclass(frozen=True, slots=True)
class Edge:
    """Input ``number`` of a vertex: the part of a tensor's relevance that comes from this one of its consumers."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by which places are ordered as walks cross them."""
        return (self.vertex, 1)


@dataclass(frozen=True, slots=True)
class Sink:
    """Sink of a vertex, which collects the relevance absorbed there."""

    vertex: int


Place = Buffer | Edge
"""Place of a tap (hook point): a tensor, or its use by one vertex."""

__all__ = ["Buffer", "Edge", "Place", "Sink"]
