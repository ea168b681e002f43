"""Influence and scores against sums over enumerated paths, and the exported files."""

from __future__ import annotations

import io
import itertools
import json

import networkx
import pytest
import torch

from nrm_plugin import AttributionGraph, GraphNode, influence
from nrm_plugin.errors import InputError


def nodes_of(features: int, tokens: int, layers: int, outputs: int) -> tuple[GraphNode, ...]:
    """Nodes in the order of circuit-tracer: features, errors, tokens, outputs."""
    return (
        *(GraphNode("feature", k % layers, k % tokens, k, str(k)) for k in range(features)),
        *(GraphNode("error", layer, t, None, "error") for layer in range(layers) for t in range(tokens)),
        *(GraphNode("input", -1, t, None, f"t{t}") for t in range(tokens)),
        *(GraphNode("output", layers, tokens - 1, k, f"o{k}") for k in range(outputs)),
    )


def random_graph(seed: int, features: int = 6, tokens: int = 2, layers: int = 2, outputs: int = 2) -> AttributionGraph:
    """A graph without cycles: features read lower features, errors and tokens; outputs read everything."""
    draw = torch.Generator().manual_seed(seed)
    nodes = nodes_of(features, tokens, layers, outputs)
    edges = torch.zeros(len(nodes), len(nodes))
    for target, node in enumerate(nodes):
        if node.kind in ("feature", "output"):
            sources = [s for s, other in enumerate(nodes) if other.kind in ("error", "input")]
            sources += range(target if node.kind == "feature" else features)
            edges[target, sources] = torch.randn(len(sources), generator=draw)
    edges[torch.rand(edges.shape, generator=draw) < 0.3] = 0
    weights = torch.zeros(len(nodes))
    weights[-outputs:] = torch.rand(outputs, generator=draw)
    return AttributionGraph(nodes, edges, weights)


def paths_from(graph: AttributionGraph, node: int):
    """All paths from a node down, as lists of nodes, with their product of normalized edges."""
    yield [node], 1.0
    row = [abs(float(value)) for value in graph.edges[node]]
    for source, size in enumerate(row):
        if size:
            for path, product in paths_from(graph, source):
                yield [node, *path], product * size / sum(row)


def paths(graph: AttributionGraph):
    for node, weight in enumerate(graph.weights.tolist()):
        if weight:
            for path, product in paths_from(graph, node):
                yield path, weight * product


@pytest.mark.parametrize("seed", range(5))
def test_influence_is_the_sum_over_paths(seed):
    graph = random_graph(seed)
    expected = torch.zeros(len(graph.nodes)).double()
    for path, product in paths(graph):
        if len(path) > 1:
            expected[path[-1]] += product
    torch.testing.assert_close(graph.influence(), expected, rtol=0, atol=1e-6)
    inputs, errors = (sum(float(v) for v, n in zip(expected, graph.nodes, strict=True) if n.kind == kind)
                      for kind in ("input", "error"))  # fmt: skip
    assert graph.replacement() == pytest.approx(inputs / (inputs + errors), abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_completeness_is_the_share_of_edges_that_do_not_begin_in_an_error(seed):
    graph = random_graph(seed)
    kinds = [node.kind for node in graph.nodes]
    visits = edges_from_errors = 0.0
    for path, product in paths(graph):
        visits += product
        if len(path) > 1 and kinds[path[-1]] == "error":
            edges_from_errors += product
    assert graph.completeness() == pytest.approx(1 - edges_from_errors / visits, abs=1e-6)


def test_influence_ignores_signs_and_scales():
    graph = random_graph(0)
    scaled = graph.edges * torch.rand(len(graph.nodes), 1) * -3
    torch.testing.assert_close(influence(scaled, graph.weights), graph.influence(), rtol=0, atol=1e-6)


def test_invalid_graphs_raise():
    graph = random_graph(0)
    with pytest.raises(InputError, match="contain a cycle"):
        influence(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([1.0, 0.0]))
    with pytest.raises(InputError, match=r"edges must be \(n, n\)"):
        influence(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(InputError, match="must be finite"):
        influence(torch.tensor([[torch.nan]]), torch.zeros(1))
    with pytest.raises(InputError, match="a graph of 2 nodes needs"):
        AttributionGraph(graph.nodes[:2], graph.edges, graph.weights)
    with pytest.raises(InputError, match="two nodes of this graph have the same"):
        AttributionGraph((graph.nodes[0], graph.nodes[0]), torch.zeros(2, 2), torch.zeros(2))
    with pytest.raises(InputError, match="must be the name of a file"):
        graph.to_circuit_tracer("folder", "../graph")


# -- files ------------------------------------------------------------------------------------------------------------

FIELDS = {"node_id": str, "feature": int, "layer": str, "ctx_idx": int, "feature_type": str, "token_prob": float,
          "is_target_logit": bool, "run_idx": int, "reverse_ctx_idx": int, "jsNodeId": str, "clerp": str}  # fmt: skip
"""Fields that circuit-tracer's viewer reads, and their types."""


def test_the_file_of_circuit_tracer_has_its_fields(tmp_path):
    graph = random_graph(1)
    for slug in ("first", "second", "first"):
        path = graph.to_circuit_tracer(tmp_path / "graphs", slug, ["a\n", "b"], scan="own")
    document = json.loads(path.read_text())
    assert sorted(document) == ["links", "metadata", "nodes", "qParams"]
    assert document["metadata"]["prompt_tokens"] == ["a⏎", "b"]
    assert document["metadata"]["scan"] == "own"
    for entry in document["nodes"]:
        assert all(type(entry[key]) is kind for key, kind in FIELDS.items())
    ids = [entry["node_id"] for entry in document["nodes"]]
    assert len(set(ids)) == len(ids)
    weights = {(ids[s], ids[t]): float(graph.edges[t, s]) for t, s in graph.edges.nonzero().tolist()}
    assert {(link["source"], link["target"]): link["weight"] for link in document["links"]} == pytest.approx(weights)
    listed = json.loads((tmp_path / "graphs" / "graph-metadata.json").read_text())
    assert [one["slug"] for one in listed["graphs"]] == ["second", "first"]
    by_kind = {node.kind: entry for node, entry in zip(graph.nodes, document["nodes"], strict=True)}
    assert by_kind["feature"]["node_id"] == "1_5_1"
    assert by_kind["error"]["node_id"] == "0_1_1"
    assert "0_0_0_error" in ids, "0_0_0 is feature 0 of layer 0 at position 0"
    assert by_kind["input"]["node_id"] == "E_t1_1"
    assert by_kind["output"]["layer"] == "3"
    assert by_kind["output"]["clerp"].startswith('Output "o1" (p=0.')
    # A node's number is the share of influence of all nodes that have at least its own.
    total = graph.influence()
    expected = [float(total[total >= value].sum() / total.sum()) for value in total]
    shown = [entry["influence"] for entry in document["nodes"]]
    assert [value for value in shown if value is not None] == pytest.approx(expected[: len(shown) - 2], abs=1e-9)


def test_networkx_and_graphml_hold_all_edges():
    graph = random_graph(2)
    digraph, file = graph.to_networkx(), io.BytesIO()
    graph.to_graphml(file)
    file.seek(0)
    for read in (digraph, networkx.read_graphml(file)):
        for (s, source), (t, target) in itertools.product(enumerate(graph.nodes), repeat=2):
            weight = float(graph.edges[t, s])
            assert read.has_edge(source.key, target.key) == bool(weight)
            if weight:
                assert read.edges[source.key, target.key]["weight"] == pytest.approx(weight)
        assert [read.nodes[node.key]["influence"] for node in graph.nodes] == pytest.approx(graph.influence().tolist())
