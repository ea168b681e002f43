"""Layers, nodes and edges of a flow graph."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import NRMError

Array = NDArray[np.float64]
NodeKind = Literal["group", "rest", "off"]


class FlowError(NRMError, ValueError):
    """Raised if a flow graph cannot be computed, read or plotted."""


@dataclass(frozen=True)
class FlowLayer:
    """Layer of a flow graph.

    The sum of all masses, ``sum(masses) + rest + sink + bypass``, is 1, or -1 if the measure explains a negative
    difference.

    Attributes:
        name: Name of the tap.
        groups: Indices of the shown groups.
        labels: Names of the shown groups.
        masses: Masses of the shown groups.
        rest: Mass of the neurons outside the shown groups.
        others: Number of groups that are not shown.
        sink: Mass absorbed above the layer.
        bypass: Mass of the walks that bypass the layer.
    """

    name: str
    groups: tuple[int, ...]
    labels: tuple[str, ...]
    masses: tuple[float, ...]
    rest: float
    others: int
    sink: float
    bypass: float

    @property
    def nodes(self) -> list[FlowNode]:
        """The groups, rest and off, in the order of the rows and columns of the joint relevance."""
        shown = zip(self.groups, self.labels, self.masses, strict=True)
        return [
            *(FlowNode(self.name, "group", group, label, mass) for group, label, mass in shown),
            FlowNode(self.name, "rest", None, f"{self.others} others", self.rest),
            FlowNode(self.name, "off", None, _off_label(self.sink, self.bypass), self.sink + self.bypass),
        ]

    def times(self, factor: float) -> FlowLayer:
        """Returns the layer with all masses multiplied by a factor."""
        masses = tuple(factor * mass for mass in self.masses)
        rest, sink, bypass = (factor * mass for mass in (self.rest, self.sink, self.bypass))
        return replace(self, masses=masses, rest=rest, sink=sink, bypass=bypass)


def _off_label(sink: float, bypass: float) -> str:
    if sink and bypass:
        return "absorbed or bypassing"
    return "bypassing" if bypass else "absorbed"


@dataclass(frozen=True)
class FlowNode:
    """Node of a flow graph: a set of walks at one layer.

    Attributes:
        layer: Name of the layer.
        kind: ``"group"``; ``"rest"`` for the neurons outside the shown groups; or ``"off"`` for the walks that do not
            cross the layer because they bypass it or are absorbed above it.
        group: Index of the group, or None for rest and off.
        label: Name of the node.
        mass: Mass of the walks, μ.
    """

    layer: str
    kind: NodeKind
    group: int | None
    label: str
    mass: float

    @property
    def key(self) -> str:
        """Identifier of the node, unique within the graph."""
        return f"{self.layer}/{self.kind if self.group is None else self.group}"


@dataclass(frozen=True)
class FlowEdge:
    """Edge of a flow graph: the walks through two nodes of consecutive layers.

    Attributes:
        upper: The node closer to the output.
        lower: The node closer to the input.
        mass: Joint relevance, μ(upper & lower).
    """

    upper: FlowNode
    lower: FlowNode
    mass: float

    @property
    def given_upper(self) -> float:
        """The conditional mass μ(lower given upper), or NaN if the mass of the upper node is zero."""
        return self.mass / self.upper.mass if self.upper.mass else math.nan

    @property
    def given_lower(self) -> float:
        """The conditional mass μ(upper given lower), or NaN if the mass of the lower node is zero."""
        return self.mass / self.lower.mass if self.lower.mass else math.nan
