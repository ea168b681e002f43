"""Flow graphs as data: the groups shown in each layer and their joint relevance, with export to other formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..errors import extra
from .flow_nodes import Array, FlowEdge, FlowError, FlowLayer, FlowNode
from .flow_thresholds import TOP, Thresholds, check_thresholds, merged, merging

FORMAT = "nrm-plugin flow 1"


@dataclass(frozen=True, eq=False)
class FlowGraph:
    r"""Graph of the joint relevance between groups of neurons in consecutive layers, for one sample.

    Flow graphs are returned by :meth:`~nrm_plugin.RelevanceMeasure.flow`.

    Attributes:
        layers: The layers, from the output down.
        joints: Joint relevance of the nodes of each pair of consecutive layers, of shape
            ``(K_upper + 2, K_lower + 2)``: the groups, followed by rest and off. Each row sums to the mass of the upper
            node, and each column to the mass of the lower node.
        carried: Mass of the walks that cross a shown group in every layer, or None if unknown.
        origin: Origin of the groups if they were read from a file; otherwise empty.

    Raises:
        FlowError: If a joint relevance is NaN or infinite.

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
    origin: str = ""

    def __post_init__(self) -> None:
        for (upper, lower), joint in zip(pairwise(self.layers), self.joints, strict=True):
            if not np.isfinite(joint).all():
                raise FlowError(
                    f"the joint relevance of {upper.name!r} and {lower.name!r} is not finite: numbers of very "
                    "different size cancel in it. Compute in float64, or choose other layers."
                )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, FlowGraph):
            return NotImplemented
        same = (self.layers, self.carried, self.origin) == (other.layers, other.carried, other.origin)
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
        """The edges with nonzero joint relevance.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["output", "input"], top=None)
            >>> {edge.upper.key for edge in graph.edges if edge.upper.kind == "group"}
            {'output/1'}
        """
        edges = []
        for (upper, lower), joint in zip(pairwise(self.layers), self.joints, strict=True):
            above, below = upper.nodes, lower.nodes
            edges += [FlowEdge(above[a], below[b], float(joint[a, b])) for a, b in np.argwhere(joint)]
        return edges

    def smaller(
        self, top: int | None = None, min_mass: float | None = None, coverage: float | None = None
    ) -> FlowGraph:
        """Returns a graph with fewer groups. The mass of the removed groups is added to the rest of their layer.

        Args:
            top: Maximum number of groups in each layer.
            min_mass: Smallest absolute mass of a group.
            coverage: Fraction of the absolute mass that the shown groups cover in each layer, with as few groups as
                possible.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"], top=None)
            >>> graph.smaller(top=1)
            FlowGraph(1: 1, input: 1)
        """
        thresholds = Thresholds(top, min_mass, coverage)
        shown = [thresholds.selected(np.array(layer.masses)) for layer in self.layers]
        layers = tuple(merged(layer, groups) for layer, groups in zip(self.layers, shown, strict=True))
        sums = [merging(len(layer.groups), groups) for layer, groups in zip(self.layers, shown, strict=True)]
        joints = tuple(up @ joint @ down.T for joint, (up, down) in zip(self.joints, pairwise(sums), strict=True))
        return FlowGraph(layers, joints, self.carried if layers == self.layers else None, self.origin)

    def times(self, factor: float) -> FlowGraph:
        """Returns the graph with all masses multiplied by a factor, such as the explained output.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"]).times(-1)
            >>> round(sum(node.mass for node in graph.nodes if node.layer == "1"), 5)
            -1.0
        """
        carried = None if self.carried is None else factor * self.carried
        joints = tuple(factor * joint for joint in self.joints)
        return FlowGraph(tuple(layer.times(factor) for layer in self.layers), joints, carried, self.origin)

    def to_dict(self) -> dict[str, Any]:
        """Returns the graph as nested dictionaries and lists of numbers and strings.

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
        plain = {"format": FORMAT, "layers": layers, "joints": joints, "carried": self.carried}
        return plain | ({"origin": self.origin} if self.origin else {})

    def to_json(self, path: str | Path | None = None) -> str:
        """Returns the graph as JSON. Also writes it to a file if a path is given.

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
        """Reads a graph from a JSON string written by :meth:`to_json` or from a file with such a string.

        Raises:
            FlowError: If the source is not the JSON of a flow graph.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> FlowGraph.from_json(graph.to_json()) == graph
            True
        """
        try:
            text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
            entries = json.loads(text)
            if entries["format"] != FORMAT:
                raise ValueError(f"its format is {entries['format']!r}, not {FORMAT!r}")
            layers = tuple(_read_layer(entry) for entry in entries["layers"])
            joints = tuple(np.array(joint, dtype=float) for joint in entries["joints"])
            sizes = [len(layer.groups) + 2 for layer in layers]
            if [joint.shape for joint in joints] != list(pairwise(sizes)):
                raise ValueError("its joint relevance does not fit its layers")
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
            raise FlowError(f"this is not a flow graph written by to_json(): {error}.") from error
        return cls(layers, joints, entries.get("carried"), str(entries.get("origin", "")))

    def to_networkx(self) -> Any:
        """Converts the graph to a ``networkx.DiGraph`` with edges toward the input and masses as attributes.

        Raises:
            MissingExtraError: If networkx is not installed.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> graph = RelevanceMeasure(net, torch.randn(1, 3), 1).flow(["1", "input"])
            >>> graph.to_networkx().nodes["1/off"]["label"]
            'absorbed'
        """
        networkx = extra("networkx", "graph")
        digraph = networkx.DiGraph(**({} if self.carried is None else {"carried": self.carried}))
        for place, layer in enumerate(self.layers):
            for node in layer.nodes:
                about = {"layer": node.layer, "kind": node.kind, "label": node.label, "mass": node.mass, "place": place}
                digraph.add_node(node.key, **about, **({} if node.group is None else {"group": node.group}))
        for edge in self.edges:
            digraph.add_edge(edge.upper.key, edge.lower.key, mass=edge.mass)
        return digraph

    def to_graphml(self, path: str | Path | IO[bytes]) -> None:
        """Writes the graph as GraphML, for tools such as Gephi and Cytoscape, to a path or to an open binary file.

        Raises:
            MissingExtraError: If networkx is not installed.

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
        """Returns the nodes and the edges as two pandas data frames.

        Raises:
            MissingExtraError: If pandas is not installed.

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


def _read_layer(entry: Mapping[str, Any]) -> FlowLayer:
    *groups, rest, off = entry["nodes"]
    if (rest["kind"], off["kind"]) != ("rest", "off"):
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


__all__ = ["TOP", "FlowEdge", "FlowError", "FlowGraph", "FlowLayer", "FlowNode", "check_thresholds"]
