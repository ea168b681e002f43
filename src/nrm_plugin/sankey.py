"""A flow graph as one HTML file to hover over, with plotly's script inside: no network is needed to look at it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .flow import FlowGraph, FlowLayer, FlowNode, extra
from .flow_plots import KINDS, NEGLIGIBLE, drawn_nodes
from .ribbons import Palette, percent

BOTH = Palette(positive="#d6453d", negative="#3d8bd4")
"""Colours that can be seen on light and on dark paper."""
MARGIN = 0.02
"""Left free at the sides, as a share of the drawing: plotly moves nodes that are at 0 or 1."""
ROOM = 46
"""Pixels of height for a node."""
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
</style>
</head>
<body>
<h1>{title}</h1>
<p>{help}</p>
<p>{carried}</p>
{drawing}
</body>
</html>
"""


def sankey(graph: FlowGraph, heading: str = "Flow of relevance") -> str:
    """The text of an HTML file: hovering over a node gives its mass, over a ribbon its joint and conditional relevance.

    Args:
        graph: The graph.
        heading: Title of the page.

    Raises:
        MissingExtraError: plotly is not installed.
        FlowError: A layer shows more groups than there is room for.
    """
    figure = _figure(graph)
    drawing = extra("plotly.io", "html").to_html(
        figure, full_html=False, include_plotlyjs=True, config={"displayModeBar": False, "responsive": True}
    )
    carried = ""
    if graph.carried is not None and len(graph.layers) > 1:
        carried = f"Through shown groups in all layers: {percent(graph.carried)} of all relevance."
    return PAGE.format(title=html.escape(heading), help=HELP, carried=carried, drawing=drawing)


def save_sankey(graph: FlowGraph, path: str | Path, heading: str = "Flow of relevance") -> Path:
    """Writes :func:`sankey` to a file; returns its path."""
    path = Path(path)
    path.write_text(sankey(graph, heading), encoding="utf-8")
    return path


def _figure(graph: FlowGraph) -> object:
    objects = extra("plotly.graph_objects", "html")
    layers = graph.layers[::-1]
    found = [drawn_nodes(layer) for layer in layers]
    first = np.cumsum([0, *map(len, found)])
    nodes = [node for column in found for _, node in column]
    places = [place for column, layer in enumerate(found) for place in _places(column, layer, len(layers))]
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
    drawn = objects.Sankey(
        arrangement="snap",
        node={
            "label": [html.escape(node.label) for node in nodes],
            "color": [_color(node.mass, 1, node) for node in nodes],
            "x": [x for x, _ in places],
            "y": [y for _, y in places],
            "customdata": [_about(node) for node in nodes],
            "hovertemplate": "%{customdata}<extra></extra>",
            "pad": 14,
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
    height = 90 + ROOM * max((len(column) for column in found), default=1)
    figure = objects.Figure(drawn)
    figure.update_layout(
        height=height,
        margin={"l": 20, "r": 20, "t": 70, "b": 20},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"size": 13, "color": BOTH.ink},
        annotations=[_heading(layer, _across(column, len(layers))) for column, layer in enumerate(layers)],
    )
    return figure


def _across(column: int, count: int) -> float:
    return MARGIN + (1 - 2 * MARGIN) * column / max(count - 1, 1)


def _places(column: int, nodes: Sequence[tuple[int, FlowNode]], count: int) -> list[tuple[float, float]]:
    """Where the middles of the nodes are, in shares of the drawing, from the left and from the top."""
    heights = np.array([max(abs(node.mass), 0.01) for _, node in nodes])
    ends = np.cumsum(heights) / heights.sum() if len(heights) else heights
    middles = ends - heights / max(heights.sum(), 1e-12) / 2
    return [(_across(column, count), float(np.clip(y, 0.001, 0.999))) for y in middles]


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
