"""Figures of flow graphs."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from matplotlib.patheffects import withStroke
from torch import Tensor

from ..measure.flow_graph import FlowGraph
from ..measure.flow_heat_maps import NodeMaps
from .flow_caption import Walks, flow_caption, named_walks
from .flow_columns import has_off, region_name
from .flow_finding import flow_finding
from .flow_layout import flow_scene
from .flow_legend import SIGNS, key_text
from .flow_notes import Counts, Pairs, both_signs, densities, standing_out
from .flow_parts import Band, Box, DrawnNode, Label, Scene
from .flow_thumbnails import (
    NodeThumbnails,
    Photo,
    has_blue,
    is_cropped,
    node_thumbnails,
    painted,
    photo_pixels,
    region_areas,
    region_places,
)
from .layer_profile import profile_figure
from .ribbons import DARK, LIGHT, Palette

SMALLEST = 5.0
"""Smallest font size of region names in the photograph, in points."""
HATCHES = {"sink": "//////", "bypass": "......"}


def flow_figure(
    graph: FlowGraph,
    heading: str = "",
    dark: bool = False,
    maps: NodeMaps | None = None,
    *,
    image: Photo | Tensor | None = None,
    caption: str | None = None,
    width: float | None = None,
    maps_at: str = "",
    walks: Walks = (),
    signs: tuple[str, str] = SIGNS,
    pairs: Pairs | None = None,
    counts: Counts | None = None,
    finding: str | None = None,
    made: str = "",
) -> Figure:
    """Draws a flow graph as ribbons between nodes, with the input on the left and heights proportional to relevance.

    Positive relevance is red and negative relevance is blue, in colorblind-friendly shades. At each node, negative
    ribbons are below positive ones. Gray marks the rest of a layer, hatched orange the relevance absorbed above it, and
    dotted orange the relevance that bypasses it. Very thin ribbons and small nodes of these three kinds are not drawn.
    The legend states their total.

    Args:
        graph: Flow graph to draw.
        heading: Description of what the flow explains, above the title.
        dark: Whether to use a dark background; save the figure with ``facecolor=figure.get_facecolor()``.
        maps: Heat maps of the nodes, from :func:`~nrm_plugin.measure.flow_maps`, drawn as thumbnails.
        image: The explained image, of shape ``(C, H, W)`` with values in [0, 1], or a :class:`~nrm_plugin.plots.Photo`.
            It is drawn next to the caption and in gray behind the thumbnails.
        caption: Text below the title; by default :func:`~nrm_plugin.plots.flow_caption.flow_caption`.
        width: Width in inches, such as 3.3 for one column of a paper; by default, at least 7.2.
        maps_at: The layer whose positions form the heat maps, for the legend; by default, single pixels.
        walks: The strongest walks over groups. Those that the caption names are drawn within the ribbons.
        signs: Descriptions of positive and negative relevance for the legend.
        pairs: Joint relevance of nodes in non-adjacent layers, as in :func:`~nrm_plugin.plots.sankey`. The figure then
            names, below each group of channels, the image part that is most over-represented in it.
        counts: Number of channels in each group, keyed by node. It is shown where there is enough space.
        finding: Title of the figure; by default :func:`~nrm_plugin.plots.flow_finding.flow_finding`. If it is empty,
            the heading is the title.
        made: A line on how the flow was computed, such as "vgg16 · NRMAbsolute · no reference", below the heading.

    Raises:
        FlowError: If a layer has too many groups for a figure.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["output", "1", "input"])
        >>> type(flow_figure(graph)).__name__
        'Figure'
    """
    palette = DARK if dark else LIGHT
    photo = image if isinstance(image, Photo) or image is None else Photo(image)
    thumbnails = node_thumbnails(graph, maps or {}, photo)
    areas = region_areas(photo) if photo is not None else {}
    scene = scene_of(
        graph,
        heading,
        caption,
        thumbnails,
        photo,
        width,
        signs,
        maps_at,
        walks,
        pairs,
        counts,
        finding,
        areas,
        made,
    )
    figure = Figure(figsize=(scene.width / 72, scene.height / 72))
    figure.set_facecolor(palette.paper)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, scene.width)
    axes.set_ylim(scene.height, 0)
    axes.set_axis_off()
    for band in sorted(scene.bands, key=lambda band: -band.width):
        _draw_band(axes, band, palette)
    for band in walk_bands(scene, walks):
        _draw_band(axes, band, palette, is_edged=True)
    for node in scene.nodes:
        _draw_node(axes, node, thumbnails, palette)
    if scene.photo is not None and photo is not None:
        _draw_pixels(axes, scene.photo, photo_pixels(photo, thumbnails))
        _draw_regions(axes, scene.photo, photo, graph)
    for label in (*scene.labels, *scene.legend):
        _draw_label(axes, label, palette)
    return figure


def scene_of(
    graph: FlowGraph,
    heading: str,
    caption: str | None,
    thumbnails: NodeThumbnails | None,
    photo: Photo | None,
    width: float | None = None,
    signs: tuple[str, str] = SIGNS,
    maps_at: str = "",
    walks: Walks = (),
    pairs: Pairs | None = None,
    counts: Counts | None = None,
    finding: str | None = None,
    areas: Mapping[str, float] | None = None,
    made: str = "",
) -> Scene:
    """Computes the layout of a flow, including its caption and legend."""
    finding = flow_finding(graph) if finding is None else finding
    caption = flow_caption(graph, walks=walks) if caption is None else caption.replace(r"\$", "$")
    heading = heading.replace(r"\$", "$")
    if finding and heading:  # a gray line of its own, as the heading above it
        heading = "\n".join(filter(None, (heading, made)))
    else:
        caption = "\n".join(filter(None, (made, caption)))
    shown: Mapping[str, object] = thumbnails.values if thumbnails else {}
    notes = densities(graph, areas or {}) | ({} if pairs is None else standing_out(graph, pairs)) | both_signs(graph)
    return flow_scene(
        graph,
        heading,
        caption,
        key_text(
            bool(shown),
            has_off(graph),
            signs,
            maps_at,
            graph,
            walks,
            is_cropped(thumbnails),
            has_blue(thumbnails),
        ),
        width,
        shown,
        thumbnails.ratio if thumbnails else 1.0,
        photo.file.shape[0] / photo.file.shape[1] if photo is not None else None,
        notes,
        counts,
        finding,
    )


def color_of(tone: str, palette: Palette) -> str:
    """Returns the color of a tone in a palette."""
    off = {"sink": palette.off, "bypass": palette.off, "rest": palette.other}
    named = {"positive": palette.positive, "negative": palette.negative, "ink": palette.ink, "pale": palette.pale}
    return (off | named)[tone]


def curve(band: Band) -> list[tuple[float, float]]:
    """Returns the corners and Bézier control points of a ribbon, along the upper edge and back along the lower edge."""
    (x, start), (right, end) = band.start, band.end
    middle, half = (x + right) / 2, band.width / 2
    over = [(x, start - half), (middle, start - half), (middle, end - half), (right, end - half)]
    under = [(right, end + half), (middle, end + half), (middle, start + half), (x, start + half)]
    return over + under


def walk_bands(scene: Scene, walks: Walks) -> list[Band]:
    """Returns bands for the walks that the caption names, to scale at the upper edges of the ribbons.

    Each walk has the color of its own sign along its whole length, also within ribbons of the other sign.
    """
    ribbons = {(band.lower, band.upper): band for band in scene.bands}
    filled = dict.fromkeys(ribbons, 0.0)
    bands = []
    for keys, mass in named_walks(walks):
        for pair in pairwise(keys):
            if pair in ribbons:
                ribbon = ribbons[pair]
                width = min(abs(mass) * scene.unit, ribbon.width - filled[pair])
                shift = filled[pair] + width / 2 - ribbon.width / 2
                start, end = ((x, y + shift) for x, y in (ribbon.start, ribbon.end))
                filled[pair] += width
                tone = "positive" if mass > 0 else "negative"
                bands.append(Band(*pair, mass, start, end, width, tone, strength=0.9))
    return bands


def _draw_band(axes: Axes, band: Band, palette: Palette, is_edged: bool = False) -> None:
    points = curve(band)
    path = Curve([*points, points[0]], [1, 4, 4, 4, 2, 4, 4, 4, 79])
    axes.add_patch(
        PathPatch(path, facecolor=color_of(band.tone, palette), edgecolor="none", alpha=band.strength, zorder=2)
    )
    if is_edged:
        axes.add_patch(PathPatch(path, fill=False, edgecolor=palette.ink, linewidth=0.5, zorder=2.5))


def _draw_node(axes: Axes, node: DrawnNode, thumbnails: NodeThumbnails | None, palette: Palette) -> None:
    for box, tone in node.bars:
        color = color_of(tone, palette)
        hatch = HATCHES.get(tone)
        face = palette.paper if hatch else color
        axes.add_patch(
            Rectangle((box.x, box.y), box.width, max(box.height, 0.6), facecolor=face, edgecolor=color,
                      linewidth=0.5 if hatch else 0, hatch=hatch, zorder=4)
        )  # fmt: skip
    if node.thumbnail is not None and thumbnails is not None:
        _draw_pixels(axes, node.thumbnail, painted(thumbnails, node.node.key, palette))
    for label in node.labels:
        _draw_label(axes, label, palette)


def _draw_regions(axes: Axes, box: Box, photo: Photo, graph: FlowGraph) -> None:
    """Writes the name of each input node into its region of the photograph."""
    names = {node.key: region_name(node) for node in graph.nodes}
    for key, (x, y) in region_places(photo).items():
        axes.text(
            box.x + x * box.width, box.y + y * box.height, names.get(key, ""), color="white",
            fontsize=max(0.055 * box.width, SMALLEST),
            ha="center", va="center", zorder=7, path_effects=[withStroke(linewidth=1.8, foreground="#111111")],
            weight="bold",
            parse_math=False,
        )  # fmt: skip


def _draw_pixels(axes: Axes, box: Box, pixels: np.ndarray) -> None:
    extent = (box.x, box.right, box.bottom, box.y)
    axes.imshow(pixels, extent=extent, aspect="auto", interpolation="auto", zorder=3)


def _draw_label(axes: Axes, label: Label, palette: Palette) -> None:
    sides = {"start": "left", "middle": "center", "end": "right"}
    axes.text(
        label.x, label.y, label.text, fontsize=label.size, ha=sides[label.anchor], va="center_baseline", zorder=6,
        color=color_of(label.tone, palette), weight="bold" if label.is_bold else "normal", parse_math=False,
    )  # fmt: skip


__all__ = ["flow_figure", "profile_figure"]
