r"""Glocal flows: mean flows over classes or groups of samples and differences between them.

The mean flow over samples is the flow of their mean measure, which is itself a normalized measure:

.. math:: \bar\mu(A \cap B) = \sum_n w_n \mu_n(A \cap B), \qquad \sum_n w_n = 1, \qquad \bar\mu(\Omega) = 1

Every layer of a mean flow therefore sums to 1. The difference between two mean flows is signed, and its layers sum to
0. Mean flows are new in this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..events.event import Event
from ..measure.flow import flow_graph, ordered_taps, with_groups
from ..measure.flow_graph import TOP, FlowError, FlowGraph, FlowLayer, check_thresholds
from ..measure.group_search import K
from ..measure.layer_groups import Groups
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, Partition, partition
from ..model.devices import by_sample
from .sweep_flow import flow_of_sweep, flow_queries, reduced

Array = NDArray[np.float64]
GroupSelection = Mapping[str, Sequence[int]]


def mean_flow(
    measures: RelevanceMeasure | Iterable[RelevanceMeasure],
    layers: Sequence[str],
    over: Any = "channel",
    *,
    groups: GroupSelection | Groups | None = None,
    top: int | None = TOP,
    min_mass: float | None = None,
    coverage: float | None = None,
    names: Mapping[str, Names] | None = None,
) -> FlowGraph:
    """Computes the mean flow over all samples of one or several measures.

    Args:
        measures: A measure, or an iterable of measures, one per batch.
        layers: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`.
        over: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`.
        groups: Groups from :func:`~nrm_plugin.find_groups`, which apply to all of their layers; or the indices of the
            groups to show, keyed by layer name. All other groups are merged into the rest. The joint matrix of two wide
            layers that are not adjacent takes one pass per group.
        top: Maximum number of groups per layer, selected by absolute mean mass, or None for all. The selection depends
            on the mean, so all groups are computed in any case.
        min_mass: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`, applied to the mean.
        coverage: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`, applied to the mean.
        names: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`.

    Returns:
        The graph. ``carried`` is None if groups were removed by ``top``, ``min_mass`` or ``coverage``.

    Raises:
        FlowError, InputError, EventError: As raised by :meth:`~nrm_plugin.RelevanceMeasure.flow`, or if no measure
            is given.

    Examples:
        >>> from nrm_plugin.dataset.glocal import mean_flow
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batches = (RelevanceMeasure(net, torch.randn(8, 3), 1) for _ in range(3))
        >>> graph = mean_flow(batches, ["output", "1", "input"], top=2)
        >>> round(sum(graph.layers[1].masses) + graph.layers[1].rest + graph.layers[1].sink, 5)
        1.0
    """
    check_thresholds(top, min_mass, coverage)
    total: FlowGraph | None = None
    count = 0
    for mu in [measures] if isinstance(measures, RelevanceMeasure) else measures:
        graph = _batch_flow(mu, layers, over, groups or {}, names)
        total = graph if total is None else mixed([total, graph], [count, mu.batch])
        count += mu.batch
    if total is None:
        raise FlowError("no measure to average.")
    return reduced(total, top, min_mass, coverage)


def _batch_flow(
    mu: RelevanceMeasure,
    layers: Sequence[str],
    over: Any,
    groups: GroupSelection | Groups,
    names: Mapping[str, Names] | None,
) -> FlowGraph:
    taps = ordered_taps(mu, layers)
    if isinstance(groups, Groups):
        over, names, _ = with_groups(mu, taps, over, names, K, groups)
        return replace(flow_graph(_MeanMeasure(mu), taps, over, top=None, names=names), origin=groups.origin)
    regions: dict[str, Any] = {}
    partitions: dict[str, Partition] = {}
    for layer, tap in taps:
        regions[layer] = over.get(layer, "channel") if isinstance(over, Mapping) else over
        if layer in groups:
            full = partitions[layer] = partition(tap, regions[layer], (names or {}).get(layer))
            _check_groups(layer, groups[layer], full.count)
            regions[layer] = {str(group): full.labels == group for group in groups[layer]}
    graph = flow_graph(_MeanMeasure(mu), taps, regions, top=None, names=names)
    flow_layers = [
        _renumbered(flow_layer, groups[layer], partitions[layer]) if layer in groups else flow_layer
        for (layer, _), flow_layer in zip(taps, graph.layers, strict=True)
    ]
    return replace(graph, layers=tuple(flow_layers))


def _check_groups(layer: str, chosen: Sequence[int], count: int) -> None:
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= group < count for group in chosen):
        raise InputError(f"groups= of {layer!r} must be distinct indices from 0 to {count - 1}, got {list(chosen)}.")


def _renumbered(layer: FlowLayer, chosen: Sequence[int], full: Partition) -> FlowLayer:
    """Replaces the group indices and names of a layer with the indices and names of the full partition."""
    names = tuple(full.names(group) for group in chosen)
    return replace(layer, groups=tuple(chosen), labels=names, others=full.count - len(chosen))


class _MeanMeasure:
    """Mean measure of a batch, with the interface of a single-sample measure.

    Args:
        mu: The measure of the batch.
    """

    batch = 1
    sign = torch.ones(1)

    def __init__(self, mu: RelevanceMeasure) -> None:
        self.mu = mu
        self._signs = mu.sign.double()

    def __call__(self, event: Event) -> Tensor:
        return self._mean(self.mu(event))

    def marginal(self, layer: Any, over: Any = None, *, joint: Any = None) -> Any:
        marginals = self.mu.marginal(layer, over=over, joint=joint)
        if isinstance(marginals, dict):
            return {name: self._mean(values) for name, values in marginals.items()}
        return self._mean(marginals)

    def joints(self, layers: Any, over: Any = "channel") -> list[Tensor]:
        return [self._mean(values) for values in self.mu.joints(layers, over)]

    def sink(self, layer: Any) -> Tensor:
        return self._mean(self.mu.sink(layer))

    def bypass(self, layer: Any) -> Tensor:
        return self._mean(self.mu.bypass(layer))

    def _mean(self, values: Tensor) -> Tensor:
        return (values.double() * by_sample(self._signs, values)).mean(0, keepdim=True)


def mixed(graphs: Sequence[FlowGraph], weights: Sequence[float]) -> FlowGraph:
    """Computes the weighted mean of graphs with the same groups.

    Args:
        graphs: Flow graphs with the same groups in each layer.
        weights: One weight per graph, such as its number of samples. Weights are divided by their sum.

    Raises:
        FlowError: If no graphs are given, their groups differ, or the weights are negative or all zero.

    Examples:
        >>> from nrm_plugin.dataset.glocal import mixed
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(2, 3), 1)
        >>> graphs = [mu.flow(["1", "input"], top=None, sample=sample) for sample in range(2)]
        >>> mixed(graphs, [1, 1])
        FlowGraph(1: 4, input: 3)
    """
    if len(graphs) != len(weights) or not graphs or min(weights) < 0 or not sum(weights) > 0:
        raise FlowError(f"{len(graphs)} graphs need as many non-negative weights, not all zero; got {weights}.")
    return _combined(graphs, [weight / sum(weights) for weight in weights])


def difference(first: FlowGraph, second: FlowGraph) -> FlowGraph:
    """Subtracts the second graph from the first. The result is signed, and each of its cuts sums to 0.

    For the mean flows of two sets of samples, the result shows which channels and edges differ between the sets.
    Compute both flows with all groups, ``top=None``, and then select the groups that differ most: ``difference(a,
    b).smaller(top=8)``.

    Raises:
        FlowError: If the graphs have different groups.

    Examples:
        >>> from nrm_plugin.dataset.glocal import difference
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(2, 3), 1)
        >>> a, b = (mu.flow(["1", "input"], top=None, sample=sample) for sample in range(2))
        >>> abs(sum(node.mass for node in difference(a, b).nodes)) < 1e-5
        True
    """
    return _combined([first, second], [1.0, -1.0])


def _combined(graphs: Sequence[FlowGraph], factors: Sequence[float]) -> FlowGraph:
    first = graphs[0]
    groups = [[(layer.name, layer.groups, layer.others) for layer in graph.layers] for graph in graphs]
    if any(other != groups[0] for other in groups):
        raise FlowError(
            "graphs with different layers or groups cannot be combined, because the rest would contain different "
            "groups. Compute them with top=None, and reduce the result: graph.smaller(top=8)."
        )

    layers = [_combined_layer([graph.layers[k] for graph in graphs], factors) for k in range(len(first.layers))]
    joints = [_total([graph.joints[k] for graph in graphs], factors) for k in range(len(first.joints))]
    carried = [graph.carried for graph in graphs if graph.carried is not None]
    is_known = len(carried) == len(graphs)
    origin = " and ".join(dict.fromkeys(graph.origin for graph in graphs if graph.origin))
    return FlowGraph(tuple(layers), tuple(joints), float(_total(carried, factors)) if is_known else None, origin)


def _combined_layer(layers: Sequence[FlowLayer], factors: Sequence[float]) -> FlowLayer:
    rest, sink, bypass = (
        float(_total([getattr(layer, key) for layer in layers], factors)) for key in ("rest", "sink", "bypass")
    )
    masses = _total([layer.masses for layer in layers], factors)
    return replace(layers[0], masses=tuple(masses.tolist()), rest=rest, sink=sink, bypass=bypass)


def _total(values: Sequence[Any], factors: Sequence[float]) -> Array:
    total: Array = np.tensordot(np.asarray(factors), np.asarray(values, dtype=float), 1)
    return total


__all__ = ["difference", "flow_of_sweep", "flow_queries", "mean_flow", "mixed"]
