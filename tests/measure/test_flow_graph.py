"""Flow graphs with fewer groups, and in other formats.

Covers: nrm_plugin.measure.flow_nodes, nrm_plugin.measure.flow_thresholds.
"""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import FlowGraph, RelevanceMeasure, at
from nrm_plugin.errors import InputError, MissingExtraError
from nrm_plugin.measure.flow_graph import FlowError
from tests.flows import edges_by_key, full_graph, measure


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return measure()


@pytest.fixture(scope="module")
def full() -> FlowGraph:
    return full_graph()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_joint_relevance_that_is_not_finite_raises_and_names_the_layers(full, value):
    damaged = full.joints[1].copy()
    damaged[0, -1] = value
    with pytest.raises(FlowError, match=f"{full.layers[1].name!r} and {full.layers[2].name!r} is not finite"):
        FlowGraph(full.layers, (full.joints[0], damaged, *full.joints[2:]))


THRESHOLDS = [{"top": 3}, {"min_mass": 0.05}, {"coverage": 0.7}, {"top": 4, "coverage": 0.9, "min_mass": 0.02}]


@pytest.mark.parametrize("limits", THRESHOLDS, ids=str)
def test_thresholds_give_the_same_graph_before_and_after(mu, full, limits):
    before = mu.flow(["output", "2", "0", "input"], **{"top": None, **limits}, sample=1)
    after = full.smaller(**limits)
    assert [layer.groups for layer in before.layers] == [layer.groups for layer in after.layers]
    for one, other in zip(before.joints, after.joints, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert (one.others, one.rest) == (other.others, pytest.approx(other.rest, abs=1e-12))
        assert sum(node.mass for node in other.nodes) == pytest.approx(1)
    # `carried` is known only from the measure itself.
    assert after.carried is None
    shown = at("output").channel(list(before.layers[0].groups))
    for layer in before.layers[1:]:
        shown = shown & at(layer.name).channel(list(layer.groups))
    assert before.carried == pytest.approx(float(mu(shown)[1]))


def test_thresholds_select_the_largest_groups(full):
    masses = {layer.name: np.abs(layer.masses) for layer in full.layers}
    for layer in full.smaller(top=3).layers:
        assert np.abs(layer.masses).tolist() == sorted(masses[layer.name], reverse=True)[:3][: len(layer.groups)]
    for layer in full.smaller(min_mass=0.05).layers:
        assert len(layer.groups) == (masses[layer.name] >= 0.05).sum()
    for layer in full.smaller(coverage=0.7).layers:
        held = np.abs(layer.masses)
        assert held.sum() >= 0.7 * masses[layer.name].sum() - 1e-12
        # With any group fewer the share is smaller: no smaller set of groups reaches the coverage.
        assert held.sum() - held.min() < 0.7 * masses[layer.name].sum()
    assert full.smaller(coverage=1.0).layers[1].groups == full.smaller(top=1000).layers[1].groups


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"top": 0}, "top=0"),
        ({"top": True}, "top=True"),
        ({"min_mass": -1}, "min_mass"),
        ({"coverage": 90}, "0.9 for 90"),
        ({"coverage": 0}, "coverage=0"),
    ],
)
def test_thresholds_without_meaning_raise(mu, full, limits, words):
    with pytest.raises(InputError, match=words):
        full.smaller(**limits)
    with pytest.raises(InputError, match=words):
        mu.flow(["2", "0"], sample=0, **limits)


def test_json_is_read_back_unchanged(full, tmp_path):
    path = tmp_path / "flow.json"
    for graph in (full, full.smaller(top=2)):
        text = graph.to_json(path)
        assert FlowGraph.from_json(text) == FlowGraph.from_json(path) == graph
        assert json.loads(path.read_text()) == json.loads(text)
    assert FlowGraph.from_json(full.to_json()) != full.smaller(top=2)
    damaged = json.loads(full.to_json())
    damaged["joints"][0] = damaged["joints"][0][1:]
    for text, words in [
        ("[1", "not a flow"),
        ("{}", "'format'"),
        (json.dumps(damaged), "does not fit its layers"),
    ]:
        with pytest.raises(FlowError, match=words):
            FlowGraph.from_json(text)


def test_networkx_graphml_and_pandas_have_the_same_numbers(full, tmp_path):
    networkx = pytest.importorskip("networkx")
    pytest.importorskip("pandas")
    graph = full.smaller(top=3)
    made = graph.to_networkx()
    assert {key: made.nodes[key]["mass"] for key in made} == {node.key: node.mass for node in graph.nodes}
    assert {ends: made.edges[ends]["mass"] for ends in made.edges} == edges_by_key(graph)
    graph.to_graphml(tmp_path / "flow.graphml")
    read = networkx.read_graphml(tmp_path / "flow.graphml")
    assert {ends: read.edges[ends]["mass"] for ends in read.edges} == edges_by_key(graph)
    assert read.nodes["2/off"]["label"] == graph.layers[1].nodes[-1].label
    nodes, edges = graph.to_pandas()
    assert nodes.groupby("layer")["mass"].sum().tolist() == pytest.approx([1.0] * 4)
    assert dict(zip(zip(edges["upper"], edges["lower"], strict=True), edges["mass"], strict=True)) == edges_by_key(
        graph
    )
    assert nodes["group"].isna().sum() == 8


@pytest.mark.parametrize(("module", "call"), [("networkx", "to_networkx"), ("pandas", "to_pandas")])
def test_a_missing_extra_is_named(full, monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"this needs {module}: pip install 'nrm-plugin\[graph\]'"):
        getattr(full, call)()


def test_names_with_control_characters_are_one_line_that_any_format_holds(tmp_path):
    networkx = pytest.importorskip("networkx")
    mu = RelevanceMeasure(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 3), 1)
    graph = mu.flow(["output", "input"], over={"input": "neuron"}, names={"input": ["a\x00", "b\nc", "\ud800"]})
    assert set(graph.layers[1].labels) == {r"a\x00", r"b\nc", r"\ud800"}
    graph.to_graphml(tmp_path / "flow.graphml")
    assert networkx.read_graphml(tmp_path / "flow.graphml").number_of_nodes() == len(graph.nodes)
