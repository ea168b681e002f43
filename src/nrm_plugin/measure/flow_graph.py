"""Flow graphs as data: what is shown of each layer, what goes between, and how to hand that to other tools."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError, NRMError, extra

Array = NDArray[np.float64]
NodeKind = Literal["group", "rest", "off"]

TOP = 8
REST, OFF = "rest", "off"
FORMAT = "nrm-plugin flow 1"
NOTHING = 1e-12
"""Absolute mass up to which a group is not worth a node: what stabilizers leave of zero is of this kind."""


@dataclass(frozen=True)
class FlowLayer:
    """One layer of a flow graph; ``sum(masses) + rest + sink + bypass == 1``.

    Attributes:
        name: Of the tap.
        groups: Numbers of the groups that are shown.
        labels: What they are called.
        masses: μ of each.
        rest: μ of the other neurons of the layer.
        others: How many groups the rest stands for.
        sink: μ of what was absorbed above the layer.
        bypass: μ of what goes around it.
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
        """Groups, rest and off, in the order of the rows and columns of the joint relevance."""
        shown = zip(self.groups, self.labels, self.masses, strict=True)
        return [
            *(FlowNode(self.name, "group", group, label, mass) for group, label, mass in shown),
            FlowNode(self.name, "rest", None, f"{self.others} others", self.rest),
            FlowNode(self.name, "off", None, _off_label(self.sink, self.bypass), self.sink + self.bypass),
        ]


def _off_label(sink: float, bypass: float) -> str:
    if sink and bypass:
        return "absorbed or around"
    return "around" if bypass else "absorbed"


@dataclass(frozen=True)
class FlowNode:
    """Some walks at one layer.

    Attributes:
        layer: Name of the layer.
        kind: ``"group"``, ``"rest"`` for the neurons of no group that is shown, ``"off"`` for the walks that do not
            cross the layer: absorbed above it or around it.
        group: Number of the group.
        label: What it is called.
        mass: μ.
    """

    layer: str
    kind: NodeKind
    group: int | None
    label: str
    mass: float

    @property
    def key(self) -> str:
        """A name that no other node of the graph has."""
        return f"{self.layer}/{self.kind if self.group is None else self.group}"


@dataclass(frozen=True)
class FlowEdge:
    """Walks that are in two nodes of consecutive layers.

    Attributes:
        upper: The node nearer to the output.
        lower: The node nearer to the input.
        mass: Joint relevance, μ(upper & lower).
    """

    upper: FlowNode
    lower: FlowNode
    mass: float

    @property
    def given_upper(self) -> float:
        """μ(lower given upper); not a number where the mass of the upper node is zero."""
        return self.mass / self.upper.mass if self.upper.mass else math.nan

    @property
    def given_lower(self) -> float:
        """μ(upper given lower); not a number where the mass of the lower node is zero."""
        return self.mass / self.lower.mass if self.lower.mass else math.nan


@dataclass(frozen=True, eq=False)
class FlowGraph:
    r"""Joint relevance between groups of a few layers, of one sample.

    Made by :meth:`~nrm_plugin.RelevanceMeasure.flow`.

    Attributes:
        layers: From the output down.
        joints: For each two consecutive layers the joint relevance of all nodes, ``(K_upper + 2, K_lower + 2)``: the
            groups, then rest and off. A row sums to the mass of the upper node, a column to that of the lower one.
        carried: μ of the walks that cross a group that is shown in every layer; None where it is not known.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"], top=2)
        >>> [node.key for node in graph.nodes if node.kind != "group"]
        ['1/rest', '1/off', 'input/rest', 'input/off']
        >>> sum(node.mass for node in graph.nodes if node.layer == "1")
        1.0...
        >>> FlowGraph.from_json(graph.to_json()) == graph
        True
    """

    layers: tuple[FlowLayer, ...]
    joints: tuple[Array, ...]
    carried: float | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowGraph):
            return NotImplemented
        same = self.layers == other.layers and self.carried == other.carried
        return same and all(np.array_equal(a, b) for a, b in zip(self.joints, other.joints, strict=True))

    def __hash__(self) -> int:
        return hash((self.layers, self.carried))

    def __repr__(self) -> str:
        shown = ", ".join(f"{layer.name}: {len(layer.groups)}" for layer in self.layers)
        return f"FlowGraph({shown})"

    @property
    def nodes(self) -> list[FlowNode]:
        """All nodes, layer by layer, from the output down.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["output", "input"], top=None)
            >>> [node.key for node in graph.nodes][:3]
            ['output/0', 'output/1', 'output/rest']
        """
        return [node for layer in self.layers for node in layer.nodes]

    @property
    def edges(self) -> list[FlowEdge]:
        """The edges whose joint relevance is not zero.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["output", "input"], top=None)
            >>> {edge.upper.key for edge in graph.edges if edge.upper.kind == "group"}
            {'output/1'}
        """
        found = []
        for (upper, lower), joint in zip(pairwise(self.layers), self.joints, strict=True):
            above, below = upper.nodes, lower.nodes
            found += [FlowEdge(above[a], below[b], float(joint[a, b])) for a, b in np.argwhere(joint)]
        return found

    def smaller(
        self, top: int | None = None, min_mass: float | None = None, coverage: float | None = None
    ) -> FlowGraph:
        """The graph with fewer groups; those left out are added to the rest of their layer, exactly.

        Args:
            top: Most groups of a layer.
            min_mass: Smallest absolute mass of a group.
            coverage: Of each layer the fewest groups that hold this share of the absolute mass of the groups shown.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"], top=None)
            >>> graph.smaller(top=1)
            FlowGraph(1: 1, input: 1)
        """
        check_thresholds(top, min_mass, coverage)
        kept = [chosen(np.array(layer.masses), top, min_mass, coverage) for layer in self.layers]
        layers = tuple(_lumped_layer(layer, places) for layer, places in zip(self.layers, kept, strict=True))
        sums = [_lumping(len(layer.groups), places) for layer, places in zip(self.layers, kept, strict=True)]
        joints = tuple(up @ joint @ down.T for joint, (up, down) in zip(self.joints, pairwise(sums), strict=True))
        return FlowGraph(layers, joints, self.carried if layers == self.layers else None)

    # -- other forms ------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The graph as numbers, text, lists and dictionaries.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> sorted(graph.to_dict())
            ['carried', 'format', 'joints', 'layers']
        """
        layers = [
            {
                "name": layer.name,
                "nodes": [{"group": node.group, "kind": node.kind, "label": node.label, "mass": node.mass}
                          for node in layer.nodes],
                "others": layer.others,
                "sink": layer.sink,
                "bypass": layer.bypass,
            }
            for layer in self.layers
        ]  # fmt: skip
        joints = [joint.tolist() for joint in self.joints]
        return {"format": FORMAT, "layers": layers, "joints": joints, "carried": self.carried}

    def to_json(self, path: str | Path | None = None) -> str:
        """The graph as JSON, also written to a file where one is named.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> graph.to_json()[:30]
            '{"format": "nrm-plugin flow 1"'
        """
        text = json.dumps(self.to_dict(), allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    @classmethod
    def from_json(cls, source: str | Path) -> FlowGraph:
        """The graph of :meth:`to_json`: its text, or the path of its file.

        Raises:
            FlowError: It is none.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> FlowGraph.from_json(graph.to_json()) == graph
            True
        """
        try:
            text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
            found = json.loads(text)
            if found["format"] != FORMAT:
                raise ValueError(f"its format is {found['format']!r}, not {FORMAT!r}")
            layers = tuple(_read_layer(entry) for entry in found["layers"])
            joints = tuple(np.array(joint, dtype=float) for joint in found["joints"])
            sizes = [len(layer.groups) + 2 for layer in layers]
            if [joint.shape for joint in joints] != list(pairwise(sizes)):
                raise ValueError("its joint relevance does not fit its layers")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise FlowError(f"this is no flow graph of to_json(): {error}.") from error
        return cls(layers, joints, found.get("carried"))

    def to_networkx(self) -> Any:
        """A ``networkx.DiGraph`` from the output down, masses as attributes; needs networkx.

        Raises:
            MissingExtraError: It is not installed.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> graph.to_networkx().nodes["1/off"]["label"]
            'absorbed'
        """
        networkx = extra("networkx", "graph")
        found = networkx.DiGraph(**({} if self.carried is None else {"carried": self.carried}))
        for place, layer in enumerate(self.layers):
            for node in layer.nodes:
                about = {"layer": node.layer, "kind": node.kind, "label": node.label, "mass": node.mass, "place": place}
                found.add_node(node.key, **about, **({} if node.group is None else {"group": node.group}))
        for edge in self.edges:
            found.add_edge(edge.upper.key, edge.lower.key, mass=edge.mass)
        return found

    def to_graphml(self, path: str | Path | IO[bytes]) -> None:
        """Writes GraphML, for Gephi, Cytoscape and the like, to a path or an open file; needs networkx.

        Raises:
            MissingExtraError: It is not installed.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> import io
            >>> file = io.BytesIO()
            >>> graph.to_graphml(file)
            >>> b"<graphml" in file.getvalue()
            True
        """
        extra("networkx", "graph").write_graphml_xml(self.to_networkx(), path)

    def to_pandas(self) -> tuple[Any, Any]:
        """Two data frames, of nodes and of edges; needs pandas.

        Raises:
            MissingExtraError: It is not installed.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> nodes, edges = graph.to_pandas()
            >>> list(nodes.columns)
            ['key', 'layer', 'kind', 'group', 'label', 'mass']
        """
        pandas = extra("pandas", "graph")
        nodes = [(node.key, node.layer, node.kind, node.group, node.label, node.mass) for node in self.nodes]
        edges = [(e.upper.key, e.lower.key, e.mass, e.given_upper, e.given_lower) for e in self.edges]
        frames = (
            pandas.DataFrame(nodes, columns=["key", "layer", "kind", "group", "label", "mass"]),
            pandas.DataFrame(edges, columns=["upper", "lower", "mass", "given_upper", "given_lower"]),
        )
        frames[0]["group"] = frames[0]["group"].astype("Int64")
        return frames


class FlowError(NRMError, ValueError):
    """A flow graph that cannot be made, read or drawn."""


# -- which groups ---------------------------------------------------------------------------------------------------


def check_thresholds(top: int | None, min_mass: float | None, coverage: float | None) -> None:
    """Raises :class:`~nrm_plugin.errors.InputError` for thresholds that mean nothing."""
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise InputError(f"top={top!r} must be a whole number of at least 1, or None for all groups.")
    if min_mass is not None and not 0 <= min_mass < math.inf:
        raise InputError(f"min_mass={min_mass!r} must be a number of at least 0.")
    if coverage is not None and not 0 < coverage <= 1:
        raise InputError(f"coverage={coverage!r} must be above 0 and at most 1: 0.9 for 90 %.")


def chosen(masses: Array, top: int | None, min_mass: float | None, coverage: float | None) -> list[int]:
    r"""The groups to show, those of largest absolute mass first; all, in their order, where there is no threshold.

    With a coverage ``s`` the fewest whose absolute masses hold that share: :math:`\sum_{kept} |\mu| \ge s \sum |\mu|`.
    Where there is any threshold, groups without mass are not shown.
    """
    if top is None and min_mass is None and coverage is None:
        return list(range(len(masses)))
    size = np.abs(masses)
    order = [int(place) for place in np.argsort(-size, kind="stable") if size[place] > NOTHING]
    if coverage is not None and order:
        held = np.cumsum(size[order])
        order = order[: int(np.searchsorted(held, coverage * held[-1] * (1 - 1e-12))) + 1]
    if min_mass is not None:
        order = [place for place in order if size[place] >= min_mass]
    return order[:top]


def _lumping(count: int, kept: Sequence[int]) -> Array:
    """``(kept + 2, count + 2)``: adds the nodes of a layer up to those of the smaller graph."""
    sums = np.zeros((len(kept) + 2, count + 2))
    sums[-2, :-1] = 1
    sums[-1, -1] = 1
    for row, place in enumerate(kept):
        sums[row, place], sums[-2, place] = 1, 0
    return sums


def _lumped_layer(layer: FlowLayer, kept: Sequence[int]) -> FlowLayer:
    dropped = [place for place in range(len(layer.groups)) if place not in set(kept)]
    return replace(
        layer,
        groups=tuple(layer.groups[place] for place in kept),
        labels=tuple(layer.labels[place] for place in kept),
        masses=tuple(layer.masses[place] for place in kept),
        rest=layer.rest + sum(layer.masses[place] for place in dropped),
        others=layer.others + len(dropped),
    )


def _read_layer(entry: Mapping[str, Any]) -> FlowLayer:
    *groups, rest, off = entry["nodes"]
    if (rest["kind"], off["kind"]) != (REST, OFF):
        raise ValueError("the last two nodes of a layer are 'rest' and 'off'")
    return FlowLayer(
        entry["name"],
        tuple(int(node["group"]) for node in groups),
        tuple(str(node["label"]) for node in groups),
        tuple(float(node["mass"]) for node in groups),
        float(rest["mass"]),
        int(entry["others"]),
        float(entry["sink"]),
        float(entry["bypass"]),
    )
