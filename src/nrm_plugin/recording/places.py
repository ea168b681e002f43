"""Places in the graph of a recording: where relevance can be read or absorbed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Buffer:
    """Output ``number`` of a vertex, which is one tensor."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sorts places as a walk crosses them."""
        return (self.vertex, 0)


@dataclass(frozen=True, slots=True)
class Edge:
    """Input ``number`` of a vertex; its relevance is the part of the tensor's relevance that comes from this vertex."""

    vertex: int
    number: int

    @property
    def order(self) -> tuple[int, int]:
        """Sorts places as a walk crosses them."""
        return (self.vertex, 1)


@dataclass(frozen=True, slots=True)
class Sink:
    """The relevance that a vertex absorbs."""

    vertex: int


Place = Buffer | Edge
"""The place of a tap."""

__all__ = ["Buffer", "Edge", "Place", "Sink"]
