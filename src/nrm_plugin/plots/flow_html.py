"""A flow graph as one HTML file to hover over, with plotly's script inside: no network is needed to look at it."""

from __future__ import annotations

import base64
import gzip
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import extra
from ..measure.flow_graph import FlowGraph, FlowLayer, FlowNode
from ..measure.flow_heat_maps import Maps, thumbnail
from .flow import KINDS, NEGLIGIBLE, drawn_nodes
from .heatmaps import DIVERGING
from .ribbons import Palette, percent

BOTH = Palette(positive="#d6453d", negative="#3d8bd4")
"""Colours that can be seen on light and on dark paper."""
MARGIN = 0.02
"""Left free at the sides, as a share of the drawing: plotly moves nodes that are at 0 or 1."""
ROOM, PAD = 46, 14
"""Pixels of height for a node, and between two."""
EDGES = {"t": 70, "b": 20}
"""Pixels above and below the drawing."""
HELP = (
    "The input is at the left. Widths are relevance, joint relevance where two nodes are joined. Red speaks for what "
    "is explained, blue against it; grey is the rest of a layer, orange what does not cross it: absorbed above, or "
    "around."
)
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ --paper: #ffffff; --ink: #222222; --pale: #5c5c5c; }}
@media (prefers-color-scheme: dark) {{ :root {{ --paper: #16181c; --ink: #ececec; --pale: #a8a8a8; }} }}
body {{ margin: 1rem auto; max-width: 100rem; padding: 0 1rem; background: var(--paper); color: var(--ink);
       font: 15px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.25rem; margin: 0; }}
p {{ color: var(--pale); margin: 0.3rem 0; }}
.plotly text:not(.hovertext text) {{ fill: var(--ink) !important; text-shadow: 0 0 3px var(--paper) !important; }}
.plotly .hovertext text {{ text-shadow: none !important; }}
h2 {{ font-size: 1rem; margin: 0.8rem 0 0.2rem; }}
.maps {{ display: flex; flex-wrap: wrap; gap: 0.5rem; }}
figure {{ margin: 0; padding: 3px; border-radius: 4px; width: 96px; text-align: center; }}
figure.on {{ outline: 2px solid var(--ink); }}
figure img {{ width: 96px; image-rendering: pixelated; display: block; background: #ffffff; }}
figcaption {{ font-size: 11px; line-height: 1.2; color: var(--pale); overflow-wrap: anywhere; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{help}</p>
<p>{carried}</p>
{drawing}
{maps}
</body>
</html>
"""


SCRIPT = """<div id="flow" style="height: {height}px"></div>
<script>
(async () => {{
  const packed = Uint8Array.from(atob("{packed}"), letter => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.appendChild(script);
  const drawn = {figure};
  const box = document.getElementById("flow");
  await Plotly.newPlot(box, drawn.data, drawn.layout, {{displayModeBar: false, responsive: true}});
  const mark = (event, on) => {{
    const point = event.points[0], map = document.getElementById("map" + point.pointNumber);
    if (map && point.sourceLinks) map.classList.toggle("on", on);
  }};
  box.on("plotly_hover", event => mark(event, true));
  box.on("plotly_unhover", event => mark(event, false));
  document.body.dataset.drawn = "yes";
}})();
</script>
<noscript><p>The drawing needs JavaScript.</p></noscript>"""
"""Plotly's own script takes almost 5 MB, which every browser of the last years can unpack by itself from 2 MB."""


def sankey(graph: FlowGraph, heading: str = "Flow of relevance", maps: Maps | None = None) -> str:
    """The text of an HTML file: hovering over a node gives its mass, over a ribbon its joint and conditional relevance.

    Args:
        graph: The graph.
        heading: Title of the page.
        maps: Heat maps of its nodes, of :func:`~nrm_plugin.measure.flow_maps`: each node then has a
            thumbnail, which is marked while the node is hovered over.

    Raises:
        MissingExtraError: plotly is not installed.
        FlowError: A layer shows more groups than there is room for.
    """
    figure, nodes = _figure(graph)
    offline, plotly = extra("plotly.offline", "html"), extra("plotly.io", "html")
    packed = base64.b64encode(gzip.compress(offline.get_plotlyjs().encode(), 9, mtime=0)).decode()
    text = plotly.to_json(figure).replace("<", "\\u003c")
    drawing = SCRIPT.format(packed=packed, figure=text, height=json.loads(text)["layout"]["height"])
    carried = ""
    if graph.carried is not None and len(graph.layers) > 1:
        carried = f"Through shown groups in all layers: {percent(graph.carried)} of all relevance."
    gallery = _gallery(nodes, maps or {})
    return PAGE.format(title=html.escape(heading), help=HELP, carried=carried, drawing=drawing, maps=gallery)


def _gallery(nodes: Sequence[FlowNode], maps: Maps) -> str:
    """A row of thumbnails for each layer, from the input up, as the drawing has them from the left."""
    rows: dict[str, list[str]] = {}
    for number, node in enumerate(nodes):
        if node.key in maps:
            rows.setdefault(node.layer, []).append(
                f'<figure id="map{number}"><img alt="heat map of {html.escape(node.label)}" '
                f'src="{_image(maps[node.key])}"><figcaption>{html.escape(node.label)}: {percent(node.mass)}'
                "</figcaption></figure>"
            )
    if not rows:
        return ""
    note = "<p>Where in the input the relevance of a node comes from, given the node; each on a scale of its own.</p>"
    parts = [f'<h2>{html.escape(layer)}</h2><div class="maps">{"".join(row)}</div>' for layer, row in rows.items()]
    return "\n".join([note, *parts])


def _image(values: NDArray[np.float64]) -> str:
    """A heat map as the address of a picture that it is itself."""
    small = thumbnail(values)
    scale = float(np.abs(small).max()) or 1.0
    colors = matplotlib.colormaps[DIVERGING](0.5 + 0.5 * small / scale, bytes=True)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(colors[..., :3])).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def save_sankey(
    graph: FlowGraph, path: str | Path, heading: str = "Flow of relevance", maps: Maps | None = None
) -> Path:
    """Writes :func:`sankey` to a file; returns its path."""
    path = Path(path)
    path.write_text(sankey(graph, heading, maps), encoding="utf-8")
    return path


def _figure(graph: FlowGraph) -> tuple[object, list[FlowNode]]:
    objects = extra("plotly.graph_objects", "html")
    layers = graph.layers[::-1]
    found = [drawn_nodes(layer) for layer in layers]
    first = np.cumsum([0, *map(len, found)])
    nodes = [node for column in found for _, node in column]
    links = []
    for column, joint in enumerate(graph.joints[::-1]):
        for left, (lower, below) in enumerate(found[column]):
            for right, (upper, above) in enumerate(found[column + 1]):
                value = float(joint[upper, lower])
                if abs(value) > NEGLIGIBLE:
                    ends = (int(first[column]) + left, int(first[column + 1]) + right)
                    links.append((*ends, abs(value), _color(value, 0.45, below, above), _tip(value, below, above)))
    # A layer that nothing of any size is joined to would not be drawn at all.
    sources, targets, values, colors, tips = zip(*links, strict=True) if links else ((), (), (), (), ())
    sizes = np.zeros(len(nodes))
    for side in (sources, targets) if links else ():
        sizes = np.maximum(sizes, np.bincount(side, values, len(nodes)))
    inner = ROOM * max((len(column) for column in found), default=1)
    places = _places([sizes[first[at] : first[at + 1]].tolist() for at in range(len(found))], inner)
    drawn = objects.Sankey(
        arrangement="snap",
        node={
            "label": [html.escape(node.label) for node in nodes],
            "color": [_color(node.mass, 1, node) for node in nodes],
            "x": [x for x, _ in places],
            "y": [y for _, y in places],
            "customdata": [_about(node) for node in nodes],
            "hovertemplate": "%{customdata}<extra></extra>",
            "pad": PAD,
            "thickness": 16,
            "line": {"width": 0},
        },
        link={
            "source": sources,
            "target": targets,
            "value": values,
            "color": colors,
            "customdata": tips,
            "hovertemplate": "%{customdata}<extra></extra>",
        },
    )
    figure = objects.Figure(drawn)
    figure.update_layout(
        height=inner + sum(EDGES.values()),
        margin={"l": 20, "r": 20, **EDGES},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13, "color": BOTH.ink},
        annotations=[_heading(layer, _across(column, len(layers))) for column, layer in enumerate(layers)],
    )
    return figure, nodes


def _across(column: int, count: int) -> float:
    return MARGIN + (1 - 2 * MARGIN) * column / max(count - 1, 1)


def _places(sizes: Sequence[Sequence[float]], height: float) -> list[tuple[float, float]]:
    """Where the middles of the nodes are, in shares of the drawing, from the left and from the top.

    Args:
        sizes: Of the nodes of each column, as plotly takes them: the larger sum of the widths at either side.
        height: Of the drawing, in pixels; plotly makes nodes as large as the fullest column allows.
    """
    room = [(height - PAD * (len(column) - 1)) / max(sum(column), 1e-12) for column in sizes if column]
    unit = min(room, default=1.0)
    found = []
    for number, column in enumerate(sizes):
        heights = [size * unit for size in column]
        top = (height - sum(heights) - PAD * max(len(column) - 1, 0)) / 2
        for one in heights:
            middle = float(np.clip((top + one / 2) / height, 0.001, 0.999))
            found.append((_across(number, len(sizes)), middle))
            top += one + PAD
    return found


def _heading(layer: FlowLayer, x: float) -> dict[str, object]:
    total = len(layer.groups) + layer.others
    note = (
        f"{len(layer.groups)} of {total}: {percent(sum(layer.masses))}" if layer.groups else "no relevance crosses it"
    )
    anchor = "left" if x <= MARGIN else "right" if x >= 1 - MARGIN else "center"
    text = f"<b>{html.escape(layer.name)}</b><br><span style='font-size:11px'>{note}</span>"
    return {"x": x, "y": 1, "yshift": 48, "xref": "paper", "yref": "paper", "text": text, "showarrow": False,
            "xanchor": anchor, "align": anchor, "yanchor": "top"}  # fmt: skip


def _color(value: float, opacity: float, *nodes: FlowNode) -> str:
    kinds = {KINDS[node.kind] for node in nodes}
    hue = BOTH.off if "off" in kinds else BOTH.other if "other" in kinds else BOTH.of(value)
    if kinds != {""} and opacity < 1:
        opacity = 0.3
    red, green, blue = (int(hue[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _about(node: FlowNode) -> str:
    return f"{html.escape(node.layer)}: <b>{html.escape(node.label)}</b><br>mass {percent(node.mass)}"


def _tip(value: float, below: FlowNode, above: FlowNode) -> str:
    lines = [
        f"{_name(above)} → {_name(below)}",
        f"joint relevance {percent(value)}",
        *_conditional(value, below, above),
        *_conditional(value, above, below),
    ]
    return "<br>".join(lines)


def _name(node: FlowNode) -> str:
    return f"{html.escape(node.layer)} <b>{html.escape(node.label)}</b>"


def _conditional(value: float, node: FlowNode, condition: FlowNode) -> list[str]:
    """One line; none where the condition holds too little to divide by."""
    if abs(condition.mass) <= NEGLIGIBLE:
        return []
    return [f"{_name(node)} given {_name(condition)}: {percent(value / condition.mass)}"]


__all__ = ["sankey", "save_sankey"]
