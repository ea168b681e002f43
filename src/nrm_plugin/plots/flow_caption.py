"""Captions that describe the main results of a flow in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from ..measure.flow_graph import FlowGraph, FlowLayer, FlowNode
from .flow_columns import NUMBERED, node_name
from .flow_notes import is_group
from .ribbons import percent

NO_BREAK = "\u00a0"
NAMED = 3
"""Maximum number of nodes in a list."""
NAMED_WALKS, NAMED_WALK, LEAST_WALK = 2, 0.02, 1e-3
"""Maximum number of named walks, smallest relevance of a named walk, and smallest relevance that is mentioned."""
ENOUGH = 0.6
"""Fraction of the total positive relevance that the listed nodes should account for."""
WORTH_SAYING = 0.01
"""Relevance below this value is not mentioned."""
DENSE = 1.25
"""Smallest ratio of relevance to area for which an image part is mentioned as the densest."""
FEW = 0.25
"""If the shown channels of a layer account for a smaller share of relevance, the caption states this."""
PATH, PATHS = "path through one node of each layer", "paths through one node of each layer"
Walks = Sequence[tuple[Sequence[str], float]]
"""Walks over groups, sorted by decreasing mass: the keys of their nodes, from the input to the output, and masses."""


def flow_caption(
    graph: FlowGraph,
    target: str = "",
    walks: Walks = (),
    areas: Mapping[str, float] | None = None,
    places: Mapping[str, str] | None = None,
) -> str:
    """Describes the main results of a flow: where relevance comes from, its strongest walks, and negative evidence.

    Args:
        graph: The flow graph.
        target: Name of the explained output; by default, the name of the output node with the largest mass.
        walks: The strongest walks over the groups of all layers, as returned by
            :meth:`~nrm_plugin.search.group_walks.GroupWalks.through_nodes`.
        areas: Fraction of the image that each input node covers, keyed by node.
        places: Location of each input node in the image, such as "upper left", keyed by node.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = RelevanceMeasure(net, torch.tensor([[1.0, 2.0, 3.0]]), 1).flow(["output", "1", "input"])
        >>> "% of “1”" in flow_caption(graph)
        True
    """
    target = target or _target(graph)
    ways = [_strongest_walks(graph, walks), *_narrow_ribbons(graph, walks)] if walks else _ways(graph)
    parts = [_parts(graph, target, areas or {}, places or {}), _densest(graph, areas or {})]
    layers = [_few_channels(graph), _largest_groups(graph)]
    sentences = [*parts, *layers, *ways, _against(graph, target), *_elsewhere(graph)]
    return " ".join(sentence for sentence in sentences if sentence)


def difference_caption(graph: FlowGraph, first: str, second: str, places: Mapping[str, str] | None = None) -> str:
    """Describes the difference between two flows in terms of the image parts and other nodes that differ most.

    Args:
        graph: The first flow minus the second.
        first: Name of the first flow; where it is larger, the figure is red.
        second: Name of the second flow; where it is larger, the figure is blue.
        places: As in :func:`flow_caption`.
    """
    places = places or {}
    nodes = [node for layer in graph.layers if layer.name != "output" for node in layer.nodes if node.kind == "group"]
    sentences = []
    for name, sign in ((first, 1), (second, -1)):
        clauses = []
        for where, is_input in (("in the image", True), ("in the network", False)):
            own = [node for node in nodes if (node.layer == "input") == is_input and sign * node.mass >= WORTH_SAYING]
            most = sorted(own, key=lambda node: -sign * node.mass)[:NAMED]
            notes = [", ".join(filter(None, (places.get(node.key, ""), percent(node.mass)))) for node in most]
            parts = [f"{named(node, graph)} ({note})" for node, note in zip(most, notes, strict=True)]
            clauses += [f"{_listed(parts)} {where}"] if parts else []
        sentences += [f"More for {name}: {'; '.join(clauses)}."] if clauses else []
    return " ".join(sentences) or "The flows hardly differ."


def named_walks(walks: Walks) -> Walks:
    """Returns the walks to be named in a caption, with an absolute mass of at least :data:`NAMED_WALK`."""
    return [(keys, mass) for keys, mass in walks[:NAMED_WALKS] if abs(mass) >= NAMED_WALK]


def named(node: FlowNode, graph: FlowGraph) -> str:
    """Returns the name of a node as used in a sentence, with its layer unless this is the input or the output."""
    name = node_name(node)
    return name if node.layer in ("input", "output") else f"{name} of {node.layer}"


def _target(graph: FlowGraph) -> str:
    groups = [node for node in graph.layers[0].nodes if node.kind == "group"] if graph.layers else []
    if graph.layers and graph.layers[0].name == "output" and groups:
        label = max(groups, key=lambda node: abs(node.mass)).label
        return label if label.startswith(("“", "class ")) else f"“{label}”"
    return "all relevance"


def _parts(graph: FlowGraph, target: str, areas: Mapping[str, float], places: Mapping[str, str]) -> str:
    """States which nodes of the lowest layer carry most of the relevance."""
    if not graph.layers:
        return ""
    lower = graph.layers[-1]
    nodes = lower.nodes[: len(lower.groups)]
    chosen = [nodes[place] for place in _leading(np.array([node.mass for node in nodes]))]
    verb = "comes from" if lower.name == "input" else "passes through"
    link = verb.split()[1]
    sources = []
    for node in chosen:
        notes = [places.get(node.key, ""), f"{round(100 * areas[node.key])}% of the area" if node.key in areas else ""]
        said = ", ".join(note for note in notes if note)
        sources.append(f"{percent(node.mass)} {link} {_unbroken(named(node, graph))}{f' ({said})' if said else ''}")
    if not sources:
        return ""
    others = [node.mass for node in nodes if node not in chosen]
    more = f"; the other {len(others)} shown together have {percent(sum(others))}" if len(others) > 1 else ""
    return f"Of {target}, {_listed(sources).replace(f' {link} ', f' {verb} ', 1)}{more}."


def _densest(graph: FlowGraph, areas: Mapping[str, float]) -> str:
    """Names the image part with the most relevance per area, unless it is also the one with the most relevance."""
    nodes = graph.layers[-1].nodes[: len(graph.layers[-1].groups)] if graph.layers else []
    known = [node for node in nodes if areas.get(node.key, 0.0) > 0 and node.mass >= WORTH_SAYING]
    if len(known) < 2:
        return ""
    densest = max(known, key=lambda node: node.mass / areas[node.key])
    ratio = densest.mass / areas[densest.key]
    if densest is max(known, key=lambda node: node.mass) or ratio < DENSE:
        return ""
    return f"Relevance is densest in {_unbroken(named(densest, graph))}: {ratio:.2g} times its share of the area."


def _few_channels(graph: FlowGraph) -> str:
    """States how much relevance the shown channels of layers account for, if it is less than a quarter."""
    few = [layer for layer in graph.layers[::-1] if _shows_few(layer)]
    if not few:
        return ""
    said = [f"the {len(layer.groups)} shown channels of {layer.name} carry {_share(layer)}" for layer in few]
    text = _listed(said)
    return f"{text[:1].upper()}{text[1:]}; groups of channels (--groups, or over='groups') show all of it."


def _shows_few(layer: FlowLayer) -> bool:
    """Returns whether the shown channels of a layer account for so little relevance that the caption states it."""
    return (
        bool(layer.others)
        and _members(layer) == "channels"
        and sum(map(abs, layer.masses)) < FEW * (sum(map(abs, layer.masses)) + abs(layer.rest))
    )


def _share(layer: FlowLayer) -> str:
    return percent(round(sum(layer.masses), 5))


def _members(layer: FlowLayer) -> str:
    """Returns the term for the shown groups of a layer, ``"channels"`` or ``"groups"``."""
    return "channels" if layer.name not in NUMBERED and any(map(str.isdecimal, layer.labels)) else "groups"


def _largest_groups(graph: FlowGraph) -> str:
    """Names the largest groups in the uppermost layer with groups of channels."""
    for layer in graph.layers[:-1]:
        groups = [node for node in layer.nodes if is_group(node.label, layer.name)]
        most = sorted((node for node in groups if node.mass >= WORTH_SAYING), key=lambda node: -node.mass)[:NAMED]
        if len(most) > 1:
            return f"In {layer.name}, {_listed([f'{node.label} ({percent(node.mass)})' for node in most])} carry most."
    return ""


def _leading(values: np.ndarray) -> list[int]:
    """Returns the indices of the largest values that account for enough of the positive sum, at most :data:`NAMED`."""
    order = np.argsort(-values)
    total = values.clip(min=0).sum()
    chosen: list[int] = []
    for place in order[:NAMED]:
        if values[place] < WORTH_SAYING or values[chosen].sum() >= ENOUGH * total:
            break
        chosen.append(int(place))
    return chosen


def _ways(graph: FlowGraph) -> list[str]:
    """Describes the widest ribbon between the shown groups of each pair of adjacent hidden layers."""
    sentences = []
    for number, joint in enumerate(graph.joints):
        upper, lower = graph.layers[number : number + 2]
        groups = joint[: len(upper.groups), : len(lower.groups)]
        if upper.name == "output" or lower is graph.layers[-1] or not groups.size:
            continue
        above, below = np.unravel_index(int(np.abs(groups).argmax()), groups.shape)
        if abs(groups[above, below]) >= WORTH_SAYING:
            ribbon = f"{node_name(lower.nodes[below])}{NO_BREAK}→ {node_name(upper.nodes[above])}"
            kinds = {_members(layer) for layer in (lower, upper)}
            members = kinds.pop() if len(kinds) == 1 else "nodes"
            sentences.append(
                f"The widest ribbon between the shown {members} of {lower.name} and {upper.name} is {ribbon}: "
                f"{percent(float(groups[above, below]))}."
            )
    return sentences


def walk_name(graph: FlowGraph, keys: Sequence[str]) -> str:
    """Returns the names of the nodes along a walk, from the input to the output, without their layers."""
    names = {node.key: node_name(node) for node in graph.nodes}
    return f"{NO_BREAK}→ ".join(_unbroken(names[key]) for key in keys)


def _unbroken(text: str) -> str:
    """Replaces spaces with non-breaking spaces."""
    return text.replace(" ", NO_BREAK)


def _strongest_walks(graph: FlowGraph, walks: Walks) -> str:
    """Describes the walks with the most relevance, of either sign, in a sentence."""
    if not walks or abs(walks[0][1]) < LEAST_WALK:
        return ""
    count = math.prod(len(layer.groups) for layer in graph.layers)
    lowest = "a part" if graph.layers[-1].name == "input" else f"a group of {graph.layers[-1].name}"
    said = [f"{walk_name(graph, keys)} ({percent(mass)})" for keys, mass in named_walks(walks)]
    if not said:
        most = percent(walks[0][1])
        return f"No single walk ({PATH}) stands out: the strongest of {count} from {lowest} to the output has {most}."
    verb = "is" if len(said) == 1 else "are"
    even = f"an even split would give each {percent(1 / count)}"
    return f"The strongest of {count} walks ({PATHS}) from {lowest} to the output {verb} {_listed(said)}; {even}."


def _narrow_ribbons(graph: FlowGraph, walks: Walks) -> list[str]:
    """Explains why ribbons are narrower than a named walk: other walks through the ribbon have the opposite sign."""
    ribbons = {(edge.lower.key, edge.upper.key): edge.mass for edge in graph.edges}
    narrow = {
        pair: (ribbons.get(pair, 0.0), math.copysign(1, mass))
        for keys, mass in named_walks(walks)
        for pair in pairwise(keys)
        if percent(mass) != percent(ribbons.get(pair, 0.0))
        and abs(mass) > math.copysign(1, mass) * ribbons.get(pair, 0.0)
    }
    if not narrow:
        return []
    said = [f"{walk_name(graph, pair)} ({percent(mass)})" for pair, (mass, _) in narrow.items()]
    signs = {sign for _, sign in narrow.values()}
    kind = "of the other sign" if len(signs) == 2 else "negative" if signs == {1} else "positive"
    if len(said) == 1:
        return [f"The ribbon {said[0]} is narrower, since other walks through it are {kind} and cancel part of it."]
    return [f"The ribbons {_listed(said)} are narrower, since other walks through them are {kind} and cancel part."]


def _against(graph: FlowGraph, target: str) -> str:
    groups = [node for layer in graph.layers[1:] for node in layer.nodes if node.kind == "group"]
    against = sorted((node for node in groups if node.mass <= -WORTH_SAYING), key=lambda node: node.mass)
    worst = [node for node in against if node.layer == against[0].layer][:NAMED]
    said = [f"{named(node, graph)} with {percent(node.mass)}" for node in worst]
    return f"Against it: {_listed(said)}." if said else ""


def _elsewhere(graph: FlowGraph) -> list[str]:
    """Describes how much relevance passes through the rest of a layer, is absorbed, or bypasses a layer."""
    sentences = []
    rest = max(graph.layers, key=lambda layer: abs(layer.rest), default=None)
    if rest is not None and rest.others and abs(rest.rest) >= 0.1 and not _shows_few(rest):
        others = f"{rest.others} channels" if _members(rest) == "channels" else f"{rest.others}"
        sentences.append(f"The other {others} of {_layer_text(rest)} have {percent(rest.rest)}.")
    lowest = graph.layers[-1] if graph.layers else None
    if lowest is not None and abs(lowest.sink) >= WORTH_SAYING:
        sentences.append(f"{percent(lowest.sink)} is lost to biases and constants above {_layer_text(lowest)}.")
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


__all__ = ["Walks", "difference_caption", "flow_caption", "named_walks", "walk_name"]
