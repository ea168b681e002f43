"""Events looked up in a recording: masks on taps, and what a crossing leaves undecided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..errors import EventError
from ..events.diagram import FALSE, TRUE, Diagram
from ..events.event import Absorbed, Any_, Atom, Attended, Event
from ..recording.graph import Buffer, Place
from ..recording.recording import Recording, Tap
from .attention_events import plain

Crossing = list[tuple[int, Tensor | None]]
"""What is left for the neurons of a mask; a mask of None stands for all neurons."""


class Formulas:
    """Several events over one recording, decided together.

    Attributes:
        roots: One diagram node for each event.
        levels: The level at which a place, or the sink of a vertex (as ``-1 - vertex``), is met.
    """

    def __init__(self, recording: Recording, events: Sequence[Event]) -> None:
        self.recording = recording
        self._resolved: dict[Atom | Attended, Event | tuple[object, Tensor]] = {}
        masks: dict[object, list[Tensor]] = {}
        for event in events:
            for atom in event.atoms():
                self._collect(atom, masks)
        ordered = sorted(masks, key=self._order)
        self.levels: dict[object, int] = {key: level for level, key in enumerate(ordered)}
        self.absorbed_level = len(ordered)
        self._masks = [mask for key in ordered for mask in masks[key]]
        levels = [self.levels[key] for key in ordered for _ in masks[key]]
        first = {key: levels.index(self.levels[key]) for key in ordered}
        self._numbers = {key: (first[key], masks[key]) for key in ordered}
        self.diagram = Diagram([*levels, self.absorbed_level])
        self.roots = [self.diagram.build(event, self._variable) for event in events]
        self._crossings: dict[tuple[int, int], Crossing] = {}
        self._depends: dict[int, int] = {}
        self._set_reach()

    # -- building ---------------------------------------------------------------------------------------------

    def _collect(self, atom: Atom | Absorbed | Attended, masks: dict[object, list[Tensor]]) -> None:
        if isinstance(atom, Absorbed) or atom in self._resolved:
            return
        if isinstance(atom, Attended):
            self._resolved[atom] = event = plain(atom, self.recording)
            for part in event.atoms():
                self._collect(part, masks)
            return
        places = self._places(atom)
        if len(places) > 1:
            parts = tuple(replace(atom, call=call) for call in range(len(places)))
            self._resolved[atom] = Any_(parts)
            for part in parts:
                self._collect(part, masks)
            return
        (key, shape, channel_dim) = places[0]
        mask = self.recording.without_samples(mask_of(atom, shape, channel_dim))
        known = masks.setdefault(key, [])
        same = next((other for other in known if other.shape == mask.shape and torch.equal(other, mask)), None)
        if same is None:
            known.append(mask)
        self._resolved[atom] = (key, mask if same is None else same)

    def _places(self, atom: Atom) -> list[tuple[object, torch.Size, int]]:
        if atom.side == "sink":
            vertices = self.recording.find_sink(atom.layer, atom.call)
            steps = [self.recording.graph.vertices[vertex].step for vertex in vertices]
            dims = [self._sink_dim(vertex) for vertex in vertices]
            lifted = self.recording.lifted
            return [(-1 - v, lifted(s.shape), dim) for v, s, dim in zip(vertices, steps, dims, strict=True) if s]
        taps = self.recording.find(atom.layer, atom.side, atom.call, atom.item)
        return [(tap.place, tap.shape, tap.channel_dim) for tap in taps]

    def _sink_dim(self, vertex: int) -> int:
        number = self.recording.index.get(Buffer(vertex, 0))
        usual = 1 if self.recording.batched else -1
        return usual if number is None else self.recording.taps[number].channel_dim

    def _order(self, key: object) -> tuple[int, int, int]:
        if isinstance(key, int):
            return (1, -1 - key, 0)
        return (0, *self.recording.taps[self.recording.index[key]].order)  # type: ignore[index]

    def _variable(self, atom: Atom | Absorbed | Attended) -> Event | int:
        if isinstance(atom, Absorbed):
            return len(self.diagram.levels) - 1
        found = self._resolved[atom]
        if isinstance(found, Event):
            return found
        key, mask = found
        first, known = self._numbers[key]
        return first + next(number for number, other in enumerate(known) if other is mask)

    def _set_reach(self) -> None:
        """``open[vertex]``: levels that a walk can still meet below a vertex, or by being absorbed in it."""
        graph = self.recording.graph
        buffers = {key: 1 << level for key, level in self.levels.items() if isinstance(key, Buffer)}
        edges = {key: 1 << level for key, level in self.levels.items() if isinstance(key, tuple)}
        self.open, _ = graph.reach(buffers, edges)
        absorbed = 1 << self.absorbed_level
        for index in range(len(graph.vertices) - 1, -1, -1):
            vertex = graph.vertices[index]
            bits = self.open[index]
            if vertex.step is not None or vertex.may_hold_constants:
                bits |= absorbed | (1 << self.levels[-1 - index] if -1 - index in self.levels else 0)
            for edge in vertex.edges:
                bits |= 0 if edge is None else self.open[edge.vertex]
            self.open[index] = bits

    # -- asking -----------------------------------------------------------------------------------------------

    def depends(self, node: int) -> int:
        """Bit set of the levels on which a node still depends."""
        if node not in self._depends:
            levels = {self.diagram.levels[variable] for variable in self.diagram.variables(node)}
            self._depends[node] = sum(1 << level for level in levels)
        return self._depends[node]

    def settle(self, node: int, vertex: int) -> int:
        """The node, or true or false when nothing below the vertex can change it any more."""
        return node if node <= TRUE or self.depends(node) & self.open[vertex] else self.end(node)

    def end(self, node: int) -> int:
        """What a walk that ends at a leaf makes of a node."""
        return self.diagram.step(node, self.absorbed_level, 0)

    def cross(self, node: int, level: int) -> Crossing:
        """What a crossing of the tap at a level leaves, for which neurons."""
        if (node, level) not in self._crossings:
            self._crossings[node, level] = self._cross(node, level)
        return self._crossings[node, level]

    def _cross(self, node: int, level: int) -> Crossing:
        if not self.diagram.is_touched(node, level):
            return [(node, None)]
        variables = sorted(v for v in self.diagram.variables(node) if self.diagram.levels[v] == level)
        if not variables:
            return [(self.diagram.step(node, level, 0), None)]
        found: dict[int, Tensor] = {}
        for answers, cell in _cells(variables, [self._masks[variable] for variable in variables]):
            left = self.diagram.step(node, level, answers)
            found[left] = cell if left not in found else found[left] | cell
        return list(found.items())

    def absorb(self, node: int, vertex: int) -> Crossing:
        """What being absorbed in a vertex leaves: true or false."""
        answer = 1 << len(self.diagram.levels) - 1
        level = self.levels.get(-1 - vertex)
        crossing = [(node, None)] if level is None else self.cross(node, level)
        return [(self.diagram.step(left, self.absorbed_level, answer), mask) for left, mask in crossing]


def _cells(variables: list[int], masks: list[Tensor]) -> list[tuple[int, Tensor]]:
    """The cells on which the masks of one tap differ, each with its answers as a bit set."""
    cells = [(0, torch.ones_like(masks[0]))]
    for variable, mask in zip(variables, masks, strict=True):
        split = [(answers | 1 << variable, cell & mask) for answers, cell in cells]
        split += [(answers, cell & ~mask) for answers, cell in cells]
        cells = [(answers, cell) for answers, cell in split if bool(cell.any())]
    return cells


def mask_of(atom: Atom, shape: torch.Size, channel_dim: int) -> Tensor:
    """The neurons of an atom, boolean, ``(1, *shape[1:])`` or ``(N, *shape[1:])``.

    Raises:
        EventError: The index does not fit the tap.
    """
    inner = torch.Size(shape[1:])
    if atom.index is None:
        return torch.ones((1, *inner), dtype=torch.bool)
    value = atom.index.value
    if atom.along_channel:
        if channel_dim % len(shape) == 0:
            raise EventError(f"{atom}: the tap of shape {tuple(shape)} has no channels.")
        chosen = torch.zeros(shape[channel_dim], dtype=torch.bool)
        _select(chosen, value, atom, torch.Size([shape[channel_dim]]))
        view = [1] * len(shape)
        view[channel_dim] = -1
        return chosen.view(view).expand(1, *inner).clone()
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        if value.shape == inner:
            return value.clone().unsqueeze(0)
        if value.shape == shape:
            return value.clone()
        raise EventError(
            f"{atom}: a mask of shape {tuple(value.shape)} does not fit the tap. Its neurons have shape "
            f"{tuple(inner)}, with one mask for each of the {shape[0]} samples {tuple(shape)}. For a mask over "
            "channels use `at(layer).channel(mask)`."
        )
    mask = torch.zeros(inner, dtype=torch.bool)
    _select(mask, value, atom, inner)
    return mask.unsqueeze(0)


def _select(mask: Tensor, value: object, atom: Atom, shape: torch.Size) -> None:
    try:
        mask[value] = True  # type: ignore[index]
    except (IndexError, TypeError, RuntimeError, ValueError, OverflowError) as error:
        raise EventError(
            f"{atom}: the index does not fit the neurons of the tap, which have shape {tuple(shape)} "
            f"(the batch is not indexed): {error}."
        ) from error


__all__ = ["FALSE", "TRUE", "Formulas", "Place", "Tap", "mask_of"]
