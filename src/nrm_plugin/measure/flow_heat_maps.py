"""Conditional heat maps of the nodes in a flow graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .flow import flow_graph, ordered_taps, with_groups
from .flow_graph import FlowGraph
from .flow_nodes import FlowLayer, FlowNode
from .flow_passes import FlowPasses, flow_passes, map_tap
from .flow_thresholds import TOP
from .group_search import K
from .layer_groups import Groups
from .measure import RelevanceMeasure
from .partitions import Names, partition

NodeMaps = Mapping[str, NDArray[np.float64]]
"""Heat maps, of shape ``(H, W)``, keyed by :attr:`FlowNode.key`."""
Pairs = dict[tuple[str, str], float]
"""Joint relevance of nodes in non-adjacent layers, keyed by the upper and the lower node."""
LOWEST = "input"


@dataclass(frozen=True)
class MappedFlow:
    """Flow graph with a conditional heat map for each node.

    Attributes:
        graph: Flow graph of the nodes.
        maps: The heat maps of the nodes, of shape ``(H, W)``, at the resolution of the image.
        pairs: Joint relevance of nodes in non-adjacent layers.
        layer: The layer whose positions form the heat maps.
        positions: Size of this layer along height and width, or empty for the input itself.
    """

    graph: FlowGraph
    maps: NodeMaps
    pairs: Pairs
    layer: str
    positions: tuple[int, ...] = ()


def mapped_flow(
    mu: RelevanceMeasure,
    layers: Sequence[Any],
    over: Any = "channel",
    *,
    top: int | None = TOP,
    min_mass: float | None = None,
    coverage: float | None = None,
    names: Mapping[str, Names] | None = None,
    sample: int | None = None,
    k: int = K,
    groups: Groups | None = None,
    lowest: str | None = None,
) -> MappedFlow:
    r"""Computes a flow graph and the conditional heat maps of its nodes in the same passes.

    A heat map shows :math:`\mu(p \cap \text{node}) / |\mu(\text{node})|` for each position ``p`` of a layer that is
    below all layers of the flow except the input and has at least 48 positions along each side. Its resolution suffices
    for a figure, at a much lower cost than single pixels. All values are exact. The heat map of a group of input pixels
    is their relevance.

    Args:
        mu: The measure whose flow is computed.
        layers: The layers of the flow. All arguments except ``lowest`` are documented in
            :meth:`~nrm_plugin.RelevanceMeasure.flow`.
        over: How the neurons of each layer are grouped.
        top: Maximum number of groups shown per layer.
        min_mass: Smallest absolute mass of a shown group.
        coverage: Fraction of the absolute mass that is shown in each layer.
        names: Names of the groups.
        sample: Index of the sample.
        k: Number of groups per layer for ``over="groups"``.
        groups: Groups returned by :func:`~nrm_plugin.find_groups`.
        lowest: The tap at whose positions heat maps are computed: ``"input"`` for single pixels, or None for a tap
            chosen automatically.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 1)
        >>> flow = mapped_flow(mu, ["1", "input"], top=2)
        >>> flow.graph, sorted(flow.maps)
        (FlowGraph(1: 2, input: 1), ['1/0', '1/1', 'input/0'])
    """
    taps = ordered_taps(mu, layers)
    over, names, top = with_groups(mu, taps, over, names, k, groups, top)
    only = [tap for _, tap in taps]
    image = mu._tap(lowest or LOWEST)
    above = [tap for tap in only if tap.place != image.place]
    name, tap = map_tap(mu, above, LOWEST) if lowest is None else (lowest, image)
    done: list[FlowPasses] = []

    def joints(nodes: Sequence[Any]) -> list[Tensor]:
        mu._pairs([one.atom for one in nodes], "for any two layers of a flow, one must be below the other")
        done.append(flow_passes(mu, only, [one.labels for one in nodes], tap))
        return [done[0].joints[number, number + 1] for number in range(len(nodes) - 1)]

    with mu._sharing([*(layer for layer, _ in taps), name]):
        graph = flow_graph(mu, taps, over, top, min_mass, coverage, names, sample, joints)
    graph = graph if groups is None else replace(graph, origin=groups.origin)
    labels = [_labels(mu, layer, over) for layer in graph.layers]
    passes = done[0] if done else flow_passes(mu, only, labels, tap)
    maps, pairs = _read(mu, graph, labels, passes, lowest or LOWEST, 0 if sample is None else sample)
    is_image = tap.place == image.place
    return MappedFlow(graph, maps, pairs, name, () if is_image else tuple(tap.shape[2:]))


def flow_maps(
    mu: RelevanceMeasure, graph: FlowGraph, over: Any = "channel", sample: int = 0, lowest: str = LOWEST
) -> dict[str, NDArray[np.float64]]:
    r"""Computes the heat maps of all nodes in a flow graph, conditional on the node and with the sign of its relevance.

    The value at a pixel is :math:`\mu(\text{pixel} \cap \text{node}) / |\mu(\text{node})|`. Positive values are thus
    relevance of the same sign as positive nodes, also in the heat map of a negative node. Heat maps
    are summed over the color channels and over the slices of a volume; a one-dimensional signal is treated as an image
    with one row. The heat map of a group of input pixels is their relevance. Walks that do not cross a layer have no
    heat map. If the inputs have no positions, there are no heat maps at all.

    Args:
        mu: The measure used to compute the graph.
        graph: The flow graph; its layers must be names of taps.
        over: Grouping of the neurons of each layer, as in the computation of the graph.
        sample: Index of the sample, as in the computation of the graph.
        lowest: The tap at whose positions the heat maps are computed.

    Returns:
        The heat maps, of shape ``(H, W)``, keyed by node. Each heat map sums to the fraction of the node's mass that
        reaches the input, with the sign of the node.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 1)
        >>> maps = flow_maps(mu, mu.flow(["1", "input"]))
        >>> sorted({shape.shape for shape in maps.values()})
        [(4, 4)]
    """
    return flow_maps_and_pairs(mu, graph, over, sample, lowest)[0]


def flow_maps_and_pairs(
    mu: RelevanceMeasure, graph: FlowGraph, over: Any = "channel", sample: int = 0, lowest: str = LOWEST
) -> tuple[dict[str, NDArray[np.float64]], Pairs]:
    r"""Computes the heat maps of :func:`flow_maps` and the joint relevance of nodes in non-adjacent layers.

    Both come from the same passes, one per layer with one vector per node. :func:`mapped_flow` computes the flow in
    these passes as well.

    Args:
        mu: As in :func:`flow_maps`.
        graph: As in :func:`flow_maps`.
        over: As in :func:`flow_maps`.
        sample: As in :func:`flow_maps`.
        lowest: As in :func:`flow_maps`.

    Returns:
        The heat maps; and :math:`\mu(A \cap B)`, keyed by the upper and the lower node.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1)
        >>> maps, pairs = flow_maps_and_pairs(mu, mu.flow(["output", "1", "input"], top=None))
        >>> ("output/1", "input/0") in pairs
        True
    """
    labels = [_labels(mu, layer, over) for layer in graph.layers]
    passes = flow_passes(mu, [mu._tap(layer.name) for layer in graph.layers], labels, mu._tap(lowest))
    return _read(mu, graph, labels, passes, lowest, sample)


def _labels(mu: RelevanceMeasure, layer: FlowLayer, over: Any) -> Tensor:
    """Returns the node index of each neuron, with the number of shown groups for the rest."""
    kind = over.get(layer.name, "channel") if isinstance(over, Mapping) else over
    groups = partition(mu._tap(layer.name), kind, None)
    places = torch.full((max(groups.count, int(groups.labels.max())) + 1,), len(layer.groups), dtype=torch.long)
    places[list(layer.groups)] = torch.arange(len(layer.groups))
    return places[groups.labels]


def _read(
    mu: RelevanceMeasure, graph: FlowGraph, labels: Sequence[Tensor], passes: FlowPasses, lowest: str, sample: int
) -> tuple[dict[str, NDArray[np.float64]], Pairs]:
    """Reads the heat maps of the nodes and the joint relevance of nodes in non-adjacent layers from the passes."""
    sign, image = float(mu.sign[sample]), mu._tap(lowest)
    nodes = [_nodes(layer, own) for layer, own in zip(graph.layers, labels, strict=True)]
    maps: dict[str, NDArray[np.float64]] = {}
    pairs: Pairs = {}
    for number, layer in enumerate(graph.layers):
        if len(image.shape) > 2:
            joints = passes.heat_maps(number, image)
            maps |= (
                {node.key: sign * _conditional(node, joints[sample, row]) for row, node in nodes[number]}
                if joints is not None
                else {}
            )
        for lower in range(number + 2, len(graph.layers)):
            joint = sign * passes.joints[number, lower][sample].double().cpu().numpy()
            pairs |= _pairs(layer, nodes[number], graph.layers[lower], nodes[lower], joint)
    return maps, pairs


def _nodes(layer: FlowLayer, labels: Tensor) -> list[tuple[int, FlowNode]]:
    """Returns the groups and the rest of a layer with their row indices, omitting nodes without neurons."""
    sizes = torch.bincount(labels.flatten(), minlength=len(layer.groups) + 1)
    return [(row, node) for row, node in enumerate(layer.nodes[:-1]) if sizes[row]]


def _pairs(
    upper: FlowLayer,
    above: Sequence[tuple[int, FlowNode]],
    lower: FlowLayer,
    below: Sequence[tuple[int, FlowNode]],
    joint: NDArray[np.float64],
) -> Pairs:
    """Returns the joint relevance of the nodes of two layers.

    Walks that cross only one of the two layers belong to the ``off`` node of the other layer.
    """
    values = joint[np.ix_([row for row, _ in above], [row for row, _ in below])]
    leaving = np.array([node.mass for _, node in above]) - values.sum(1)
    joining = np.array([node.mass for _, node in below]) - values.sum(0)
    off = upper.nodes[-1], lower.nodes[-1]
    full = np.block([[values, leaving[:, None]], [joining[None, :], off[1].mass - leaving.sum()]])
    keys = [[*(node.key for _, node in side), last.key] for side, last in zip((above, below), off, strict=True)]
    return {(one, other): float(full[a, b]) for a, one in enumerate(keys[0]) for b, other in enumerate(keys[1])}


def _conditional(node: FlowNode, joint: Tensor) -> NDArray[np.float64]:
    """Returns the heat map of a node, its joint relevance with each position divided by its absolute mass.

    The heat map is zero if the mass is zero.
    """
    return _heat_map(joint / abs(node.mass) if node.mass else 0 * joint)


def _heat_map(flat: Tensor) -> NDArray[np.float64]:
    """Converts values at positions to a heat map of shape ``(H, W)``, summing over the slices of a volume."""
    while flat.ndim > 2:
        flat = flat.sum(0)
    flat = flat if flat.ndim == 2 else flat.unsqueeze(0)
    heat_map: NDArray[np.float64] = flat.double().cpu().numpy()
    return heat_map


__all__ = ["MappedFlow", "NodeMaps", "Pairs", "flow_maps", "flow_maps_and_pairs", "mapped_flow"]
