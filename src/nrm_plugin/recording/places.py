"""Places in the graph of a recording at which relevance can be read or absorbed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buffer:
    """Output ``number`` of a vertex, a tensor of the recording."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by which places are ordered as walks cross them."""
        return (self.vertex, 0)


@dataclass(frozen=True, slots=True)
class Edge:
    """Input ``number`` of a vertex. Its relevance is what this vertex adds to the relevance of the tensor it reads."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by which places are ordered as walks cross them."""
        return (self.vertex, 1)


@dataclass(frozen=True, slots=True)
class Sink:
    """Sink of a vertex, which receives the relevance absorbed there."""

    vertex: int


Place = Buffer | Edge
"""Place of a tap (hook point): a tensor, or its use by one vertex."""

__all__ = ["Buffer", "Edge", "Place", "Sink"]
