"""Flow drawings: relevance that layers share, as ribbons between bars. Nothing but the scale is computed in here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve

POSITIVE, NEGATIVE = "#b2182b", "#2166ac"
INK, PALE = "#222222", "#6b6b6b"

ROW, GAP = 0.085, 0.025
"""Height that the label of a node needs, and what is left free between two nodes, as shares of the drawing."""
VISIBLE = 0.012
"""Height of a ribbon whose width can be told from that of others, as a share of the drawing."""
BAR = 0.022
"""Half the width of a bar, in distances between two columns."""


@dataclass(frozen=True)
class Column:
    """One layer of a flow drawing.

    Attributes:
        name: Heading.
        note: Second, smaller line of the heading.
        labels: One for each node, from top to bottom.
        marginals: Relevance of each node; the height of its bar.
    """

    name: str
    note: str
    labels: Sequence[str]
    marginals: Sequence[float]


@dataclass(frozen=True)
class Ribbon:
    """Joint relevance of one node in each column of a flow drawing.

    Attributes:
        nodes: Position of the node in each column.
        value: Joint relevance; the width of the ribbon.
        mark: Drawn strongly under this short name; pale without.
    """

    nodes: tuple[int, ...]
    value: float
    mark: str = ""


def percent(value: float) -> str:
    """A share of all relevance with two significant digits: 0.0468 is ``4.7%``."""
    points = 100 * value
    if points == 0:
        return "0%"
    decimals = max(0, 1 - math.floor(math.log10(abs(points))))
    text = f"{points:.{decimals}f}%" if decimals <= 5 else f"{points:.1e}%"
    return text.replace("-", "−")


def draw_flow(axes: Axes, columns: Sequence[Column], ribbons: Sequence[Ribbon]) -> None:
    """Bars as high as the relevance of a node, ribbons as wide as the joint relevance, both on one scale.

    Args:
        axes: Where to draw.
        columns: The layers, from left to right.
        ribbons: Joint relevance of one node in each column.
    """
    axes.set_xlim(-0.33, len(columns) - 0.67)
    axes.set_ylim(-0.07, 1.13)
    axes.set_axis_off()
    extents = [_extents(number, column, ribbons) for number, column in enumerate(columns)]
    unit = min(_unit(extent) for extent in extents)
    centers = [_centers(extent, unit) for extent in extents]
    factor = _factor(extents, ribbons, unit)
    lanes = _lanes(centers, ribbons, unit * factor)
    drawn = list(zip(ribbons, lanes, strict=True))
    for ribbon, lane in sorted(drawn, key=lambda one: (bool(one[0].mark), -abs(one[0].value))):
        _draw_ribbon(axes, lane, abs(ribbon.value) * unit * factor, ribbon)
    for number, column in enumerate(columns):
        _draw_column(axes, number, column, centers[number], unit)
    _draw_marks(axes, [(ribbon, lane) for ribbon, lane in drawn if ribbon.mark])
    _draw_key(axes, columns, ribbons, factor)


# -- places ---------------------------------------------------------------------------------------------------------


def _extents(number: int, column: Column, ribbons: Sequence[Ribbon]) -> list[float]:
    """What each node of a column needs: its bar, or its ribbons where they cancel to less."""
    needs = [abs(value) for value in column.marginals]
    for node in range(len(needs)):
        needs[node] = max(needs[node], sum(abs(one.value) for one in ribbons if one.nodes[number] == node))
    return needs


def _unit(extents: Sequence[float]) -> float:
    """Height of a relevance of one at which a column, with room for its labels, is exactly one high."""
    low, high = 0.0, 1.0 / max(sum(extents), 1e-12)
    for _ in range(50):
        middle = (low + high) / 2
        filled = sum(max(ROW, extent * middle) + GAP for extent in extents)
        low, high = (middle, high) if filled <= 1 else (low, middle)
    # More labels than fit into the height: they overlap, but the bars are still drawn.
    return low or 0.5 / max(sum(extents), 1e-12)


def _centers(extents: Sequence[float], unit: float) -> list[float]:
    """Heights of the middles of the nodes, from the top, free space shared evenly."""
    rows = [max(ROW, extent * unit) for extent in extents]
    space = (1 - sum(rows)) / max(len(rows), 1)
    ends = np.cumsum([row + space for row in rows])
    return [float(1 - end + (row + space) / 2) for end, row in zip(ends, rows, strict=True)]


def _factor(extents: Sequence[Sequence[float]], ribbons: Sequence[Ribbon], unit: float) -> int:
    """1, or where all ribbons would be hairlines a round number that widens them as far as their nodes have room."""
    widest = max((abs(one.value) for one in ribbons), default=0) * unit
    if widest == 0 or widest >= VISIBLE:
        return 1
    room = math.inf
    for number, extent in enumerate(extents):
        for node, height in enumerate(extent):
            stack = sum(abs(one.value) for one in ribbons if one.nodes[number] == node)
            if stack > 0:
                room = min(room, max(height, 0.8 * ROW / unit) / stack)
    power = 10 ** math.floor(math.log10(max(room, 1)))
    return int(max(step * power for step in (1, 2, 5) if step * power <= max(room, 1)))


def _lanes(centers: Sequence[Sequence[float]], ribbons: Sequence[Ribbon], unit: float) -> list[list[float]]:
    """Heights at which each ribbon crosses the columns: stacked at every node in the order of where they lead."""
    lanes = [[0.0] * len(centers) for _ in ribbons]
    for number, heights in enumerate(centers):
        for node, center in enumerate(heights):
            here = [(lane, one) for lane, one in zip(lanes, ribbons, strict=True) if one.nodes[number] == node]
            here.sort(key=lambda pair: -sum(centers[at][to] for at, to in enumerate(pair[1].nodes) if at != number))
            top = center + sum(abs(one.value) for _, one in here) * unit / 2
            for lane, one in here:
                lane[number] = top - abs(one.value) * unit / 2
                top -= abs(one.value) * unit
    return lanes


def _height(lane: Sequence[float], x: float) -> float:
    """Height of a ribbon at ``x``; its curve is the cubic of :func:`_draw_ribbon`, solved for its parameter."""
    left = min(int(x), len(lane) - 2)
    steps = np.linspace(0, 1, 64)
    across = 1.5 * steps * (1 - steps) + steps**3
    step = float(np.interp(x - left, across, steps))
    share = step**2 * (3 - 2 * step)
    return lane[left] * (1 - share) + lane[left + 1] * share


# -- strokes --------------------------------------------------------------------------------------------------------


def _color(value: float) -> str:
    return POSITIVE if value >= 0 else NEGATIVE


def _draw_ribbon(axes: Axes, lane: Sequence[float], width: float, ribbon: Ribbon) -> None:
    half = max(width, 0.0015) / 2
    for left, (start, end) in enumerate(pairwise(lane)):
        x = (left, left + 0.5, left + 0.5, left + 1)
        over = [(at, y + half) for at, y in zip(x, (start, start, end, end), strict=True)]
        under = [(at, y - half) for at, y in zip(x, (start, start, end, end), strict=True)][::-1]
        curve = Curve([*over, *under, over[0]], [1, 4, 4, 4, 2, 4, 4, 4, 79])
        strength = 0.72 if ribbon.mark else 0.13
        layer = 2 + bool(ribbon.mark)
        axes.add_patch(PathPatch(curve, facecolor=_color(ribbon.value), edgecolor="none", alpha=strength, zorder=layer))


def _draw_column(axes: Axes, number: int, column: Column, centers: Sequence[float], unit: float) -> None:
    axes.text(number, 1.13, column.name, ha="center", va="top", fontsize=10.5, weight="bold", color=INK)
    axes.text(number, 1.075, column.note, ha="center", va="top", fontsize=8, color=PALE)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    x, align = (number - 0.05, "right") if number == 0 else (number + 0.05, "left")
    for label, value, center in zip(column.labels, column.marginals, centers, strict=True):
        height = max(abs(value) * unit, 0.004)
        axes.add_patch(Rectangle((number - BAR, center - height / 2), 2 * BAR, height, color=_color(value), zorder=5))
        for text, rise, size, color in ((label, 0.018, 9.5, INK), (percent(value), -0.021, 7.5, PALE)):
            axes.text(
                x, center + rise, text, ha=align, va="center", fontsize=size, color=color, zorder=6, path_effects=halo
            )


def _draw_marks(axes: Axes, marked: Sequence[tuple[Ribbon, list[float]]]) -> None:
    """Each mark where its ribbon is farthest from the other marked ribbons and marks."""
    placed: list[tuple[float, float]] = []
    # Labels of the columns between the first and the last stand at the right of their bars.
    places = [left + x for left in range(len(marked[0][1]) - 1 if marked else 0) for x in np.linspace(0.27, 0.85, 25)]
    for ribbon, lane in marked:
        best = (-1.0, 0.0, 0.0)
        for x in places:
            y = _height(lane, x)
            others = [abs(y - _height(other, x)) for _, other in marked if other is not lane]
            marks = [math.hypot(0.35 * (x - a), y - b) for a, b in placed]
            best = max(best, (min([*others, *marks, 0.06]) - 0.004 * abs(x - 0.5), float(x), y))
        placed.append(best[1:])
        axes.text(
            best[1], best[2], ribbon.mark, ha="center", va="center", fontsize=8, weight="bold",
            color=_color(ribbon.value), zorder=8,
            bbox={"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": _color(ribbon.value)},
        )  # fmt: skip


def _draw_key(axes: Axes, columns: Sequence[Column], ribbons: Sequence[Ribbon], factor: int) -> None:
    """What heights and colours mean; colours only where both can be seen."""
    values = [*(value for column in columns for value in column.marginals), *(one.value for one in ribbons)]
    both = min(max(values, default=0), -min(values, default=0)) > 0.02 * max(map(abs, values), default=0)
    text = f"height: relevance{f', ribbons {factor} times wider' if factor > 1 else ''}"
    signs = "; red positive, blue negative" if both else ""
    axes.text((len(columns) - 1) / 2, -0.05, text + signs, ha="center", va="center", fontsize=8, color=PALE)
