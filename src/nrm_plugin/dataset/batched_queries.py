"""What several queries ask of one measure, asked together: one pass where one is enough."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..events.event import Atom, Event, at
from ..measure.groups import by_label
from ..measure.measure import RelevanceMeasure
from .queries import (
    Activation,
    Bypass,
    Conditional,
    EventMass,
    Joint,
    Labels,
    Layer,
    Maps,
    Marginal,
    Over,
    Peak,
    Query,
    Sink,
    Variation,
)


class Asked:
    """What the queries need, each once.

    Args:
        queries: The queries.

    Attributes:
        layers: Taps whose marginals are needed.
        maps: Taps whose relevance joint with an event is needed, for each event.
        masses: Events.
        matrices: Upper and lower tap, and what is summed at each.
        activations: Layers that the model is watched at.
    """

    def __init__(self, queries: Iterable[Query]) -> None:
        self.layers: dict[Atom, None] = {}
        self.maps: dict[Event, dict[Atom, None]] = {}
        self.masses: dict[Event, None] = {}
        self.matrices: dict[tuple[Atom, Atom, Any], None] = {}
        self.activations: dict[Atom, None] = {}
        for query in queries:
            self._add(query)

    def _add(self, query: Query) -> None:
        if isinstance(query, Activation) or (isinstance(query, Peak) and query.of == "activation"):
            self.activations[tap(query.layer)] = None
        elif isinstance(query, (Marginal, Maps)):
            event = query.joint if query.given is None else query.given
            self._add_map(tap(query.layer), event)
            if query.given is not None:
                self.masses[query.given] = None
        elif isinstance(query, Peak):
            self.layers[tap(query.layer)] = None
        elif isinstance(query, Conditional):
            self.layers[tap(query.layer)] = None
            self._add_map(tap(query.layer), query.event)
        elif isinstance(query, EventMass):
            self.masses[query.event if query.given is None else query.event & query.given] = None
            if query.given is not None:
                self.masses[query.given] = None
        elif isinstance(query, Joint):
            self.matrices[tap(query.upper), tap(query.lower), query.over] = None

    def _add_map(self, layer: Atom, event: Event | None) -> None:
        if event is None:
            self.layers[layer] = None
        else:
            self.maps.setdefault(event, {})[layer] = None


class Answers:
    """The answers of one measure.

    Args:
        mu: The measure.
        asked: What is needed of it.
        seen: What the model computed at the layers that were watched, ``(N, *shape)`` each.
    """

    def __init__(self, mu: RelevanceMeasure, asked: Asked, seen: Mapping[Atom, Tensor]) -> None:
        self.mu, self.seen = mu, seen
        self.relevance: dict[tuple[Atom, Event | None], Tensor] = {}
        if asked.layers:
            found = mu.marginal(list(asked.layers))
            self.relevance |= {(layer, None): values for layer, values in found.items()}
        for layers, events in _alike(asked.maps).items():
            maps = mu.marginal(list(layers), joint=events)
            self.relevance |= {(layer, event): maps[layer][k] for layer in layers for k, event in enumerate(events)}
        masses = mu(list(asked.masses)) if asked.masses else ()
        self.masses: dict[Event, Tensor] = dict(zip(asked.masses, masses, strict=True))
        self.matrices: dict[tuple[Atom, Atom, Any], Tensor] = {}
        for chain, over in _chains(asked.matrices):
            joints = mu.joints(chain, over) if len(chain) > 2 else [mu.joint(chain[0], chain[1], _over(over))]
            for k, joint in enumerate(joints):
                self.matrices[chain[k], chain[k + 1], over] = joint

    def of(self, query: Query) -> Tensor:
        """The answer to one query, ``(N, *groups)``; not a number where a quotient has none."""
        return ANSWERS[type(query)](self, query)

    # -- one for each kind --------------------------------------------------------------------------------------------

    def _marginal(self, query: Marginal) -> Tensor:
        summed = self._summed(self._map(query), query.layer, query.over)
        return summed if query.given is None else self._given(summed, query)

    def _maps(self, query: Maps) -> Tensor:
        values = self._map(query)
        values = values if query.over in (None, "neuron") else self._reduced(values, query.layer, query.over)
        return values if query.given is None else self._given(values, query)

    def _map(self, query: Marginal | Maps) -> Tensor:
        return self.relevance[tap(query.layer), query.joint if query.given is None else query.given]

    def _given(self, values: Tensor, query: Marginal | Maps | EventMass) -> Tensor:
        assert query.given is not None
        mass = self.masses[query.given].reshape(-1, *(1,) * (values.ndim - 1))
        return _unless(mass.abs() <= query.min_ratio, values / mass)

    def _joint(self, query: Joint) -> Tensor:
        return self.matrices[tap(query.upper), tap(query.lower), query.over]

    def _event_mass(self, query: EventMass) -> Tensor:
        if query.given is None:
            return self.masses[query.event]
        return self._given(self.masses[query.event & query.given], query)

    def _conditional(self, query: Conditional) -> Tensor:
        layer = tap(query.layer)
        plain = self.relevance[layer, None]
        above, mass, spread = (
            self._summed(values, layer, query.over)
            for values in (self.relevance[layer, query.event], plain, plain.abs())
        )
        return _unless(mass.abs() <= query.min_ratio * spread, above / mass)

    def _sink(self, query: Sink) -> Tensor:
        return self.mu.sink(query.layer)

    def _bypass(self, query: Bypass) -> Tensor:
        return self.mu.bypass(query.layer)

    def _variation(self, query: Variation) -> Tensor:
        return self.mu.variation(query.layer)

    def _activation(self, query: Activation) -> Tensor:
        values = self._by_channel(self.seen[tap(query.layer)], query.layer)
        if query.reduce == "max":
            return values.amax(2)
        return values.sum(2) if query.reduce == "sum" else values.mean(2)

    def _peak(self, query: Peak) -> Tensor:
        layer = tap(query.layer)
        values = self.relevance[layer, None] if query.of == "relevance" else self.seen[layer]
        peaks = self._by_channel(values, layer).argmax(2)
        return peaks.to(values.dtype if values.dtype == torch.float64 else torch.float32)

    # -- groups -------------------------------------------------------------------------------------------------------

    def _by_channel(self, values: Tensor, layer: Layer) -> Tensor:
        """``(N, C, positions)``."""
        if values.ndim == 1:
            return values[:, None, None]
        moved = values.movedim(self.mu.channel_dim(layer), 1)
        return moved.reshape(*moved.shape[:2], -1)

    def _reduced(self, values: Tensor, layer: Layer, over: Over) -> Tensor:
        """Summed over channels, or over positions, in the shape of what is left."""
        if values.ndim == 1:
            return values
        channels = self.mu.channel_dim(layer)
        rest = [dim for dim in range(1, values.ndim) if (dim == channels) == (over == "position")]
        return values.sum(rest) if rest else values

    def _summed(self, values: Tensor, layer: Layer, over: Over) -> Tensor:
        """``(N, groups)``."""
        if isinstance(over, Labels):
            labels = over.tensor.expand(values.shape[1:])
            return by_label(values.flatten(1), labels)
        reduced = values if over == "neuron" else self._reduced(values, layer, over)
        return reduced.reshape(len(reduced), -1)


ANSWERS: dict[type[Query], Callable[[Answers, Any], Tensor]] = {
    Marginal: Answers._marginal,
    Joint: Answers._joint,
    EventMass: Answers._event_mass,
    Conditional: Answers._conditional,
    Sink: Answers._sink,
    Bypass: Answers._bypass,
    Variation: Answers._variation,
    Activation: Answers._activation,
    Peak: Answers._peak,
    Maps: Answers._maps,
}


def tap(layer: Layer) -> Atom:
    """A layer as an event without an index."""
    return layer if isinstance(layer, Atom) else at(layer)


def _alike(maps: Mapping[Event, Mapping[Atom, None]]) -> dict[tuple[Atom, ...], list[Event]]:
    """Events by the taps that they are read at: those of the same taps are carried together."""
    found: dict[tuple[Atom, ...], list[Event]] = {}
    for event, layers in maps.items():
        found.setdefault(tuple(layers), []).append(event)
    return found


def _unless(is_weak: Tensor, quotient: Tensor) -> Tensor:
    """A quotient, and not a number where it has none."""
    return torch.where(is_weak, torch.full_like(quotient, torch.nan), quotient)


def _over(over: Any) -> Any:
    if isinstance(over, tuple):
        return tuple(_over(one) for one in over)
    return over.tensor if isinstance(over, Labels) else over


def _chains(matrices: Iterable[tuple[Atom, Atom, Any]]) -> Iterable[tuple[Sequence[Atom], Any]]:
    """Pairs of layers in as few chains as they come in, each below the one before."""
    left = dict.fromkeys(matrices)
    while left:
        upper, lower, over = next(iter(left))
        del left[upper, lower, over]
        chain = [upper, lower]
        while isinstance(over, str):
            following = next((pair for pair in left if pair[0] == chain[-1] and pair[2] == over), None)
            if following is None:
                break
            del left[following]
            chain.append(following[1])
        yield chain, over


__all__ = ["Answers", "Asked", "tap"]
