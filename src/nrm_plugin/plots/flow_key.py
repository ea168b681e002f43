"""The legend of a flow."""

from __future__ import annotations

from ..measure.flow_graph import FlowGraph
from .flow_caption import LEAST_WALK, WORTH_SAYING, Walks, named_walks
from .flow_columns import has_rests, is_difference
from .flow_notes import is_group

KEY = "The input is on the left. Heights are relevance, on one scale for all layers; {}."
GROUPS = (
    "A1, A2, … are groups of channels, found as those that carry relevance together in this image; they are numbered "
    "by relevance, and ordered so that few ribbons cross."
)
NOTES = (
    "Below a group: the part of the image that has a larger share of the group than of all relevance, and this share; "
    "without one, the group draws on all parts about alike."
)
WALKS = "The narrow bands with dark edges are the named walks."
GROSS = (
    "Evidence for and against is drawn one above the other, and the number of a node is the difference: it is the same "
    "on both sides of a node, although more may cancel on one side."
)
SHARES = "Evidence for the output adds up to more than 100% of it, because evidence against it counts as negative."
DIFFERENCES = "Percentages are differences between shares of two outputs."
NOTHING_OFF = "Less than 0.5% is absorbed above a layer or bypasses it."
OFF = (
    "Orange is relevance that does not cross a layer: hatched if it is absorbed above, dotted if it bypasses the layer."
)
THUMBNAILS = (
    "Thumbnails show where the relevance of a node lies, per area{}, on one colour scale per layer: a large pale part "
    "may carry more than a small strongly coloured one."
)
CROP = "A white frame in the photograph marks the part that thumbnails show."
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
) -> str:
    """Returns the legend of a flow.

    Args:
        has_thumbnails: Whether nodes have thumbnails.
        has_off: Whether walks that do not cross a layer are drawn.
        signs: Descriptions of positive and negative relevance.
        maps_at: The layer whose positions the thumbnails show; by default, single pixels.
        graph: The graph, so that the legend explains only what occurs in it; by default, it explains everything.
        walks: The strongest walks, as for the caption.
        is_cropped: Whether thumbnails show only a part of the photograph.
        has_notes: Whether parts of the image are named below groups.
    """
    differs = graph is not None and is_difference(graph)
    sentences = {
        KEY.format(_colors(graph, signs)): True,
        GROUPS: graph is not None and any(is_group(node.label, node.layer) for node in graph.nodes),
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


def _colors(graph: FlowGraph | None, signs: tuple[str, str]) -> str:
    """Describes the colours that occur in a graph."""
    rest = ", grey the rest of a layer" if graph is None or has_rests(graph) else ""
    return f"red is {signs[0]}{rest}, blue {signs[1]}"


def _cancels(graph: FlowGraph) -> bool:
    """Returns whether ribbons of both signs occur."""
    return any(float(joint.min()) < -LEAST_WALK for joint in graph.joints)


def _exceeds(graph: FlowGraph) -> bool:
    """Returns whether the positive shares of a layer add up to more than all relevance."""
    return any(sum(max(node.mass, 0.0) for node in layer.nodes) > 1 + WORTH_SAYING for layer in graph.layers)


__all__ = ["SIGNS", "key_text"]
