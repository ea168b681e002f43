"""Flow graphs as HTML pages: single files with SVG and a small script that need neither network nor packages."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..measure.flow_graph import FlowGraph
from ..measure.flow_heat_maps import NodeMaps
from .flow import curve, scene_of
from .flow_caption import Walks, flow_caption, walk_name
from .flow_columns import node_name, region_name
from .flow_finding import flow_finding
from .flow_legend import SIGNS
from .flow_notes import Counts, Pairs, counted
from .flow_parts import Band, DrawnNode, Label, Scene
from .flow_thumbnails import (
    NodeThumbnails,
    Photo,
    Pixels,
    node_thumbnails,
    painted,
    photo_pixels,
    region_areas,
    region_places,
)
from .ribbons import DARK, LIGHT, Palette, percent, short_percent

WIDTH, COLUMN = 10.0, 2.0
"""Nominal width of the drawing and least width per layer in inches, the references for font sizes. The page scales the
drawing to the window."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""Content security policy that makes the browser block all network requests of the page."""


def sankey(
    graph: FlowGraph,
    heading: str = "Flow of relevance",
    maps: NodeMaps | None = None,
    *,
    image: Photo | Tensor | None = None,
    caption: str | None = None,
    pairs: Pairs | None = None,
    walks: Walks = (),
    maps_at: str = "",
    signs: tuple[str, str] = SIGNS,
    counts: Counts | None = None,
    finding: str | None = None,
    made: str = "",
) -> str:
    """Returns a flow graph as a self-contained HTML page for light and dark backgrounds.

    Hovering over a node or a ribbon shows its values. Clicking on a node, or pressing Enter, conditions on this node:
    all nodes whose joint relevance with it is known from the graph or from ``pairs`` then show their relevance given
    this node. Arrow keys move between nodes, Escape resets the view, and ``/`` starts a search. A table for screen
    readers contains all values.

    Args:
        graph: Flow graph to draw.
        heading: Title of the page.
        maps: Heat maps of the nodes, from :func:`~nrm_plugin.measure.flow_maps`, drawn as thumbnails.
        image: As in :func:`~nrm_plugin.plots.flow_figure`.
        caption: As in :func:`~nrm_plugin.plots.flow_figure`.
        pairs: Joint relevance of nodes in non-adjacent layers, from
            :func:`~nrm_plugin.measure.flow_heat_maps.flow_maps_and_pairs`.
        walks: Walks over the groups of all layers, as in :func:`~nrm_plugin.plots.flow_caption.flow_caption`. They are
            listed, and each is highlighted while its item is hovered or focused.
        maps_at: As in :func:`~nrm_plugin.plots.flow_figure`.
        signs: As in :func:`~nrm_plugin.plots.flow_figure`.
        counts: As in :func:`~nrm_plugin.plots.flow_figure`.
        finding: As in :func:`~nrm_plugin.plots.flow_figure`.
        made: As in :func:`~nrm_plugin.plots.flow_figure`.

    Raises:
        FlowError: If a layer has too many groups for a figure.
    """
    photo = image if isinstance(image, Photo) or image is None else Photo(image)
    thumbnails = node_thumbnails(graph, maps or {}, photo)
    width = max(WIDTH, COLUMN * len(graph.layers))
    areas = region_areas(photo) if photo is not None else {}
    scene = scene_of(
        graph, "", "", thumbnails, None, width, signs, maps_at, pairs=pairs, counts=counts, finding="", areas=areas
    )
    said = flow_caption(graph, walks=walks) if caption is None else caption
    title = flow_finding(graph) if finding is None else finding
    line = f'\n<p class="heading">{escape(made)}</p>' if made else ""
    names = {node.key: node_name(counted(node, counts or {})) for node in graph.nodes}
    data = json.dumps(_data(graph, scene, names, pairs or {}, walks), allow_nan=False).replace("<", "\\u003c")
    nodes = {node.node.key: node for node in scene.nodes}
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(POLICY)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(heading)}</title>\n<style>\n{_style()}</style>\n</head>\n<body>\n<main>\n<header>",
        _photograph(photo, thumbnails, graph) if photo else "",
        f'<div>\n<p class="heading">{escape(heading)}</p>{line}\n<h1>{escape(title)}</h1>\n<p>{escape(said)}</p>'
        if title
        else f"<div>\n<h1>{escape(heading)}</h1>{line}\n<p>{escape(said)}</p>",
        f"{_listed_walks(graph, walks)}{CONTROLS}\n</div>\n</header>",
        f'<svg id="flow" viewBox="0 0 {scene.width:.1f} {scene.bottom:.1f}" role="group" '
        f'aria-label="{escape(": ".join(filter(None, ("flow", made))))}">',
        DEFINITIONS,
        *(_text(label) for label in scene.labels),
        '<g class="bands">',
        *(_band(number, band, nodes) for number, band in enumerate(scene.bands)),
        "</g>",
        *(_node(node, names[node.node.key], thumbnails) for node in scene.nodes),
        f'</svg>\n<p class="legend">{escape(" ".join(line.text for line in scene.legend))}</p>',
        f"{_table(graph, counts or {})}\n</main>",
        '<div id="tip" hidden></div>',
        f'<script type="application/json" id="data">{data}</script>',
        f"<script>\n{_resource('flow_page.js')}</script>\n</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def save_sankey(
    graph: FlowGraph,
    path: str | Path,
    heading: str = "Flow of relevance",
    maps: NodeMaps | None = None,
    *,
    image: Photo | Tensor | None = None,
    caption: str | None = None,
    pairs: Pairs | None = None,
    walks: Walks = (),
    maps_at: str = "",
    signs: tuple[str, str] = SIGNS,
    counts: Counts | None = None,
    finding: str | None = None,
    made: str = "",
) -> Path:
    """Writes the page returned by :func:`sankey` to a file and returns the path."""
    path = Path(path)
    path.write_text(
        sankey(
            graph,
            heading,
            maps,
            image=image,
            caption=caption,
            pairs=pairs,
            walks=walks,
            maps_at=maps_at,
            signs=signs,
            counts=counts,
            finding=finding,
            made=made,
        ),
        encoding="utf-8",
    )
    return path


CONTROLS = (
    '<p class="controls"><label>Search <input type="search" id="search" placeholder="name or layer"></label> '
    '<button type="button" id="all" hidden>Show the whole flow</button> '
    '<span id="status" role="status">Click a node to condition on it.</span></p>'
)
DEFINITIONS = (
    '<defs><pattern id="sink" width="4" height="4" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
    '<rect width="1.6" height="4"/></pattern><pattern id="bypass" width="4" height="4" patternUnits="userSpaceOnUse">'
    '<circle cx="2" cy="2" r="1.1"/></pattern></defs>'
)


def _resource(name: str) -> str:
    return files("nrm_plugin.plots").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    """Returns the style sheet with the colors of both palettes."""

    def colors(palette: Palette) -> str:
        named = {"positive": palette.positive, "negative": palette.negative, "ink": palette.ink, "pale": palette.pale,
                 "paper": palette.paper, "rest": palette.other, "off": palette.off}  # fmt: skip
        return "".join(f"--{name}: {color}; " for name, color in named.items())

    return (
        f":root {{ color-scheme: light dark; {colors(LIGHT)}}}\n"
        f"@media (prefers-color-scheme: dark) {{ :root {{ {colors(DARK)}}} }}\n{_resource('flow_page.css')}"
    )


def _listed_walks(graph: FlowGraph, walks: Walks) -> str:
    """Returns the list of walks over groups as HTML."""
    if not walks:
        return ""
    said = [f"{escape(walk_name(graph, keys))}: {short_percent(mass)}" for keys, mass in walks]
    items = [f'<li><button type="button" data-walk="{number}">{text}</button></li>' for number, text in enumerate(said)]
    summary = "<summary>Strongest walks (point to one to see it)</summary>"
    return f'<details open class="walks">{summary}<ol>{"".join(items)}</ol></details>\n'


def _photograph(photo: Photo, thumbnails: NodeThumbnails | None, graph: FlowGraph) -> str:
    """Returns the photograph with the names of the input nodes in their regions, as SVG."""
    pixels = photo_pixels(photo, thumbnails)
    height, width = pixels.shape[:2]
    names = {node.key: escape(region_name(node)) for node in graph.nodes}
    marks = [
        f'<text x="{x * width:.1f}" y="{y * height:.1f}" font-size="{0.08 * width:.1f}">{names.get(key, "")}</text>'
        for key, (x, y) in region_places(photo).items()
    ]
    image = f'<image width="{width}" height="{height}" href="{_encoded(pixels)}"/>'
    return (
        f'<svg class="photo" viewBox="0 0 {width} {height}" role="img" aria-label="{escape(_photo_text(photo))}">'
        f"{image}{''.join(marks)}</svg>"
    )


def _photo_text(photo: Photo) -> str:
    left, top, right, bottom = photo.seen
    outside = 1 - (right - left) * (bottom - top)
    note = f"; the model did not see {short_percent(outside)} of it, outside of the frame" if outside > 1e-3 else ""
    return f"the explained image{note}"


# -- drawing --------------------------------------------------------------------------------------------------------


def _text(label: Label) -> str:
    weight = " b" if label.is_bold else ""
    return (
        f'<text class="{label.tone}{weight}" x="{label.x:.1f}" y="{label.y:.1f}" font-size="{label.size:.2f}" '
        f'text-anchor="{label.anchor}">{escape(label.text)}</text>'
    )


def _band(number: int, band: Band, nodes: Mapping[str, DrawnNode]) -> str:
    points = [f"{x:.1f},{y:.2f}" for x, y in curve(band)]
    path = f"M{points[0]}C{' '.join(points[1:4])}L{points[4]}C{' '.join(points[5:8])}Z"
    return f'<path class="band {band.tone}" data-band="{number}" d="{path}" opacity="{band.strength}"/>'


def _node(node: DrawnNode, name: str, thumbnails: NodeThumbnails | None) -> str:
    box = node.box
    name = f"{node.node.layer}, {name}: {short_percent(node.node.mass)}"
    parts = [
        f'<g class="node" role="button" tabindex="-1" aria-pressed="false" aria-label="{escape(name)}" '
        f'data-key="{escape(node.node.key)}">',
        f'<rect class="hit" x="{box.x:.1f}" y="{box.y:.1f}" width="{box.width:.1f}" height="{box.height:.1f}"/>',
    ]
    if node.thumbnail is not None and thumbnails is not None:
        place = " ".join(f'{side}="{getattr(node.thumbnail, side):.1f}"' for side in ("x", "y", "width", "height"))
        for kind, palette in (("light", LIGHT), ("dark", DARK)):
            href = _encoded(painted(thumbnails, node.node.key, palette))
            parts.append(f'<image class="{kind}" {place} preserveAspectRatio="none" href="{href}"/>')
    for bar, tone in node.bars:
        fill = f' fill="url(#{tone})"' if tone in ("sink", "bypass") else ""
        parts.append(
            f'<rect class="bar {tone}"{fill} x="{bar.x:.1f}" y="{bar.y:.2f}" width="{bar.width:.1f}" '
            f'height="{max(bar.height, 0.6):.2f}"/>'
        )
    return "".join([*parts, *(_text(label) for label in node.labels), "</g>"])


def _encoded(pixels: Pixels) -> str:
    """Encodes an image as a data URL, in PNG or JPEG format, whichever is shorter."""
    image, kinds = Image.fromarray(pixels), {}
    for kind in ("png", "jpeg"):
        file = io.BytesIO()
        image.save(file, kind, **({"optimize": True} if kind == "png" else {"quality": 88, "subsampling": 0}))
        kinds[kind] = file.getvalue()
    kind = min(kinds, key=lambda name: len(kinds[name]))
    return f"data:image/{kind};base64,{base64.b64encode(kinds[kind]).decode()}"


# -- numbers --------------------------------------------------------------------------------------------------------


def _data(graph: FlowGraph, scene: Scene, names: Mapping[str, str], pairs: Pairs, walks: Walks = ()) -> dict[str, Any]:
    """Returns the data of the page: nodes with their columns, ribbons, and joint relevance of pairs of nodes."""
    keys = [node.node.key for node in scene.nodes]
    place = {key: number for number, key in enumerate(keys)}
    joint = {(edge.upper.key, edge.lower.key): edge.mass for edge in graph.edges} | dict(pairs)
    return {
        "nodes": [
            {"key": node.node.key, "name": names[node.node.key], "layer": node.node.layer, "column": node.column,
             "kind": node.node.kind, "mass": node.node.mass, "bars": len(node.bars)}
            for node in scene.nodes
        ],
        "bands": [
            {"lower": place[band.lower], "upper": place[band.upper], "mass": band.value}
            for band in scene.bands
        ],
        "pairs": [
            [place[upper], place[lower], _rounded(mass)]
            for (upper, lower), mass in joint.items()
            if upper in place and lower in place
        ],
        "known": sorted({(_column(scene, place, upper), _column(scene, place, lower))
                         for upper, lower in joint if upper in place and lower in place}),
        "walks": [[place[key] for key in keys if key in place] for keys, _ in walks],
        "signs": [1 if mass > 0 else -1 for _, mass in walks],
    }  # fmt: skip


def _column(scene: Scene, place: Mapping[str, int], key: str) -> int:
    return scene.nodes[place[key]].column


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _table(graph: FlowGraph, counts: Counts) -> str:
    """Returns HTML tables of all nodes and the largest edges, for screen readers and for copying."""
    nodes = [(node.layer, node_name(counted(node, counts)), percent(node.mass)) for node in graph.nodes
             if np.isfinite(node.mass)]  # fmt: skip
    edges = sorted(graph.edges, key=lambda edge: -abs(edge.mass))[:200]
    rows = [
        (f"{edge.lower.layer}, {node_name(edge.lower)}", f"{edge.upper.layer}, {node_name(edge.upper)}",
         percent(edge.mass), percent(edge.given_upper) if edge.upper.mass else "")
        for edge in edges
    ]  # fmt: skip
    return (
        "<details><summary>All numbers</summary>"
        + "".join(_rows(nodes, ("layer", "node", "relevance")))
        + "".join(_rows(rows, ("from", "to", "joint relevance", "share of the upper node")))
        + "</details>"
    )


def _rows(rows: Sequence[Sequence[str]], head: Sequence[str]) -> Iterator[str]:
    yield f"<table><tr>{''.join(f'<th scope=col>{escape(cell)}</th>' for cell in head)}</tr>"
    for row in rows:
        yield f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>"
    yield "</table>"


__all__ = ["sankey", "save_sankey"]
