"""Notes on groups of channels: the image parts that contribute most to a group and its number of channels."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ..measure.flow_graph import FlowGraph, FlowNode
from .flow_columns import node_name, region_name
from .flow_finding import sign_of
from .ribbons import percent

Counts = Mapping[str, int]
"""Number of channels of each group, keyed by node."""
Pairs = Mapping[tuple[str, str], float]
"""Joint relevance of nodes in any two layers, keyed by the upper and the lower node."""
GROUP = re.compile(r"[A-Z]\d+")
"""Pattern for the names that the command gives to groups of channels and to input patches."""
NOTES = "Below a group: the part of the image with the largest share of it, and this share, if it is unusually large."
"""Sentence of the legend about the notes."""
HIGH = ", high: "
HIGHS = "“High” is a part with a clearly larger share of the group than of all relevance."
"""Prefix of the second image part in a note and the sentence about it in the legend."""
LEAST_SHARE, LEAST_RATIO, LEAST_MASS = 0.15, 1.25, 0.01
"""Criteria for an image part to stand out in a group: smallest fraction of the group's relevance, smallest ratio to the
part's fraction of all relevance, and smallest absolute mass of the group.
"""


def is_group(label: str, layer: str) -> bool:
    """Returns True if a node is a group of channels named by the command."""
    return layer not in ("input", "output") and GROUP.fullmatch(label) is not None


def counted(node: FlowNode, counts: Counts, unit: str = "channels") -> FlowNode:
    """Appends the number of channels to the label of a node, if known, such as "A1 · 41 channels"."""
    if node.key not in counts:
        return node
    count = counts[node.key]
    return replace(node, label=f"{node.label} · {count}\u00a0{'channel' if (count, unit) == (1, 'channels') else unit}")


def standing_out(graph: FlowGraph, pairs: Pairs) -> dict[str, tuple[str, ...]]:
    r"""Names the image parts with an unusually large fraction of the relevance of each group of channels.

    A part ``B`` of the image stands out in a group ``A`` if its fraction :math:`\mu(B \mid A)` of the group's relevance
    clearly exceeds its fraction :math:`\mu(B)` of all relevance. A note names the part with the largest fraction and,
    if this is a different part, the one that stands out most: "most: part 1 31%, high: part 3 25%". All parts with
    relevance of the sign of the total are considered.

    Args:
        graph: A flow whose lowest layer is the input.
        pairs: Joint relevance of nodes in non-adjacent layers.

    Returns:
        Alternative notes for each node, from longest to shortest, keyed by node.
    """
    if len(graph.layers) < 3 or graph.layers[-1].name != "input":
        return {}
    sign = sign_of(graph)
    joint = {(edge.upper.key, edge.lower.key): edge.mass for edge in graph.edges} | dict(pairs)
    parts = [node for node in graph.layers[-1].nodes if node.kind == "group" and sign * node.mass > 0]
    notes: dict[str, tuple[str, ...]] = {}
    for node in (node for layer in graph.layers for node in layer.nodes if is_group(node.label, layer.name)):
        if abs(node.mass) < LEAST_MASS:
            continue
        shares = {part: joint.get((node.key, part.key), 0.0) / node.mass for part in parts}
        high = max(parts, key=lambda part: shares[part] - sign * part.mass, default=None)
        if high is None or not max(LEAST_SHARE, LEAST_RATIO * sign * high.mass) <= shares[high] <= 1:
            continue
        most = max(parts, key=shares.__getitem__)
        said, other = f"{node_name(most)} {percent(shares[most])}", f"{HIGH}{node_name(high)}"
        shorter = [f"{name}: {percent(shares[most])}" for name in (node_name(most), region_name(most))]
        longer = f"most: {said}{other} {percent(shares[high])}"
        if shares[most] <= 1:
            notes[node.key] = (*(() if most is high else (longer,)), f"most: {said}", *shorter)
    return notes


__all__ = ["GROUP", "HIGH", "HIGHS", "NOTES", "Counts", "Pairs", "counted", "is_group", "standing_out"]
