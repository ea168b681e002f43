"""The legend of a flow figure."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..measure.flow_graph import FlowGraph
from .flow_caption import LEAST_WALK, WORTH_SAYING, Walks, named_walks
from .flow_columns import has_rests, is_difference
from .flow_notes import is_group

KEY = "The input is on the left. Heights are relevance, on one scale for all layers; {}."
GROUPS = "A1, A2, … are groups of channels (ch.) that carry relevance together, {}ordered so that few ribbons cross."
NUMBERED = "numbered by relevance and "
NOTES = (
    "Below a group: the part of the image with most of its relevance, and its share; groups without one draw on the "
    "parts much as all relevance does."
)
WALKS = "The narrow bands with dark edges are the named walks."
GROSS = (
    "Evidence for and against is drawn one above the other, and the number of a node is the difference: it is the same "
    "on both sides of a node, although more may cancel on one side."
)
SHARES = "Evidence for the output adds up to more than 100% of it, because evidence against it counts as negative."
DIFFERENCES = "Percentages are differences between shares of two outputs."
NOTHING_OFF = "Less than 0.5% is lost to biases and constants above a layer or bypasses it."
OFF = (
    "Orange is relevance that does not cross a layer: hatched if it is lost to biases and constants above (absorbed), "
    "dotted if it bypasses the layer."
)
THUMBNAILS = (
    "Thumbnails show where the relevance of a node lies, per area{}, on one colour scale per layer: a large pale part "
    "may carry more than a small strongly coloured one."
)
CROP = "A white frame in the photograph marks the part that thumbnails show."
VISIBLE, TIE = 1e-4, 1e-3
"""Smallest visible relevance of a bar, and largest difference between masses that are displayed as equal."""
SIGNS = ("evidence for the output", "evidence against it")


def key_text(
    has_thumbnails: bool,
    has_off: bool,
    signs: tuple[str, str] = SIGNS,
    maps_at: str = "",
    graph: FlowGraph | None = None,
    walks: Walks = (),
    is_cropped: bool = False,
    has_notes: bool = False,
    has_blue: bool = False,
) -> str:
    """Returns the legend of a flow figure.

    Args:
        has_thumbnails: Whether nodes have thumbnails.
        has_off: Whether nodes for walks off a layer are drawn.
        signs: Descriptions of positive and negative relevance.
        maps_at: The layer at whose positions the heat maps are computed; by default, single pixels.
        graph: The flow graph. If given, the legend explains only the elements that occur in it.
        walks: The strongest walks, as in the caption.
        is_cropped: Whether thumbnails show only a part of the photograph.
        has_notes: Whether image parts are named below groups.
        has_blue: Whether thumbnails show negative relevance.
    """
    differs = graph is not None and is_difference(graph)
    sentences = {
        KEY.format(_colors(graph, signs, has_blue)): True,
        GROUPS.format(NUMBERED if graph is not None and _are_numbered(graph) else ""): (
            graph is not None and any(is_group(node.label, node.layer) for node in graph.nodes)
        ),
        NOTES: has_notes,
        WALKS: bool(named_walks(walks)),
        GROSS: graph is not None and _cancels(graph),
        DIFFERENCES: differs,
        SHARES: graph is not None and not differs and _exceeds(graph),
        OFF: has_off,
        NOTHING_OFF: graph is not None and not differs and not has_off,
        THUMBNAILS.format(f" (at the resolution of {maps_at})" if maps_at else ""): has_thumbnails,
        CROP: is_cropped,
    }
    return " ".join(sentence for sentence, is_needed in sentences.items() if is_needed)


def _colors(graph: FlowGraph | None, signs: tuple[str, str], has_blue: bool) -> str:
    """Describes the colours that occur in a graph."""
    rest = ["grey the rest of a layer"] if graph is None or has_rests(graph) else []
    blue = [f"blue {signs[1]}"] if graph is None or has_blue or _is_negative(graph) else []
    return ", ".join([f"red is {signs[0]}", *rest, *blue])


def _is_negative(graph: FlowGraph) -> bool:
    """Returns whether a part of a bar or a ribbon is visibly negative."""
    sums = [joint.clip(max=0).sum(axis) for joint in graph.joints for axis in (0, 1)]
    masses = [[node.mass for node in graph.nodes]]
    return min((float(np.min(values)) for values in [*sums, *masses] if len(values)), default=0.0) < -VISIBLE


def _are_numbered(graph: FlowGraph) -> bool:
    """Returns whether the groups of each layer are numbered by decreasing relevance."""
    numbered = [[(int(node.label[1:]), node.mass) for node in layer.nodes if is_group(node.label, layer.name)]
                for layer in graph.layers]  # fmt: skip
    return all(one >= other - TIE for layer in numbered for (_, one), (_, other) in pairwise(sorted(layer)))


def _cancels(graph: FlowGraph) -> bool:
    """Returns whether ribbons of both signs occur."""
    return any(float(joint.min()) < -LEAST_WALK for joint in graph.joints)


def _exceeds(graph: FlowGraph) -> bool:
    """Returns whether the positive relevance of a layer sums to more than the total relevance."""
    return any(sum(max(node.mass, 0.0) for node in layer.nodes) > 1 + WORTH_SAYING for layer in graph.layers)


__all__ = ["SIGNS", "key_text"]
