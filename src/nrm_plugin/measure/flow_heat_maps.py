"""The conditional heat map of each group of a flow graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..events.event import at
from .flow_graph import FlowGraph
from .flow_nodes import FlowLayer, FlowNode
from .measure import RelevanceMeasure
from .partitions import partition

NodeMaps = Mapping[str, NDArray[np.float64]]
"""Heat maps, ``(H, W)``, by node key."""
Member = tuple[FlowNode, Tensor]
"""A node and the mask of its neurons."""


def flow_maps(
    mu: RelevanceMeasure, graph: FlowGraph, over: Any = "channel", sample: int = 0, lowest: str = "input"
) -> dict[str, NDArray[np.float64]]:
    r"""Returns the conditional heat maps of the nodes of a flow graph, :math:`\mu(\text{pixel} \mid \text{node})`.

    Heat maps are summed over colour channels and, for volumes, over slices; a one-dimensional signal is treated as an
    image with one row. The heat map of a group of input pixels is the relevance of these pixels. There are no heat maps
    for inputs without positions, and none for the walks that do not cross a layer.

    Args:
        mu: The measure of the graph.
        graph: The graph; its layers are names of taps.
        over: The groups, as passed for the graph.
        sample: The sample, as passed for the graph.
        lowest: The tap of the heat maps.

    Returns:
        The heat maps, ``(H, W)``, by node key. Each one sums to the share of the group's walks that reach the input. If
        the measure explains a difference of outputs, each map has the sign of its node, so that positive values are
        evidence for the target.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(1, 1, 4, 4), 1)
        >>> maps = flow_maps(mu, mu.flow(["1", "input"]))
        >>> sorted({shape.shape for shape in maps.values()})
        [(4, 4)]
    """
    return flow_maps_and_pairs(mu, graph, over, sample, lowest)[0]


def flow_maps_and_pairs(
    mu: RelevanceMeasure, graph: FlowGraph, over: Any = "channel", sample: int = 0, lowest: str = "input"
) -> tuple[dict[str, NDArray[np.float64]], dict[tuple[str, str], float]]:
    r"""Returns the heat maps of :func:`flow_maps`, and the joint relevance of nodes in non-adjacent layers.

    Both come from the same passes: one pass per layer, with one vector per node.

    Args:
        mu: As in :func:`flow_maps`.
        graph: As in :func:`flow_maps`.
        over: As in :func:`flow_maps`.
        sample: As in :func:`flow_maps`.
        lowest: As in :func:`flow_maps`.

    Returns:
        The heat maps, and :math:`\mu(A \cap B)` by the keys of the nodes of A and B, the upper one first.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1)
        >>> maps, pairs = flow_maps_and_pairs(mu, mu.flow(["output", "1", "input"], top=None))
        >>> ("output/1", "input/0") in pairs
        True
    """
    members = [_members(mu, layer, over) for layer in graph.layers]
    maps: dict[str, NDArray[np.float64]] = {}
    pairs: dict[tuple[str, str], float] = {}
    for number, (layer, nodes) in enumerate(zip(graph.layers, members, strict=True)):
        below = range(number + 2, len(graph.layers))
        joints = _joints(mu, layer, nodes, [graph.layers[lower].name for lower in below], lowest, sample)
        if lowest in joints and len(mu._tap(lowest).shape) > 2:
            rows = zip(nodes, joints[lowest], strict=True)
            maps |= {node.key: _conditional_map(mu, node, joint, lowest) for (node, _), joint in rows}
        for lower in below:
            pairs |= _pairs(layer, nodes, graph.layers[lower], members[lower], joints.get(graph.layers[lower].name))
    return maps, pairs


def _joints(
    mu: RelevanceMeasure, layer: FlowLayer, nodes: Sequence[Member], below: Sequence[str], lowest: str, sample: int
) -> dict[str, Tensor]:
    """Returns the joint relevance of each node of a layer with all neurons of some lower layers, from one pass."""
    sign = mu.sign[sample]
    if not nodes:
        return {}
    if layer.name == lowest:
        own = mu.marginal(lowest)[sample]
        return {lowest: sign * torch.stack([own * mask.to(own.device) for _, mask in nodes])}
    names = list(dict.fromkeys([*below, lowest]))
    joints = mu.marginal(names, joint=[at(layer.name)[mask] for _, mask in nodes])
    return {name: sign * values[:, sample] for name, values in joints.items()}


def _pairs(
    upper: FlowLayer, nodes: Sequence[Member], lower: FlowLayer, others: Sequence[Member], joint: Tensor | None
) -> dict[tuple[str, str], float]:
    """Returns the joint relevance of the nodes of two layers.

    Walks of a node that cross no neuron of the other layer belong to its node "off".
    """
    masks = [mask for _, mask in others]
    values = np.zeros((len(nodes), len(others)))
    for row in range(len(nodes) if joint is not None else 0):
        neurons = joint[row].double().cpu() if joint is not None else torch.empty(0)
        values[row] = [float(neurons[mask].sum()) for mask in masks]
    above, below = [node for node, _ in nodes], [node for node, _ in others]
    off = {"above": upper.nodes[-1], "below": lower.nodes[-1]}
    leaving = np.array([node.mass for node in above]) - values.sum(1)
    joining = np.array([node.mass for node in below]) - values.sum(0)
    full = np.block([[values, leaving[:, None]], [joining[None, :], off["below"].mass - leaving.sum()]])
    keys = [[node.key for node in [*side, off[name]]] for side, name in ((above, "above"), (below, "below"))]
    return {(one, other): float(full[a, b]) for a, one in enumerate(keys[0]) for b, other in enumerate(keys[1])}


def _members(mu: RelevanceMeasure, layer: FlowLayer, over: Any) -> list[Member]:
    """Returns the groups of a layer, and the rest unless it is empty, each with the mask of its neurons."""
    kind = over.get(layer.name, "channel") if isinstance(over, Mapping) else over
    labels = partition(mu._tap(layer.name), kind, None).labels
    masks = [labels == group for group in layer.groups]
    masks.append(~torch.isin(labels, torch.tensor(layer.groups, dtype=labels.dtype)))
    return [(node, mask) for node, mask in zip(layer.nodes, masks, strict=False) if mask.any()]


def _conditional_map(mu: RelevanceMeasure, node: FlowNode, joint: Tensor, lowest: str) -> NDArray[np.float64]:
    """Returns the heat map of a node given its joint relevance with the input; zero if the node has no mass."""
    tap = mu._tap(lowest)
    mass = abs(node.mass) if mu.explains_difference else node.mass
    return _heat_map(joint / mass if mass else 0 * joint, tap.channel_dim % len(tap.shape) - 1)


def _heat_map(values: Tensor, channel: int) -> NDArray[np.float64]:
    """Sums values ``(C, *positions)`` to a heat map ``(H, W)``."""
    flat = values.sum(channel)
    while flat.ndim > 2:
        flat = flat.sum(0)
    flat = flat if flat.ndim == 2 else flat.unsqueeze(0)
    heat_map: NDArray[np.float64] = flat.double().cpu().numpy()
    return heat_map


__all__ = ["NodeMaps", "flow_maps", "flow_maps_and_pairs"]
