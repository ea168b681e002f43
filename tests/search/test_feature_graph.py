"""The graph of a measure against events of single nodes, and its influence against masses."""

from __future__ import annotations

import io

import networkx
import pytest
import torch
from torch import nn

from nrm_plugin import (
    Crosscoder,
    NRMAbsolute,
    RelevanceMeasure,
    at,
    attribution_graph,
    completeness,
    reconstruction_errors,
    replacement,
    with_features,
)
from nrm_plugin.errors import InputError
from tests.feature_nets import Decoder, random_dictionary, transcoders


def dense_case(across: bool, errors: str = "pass"):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()
    one = {"1": random_dictionary(4, 6, 0), "2": random_dictionary(4, 5, 1, reads="input")}
    decoders = {("1", "2"): random_dictionary(4, 6, 2).decoder} if across else {}
    model = with_features(net, Crosscoder(one, decoders), errors)
    return model, RelevanceMeasure(model, torch.randn(2, 3).double(), 1, composite=NRMAbsolute())


@pytest.mark.parametrize("errors", ["pass", "absorb"])
@pytest.mark.parametrize("across", [False, True])
def test_scores_of_the_graph_are_events(across, errors):
    model, mu = dense_case(across, errors)
    for sample in range(2):
        graph = attribution_graph(mu, model, sample=sample, inputs="neuron")
        assert graph.replacement() == pytest.approx(float(replacement(mu, model)[sample]), abs=1e-9)
        assert graph.completeness() == pytest.approx(float(completeness(mu, model)[sample]), abs=1e-9)
        assert float(graph.weights.sum()) == pytest.approx(1)


@pytest.mark.parametrize("top", [3, 100])
def test_influence_is_the_mass_without_errors_above(top):
    """Also of a part of the features: the others are passed through."""
    model, mu = dense_case(True)
    graph = attribution_graph(mu, model, top=top, sample=0, inputs="neuron")
    upper, lower = reconstruction_errors(model, "2"), reconstruction_errors(model, "1")
    total = graph.influence()
    for node, share in zip(graph.nodes, total.tolist(), strict=True):
        if node.kind == "output":
            continue
        tap = at({1: "2.features", 0: "1.features", -1: "input"}[node.layer])
        count = {1: 5, 0: 6}.get(node.layer, 0)
        event = tap[node.unit] if node.kind == "feature" else tap[count:]
        if node.kind == "input":
            event = at("input")[int(node.label)] & ~lower
        expected = mu(event & ~upper if node.layer < 1 else event)[0]
        assert share == pytest.approx(float(expected), abs=1e-9), node.key


def test_edges_are_the_walks_without_a_node_between():
    model, mu = dense_case(True)
    graph = attribution_graph(mu, model, top=6, sample=1, inputs="neuron")
    middle = torch.zeros(10, dtype=torch.bool)
    for node in graph.nodes:
        if node.layer == 0:
            middle[node.unit if node.kind == "feature" else slice(6, 10)] = True
    for t, target in enumerate(graph.nodes):
        for s, source in enumerate(graph.nodes):
            if (target.kind, source.kind) == ("feature", "input"):
                event = (
                    at({1: "2.features", 0: "1.features"}[target.layer])[target.unit] & at("input")[int(source.label)]
                )
                event = event & ~at("1.features")[middle] if target.layer == 1 else event
                assert float(graph.edges[t, s]) == pytest.approx(float(mu(event)[1]), abs=1e-10)
    errors = [k for k, node in enumerate(graph.nodes) if node.kind in ("error", "input")]
    assert not bool(graph.edges[errors].any())


def test_the_graph_of_a_decoder_has_tokens_and_positions():
    net = Decoder().double().eval()
    ids = torch.randint(0, 11, (1, 5), generator=torch.Generator().manual_seed(0))
    model = with_features(net, transcoders(net))
    mu = RelevanceMeasure(model, ids, (4, 3), composite=NRMAbsolute())
    graph = attribution_graph(mu, model, top=12, names={"input": list("abcde")})
    kinds = [node.kind for node in graph.nodes]
    assert [kinds.count(kind) for kind in ("output", "feature", "error", "input")] == [1, 12, 10, 5]
    assert (graph.nodes[0].position, graph.nodes[0].unit) == (4, 3)
    assert [node.label for node in graph.nodes[-5:]] == list("abcde")
    first = graph.nodes.index(next(node for node in graph.nodes if node.kind == "feature" and node.layer == 1))
    node = graph.nodes[first]
    mass = float(mu(at("blocks.1.mlp.features")[node.position, node.unit]))
    assert float(graph.influence()[first]) == pytest.approx(mass, abs=1e-9)


def test_invalid_arguments_raise():
    model, mu = dense_case(False)
    with pytest.raises(InputError, match="pass sample="):
        attribution_graph(mu, model)
    with pytest.raises(InputError, match="samples 0 to 1"):
        attribution_graph(mu, model, sample=2)
    with pytest.raises(InputError, match="at least 1"):
        attribution_graph(mu, model, top=0, sample=0)


def test_names_may_hold_any_characters_but_there_must_be_enough():
    model, mu = dense_case(False)
    names = {"input": ["a\x00", "b\n", "<c>\ud800"], "output": ["zero", "one\x0b"]}
    graph = attribution_graph(mu, model, top=2, sample=0, inputs="neuron", names=names)
    file = io.BytesIO()
    graph.to_graphml(file)
    file.seek(0)
    labels = {label for _, label in networkx.read_graphml(file).nodes(data="label")}
    assert {r"a\x00", r"b\n", r"<c>\ud800", r"one\x0b"} <= labels
    with pytest.raises(InputError, match=r"names= has 1 names of input nodes, but one has the index 1"):
        attribution_graph(mu, model, sample=0, inputs="neuron", names={"input": ["a"]})


def test_measures_of_another_model_and_numbers_that_are_none_raise(tmp_path):
    model, mu = dense_case(False)
    plain = RelevanceMeasure(nn.Sequential(nn.Linear(3, 2)).double(), torch.randn(1, 3).double(), 1)
    with pytest.raises(InputError, match=r"the measure has no features at \['1', '2'\]"):
        attribution_graph(plain, model)
    with pytest.raises(InputError, match=r"top=1.5 must be an integer"):
        attribution_graph(mu, model, top=1.5, sample=0)
    with pytest.raises(InputError, match="tokens= has 2 tokens, and the graph 3 positions"):
        attribution_graph(mu, model, sample=0, inputs="neuron").to_circuit_tracer(tmp_path, "graph", ["a", "b"])
