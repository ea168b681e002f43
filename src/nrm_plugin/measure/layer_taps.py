"""Lookup of the recorded tensors (taps) that the layers in a query name, and their order along walks."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from ..errors import EventError, brief
from ..events.event import Atom, Event, Side, at
from ..kernels.layer_step import LayerStep
from ..model.affine_layers import Weighted
from ..model.zero_one_routes import operation
from ..recording.graph import Vertex
from ..recording.places import Buffer, Edge, Sink
from ..recording.recording import Recording
from ..recording.taps import Tap

Layer = str | nn.Module | Atom
"""A layer in a query: the name of a tap, a module, or ``at(…)`` without an index."""


def atom_of(layer: Any, side: Side = "output") -> Atom:
    """Returns the event that a walk crosses any neuron of a layer.

    Raises:
        EventError: If ``layer`` is an event or a list of layers.
    """
    if isinstance(layer, Atom):
        return layer
    if isinstance(layer, Event):
        raise EventError(f"{layer} is an event, but a layer is needed here. Pass the event as joint=.")
    if isinstance(layer, (list, tuple)):
        raise EventError(f"one layer is needed here, got {brief(layer)}; only marginal() takes several, in a list.")
    return at(layer, side)


def layer_list(layers: Any) -> tuple[list[Any], bool]:
    """Converts one or several layers to a list. The second value is True if a single layer was given."""
    is_one = isinstance(layers, (str, nn.Module, Event, Tensor)) or not isinstance(layers, Iterable)
    return ([layers] if is_one else list(layers)), is_one


def several_layers(layers: Any) -> list[Any]:
    """Converts a collection of layers to a list.

    Raises:
        EventError: If a single layer is given.
    """
    listed, is_one = layer_list(layers)
    if is_one:
        raise EventError(f"several layers are needed here, in a list, got {brief(layers)}.")
    return listed


def tap_of(recording: Recording, layer: Layer) -> Tap:
    """Returns the tap (hook point) that a query names as a layer.

    Raises:
        EventError: If ``layer`` selects neurons, as in ``at(layer)[3]``, or refers to several taps.
        UnknownLayerError: If no tap has this name.
    """
    atom = atom_of(layer)
    if atom.index is not None:
        raise EventError(f"{atom} is an event, but a layer is needed here. Use at(layer) without an index, or joint=.")
    if atom.side == "sink" or atom.call == "any":
        raise EventError(f"{atom} is not a single tap. Use mu({atom}) for its mass.")
    (tap,) = recording.taps.find(atom.layer, atom.side, atom.call, atom.item)
    return tap


def taps_of(recording: Recording, layer: Layer, side: Side = "output") -> list[Atom]:
    """Returns one atom per tensor that a layer returns or, for ``side="input"``, receives.

    Raises:
        EventError: If ``layer`` is an event or a sink.
        UnknownLayerError: If no tap has this name.
    """
    atom = atom_of(layer, side)
    if atom.side == "sink":
        raise EventError(f"{atom} is not a tap: walks end there. Use mu({atom}), or sinks() for all steps.")
    items = recording.taps.items(atom.layer, atom.side, atom.call)
    return [Atom(atom.layer, atom.side, atom.call, item) for item in items]


def is_reached(recording: Recording, tap: Tap) -> bool:
    """Returns True if a walk that starts at the output can cross the tap."""
    output = recording.graph.output
    bit = 1 << recording.taps.index[tap.place]
    return tap.place == output or bool(recording.taps.marks.below_vertex[output.vertex] & bit)


def is_below(recording: Recording, place: Buffer | Edge | Sink, tap: Tap) -> bool:
    """Returns True if a walk that has crossed a tap can still cross a place or, for a sink, be absorbed there."""
    vertex, taps = tap.place.vertex, recording.taps
    if isinstance(place, Sink):
        return place.vertex >= vertex if isinstance(tap.place, Buffer) else place.vertex > vertex
    bit = 1 << taps.index[place]
    if isinstance(tap.place, Buffer):
        return bool(taps.marks.below_vertex[vertex] & bit)
    own = 1 << taps.index[tap.place]
    return bool(taps.marks.below_edge[vertex][tap.place.number] & bit & ~own)


def separates(recording: Recording, upper: Tap, middle: Tap, lower: Tap) -> bool:
    """Returns True if every walk that crosses an upper and a lower tap also crosses a middle tap.

    Walks that are absorbed between the taps do not count. The middle tap can be the upper or the lower tap itself.
    """
    if middle.place in (upper.place, lower.place):
        return True
    vertices, seen = recording.graph.vertices, set()
    waiting = [recording.graph.buffer(upper.place)]
    while waiting:
        buffer = waiting.pop()
        if buffer == middle.place or buffer.vertex in seen:
            continue
        seen.add(buffer.vertex)
        for number, read in enumerate(vertices[buffer.vertex].edges):
            if read is None or Edge(buffer.vertex, number) == middle.place:
                continue
            if lower.place in (read, Edge(buffer.vertex, number)):
                return False
            waiting.append(read)
    return True


def is_only_pooled(recording: Recording, tap: Tap) -> bool:
    """Returns True if a tap is computed from larger tensors only by pooling and by rearranging elements."""
    graph, seen = recording.graph, set()
    waiting = [graph.buffer(tap.place)]
    while waiting:
        buffer = waiting.pop()
        vertex = graph.vertices[buffer.vertex]
        if buffer.vertex in seen:
            continue
        seen.add(buffer.vertex)
        is_pooling = _is_pooling(vertex)
        if vertex.leaf is not None or (vertex.step is not None and not is_pooling):
            return False
        for read in vertex.edges:
            if read is not None and not (is_pooling and graph.shape(read) != graph.shape(buffer)):
                waiting.append(read)
    return True


def _is_pooling(vertex: Vertex) -> bool:
    """Returns True if a vertex is a pooling operation or dropout, as a module or a function."""
    step = vertex.step
    if step is None:
        name = operation(vertex.node)
    elif isinstance(step, LayerStep) and not isinstance(step.layer_call.module, Weighted):
        name = type(step.layer_call.module).__name__
    else:
        name = step.name.rpartition(".")[2]
    name = name.lower()
    return ("pool" in name and "unpool" not in name) or "dropout" in name
