"""Flow plots on matplotlib axes, in which joint relevance between nodes is drawn as ribbons between bars."""

from __future__ import annotations

import itertools
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


@dataclass(frozen=True)
class Palette:
    """Color palette of a flow plot.

    Attributes:
        positive: Color of positive relevance, a colorblind-friendly red.
        negative: Color of negative relevance, a colorblind-friendly blue.
        ink: Color of text.
        pale: Color of less important text.
        paper: Background color.
        other: Color of the rest of a layer, outside the shown groups.
        off: Color of walks that are absorbed above a layer or bypass it.
    """

    positive: str = POSITIVE
    negative: str = NEGATIVE
    ink: str = INK
    pale: str = PALE
    paper: str = "#ffffff"
    other: str = "#8c8c8c"
    off: str = "#e69f00"

    def of(self, value: float) -> str:
        """Returns the color for a relevance value, depending on its sign."""
        return self.positive if value >= 0 else self.negative


LIGHT = Palette()
DARK = Palette("#f4806a", "#6fb3e8", "#ececec", "#a8a8a8", "#16181c", "#8c8c8c", "#f0b73f")

ROW, GAP = 0.085, 0.025
"""Height of a node label and distance between two nodes, as fractions of the plot height."""
VISIBLE = 0.012
"""Smallest width of the widest ribbon at which widths are distinguishable, as a fraction of the plot height."""
BAR = 0.022
"""Half the width of a bar, as a fraction of the distance between two columns."""


ROUNDING = 1e-13
"""Percentage below which a value is attributed to rounding errors in float64."""


@dataclass(frozen=True)
class Column:
    """Layer of a flow plot.

    Attributes:
        name: Heading of the column.
        note: Second, smaller line of the heading.
        labels: Label of each node, from top to bottom.
        marginals: Relevance of each node, drawn as the height of its bar.
        kinds: Kind of each node, which determines its color: ``""`` (default), ``"other"`` or ``"off"``.
    """

    name: str
    note: str
    labels: Sequence[str]
    marginals: Sequence[float]
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class Ribbon:
    """Joint relevance of nodes in a flow plot, with one node in each of several consecutive columns.

    Attributes:
        nodes: Index of the node in each column.
        value: Joint relevance, drawn as the width of the ribbon.
        mark: Short label that is drawn on an opaque ribbon, or empty for a transparent ribbon.
        start: Index of the first column of the ribbon.
        kind: Kind of the ribbon, as for the nodes of :class:`Column`.
        strength: Opacity of a ribbon without a mark.
    """

    nodes: tuple[int, ...]
    value: float
    mark: str = ""
    start: int = 0
    kind: str = ""
    strength: float = 0.13

    def node(self, column: int) -> int | None:
        """Returns the index of the node that the ribbon crosses in a column, or None outside its columns."""
        return self.nodes[column - self.start] if 0 <= column - self.start < len(self.nodes) else None


def percent(value: float) -> str:
    """Formats a fraction of the total relevance as a percentage with two significant digits, such as ``4.7%``.

    Rounding errors are formatted as ``0%``.
    """
    points = 100 * value
    if abs(points) < ROUNDING:
        return "0%"
    decimals = max(0, 1 - math.floor(math.log10(abs(points))))
    text = f"{points:.{decimals}f}%" if decimals <= 5 else f"{points:.1e}%"
    return text.replace("-", "−")


def short_percent(value: float) -> str:
    """Formats a fraction as :func:`percent` does, but less than 0.1% of either sign as ``<0.1%``."""
    return "<0.1%" if ROUNDING <= 100 * abs(value) < 0.1 else percent(value)


def times(ratio: float) -> str:
    """Formats a ratio with a decimal if it is below 10, such as ``×2.2``."""
    return f"×{ratio:.{0 if ratio >= 9.95 else 1}f}"


def rows_scale(columns: Sequence[Column]) -> float:
    """Returns the factor by which labels must shrink for the longest column to fit.

    Figures are scaled up by its inverse to compensate.
    """
    longest = max((len(column.labels) for column in columns), default=0)
    return min(1.0, 0.9 / max(longest * (ROW + GAP), 1e-12))


def draw_flow(
    axes: Axes,
    columns: Sequence[Column],
    ribbons: Sequence[Ribbon],
    palette: Palette = LIGHT,
    scale: float = 1.0,
) -> None:
    """Draws nodes as bars and joint relevance as ribbons, with heights and widths proportional to relevance.

    Args:
        axes: Axes on which to draw.
        columns: The layers, from left to right.
        ribbons: Joint relevance of nodes in all columns or in some consecutive columns.
        palette: Colors of the plot.
        scale: Factor for the height of text, for axes that are higher than 5 inches.
    """
    axes.set_xlim(-0.33, len(columns) - 0.67)
    axes.set_ylim(-0.07 * scale, 1 + 0.13 * scale)
    axes.set_axis_off()
    extents = [_extents(number, column, ribbons) for number, column in enumerate(columns)]
    unit = min(_unit(extent, scale) for extent in extents)
    centers = [_centers(extent, unit, scale) for extent in extents]
    factor = _factor(extents, ribbons, unit, scale)
    lanes = _lanes(centers, ribbons, unit * factor)
    drawn = list(zip(ribbons, lanes, strict=True))
    for ribbon, lane in sorted(drawn, key=lambda one: (bool(one[0].mark), -abs(one[0].value))):
        _draw_ribbon(axes, lane, abs(ribbon.value) * unit * factor, ribbon, palette)
    for number, column in enumerate(columns):
        _draw_column(axes, number, column, centers[number], unit, palette, scale)
    _draw_marks(axes, [(ribbon, lane) for ribbon, lane in drawn if ribbon.mark])
    _draw_key(axes, columns, ribbons, factor, palette, scale)


# -- layout ---------------------------------------------------------------------------------------------------------


def _extents(number: int, column: Column, ribbons: Sequence[Ribbon]) -> list[float]:
    """Returns the height of each node in a column: the height of its bar or, if larger, of its stacked ribbons.

    The stacked ribbons are higher than the bar if relevance of opposite signs cancels.
    """
    return [max(abs(value), *_stacks(number, node, ribbons)) for node, value in enumerate(column.marginals)]


def _stacks(number: int, node: int, ribbons: Sequence[Ribbon]) -> list[float]:
    """Returns the total width of the ribbons at a node, separately for each start column."""
    widths: dict[int, float] = {}
    for ribbon in ribbons:
        if ribbon.node(number) == node:
            widths[ribbon.start] = widths.get(ribbon.start, 0.0) + abs(ribbon.value)
    return list(widths.values()) or [0.0]


def _unit(extents: Sequence[float], scale: float) -> float:
    """Returns the height per unit of relevance for which a column, including space for its labels, has height 1."""
    low, high = 0.0, 1.0 / max(sum(extents), 1e-12)
    for _ in range(50):
        middle = (low + high) / 2
        filled = sum(max(ROW * scale, extent * middle) + GAP * scale for extent in extents)
        low, high = (middle, high) if filled <= 1 else (low, middle)
    # If there are too many labels, they overlap, but the bars are still drawn.
    return low or 0.5 / max(sum(extents), 1e-12)


def _centers(extents: Sequence[float], unit: float, scale: float) -> list[float]:
    """Returns the vertical positions of the evenly spaced node centers, from top to bottom."""
    rows = [max(ROW * scale, extent * unit) for extent in extents]
    space = (1 - sum(rows)) / max(len(rows), 1)
    ends = np.cumsum([row + space for row in rows])
    return [float(1 - end + (row + space) / 2) for end, row in zip(ends, rows, strict=True)]


def _factor(extents: Sequence[Sequence[float]], ribbons: Sequence[Ribbon], unit: float, scale: float) -> int:
    """Returns a round factor that widens very thin ribbons as far as space permits. It is 1 for wider ribbons."""
    widest = max((abs(one.value) for one in ribbons), default=0) * unit
    if widest == 0 or widest >= VISIBLE:
        return 1
    room = math.inf
    for number, extent in enumerate(extents):
        for node, height in enumerate(extent):
            stack = max(_stacks(number, node, ribbons))
            if stack > 0:
                room = min(room, max(height, 0.8 * ROW * scale / unit) / stack)
    power = 10 ** math.floor(math.log10(max(room, 1)))
    return int(max(step * power for step in (1, 2, 5) if step * power <= max(room, 1)))


def _lanes(centers: Sequence[Sequence[float]], ribbons: Sequence[Ribbon], unit: float) -> list[list[float]]:
    """Returns the heights at which ribbons cross columns. Nodes stack ribbons in the order of their other ends."""
    lanes = [[0.0] * len(one.nodes) for one in ribbons]
    starts = sorted({one.start for one in ribbons})
    for number, heights in enumerate(centers):
        for (node, center), start in itertools.product(enumerate(heights), starts):
            both = zip(lanes, ribbons, strict=True)
            here = [(lane, one) for lane, one in both if one.start == start and one.node(number) == node]
            here.sort(
                key=lambda pair: -sum(centers[at][to] for at, to in enumerate(pair[1].nodes, start) if at != number)
            )
            top = center + sum(abs(one.value) for _, one in here) * unit / 2
            for lane, one in here:
                lane[number - start] = top - abs(one.value) * unit / 2
                top -= abs(one.value) * unit
    return lanes


def _height(lane: Sequence[float], x: float) -> float:
    """Returns the center height of a ribbon at ``x``, by solving the cubic curve of :func:`_draw_ribbon`."""
    left = min(int(x), len(lane) - 2)
    steps = np.linspace(0, 1, 64)
    across = 1.5 * steps * (1 - steps) + steps**3
    step = float(np.interp(x - left, across, steps))
    share = step**2 * (3 - 2 * step)
    return lane[left] * (1 - share) + lane[left + 1] * share


# -- drawing --------------------------------------------------------------------------------------------------------


def _color(value: float) -> str:
    return POSITIVE if value >= 0 else NEGATIVE


def _shade(kind: str, value: float, palette: Palette) -> str:
    return {"other": palette.other, "off": palette.off}.get(kind, palette.of(value))


def _draw_ribbon(axes: Axes, lane: Sequence[float], width: float, ribbon: Ribbon, palette: Palette) -> None:
    half = max(width, 0.0015) / 2
    color = _shade(ribbon.kind, ribbon.value, palette)
    for left, (start, end) in enumerate(pairwise(lane), ribbon.start):
        x = (left, left + 0.5, left + 0.5, left + 1)
        over = [(at, y + half) for at, y in zip(x, (start, start, end, end), strict=True)]
        under = [(at, y - half) for at, y in zip(x, (start, start, end, end), strict=True)][::-1]
        curve = Curve([*over, *under, over[0]], [1, 4, 4, 4, 2, 4, 4, 4, 79])
        strength = 0.72 if ribbon.mark else ribbon.strength
        layer = 2 + bool(ribbon.mark)
        axes.add_patch(PathPatch(curve, facecolor=color, edgecolor="none", alpha=strength, zorder=layer))


def _draw_column(
    axes: Axes, number: int, column: Column, centers: Sequence[float], unit: float, palette: Palette, scale: float
) -> None:
    name, note = 1 + 0.13 * scale, 1 + 0.075 * scale
    axes.text(number, name, column.name, ha="center", va="top", fontsize=10.5, weight="bold", color=palette.ink)
    axes.text(number, note, column.note, ha="center", va="top", fontsize=8, color=palette.pale)
    halo = [patheffects.withStroke(linewidth=2.5, foreground=palette.paper)]
    x, align = (number - 0.05, "right") if number == 0 else (number + 0.05, "left")
    kinds = column.kinds or [""] * len(column.labels)
    for label, value, center, kind in zip(column.labels, column.marginals, centers, kinds, strict=True):
        height = max(abs(value) * unit, 0.004)
        color = _shade(kind, value, palette)
        axes.add_patch(Rectangle((number - BAR, center - height / 2), 2 * BAR, height, color=color, zorder=5))
        for text, rise, size, color in ((label, 0.018, 9.5, palette.ink), (percent(value), -0.021, 7.5, palette.pale)):
            axes.text(
                x,
                center + rise * scale,
                text,
                ha=align,
                va="center",
                fontsize=size,
                color=color,
                zorder=6,
                path_effects=halo,
            )


def _draw_marks(axes: Axes, marked: Sequence[tuple[Ribbon, list[float]]]) -> None:
    """Draws each mark where its ribbon is farthest from the other marked ribbons and marks."""
    placed: list[tuple[float, float]] = []
    # Labels are to the right of the bars, except in the first column.
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


def _draw_key(
    axes: Axes, columns: Sequence[Column], ribbons: Sequence[Ribbon], factor: int, palette: Palette, scale: float
) -> None:
    """Draws a legend for heights and, if both signs are visible, for colors."""
    values = [*(value for column in columns for value in column.marginals), *(one.value for one in ribbons)]
    both = min(max(values, default=0), -min(values, default=0)) > 0.02 * max(map(abs, values), default=0)
    text = f"height: relevance{f', ribbons widened {factor} times' if factor > 1 else ''}"
    signs = "; red positive, blue negative" if both else ""
    axes.text(
        (len(columns) - 1) / 2, -0.05 * scale, text + signs, ha="center", va="center", fontsize=8, color=palette.pale
    )
