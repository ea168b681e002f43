"""Places in the graph of a recording where relevance can be read or absorbed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buffer:
    """Output ``number`` of a vertex: one tensor."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sort key that orders places as walks cross them."""
        return (self.vertex, 0)


@dataclass(frozen=True, slots=True)
class Edge:
    """Input ``number`` of a vertex. Its relevance is the contribution of this vertex to the relevance of the tensor."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sort key that orders places as walks cross them."""
        return (self.vertex, 1)


@dataclass(frozen=True, slots=True)
class Sink:
    """Sink of a vertex, which contains the relevance absorbed there."""

    vertex: int


Place = Buffer | Edge
"""Place of a tap."""

__all__ = ["Buffer", "Edge", "Place", "Sink"]
