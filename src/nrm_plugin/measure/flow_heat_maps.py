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
from .measure import RelevanceMeasure
from .partitions import partition

NodeMaps = Mapping[str, NDArray[np.float64]]
"""Heat maps, ``(H, W)``, by the key of a node."""
SIDE = 96
"""Largest side of a thumbnail in pixels."""


def flow_maps(
    mu: RelevanceMeasure, graph: FlowGraph, over: Any = "channel", sample: int = 0, lowest: str = "input"
) -> dict[str, NDArray[np.float64]]:
    r"""Returns the conditional heat maps of the groups of a flow graph, :math:`\mu(\text{pixel} \mid \text{group})`.

    Heat maps are summed over colours and over the slices of a volume; a signal is an image of one row. Inputs without
    positions and the groups of the input itself have no heat maps.

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
    tap = mu._tap(lowest)
    if len(tap.shape) < 3:
        return {}
    keys, events, signs = [], [], []
    for layer in graph.layers:
        if layer.name == lowest or not layer.groups:
            continue
        kind = over.get(layer.name, "channel") if isinstance(over, Mapping) else over
        labels = partition(mu._tap(layer.name), kind, None).labels
        for node in layer.nodes:
            if node.kind == "group":
                keys.append(node.key)
                events.append(at(layer.name)[labels == node.group])
                signs.append(-1 if mu.explains_difference and node.mass < 0 else 1)
    if not events:
        return {}
    conditionals = mu.marginal(lowest, given=events, min_ratio=0)[:, sample]
    channel = tap.channel_dim % len(tap.shape) - 1
    rows = zip(keys, conditionals, signs, strict=True)
    return {key: _heat_map(sign * values, channel) for key, values, sign in rows}


def _heat_map(values: Tensor, channel: int) -> NDArray[np.float64]:
    """Sums values ``(C, *positions)`` to a heat map ``(H, W)``."""
    flat = values.sum(channel)
    while flat.ndim > 2:
        flat = flat.sum(0)
    flat = flat if flat.ndim == 2 else flat.unsqueeze(0)
    heat_map: NDArray[np.float64] = flat.double().cpu().numpy()
    return heat_map


def thumbnail(values: NDArray[np.float64], side: int = SIDE) -> NDArray[np.float64]:
    """Reduces a heat map to at most ``side`` pixels along each side by summing blocks of pixels."""
    size = [min(length, side) for length in values.shape]
    labels = [torch.arange(length) * small // length for length, small in zip(values.shape, size, strict=True)]
    sums = np.zeros(size)
    np.add.at(sums, np.ix_(labels[0].numpy(), labels[1].numpy()), values)
    return sums


__all__ = ["NodeMaps", "flow_maps", "thumbnail"]
