"""Captions that describe the largest numbers of a flow in sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from ..measure.flow_graph import FlowGraph, FlowLayer, FlowNode
from .flow_columns import NUMBERED, node_name
from .flow_notes import is_group
from .ribbons import percent

NO_BREAK = "\u00a0"
NAMED = 3
"""Largest number of nodes in a list."""
NAMED_WALKS, NAMED_WALK, LEAST_WALK = 2, 0.02, 1e-3
"""Largest number of walks that are named, the least relevance of one, and that of one whose relevance is said."""
ENOUGH = 0.6
"""Fraction of the positive relevance of a node for which the listed nodes below it account."""
WORTH_SAYING = 0.01
"""Relevance below this value is not mentioned."""
Walks = Sequence[tuple[Sequence[str], float]]
"""Walks over groups, strongest first: the keys of their nodes, from the input up, and their masses."""


def flow_caption(
    graph: FlowGraph,
    target: str = "",
    walks: Walks = (),
    areas: Mapping[str, float] | None = None,
    places: Mapping[str, str] | None = None,
) -> str:
    """Describes a flow by its largest numbers: the origin of the relevance, its main path, and negative evidence.

    Args:
        graph: The graph.
        target: Name of the explained output; by default, the name of the only output node.
        walks: The strongest walks over the groups of all layers, as from
            :meth:`~nrm_plugin.search.group_walks.GroupWalks.through_nodes`.
        areas: Fraction of the image that each input node covers, keyed by node.
        places: Where in the image each input node lies, such as "upper left", keyed by node.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = RelevanceMeasure(net, torch.tensor([[1.0, 2.0, 3.0]]), 1).flow(["output", "1", "input"])
        >>> "% of “1”" in flow_caption(graph)
        True
    """
    target = target or _target(graph)
    ways = [_strongest_walks(graph, walks)] if walks else _ways(graph)
    parts = _parts(graph, target, areas or {}, places or {})
    sentences = [parts, _largest_groups(graph), *ways, _against(graph, target), *_elsewhere(graph)]
    return " ".join(sentence for sentence in sentences if sentence)


def difference_caption(graph: FlowGraph, first: str, second: str, places: Mapping[str, str] | None = None) -> str:
    """Describes the difference between two flows by the parts of the image, and the other nodes, that differ most.

    Args:
        graph: The first flow minus the second.
        first: Name of the first flow, whose excess is red.
        second: Name of the second flow, whose excess is blue.
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
            notes = [", ".join(filter(None, (places.get(node.key, ""), percent(abs(node.mass))))) for node in most]
            parts = [f"{named(node, graph)} ({note})" for node, note in zip(most, notes, strict=True)]
            clauses += [f"{_listed(parts)} {where}"] if parts else []
        sentences += [f"More for {name}: {'; '.join(clauses)}."] if clauses else []
    return " ".join(sentences) or "The flows hardly differ."


def named_walks(walks: Walks) -> Walks:
    """Returns the walks that a caption names: the strongest, unless the relevance is spread over very many."""
    return [(keys, mass) for keys, mass in walks[:NAMED_WALKS] if mass >= NAMED_WALK]


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


def _parts(graph: FlowGraph, target: str, areas: Mapping[str, float], places: Mapping[str, str]) -> str:
    """Says which nodes of the lowest layer hold most of the relevance, by whatever way."""
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


def _largest_groups(graph: FlowGraph) -> str:
    """Names the largest groups of the uppermost layer that has groups of channels."""
    for layer in graph.layers[:-1]:
        groups = [node for node in layer.nodes if is_group(node.label, layer.name)]
        most = sorted((node for node in groups if node.mass >= WORTH_SAYING), key=lambda node: -node.mass)[:NAMED]
        if len(most) > 1:
            return f"In {layer.name}, {_listed([f'{node.label} ({percent(node.mass)})' for node in most])} carry most."
    return ""


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
            sentences.append(f"The widest ribbon is {named(other, graph)} → {named(one, graph)}: {share}.")
    return sentences


def walk_name(graph: FlowGraph, keys: Sequence[str]) -> str:
    """Returns the node names along a walk, from the input up, without their layers, which the figure shows."""
    names = {node.key: node_name(node) for node in graph.nodes}
    return f"{NO_BREAK}→ ".join(_unbroken(names[key]) for key in keys)


def _unbroken(text: str) -> str:
    """Returns a text with non-breaking spaces, so that it stays on one line."""
    return text.replace(" ", NO_BREAK)


def _strongest_walks(graph: FlowGraph, walks: Walks) -> str:
    """Names the walks over groups that carry most."""
    if not walks or walks[0][1] < LEAST_WALK:
        return ""
    count = math.prod(len(layer.groups) for layer in graph.layers)
    lowest = "a part" if graph.layers[-1].name == "input" else f"a group of {graph.layers[-1].name}"
    said = [f"{walk_name(graph, keys)} ({percent(mass)})" for keys, mass in named_walks(walks)]
    if not said:
        most = percent(walks[0][1])
        return f"No single walk stands out: the strongest of {count} from {lowest} to the output has {most}."
    verb = "is" if len(said) == 1 else "are"
    even = f"each would have {percent(1 / count)} if all had the same"
    return f"The strongest of {count} walks from {lowest} to the output {verb} {_listed(said)}; {even}."


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
    if rest is not None and rest.others and abs(rest.rest) >= 0.1:
        are_channels = rest.name not in NUMBERED and any(label.isdecimal() for label in rest.labels)
        others = f"{rest.others} channels" if are_channels else f"{rest.others}"
        sentences.append(f"The other {others} of {_layer_text(rest)} have {percent(rest.rest)}.")
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


__all__ = ["Walks", "difference_caption", "flow_caption", "named_walks", "walk_name"]
