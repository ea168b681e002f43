"""Notes below groups of channels: the part of the image that stands out in each."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ..measure.flow_graph import FlowGraph
from .flow_columns import node_name
from .ribbons import percent

Pairs = Mapping[tuple[str, str], float]
"""Joint relevance of two nodes in any two layers, by their keys, with the upper node first."""
GROUP = re.compile(r"[A-Z]\d+")
"""A name that the command gives to a group of channels; patches of the input have such names as well."""
LEAST_SHARE, LEAST_RATIO, LEAST_MASS = 0.15, 1.25, 0.01
"""A part stands out if it has at least this share of the relevance of the group, which is at least so many times its
share of all relevance, in groups with at least this absolute mass."""


def is_group(label: str, layer: str) -> bool:
    """Returns whether a node is a group of channels to which the command has given a short name."""
    return layer not in ("input", "output") and GROUP.fullmatch(label) is not None


def standing_out(graph: FlowGraph, pairs: Pairs) -> dict[str, str]:
    r"""Returns, for each group of channels in which one stands out, the part of the image, such as "part 1: 40%".

    It is the part ``B`` whose share :math:`\mu(B \mid A)` of the relevance of the group ``A`` exceeds its share
    :math:`\mu(B)` of all relevance most.

    Args:
        graph: A flow whose lowest layer is the input.
        pairs: Joint relevance of nodes in layers that are not neighbours.

    Returns:
        The notes, by the key of the node.
    """
    if len(graph.layers) < 3 or graph.layers[-1].name != "input":
        return {}
    joint = {(edge.upper.key, edge.lower.key): edge.mass for edge in graph.edges} | dict(pairs)
    parts = [node for node in graph.layers[-1].nodes if node.kind == "group" and node.mass > 0]
    notes = {}
    for node in (node for layer in graph.layers for node in layer.nodes if is_group(node.label, layer.name)):
        if abs(node.mass) < LEAST_MASS:
            continue
        shares = {part: joint.get((node.key, part.key), 0.0) / node.mass for part in parts}
        most = max(parts, key=lambda part: shares[part] - part.mass, default=None)
        if most is not None and max(LEAST_SHARE, LEAST_RATIO * most.mass) <= shares[most] <= 1:
            notes[node.key] = f"{node_name(most)}: {percent(shares[most])}"
    return notes


__all__ = ["Pairs", "is_group", "standing_out"]
