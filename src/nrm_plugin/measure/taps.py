"""The taps of a recording that the layers of a query name, and which of them lie below which."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..errors import EventError
from ..events.event import Atom, Event, Side, at
from ..recording.graph import Buffer
from ..recording.recording import Recording, Tap

Layer = str | nn.Module | Atom
"""A layer as a query names it: the name of a tap, a module, or ``at(…)`` without an index."""


def atom_of(layer: Any, side: Side = "output") -> Atom:
    """A layer as an atom.

    Raises:
        EventError: It is an event, or several layers.
    """
    if isinstance(layer, Atom):
        return layer
    if isinstance(layer, Event):
        raise EventError(f"{layer} is an event; a layer is needed here. Use its layer, and joint= or given= for it.")
    if isinstance(layer, (list, tuple)):
        raise EventError(f"one layer is needed here, got {layer!r}; only marginal() takes several, in a list.")
    return at(layer, side)


def tap_of(recording: Recording, layer: Layer) -> Tap:
    """The tap of a layer.

    Raises:
        EventError: It is an event, or names several taps.
        UnknownLayerError: No tap of that name.
    """
    atom = atom_of(layer)
    if atom.index is not None:
        raise EventError(f"{atom} is an event; a layer is needed here. Use at(layer) without an index, or joint=.")
    if atom.side == "sink" or atom.call == "any":
        raise EventError(f"{atom} is not one tap. Ask mu({atom}) for its mass.")
    (tap,) = recording.find(atom.layer, atom.side, atom.call, atom.item)
    return tap


def taps_of(recording: Recording, layer: Layer, side: Side = "output") -> list[Atom]:
    """One atom for each tensor of a layer.

    Raises:
        EventError: It is an event, or a sink.
        UnknownLayerError: No tap of that name.
    """
    atom = atom_of(layer, side)
    if atom.side == "sink":
        raise EventError(f"{atom} is not a tap: walks end there. Ask mu({atom}), or sinks() for all steps.")
    items = recording.items(atom.layer, atom.side, atom.call)
    return [Atom(atom.layer, atom.side, atom.call, item) for item in items]


def is_reached(recording: Recording, tap: Tap) -> bool:
    """Whether a walk from the output can cross a tap."""
    output = recording.graph.output
    bit = 1 << recording.index[tap.place]
    return tap.place == output or bool(recording.below[output.vertex] & bit)


def is_below(recording: Recording, key: object, tap: Tap) -> bool:
    """Whether a walk that has crossed a tap can still meet a place, or the sink of a vertex (``-1 - vertex``)."""
    vertex = tap.place.vertex if isinstance(tap.place, Buffer) else tap.place[0]
    if isinstance(key, int):
        return (-1 - key) >= vertex if isinstance(tap.place, Buffer) else (-1 - key) > vertex
    bit = 1 << recording.index[key]  # type: ignore[index]
    if isinstance(tap.place, Buffer):
        return bool(recording.below[vertex] & bit)
    edge = recording.graph.vertices[vertex].edges[tap.place[1]]
    own = 1 << recording.index[tap.place]
    return edge is not None and bool(recording.through[vertex][tap.place[1]] & bit & ~own)
