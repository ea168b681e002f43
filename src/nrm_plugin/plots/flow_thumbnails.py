"""Thumbnails for flow nodes: smoothed heat maps over the photograph, with one color scale per layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from matplotlib.colors import to_rgb
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from ..measure.flow_graph import FlowGraph
from ..measure.flow_heat_maps import NodeMaps
from .arrays import Array, as_array
from .ribbons import LIGHT, Palette

Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]
"""Top, left, bottom and right edge of an image crop, in pixels."""

CELLS = 32
"""Resolution of a smoothed thumbnail along its longer side, about as much as the eye can resolve."""
PIXELS = 120
"""Side length of a thumbnail in pixels."""
SHARP = 40
"""Maximum side length of unsmoothed images in pixels. Single pixels remain visible in them."""
INSIDE = 0.97
"""Fraction of the absolute relevance that the cropped thumbnails contain along each axis."""
OUTSIDE = 0.4
"""Opacity of the photograph outside the region of an input node."""
PALE = 0.03
"""Absolute value below which the color of a heat map is hardly visible."""
LEAST = 0.35
"""Smallest size of the crop, as a fraction of the image size."""


@dataclass(frozen=True)
class Photo:
    """Explained image and the original image from which it was cropped.

    Attributes:
        image: The model input as an image, of shape ``(C, H, W)`` with values in [0, 1] and one or three channels.
        whole: The original image, of shape ``(3, H, W)`` with values in [0, 1], or None if it is the model input
            itself.
        seen: The part of the original image that the model receives, given by its left, top, right and bottom edges as
            fractions of the image size.
        regions: Boolean masks of the input groups, of shape ``(H, W)``, keyed by node; drawn as outlines.
        content: Boolean mask of the pixels that show the image rather than margins around it, of shape ``(H, W)``, or
            None if there are no margins.
    """

    image: Tensor | Array
    whole: Tensor | Array | None = None
    seen: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)
    regions: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)
    content: NDArray[np.bool_] | None = None

    @property
    def colors(self) -> Array:
        """The model input as an image, of shape ``(H, W, 3)``."""
        return _colors(self.image)

    @property
    def file(self) -> Array:
        """The original image, of shape ``(H, W, 3)``."""
        return _colors(self.image if self.whole is None else self.whole)


@dataclass(frozen=True)
class NodeThumbnails:
    """Thumbnails of flow nodes, ready to be drawn.

    Attributes:
        box: The crop of the input that all thumbnails show.
        values: Color values between -1 and 1, of shape ``(H, W)``, keyed by node.
        grey: The same crop of the photograph in gray, of shape ``(H, W)`` with values in [0, 1], or None if there is no
            photograph.
        size: Height and width of the input in pixels.
        edges: Boolean outline mask of each input node, of shape ``(H, W)``, keyed by node.
        inside: Boolean region mask of each input node, of shape ``(H, W)``, keyed by node. All other pixels are faded.
    """

    box: Box
    values: Mapping[str, Array]
    grey: Array | None
    size: tuple[int, int]
    edges: Mapping[str, NDArray[np.bool_]]
    inside: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    @property
    def ratio(self) -> float:
        """Height-to-width ratio of a thumbnail."""
        top, left, bottom, right = self.box
        return (bottom - top) / max(right - left, 1)


def node_thumbnails(graph: FlowGraph, maps: NodeMaps, photo: Photo | None = None) -> NodeThumbnails | None:
    """Computes the thumbnails of the nodes with heat maps. Returns None if no node has one.

    Each heat map is divided by its total absolute relevance. All heat maps of a layer share one color scale. Its limit
    is the median of their maxima.
    """
    nodes = [node for node in graph.nodes if node.key in maps]
    maps = {node.key: np.asarray(maps[node.key], dtype=float) for node in nodes}
    if not maps or min(next(iter(maps.values())).shape) < 2:
        return None
    size = next(iter(maps.values())).shape
    weights = {node.key: abs(node.mass) for node in nodes}
    box = crop(sum((weights[key] * np.abs(_share(values)) for key, values in maps.items()), np.zeros(size)))
    smooth = {key: smoothed(_share(values)[box[0] : box[2], box[1] : box[3]]) for key, values in maps.items()}
    values: dict[str, Array] = {}
    for layer in graph.layers:
        keys = [node.key for node in layer.nodes if node.key in smooth]
        limit = _median([float(np.abs(smooth[key]).max()) for key in keys])
        values |= {key: (smooth[key] / (limit or 1.0)).clip(-1, 1) for key in keys}
    shape = next(iter(values.values())).shape
    grey = None if photo is None or photo.colors.shape[:2] != size else _grey(photo, box, shape)
    regions = {} if photo is None else {key: mask for key, mask in photo.regions.items() if key in values}
    edges = {key: _edge(np.asarray(mask)[box[0] : box[2], box[1] : box[3]], shape) for key, mask in regions.items()}
    inside = {key: _nearest(np.asarray(mask)[box[0] : box[2], box[1] : box[3]], shape) for key, mask in regions.items()}
    return NodeThumbnails(box, values, grey, (size[0], size[1]), edges, inside)


def painted(thumbnails: NodeThumbnails, key: str, palette: Palette = LIGHT) -> Pixels:
    """Renders the thumbnail of a node over the photograph or the background color, in shape ``(H, W, 3)``."""
    values = thumbnails.values[key]
    paper = np.array(to_rgb(palette.paper))
    ground = np.broadcast_to(paper, (*values.shape, 3)) if thumbnails.grey is None else faded(thumbnails.grey, palette)
    if key in thumbnails.inside:
        ground = np.where(thumbnails.inside[key][..., None], ground, OUTSIDE * ground + (1 - OUTSIDE) * paper)
    alpha = opacity(values)[..., None]
    signs = np.where(values[..., None] >= 0, to_rgb(palette.positive), to_rgb(palette.negative))
    colors = ground * (1 - alpha) + signs * alpha
    if key in thumbnails.edges:
        colors = np.where(thumbnails.edges[key][..., None], to_rgb(palette.ink), colors)
    result: Pixels = (255 * colors).round().astype(np.uint8)
    return result


def photo_pixels(photo: Photo, thumbnails: NodeThumbnails | None = None) -> Pixels:
    """Renders a photograph as an array of shape ``(H, W, 3)``. Dims the part that the model does not receive.

    If the thumbnails show a smaller crop, its border is drawn as a thin line.
    """
    colors = _resized(photo.file, 3 * PIXELS)
    height, width = colors.shape[:2]
    left, top, right, bottom = (
        round(end * side) for end, side in zip(photo.seen, (width, height, width, height), strict=True)
    )
    inside = np.zeros((height, width), bool)
    inside[top:bottom, left:right] = True
    colors = np.where(inside[..., None], colors, 0.35 * colors + 0.55)
    if not inside.all():
        colors = np.where(_border(inside, 3)[..., None], (0.9, 0.62, 0.0), colors)
    if thumbnails is not None and is_cropped(thumbnails):
        tall, wide = photo.colors.shape[:2]  # two images side by side are wider than the thumbnails
        rows = [top + round(end * (bottom - top) / tall) for end in thumbnails.box[::2]]
        places = [left + round(end * (right - left) / wide) for end in thumbnails.box[1::2]]
        part = np.zeros((height, width), bool)
        part[rows[0] : rows[1], places[0] : places[1]] = True
        colors = np.where(_border(part, 2)[..., None], 1.0, colors)
    for mask in photo.regions.values():
        part = np.zeros((height, width), bool)
        part[top:bottom, left:right] = _nearest(np.asarray(mask), (bottom - top, right - left))
        colors = np.where(_border(part, 2)[..., None], 0.1, colors)
        colors = np.where(_border(part, 1)[..., None], 1.0, colors)
    result: Pixels = (255 * colors.clip(0, 1)).round().astype(np.uint8)
    return result


def is_cropped(thumbnails: NodeThumbnails | None) -> bool:
    """Returns True if the thumbnails show only a part of the input."""
    return thumbnails is not None and thumbnails.box != (0, 0, *thumbnails.size)


def has_blue(thumbnails: NodeThumbnails | None) -> bool:
    """Returns True if the thumbnails visibly show negative relevance."""
    return thumbnails is not None and any(float(values.min()) < -PALE for values in thumbnails.values.values())


def region_places(photo: Photo) -> dict[str, tuple[float, float]]:
    """Returns a label position for each region: a point inside it, far from its border.

    Positions are fractions of the width and height of the original image, measured from the top-left corner.
    """
    left, top, right, bottom = photo.seen
    places = {}
    for key, mask in photo.regions.items():
        inside = np.asarray(mask, dtype=float)
        if inside.any():
            depth = _blurred(np.pad(inside, 1), 0.08 * max(inside.shape))[1:-1, 1:-1] * inside
            row, column = np.unravel_index(int(depth.argmax()), inside.shape)
            y, x = (row + 0.5) / inside.shape[0], (column + 0.5) / inside.shape[1]
            places[key] = (left + float(x) * (right - left), top + float(y) * (bottom - top))
    return places


def region_areas(photo: Photo) -> dict[str, float]:
    """Returns the fraction of the image that each region covers, without margins.

    Regions that lie mostly in the margins are left out.
    """
    areas = {}
    for key, mask in photo.regions.items():
        content = np.ones(mask.shape, bool) if photo.content is None else photo.content
        inside = int((mask & content).sum())
        if 2 * inside > int(mask.sum()):
            areas[key] = inside / int(content.sum())
    return areas


def opacity(values: Array) -> Array:
    """Returns the opacity of heat-map colors for values between -1 and 1."""
    result: Array = 0.9 * np.abs(values) ** 0.8
    return result


def faded(grey: Array, palette: Palette = LIGHT) -> Array:
    """Renders a gray photograph with low contrast, close to the background color, in shape ``(H, W, 3)``."""
    paper = np.array(to_rgb(palette.paper))
    ink = np.array(to_rgb(palette.ink))
    share = (0.06 + 0.5 * (1 - grey) if palette is LIGHT else 0.05 + 0.28 * grey)[..., None]
    result: Array = paper * (1 - share) + ink * share
    return result


# -- parts ----------------------------------------------------------------------------------------------------------


def smoothed(values: Array) -> Array:
    """Resizes a heat map to the size of a thumbnail. Smooths it unless it is small."""
    height, width = values.shape
    scale = PIXELS / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    kind = Image.Resampling.NEAREST
    if max(height, width) > SHARP:
        values, kind = _blurred(values, 0.6 * max(height, width) / CELLS), Image.Resampling.BILINEAR
    return np.asarray(Image.fromarray(values.astype(np.float32)).resize(size, kind), dtype=float)


def crop(weights: Array) -> Box:
    """Returns the crop that contains most of the nonnegative weights of an image, in the aspect ratio of the image."""
    height, width = weights.shape
    if max(height, width) <= SHARP or not weights.any():
        return (0, 0, height, width)
    spans = [_span(weights.sum(1 - axis)) for axis in (0, 1)]
    side = max(max((end - start) / length for (start, end), length in zip(spans, weights.shape, strict=True)), LEAST)
    if side > 0.85:
        return (0, 0, height, width)
    ends = []
    for (start, end), length in zip(spans, weights.shape, strict=True):
        part = min(length, math.ceil(side * length))
        first = min(max(0, (start + end - part) // 2), length - part)
        ends.append((first, first + part))
    return (ends[0][0], ends[1][0], ends[0][1], ends[1][1])


def _span(weights: Array) -> tuple[int, int]:
    """Returns the range that contains the fraction ``INSIDE`` of the weights, with equal tails, plus a margin."""
    shares = np.cumsum(weights) / weights.sum()
    outside = (1 - INSIDE) / 2
    start, end = int(np.searchsorted(shares, outside)), int(np.searchsorted(shares, 1 - outside)) + 1
    margin = round(0.05 * len(weights))
    return max(0, start - margin), min(len(weights), end + margin)


def _share(values: Array) -> Array:
    total = float(np.abs(values).sum())
    return values / total if total > 0 else values


def _median(values: Iterable[float]) -> float:
    ordered = [value for value in values if value > 0]
    return float(np.median(ordered)) if ordered else 0.0


def _blurred(values: Array, radius: float) -> Array:
    # Pillow blurs only 8-bit images, which would lose small values.
    reach = max(1, math.ceil(2.5 * radius))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(radius, 1e-6)) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(values, [(reach, reach) if axis == at else (0, 0) for at in (0, 1)], mode="edge")
        values = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return values


def _border(mask: NDArray[np.bool_], thickness: int) -> NDArray[np.bool_]:
    """Returns a mask of the pixels in a region that are close to the border of the region or of the image."""
    inner = np.pad(mask, thickness)
    for axis in (0, 1):
        inner = np.logical_and.reduce([np.roll(inner, step, axis) for step in range(-thickness, thickness + 1)])
    result: NDArray[np.bool_] = mask & ~inner[thickness:-thickness, thickness:-thickness]
    return result


def _edge(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    return _border(_nearest(mask, shape), 2)


def _nearest(mask: NDArray[np.bool_], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Resizes a mask by nearest-neighbor interpolation."""
    drawn = Image.fromarray(mask.astype(np.uint8) * 255).resize((shape[1], shape[0]), Image.Resampling.NEAREST)
    result: NDArray[np.bool_] = np.asarray(drawn) > 127
    return result


def _resized(colors: Array, side: int) -> Array:
    drawn = Image.fromarray((255 * colors).round().astype(np.uint8))
    scale = side / max(drawn.size)
    size = (max(1, round(drawn.width * scale)), max(1, round(drawn.height * scale)))
    kind = Image.Resampling.NEAREST if max(drawn.size) <= SHARP else Image.Resampling.LANCZOS
    return np.asarray(drawn.resize(size, kind), dtype=float) / 255


def _colors(image: Tensor | Array) -> Array:
    pixels = as_array(image)
    pixels = np.repeat(1 - pixels, 3, 0) if len(pixels) == 1 else pixels  # dark on light, as in all heat maps
    result: Array = np.moveaxis(pixels, 0, -1).clip(0, 1)
    return result


def _grey(photo: Photo, box: Box, shape: tuple[int, ...]) -> Array:
    top, left, bottom, right = box
    colors = photo.colors[top:bottom, left:right] @ np.array([0.299, 0.587, 0.114])
    drawn = ImageOps.autocontrast(Image.fromarray((255 * colors).round().astype(np.uint8)), cutoff=0.5)
    kind = Image.Resampling.NEAREST if max(colors.shape) <= SHARP else Image.Resampling.LANCZOS
    sharp = drawn.resize((shape[1], shape[0]), kind).filter(ImageFilter.UnsharpMask(1, 60, 0))
    return np.asarray(sharp, dtype=float) / 255


__all__ = [
    "NodeThumbnails",
    "Photo",
    "has_blue",
    "is_cropped",
    "node_thumbnails",
    "painted",
    "photo_pixels",
    "region_areas",
    "region_places",
]
