"""Notes on groups of channels: the image part that is over-represented in a group and its number of channels."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..measure.flow_graph import FlowEdge, FlowGraph, FlowNode
from .flow_columns import is_difference, node_name
from .flow_finding import sign_of
from .flow_text import wrapped_lines
from .ribbons import short_percent, times

Counts = Mapping[str, int]
"""Number of channels of each group, keyed by node."""
Pairs = Mapping[tuple[str, str], float]
"""Joint relevance of nodes in any two layers, keyed by the upper and the lower node."""
NO_BREAK = "\u00a0"
SPACE = re.compile(r"(?<=%) (?=from)|(?<=overall) |(?<=\w) (?=\d+,?\b)| (?=×)|(?<=×) ")
"""Pattern for the spaces of a note at which it is not broken: in "45% from", "part 3", "overall 20%", "2.0 × area"."""
GROUP = re.compile(r"[A-Z]\d+")
"""Pattern for the names that the command gives to groups of channels and to input patches."""
NOTES = (
    "Below a group: the part of the image that is most over-represented in it, by a factor of at least 1.25, with its "
    "share of the group, which need not be the largest."
)
"""Sentence of the legend about the notes."""
OVERALL = "“Overall” is its share of all relevance."
"""Sentence of the legend about the notes that state the share of all relevance."""
BOTH_SIGNS = "“+6% −4%” below a node: its totals of both signs, where most of its relevance cancels."
"""Sentence of the legend about the notes that state the totals of both signs."""
DENSITIES = "Below a part: its share of all relevance as a multiple of its share of the area."
"""Sentence of the legend about the notes of parts."""
SHAPES = ((0, 1), (0, 2), (1, 1), (1, 2), (0, 3), (1, 3))
"""Version of a note and number of its lines, from most to least preferred."""
LEAST_SHARE, LEAST_RATIO, LEAST_MASS, LEAST_NET = 0.1, 1.25, 0.01, 1 / 3
"""Criteria for a note: smallest fraction of the group's relevance in the part, smallest ratio to the part's fraction of
all relevance, smallest absolute mass of the group and of the part, and smallest fraction of the group's absolute
relevance that does not cancel.
"""
LEAST_UNCANCELLED = 1 / 2
"""Fraction of the absolute relevance of a node below which its totals of both signs are noted."""


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
    r"""Names the image part that is most over-represented in each group of channels.

    An example is "45% from part 3, overall 20%".

    The fraction :math:`\mu(B \mid A)` of the group's relevance in a part ``B`` of the image is compared with the
    fraction :math:`\mu(B)` of all relevance in it. A group has no note if no part has 1.25 times its fraction of all
    relevance and at least a tenth of the group's relevance, or if most of the relevance of the group cancels. All parts
    with relevance of the sign of the total are considered.

    Args:
        graph: A flow whose lowest layer is the input.
        pairs: Joint relevance of nodes in non-adjacent layers.

    Returns:
        Alternative notes for each node, from longest to shortest, keyed by node.
    """
    if len(graph.layers) < 3 or graph.layers[-1].name != "input":
        return {}
    sign = sign_of(graph)
    edges = graph.edges
    joint = {(edge.upper.key, edge.lower.key): edge.mass for edge in edges} | dict(pairs)
    parts = [node for node in graph.layers[-1].nodes if node.kind == "group" and sign * node.mass >= LEAST_MASS]
    notes: dict[str, tuple[str, ...]] = {}
    for node in (node for layer in graph.layers for node in layer.nodes if is_group(node.label, node.layer)):
        if abs(node.mass) < max(LEAST_MASS, LEAST_NET * _gross(edges, node)):
            continue
        shares = {part: joint.get((node.key, part.key), 0.0) / node.mass for part in parts}
        large = [part for part in parts if LEAST_SHARE <= shares[part] <= 1]
        part = max(large, key=lambda part: shares[part] / (sign * part.mass), default=None)
        if part is not None and shares[part] >= LEAST_RATIO * sign * part.mass:
            name = f"patch {part.label}" if GROUP.fullmatch(part.label) else node_name(part)
            said = f"{short_percent(shares[part])} from {name}"
            notes[node.key] = (f"{said}, overall {short_percent(sign * part.mass)}", said)
    return notes


def lines_of_notes(keys: Sequence[str], notes: Mapping[str, Sequence[str]], room: float, size: float) -> list[str]:
    """Breaks the notes of a column into lines, all in the same version, and with the same number of lines if possible.

    Args:
        keys: The nodes of the column.
        notes: Versions of the note of each node, from longest to shortest.
        room: Width of a line in points.
        size: Smallest font size.

    Returns:
        The lines of each note, separated by newlines, or empty strings if no version fits.
    """
    noted = [[_unbroken(text) for text in notes.get(key, ())] for key in keys]
    for version, count in SHAPES:
        chosen = [texts[min(version, len(texts) - 1)] if texts else "" for texts in noted]
        broken = [wrapped_lines(text, room, size) for text in chosen]
        if all(len(lines) <= count and " ".join(lines) == text for lines, text in zip(broken, chosen, strict=True)):
            return ["\n".join(lines).replace(NO_BREAK, " ") for lines in broken]
    return [""] * len(keys)


def _unbroken(text: str) -> str:
    """Replaces the spaces of a note at which it must not be broken."""
    return SPACE.sub(NO_BREAK, text)


def densities(graph: FlowGraph, areas: Mapping[str, float]) -> dict[str, tuple[str, ...]]:
    """Returns the ratio between each image part's share of the relevance and of the area, such as ``2.0 × area``.

    Args:
        graph: A flow.
        areas: Fraction of the image that each input node covers, keyed by node.

    Returns:
        A note for each part with relevance of the sign of the total, keyed by node.
    """
    sign = sign_of(graph)
    parts = [] if is_difference(graph) else [node for node in graph.nodes if areas.get(node.key, 0.0) > 0]
    ratios = {node.key: times(sign * node.mass / areas[node.key]) for node in parts if sign * node.mass > 0}
    return {key: (f"{ratio.removeprefix('×')} × area", ratio) for key, ratio in ratios.items()}


def both_signs(graph: FlowGraph) -> dict[str, tuple[str, ...]]:
    """Returns the totals of both signs of each group in which most relevance cancels, such as "+41% −34%".

    They are those of the ribbons on the side of the node where more relevance cancels.

    Args:
        graph: A flow. Differences between flows have no notes.
    """
    notes: dict[str, tuple[str, ...]] = {}
    edges = [] if is_difference(graph) else graph.edges
    for node in (node for node in graph.nodes if node.kind == "group"):
        gross = _gross(edges, node)
        totals = (gross + node.mass) / 2, (gross - node.mass) / 2
        if abs(node.mass) < LEAST_UNCANCELLED * gross and min(totals) >= LEAST_MASS:
            notes[node.key] = (f"+{short_percent(totals[0])}{NO_BREAK}−{short_percent(totals[1])}",)
    return notes


def _gross(edges: Sequence[FlowEdge], node: FlowNode) -> float:
    """Returns the total absolute relevance of the ribbons on the side of a node where more of it cancels."""
    above = [edge.mass for edge in edges if edge.lower.key == node.key]
    below = [edge.mass for edge in edges if edge.upper.key == node.key]
    return max(sum(map(abs, above)), sum(map(abs, below)))


__all__ = [
    "BOTH_SIGNS",
    "DENSITIES",
    "GROUP",
    "NOTES",
    "OVERALL",
    "Counts",
    "Pairs",
    "both_signs",
    "counted",
    "densities",
    "is_group",
    "lines_of_notes",
    "standing_out",
]
