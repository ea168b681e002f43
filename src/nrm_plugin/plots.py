"""Figures of a measure. Nothing is computed in here beyond the scale of a drawing.

Every function returns a matplotlib ``Figure`` of its own: no window opens, and no state of pyplot is read or left.
Red is positive and blue negative everywhere; both can be told apart by colour-blind readers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Values = Tensor | Array
Canvas = Figure | SubFigure

POSITIVE, NEGATIVE = "#b2182b", "#2166ac"
MASS, SINK, BYPASS = "#56b4e9", "#e69f00", "#bbbbbb"
INK, PALE = "#222222", "#777777"
DIVERGING = "RdBu_r"

ROW = 0.06
"""Height that a node of a flow drawing keeps for its label, as a share of the drawing."""


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


@dataclass(frozen=True)
class Budget:
    """Where the relevance of one sample is, layer by layer.

    Attributes:
        title: What sample it is.
        mass, sink, bypass: One number for each layer; together 1.
        reference: Another sum to be marked at each layer, such as that of plain Zennit.
        image: ``(C, H, W)``, drawn small beside the title.
    """

    title: str
    mass: Sequence[float]
    sink: Sequence[float]
    bypass: Sequence[float]
    reference: Sequence[float] | None = None
    image: Values | None = None


def save(figure: Figure, path: Path) -> Path:
    """Write a figure, 150 dots per inch; returns the path."""
    figure.savefig(path, dpi=150, facecolor="white")
    return path


# -- pictures -------------------------------------------------------------------------------------------------------


def heat_map(values: Values, title: str = "", image: Values | None = None, limit: float | None = None) -> Figure:
    """One signed heat map with its colour bar.

    Args:
        values: ``(H, W)``.
        title: Above the picture.
        image: ``(C, H, W)``, shown faintly for orientation.
        limit: Value of the darkest colour; the largest by default.
    """
    figure = _figure(4.2, 3.6)
    axes = figure.add_subplot()
    drawn = draw_heat_map(axes, values, image, limit)
    axes.set_title(title, fontsize=11, color=INK)
    _color_bar(figure, drawn, [axes])
    return figure


def image_and_heat_map(image: Values, values: Values, titles: tuple[str, str] = ("", "")) -> Figure:
    """An image beside its signed heat map.

    Args:
        image: ``(C, H, W)`` with values in [0, 1], one channel or three.
        values: ``(H, W)``.
        titles: Above the image and above the heat map.
    """
    figure = _figure(7.4, 3.6)
    left, right = figure.subplots(1, 2)
    draw_image(left, image)
    drawn = draw_heat_map(right, values, image)
    for axes, title in zip((left, right), titles, strict=True):
        axes.set_title(title, fontsize=11, color=INK)
    _color_bar(figure, drawn, [right])
    return figure


def heat_maps(
    maps: Sequence[Values], titles: Sequence[str], heading: str = "", image: Values | None = None, columns: int = 4
) -> Figure:
    """A grid of signed heat maps on one colour scale.

    Args:
        maps: ``(H, W)`` each.
        titles: One for each map.
        heading: Above the grid.
        image: ``(C, H, W)``, shown as the first picture, and faintly under the maps.
        columns: Pictures side by side.
    """
    count = len(maps) + (image is not None)
    rows = math.ceil(count / columns)
    figure = _figure(2.15 * min(columns, count) + 0.9, 2.4 * rows + 0.5)
    if heading:
        figure.suptitle(heading, fontsize=12, color=INK)
    draw_grid(figure, maps, titles, image, columns, show_image=image is not None)
    return figure


def flow(columns: Sequence[Column], ribbons: Sequence[Ribbon], heading: str = "") -> Figure:
    """Joint relevance of the nodes of two or more layers as ribbons between bars.

    Args:
        columns: The layers, in the order in which walks cross them.
        ribbons: Joint relevance of one node in each column.
        heading: Above the drawing.
    """
    figure = _figure(2.6 + 2.4 * (len(columns) - 1), 4.8)
    if heading:
        figure.suptitle(heading, fontsize=12, color=INK)
    draw_flow(figure.add_subplot(), columns, ribbons)
    return figure


def joint(
    image: Values,
    marginal: Values,
    columns: Sequence[Column],
    ribbons: Sequence[Ribbon],
    maps: Sequence[Values],
    titles: Sequence[str],
    heading: str = "",
) -> Figure:
    """Joint relevance over layers: image and heat map, the flow between channels, heat maps of the strongest ones.

    Args:
        image: ``(C, H, W)``.
        marginal: Heat map of the image, ``(H, W)``.
        columns: As in :func:`flow`.
        ribbons: As in :func:`flow`.
        maps: Joint heat maps, ``(H, W)`` each, on one colour scale.
        titles: One for each of them.
        heading: Above all.
    """
    middle = 3.4 + 1.7 * (len(columns) - 2)
    across = math.ceil(len(maps) / 2)
    widths = (2.1, middle, 1.95 * across + 0.8)
    figure = _figure(sum(widths), 5.0)
    if heading:
        figure.suptitle(heading, fontsize=13, color=INK)
    parts: Any = figure.subfigures(1, 3, width_ratios=widths, wspace=0.03)
    above, below = parts[0].subplots(2, 1)
    draw_image(above, image)
    draw_heat_map(below, marginal, image)
    above.set_title("image", fontsize=10, color=INK)
    below.set_title("relevance of the pixels", fontsize=10, color=INK)
    draw_flow(parts[1].subplots(), columns, ribbons)
    draw_grid(parts[2], maps, titles, image, across)
    return figure


def budgets(layers: Sequence[str], samples: Sequence[Budget], heading: str = "", reference: str = "") -> Figure:
    """Mass, sink and bypass of every layer as stacked bars, one panel for each sample.

    Args:
        layers: Names, from the output down to the input.
        samples: What is drawn in each panel.
        heading: Above all.
        reference: What the marked sums are.
    """
    across = min(5, len(samples))
    rows = math.ceil(len(samples) / across)
    figure = _figure(1.2 + 2.1 * across, 0.9 + (0.75 + 0.19 * len(layers)) * rows)
    if heading:
        figure.suptitle(heading, fontsize=13, color=INK)
    grid = figure.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
    for number, axes in enumerate(grid.flat):
        if number < len(samples):
            draw_budget(axes, layers, samples[number], reference)
        else:
            axes.set_axis_off()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


# -- parts of pictures ----------------------------------------------------------------------------------------------


def draw_image(axes: Axes, image: Values) -> AxesImage:
    """An image ``(C, H, W)`` with values in [0, 1]: one channel as ink on paper, three as colours."""
    pixels = _array(image)
    _no_ticks(axes)
    if len(pixels) == 1:
        return axes.imshow(pixels[0], cmap="Greys", vmin=0, vmax=1)
    return axes.imshow(np.moveaxis(pixels, 0, -1).clip(0, 1))


def draw_heat_map(axes: Axes, values: Values, image: Values | None = None, limit: float | None = None) -> AxesImage:
    """A signed heat map ``(H, W)``, white at zero, the same limit on both sides.

    The image is shown as an outline where it has one channel, and in grey beneath the colours where it has three.
    """
    pixels = _array(values)
    bound = _bound([pixels]) if limit is None else limit
    _no_ticks(axes)
    if image is None or len(image) == 1:
        drawn = axes.imshow(pixels, cmap=DIVERGING, vmin=-bound, vmax=bound)
        if image is not None:
            _outline(axes, _array(image)[0])
        return drawn
    grey = _array(image).mean(0)
    axes.imshow(0.55 + 0.45 * grey, cmap="gray", vmin=0, vmax=1)
    strength = np.sqrt(np.abs(pixels / bound).clip(0, 1))
    return axes.imshow(pixels, cmap=DIVERGING, vmin=-bound, vmax=bound, alpha=strength)


def draw_grid(
    figure: Canvas,
    maps: Sequence[Values],
    titles: Sequence[str],
    image: Values | None,
    columns: int,
    show_image: bool = False,
) -> None:
    """Heat maps ``(H, W)`` on one colour scale, row by row, with a colour bar at the right."""
    count = len(maps) + show_image
    grid = figure.subplots(math.ceil(count / columns), min(columns, count), squeeze=False)
    places = list(grid.flat)
    if show_image and image is not None:
        draw_image(places[0], image)
        places[0].set_title("image", fontsize=10, color=INK)
        places = places[1:]
    bound = _bound([_array(values) for values in maps])
    drawn = None
    for number, axes in enumerate(places):
        if number >= len(maps):
            axes.set_axis_off()
            continue
        drawn = draw_heat_map(axes, maps[number], image, bound)
        axes.set_title(titles[number], fontsize=10, color=INK)
    if drawn is not None:
        _color_bar(figure, drawn, list(grid.flat))


def draw_budget(axes: Axes, layers: Sequence[str], budget: Budget, reference: str = "") -> None:
    """Stacked bars of one sample, the output on top; a diamond marks the reference at each layer."""
    places = np.arange(len(layers))
    right, left = np.zeros(len(layers)), np.zeros(len(layers))
    for label, color, values in (
        ("mass", MASS, budget.mass),
        ("sink (absorbed above)", SINK, budget.sink),
        ("bypass", BYPASS, budget.bypass),
    ):
        bars = np.asarray(values, dtype=float)
        start = np.where(bars >= 0, right, left)
        axes.barh(places, bars, left=start, height=0.78, color=color, label=label)
        right, left = right + bars.clip(min=0), left + bars.clip(max=0)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    if budget.reference is not None:
        axes.plot(budget.reference, places, "D", color=INK, markersize=3.5, linestyle="none", label=reference)
    axes.set_yticks(places, layers, fontsize=8.5)
    axes.invert_yaxis() if not axes.yaxis_inverted() else None
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(budget.title, fontsize=10, color=INK)
    if budget.image is not None:
        draw_image(axes.inset_axes((0.0, 1.03, 0.13, 0.13)), budget.image)


def draw_flow(axes: Axes, columns: Sequence[Column], ribbons: Sequence[Ribbon]) -> None:
    """Bars as high as the relevance of a node, ribbons as wide as the joint relevance, both on one scale."""
    axes.set_xlim(-0.35, len(columns) - 0.65)
    axes.set_ylim(-0.1, 1.16)
    axes.set_axis_off()
    extents = [_extents(number, column, ribbons) for number, column in enumerate(columns)]
    unit = min((1 - ROW * len(extent)) / max(sum(extent), 1e-12) for extent in extents)
    centers = [_centers(extent, unit) for extent in extents]
    lanes = _lanes(centers, ribbons, unit)
    for ribbon in sorted(ribbons, key=lambda one: (bool(one.mark), -abs(one.value))):
        _draw_ribbon(axes, lanes[ribbon], abs(ribbon.value) * unit, ribbon)
    for number, column in enumerate(columns):
        _draw_column(axes, number, column, centers[number], unit, len(columns))
    _draw_marks(axes, lanes, [ribbon for ribbon in ribbons if ribbon.mark])
    _draw_scale(axes, unit, columns, ribbons)


# -- inside -----------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _array(values: Values) -> Array:
    return np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)


def _bound(maps: Sequence[Array]) -> float:
    """The largest absolute value, or 1 where all are zero."""
    return max((float(np.abs(values).max(initial=0)) for values in maps), default=0) or 1.0


def _no_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
        spine.set_linewidth(0.6)


def _outline(axes: Axes, ink: Array) -> None:
    if ink.min() < ink.max():
        axes.contour(ink, levels=[(ink.min() + ink.max()) / 2], colors=[INK], linewidths=0.9, alpha=0.65)


def _color_bar(figure: Canvas, drawn: AxesImage, axes: Sequence[Axes]) -> None:
    # The map without the transparency of the picture: a bar of a transparent picture would be blank at zero.
    solid = drawn if drawn.get_alpha() is None else _solid(drawn)
    bar = figure.colorbar(solid, ax=axes, fraction=0.05, pad=0.02, aspect=28)
    bar.outline.set_visible(False)  # type: ignore[operator, unused-ignore]
    bar.ax.tick_params(length=0, labelsize=8.5, colors=INK)
    bar.ax.yaxis.get_offset_text().set_fontsize(8)
    bar.formatter.set_powerlimits((-2, 3))  # type: ignore[attr-defined]


def _solid(drawn: AxesImage) -> Any:
    from matplotlib.cm import ScalarMappable

    return ScalarMappable(drawn.norm, colormaps[DIVERGING])


def _extents(number: int, column: Column, ribbons: Sequence[Ribbon]) -> list[float]:
    """What each node of a column needs: its bar, or its ribbons where they cancel to less."""
    needs = [abs(value) for value in column.marginals]
    for node in range(len(needs)):
        needs[node] = max(needs[node], sum(abs(one.value) for one in ribbons if one.nodes[number] == node))
    return needs


def _centers(extents: Sequence[float], unit: float) -> list[float]:
    """Heights of the middles of the nodes, from the top, free space shared evenly."""
    rows = [ROW + extent * unit for extent in extents]
    space = (1 - sum(rows)) / max(len(rows), 1)
    ends = np.cumsum([row + space for row in rows])
    return [float(1 - end + (row + space) / 2) for end, row in zip(ends, rows, strict=True)]


def _lanes(centers: Sequence[Sequence[float]], ribbons: Sequence[Ribbon], unit: float) -> dict[Ribbon, list[float]]:
    """Heights at which each ribbon crosses the columns: stacked at every node in the order of where they lead."""
    lanes: dict[Ribbon, list[float]] = {ribbon: [] for ribbon in ribbons}
    for number, heights in enumerate(centers):
        for node, center in enumerate(heights):
            here = [ribbon for ribbon in ribbons if ribbon.nodes[number] == node]
            here.sort(key=lambda one: -sum(centers[at][to] for at, to in enumerate(one.nodes) if at != number))
            top = center + sum(abs(one.value) for one in here) * unit / 2
            for ribbon in here:
                lanes[ribbon].append(top - abs(ribbon.value) * unit / 2)
                top -= abs(ribbon.value) * unit
    return lanes


def _draw_ribbon(axes: Axes, lane: Sequence[float], width: float, ribbon: Ribbon) -> None:
    half = max(width, 0.0015) / 2
    color = POSITIVE if ribbon.value >= 0 else NEGATIVE
    strength = 0.7 if ribbon.mark else 0.13
    for left, (start, end) in enumerate(pairwise(lane)):
        x = (left, left + 0.5, left + 0.5, left + 1)
        over = [(at, y + half) for at, y in zip(x, (start, start, end, end), strict=True)]
        under = [(at, y - half) for at, y in zip(x, (start, start, end, end), strict=True)][::-1]
        curve = Curve([*over, *under, over[0]], [1, 4, 4, 4, 2, 4, 4, 4, 79])
        axes.add_patch(
            PathPatch(curve, facecolor=color, edgecolor="none", alpha=strength, zorder=2 + bool(ribbon.mark))
        )


def _draw_column(axes: Axes, number: int, column: Column, centers: Sequence[float], unit: float, count: int) -> None:
    axes.text(number, 1.13, column.name, ha="center", va="top", fontsize=10.5, weight="bold", color=INK)
    axes.text(number, 1.075, column.note, ha="center", va="top", fontsize=8, color=PALE)
    halo = [patheffects.withStroke(linewidth=2.5, foreground="white")]
    for label, value, center in zip(column.labels, column.marginals, centers, strict=True):
        height = max(abs(value) * unit, 0.004)
        color = POSITIVE if value >= 0 else NEGATIVE
        axes.add_patch(Rectangle((number - 0.02, center - height / 2), 0.04, height, color=color, zorder=5))
        side = -1 if number < count - 1 else 1
        axes.text(
            number + 0.05 * side, center, label, ha="right" if side < 0 else "left", va="center", fontsize=9,
            color=INK, zorder=6, path_effects=halo,
        )  # fmt: skip


def _draw_marks(axes: Axes, lanes: dict[Ribbon, list[float]], marked: Sequence[Ribbon]) -> None:
    """Each mark where its ribbon is farthest from the other marked ribbons and marks."""
    placed: list[tuple[float, float]] = []
    for ribbon in marked:
        best = (-1.0, 0.0, 0.0)
        for x in np.linspace(0.1, len(lanes[ribbon]) - 1.1, 40):
            y = _height(lanes[ribbon], x)
            others = [abs(y - _height(lanes[other], x)) for other in marked if other is not ribbon]
            marks = [math.hypot(0.35 * (x - a), y - b) for a, b in placed]
            bars = [0.35 * abs(x - round(x))]
            best = max(best, (min([*others, *marks, *bars, 0.06]) - 0.004 * abs(x - 0.5), float(x), y))
        placed.append(best[1:])
        color = POSITIVE if ribbon.value >= 0 else NEGATIVE
        axes.text(
            best[1], best[2], ribbon.mark, ha="center", va="center", fontsize=8, weight="bold", color=color, zorder=8,
            bbox={"boxstyle": "circle,pad=0.18", "facecolor": "white", "edgecolor": color, "linewidth": 1.0},
        )  # fmt: skip


def _height(lane: Sequence[float], x: float) -> float:
    """Height of a ribbon at ``x``; its curve is the cubic of :func:`_draw_ribbon`, solved for its parameter."""
    left = min(int(x), len(lane) - 2)
    steps = np.linspace(0, 1, 64)
    across = 1.5 * steps * (1 - steps) + steps**3
    step = float(np.interp(x - left, across, steps))
    share = step**2 * (3 - 2 * step)
    return lane[left] * (1 - share) + lane[left + 1] * share


def _draw_scale(axes: Axes, unit: float, columns: Sequence[Column], ribbons: Sequence[Ribbon]) -> None:
    """A bar of a round height, and what the colours mean."""
    largest = max((abs(value) for column in columns for value in column.marginals), default=0)
    if largest > 0:
        power = 10.0 ** math.floor(math.log10(largest))
        size = max(step * power for step in (1, 2, 5) if step * power <= largest)
        axes.add_patch(Rectangle((-0.02, -0.04 - size * unit / 2), 0.04, size * unit, color=PALE, clip_on=False))
        axes.text(0.05, -0.04, f"= {size:g}", ha="left", va="center", fontsize=8.5, color=PALE)
    signed = any(value < 0 for column in columns for value in column.marginals) or any(one.value < 0 for one in ribbons)
    words = "height: relevance; " + ("red positive, blue negative" if signed else "red: positive")
    axes.text(len(columns) - 1, -0.04, words, ha="right", va="center", fontsize=8.5, color=PALE)
