"""Ribbons of a flow: their positions, widths and colors."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from ..measure.flow_graph import FlowGraph, FlowNode
from .arrays import Array
from .flow_columns import tone_of
from .flow_parts import BAR, Band, DrawnNode

HAIRLINE = 0.3
"""Smallest width of a drawn ribbon, in points."""
DARKER, PALER = 0.66, 0.26
"""Opacity of the largest ribbons between groups, which hold half of the relevance together, and of all others."""
FAINT = 0.14
"""Opacity of ribbons between two rests, or between two nodes for walks off a layer."""


def flow_bands(
    graph: FlowGraph, columns: Sequence[Sequence[tuple[int, FlowNode]]], nodes: Sequence[DrawnNode], unit: float
) -> tuple[list[Band], float]:
    """Returns the ribbons and the total relevance of omitted ribbons."""
    places = {node.node.key: node for node in nodes}
    bands: list[Band] = []
    omitted = 0.0
    layers = graph.layers[::-1]
    for number, joint in enumerate(joint.T for joint in graph.joints[::-1]):
        left, right = columns[number], columns[number + 1]
        values = joint[np.ix_([row for row, _ in left], [row for row, _ in right])]
        starts, ends = _tops(values, unit), _tops(values.T, unit).T
        omitted += float(np.abs(joint).sum() - np.abs(values).sum())
        darker = _half(joint[:-2, :-2])
        for (a, (_, lower)), (b, (_, upper)) in ((a, b) for a in enumerate(left) for b in enumerate(right)):
            value, width = float(values[a, b]), abs(float(values[a, b])) * unit
            if width < HAIRLINE:
                omitted += abs(value)
                continue
            one, other = places[lower.key], places[upper.key]
            start = (one.box.right, _middle(one, 1) + starts[a, b] + width / 2)
            end = (other.box.x, _middle(other, 0) + ends[a, b] + width / 2)
            kinds = {lower.kind, upper.kind}
            kind = lower if lower.kind == "off" else upper if upper.kind == "off" else None
            tone = tone_of(kind, layers[number + (kind is upper)], value) if kind else _tone(kinds, value)
            if kind or "rest" in kinds:
                strength = FAINT if len(kinds) == 1 else PALER
            else:
                strength = DARKER if abs(value) >= darker else PALER
            bands.append(Band(lower.key, upper.key, value, start, end, width, tone, strength))
    return bands, omitted


def _half(values: Array) -> float:
    """Returns the smallest absolute value among the fewest ribbons that hold half of the relevance between groups."""
    sizes = np.sort(np.abs(values), axis=None)[::-1]
    enough = np.cumsum(sizes) >= 0.5 * sizes.sum()
    return float(sizes[int(enough.argmax())]) if sizes.sum() > 0 else 0.0


def _tone(kinds: Collection[str], value: float) -> str:
    return "negative" if value < 0 else "rest" if "rest" in kinds else "positive"


def _tops(values: Array, unit: float) -> Array:
    """Returns the upper ends of the ribbons at the nodes of one column, relative to the center of the node.

    The ribbons of a node are in the order of their other ends, with positive ribbons above negative ones.
    """
    positive, negative = values.clip(min=0), -values.clip(max=0)
    before = np.cumsum(positive, 1) - positive
    after = positive.sum(1, keepdims=True) + np.cumsum(negative, 1) - negative
    half = np.abs(values).sum(1, keepdims=True) / 2
    tops: Array = unit * (np.where(values >= 0, before, after) - half)
    return tops


def _middle(node: DrawnNode, side: int) -> float:
    """Returns the vertical center of the bar on one side of a node."""
    x = node.box.right - BAR if side else node.box.x
    parts = [box for box, _ in node.bars if abs(box.x - x) < 1e-6]
    if not parts:
        return node.box.y
    return (min(box.y for box in parts) + max(box.bottom for box in parts)) / 2


__all__ = ["DARKER", "FAINT", "HAIRLINE", "PALER", "flow_bands"]
