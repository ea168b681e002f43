r"""The flow of relevance between groups of neurons in consecutive layers, as a graph of joint relevance.

A layer partitions all walks into walks through each of its groups, walks through the **rest** of its neurons, and walks
**off** the layer, which bypass it or are absorbed above it. Each part is an event, so the masses at each layer sum to
one, and every edge is a joint relevance:

.. math:: \mu(A \cap B), \quad A \text{ of one layer}, B \text{ of the next}, \qquad
          \sum_B \mu(A \cap B) = \mu(A), \quad \sum_A \mu(A \cap B) = \mu(B)

The selection of the groups to show and the merging of all others are new in this package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..errors import brief, printable
from ..events.event import Atom, Event
from ..recording.taps import Tap
from .flow_graph import FlowGraph
from .flow_nodes import Array, FlowError, FlowLayer
from .flow_thresholds import TOP, Thresholds
from .group_search import find_groups, layer_name
from .groups import summed
from .layer_groups import Groups
from .layer_taps import atom_of, several_layers
from .partitions import Names, Partition, partition

GROUPS = "groups"
"""Value of ``over`` for groups of channels that preserve the dependence between layers."""


class Measure(Protocol):
    """Protocol for the methods of :class:`~nrm_plugin.RelevanceMeasure` that flows use."""

    @property
    def batch(self) -> int: ...
    @property
    def sign(self) -> Tensor: ...
    def __call__(self, event: Any) -> Tensor: ...
    def marginal(self, layer: Any, over: Any = ..., *, joint: Any = ...) -> Any: ...
    def joints(self, layers: Any, over: Any = ...) -> list[Tensor]: ...
    def sink(self, layer: Any) -> Tensor: ...
    def bypass(self, layer: Any) -> Tensor: ...


@dataclass(frozen=True)
class DisplayedLayer:
    """Layer of a flow graph, with the groups of neurons that the graph displays as nodes.

    Attributes:
        atom: The event that a walk crosses the layer.
        layer: The nodes of the layer in the graph, with their masses.
        labels: Index of the displayed group of each neuron, or the number of displayed groups for neurons in no
            displayed group.
        has_all_channels: Whether the displayed groups are all channels. If so, their joint relevance may need fewer
            passes than channels.
    """

    atom: Atom
    layer: FlowLayer
    labels: Tensor
    has_all_channels: bool

    @property
    def count(self) -> int:
        return len(self.layer.groups)

    def with_rest(self, values: Tensor) -> Tensor:
        """Appends a zero for the rest to values of shape ``(…, groups)``.

        Values of shape ``(…, groups + 1)`` are returned unchanged.
        """
        return torch.nn.functional.pad(values, (0, self.count + 1 - values.shape[-1]))

    @property
    def event(self) -> Event:
        """The event that a walk crosses a shown group."""
        return self.atom[self.labels < self.count]


def flow_graph(
    mu: Measure,
    layers: Sequence[tuple[Any, Tap]],
    over: Any = "channel",
    top: int | None = TOP,
    min_mass: float | None = None,
    coverage: float | None = None,
    names: Mapping[str, Names] | None = None,
    sample: int | None = None,
    joints: Callable[[Sequence[DisplayedLayer]], Sequence[Tensor]] | None = None,
) -> FlowGraph:
    """Computes a flow graph from the marginals and the joint relevance of a measure.

    Args:
        mu: The measure whose flow is computed.
        layers: Layers and their taps, each below the previous layer.
        over: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`.
        top: Maximum number of groups shown per layer.
        min_mass: Smallest absolute mass of a shown group.
        coverage: Fraction of the absolute mass to show in each layer.
        names: Names of the groups in each layer.
        sample: Index of the sample.
        joints: Function that returns the joint relevance between the nodes of consecutive layers, of shape
            ``(N, K_upper, K_lower)``. By default, the measure is queried.
    """
    thresholds = Thresholds(top, min_mass, coverage)
    number = _sample_number(mu, sample)
    if not layers:
        raise FlowError("a flow needs at least one layer.")
    masses = mu.marginal([layer for layer, _ in layers])  # one pass for all layers
    shown = []
    for layer, tap in layers:
        groups = partition(tap, _for_layer(over, layer, "channel"), _for_layer(names, layer, None))
        relevance = summed(masses[layer], tap, groups.labels)[number].double().cpu().numpy()
        shown.append(_shown(mu, layer, tap, groups, relevance, thresholds, number))
    ask = joints or (lambda nodes: mu.joints([one.atom for one in nodes], _overs(nodes)))
    edges = tuple(
        _joint(mu, upper, lower, matrix[number], number)
        for (upper, lower), matrix in zip(pairwise(shown), ask(shown) if len(shown) > 1 else [], strict=True)
    )
    carried = shown[0].event
    for one in shown[1:]:
        carried = carried & one.event
    graph = FlowGraph(tuple(one.layer for one in shown), edges, float(mu(carried)[number]))
    sign = float(mu.sign[number])
    return graph if sign == 1 else graph.times(sign)


def ordered_taps(mu: Any, layers: Sequence[Any]) -> list[tuple[Any, Tap]]:
    """Returns the layers and their taps, sorted from the output to the input."""
    chosen, order = several_layers(layers), {name: number for number, name in enumerate(mu.layers)}
    if all(isinstance(layer, str) and layer in order for layer in chosen):
        chosen.sort(key=lambda layer: -order[layer])
        return [(layer, mu._tap(layer)) for layer in chosen]
    taps = {layer: mu._tap(layer) for layer in chosen}
    if all(isinstance(layer, str) for layer in chosen):  # sites are ordered only by the graph
        below = {layer: sum(mu._is_below(other.place, tap) for other in taps.values()) for layer, tap in taps.items()}
        chosen.sort(key=lambda layer: -below[layer])
    return [(layer, taps[layer]) for layer in chosen]


def with_groups(
    mu: Any,
    layers: Sequence[tuple[Any, Tap]],
    over: Any,
    names: Mapping[str, Names] | None,
    k: int,
    groups: Groups | None,
    top: int | None = None,
) -> tuple[Any, Mapping[str, Names] | None, int | None]:
    """Resolves ``over`` and ``groups`` to the grouping of each layer, its group names, and the number of shown groups.

    Groups found by a search or passed as ``groups`` are all shown.

    Args:
        mu: The measure to query.
        layers: Layers and their taps.
        over: Grouping of the neurons; ``"groups"`` stands for ``groups`` or, if none are given, for groups found by a
            search.
        names: Names of the members in each layer.
        k: Number of groups in a layer.
        groups: Existing groups; they apply to all of their layers.
        top: Maximum number of groups to show per layer, or None for no limit.
    """
    kinds = {layer: _for_layer(over, layer, "channel") for layer, _ in layers}
    called = {layer: layer_name(mu, layer) for layer in kinds}
    asked = [layer for layer, kind in kinds.items() if isinstance(kind, str) and kind == GROUPS]
    if groups is None and not asked:
        return over, names, top
    if groups is None:
        apart: dict[str, int | None] = {called[layer]: None for layer in kinds if layer not in asked}
        members = {called[layer]: kind for layer, kind in kinds.items() if layer not in asked}
        counts = {called[layer]: k for layer in asked}
        groups = find_groups(mu, list(kinds), counts | apart, members, names=names)
        grouped = asked
    else:
        grouped = [layer for layer in kinds if layer in asked or called[layer] in groups.layers]
    partitions = {layer: groups.over(mu, called[layer]) for layer in grouped}
    words = {layer: groups.names[groups.layers.index(called[layer])] for layer in grouped}
    shown = top if top is None else max([top, *map(len, words.values())])
    return kinds | partitions, dict(names or {}) | words, shown


def _sample_number(mu: Measure, sample: int | None) -> int:
    if sample is None and mu.batch > 1:
        raise FlowError(f"a flow covers one sample, and the measure has {mu.batch}: pass sample=, counting from 0.")
    number = 0 if sample is None else sample
    if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < mu.batch:
        raise FlowError(f"sample={brief(sample)}: the measure has samples 0 to {mu.batch - 1}.")
    return number


def _for_layer(value: Any, layer: Any, default: Any) -> Any:
    """Returns ``value[layer]``, or ``default`` for a missing key. Returns a value that is not a mapping as is."""
    if value is None:
        return default
    return value.get(layer, default) if isinstance(value, Mapping) else value


def _shown(
    mu: Measure, layer: Any, tap: Tap, groups: Partition, masses: Array, thresholds: Thresholds, number: int
) -> DisplayedLayer:
    """Selects the groups of a layer that pass the thresholds.

    Args:
        mu: The measure to query.
        layer: Layer whose groups are selected.
        tap: The tap of the layer.
        groups: All groups of its neurons.
        masses: Mass of each group, followed by the mass of the neurons outside all groups, if any.
        thresholds: Criteria that select the groups.
        number: Index of the sample.
    """
    outside, masses = float(masses[groups.count :].sum()), masses[: groups.count]
    masses = np.pad(masses, (0, groups.count - len(masses)))
    shown = thresholds.selected(masses)
    positions = torch.full((groups.count + 1,), len(shown), dtype=torch.long)
    positions[shown] = torch.arange(len(shown))
    flow_layer = FlowLayer(
        name=tap.names[0] if not isinstance(layer, str) and tap.names else str(layer),
        groups=tuple(shown),
        labels=tuple(printable(groups.names(group)) for group in shown),
        masses=tuple(float(masses[group]) for group in shown),
        rest=outside + float(np.delete(masses, shown).sum()),
        others=groups.count - len(shown),
        sink=float(mu.sink(layer)[number]),
        bypass=float(mu.bypass(layer)[number]),
    )
    has_all_channels = groups.are_channels and shown == list(range(groups.count))
    return DisplayedLayer(atom_of(layer), flow_layer, positions[groups.labels], has_all_channels)


def _overs(shown: Sequence[DisplayedLayer]) -> list[str | Tensor]:
    """Returns the ``over`` argument of the joint query for each layer.

    If the layer and an adjacent one both show all channels, this is ``"channel"``, which takes fewer passes. Otherwise,
    it is the labels of the layer.
    """
    overs: list[str | Tensor] = []
    for number, one in enumerate(shown):
        neighbors = [*shown[max(0, number - 1) : number], *shown[number + 1 : number + 2]]
        saves = one.has_all_channels and any(other.has_all_channels for other in neighbors)
        overs.append("channel" if saves else one.labels)
    return overs


def _joint(mu: Measure, upper: DisplayedLayer, lower: DisplayedLayer, matrix: Tensor, number: int) -> Array:
    """Returns the joint relevance of two layers, including rest and off, in shape ``(K_upper + 2, K_lower + 2)``.

    The elements of off are computed by separate queries rather than as differences from the marginals.
    """
    joint = np.zeros((upper.count + 2, lower.count + 2))
    joint[:-1, :-1] = upper.with_rest(lower.with_rest(matrix).T).T.double().cpu().numpy()
    leaving = mu.marginal(upper.atom, over=upper.labels, joint=~lower.atom)[number]
    joint[:-1, -1] = upper.with_rest(leaving).double().cpu().numpy()
    joining = mu.marginal(lower.atom, over=lower.labels, joint=~upper.atom)[number]
    joint[-1, :-1] = lower.with_rest(joining).double().cpu().numpy()
    joint[-1, -1] = float(mu(~upper.atom & ~lower.atom)[number])
    return joint
