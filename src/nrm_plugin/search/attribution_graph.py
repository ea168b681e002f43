r"""Attribution graphs over features, errors, inputs and outputs: influence, scores and export.

Let :math:`\hat A` be the absolute edge weights, normalized so that the edges into each node sum to 1, and let ``w`` be
the output weights. The influence of a node is the mass of the walks through it under a nonnegative normalized measure:

.. math:: \mathrm{influence} = w \sum_{k \ge 1} \hat A^k

Source: Ameisen et al., Circuit Tracing (2025), and circuit-tracer, for influence, scores and file format;
docs/features.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

import torch
from torch import Tensor

from ..errors import InputError, extra

Kind = Literal["feature", "error", "input", "output"]
_TYPES = {
    "feature": "cross layer transcoder",
    "error": "mlp reconstruction error",
    "input": "embedding",
    "output": "logit",
}
"""Names of the node kinds in the files of circuit-tracer."""


@dataclass(frozen=True)
class GraphNode:
    """Node of an attribution graph.

    Attributes:
        kind: ``"feature"``, ``"error"``, ``"input"`` or ``"output"``.
        layer: Index among the layers with features, starting from the input. It is -1 for inputs and the number of
            layers for outputs.
        position: Index of the token, or 0 if there are no tokens.
        unit: Index of the feature or output, or None for errors and inputs.
        label: Name of the node.

    Examples:
        >>> GraphNode("output", 1, 0, 281, "tabby").label
        'tabby'
    """

    kind: Kind
    layer: int
    position: int
    unit: int | None
    label: str

    @property
    def key(self) -> str:
        """Identifier of the node, unique within the graph.

        Examples:
            >>> GraphNode("feature", 0, 3, 7, "7").key
            'feature/0/3/7'
        """
        unit = "" if self.unit is None else f"/{self.unit}"
        return f"{self.kind}/{self.layer}/{self.position}{unit}"


def influence(edges: Tensor, weights: Tensor) -> Tensor:
    r"""Computes the influence of every node in an attribution graph, :math:`w \sum_{k \ge 1} \hat A^k`.

    Args:
        edges: Signed effect of each source (column) on each target (row), of shape ``(n, n)``.
        weights: Weights of the outputs, of shape ``(n,)``, zero for all other nodes.

    Returns:
        The influence, of shape ``(n,)``, in double precision. Outputs without outgoing edges have influence 0.

    Raises:
        InputError: If the shapes do not match, a value is not finite, or the graph has a cycle.

    Examples:
        >>> edges = torch.tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0], [1.0, -3.0, 0.0]])
        >>> influence(edges, torch.tensor([0.0, 0.0, 1.0]))
        tensor([1.0000, 0.7500, 0.0000], dtype=torch.float64)

    Follows the definition in circuit-tracer. Here :math:`\hat A` contains the absolute ``edges``, each row divided by
    its sum, and ``w`` the ``weights``.
    """
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1] or weights.shape != edges.shape[:1]:
        raise InputError(f"edges must be (n, n) and weights (n,); got {tuple(edges.shape)} and {tuple(weights.shape)}.")
    if not bool(edges.isfinite().all()) or not bool(weights.isfinite().all()):
        raise InputError("edges and weights of an attribution graph must be finite.")
    normalized, current = normalized_edges(edges), weights.double()
    total = torch.zeros_like(current)
    for _ in range(len(current) + 1):
        current = current @ normalized
        if not bool(current.any()):
            return total
        total += current
    raise InputError("these edges contain a cycle, so walks would not end. Edges must go from lower to upper nodes.")


def normalized_edges(edges: Tensor) -> Tensor:
    """Returns absolute edge weights in double precision, normalized so that the edges into each node sum to 1.

    Nodes without incoming edges keep a sum of 0.
    """
    sizes = edges.detach().double().abs()
    return sizes / sizes.sum(1, keepdim=True).clamp(min=1e-10)


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Graph of the direct relevance between outputs, features, errors and inputs, for one sample.

    Such graphs are returned by :func:`~nrm_plugin.attribution_graph`. Graphs of other effects can be constructed
    directly.

    Attributes:
        nodes: The ``n`` nodes.
        edges: Effect of each source (column) on each target (row), of shape ``(n, n)``. For a measure, this is the mass
            of the walks that cross both nodes and no node in between.
        weights: Weight of each output, of shape ``(n,)``, zero for all other nodes.

    Raises:
        InputError: If the shapes do not match the number of nodes or if two nodes have the same key.

    Examples:
        >>> nodes = (GraphNode("input", -1, 0, None, "a"), GraphNode("feature", 0, 0, 7, "7"),
        ...          GraphNode("error", 0, 0, None, "error"), GraphNode("output", 1, 0, 2, "b"))
        >>> edges = torch.tensor([[0.0, 0, 0, 0], [1.0, 0, 0, 0], [0.0, 0, 0, 0], [1.0, 2.0, 1.0, 0]])
        >>> graph = AttributionGraph(nodes, edges, torch.tensor([0.0, 0, 0, 1.0]))
        >>> graph.influence(), graph.replacement()
        (tensor([0.7500, 0.5000, 0.2500, 0.0000], dtype=torch.float64), 0.75)
    """

    nodes: tuple[GraphNode, ...]
    edges: Tensor
    weights: Tensor

    def __post_init__(self) -> None:
        count = len(self.nodes)
        if tuple(self.edges.shape) != (count, count) or tuple(self.weights.shape) != (count,):
            raise InputError(
                f"a graph of {count} nodes needs edges ({count}, {count}) and weights ({count},); got "
                f"{tuple(self.edges.shape)} and {tuple(self.weights.shape)}."
            )
        if len({node.key for node in self.nodes}) < count:
            raise InputError("two nodes of this graph have the same kind, layer, position and unit.")

    def influence(self) -> Tensor:
        """Returns the influence of every node, as a tensor of shape ``(n,)``; see :func:`influence`.

        Examples:
            >>> nodes = GraphNode("input", -1, 0, None, "a"), GraphNode("output", 0, 0, 2, "b")
            >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [-3.0, 0.0]]), torch.tensor([0.0, 1.0]))
            >>> graph.influence()
            tensor([1., 0.], dtype=torch.float64)
        """
        return influence(self.edges, self.weights)

    def replacement(self) -> float:
        """Returns the replacement score: the influence of the inputs divided by the influence of inputs and errors.

        Examples:
            >>> nodes = GraphNode("input", -1, 0, None, "a"), GraphNode("output", 0, 0, 2, "b")
            >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [-3.0, 0.0]]), torch.tensor([0.0, 1.0]))
            >>> graph.replacement()
            1.0
        """
        total = self.influence()
        inputs, errors = (float(total[self._are(kind)].sum()) for kind in ("input", "error"))
        return inputs / (inputs + errors)

    def completeness(self) -> float:
        """Returns the completeness score: the mean fraction of a node's inputs that do not come from errors.

        Nodes are weighted by their influence and outputs by the sum of their influence and weight.

        Examples:
            >>> nodes = GraphNode("input", -1, 0, None, "a"), GraphNode("output", 0, 0, 2, "b")
            >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [-3.0, 0.0]]), torch.tensor([0.0, 1.0]))
            >>> graph.completeness()
            1.0
        """
        reached = self.influence() + self.weights.double()
        from_errors = normalized_edges(self.edges)[:, self._are("error")].sum(1)
        return float(((1 - from_errors) * reached).sum() / reached.sum())

    def _are(self, kind: str) -> Tensor:
        return torch.tensor([node.kind == kind for node in self.nodes], device=self.edges.device)

    # -- export ------------------------------------------------------------------------------------------------------

    def to_networkx(self) -> Any:
        """Converts the graph to a ``networkx.DiGraph`` from inputs to outputs, with the edge attribute ``weight``.

        Raises:
            MissingExtraError: If networkx is not installed.

        Examples:
            >>> nodes = GraphNode("input", -1, 0, None, "a"), GraphNode("output", 0, 0, 2, "b")
            >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [-3.0, 0.0]]), torch.tensor([0.0, 1.0]))
            >>> list(graph.to_networkx().edges(data="weight"))
            [('input/-1/0', 'output/0/0/2', -3.0)]
        """
        digraph = extra("networkx", "graph").DiGraph()
        for node, share in zip(self.nodes, self.influence().tolist(), strict=True):
            about = {key: value for key, value in asdict(node).items() if value is not None}
            digraph.add_node(node.key, influence=share, **about)
        for target, source in self.edges.nonzero().tolist():
            weight = float(self.edges[target, source])
            digraph.add_edge(self.nodes[source].key, self.nodes[target].key, weight=weight)
        return digraph

    def to_graphml(self, path: str | Path | IO[bytes]) -> None:
        """Writes the graph as GraphML, for tools such as Gephi and Cytoscape, to a path or to an open binary file.

        Raises:
            MissingExtraError: If networkx is not installed.

        Examples:
            >>> nodes = GraphNode("input", -1, 0, None, "a"), GraphNode("output", 0, 0, 2, "b")
            >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [-3.0, 0.0]]), torch.tensor([0.0, 1.0]))
            >>> import io
            >>> graph.to_graphml(io.BytesIO())
        """
        extra("networkx", "graph").write_graphml_xml(self.to_networkx(), path)

    def to_circuit_tracer(
        self, folder: str | Path, slug: str, tokens: Sequence[str] = (), scan: str = "custom"
    ) -> Path:
        """Writes the graph in the format of circuit-tracer's viewer and adds it to ``graph-metadata.json``.

        Args:
            folder: Folder of the graphs, which is created if it does not exist.
            slug: Name of the graph and of its file, without suffix.
            tokens: Text of the token at each input position.
            scan: Name of the dictionaries (transcoders), stored as ``scan`` in the file.

        Returns:
            The path of the file.

        Raises:
            InputError: If the slug contains a path separator or there are too few tokens.

        Examples:
            >>> nodes = GraphNode("input", -1, 0, None, "a"), GraphNode("output", 0, 0, 2, "b")
            >>> graph = AttributionGraph(nodes, torch.tensor([[0.0, 0.0], [-3.0, 0.0]]), torch.tensor([0.0, 1.0]))
            >>> import tempfile
            >>> graph.to_circuit_tracer(tempfile.mkdtemp(), "example", ["a"]).name
            'example.json'
        """
        if not slug or Path(slug).name != slug:
            raise InputError(f"slug={slug!r} must be the name of a file, without its ending and folder.")
        positions = 1 + max(node.position for node in self.nodes)
        if tokens and len(tokens) < positions:
            raise InputError(f"tokens= has {len(tokens)} tokens, and the graph {positions} positions.")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        document = self._document(slug, [_shown(token) for token in tokens], scan)
        path = folder / f"{slug}.json"
        path.write_text(json.dumps(document, indent=2), encoding="utf-8")
        _add_to_list(folder / "graph-metadata.json", document["metadata"])
        return path

    def _document(self, slug: str, tokens: list[str], scan: str) -> dict[str, Any]:
        metadata = {
            "slug": slug,
            "scan": scan,
            "transcoder_list": [],
            "prompt_tokens": tokens,
            "prompt": "".join(tokens),
            "node_threshold": 1.0,
        }
        parameters = {"pinnedIds": [], "supernodes": [], "linkType": "both", "clickedId": "", "sg_pos": ""}
        ids = _node_ids(self.nodes)
        links = [
            {"source": ids[source], "target": ids[target], "weight": float(self.edges[target, source])}
            for target, source in self.edges.nonzero().tolist()
        ]
        shares = _cumulative(self.influence()).tolist()
        nodes = [
            _node_entry(node, node_id, share, weight)
            for node, node_id, share, weight in zip(self.nodes, ids, shares, self.weights.tolist(), strict=True)
        ]
        return {"metadata": metadata, "qParams": parameters, "nodes": nodes, "links": links}


def _cumulative(total: Tensor) -> Tensor:
    """Computes the cumulative fraction of the total influence at each node, in order of decreasing influence."""
    values, order = total.sort(descending=True)
    return torch.zeros_like(total).scatter(0, order, values.cumsum(0) / values.sum())


def _node_ids(nodes: Sequence[GraphNode]) -> list[str]:
    """Returns the node ids of circuit-tracer. The id of an error is changed if a feature has the same id."""
    ids = [_node_id(node) for node in nodes]
    features = {name for node, name in zip(nodes, ids, strict=True) if node.kind != "error"}
    return [
        f"{name}_error" if node.kind == "error" and name in features else name
        for node, name in zip(nodes, ids, strict=True)
    ]


def _node_id(node: GraphNode) -> str:
    if node.kind == "error":
        return f"0_{node.layer}_{node.position}"
    if node.kind == "input":
        return f"E_{node.label}_{node.position}"
    layer = node.layer + 1 if node.kind == "output" else node.layer
    return f"{layer}_{node.unit}_{node.position}"


def _node_entry(node: GraphNode, node_id: str, share: float, weight: float) -> dict[str, Any]:
    is_output, layer = node.kind == "output", node.layer + 1 if node.kind == "output" else node.layer
    own = {"feature": node.unit, "error": -1, "input": node.position, "output": node.unit}[node.kind]
    prefix = {"feature": f"{layer}_{node.unit}-0", "error": f"{layer}_{node.position}-0"}
    after = {"input": f"E_{node.label}-{node.position}", "output": f"L_{node.unit}-{node.position}"}
    return {
        "node_id": node_id,
        "feature": own,
        "layer": "E" if node.kind == "input" else str(layer),
        "ctx_idx": node.position,
        "feature_type": _TYPES[node.kind],
        "token_prob": weight if is_output else 0.0,
        "is_target_logit": is_output,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": {**prefix, **after}[node.kind],
        "clerp": f'Output "{node.label}" (p={weight:.3f})' if is_output else "",
        "influence": None if is_output else share,
        "activation": None,
    }


def _shown(token: str) -> str:
    return token.replace("\n", "⏎").replace("\t", "→").replace("\r", "↵")


def _add_to_list(path: Path, metadata: dict[str, Any]) -> None:
    known = json.loads(path.read_text(encoding="utf-8"))["graphs"] if path.exists() else []
    graphs = [*(graph for graph in known if graph["slug"] != metadata["slug"]), metadata]
    path.write_text(json.dumps({"graphs": graphs}, indent=2), encoding="utf-8")


__all__ = ["AttributionGraph", "GraphNode", "influence", "normalized_edges"]
