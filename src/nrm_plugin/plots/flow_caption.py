"""Captions that describe the main results of a flow in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from ..measure.flow_graph import FlowGraph, FlowLayer, FlowNode
from .flow_columns import is_difference, node_name
from .flow_finding import densest, groups_of, is_spread, leading, listed, members_of, sign_of, target_name
from .ribbons import short_percent

NO_BREAK = "\u00a0"
NAMED = 3
"""Maximum number of nodes in a list."""
NAMED_WALKS, NAMED_WALK, LEAST_WALK = 2, 0.1, 1e-3
"""Maximum number of named walks, smallest relevance of a named walk, and smallest mentioned relevance."""
WORTH_SAYING = 0.01
"""Smallest mentioned relevance."""
WIDE = 0.1
"""Minimum relevance at which the widest ribbon between two layers is named."""
CANCELS = 0.2
"""Relevance of either sign in a layer above which the caption states both totals."""
FEW = 0.25
"""Fraction of relevance below which the caption states how little the shown channels of a layer account for."""
PATH, PATHS = "path through one node of each layer", "paths through one node of each layer"
Walks = Sequence[tuple[Sequence[str], float]]
"""Walks over groups, sorted by decreasing mass, as pairs of node keys (from the input to the output) and mass."""


def flow_caption(
    graph: FlowGraph,
    target: str = "",
    walks: Walks = (),
    areas: Mapping[str, float] | None = None,
    places: Mapping[str, str] | None = None,
) -> str:
    """Describes the main results of a flow: where relevance comes from, the strongest walks, and negative evidence.

    If the groups were read from a file, the last sentence names it.

    Args:
        graph: Flow graph to describe.
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
    target = target or target_name(graph)
    ways = [_strongest_walks(graph, walks), *_narrow_ribbons(graph, walks)] if walks else _ways(graph)
    parts = [_parts(graph, target, areas or {}, places or {}), _densest(graph, areas or {})]
    sentences = [*parts, _few_channels(graph), *ways, _against(graph, target), _totals(graph), *_elsewhere(graph)]
    sentences += [f"The groups are from {graph.origin}."] if graph.origin else []
    return " ".join(sentence for sentence in sentences if sentence)


def named_walks(walks: Walks) -> Walks:
    """Returns the walks that a caption names. Their absolute mass is at least :data:`NAMED_WALK`."""
    return [(keys, mass) for keys, mass in walks[:NAMED_WALKS] if abs(mass) >= NAMED_WALK]


def named(node: FlowNode, graph: FlowGraph) -> str:
    """Returns the name of a node for use in a sentence, with its layer unless that is the input or the output."""
    name = node_name(node)
    return name if node.layer in ("input", "output") else f"{name} of {node.layer}"


def _parts(graph: FlowGraph, target: str, areas: Mapping[str, float], places: Mapping[str, str]) -> str:
    """States which nodes of the lowest layer carry most of the relevance."""
    if not graph.layers:
        return ""
    lower, sign = graph.layers[-1], sign_of(graph)
    nodes = groups_of(lower)
    chosen = [node for node in leading(lower, sign) if sign * node.mass >= WORTH_SAYING]
    verb = "comes from" if lower.name == "input" else "passes through"
    link = verb.split()[1]
    sources = []
    for node in chosen:
        notes = [places.get(node.key, ""), f"{round(100 * areas[node.key])}% of the area" if node.key in areas else ""]
        said = ", ".join(note for note in notes if note)
        sources.append(
            f"{short_percent(node.mass)} {link} {_unbroken(named(node, graph))}{f' ({said})' if said else ''}"
        )
    if not sources:
        return ""
    others = [node.mass for node in nodes if node not in chosen]
    more = f"; the other {len(others)} shown together have {short_percent(sum(others))}" if len(others) > 1 else ""
    return f"Of {target}, {listed(sources).replace(f' {link} ', f' {verb} ', 1)}{more}."


def _densest(graph: FlowGraph, areas: Mapping[str, float]) -> str:
    """Names the image part with the most relevance per area, unless it has the most relevance or the title names it."""
    nodes, sign = groups_of(graph.layers[-1]) if graph.layers else [], sign_of(graph)
    node = densest(graph.layers[-1], sign, areas) if nodes and areas else None
    if (
        node is None
        or is_spread(graph.layers[-1], sign, areas)
        or sign * node.mass >= max(sign * one.mass for one in nodes)
    ):
        return ""
    ratio = sign * node.mass / areas[node.key]
    return f"Relevance is densest in {_unbroken(named(node, graph))}: {ratio:.2g} times its share of the area."


def _few_channels(graph: FlowGraph) -> str:
    """States how much of the relevance the shown channels of each layer account for, if it is less than a quarter."""
    few = [layer for layer in graph.layers[::-1] if _shows_few(layer)]
    if not few:
        return ""
    said = [f"the {len(layer.groups)} shown channels of {layer.name} carry {_share(layer)}" for layer in few]
    text = listed(said)
    return f"{text[:1].upper()}{text[1:]}; groups of channels (--groups, or over='groups') show all of it."


def _shows_few(layer: FlowLayer) -> bool:
    """Returns True if the shown channels of a layer account for so little relevance that the caption states it."""
    return (
        bool(layer.others)
        and members_of(layer) == "channels"
        and sum(map(abs, layer.masses)) < FEW * (sum(map(abs, layer.masses)) + abs(layer.rest))
    )


def _share(layer: FlowLayer) -> str:
    return short_percent(round(sum(layer.masses), 5))


def _ways(graph: FlowGraph) -> list[str]:
    """Describes the widest ribbon between the shown groups of each pair of adjacent hidden layers."""
    sentences = []
    for number, joint in enumerate(graph.joints):
        upper, lower = graph.layers[number : number + 2]
        groups = joint[: len(upper.groups), : len(lower.groups)]
        if upper.name == "output" or lower is graph.layers[-1] or not groups.size:
            continue
        above, below = np.unravel_index(int(np.abs(groups).argmax()), groups.shape)
        if abs(groups[above, below]) >= WIDE:
            ribbon = f"{node_name(lower.nodes[below])}{NO_BREAK}→ {node_name(upper.nodes[above])}"
            kinds = {members_of(layer) for layer in (lower, upper)}
            members = kinds.pop() if len(kinds) == 1 else "nodes"
            sentences.append(
                f"The widest ribbon between the shown {members} of {lower.name} and {upper.name} is {ribbon}: "
                f"{short_percent(float(groups[above, below]))}."
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
    said = [f"{walk_name(graph, keys)} ({short_percent(mass)})" for keys, mass in named_walks(walks)]
    if not said:
        most = short_percent(walks[0][1])
        return f"No single walk ({PATH}) stands out: the strongest of {count} from {lowest} to the output has {most}."
    verb = "is" if len(said) == 1 else "are"
    even = f"an even split would give each {short_percent(sign_of(graph) / count)}"
    return f"The strongest of {count} walks ({PATHS}) from {lowest} to the output {verb} {listed(said)}; {even}."


def _narrow_ribbons(graph: FlowGraph, walks: Walks) -> list[str]:
    """Explains why a ribbon is narrower than a named walk: other walks through it have the opposite sign."""
    ribbons = {(edge.lower.key, edge.upper.key): edge.mass for edge in graph.edges}
    narrow = {
        pair: (ribbons.get(pair, 0.0), math.copysign(1, mass))
        for keys, mass in named_walks(walks)
        for pair in pairwise(keys)
        if short_percent(mass) != short_percent(ribbons.get(pair, 0.0))
        and abs(mass) > math.copysign(1, mass) * ribbons.get(pair, 0.0)
    }
    if not narrow:
        return []
    said = [f"{walk_name(graph, pair)} ({short_percent(mass)})" for pair, (mass, _) in narrow.items()]
    signs = {sign for _, sign in narrow.values()}
    kind = "of the other sign" if len(signs) == 2 else "negative" if signs == {1} else "positive"
    if len(said) == 1:
        return [f"The ribbon {said[0]} is narrower, since other walks through it are {kind} and cancel part of it."]
    return [f"The ribbons {listed(said)} are narrower, since other walks through them are {kind} and cancel part."]


def _against(graph: FlowGraph, target: str) -> str:
    """Names the groups with the most relevance of the sign opposite to the total, in the layer that has the most."""
    sign = sign_of(graph)
    groups = [node for layer in graph.layers[1:] for node in layer.nodes if node.kind == "group"]
    opposed = sorted((node for node in groups if sign * node.mass <= -WORTH_SAYING), key=lambda node: sign * node.mass)
    worst = [node for node in opposed if node.layer == opposed[0].layer][:NAMED]
    said = [f"{named(node, graph)} with {short_percent(node.mass)}" for node in worst]
    return f"{'Against' if sign > 0 else 'For'} {target}: {listed(said)}." if said else ""


def _totals(graph: FlowGraph) -> str:
    """States the total of either sign in the layer where most relevance cancels, such as "100% = 141% − 41%"."""
    if is_difference(graph):
        return ""
    totals = {
        layer.name: [sum(max(sign * node.mass, 0.0) for node in layer.nodes) for sign in (1, -1)]
        for layer in graph.layers
    }
    name, (positive, negative) = max(totals.items(), key=lambda total: min(total[1]), default=("", (0.0, 0.0)))
    if min(positive, negative) <= CANCELS:
        return ""
    said = f"{short_percent(positive - negative)} = {short_percent(positive)} − {short_percent(negative)}"
    return f"In {name}, {said}, the totals of its nodes for and against."


def _elsewhere(graph: FlowGraph) -> list[str]:
    """Describes how much relevance passes through the rest of a layer, is absorbed, or bypasses a layer."""
    sentences = []
    rest = max(graph.layers, key=lambda layer: abs(layer.rest), default=None)
    if rest is not None and rest.others and abs(rest.rest) >= 0.1 and not _shows_few(rest):
        others = f"{rest.others} channels" if members_of(rest) == "channels" else f"{rest.others}"
        sentences.append(f"The other {others} of {_layer_text(rest)} have {short_percent(rest.rest)}.")
    lowest = graph.layers[-1] if graph.layers else None
    if lowest is not None and abs(lowest.sink) >= WORTH_SAYING:
        sentences.append(f"{short_percent(lowest.sink)} is lost to biases and constants above {_layer_text(lowest)}.")
    around = max(graph.layers, key=lambda layer: abs(layer.bypass), default=None)
    if around is not None and abs(around.bypass) >= WORTH_SAYING:
        sentences.append(f"{short_percent(around.bypass)} bypasses {_layer_text(around)}.")
    return sentences


def _layer_text(layer: FlowLayer) -> str:
    return f"the {layer.name}" if layer.name in ("input", "output") else layer.name


__all__ = ["Walks", "flow_caption", "named_walks", "walk_name"]
