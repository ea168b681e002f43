"""The conditional heat map of each group of a flow graph."""

from __future__ import annotations

from collections.abc import Mapping
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
"""Heat maps, ``(H, W)``, by the key of a node."""


def flow_maps(
    mu: RelevanceMeasure, graph: FlowGraph, over: Any = "channel", sample: int = 0, lowest: str = "input"
) -> dict[str, NDArray[np.float64]]:
    r"""Returns the conditional heat maps of the nodes of a flow graph, :math:`\mu(\text{pixel} \mid \text{node})`.

    Heat maps are summed over colours and over the slices of a volume; a signal is an image of one row. The heat map of
    a group of the input is the relevance of its own pixels. Inputs without positions have no heat maps, nor do the
    walks that do not cross a layer.

    Args:
        mu: The measure of the graph.
        graph: The graph; its layers are names of taps.
        over: The groups, as passed for the graph.
        sample: The sample, as passed for the graph.
        lowest: The tap of the heat maps.

    Returns:
        The heat maps, ``(H, W)``, by the key of the node. Each sums to the share of the group's walks that reach the
        input. If the measure explains a difference of outputs, each map has the sign of its node, so that positive
        values are evidence for the target.

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
    r"""Returns the heat maps of :func:`flow_maps`, and the joint relevance of nodes in layers that are not neighbours.

    Both come from the same passes, one for each layer, with one vector for each node.

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
    sign = float(mu.sign[sample])
    members = [_members(mu, layer, over) for layer in graph.layers]
    has_maps = len(mu._tap(lowest).shape) > 2
    maps: dict[str, NDArray[np.float64]] = {}
    pairs: dict[tuple[str, str], float] = {}
    for number, (layer, nodes) in enumerate(zip(graph.layers, members, strict=True)):
        below = graph.layers[number + 2 :]
        if layer.name == lowest:
            own = mu.marginal(lowest)[sample]
            joints = {lowest: torch.stack([own * mask.to(own.device) for _, mask in nodes])} if nodes else {}
        else:
            names = list(dict.fromkeys([*(one.name for one in below), *([lowest] if has_maps else [])]))
            events = [at(layer.name)[mask] for _, mask in nodes]
            joints = (
                {key: value[:, sample] for key, value in mu.marginal(names, joint=events).items()}
                if events and names
                else {}
            )
        for place, (node, _) in enumerate(nodes):
            if has_maps and joints:
                maps[node.key] = _conditional_map(mu, node, sign * joints[lowest][place], lowest)
            for lower, others in zip(below, members[number + 2 :], strict=True):
                values = sign * joints[lower.name][place].double().cpu()
                pairs |= {(node.key, other.key): float(values[mask].sum()) for other, mask in others}
    return maps, pairs


def _members(mu: RelevanceMeasure, layer: FlowLayer, over: Any) -> list[tuple[FlowNode, Tensor]]:
    """Returns the groups of a layer, and its rest if it has neurons, each with the mask of its neurons."""
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
