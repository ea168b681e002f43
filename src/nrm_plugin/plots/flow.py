"""Figures of flow graphs and of layer profiles."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from ..measure.flow_graph import FlowError, FlowGraph, FlowLayer, FlowNode
from ..measure.flow_heat_maps import NodeMaps, thumbnail
from ..measure.layer_profile import ProfileRow
from .heatmaps import DIVERGING, Budget, draw_budget
from .ribbons import DARK, INK, LIGHT, Column, Palette, Ribbon, draw_flow, percent, rows_scale

MAX_GROUPS = 40
"""Largest number of groups of one layer in a figure."""
THUMBNAILS_PER_ROW, MAX_THUMBNAILS = 4, 12
"""Number of thumbnails of one layer per row, and in total."""
THUMBNAIL_HEIGHT, THUMBNAIL_WIDTH = 0.72, 0.22
"""Height of a row of thumbnails in inches, and width of a thumbnail as a fraction of the distance between layers."""
LETTERS = 9.5
"""Letters of a heading per inch of a figure."""
NEGLIGIBLE = 1e-6
"""Relevance below which edges, rest nodes and off nodes are not drawn, since it is rounding error."""
KINDS = {"group": "", "rest": "other", "off": "off"}
STRENGTH = {"group": 0.45, "rest": 0.2, "off": 0.25}


def drawn_nodes(layer: FlowLayer) -> list[tuple[int, FlowNode]]:
    """Returns the nodes of a layer to be drawn, each with its row in the joint relevance.

    Raises:
        FlowError: If the layer has too many groups for a figure.
    """
    if len(layer.groups) > MAX_GROUPS:
        raise FlowError(
            f"{layer.name} shows {len(layer.groups)} groups, and a figure has room for {MAX_GROUPS}. Show fewer: "
            "graph.smaller(top=8), or coverage=0.9."
        )
    nodes = list(enumerate(layer.nodes))
    return [(row, node) for row, node in nodes if node.kind == "group" or abs(node.mass) > NEGLIGIBLE]


def flow_figure(graph: FlowGraph, heading: str = "", dark: bool = False, maps: NodeMaps | None = None) -> Figure:
    """Draws a flow graph as ribbons between bars, with the input on the left; heights are proportional to relevance.

    Red is positive and blue negative, in shades that colour-blind readers can distinguish. Grey is the rest of a layer,
    and orange the relevance that is absorbed above the layer or bypasses it.

    Args:
        graph: The graph.
        heading: Title of the figure.
        dark: Whether to use colours for a dark background; save the figure with ``facecolor=figure.get_facecolor()``.
        maps: Heat maps of the nodes, from :func:`~nrm_plugin.measure.flow_maps`; the maps of the most relevant groups
            are drawn below their layer, each on its own scale.

    Raises:
        FlowError: If a layer has too many groups for a figure.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["output", "1", "input"])
        >>> type(flow_figure(graph)).__name__
        'Figure'
    """
    palette = DARK if dark else LIGHT
    layers = graph.layers[::-1]
    nodes = [drawn_nodes(layer) for layer in layers]
    columns = [_column(layer, drawn) for layer, drawn in zip(layers, nodes, strict=True)]
    ribbons = []
    for start, joint in enumerate(graph.joints[::-1]):
        for left, (lower, below) in enumerate(nodes[start]):
            for right, (upper, above) in enumerate(nodes[start + 1]):
                value = float(joint[upper, lower])
                if abs(value) > NEGLIGIBLE:
                    kind = _paler(below, above)
                    ribbons.append(Ribbon((left, right), value, "", start, KINDS[kind], STRENGTH[kind]))
    scale = rows_scale(columns)
    thumbnails = [_most_relevant_maps(drawn, maps or {}) for drawn in nodes]
    rows = max(math.ceil(len(column) / THUMBNAILS_PER_ROW) for column in thumbnails)
    height = 5.0 / scale
    width = 2.6 + 2.4 * max(len(columns) - 1, 1)
    figure = Figure(figsize=(width, height + THUMBNAIL_HEIGHT * rows), layout="constrained")
    figure.set_facecolor(palette.paper)
    if heading:
        lines = [textwrap.fill(line, int(LETTERS * width), break_long_words=False) for line in heading.split("\n")]
        figure.suptitle("\n".join(lines), fontsize=12.5, color=palette.ink)
    axes = figure.add_subplot()
    draw_flow(axes, columns, ribbons, palette, scale)
    low, high = axes.get_ylim()
    step = THUMBNAIL_HEIGHT * (high - low) / height  # height of a row of thumbnails, in data coordinates
    axes.set_ylim(low - rows * step, high)
    for number, column in enumerate(thumbnails):
        _draw_maps(axes, number, low, step, column, palette)
    return figure


def _most_relevant_maps(
    nodes: Sequence[tuple[int, FlowNode]], maps: NodeMaps
) -> list[tuple[FlowNode, NDArray[np.float64]]]:
    pairs = [(node, maps[node.key]) for _, node in nodes if node.key in maps]
    return sorted(pairs, key=lambda pair: -abs(pair[0].mass))[:MAX_THUMBNAILS]


def _draw_maps(
    axes: Axes, number: int, top: float, step: float, column: Sequence[tuple[FlowNode, NDArray[np.float64]]],
    palette: Palette,
) -> None:  # fmt: skip
    across = min(THUMBNAILS_PER_ROW, max(len(column), 1))
    for place, (node, values) in enumerate(column):
        row, at = divmod(place, across)
        left = number + THUMBNAIL_WIDTH * (at - across / 2) + 0.01
        bounds = (left, top - (row + 1) * step, THUMBNAIL_WIDTH - 0.02, 0.78 * step)
        inset = axes.inset_axes(bounds, transform=axes.transData)
        small = thumbnail(values)
        limit = float(np.abs(small).max()) or 1.0
        inset.imshow(small, cmap=DIVERGING, vmin=-limit, vmax=limit)
        inset.set_axis_off()
        inset.set_title(_short(node.label, 10), fontsize=6.5, color=palette.pale, pad=1.5)


def layer_note(layer: FlowLayer) -> str:
    """Returns the number and mass of the shown groups of a layer, such as ``3 of 6: 80%``."""
    if not layer.groups:
        return "no relevance crosses it"
    return f"{len(layer.groups)} of {len(layer.groups) + layer.others}: {percent(sum(layer.masses))}"


def _paler(below: FlowNode, above: FlowNode) -> str:
    kinds = {below.kind, above.kind}
    return "off" if "off" in kinds else "rest" if "rest" in kinds else "group"


def _column(layer: FlowLayer, nodes: Sequence[tuple[int, FlowNode]]) -> Column:
    labels = [node.label for _, node in nodes]
    kinds = [KINDS[node.kind] for _, node in nodes]
    return Column(_short(layer.name), layer_note(layer), [_short(label, 18) for label in labels],
                  [node.mass for _, node in nodes], kinds)  # fmt: skip


def _short(text: str, length: int = 24) -> str:
    half = (length - 1) // 2
    shortened = text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
    return shortened.replace("$", r"\$")


def profile_figure(rows: Sequence[ProfileRow], heading: str = "", dark: bool = False) -> Figure:
    """Draws mass, sink and bypass of each layer as stacked bars, and its variation; the output is at the top.

    Args:
        rows: Rows of :func:`~nrm_plugin.measure.layer_profile.profile`.
        heading: Title of the figure.
        dark: Whether to use colours for a dark background; save the figure with ``facecolor=figure.get_facecolor()``.
    """
    palette = DARK if dark else LIGHT
    figure = Figure(figsize=(8.2, 1.5 + 0.26 * len(rows)), layout="constrained")
    figure.set_facecolor(palette.paper)
    if heading:
        figure.suptitle(heading, fontsize=12.5, color=palette.ink)
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.4), sharey=True)
    plain = [row.plain for row in rows if row.plain is not None]
    budget = Budget("relevance by layer", [row.mass for row in rows], [row.sink for row in rows],
                    [row.bypass for row in rows], plain if len(plain) == len(rows) else None)  # fmt: skip
    draw_budget(left, [_short(row.layer, 30) for row in rows], budget, "sum of plain LRP")
    _draw_variation(right, [row.variation for row in rows])
    for axes in (left, right):
        _recolour(axes, palette)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8.5,
        labelcolor=palette.ink,
    )  # fmt: skip
    return figure


def _draw_variation(axes: Axes, values: Sequence[float]) -> None:
    places = range(len(values))
    largest = max([*values, 1.0])
    axes.plot(values, places, "o-", color=INK, markersize=4, linewidth=0.9)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    if largest > 20:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(min(0.9, *values), max(2.0, 1.1 * largest))
    axes.set_title("variation", fontsize=10, y=1.035)
    axes.tick_params(length=0, labelsize=8.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _recolour(axes: Axes, palette: Palette) -> None:
    axes.set_facecolor(palette.paper)
    axes.tick_params(colors=palette.ink)
    axes.title.set_color(palette.ink)
    axes.spines["bottom"].set_color(palette.pale)
    for line in axes.lines:
        if to_hex(line.get_color()) == INK:
            line.set_color(palette.ink)


__all__ = ["drawn_nodes", "flow_figure", "layer_note", "profile_figure"]
