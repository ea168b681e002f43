"""Figures of layer profiles: mass, sink, bypass and variation of each layer."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from ..measure.layer_profile import ProfileRow
from .heatmaps import Budget, draw_budget
from .ribbons import DARK, INK, LIGHT, Palette


def profile_figure(rows: Sequence[ProfileRow], heading: str = "", dark: bool = False) -> Figure:
    """Draws mass, sink and bypass of each layer as stacked bars, next to its variation, with the output at the top.

    Args:
        rows: Rows of :func:`~nrm_plugin.measure.layer_profile.profile`.
        heading: Title of the figure.
        dark: Whether to use a dark background; save the figure with ``facecolor=figure.get_facecolor()``.
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
        _recolor(axes, palette)
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


def _recolor(axes: Axes, palette: Palette) -> None:
    axes.set_facecolor(palette.paper)
    axes.tick_params(colors=palette.ink)
    axes.title.set_color(palette.ink)
    axes.spines["bottom"].set_color(palette.pale)
    for line in axes.lines:
        if to_hex(line.get_color()) == INK:
            line.set_color(palette.ink)


def _short(text: str, length: int = 24) -> str:
    half = (length - 1) // 2
    shortened = text if len(text) <= length else f"{text[:half]}…{text[-half:]}"
    return shortened.replace("$", r"\$")


__all__ = ["profile_figure"]
