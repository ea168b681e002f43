"""Flow graphs as plotly figures, and as self-contained HTML files that include plotly's script."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import extra
from ..measure.flow_graph import FlowEdge, FlowGraph, FlowNode
from ..measure.flow_heat_maps import NodeMaps, thumbnail
from .flow import KINDS, NEGLIGIBLE, drawn_nodes, layer_note
from .heatmaps import DIVERGING
from .ribbons import DARK, Palette, percent

BOTH = Palette(positive="#d6453d", negative="#3d8bd4")
"""Colours that are visible on light and on dark backgrounds."""
MARGIN = 0.02
"""Fraction of the width that is left free on each side, since plotly moves nodes at 0 and 1."""
NODE, PAD, THUMBNAIL = 32, 14, 56
"""Average height of a node, distance between two nodes, and size of a thumbnail (added to the distance), in pixels."""
EDGES = {"l": 20, "r": 20, "t": 170, "b": 20}
"""Margins around the drawing, in pixels."""
HELP = (
    "The input is on the left. The height of a node is its relevance, the width of a ribbon the joint relevance of its "
    "two nodes.<br>Red is positive, blue negative; grey is the rest of a layer, orange the relevance that does not "
    "cross it: absorbed above, or bypass."
)
SCRIPT = """const plot = document.getElementById("{plot_id}"), {title, dark} = plot.layout.meta;
document.title = title;
if (matchMedia("(prefers-color-scheme: dark)").matches) {
  document.body.style.background = dark.paper_bgcolor;
  Plotly.relayout(plot, dark);
}"""


def sankey(graph: FlowGraph, heading: str = "Flow of relevance", maps: NodeMaps | None = None) -> str:
    """Returns an HTML page. Hovering over a node shows its mass; over a ribbon, its joint and conditional relevance.

    Args:
        graph: The graph.
        heading: Title of the page.
        maps: Heat maps of the nodes, from :func:`~nrm_plugin.measure.flow_maps`, drawn as thumbnails next to the nodes.

    Raises:
        MissingExtraError: If plotly is not installed.
        FlowError: If a layer has too many groups for a figure.
    """
    config = {"displayModeBar": False, "responsive": True}
    page: str = sankey_figure(graph, heading, maps).to_html(config, include_plotlyjs=True, post_script=SCRIPT)
    return page


def save_sankey(
    graph: FlowGraph, path: str | Path, heading: str = "Flow of relevance", maps: NodeMaps | None = None
) -> Path:
    """Writes the page of :func:`sankey` to a file, and returns its path."""
    path = Path(path)
    path.write_text(sankey(graph, heading, maps), encoding="utf-8")
    return path


def sankey_figure(graph: FlowGraph, heading: str = "Flow of relevance", maps: NodeMaps | None = None) -> Any:
    """Returns the plotly figure of :func:`sankey`."""
    objects = extra("plotly.graph_objects", "html")
    maps = maps or {}
    columns = [[node for _, node in drawn_nodes(layer)] for layer in graph.layers[::-1]]
    nodes = [node for column in columns for node in column]
    links = list(_links(graph, nodes))
    pad = PAD + THUMBNAIL * bool(maps)
    height = (NODE + pad) * max(map(len, columns))
    places = _places(columns, _sizes(links, len(nodes)), height, pad)
    drawn = objects.Sankey(
        arrangement="snap",
        node={
            "label": [_escaped(node.label) for node in nodes],
            "color": [_color(node.mass, 1, node) for node in nodes],
            "x": [x for x, _ in places],
            "y": [y for _, y in places],
            "customdata": [f"{_name(node)}<br>mass {percent(node.mass)}" for node in nodes],
            "hovertemplate": "%{customdata}<extra></extra>",
            "pad": pad,
            "thickness": 16,
            "line": {"width": 0},
        },
        link={key: [link[key] for link in links] for key in ("source", "target", "value", "color", "customdata")}
        | {"hovertemplate": "%{customdata}<extra></extra>"},
    )
    sides = THUMBNAIL * bool(maps)
    return objects.Figure(drawn).update_layout(
        title={"text": _title(graph, heading, maps), "x": 0, "xref": "paper", "y": 1, "yref": "container",
               "yanchor": "top", "pad": {"t": 16}, "font": {"size": 13}},
        height=height + EDGES["t"] + EDGES["b"],
        margin=EDGES | {"l": EDGES["l"] + sides, "r": EDGES["r"] + sides},
        font={"size": 13, "color": BOTH.ink},
        annotations=[_layer_heading(graph, column) for column in range(len(columns))],
        images=[
            _thumbnail(maps[node.key], place, THUMBNAIL / height)
            for node, place in zip(nodes, places, strict=True)
            if node.key in maps
        ],
        meta={"title": heading, "dark": {"paper_bgcolor": DARK.paper, "font.color": DARK.ink}},
    )  # fmt: skip


def _links(graph: FlowGraph, nodes: Sequence[FlowNode]) -> Iterator[dict[str, Any]]:
    numbers = {node.key: number for number, node in enumerate(nodes)}
    for edge in graph.edges:
        ends = edge.lower, edge.upper
        if abs(edge.mass) > NEGLIGIBLE and all(node.key in numbers for node in ends):
            source, target = (numbers[node.key] for node in ends)
            color, text = _color(edge.mass, 0.45, *ends), _hover_text(edge)
            yield {"source": source, "target": target, "value": abs(edge.mass), "color": color, "customdata": text}


def _sizes(links: Sequence[dict[str, Any]], count: int) -> NDArray[np.float64]:
    """Returns the relevance that plotly draws for each node: the larger of the sums of widths on both sides."""
    sides = np.zeros((2, count))
    for link in links:
        sides[0, link["source"]] += link["value"]
        sides[1, link["target"]] += link["value"]
    sizes: NDArray[np.float64] = sides.max(0)
    return sizes


def _places(
    columns: Sequence[Sequence[FlowNode]], sizes: NDArray[np.float64], height: float, pad: float
) -> list[tuple[float, float]]:
    """Computes the centres of the nodes as fractions of the drawing, from the left and the top; columns are centred.

    Plotly scales the heights of nodes such that the fullest column fits.
    """
    parts = np.split(sizes, np.cumsum([len(column) for column in columns])[:-1])
    unit = min((height - pad * (len(part) - 1)) / max(part.sum(), 1e-12) for part in parts if len(part))
    places = []
    for column, part in enumerate(parts):
        bottoms = np.cumsum(part * unit + pad)  # bottoms of the nodes, each with the distance to the next
        top = (height - bottoms[-1] + pad) / 2 if len(part) else 0
        centres = (top + bottoms - pad - part * unit / 2) / height
        places += [(_x(column, len(columns)), float(y)) for y in centres.clip(0.001, 0.999)]
    return places


def _x(column: int, count: int) -> float:
    return MARGIN + (1 - 2 * MARGIN) * column / max(count - 1, 1)


def _title(graph: FlowGraph, heading: str, maps: NodeMaps) -> str:
    lines = [f"<b style='font-size:20px'>{_escaped(heading)}</b>", HELP]
    if graph.carried is not None and len(graph.layers) > 1:
        lines.append(f"Relevance through shown groups in all layers: {percent(graph.carried)}.")
    if maps:
        lines.append("Heat maps: relevance of the input given the node, each on its own scale.")
    return "<br>".join(lines)


def _layer_heading(graph: FlowGraph, column: int) -> dict[str, Any]:
    layer, x = graph.layers[::-1][column], _x(column, len(graph.layers))
    anchor = "left" if x <= MARGIN else "right" if x >= 1 - MARGIN else "center"
    text = f"<b>{_escaped(layer.name)}</b><br><span style='font-size:11px'>{layer_note(layer)}</span>"
    return {"x": x, "y": 1, "yshift": 48, "xref": "paper", "yref": "paper", "text": text, "showarrow": False,
            "xanchor": anchor, "align": anchor, "yanchor": "top"}  # fmt: skip


def _thumbnail(values: NDArray[np.float64], place: tuple[float, float], size: float) -> dict[str, Any]:
    """Returns an image to the left of a node; in the last column, to the right, outside the drawing."""
    small = thumbnail(values)
    limit = float(np.abs(small).max()) or 1.0
    colors = matplotlib.colormaps[DIVERGING](0.5 + 0.5 * small / limit, bytes=True)[..., :3]
    factor = max(1, 2 * THUMBNAIL // max(small.shape))  # browsers would interpolate
    is_last = place[0] >= 1 - MARGIN
    return {"source": Image.fromarray(colors.repeat(factor, 0).repeat(factor, 1)), "xref": "paper", "yref": "paper",
            "x": place[0] + (0.01 if is_last else -0.01), "y": 1 - place[1], "sizex": 1, "sizey": size,
            "xanchor": "left" if is_last else "right", "yanchor": "middle"}  # fmt: skip


def _color(value: float, opacity: float, *nodes: FlowNode) -> str:
    kinds = {KINDS[node.kind] for node in nodes}
    hue = BOTH.off if "off" in kinds else BOTH.other if "other" in kinds else BOTH.of(value)
    if kinds != {""} and opacity < 1:
        opacity = 0.3
    red, green, blue = (int(hue[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _escaped(text: str) -> str:
    # Quotation marks stay: no text is inside an attribute, and plotly does not know the entity of one.
    return html.escape(text, quote=False)


def _name(node: FlowNode) -> str:
    return f"{_escaped(node.layer)} <b>{_escaped(node.label)}</b>"


def _hover_text(edge: FlowEdge) -> str:
    """Returns the text about joint relevance, and conditional relevance given each node with sufficient mass."""
    upper, lower = _name(edge.upper), _name(edge.lower)
    lines = [f"{upper} → {lower}", f"joint relevance {percent(edge.mass)}"]
    if abs(edge.upper.mass) > NEGLIGIBLE:
        lines.append(f"{lower} given {upper}: {percent(edge.given_upper)}")
    if abs(edge.lower.mass) > NEGLIGIBLE:
        lines.append(f"{upper} given {lower}: {percent(edge.given_lower)}")
    return "<br>".join(lines)


__all__ = ["sankey", "sankey_figure", "save_sankey"]
