"""Figures of heat maps, joint relevance, and the mass, sink and bypass of layers.

The functions return a new matplotlib ``Figure`` or draw on given axes, without using the global state of pyplot.
Positive relevance is red and negative relevance is blue, in colorblind-friendly shades. Color bars show relevance as
a percentage of the sample's total.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, MaxNLocator
from torch import Tensor

from ..errors import InputError, brief
from .arrays import Array, Values, as_array, image_array, map_array
from .ribbons import INK, Column, Ribbon, draw_flow

Canvas = Figure | SubFigure

MASS, SINK, BYPASS = "#7fb3d5", "#e69f00", "#bdbdbd"
DIVERGING = "RdBu_r"
DPI = 150


@dataclass(frozen=True)
class Budget:
    """Mass, sink and bypass of all layers for one sample.

    Attributes:
        title: Name of the sample.
        mass: Mass of the walks that cross each layer.
        sink: Mass of the walks that are absorbed above each layer.
        bypass: Mass of the walks that bypass each layer. Mass, sink and bypass sum to 1.
        reference: Sums at each layer for comparison, for example by Zennit, marked by diamonds.
        image: Image of shape ``(C, H, W)`` that is drawn next to the title.
    """

    title: str
    mass: Sequence[float]
    sink: Sequence[float]
    bypass: Sequence[float]
    reference: Sequence[float] | None = None
    image: Values | None = None


def save(figure: Figure, path: Path, paper: str = "white", kind: str | None = None, dpi: int = DPI) -> Path:
    """Saves a figure with the given background color and returns its path.

    Args:
        figure: The figure to save.
        path: Path of the file.
        paper: The background color.
        kind: File format, such as ``"png"``; by default, it is inferred from the suffix of the path.
        dpi: Dots per inch.

    Raises:
        OSError: If the file cannot be written.
    """
    figure.savefig(path, dpi=dpi, facecolor=paper, format=kind)
    return path


# -- figures --------------------------------------------------------------------------------------------------------


def heat_map(
    values: Values,
    title: str = "",
    image: Values | None = None,
    limit: float | None = None,
    cells: int | Sequence[int] | None = None,
) -> Figure:
    """Draws a signed heat map with a color bar.

    Args:
        values: Relevance of shape ``(H, W)``, dimensionless.
        title: Title of the figure.
        image: Image of shape ``(C, H, W)``, shown in low contrast behind the heat map.
        limit: Absolute value at which the colors saturate; by default, the largest absolute value.
        cells: Maximum number of cells along each side, such as the resolution of a layer. The heat map then shows the
            sum over each cell, which preserves the total. By default, pixels are shown.

    Raises:
        InputError: If the map is not finite or does not have shape ``(H, W)``.
    """
    values = _summed(values, cells)
    figure = _figure(4.3, 3.6)
    axes = figure.add_subplot()
    drawn = draw_heat_map(axes, values, image, limit)
    _title(axes, title, 11)
    _color_bar(figure, drawn, [axes], _exceeds([values], limit))
    return figure


def image_and_heat_map(
    image: Values,
    values: Values | Sequence[Values],
    titles: Sequence[str] = ("image", "relevance"),
    heading: str = "",
    limit: float | Sequence[float | None] | None = None,
    cells: int | Sequence[int] | None = None,
    shown: Values | None = None,
) -> Figure:
    """Draws an image and one or several signed heat maps side by side.

    Args:
        image: Image of shape ``(C, H, W)`` with values in [0, 1] and one or three channels.
        values: Unitless heat map of shape ``(H, W)``, or a list of several, each with its own color scale.
        titles: Titles of the image and of each heat map.
        heading: Title of the figure.
        limit: Absolute value at which the colors saturate, for all heat maps or for each; by default, the largest
            absolute value of each heat map.
        cells: As in :func:`heat_map`.
        shown: Image to show on the left; by default, ``image``, which is always the background of the heat maps.
    """
    several = [values] if isinstance(values, Tensor | np.ndarray) else values
    maps = [_summed(one, cells) for one in several]
    limits = list(limit) if isinstance(limit, Sequence) else [limit] * len(maps)
    figure = _figure(3.6 * (1 + len(maps)), 3.6 + 0.3 * bool(heading))
    _heading(figure, heading)
    left, *others = figure.subplots(1, 1 + len(maps))
    draw_image(left, image if shown is None else shown)
    for axes, title in zip((left, *others), titles, strict=True):
        _title(axes, title, 11)
    for axes, one, bound in zip(others, maps, limits, strict=True):
        drawn = draw_heat_map(axes, one, image, bound)
        _color_bar(figure, drawn, [axes], _exceeds([one], bound))
    return figure


def heat_maps(
    maps: Sequence[Values],
    titles: Sequence[str],
    heading: str = "",
    image: Values | None = None,
    columns: int = 4,
    limit: float | None = None,
    cells: int | Sequence[int] | None = None,
) -> Figure:
    """Draws a grid of signed heat maps on a common color scale.

    Args:
        maps: Heat maps of shape ``(H, W)``, dimensionless.
        titles: One title per map.
        heading: Title of the figure.
        image: Image of shape ``(C, H, W)``, shown before the heat maps and, in low contrast, behind each of them.
        columns: Number of columns.
        limit: Absolute value at which the colors saturate; by default, the largest absolute value of all maps.
        cells: As in :func:`heat_map`.

    Raises:
        InputError: If there are not as many titles as maps or if a map does not have shape ``(H, W)``.
    """
    if len(titles) != len(maps) or not maps or columns < 1:
        raise InputError(
            f"{len(maps)} heat maps with {len(titles)} titles in {columns} columns: give one title for each."
        )
    maps = [_summed(values, cells) for values in maps]
    count = len(maps) + (image is not None)
    rows, across = math.ceil(count / columns), min(columns, count)
    figure = _figure(2.1 * across + 0.8, 2.35 * rows + 0.45 * bool(heading))
    _heading(figure, heading)
    draw_grid(figure, maps, titles, image, columns, show_image=image is not None, limit=limit)
    return figure


def flow(columns: Sequence[Column], ribbons: Sequence[Ribbon], heading: str = "") -> Figure:
    """Draws the joint relevance of nodes in two or more layers as ribbons between bars.

    Args:
        columns: The layers, from left to right.
        ribbons: Joint relevance of one node in each column.
        heading: Title of the figure.
    """
    figure = _figure(2.6 + 2.4 * (len(columns) - 1), 5.0)
    _heading(figure, heading)
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
    """Draws an image with its heat map, a flow between channels, and joint heat maps in one figure.

    Args:
        image: Image of shape ``(C, H, W)`` with values in [0, 1].
        marginal: Heat map of the image, of shape ``(H, W)``, with a separate color bar.
        columns: As in :func:`flow`.
        ribbons: As in :func:`flow`.
        maps: Joint heat maps, of shape ``(H, W)`` each, with a common color scale and color bar.
        titles: One title per joint heat map.
        heading: Title of the figure.
    """
    across = math.ceil(len(maps) / 2)
    widths = (2.75, 3.3 + 2.1 * (len(columns) - 2), 2.1 * across + 0.75)
    figure = _figure(sum(widths), 5.1)
    _heading(figure, heading)
    grid = figure.add_gridspec(1, 3, width_ratios=widths)
    left, middle, right = (figure.add_subfigure(grid[0, place]) for place in range(3))
    above, below = left.subplots(2, 1)
    draw_image(above, image)
    drawn = draw_heat_map(below, marginal, image)
    _title(above, "image")
    _title(below, "pixel relevance")
    _color_bar(left, drawn, [below])
    draw_flow(middle.subplots(), columns, ribbons)
    draw_grid(right, maps, titles, image, across)
    return figure


def budgets(layers: Sequence[str], samples: Sequence[Budget], heading: str = "", reference: str = "") -> Figure:
    """Draws the relevance in each layer, absorbed above it (sink) and bypassing it as stacked bars.

    Each sample has its own panel.

    Args:
        layers: Names of the layers, from the output to the input.
        samples: The samples, one per panel.
        heading: Title of the figure.
        reference: Legend entry for :attr:`Budget.reference`.
    """
    across = min(4, len(samples))
    rows = math.ceil(len(samples) / across)
    # A single panel would be narrower than the heading and the legend.
    figure = _figure(max(6.5, 1.3 + 2.2 * across), 0.9 + (0.8 + 0.23 * len(layers)) * rows)
    _heading(figure, heading)
    grid = figure.subplots(rows, across, squeeze=False, sharex=True, sharey=True)
    for axes, sample in zip(grid.flat, samples, strict=False):
        draw_budget(axes, layers, sample, reference)
    for axes in list(grid.flat)[len(samples) :]:
        axes.set_axis_off()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    # matplotlib lists the line first, but the reference should be the last entry.
    order = sorted(range(len(labels)), key=lambda place: labels[place] == reference)
    handles, labels = [handles[place] for place in order], [labels[place] for place in order]
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9)
    return figure


# -- parts of figures -----------------------------------------------------------------------------------------------


def draw_image(axes: Axes, image: Values) -> AxesImage:
    """Draws an image of shape ``(C, H, W)`` with values in [0, 1]. Images with one channel are drawn dark on light."""
    pixels = image_array(image)
    _no_ticks(axes)
    if len(pixels) == 1:
        return axes.imshow(pixels[0], cmap="Greys", vmin=0, vmax=1)
    return axes.imshow(np.moveaxis(pixels, 0, -1).clip(0, 1))


def draw_heat_map(axes: Axes, values: Values, image: Values | None = None, limit: float | None = None) -> AxesImage:
    """Draws a signed heat map of shape ``(H, W)``, white at zero, with symmetric limits.

    An image with one channel is shown as an outline, and an image with three channels in gray behind the colors.
    """
    pixels = map_array(values)
    image = None if image is None else image_array(image)
    bound = _bound([pixels]) if limit is None else limit
    if not bound > 0:
        raise InputError(f"limit={brief(limit)} must be positive.")
    _no_ticks(axes)
    if image is None or len(image) == 1:
        drawn = axes.imshow(pixels, cmap=DIVERGING, vmin=-bound, vmax=bound)
        if image is not None:
            _outline(axes, image[0])
        return drawn
    grey = image.mean(0)
    extent = (-0.5, grey.shape[1] - 0.5, grey.shape[0] - 0.5, -0.5)
    axes.imshow(0.55 + 0.45 * grey, cmap="gray", vmin=0, vmax=1)
    strength = np.sqrt(np.abs(pixels / bound).clip(0, 1))
    return axes.imshow(pixels, cmap=DIVERGING, vmin=-bound, vmax=bound, alpha=strength, extent=extent)


def draw_grid(
    figure: Canvas,
    maps: Sequence[Values],
    titles: Sequence[str],
    image: Values | None,
    columns: int,
    show_image: bool = False,
    limit: float | None = None,
) -> None:
    """Draws heat maps of shape ``(H, W)`` with a common color scale, row by row, with a color bar on the right."""
    count = len(maps) + show_image
    grid = figure.subplots(math.ceil(count / columns), min(columns, count), squeeze=False)
    places = list(grid.flat)
    for axes in places[count:]:
        axes.set_axis_off()
    if show_image and image is not None:
        draw_image(places[0], image)
        _title(places.pop(0), "image")
    bound = _bound([as_array(values) for values in maps]) if limit is None else limit
    for axes, values, title in zip(places, maps, titles, strict=False):
        drawn = draw_heat_map(axes, values, image, bound)
        _title(axes, title)
    if maps:
        _color_bar(figure, drawn, list(grid.flat), _exceeds(maps, limit))


def draw_budget(axes: Axes, layers: Sequence[str], budget: Budget, reference: str = "") -> None:
    """Draws the stacked bars of one sample, with the output at the top and diamonds for the reference of each layer."""
    places = np.arange(len(layers))
    right, left = np.zeros(len(layers)), np.zeros(len(layers))
    for label, color, values in (
        ("mass: crosses the layer", MASS, budget.mass),
        ("sink: absorbed above", SINK, budget.sink),
        ("bypass", BYPASS, budget.bypass),
    ):
        bars = np.asarray(values, dtype=float)
        start = np.where(bars >= 0, right, left)
        if bars.any():
            axes.barh(places, bars, left=start, height=0.8, color=color, label=label)
        right, left = right + bars.clip(min=0), left + bars.clip(max=0)
    axes.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 2)))
    if budget.reference is not None:
        axes.plot(budget.reference, places, "D-", color=INK, markersize=3.5, linewidth=0.7, label=reference)
    axes.set_yticks(places, layers)
    axes.set_ylim(len(layers) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 5, 10]))
    axes.tick_params(length=0, labelsize=8.5, colors=INK)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.set_title(budget.title, fontsize=10, color=INK, y=1.035)  # y keeps the title next to the image
    if budget.image is not None:
        inset = axes.inset_axes((0.0, 1.01, 0.14, 0.14))
        inset.set_in_layout(False)  # it is next to the title, where there is space
        draw_image(inset, budget.image)


# -- helpers --------------------------------------------------------------------------------------------------------


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def _heading(figure: Figure, text: str) -> None:
    if text:
        figure.suptitle(text, fontsize=12.5, color=INK)


def _title(axes: Axes, text: str, size: float = 10) -> None:
    axes.set_title(text, fontsize=size, color=INK)


def cell_sums(values: Values, cells: int | Sequence[int]) -> Array:
    """Sums a heat map of shape ``(H, W)`` over a grid of at most ``cells`` cells along each side.

    The total is preserved.

    Args:
        values: The heat map to sum.
        cells: Maximum number of cells along each side, as one number or a pair.
    """
    wanted = [cells, cells] if isinstance(cells, int) else list(cells)
    if len(wanted) != 2 or min(wanted) < 1:
        raise InputError(f"cells={brief(cells)}: give one number of at least 1, or a pair.")
    result = map_array(values)
    for axis, count in enumerate(wanted):
        length = result.shape[axis]
        starts = np.arange(min(count, length)) * length // min(count, length)
        result = np.add.reduceat(result, starts, axis)
    return result


def _summed(values: Values, cells: int | Sequence[int] | None) -> Values:
    return values if cells is None else cell_sums(values, cells)


def _bound(maps: Sequence[Array]) -> float:
    """Returns the largest absolute value, or 1 if all values are zero."""
    return max((float(np.abs(values).max(initial=0)) for values in maps), default=0) or 1.0


def _exceeds(maps: Sequence[Values], limit: float | None) -> bool:
    """Returns True if a value exceeds the limit at which colors saturate."""
    return limit is not None and _bound([as_array(values) for values in maps]) > limit


def _no_ticks(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#cccccc")
        spine.set_linewidth(0.6)


def _outline(axes: Axes, ink: Array) -> None:
    """Draws the contour of the dark pixels, closed at the border of the image."""
    if ink.min() < ink.max():
        height, width = ink.shape
        # The border of the image is half a pixel outside the outer pixel centers. Pixels are repeated up to the
        # border; beyond it, all pixels are light.
        padded = np.pad(np.pad(ink, 1, mode="edge"), 1, constant_values=ink.min())
        rows = np.array([-0.5, -0.499, *range(height), height - 0.501, height - 0.5])
        columns = np.array([-0.5, -0.499, *range(width), width - 0.501, width - 0.5])
        middle = (ink.min() + ink.max()) / 2
        axes.contour(columns, rows, padded, levels=[middle], colors=[INK], linewidths=0.9, alpha=0.65)


def _color_bar(figure: Canvas, drawn: AxesImage, axes: Sequence[Axes], is_cut: bool = False) -> None:
    limit = drawn.get_clim()[1] or 1.0
    # The bar is opaque, unlike the heat map, since it would otherwise be blank at zero.
    shown = ScalarMappable(drawn.norm, drawn.cmap)
    extend = "both" if is_cut else "neither"
    bar = figure.colorbar(shown, ax=axes, fraction=0.05, pad=0.02, aspect=28, extend=extend, extendfrac=0.03)
    bar.outline.set_visible(False)  # type: ignore[operator, unused-ignore]
    bar.ax.tick_params(length=0, labelsize=8.5, colors=INK)
    # Values are rounded, since the tick at zero may be 1e-19.
    digits = 3 - math.floor(math.log10(100 * limit))
    bar.locator = MaxNLocator(nbins=5, steps=[1, 2, 5, 10])
    bar.formatter = FuncFormatter(lambda value, _: _points(round(100 * value, digits)))
    bar.update_ticks()


def _points(value: float) -> str:
    """Formats a percentage without trailing zeros or scientific notation."""
    text = np.format_float_positional(value, trim="-")
    return f"{text}%".replace("-", "−")
