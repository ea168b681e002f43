"""Audit of a recording: every operation from inputs to output must have a kernel or only copy values (0/1 route)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UncoveredLayerError
from ..functional.unsupported import unknown_node_error
from ..kernels.step import step_of
from ..model.inputs_and_outputs import NOT_JOINED
from ..model.zero_one_routes import is_route_node, operation
from .graph import Graph
from .module_names import INPUT, OUTPUT
from .taps import Observed


def check_joined(graph: Graph, leaves: Sequence[Tensor]) -> None:
    """Raises :class:`InputError` if the output does not depend on any input."""
    if not any(vertex.leaf is leaf for vertex in graph.vertices for leaf in leaves):
        raise InputError(NOT_JOINED)


def check_known(graph: Graph, observed: Iterable[Observed]) -> None:
    """Raises :class:`UnsupportedOperationError` if a vertex is neither a step nor a 0/1 route.

    Such a vertex would silently lead to wrong results.
    """
    for vertex in graph.vertices:
        if vertex.step is None and not is_route_node(vertex.node):
            raise unknown_node_error(vertex.node, _near(vertex.node, observed))


def _near(node: Any, observed: Iterable[Observed]) -> str:
    names = [seen.label.name for seen in observed if seen.node is node and seen.label.name not in (INPUT, OUTPUT)]
    return f", in {names[0]!r}" if names else ""


def check_covered(module: nn.Module, name: str, args: tuple[Any, ...], output: Tensor) -> None:
    """Raises :class:`UncoveredLayerError` if a module without children has no rule and is not a 0/1 route."""
    visited = {value.grad_fn for value in args if isinstance(value, Tensor)}
    stack = [output.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in visited or step_of(node) is not None:
            continue
        if not is_route_node(node):
            raise UncoveredLayerError(
                f"layer {name!r} ({type(module).__name__}) has no rule in this composite, and is not a 0/1 route "
                f"(its operation is {operation(node)}). Zennit would use its plain gradient, which does not "
                "conserve relevance. Map the layer to a rule in the composite's layer_map, or pass "
                "Normalized(composite, uncovered='gradient') to account for the relevance that its gradient does not "
                "propagate."
            )
        visited.add(node)
        stack += [below for below, _ in node.next_functions]
