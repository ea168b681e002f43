"""Figures of reference examples, one row per channel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..errors import InputError
from ..plots.heatmaps import draw_heat_map, draw_image
from ..plots.ribbons import DARK, LIGHT, Palette, percent
from .crops import Crop

Style = Literal["mask", "plain", "heat", "both"]
FADED = 0.78
"""Opacity of the overlay on pixels without relevance."""
CELL = 1.15
"""Side length of an image in inches."""
MOST = 16
"""Maximum number of rows in a figure and of images per row."""


def reference_figure(
    rows: Mapping[int | str, Sequence[Crop]],
    style: Style = "mask",
    heading: str = "",
    dark: bool = False,
    labels: Mapping[int | str, str] | None = None,
    unit: str = "%",
) -> Figure:
    """Plots reference examples of channels, in decreasing order from left to right.

    Args:
        rows: Crops keyed by channel, from :func:`~nrm_plugin.dataset.crops.crops`.
        style: ``"mask"`` to fade pixels that are not relevant to the channel, ``"plain"`` for the crops only,
            ``"heat"`` to overlay the joint heat maps, or ``"both"`` for crops with heat maps below them.
        heading: Title of the figure.
        dark: Whether to use colors for a dark background; save the figure with ``facecolor=figure.get_facecolor()``.
        labels: Row labels keyed by channel. Defaults to the channel indices.
        unit: ``"%"`` if values are fractions of the relevance, and otherwise the suffix of printed values.

    Raises:
        InputError: If there are no crops or too many, or if the style is unknown.
    """
    if style not in ("mask", "plain", "heat", "both"):
        raise InputError(f"style={style!r} is unknown; choose 'mask', 'plain', 'heat' or 'both'.")
    across = max((len(row) for row in rows.values()), default=0)
    if not across or across > MOST or len(rows) > MOST:
        raise InputError(f"a figure can show 1 to {MOST} rows of 1 to {MOST} crops, got {len(rows)} of {across}.")
    palette, lines = DARK if dark else LIGHT, 2 if style == "both" else 1
    figure = Figure(
        figsize=(1.1 + CELL * across, 0.2 + (CELL * lines + 0.22) * len(rows) + 0.35 * bool(heading)),
        layout="constrained",
    )
    figure.set_facecolor(palette.paper)
    if heading:
        figure.suptitle(heading, fontsize=12.5, color=palette.ink)
    grid = figure.subplots(len(rows) * lines, across, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (group, row) in enumerate(rows.items()):
        name = (labels or {}).get(group, f"channel {group}" if isinstance(group, int) else group)
        _label(grid[number * lines, 0], name.replace("$", r"\$"), palette)
        for crop, *axes in zip(row, *grid[number * lines : (number + 1) * lines, : len(row)], strict=True):
            axes[0].set_title(_value(crop.value, unit), fontsize=7.5, color=palette.pale, pad=2.5)
            for style_of, one in zip(("plain", "heat") if style == "both" else (style,), axes, strict=True):
                one.set_axis_on()
                _draw(one, crop, style_of)
    return figure


def _draw(axes: Axes, crop: Crop, style: str) -> None:
    if style == "heat":
        draw_heat_map(axes, crop.heat, crop.image)
    else:
        draw_image(axes, crop.image)
    if style == "mask":
        # Grayscale fades to white, colors to a gray that is distinct from black and white.
        veil = np.full((*crop.mask.shape, 4), 1.0 if len(crop.image) == 1 else 0.5)
        veil[..., 3] = np.where(crop.mask.numpy(), 0.0, FADED)
        axes.imshow(veil)


def _label(axes: Axes, name: str, palette: Palette) -> None:
    axes.text(-0.12, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=9, color=palette.ink)


def _value(value: float, unit: str) -> str:
    return percent(value) if unit == "%" else f"{value:.3g}{unit}"


__all__ = ["reference_figure"]
