"""Pictures of what explanations say together: differences of mean flows, and prototypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..errors import InputError
from ..measure.flow_graph import FlowGraph
from ..plots.flow import flow_figure
from ..plots.heatmaps import Values, draw_image
from ..plots.ribbons import DARK, LIGHT, Palette, percent
from .prototypes import Prototypes

MOST = 16
"""Rows, and pictures in a row, that a figure has room for."""


def difference_figure(graph: FlowGraph, first: str, second: str, heading: str = "", dark: bool = False) -> Figure:
    """The difference of two mean flows as ribbons between bars, the input at the left.

    Args:
        graph: Of :func:`~nrm_plugin.dataset.glocal.difference`, with few groups: ``graph.smaller(top=8)``.
        first: What the first group of samples is called; red is where it has more.
        second: What the second is called; blue is where it has more.
        heading: Above the drawing.
        dark: As in :func:`~nrm_plugin.plots.flow.flow_figure`.

    Raises:
        FlowError: A layer shows more groups than there is room for.
    """
    told = f"red: more for {first}, blue: more for {second}".replace("$", r"\$")
    return flow_figure(graph, f"{heading}\n{told}" if heading else told, dark)


def prototypes_figure(
    found: Prototypes,
    pictures: Mapping[int, Values],
    k: int = 6,
    top: int = 6,
    heading: str = "",
    dark: bool = False,
    names: Callable[[int], str] = str,
) -> Figure:
    """A row for each prototype: its coverage, the members nearest to its centre, and its most relevant groups.

    Args:
        found: The prototypes.
        pictures: Pictures ``(C, H, W)`` in [0, 1] of the members that are shown, by number of the sample; these are
            ``found.of(prototype)[:k]``.
        k: Members of each.
        top: Groups of each.
        heading: Above the picture.
        dark: For a dark background; save it with ``facecolor=figure.get_facecolor()``.
        names: What a group is called.

    Raises:
        InputError: A picture is missing, or there are more than there is room for.
    """
    count = len(found.centres)
    if count > MOST or not 1 <= k <= MOST:
        raise InputError(f"a picture has room for {MOST} prototypes with 1 to {MOST} members, got {count} and {k}.")
    palette = DARK if dark else LIGHT
    figure = Figure(figsize=(1.2 + 1.0 * k + 2.4, 0.3 + 1.25 * count + 0.35 * bool(heading)), layout="constrained")
    figure.set_facecolor(palette.paper)
    if heading:
        figure.suptitle(heading, fontsize=12.5, color=palette.ink)
    grid = figure.subplots(count, k + 1, squeeze=False, width_ratios=[*[1.0] * k, 2.2])
    for number, row in enumerate(grid):
        for axes in row[:-1]:
            axes.set_axis_off()
        row[0].text(-0.12, 0.5, f"{number}\n{percent(float(found.coverage[number]))}", transform=row[0].transAxes,
                    ha="right", va="center", fontsize=9, color=palette.ink)  # fmt: skip
        for axes, sample in zip(row, found.of(number)[:k], strict=False):
            if sample not in pictures:
                raise InputError(f"pictures= lacks sample {sample}, a member of prototype {number}.")
            axes.set_axis_on()
            draw_image(axes, pictures[sample])
            axes.set_title(f"{sample}", fontsize=7.5, color=palette.pale, pad=2.5)
        _bars(row[-1], found.strongest(number, top), names, palette)
    return figure


def _bars(axes: Axes, strongest: list[tuple[int, float]], names: Callable[[int], str], palette: Palette) -> None:
    places, values = range(len(strongest)), [value for _, value in strongest]
    axes.barh(places, values, height=0.75, color=[palette.of(value) for value in values])
    axes.set_yticks(places, [names(group).replace("$", r"\$") for group, _ in strongest])
    axes.set_ylim(len(strongest) - 0.4, -0.6)
    axes.axvline(0, color=palette.pale, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.tick_params(length=0, labelsize=7.5, colors=palette.ink)
    axes.set_facecolor(palette.paper)
    for side in axes.spines.values():
        side.set_visible(False)


__all__ = ["difference_figure", "prototypes_figure"]
