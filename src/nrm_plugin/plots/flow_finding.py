"""Main finding of a flow in one sentence, for use as the title of its figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ..measure.flow_graph import FlowGraph, FlowLayer, FlowNode
from .flow_columns import NUMBERED, is_difference, node_name
from .ribbons import percent, short_percent, times

HALF = 0.5
"""Fraction of a layer's relevance that the named nodes hold. At most :data:`NAMED` nodes are named."""
NAMED = 3
ALIKE_AREAS = 1.25
"""Largest ratio between shares of relevance and of the area, either way, at which relevance is divided among the
parts like the area. A part is dense if its ratio is at least as large.
"""
LEAST_DENSE = 0.01
"""Smallest relevance of a part that is named as dense."""
MOST_EXCESS = 0.1
"""Largest relevance that dense parts together may have beyond their share of the area if relevance is divided among
the parts like the area.
"""
CONCENTRATED = 0.25
"""Largest fraction of the image that holds half of the relevance if relevance is concentrated within the parts."""
AGAINST = -0.25
"""Minimum mass at which the finding mentions evidence against the output."""
ALIKE = 0.01
"""Largest node difference for which the finding states that two flows hardly differ."""
THROUGH, ALL = "passes through", "all relevance"
WORD_AND_NUMBER = re.compile(r"(?P<word>[^\W\d]+)\s(?P<number>\d+)")
SEVERAL = re.compile(r" \+ \d+$")
"""Suffix pattern for names of groups with several members, such as "teapot + 474"."""
Places = Mapping[str, str]
"""Location of each input node in the image, such as "upper left", keyed by node."""


def flow_finding(
    graph: FlowGraph,
    target: str = "",
    places: Places | None = None,
    areas: Mapping[str, float] | None = None,
    half_area: float = 1.0,
) -> str:
    """Returns a sentence about the main sources of relevance and the main nodes of a layer through which it passes.

    Each number is the sum of the masses of the named nodes, which the figure shows. Among the layers between the lowest
    layer and the output, the sentence describes the one in which the fewest nodes hold half of the relevance. If most
    of the relevance passes through nodes that are not shown, it says so. If the main parts of the image have about as
    much of the relevance as of the area, and no others have clearly more, it says that relevance is spread like the
    area, and names the densest part. If others have clearly more, it names these. If the masses sum to -1, because the
    explained output is behind another one, the sentence is about the evidence against it.

    Args:
        graph: Flow graph to describe.
        target: Name of the explained output; by default, the name of the only output node.
        places: Location of each input node in the image, such as "upper left", keyed by node.
        areas: Fraction of the image that each input node covers, keyed by node.
        half_area: Smallest fraction of the image that holds half of the relevance. If it is at most a quarter, the
            sentence mentions it where relevance is spread over the parts like the area.

    Returns:
        The sentence, without a full stop. It is empty for a difference between two flows, and if the lowest layer has
        no groups.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = RelevanceMeasure(net, torch.tensor([[1.0, 2.0, 3.0]]), 1).flow(["output", "1", "input"])
        >>> "% of “1” comes from" in flow_finding(graph)
        True
    """
    if not graph.layers or not graph.layers[-1].groups or is_difference(graph):
        return ""
    lowest, sign, name = graph.layers[-1], sign_of(graph), target or target_name(graph)
    verb = "comes from" if lowest.name == "input" else THROUGH
    start = f"Evidence against {name} prevails: " if sign < 0 else ""
    says = verb if sign < 0 else f"of {name} {verb}"
    where = (places or {}, areas or {})
    spread = is_spread(lowest, sign, where[1])
    if spread:
        about = "it" if sign < 0 else "Relevance" if name == ALL else f"Relevance for {name}"
        within = (
            f", but half of it lies on {short_percent(half_area)} of the image" if half_area <= CONCENTRATED else ""
        )
        clauses = [f"{about} is divided among the parts like the area{within}{_dense_clause(lowest, sign, *where)}"]
    else:
        nodes = _sources(lowest, sign, where[1])
        clauses = [_clause(lowest, says, _notes(nodes, *where), sign, nodes)]
    between = [layer for layer in graph.layers[:-1] if layer.name != "output" and layer.groups]
    if between:
        layer = max(between, key=lambda layer: _concentration(layer, sign))
        # The parts and the nodes are named apart, since relevance of the parts may pass through other nodes.
        apart = "" if spread else "of all relevance, "
        clauses.append(f"{apart}{_clause(layer, THROUGH, '', sign, leading(layer, sign))}")
    return start + "; ".join(clauses)


def is_spread(layer: FlowLayer, sign: int, areas: Mapping[str, float]) -> bool:
    """Returns True if the main parts of an image have about as much of the relevance as of the area.

    The parts with clearly more, together, must not exceed their share of the area by :data:`MOST_EXCESS`.

    Args:
        layer: The lowest layer.
        sign: Sign of the total relevance, see :func:`sign_of`.
        areas: Fraction of the image that each input node covers, keyed by node.
    """
    ratio = _density(leading(layer, sign), sign, areas)
    if ratio is None or _is_hidden(layer, sign) or not 1 / ALIKE_AREAS <= ratio <= ALIKE_AREAS:
        return False
    return sum(sign * node.mass - areas[node.key] for node in _dense(layer, sign, areas)) < MOST_EXCESS


def densest(layer: FlowLayer, sign: int, areas: Mapping[str, float]) -> FlowNode | None:
    """Returns the part of an image with the most relevance per area, or None if all have about as much.

    The arguments are those of :func:`is_spread`.
    """
    dense = _dense(layer, sign, areas)
    return max(dense, key=lambda node: sign * node.mass / areas[node.key], default=None)


def _dense(layer: FlowLayer, sign: int, areas: Mapping[str, float]) -> list[FlowNode]:
    """Returns the parts with clearly more of the relevance than of the area."""
    known = [node for node in groups_of(layer) if areas.get(node.key, 0.0) > 0 and sign * node.mass >= LEAST_DENSE]
    return [node for node in known if sign * node.mass >= ALIKE_AREAS * areas[node.key]]


def _density(nodes: Sequence[FlowNode], sign: int, areas: Mapping[str, float]) -> float | None:
    """Returns the ratio between the relevance and the area of parts together, or None if an area is unknown."""
    area = sum(areas.get(node.key, 0.0) for node in nodes)
    return sign * sum(node.mass for node in nodes) / area if area > 0 and all(n.key in areas for n in nodes) else None


def _sources(layer: FlowLayer, sign: int, areas: Mapping[str, float]) -> list[FlowNode]:
    """Returns the main parts of an image or, if they do not stand out from the area, those with clearly more."""
    nodes = leading(layer, sign)
    ratio = _density(nodes, sign, areas)
    dense = sorted(_dense(layer, sign, areas), key=lambda node: -sign * node.mass)[:NAMED]
    return dense if ratio is not None and ratio <= ALIKE_AREAS and dense else nodes


def _dense_clause(layer: FlowLayer, sign: int, places: Places, areas: Mapping[str, float]) -> str:
    """Describes the densest part of an image, such as "; densest in part 6: 4.7% on 2.4% of the area (×2.0)"."""
    node = densest(layer, sign, areas)
    if node is None:
        return ""
    where = f" ({places[node.key]})" if places.get(node.key) else ""
    ratio = times(sign * node.mass / areas[node.key])
    shares = f"{short_percent(node.mass)} on {short_percent(areas[node.key])} of the area"
    return f"; densest in {node_name(node)}{where}: {shares} ({ratio})"


def difference_finding(graph: FlowGraph, first: str, second: str, places: Places | None = None) -> str:
    """Returns a sentence that says where two flows differ most, or that they barely differ.

    Args:
        graph: Flow graph of the difference, first minus second.
        first: Name of the first flow. Red shows where it is larger.
        second: Name of the second flow. Blue shows where it is larger.
        places: As in :func:`flow_finding`.
    """
    nodes = [node for layer in graph.layers if layer.name != "output" for node in groups_of(layer)]
    largest = max((abs(node.mass) for node in nodes), default=0.0)
    if largest < ALIKE:
        return f"The flows of {first} and {second} hardly differ: no share by more than {percent(largest)}"
    sides = []
    for name, sign in ((first, 1), (second, -1)):
        said = []
        for layer in reversed(graph.layers):
            own = [node for node in nodes if node.layer == layer.name and sign * node.mass >= ALIKE]
            if own:
                node = max(own, key=lambda node: sign * node.mass)
                notes = [(places or {}).get(node.key, ""), short_percent(node.mass)]
                where = "" if layer.name == "input" else f" of {layer.name}"
                said.append(f"{node_name(node)}{where} ({', '.join(filter(None, notes))})")
        sides += [f"more for {name}: {listed(said)}"] if said else []
    text = "; ".join(sides)
    return text[:1].upper() + text[1:]


def target_name(graph: FlowGraph) -> str:
    """Returns the name of the only output in quotation marks, or "all relevance" if there are several or none."""
    groups = groups_of(graph.layers[0]) if graph.layers and graph.layers[0].name == "output" else []
    main = [node for node in groups if abs(node.mass) >= ALIKE]
    if len(main) != 1:
        return ALL
    return main[0].label if main[0].label.startswith(("“", "class ")) else f"“{main[0].label}”"


def listed(names: Sequence[str]) -> str:
    """Joins names with commas and "and"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def together(names: Sequence[str]) -> str:
    """Joins names and states a common word only once: "part 1" and "part 2" become "parts 1 and 2"."""
    matches = [WORD_AND_NUMBER.fullmatch(name) for name in names]
    words = {match["word"] if match else None for match in matches}
    if len(names) < 2 or len(words) > 1 or None in words:
        return listed(names)
    return f"{words.pop()}s {listed([match['number'] for match in matches if match])}"


def sign_of(graph: FlowGraph) -> int:
    """Returns -1 if the masses of each layer sum to -1, because the explained output is behind another one, else 1."""
    return -1 if graph.layers and sum(node.mass for node in graph.layers[0].nodes) < -0.5 else 1


def leading(layer: FlowLayer, sign: int = 1) -> list[FlowNode]:
    """Returns the fewest groups of a layer that hold half of the relevance, or the largest ones if many are needed.

    Args:
        layer: The layer.
        sign: Sign of the total relevance, see :func:`sign_of`.
    """
    chosen: list[FlowNode] = []
    for node in sorted(groups_of(layer), key=lambda node: -sign * node.mass)[:NAMED]:
        if chosen and (sign * node.mass <= 0 or sign * sum(one.mass for one in chosen) >= HALF):
            break
        chosen.append(node)
    return chosen


def _concentration(layer: FlowLayer, sign: int) -> tuple[bool, int, float]:
    """Sort key that ranks layers by how few nodes hold half of the relevance and then by how much they hold."""
    nodes = leading(layer, sign)
    total = sign * sum(node.mass for node in nodes)
    return total >= HALF, -len(nodes), total


def _is_hidden(layer: FlowLayer, sign: int) -> bool:
    """Returns True if most relevance passes through nodes that are not shown, or around the layer."""
    return (bool(layer.others) and sign * layer.rest >= HALF) or sign * layer.bypass >= HALF


def _clause(layer: FlowLayer, says: str, notes: str, sign: int, nodes: Sequence[FlowNode]) -> str:
    """Describes the given main nodes of a layer and their total mass, or the mass of the hidden nodes."""
    of_layer = "" if layer.name == "input" else f" of {layer.name}"
    if layer.others and sign * layer.rest >= HALF:
        return f"{short_percent(layer.rest)} {says} the {layer.others} {members_of(layer)}{of_layer} that are not shown"
    if sign * layer.bypass >= HALF:
        return f"{short_percent(layer.bypass)} {says.removesuffix(THROUGH)}bypasses {layer.name}"
    said = f"{short_percent(sum(node.mass for node in nodes))} {says} {together([node_name(node) for node in nodes])}"
    worst = min(groups_of(layer), key=lambda node: sign * node.mass)
    way = says.split()[-1]
    against = f" and {short_percent(worst.mass)} {way} {node_name(worst)}" if sign * worst.mass <= AGAINST else ""
    return f"{said}{notes}{of_layer}{against}"


def _notes(nodes: Sequence[FlowNode], places: Places, areas: Mapping[str, float]) -> str:
    """Returns the locations and the total area of nodes in parentheses, as far as they are known.

    There is one location for each node, in the same order, unless all nodes have the same location.
    """
    keys = [node.key for node in nodes]
    where = [places.get(key, "") for key in keys]
    where = [] if "" in where else where if len({*where}) > 1 else where[:1]
    covered = f"{round(100 * sum(areas[key] for key in keys))}% of the area" if {*keys} <= {*areas} else ""
    notes = "; ".join(filter(None, (", ".join(where), covered)))
    return f" ({notes})" if notes else ""


def members_of(layer: FlowLayer) -> str:
    """Returns the term for the shown groups of a layer, ``"channels"`` or ``"groups"``."""
    return "channels" if layer.name not in NUMBERED and any(map(str.isdecimal, layer.labels)) else "groups"


def groups_of(layer: FlowLayer) -> list[FlowNode]:
    """Returns the nodes of a layer, except those for the rest, the sink and the bypass."""
    return layer.nodes[: len(layer.groups)]


__all__ = [
    "Places",
    "densest",
    "difference_finding",
    "flow_finding",
    "groups_of",
    "is_spread",
    "leading",
    "listed",
    "members_of",
    "sign_of",
    "target_name",
    "together",
]
