"""Figures that summarize many explanations: differences of mean flows and prototypes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from ..errors import InputError
from ..imports import renamed_arguments
from ..measure.flow_graph import FlowGraph
from ..plots.arrays import Values
from ..plots.flow import flow_figure
from ..plots.flow_columns import without_output
from ..plots.flow_finding import difference_finding
from ..plots.heatmaps import draw_image
from ..plots.ribbons import DARK, LIGHT, Palette, percent
from .prototypes import Prototypes

MOST = 16
"""Maximum number of rows in a figure and of images per row."""


def difference_figure(
    graph: FlowGraph,
    first: str,
    second: str,
    heading: str = "",
    dark: bool = False,
    *,
    width: float | None = None,
    made: str = "",
) -> Figure:
    """Plots the difference between two mean flows as ribbons between bars, with the input on the left.

    Both flows contain all relevance of the output. It is therefore omitted if two other layers remain.

    Args:
        graph: A :func:`~nrm_plugin.dataset.glocal.difference` with few groups, as returned by ``graph.smaller(top=8)``.
        first: Name of the first flow. Red shows where it is larger.
        second: Name of the second flow. Blue shows where it is larger.
        heading: Title of the figure.
        dark: As in :func:`~nrm_plugin.plots.flow.flow_figure`.
        width: As in :func:`~nrm_plugin.plots.flow.flow_figure`.
        made: As in :func:`~nrm_plugin.plots.flow.flow_figure`.

    Raises:
        FlowError: If a layer has too many groups.
    """
    finding, signs = difference_finding(graph, first, second), (f"more for {first}", f"more for {second}")
    shown = without_output(graph)
    return flow_figure(shown, heading, dark, width=width, caption="", finding=finding, signs=signs, made=made)


@renamed_arguments(found="prototypes", pictures="images")
def prototypes_figure(
    prototypes: Prototypes,
    images: Mapping[int, Values],
    k: int = 6,
    top: int = 6,
    heading: str = "",
    dark: bool = False,
    names: Callable[[int], str] = str,
) -> Figure:
    """Plots one row per prototype: its coverage, the members nearest to its center, and its most relevant groups.

    Args:
        prototypes: Clusters of explanations, as returned by :func:`~nrm_plugin.dataset.prototypes.find_prototypes`.
        images: Images of shape ``(C, H, W)`` with values in [0, 1], keyed by sample index, including the members
            ``prototypes.of(number)[:k]`` of each prototype.
        k: Number of members per prototype.
        top: Number of groups per prototype.
        heading: Title of the figure.
        dark: Whether to use colors for a dark background; save the figure with ``facecolor=figure.get_facecolor()``.
        names: Function that returns the name of a group.

    Raises:
        InputError: If an image is missing or if there are too many prototypes or members.
    """
    count = len(prototypes.centers)
    if count > MOST or not 1 <= k <= MOST:
        raise InputError(f"a figure can show at most {MOST} prototypes with 1 to {MOST} members, got {count} and {k}.")
    palette = DARK if dark else LIGHT
    figure = Figure(figsize=(1.2 + 1.0 * k + 2.4, 0.3 + 1.25 * count + 0.35 * bool(heading)), layout="constrained")
    figure.set_facecolor(palette.paper)
    if heading:
        figure.suptitle(heading, fontsize=12.5, color=palette.ink)
    grid = figure.subplots(count, k + 1, squeeze=False, width_ratios=[*[1.0] * k, 2.2])
    for number, row in enumerate(grid):
        for axes in row[:-1]:
            axes.set_axis_off()
        row[0].text(-0.12, 0.5, f"{number}\n{percent(float(prototypes.coverage[number]))}", transform=row[0].transAxes,
                    ha="right", va="center", fontsize=9, color=palette.ink)  # fmt: skip
        for axes, sample in zip(row, prototypes.of(number)[:k], strict=False):
            if sample not in images:
                raise InputError(f"images= lacks sample {sample}, a member of prototype {number}.")
            axes.set_axis_on()
            draw_image(axes, images[sample])
            axes.set_title(f"{sample}", fontsize=7.5, color=palette.pale, pad=2.5)
        _bars(row[-1], prototypes.strongest(number, top), names, palette)
    return figure


def _bars(axes: Axes, strongest: list[tuple[int, float]], names: Callable[[int], str], palette: Palette) -> None:
    rows, values = range(len(strongest)), [value for _, value in strongest]
    axes.barh(rows, values, height=0.75, color=[palette.of(value) for value in values])
    axes.set_yticks(rows, [names(group).replace("$", r"\$") for group, _ in strongest])
    axes.set_ylim(len(strongest) - 0.4, -0.6)
    axes.axvline(0, color=palette.pale, linewidth=0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: percent(value)))
    axes.tick_params(length=0, labelsize=7.5, colors=palette.ink)
    axes.set_facecolor(palette.paper)
    for side in axes.spines.values():
        side.set_visible(False)


__all__ = ["difference_figure", "prototypes_figure"]
