"""Selection, order, names and colors of the drawn nodes of a flow."""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from ..measure.flow_graph import FlowError, FlowGraph, FlowLayer, FlowNode
from .arrays import Array
from .flow_order import column_orders
from .ribbons import short_percent

MAX_GROUPS = 40
"""Maximum number of groups per layer in a figure."""
LEAST_OFF, LEAST_REST = 5e-3, 2e-3
"""Smallest relevance at which the nodes for the rest of a layer and for walks off a layer are drawn."""
NUMBERED = {"input": "group", "output": "output"}
"""Terms for the groups of a layer, keyed by layer name. In all other layers, the groups are channels."""


def drawn_nodes(layer: FlowLayer, joint_mass: Array | None = None) -> list[tuple[int, FlowNode]]:
    """Returns the drawn nodes of a layer, each with its row index in the joint relevance.

    Args:
        layer: Layer of the flow graph.
        joint_mass: Size of each node, which determines whether it is drawn. By default, the absolute mass.

    Raises:
        FlowError: If the layer has too many groups for a figure.
    """
    if len(layer.groups) > MAX_GROUPS:
        raise FlowError(
            f"{layer.name} shows {len(layer.groups)} groups, but a figure can show {MAX_GROUPS}. Show fewer: "
            "graph.smaller(top=8), or coverage=0.9."
        )
    sizes = np.array([abs(node.mass) for node in layer.nodes]) if joint_mass is None else joint_mass
    least = {"group": -1.0, "rest": LEAST_REST, "off": LEAST_OFF}
    return [(row, node) for row, node in enumerate(layer.nodes) if sizes[row] > least[node.kind]]


def drawn_columns(graph: FlowGraph) -> list[list[tuple[int, FlowNode]]]:
    """Returns the drawn nodes of each layer, from the input to the output, ordered to reduce crossings of ribbons."""
    layers, joints = graph.layers[::-1], [joint.T for joint in graph.joints[::-1]]
    columns = []
    for number, layer in enumerate(layers):
        sides = [np.abs(joints[number]).sum(1)] if number < len(joints) else []
        sides += [np.abs(joints[number - 1]).sum(0)] if number else []
        masses = np.array([abs(node.mass) for node in layer.nodes])
        columns.append(drawn_nodes(layer, np.max([masses, *sides], axis=0)))
    widths = [
        joint[np.ix_([row for row, _ in left], [row for row, _ in right])]
        for joint, (left, right) in zip(joints, pairwise(columns), strict=True)
    ]
    free = [sum(node.kind == "group" for _, node in column) for column in columns]
    orders = column_orders(widths, free)
    return [[column[place] for place in order] for column, order in zip(columns, orders, strict=True)]


def has_off(graph: FlowGraph) -> bool:
    """Returns True if any node for walks off a layer is drawn."""
    return any(node.kind == "off" for column in drawn_columns(graph) for _, node in column)


def has_rests(graph: FlowGraph) -> bool:
    """Returns True if any rest node is drawn."""
    return any(node.kind == "rest" for column in drawn_columns(graph) for _, node in column)


def is_difference(graph: FlowGraph) -> bool:
    """Returns True if a graph is the difference between two flows. The masses of each layer then sum to 0."""
    return all(abs(sum(node.mass for node in layer.nodes)) < 0.5 for layer in graph.layers)


def without_output(graph: FlowGraph) -> FlowGraph:
    """Returns a difference without the output if two other layers remain.

    Each flow contains all relevance of its output. The output thus shows 100% and -100% for two classes, and nothing
    for one class in two images. Its bars would determine the scale instead of the differences.
    """
    if len(graph.layers) < 3 or graph.layers[0].name != "output":
        return graph
    return FlowGraph(graph.layers[1:], graph.joints[1:], origin=graph.origin)


def tone_of(node: FlowNode, layer: FlowLayer, value: float) -> str:
    """Returns the tone of a node, which determines its color, from its kind or the sign of its value."""
    if node.kind == "off":
        return "bypass" if abs(layer.bypass) > abs(layer.sink) else "sink"
    return "negative" if value < 0 else "rest" if node.kind == "rest" else "positive"


def node_name(node: FlowNode) -> str:
    """Returns the displayed name of a node, such as ``channel 3`` if its label is a number."""
    if node.kind != "group" or not node.label.isdecimal():
        return node.label
    return f"{NUMBERED.get(node.layer, 'channel')} {node.label}"


def layer_note(layer: FlowLayer, is_difference: bool = False) -> str:
    """Returns the number and mass of the shown groups of a layer, such as ``3 of 6: 80%`` or ``all 6: 100%``.

    For the difference between two flows, masses sum to zero and are left out.
    """
    if not layer.groups:
        return "no relevance crosses it"
    if is_difference:
        return f"{len(layer.groups)} of {len(layer.groups) + layer.others}" if layer.others else ""
    shown, share = len(layer.groups), short_percent(round(sum(layer.masses), 5))
    is_only = shown == 1 and layer.name == "output" and abs(layer.rest) < LEAST_REST  # the explained class
    if not layer.others or is_only:
        return share if shown == 1 else f"all {shown}: {share}"
    return f"{shown} of {shown + layer.others}: {share}"


def region_name(node: FlowNode) -> str:
    """Returns the name of an input region as displayed in the photograph, where a number is enough."""
    return node_name(node).removeprefix("part ").removeprefix("group ")


__all__ = [
    "MAX_GROUPS",
    "NUMBERED",
    "drawn_columns",
    "drawn_nodes",
    "has_off",
    "has_rests",
    "is_difference",
    "layer_note",
    "node_name",
    "region_name",
    "tone_of",
    "without_output",
]
