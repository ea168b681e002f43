"""The legend of a flow figure."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..measure.flow_graph import FlowGraph, FlowNode
from .flow_caption import LEAST_WALK, WORTH_SAYING, Walks, named_walks
from .flow_columns import has_rests, is_difference
from .flow_finding import SEVERAL, sign_of
from .flow_notes import GROUP, is_group

KEY = "{} on the left. Heights are relevance, on one scale for all layers; {}."
GROUPS = "A1, A2, … are groups of channels that carry relevance together{}."
NUMBERED = ", numbered by their relevance"
ORDER = "The nodes of a layer are in an order in which few ribbons cross."
DARKER = "Strongly colored ribbons are the fewest that hold half of the relevance between two layers."
OUTPUTS = "“{}” is a group of outputs: the one with most relevance, and the number of the others."
WALKS = "The bands with edges are the named walks."
GROSS = (
    "The number of a node is evidence for minus evidence against; the bars on its two sides differ where both cancel."
)
SHARES = {
    1: "Evidence for the output adds up to more than 100%, because evidence against it is subtracted.",
    -1: "Evidence against the output adds up to more than 100%, because evidence for it is subtracted.",
}
NEGATIVE = "Each layer sums to −100%, because evidence against the output prevails."
PATCHES = "A1, B1, … are patches of the image, named by column and row."
DIFFERENCES = (
    "Each layer sums to 0. Percentages are differences between shares of two outputs: 30% of one minus 20% of the "
    "other is 10%."
)
NOTHING_OFF = "Less than 0.5% is lost to biases and constants above a layer or bypasses it."
OFF = (
    "Orange is relevance that does not cross a layer: hatched if it is lost to biases and constants above (absorbed), "
    "dotted if it bypasses the layer."
)
THUMBNAILS = (
    "Thumbnails show where the relevance of a node lies{}, whatever its amount: each is divided by the total absolute "
    "relevance of its node. On the color scale of each layer, strong color is concentrated and pale color spread out."
)
CROP = "A white frame in the photograph marks the part that thumbnails show."
INPUTS = ("input", "tokens")
"""Names of layers that are the input of a model."""
ALIKE = 1e-6
"""Difference of masses below which two groups have equal relevance."""
VISIBLE = 1e-4
"""Smallest relevance at which a bar is visible."""
SIGNS = ("evidence for the output", "evidence against it")


def key_text(
    has_thumbnails: bool,
    has_off: bool,
    signs: tuple[str, str] = SIGNS,
    maps_at: str = "",
    graph: FlowGraph | None = None,
    walks: Walks = (),
    is_cropped: bool = False,
    has_blue: bool = False,
) -> str:
    """Returns the legend of a flow figure, with one line for each topic.

    Args:
        has_thumbnails: Whether nodes have thumbnails.
        has_off: Whether nodes for walks off a layer are drawn.
        signs: Descriptions of positive and negative relevance.
        maps_at: The layer whose positions form the heat maps; by default, single pixels.
        graph: The flow graph. If given, the legend explains only the elements that occur in it.
        walks: The strongest walks, as in the caption.
        is_cropped: Whether thumbnails show only a part of the photograph.
        has_blue: Whether thumbnails show negative relevance.
    """
    differs = graph is not None and is_difference(graph)
    sign = 1 if graph is None else sign_of(graph)
    topics: tuple[dict[str, bool], ...] = (
        {
            KEY.format(_left(graph), _colors(graph, signs, has_blue)): True,
            DARKER: graph is not None and bool(graph.joints),
            WALKS: bool(named_walks(walks)),
        },
        {
            GROSS: graph is not None and _cancels(graph),
            DIFFERENCES: differs,
            NEGATIVE: sign < 0,
            SHARES[sign]: graph is not None and not differs and _exceeds(graph, sign),
            OFF: has_off,
            NOTHING_OFF: graph is not None and not differs and not has_off,
        },
        {
            GROUPS.format(NUMBERED if _is_numbered(graph) else ""): bool(_groups(graph)),
            PATCHES: graph is not None and any(_is_patch(node.label, node.layer) for node in graph.nodes),
            OUTPUTS.format(_output_group(graph)): bool(_output_group(graph)),
            ORDER: graph is not None and bool(graph.joints),
        },
        {
            THUMBNAILS.format(f" (at the resolution of {maps_at})" if maps_at else ""): has_thumbnails,
            CROP: is_cropped,
        },
    )
    lines = (" ".join(sentence for sentence, is_needed in topic.items() if is_needed) for topic in topics)
    return "\n".join(filter(None, lines))


def _groups(graph: FlowGraph | None) -> list[list[FlowNode]]:
    """Returns the groups of channels named by the command, for each layer that has any."""
    layers = [] if graph is None else [[n for n in layer.nodes if is_group(n.label, n.layer)] for layer in graph.layers]
    return [nodes for nodes in layers if nodes]


def _is_numbered(graph: FlowGraph | None) -> bool:
    """Returns True if the numbers of the groups of each layer are in the order of their absolute relevance."""
    ordered = (sorted(nodes, key=lambda node: int(node.label[1:])) for nodes in _groups(graph))
    return all(abs(first.mass) >= abs(second.mass) - ALIKE for nodes in ordered for first, second in pairwise(nodes))


def _left(graph: FlowGraph | None) -> str:
    """Describes what the first column shows."""
    return "The input is" if graph is None or graph.layers[-1].name in INPUTS else "Lower layers are"


def _output_group(graph: FlowGraph | None) -> str:
    """Returns the name of a group of outputs, such as "teapot + 474", or an empty string if there is none."""
    nodes = [node for node in graph.nodes if node.layer == "output" and node.kind == "group"] if graph else []
    return next((node.label for node in nodes if SEVERAL.search(node.label)), "")


def _colors(graph: FlowGraph | None, signs: tuple[str, str], has_blue: bool) -> str:
    """Describes the colors that occur in a graph."""
    rest = ["gray the rest of a layer"] if graph is None or has_rests(graph) else []
    blue = [f"blue {signs[1]}"] if graph is None or has_blue or _is_negative(graph) else []
    return ", ".join([f"red is {signs[0]}", *rest, *blue])


def _is_negative(graph: FlowGraph) -> bool:
    """Returns True if a ribbon, or part of a bar, is visibly negative."""
    sums = [joint.clip(max=0).sum(axis) for joint in graph.joints for axis in (0, 1)]
    masses = [[node.mass for node in graph.nodes]]
    return min((float(np.min(values)) for values in [*sums, *masses] if len(values)), default=0.0) < -VISIBLE


def _cancels(graph: FlowGraph) -> bool:
    """Returns True if ribbons of both signs occur."""
    return any(float(joint.min()) < -LEAST_WALK for joint in graph.joints)


def _exceeds(graph: FlowGraph, sign: int) -> bool:
    """Returns True if the relevance of a layer with the sign of the total sums to more than the total."""
    sums = [sum(max(sign * node.mass, 0.0) for node in layer.nodes) for layer in graph.layers]
    return max(sums, default=0.0) > 1 + WORTH_SAYING


def _is_patch(label: str, layer: str) -> bool:
    """Returns True if a node is a patch of the image named by the command."""
    return layer == "input" and GROUP.fullmatch(label) is not None


__all__ = ["SIGNS", "key_text"]
