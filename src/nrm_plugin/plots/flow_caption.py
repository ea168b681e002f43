"""Captions that describe the largest numbers of a flow in sentences."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from ..measure.flow_graph import FlowGraph, FlowLayer, FlowNode
from .flow_columns import node_name
from .ribbons import percent

GROUP = re.compile(r"[A-Z]\d+")
"""A name that the command assigns to a group of channels or a patch of the input."""
NO_BREAK = "\u00a0"
NAMED = 3
"""Largest number of nodes in a list."""
NAMED_WALKS, LEAST_WALK = 2, 1e-3
"""Largest number of walks that are named, and smallest relevance of a named walk."""
ENOUGH = 0.6
"""Fraction of the positive relevance of a node for which the listed nodes below it account."""
WORTH_SAYING = 0.01
"""Relevance below this value is not mentioned."""
KEY = "The input is on the left. Heights are relevance, on one scale for all layers; {}."
GROUPS = (
    "A1, A2, … are groups of channels that act together in this image; they are numbered by relevance, and ordered so "
    "that few ribbons cross."
)
WALKS = "The shares of walks are measured along the whole way; their ribbons are outlined."
SIGNS = ("evidence for", "evidence against")
OFF = (
    "Orange is relevance that does not cross a layer: hatched if it is absorbed above, dotted if it bypasses the layer."
)
THUMBNAILS = (
    "Thumbnails show relevance per area{}, on one colour scale per layer: a large pale part may carry more than a "
    "small strongly coloured one."
)


Walks = Sequence[tuple[Sequence[str], float]]
"""Walks over groups, strongest first: the keys of their nodes, from the input up, and their masses."""


def flow_caption(
    graph: FlowGraph, target: str = "", walks: Walks = (), areas: Mapping[str, float] | None = None
) -> str:
    """Describes a flow by its largest numbers: the origin of the relevance, its main path, and negative evidence.

    Args:
        graph: The graph.
        target: Name of the explained output; by default, the name of the only output node.
        walks: The strongest walks over the groups of all layers, as from
            :meth:`~nrm_plugin.search.group_walks.GroupWalks.through_nodes`.
        areas: Fraction of the image that each input node covers, keyed by node.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = RelevanceMeasure(net, torch.tensor([[1.0, 2.0, 3.0]]), 1).flow(["output", "1", "input"])
        >>> "% of “1”" in flow_caption(graph)
        True
    """
    target = target or _target(graph)
    ways = (
        [_parts(graph, target, areas or {}), _strongest_walks(graph, walks)]
        if walks
        else [_origin(graph, target), *_ways(graph)]
    )
    sentences = [*ways, _against(graph, target), *_elsewhere(graph)]
    return " ".join(sentence for sentence in sentences if sentence)


def difference_caption(graph: FlowGraph, first: str, second: str) -> str:
    """Describes the difference between two flows by the nodes that differ most.

    Args:
        graph: The first flow minus the second.
        first: Name of the first flow, whose excess is red.
        second: Name of the second flow, whose excess is blue.
    """
    nodes = [node for layer in graph.layers if layer.name != "output" for node in layer.nodes if node.kind == "group"]
    sentences = []
    for name, sign in ((first, 1), (second, -1)):
        most = sorted((node for node in nodes if sign * node.mass >= WORTH_SAYING), key=lambda node: -sign * node.mass)
        parts = [f"{named(node, graph)} ({percent(abs(node.mass)).removesuffix('%')} points)" for node in most[:NAMED]]
        sentences += [f"More for {name}: {_listed(parts)}."] if parts else []
    return " ".join(sentences) or "The flows hardly differ."


def key_text(
    has_thumbnails: bool,
    has_off: bool,
    signs: tuple[str, str] = SIGNS,
    maps_at: str = "",
    graph: FlowGraph | None = None,
    walks: Walks = (),
) -> str:
    """Returns the legend of a flow.

    Args:
        has_thumbnails: Whether nodes have thumbnails.
        has_off: Whether walks that do not cross a layer are drawn.
        signs: Descriptions of positive and negative relevance.
        maps_at: The layer whose positions the thumbnails show; by default, single pixels.
        graph: The graph, so that the legend explains only what occurs in it; by default, it explains everything.
        walks: The walks that are named.
    """
    thumbnails = THUMBNAILS.format(f", traced down to {maps_at}" if maps_at else "")
    is_grouped = graph is not None and any(GROUP.fullmatch(node.label) for node in graph.nodes if node.layer != "input")
    parts = [KEY.format(_colors(graph, signs)), *([GROUPS] if is_grouped else []), *([WALKS] if walks else [])]
    return " ".join([*parts, *([OFF] if has_off else []), *([thumbnails] if has_thumbnails else [])])


def _colors(graph: FlowGraph | None, signs: tuple[str, str]) -> str:
    """Describes the colours that occur in a graph."""
    least = min((float(joint.min()) for joint in graph.joints), default=0.0) if graph is not None else -1.0
    has_rest = graph is None or any(layer.others for layer in graph.layers)
    against = f", blue {signs[1]}" if least < -LEAST_WALK else f"; no ribbon is {signs[1]}"
    return f"red is {signs[0]}{', grey the rest of a layer' if has_rest else ''}{against}"


def named(node: FlowNode, graph: FlowGraph) -> str:
    """Returns the name of a node for use in a sentence, with its layer unless this is the input or the output."""
    name = node_name(node)
    return name if node.layer in ("input", "output") else f"{name} of {node.layer}"


def _target(graph: FlowGraph) -> str:
    groups = [node for node in graph.layers[0].nodes if node.kind == "group"] if graph.layers else []
    if graph.layers and graph.layers[0].name == "output" and groups:
        label = max(groups, key=lambda node: abs(node.mass)).label
        return label if label.startswith(("“", "class ")) else f"“{label}”"
    return "all relevance"


def _origin(graph: FlowGraph, target: str) -> str:
    """Describes which nodes in the lowest layer receive most relevance from the strongest node above."""
    if len(graph.layers) < 2:
        strongest = _strongest(graph.layers[-1]) if graph.layers else None
        return f"{percent(strongest.mass)} of {target} passes through {named(strongest, graph)}." if strongest else ""
    upper, lower = graph.layers[-2:]
    above = _strongest(upper)
    if above is None:
        return ""
    row = graph.joints[-1][upper.nodes.index(above)][: len(lower.groups)]
    chosen = _leading(row)
    if not chosen:
        return ""
    total = percent(float(row[chosen].sum()))
    sources = _listed([named(lower.nodes[place], graph) for place in chosen])
    way = "" if upper.name == "output" else f" by way of {named(above, graph)}"
    return f"{total} of {target} comes from {sources}{way}."


def _parts(graph: FlowGraph, target: str, areas: Mapping[str, float]) -> str:
    """Describes which nodes of the lowest layer receive most of the relevance, along any path."""
    lower = graph.layers[-1]
    nodes = lower.nodes[: len(lower.groups)]
    chosen = [nodes[place] for place in _leading(np.array([node.mass for node in nodes]))]
    if not chosen:
        return ""
    covers = [f" ({round(100 * areas[node.key])}% of the area)" if node.key in areas else "" for node in chosen]
    sources = [
        f"{percent(node.mass)} from {_unbroken(named(node, graph))}{cover}"
        for node, cover in zip(chosen, covers, strict=True)
    ]
    return f"Of {target}, {_listed(sources).replace(' from ', ' comes from ', 1)}."


def _leading(values: np.ndarray) -> list[int]:
    """Returns the indices of the few largest values that account for enough of the positive sum."""
    order = np.argsort(-values)
    total = values.clip(min=0).sum()
    chosen: list[int] = []
    for place in order[:NAMED]:
        if values[place] < WORTH_SAYING or values[chosen].sum() >= ENOUGH * total:
            break
        chosen.append(int(place))
    return chosen


def _ways(graph: FlowGraph) -> list[str]:
    """Describes the widest ribbon between each pair of hidden layers."""
    sentences = []
    for number, joint in enumerate(graph.joints):
        upper, lower = graph.layers[number : number + 2]
        groups = joint[: len(upper.groups), : len(lower.groups)]
        if upper.name == "output" or lower is graph.layers[-1] or not groups.size:
            continue
        above, below = np.unravel_index(int(groups.argmax()), groups.shape)
        if groups[above, below] >= WORTH_SAYING:
            one, other = upper.nodes[above], lower.nodes[below]
            share = percent(float(groups[above, below]))
            sentences.append(f"The widest way up is {named(other, graph)} → {named(one, graph)}: {share}.")
    return sentences


def walk_name(graph: FlowGraph, keys: Sequence[str]) -> str:
    """Returns the node names along a walk, from the input up, without their layers, which the figure shows."""
    names = {node.key: node_name(node) for node in graph.nodes}
    return f"{NO_BREAK}→ ".join(_unbroken(names[key]) for key in keys)


def _unbroken(text: str) -> str:
    """Returns a text with non-breaking spaces, so that it stays on one line."""
    return text.replace(" ", NO_BREAK)


def _strongest_walks(graph: FlowGraph, walks: Walks) -> str:
    """Names the walks over groups that carry the most relevance."""
    said = [f"{walk_name(graph, keys)}: {percent(mass)}" for keys, mass in walks[:NAMED_WALKS] if mass >= LEAST_WALK]
    if not said:
        return ""
    count = math.prod(len(layer.groups) for layer in graph.layers)
    even = f"an even share would be {percent(1 / count)}"
    return f"Of {count} walks, the strongest {'is' if len(said) == 1 else 'are'} {'; '.join(said)}; {even}."


def _against(graph: FlowGraph, target: str) -> str:
    groups = [node for layer in graph.layers[1:] for node in layer.nodes if node.kind == "group"]
    worst = min(groups, key=lambda node: node.mass, default=None)
    if worst is None or worst.mass > -WORTH_SAYING:
        return ""
    return f"Against it: {named(worst, graph)} with {percent(worst.mass)}."


def _elsewhere(graph: FlowGraph) -> list[str]:
    """Describes how much relevance passes through the rest of a layer, is absorbed, or bypasses a layer."""
    sentences = []
    rest = max(graph.layers, key=lambda layer: abs(layer.rest), default=None)
    if rest is not None and rest.others and abs(rest.rest) >= 0.1:
        sentences.append(f"The other {rest.others} of {rest.name} hold {percent(rest.rest)}.")
    lowest = graph.layers[-1] if graph.layers else None
    if lowest is not None and abs(lowest.sink) >= WORTH_SAYING:
        sentences.append(f"Biases and stabilizers absorb {percent(lowest.sink)} above {_layer_text(lowest)}.")
    around = max(graph.layers, key=lambda layer: abs(layer.bypass), default=None)
    if around is not None and abs(around.bypass) >= WORTH_SAYING:
        sentences.append(f"{percent(around.bypass)} bypasses {_layer_text(around)}.")
    return sentences


def _layer_text(layer: FlowLayer) -> str:
    return f"the {layer.name}" if layer.name in ("input", "output") else layer.name


def _strongest(layer: FlowLayer) -> FlowNode | None:
    groups = [node for node in layer.nodes if node.kind == "group"]
    return max(groups, key=lambda node: node.mass, default=None)


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


__all__ = ["SIGNS", "Walks", "difference_caption", "flow_caption", "key_text", "walk_name"]
