"""Evaluation of several queries on a measure in as few passes as possible."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..events.event import Atom, Event, at
from ..measure.groups import by_label
from ..measure.measure import RelevanceMeasure
from ..model.devices import by_sample
from .queries import (
    Activation,
    Bypass,
    Conditional,
    EventMass,
    Joint,
    Labels,
    LayerSpec,
    Maps,
    Marginal,
    Over,
    Peak,
    Query,
    Sink,
    Variation,
)


class Requirements:
    """Quantities of a measure that a set of queries requires, without duplicates.

    Args:
        queries: The queries to evaluate.

    Attributes:
        marginals: Layers whose marginals are required.
        joint_marginals: Layers whose marginals joint with an event are required, keyed by event.
        masses: Events whose mass is required.
        joint_matrices: The upper layer, lower layer and groups of each required joint matrix.
        activations: Layers with required activations.
    """

    def __init__(self, queries: Iterable[Query]) -> None:
        self.marginals: dict[Atom, None] = {}
        self.joint_marginals: dict[Event, dict[Atom, None]] = {}
        self.masses: dict[Event, None] = {}
        self.joint_matrices: dict[tuple[Atom, Atom, Any], None] = {}
        self.activations: dict[Atom, None] = {}
        for query in queries:
            self._add(query)

    def _add(self, query: Query) -> None:
        if isinstance(query, Activation) or (isinstance(query, Peak) and query.of == "activation"):
            self.activations[tap(query.layer)] = None
        elif isinstance(query, (Marginal, Maps)):
            event = query.joint if query.given is None else query.given
            self._add_marginal(tap(query.layer), event)
            if query.given is not None:
                self.masses[query.given] = None
        elif isinstance(query, Peak):
            self.marginals[tap(query.layer)] = None
        elif isinstance(query, Conditional):
            self.marginals[tap(query.layer)] = None
            self._add_marginal(tap(query.layer), query.event)
        elif isinstance(query, EventMass):
            self.masses[query.event if query.given is None else query.event & query.given] = None
            if query.given is not None:
                self.masses[query.given] = None
        elif isinstance(query, Joint):
            self.joint_matrices[tap(query.upper), tap(query.lower), query.over] = None

    def _add_marginal(self, layer: Atom, event: Event | None) -> None:
        if event is None:
            self.marginals[layer] = None
        else:
            self.joint_marginals.setdefault(event, {})[layer] = None


class QueryResults:
    """Results of queries on a measure, multiplied by the sign of the measure. They can be summed over samples.

    Args:
        mu: The measure of the batch.
        needed: The quantities that the queries require.
        activations: Activations of the required layers, of shape ``(N, *shape)`` each.
    """

    def __init__(self, mu: RelevanceMeasure, needed: Requirements, activations: Mapping[Atom, Tensor]) -> None:
        self.mu, self.activations, self._signs = mu, activations, mu.sign
        self.relevance: dict[tuple[Atom, Event | None], Tensor] = {}
        if needed.marginals:
            marginals = mu.marginal(list(needed.marginals))
            self.relevance |= {(layer, None): self._signed(values) for layer, values in marginals.items()}
        for layers, events in _events_by_taps(needed.joint_marginals).items():
            marginals = mu.marginal(list(layers), joint=events)
            self.relevance |= {
                (layer, event): self._signed(marginals[layer][k]) for layer in layers for k, event in enumerate(events)
            }
        masses = mu(list(needed.masses)) * self._signs if needed.masses else ()
        self.masses: dict[Event, Tensor] = dict(zip(needed.masses, masses, strict=True))
        self.joint_matrices: dict[tuple[Atom, Atom, Any], Tensor] = {}
        for chain, over in _chains(needed.joint_matrices):
            joints = mu.joints(chain, over) if len(chain) > 2 else [mu.joint(chain[0], chain[1], _with_tensors(over))]
            for k, joint in enumerate(joints):
                self.joint_matrices[chain[k], chain[k + 1], over] = self._signed(joint)

    def of(self, query: Query) -> Tensor:
        """Returns the result of a query in shape ``(N, *groups)``, with NaN where a quotient is undefined."""
        return METHODS[type(query)](self, query)

    # -- one method for each kind of query ----------------------------------------------------------------------------

    def _marginal(self, query: Marginal) -> Tensor:
        summed = self._summed(self._by_neuron(query), query.layer, query.over)
        return summed if query.given is None else self._conditioned(summed, query)

    def _maps(self, query: Maps) -> Tensor:
        values = self._by_neuron(query)
        values = values if query.over in (None, "neuron") else self._reduced(values, query.layer, query.over)
        return values if query.given is None else self._conditioned(values, query)

    def _by_neuron(self, query: Marginal | Maps) -> Tensor:
        return self.relevance[tap(query.layer), query.joint if query.given is None else query.given]

    def _conditioned(self, values: Tensor, query: Marginal | Maps | EventMass) -> Tensor:
        assert query.given is not None
        mass = by_sample(self.masses[query.given], values)
        return _quotient(values, mass, mass.abs() <= query.min_ratio)

    def _joint(self, query: Joint) -> Tensor:
        return self.joint_matrices[tap(query.upper), tap(query.lower), query.over]

    def _event_mass(self, query: EventMass) -> Tensor:
        if query.given is None:
            return self.masses[query.event]
        return self._conditioned(self.masses[query.event & query.given], query)

    def _conditional(self, query: Conditional) -> Tensor:
        layer = tap(query.layer)
        marginal = self.relevance[layer, None]
        joint, mass, absolute = (
            self._summed(values, layer, query.over)
            for values in (self.relevance[layer, query.event], marginal, marginal.abs())
        )
        return _quotient(joint, mass, mass.abs() <= query.min_ratio * absolute)

    def _sink(self, query: Sink) -> Tensor:
        return self._signed(self.mu.sink(query.layer))

    def _bypass(self, query: Bypass) -> Tensor:
        return self._signed(self.mu.bypass(query.layer))

    def _variation(self, query: Variation) -> Tensor:
        return self.mu.variation(query.layer)

    def _activation(self, query: Activation) -> Tensor:
        values = self._by_channel(self.activations[tap(query.layer)], query.layer)
        if query.reduce == "max":
            return values.amax(2)
        return values.sum(2) if query.reduce == "sum" else values.mean(2)

    def _peak(self, query: Peak) -> Tensor:
        layer = tap(query.layer)
        values = self.relevance[layer, None] if query.of == "relevance" else self.activations[layer]
        peaks = self._by_channel(values, layer).argmax(2)
        return peaks.to(values.dtype if values.dtype == torch.float64 else torch.float32)

    def _signed(self, values: Tensor) -> Tensor:
        """Multiplies values of shape ``(N, …)`` by the sign of the explained output of each sample."""
        if not bool((self._signs < 0).any()):
            return values
        return values * by_sample(self._signs, values)

    # -- groups -------------------------------------------------------------------------------------------------------

    def _by_channel(self, values: Tensor, layer: LayerSpec) -> Tensor:
        """Reshapes values of a layer to shape ``(N, C, positions)``."""
        if values.ndim == 1:
            return values[:, None, None]
        moved = values.movedim(self.mu.channel_dim(layer), 1)
        return moved.reshape(*moved.shape[:2], -1)

    def _reduced(self, values: Tensor, layer: LayerSpec, over: Over) -> Tensor:
        """Sums values over all dimensions except the channels or the positions."""
        if values.ndim == 1:
            return values
        channels = self.mu.channel_dim(layer)
        rest = [dim for dim in range(1, values.ndim) if (dim == channels) == (over == "position")]
        return values.sum(rest) if rest else values

    def _summed(self, values: Tensor, layer: LayerSpec, over: Over) -> Tensor:
        """Sums values over the neurons of each group. Returns shape ``(N, groups)``."""
        if isinstance(over, Labels):
            labels = over.tensor.expand(values.shape[1:])
            return by_label(values.flatten(1), labels)
        reduced = values if over == "neuron" else self._reduced(values, layer, over)
        return reduced.reshape(len(reduced), -1)


METHODS: dict[type[Query], Callable[[QueryResults, Any], Tensor]] = {
    Marginal: QueryResults._marginal,
    Joint: QueryResults._joint,
    EventMass: QueryResults._event_mass,
    Conditional: QueryResults._conditional,
    Sink: QueryResults._sink,
    Bypass: QueryResults._bypass,
    Variation: QueryResults._variation,
    Activation: QueryResults._activation,
    Peak: QueryResults._peak,
    Maps: QueryResults._maps,
}


def tap(layer: LayerSpec) -> Atom:
    """Converts a layer to its tap."""
    return layer if isinstance(layer, Atom) else at(layer)


def _events_by_taps(marginals: Mapping[Event, Mapping[Atom, None]]) -> dict[tuple[Atom, ...], list[Event]]:
    """Groups events with marginals at the same taps. Such events share passes."""
    events: dict[tuple[Atom, ...], list[Event]] = {}
    for event, layers in marginals.items():
        events.setdefault(tuple(layers), []).append(event)
    return events


def _quotient(numerator: Tensor, denominator: Tensor, is_undefined: Tensor) -> Tensor:
    """Divides two tensors. The quotient is NaN where it is undefined."""
    return (numerator / denominator).masked_fill(is_undefined, torch.nan)


def _with_tensors(over: Any) -> Any:
    if isinstance(over, tuple):
        return tuple(_with_tensors(one) for one in over)
    return over.tensor if isinstance(over, Labels) else over


def _chains(matrices: Iterable[tuple[Atom, Atom, Any]]) -> Iterable[tuple[Sequence[Atom], Any]]:
    """Merges pairs of layers into chains in which each layer is below the previous one."""
    remaining = dict.fromkeys(matrices)
    while remaining:
        upper, lower, over = next(iter(remaining))
        del remaining[upper, lower, over]
        chain = [upper, lower]
        while isinstance(over, str):
            following = next((pair for pair in remaining if pair[0] == chain[-1] and pair[2] == over), None)
            if following is None:
                break
            del remaining[following]
            chain.append(following[1])
        yield chain, over


__all__ = ["QueryResults", "Requirements", "tap"]
