"""Flow graphs: every number against its event and against enumerated walks, and what the graphs are made into."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch, Rectangle
from PIL import Image
from torch import nn
from zennit.composites import EpsilonAlpha2Beta1, EpsilonPlus

from nrm_plugin import FlowGraph, RelevanceMeasure, at, patches
from nrm_plugin.commands.demo_values import plain_sums
from nrm_plugin.demo.model import load_digits, load_model
from nrm_plugin.errors import EventError, InputError, MissingExtraError, UnknownLayerError
from nrm_plugin.measure.flow_graph import FlowError
from nrm_plugin.measure.flow_heat_maps import flow_maps, thumbnail
from nrm_plugin.measure.layer_profile import ProfileRow, profile
from nrm_plugin.plots.flow import drawn_nodes, flow_figure, profile_figure
from nrm_plugin.plots.flow_html import sankey, sankey_figure, save_sankey
from nrm_plugin.plots.ribbons import DARK, LIGHT, percent
from tests.conftest import slow_but
from tests.nets import Case, rule_maps, tiny_nets, zennit_composite
from tests.oracles import Walks, enumerate_walks

slowly = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


# -- every node and every edge --------------------------------------------------------------------------------------


def keys_of(case: Case) -> list[tuple[str, int]]:
    """Taps from the output down; stacks have another name here."""
    return [node.key for node in reversed(case.spec) if node.kind != "stack"]


def is_below(case: Case, lower: tuple[str, int], upper: tuple[str, int]) -> bool:
    parents = {node.key: node.parents for node in case.spec}
    todo, seen = [upper], set()
    while todo:
        for parent in parents[todo.pop()]:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return lower in seen


@st.composite
def chains(draw: st.DrawFn) -> tuple[Case, dict, list[tuple[str, int]]]:
    """A net with rules and two to four of its taps, each below the one before."""
    case = draw(tiny_nets(max_batch=2))
    rules = draw(rule_maps(case))
    keys, taps = keys_of(case), []
    for _ in range(draw(st.integers(2, 4))):
        left = [key for key in keys if not taps or is_below(case, key, taps[-1])]
        if left:
            taps.append(draw(st.sampled_from(left)))
    return case, rules, taps


def groups_of(draw: st.DrawFn, shape: torch.Size) -> torch.Tensor:
    size = math.prod(shape)
    labels = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return torch.tensor(labels).reshape(shape)


def edges_by_key(graph: FlowGraph) -> dict[tuple[str, str], float]:
    return {(edge.upper.key, edge.lower.key): edge.mass for edge in graph.edges}


def members(
    walks: Walks, key: tuple[str, int], labels: torch.Tensor, kept: tuple[int, ...]
) -> dict[object, np.ndarray]:
    """The walks of each node of one layer: groups, rest and off, as boolean arrays."""
    flat = labels.flatten().numpy()
    nodes: dict[object, np.ndarray] = {k: walks.crosses(*key, np.flatnonzero(flat == k)) for k in kept}
    nodes["rest"] = walks.crosses(*key, np.flatnonzero(~np.isin(flat, kept)))
    nodes["off"] = ~walks.crosses(*key)
    return nodes


@pytest.mark.slow
@slowly
@given(chains(), st.data())
def test_every_node_and_edge_is_its_event_and_the_sum_of_its_walks(drawn, data):
    case, rules, taps = drawn
    residual = data.draw(st.sampled_from(["sink", "redistribute"]))
    mu = RelevanceMeasure(
        case.net, case.x, start=case.start, composite=zennit_composite(case.spec, rules), residual=residual
    )
    sample = data.draw(st.integers(0, case.batch - 1))
    calls = [node.tap for node in case.spec]
    layers = [f"{tap}:{call}" if calls.count(tap) > 1 else tap for tap, call in taps]
    over = {layer: groups_of(data.draw, mu.shape(layer)[1:]) for layer in layers}
    top = data.draw(st.sampled_from([None, 1, 2]))
    graph = mu.flow(layers, over, top=top, sample=sample)
    walks = enumerate_walks(case.spec, case.x[sample], case.start[sample], rules, residual, 2.0)
    close = {"rel": 0, "abs": 1e-10 * max(1.0, walks.variation())}
    assert [layer.name for layer in graph.layers] == layers
    inside, events, shown = [], [], np.ones(len(walks), dtype=bool)
    for layer, key in zip(graph.layers, taps, strict=True):
        labels = over[layer.name]
        found = members(walks, key, labels, layer.groups)
        rest = torch.isin(labels, torch.tensor(layer.groups), invert=True)
        event = {k: at(layer.name)[labels == k] for k in layer.groups}
        inside.append(found)
        events.append({**event, "rest": at(layer.name)[rest], "off": ~at(layer.name)})
        shown &= ~found["rest"] & ~found["off"]
        split = walks.split(*key)
        assert (layer.sink, layer.bypass) == (
            pytest.approx(split.absorbed, **close),
            pytest.approx(split.bypass, **close),
        )
        assert math.fsum([*layer.masses, layer.rest, layer.sink, layer.bypass]) == pytest.approx(1, **close)
        for node in layer.nodes:
            name = node.kind if node.group is None else node.group
            assert node.mass == pytest.approx(walks.mass(found[name]), **close)
            assert node.mass == pytest.approx(float(mu(events[-1][name])[sample]), **close)
    assert graph.carried == pytest.approx(walks.mass(shown), **close)
    for place, joint in enumerate(graph.joints):
        upper, lower = graph.layers[place : place + 2]
        rows, columns = list(inside[place]), list(inside[place + 1])
        asked = mu([events[place][a] & events[place + 1][b] for a in rows for b in columns])[:, sample]
        expected = [[walks.mass(inside[place][a] & inside[place + 1][b]) for b in columns] for a in rows]
        np.testing.assert_allclose(joint, expected, rtol=0, atol=close["abs"])
        np.testing.assert_allclose(joint.flatten(), asked, rtol=0, atol=close["abs"])
        np.testing.assert_allclose(joint.sum(1), [node.mass for node in upper.nodes], rtol=0, atol=close["abs"])
        np.testing.assert_allclose(joint.sum(0), [node.mass for node in lower.nodes], rtol=0, atol=close["abs"])
    listed = edges_by_key(graph)
    assert len(listed) == sum(int(np.count_nonzero(joint)) for joint in graph.joints)
    for edge in graph.edges:
        if edge.upper.mass:
            assert edge.given_upper * edge.upper.mass == pytest.approx(edge.mass)


# -- which groups are shown -----------------------------------------------------------------------------------------


def net(*, inputs: int = 3, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )  # fmt: skip
    return made.double().eval()


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return RelevanceMeasure(net(), X, 2, residual="sink", composite=EpsilonAlpha2Beta1())


@pytest.fixture(scope="module")
def full(mu: RelevanceMeasure) -> FlowGraph:
    return mu.flow(["output", "2", "0", "input"], top=None, sample=1)


THRESHOLDS = [{"top": 3}, {"min_mass": 0.05}, {"coverage": 0.7}, {"top": 4, "coverage": 0.9, "min_mass": 0.02}]


@pytest.mark.parametrize("limits", THRESHOLDS, ids=str)
def test_groups_left_out_are_lumped_alike_before_and_after(mu, full, limits):
    before = mu.flow(["output", "2", "0", "input"], **{"top": None, **limits}, sample=1)
    after = full.smaller(**limits)
    assert [layer.groups for layer in before.layers] == [layer.groups for layer in after.layers]
    for one, other in zip(before.joints, after.joints, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    for one, other in zip(before.layers, after.layers, strict=True):
        assert (one.others, one.rest) == (other.others, pytest.approx(other.rest, abs=1e-12))
        assert sum(node.mass for node in other.nodes) == pytest.approx(1)
    # What is carried is known only where the measure was asked.
    assert after.carried is None
    shown = at("output").channel(list(before.layers[0].groups))
    for layer in before.layers[1:]:
        shown = shown & at(layer.name).channel(list(layer.groups))
    assert before.carried == pytest.approx(float(mu(shown)[1]))


def test_thresholds_keep_what_they_say(full):
    masses = {layer.name: np.abs(layer.masses) for layer in full.layers}
    for layer in full.smaller(top=3).layers:
        assert np.abs(layer.masses).tolist() == sorted(masses[layer.name], reverse=True)[:3][: len(layer.groups)]
    for layer in full.smaller(min_mass=0.05).layers:
        assert len(layer.groups) == (masses[layer.name] >= 0.05).sum()
    for layer in full.smaller(coverage=0.7).layers:
        held = np.abs(layer.masses)
        assert held.sum() >= 0.7 * masses[layer.name].sum() - 1e-12
        # One group fewer, whichever, would hold less: no smaller graph carries as much.
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
def test_thresholds_that_mean_nothing_are_refused(mu, full, limits, words):
    with pytest.raises(InputError, match=words):
        full.smaller(**limits)
    with pytest.raises(InputError, match=words):
        mu.flow(["2", "0"], sample=0, **limits)


def test_all_channels_take_no_pass_for_each(mu, monkeypatch):
    expected = mu.joint("2", "0")[0]
    direct, spent, joints = mu.cost.vectors, [], mu.joints

    def watched(*args, **kwargs):
        found = joints(*args, **kwargs)
        spent.append(mu.cost.vectors)
        return found

    monkeypatch.setattr(mu, "joints", watched)
    graph = mu.flow(["2", "0"], top=None, sample=0)
    assert spent == [direct]
    np.testing.assert_allclose(graph.joints[0][:-2, :-2], expected, atol=1e-12)
    mu.flow(["2", "0"], top=2, sample=0)
    assert spent[1] > direct


def counted(query, spent):
    def watched(self, *args, **kwargs):
        found = query(self, *args, **kwargs)
        spent.append(self.cost.vectors)
        return found

    return watched


def test_a_flow_takes_two_passes_and_those_between_its_layers(mu, monkeypatch):
    whole = RelevanceMeasure(net(), X[:1], 2)
    whole.marginal("input")
    plain, steps, spent = whole.cost.vectors, ["__call__", "marginal", "joints"], []
    for name in steps:
        monkeypatch.setattr(RelevanceMeasure, name, counted(getattr(RelevanceMeasure, name), spent))
    whole.flow(["output", "2", "0", "input"], top=1)
    # Two vectors between each two layers; the rest are two whole passes and what is off, at most one down to each.
    assert sum(spent) <= 2 * plain + 2 * plain + 3 * 3 * plain


def test_names_may_come_in_any_order_and_samples_are_told_apart(mu):
    assert mu.flow(["input", "0", "output"], sample=0) == mu.flow(["output", "0", "input"], sample=0)
    alone = RelevanceMeasure(net(), X[1:], 2, residual="sink", composite=EpsilonAlpha2Beta1()).flow(["2", "0"])
    for one, other in zip(mu.flow(["2", "0"], sample=1).joints, alone.joints, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    by_module = RelevanceMeasure(model := net(), X[:1], 2).flow([model[2], at("0")])
    assert [layer.name for layer in by_module.layers] == ["2", "0"]


def test_what_does_not_fit_is_refused(mu):
    with pytest.raises(FlowError, match="the measure has 2: say which by sample="):
        mu.flow(["2", "0"])
    with pytest.raises(FlowError, match="samples 0 to 1"):
        mu.flow(["2", "0"], sample=2)
    with pytest.raises(FlowError, match="at least one layer"):
        mu.flow([], sample=0)
    with pytest.raises(UnknownLayerError, match="no tap named 'conv'"):
        mu.flow(["conv", "input"], sample=0)
    with pytest.raises(EventError, match="is not below"):
        mu.flow(["2", "2"], sample=0)
    with pytest.raises(ValueError, match="over='pixel' is unknown"):
        mu.flow(["2", "0"], over="pixel", sample=0)


# -- what nodes are called ------------------------------------------------------------------------------------------


def test_regions_patches_labels_and_classes_have_names(mu):
    left = torch.zeros(6, 6, dtype=torch.bool)
    left[:, :2] = True
    graph = mu.flow(["output", "input"], over={"input": {"left": left, "nothing": left & ~left}}, top=None,
                    names={"output": ["cat", "dog", "bird"]}, sample=0)  # fmt: skip
    output, region = graph.layers
    assert (output.labels, output.groups) == (("cat", "dog", "bird", "3"), (0, 1, 2, 3))
    assert region.labels == ("left", "nothing")
    assert region.masses == (pytest.approx(float(mu(at("input")[..., left])[0])), 0)
    assert region.rest == pytest.approx(float(mu(at("input")[..., ~left])[0]))
    cut = mu.flow(["output", "input"], over={"input": patches((6, 6), (2, 3))}, names={"input": {4: "middle"}}, top=6,
                  sample=0).layers[1]  # fmt: skip
    assert dict(zip(cut.groups, cut.labels, strict=True))[4] == "middle"
    for group, mass in zip(cut.groups, cut.masses, strict=True):
        row, column = divmod(group, 3)
        patch = mu(at("input")[:, 3 * row : 3 * row + 3, 2 * column : 2 * column + 2])
        assert mass == pytest.approx(float(patch[0]))
    places = mu.flow(["2"], over="position", sample=0).layers[0]
    assert dict(zip(places.groups, places.labels, strict=True))[places.groups[0]] == "{},{}".format(
        *divmod(places.groups[0], 4)
    )


def test_regions_that_do_not_fit_are_refused(mu):
    mask = torch.ones(6, 6, dtype=torch.bool)
    for regions, words in [
        ({"a": mask, "b": mask}, "'b' of 'input' shares 108 neurons with one before it"),
        ({"a": mask[:5]}, r"'a' of shape \(5, 6\) does not broadcast"),
        ({"a": mask.long()}, "'a' of 'input' must be a boolean tensor"),
        ({}, "names no region"),
    ]:
        with pytest.raises(EventError, match=words):
            mu.flow(["input"], over={"input": regions}, sample=0)


def test_patches_cut_as_evenly_as_can_be():
    labels = patches((5, 7, 3), (2, 3, 1))
    assert labels.shape == (5, 7, 3)
    assert sorted(torch.bincount(labels.flatten()).tolist()) == [12, 12, 18, 18, 18, 27]
    for wrong in [0, 6, (2, 2, 2)]:
        with pytest.raises(InputError, match="patches"):
            patches((5, 7), wrong)


# -- other forms ----------------------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was(full, tmp_path):
    path = tmp_path / "flow.json"
    for graph in (full, full.smaller(top=2)):
        text = graph.to_json(path)
        assert FlowGraph.from_json(text) == FlowGraph.from_json(path) == graph
        assert json.loads(path.read_text()) == json.loads(text)
    assert FlowGraph.from_json(full.to_json()) != full.smaller(top=2)
    damaged = json.loads(full.to_json())
    damaged["joints"][0] = damaged["joints"][0][1:]
    for text, words in [("[1", "no flow graph"), ("{}", "'format'"), (json.dumps(damaged), "does not fit its layers")]:
        with pytest.raises(FlowError, match=words):
            FlowGraph.from_json(text)


def test_networkx_graphml_and_pandas_hold_the_same_numbers(full, tmp_path):
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
def test_an_extra_that_is_not_installed_is_named(full, monkeypatch, module, call):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingExtraError, match=rf"this needs {module}: pip install 'nrm-plugin\[graph\]'"):
        getattr(full, call)()


# -- nothing to be shown, and much ----------------------------------------------------------------------------------


class Dead(nn.Module):
    """A branch that is switched off, beside one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.live, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        off = torch.relu(self.dead(x) - 100).sum((1, 2, 3)).unsqueeze(1)
        return self.head(torch.relu(self.live(x)).mean((2, 3)) + off)


def test_layers_and_images_without_relevance_have_empty_groups():
    torch.manual_seed(0)
    model = Dead().eval()
    with torch.no_grad():
        model.live.bias.fill_(1.0)
    graph = RelevanceMeasure(model, torch.rand(1, 1, 8, 8), 1).flow(["output", "dead", "input"], top=4)
    dead = graph.layers[1]
    assert (dead.groups, dead.rest, dead.others) == ((), pytest.approx(0, abs=1e-20), 3)
    assert dead.sink + dead.bypass == pytest.approx(1, abs=1e-5)
    black = RelevanceMeasure(model, torch.zeros(1, 1, 8, 8), 1, residual="sink", composite=EpsilonPlus())
    graph = black.flow(["output", "live", "input"])
    assert graph.layers[-1].groups == ()
    assert graph.carried == 0
    assert graph.layers[-1].sink == pytest.approx(1, abs=1e-5)


def test_wide_layers_take_a_vector_for_each_group_that_is_shown():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    mu = RelevanceMeasure(wide, torch.randn(1, 8), 0)
    graph = mu.flow(["4", "2", "0", "input"], top=8)
    assert [joint.shape for joint in graph.joints] == [(3, 10), (10, 10), (10, 10)]
    assert [layer.others for layer in graph.layers] == [2, 4088, 4088, 0]
    pair = at("2")[graph.layers[1].groups[0]] & at("0")[graph.layers[2].groups[0]]
    assert graph.joints[1][0, 0] == pytest.approx(float(mu(pair)), rel=1e-3, abs=1e-7)
    for layer in graph.layers:
        assert sum(node.mass for node in layer.nodes) == pytest.approx(1, abs=1e-5)


def test_volumes_have_patches_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 8, 2)).double().eval()
    mu = RelevanceMeasure(model, torch.randn(1, 1, 4, 4, 4).double(), 1)
    graph = mu.flow(["0", "input"], over={"input": patches((4, 4, 4), 2)}, top=None)
    corner = at("0")[1] & at("input")[:, :2, 2:, :2]
    assert graph.joints[0][1, 2] == pytest.approx(float(mu(corner)))
    assert graph.layers[1].groups == tuple(range(8))


# -- pictures -------------------------------------------------------------------------------------------------------


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def shapes(figure, kind) -> list:
    return [patch for axes in figure.axes for patch in axes.patches if isinstance(patch, kind)]


def drawn(graph: FlowGraph) -> list[float]:
    """Joint relevance that is drawn, and between nodes that are."""
    return [edge.mass for edge in graph.edges if abs(edge.mass) > 1e-6
            and all(node.kind == "group" or abs(node.mass) > 1e-6 for node in (edge.upper, edge.lower))]  # fmt: skip


@pytest.mark.parametrize("dark", [False, True])
def test_a_picture_has_a_bar_for_each_node_and_a_ribbon_for_each_edge(full, dark, tmp_path):
    graph = full.smaller(top=3)
    figure = flow_figure(graph, "heading", dark=dark)
    nodes = [node for node in graph.nodes if node.kind == "group" or abs(node.mass) > 1e-6]
    bars, ribbons = shapes(figure, Rectangle), shapes(figure, PathPatch)
    assert (len(bars), len(ribbons)) == (len(nodes), len(drawn(graph)))
    written = texts(figure)
    assert {"input", "0", "2", "output", *(node.label for node in nodes)} <= set(written)
    # One scale for all: the height of a ribbon where it starts is the size of its joint relevance.
    heights = sorted(float(v[0] - v[7]) for v in (ribbon.get_path().vertices[:, 1] for ribbon in ribbons))
    largest = max(abs(mass) for mass in drawn(graph))
    expected = sorted(max(abs(mass) / largest * heights[-1], 0.0015) for mass in drawn(graph))
    np.testing.assert_allclose(heights, expected, rtol=1e-6)
    palette = DARK if dark else LIGHT
    colors = {to_hex(bar.get_facecolor()) for bar in bars}
    assert colors == {palette.positive, palette.negative, palette.other, palette.off}
    figure.savefig(tmp_path / "flow.png", facecolor=figure.get_facecolor())
    with Image.open(tmp_path / "flow.png") as image:
        assert image.convert("RGB").getpixel((2, 2)) == tuple(int(palette.paper[at : at + 2], 16) for at in (1, 3, 5))


def test_labels_of_long_columns_do_not_overlap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2)).eval()
    figure = flow_figure(RelevanceMeasure(model, torch.randn(1, 30), 0).flow(["1", "input"], top=None))
    figure.canvas.draw()
    labels = [text for text in figure.axes[0].texts if text.get_text().isdecimal() and text.get_ha() == "right"]
    boxes = sorted((text.get_window_extent() for text in labels), key=lambda box: box.y0)
    assert len(boxes) == 30
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))


@pytest.mark.parametrize("dark", [False, True])
def test_each_group_has_its_conditional_heat_map_below_its_layer(mu, full, dark):
    graph = full.smaller(top=2)
    maps = flow_maps(mu, graph, sample=1)
    shown = {node.key: node for node in graph.nodes if node.kind == "group" and node.layer != "input"}
    assert set(maps) == set(shown)
    for key, values in maps.items():
        expected = mu.marginal("input", given=at(shown[key].layer).channel(shown[key].group), min_ratio=0)[1].sum(0)
        np.testing.assert_allclose(values, expected, atol=1e-12)
    pictures = [axes for axes in flow_figure(graph, dark=dark, maps=maps).axes[0].child_axes if axes.images]
    drawn_maps = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in pictures}
    assert len(pictures) == len(maps)
    np.testing.assert_allclose(drawn_maps["2"], maps["output/2"], atol=1e-12)
    places = [axes.get_position() for axes in pictures]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


def test_thumbnails_keep_the_mass():
    values = np.random.default_rng(0).normal(size=(200, 131))
    small = thumbnail(values)
    assert small.shape == (96, 96)
    assert small.sum() == pytest.approx(values.sum())
    assert thumbnail(values[:5, :7]) is not None
    np.testing.assert_allclose(thumbnail(values[:5, :7]), values[:5, :7])


SHAPES = [(1, 12, 12), (3, 12, 12), (1, 6, 6, 6), (2, 24), (20,)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", slow_but(SHAPES, (1, 6, 6, 6)), ids=str)
@pytest.mark.parametrize("kind", slow_but(["plain", "black"], "plain"))
def test_inputs_of_every_kind_are_drawn(shape, kind, tmp_path):
    torch.manual_seed(0)
    conv = {1: nn.Linear, 2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    first = conv(shape[0], 5) if len(shape) == 1 else conv(shape[0], 5, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(1, *shape) * (kind == "plain")
    model(x)
    mu = RelevanceMeasure(model, x, 1, composite=EpsilonPlus(), residual="sink")
    over = {"input": patches(shape[1:], 2)} if len(shape) > 1 else {}
    graph = mu.flow(["output", "1", "input"], over)
    for layer in graph.layers:
        assert sum(node.mass for node in layer.nodes) == pytest.approx(1, abs=1e-5)
    maps = flow_maps(mu, graph, over)
    spots = {1: 0, 2: (1, 24), 3: (12, 12), 4: (6, 6)}[len(shape)]
    assert {values.shape for values in maps.values()} == ({spots} if spots else set())
    figure = flow_figure(graph, "any", maps=maps)
    figure.savefig(tmp_path / "any.png")
    assert ("no relevance crosses it" in texts(figure)) == (kind == "black")
    if find_spec("plotly"):
        assert len(sankey_figure(graph, "any", maps).layout.images) == len(maps)
        assert FlowGraph.from_json(graph.to_json()) == graph
    profile_figure(profile(mu)).savefig(tmp_path / "layers.png")


def test_pages_of_too_wide_layers_are_refused_in_the_same_words():
    pytest.importorskip("plotly")
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    graph = RelevanceMeasure(wide, torch.randn(1, 8), 0).flow(["0", "input"], top=None)
    with pytest.raises(FlowError, match=r"0 shows 4096 groups, and a figure has room for 40\. Show fewer"):
        sankey(graph)
    assert len(sankey(graph.smaller(top=5))) < 6_000_000


def test_layers_without_relevance_are_drawn_and_too_wide_ones_refused():
    black = RelevanceMeasure(net(), 0 * X[:1], 1, residual="sink", composite=EpsilonPlus())
    figure = flow_figure(black.flow(["output", "0", "input"]))
    assert {"no relevance crosses it", "absorbed"} <= set(texts(figure))
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    graph = RelevanceMeasure(wide, torch.randn(1, 8), 0).flow(["0", "input"], top=None)
    with pytest.raises(FlowError, match=r"0 shows 4096 groups, and a figure has room for 40\. Show fewer"):
        flow_figure(graph)
    assert len(shapes(flow_figure(graph.smaller(top=5)), Rectangle)) == 6 + 6


def test_the_profile_has_the_books_of_each_layer_beside_plain_lrp():
    model, digits = load_model(), load_digits()[0][:1]
    rules = EpsilonPlus()
    mu = RelevanceMeasure(model, digits, 0, composite=rules)
    leaky = RelevanceMeasure(model, digits, 0, composite=EpsilonPlus(), residual="sink")
    names = ["features.12", "input", "features.7"]
    rows = profile(mu, names, leaky)
    assert [row.layer for row in rows] == ["features.12", "features.7", "input"]
    zennit = plain_sums(model, digits, [0], EpsilonPlus(), names)
    for row in rows:
        assert row.plain == pytest.approx(float(zennit[row.layer]), rel=1e-4)
        assert row.mass + row.sink + row.bypass == pytest.approx(1, abs=1e-5)
        assert (row.mass, row.variation) == (
            pytest.approx(float(mu.marginal(row.layer).sum())), pytest.approx(float(mu.variation(row.layer)))
        )  # fmt: skip
    assert abs(rows[-1].plain - rows[-1].mass) > 0.01
    assert {row.layer for row in profile(mu)} >= {"output", "features.0", "input"}
    left, right = profile_figure(rows, "heading", dark=True).axes
    assert right.lines[0].get_xdata().tolist() == [row.variation for row in rows]
    (marks,) = [line for line in left.lines if line.get_label() == "sum of plain LRP"]
    assert marks.get_xdata().tolist() == [row.plain for row in rows]
    with pytest.raises(InputError, match="residual='sink'; this one redistributes"):
        profile(mu, plain=mu)


def test_the_profile_of_a_signed_rule_has_a_logarithmic_scale():
    rows = [ProfileRow("a", 1.0, 0.0, 0.0, 1.0), ProfileRow("b", 0.9, 0.1, 0.0, 4000.0)]
    assert profile_figure(rows).axes[1].get_xscale() == "log"
    assert profile_figure(rows[:1]).axes[1].get_xscale() == "linear"


# -- the page to hover over -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(mu: RelevanceMeasure, full: FlowGraph, tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("plotly")
    graph = full.smaller(top=3)
    maps = flow_maps(mu, graph, sample=1)
    path = tmp_path_factory.mktemp("page") / "flow.html"
    return graph, save_sankey(graph, path, "A <b>bold</b> & odd title", maps)


def test_the_page_is_one_file_that_asks_for_nothing(page):
    _, path = page
    text = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 6_000_000
    assert "A &lt;b&gt;bold&lt;\\u002fb&gt; &amp; odd title" in text
    assert not re.search(r"<(script|link|img|iframe)[^>]*(src|href)=(?!\"data:)", text)
    assert "prefers-color-scheme: dark" in text


BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for path in map(shutil.which, BROWSERS) if path), None)


class Browser:
    """A page in headless Chromium, asked through two pipes: null-terminated JSON, as its debugging protocol has it."""

    def __init__(self, folder: Path, url: str, dark: bool = False) -> None:
        down, up = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe",
                   f"--user-data-dir={folder}", "--host-resolver-rules=MAP * ~NOTFOUND", "--window-size=1200,1000",
                   f"--blink-settings=preferredColorScheme={0 if dark else 1}"]  # fmt: skip
        command = f'exec "$0" "$@" 3<&{down[0]} 4>&{up[1]}'
        self.process = subprocess.Popen(
            ["bash", "-c", command, BROWSER, *options], pass_fds=[down[0], up[1]], stderr=subprocess.DEVNULL
        )
        for end in (down[0], up[1]):
            os.close(end)
        self.write, self.read = os.fdopen(down[1], "wb"), os.fdopen(up[0], "rb")
        self.number, self.left, self.asked, self.session = 0, b"", [], None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Network.enable")
        self.call("Page.navigate", url=url)
        self.wait("document.querySelector('.sankey-link') && document.title")

    def call(self, method: str, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.write.write(json.dumps(message).encode() + b"\0")
        self.write.flush()
        while True:
            while b"\0" not in self.left:
                part = self.read.read1(1 << 20)
                assert part, "the browser went away"
                self.left += part
            text, _, self.left = self.left.partition(b"\0")
            answer = json.loads(text)
            if answer.get("method") == "Network.requestWillBeSent":
                self.asked.append(answer["params"]["request"]["url"])
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def ask(self, script: str):
        return self.call("Runtime.evaluate", expression=script, returnByValue=True)["result"].get("value")

    def wait(self, script: str) -> None:
        end = time.monotonic() + 60
        while not self.ask(f"!!({script})"):
            assert time.monotonic() < end, f"waited in vain for {script}"
            time.sleep(0.05)

    def hover(self, script: str) -> str:
        """Moves the mouse to a place ``[x, y]`` and returns what the label says, line by line."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=2, y=2)
        self.wait("!document.querySelector('.hoverlayer .hovertext')")
        x, y = self.ask(script)
        for step in (1, 0):
            self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x + step, y=y)
        self.wait("document.querySelector('.hoverlayer .hovertext')")
        return self.ask(LABEL)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.write.close()
        self.read.close()


LABEL = """[...document.querySelectorAll('.hoverlayer .hovertext text')].map(text => {
  const lines = [...text.querySelectorAll('tspan.line')];
  return (lines.length ? lines : [text]).map(line => line.textContent).join('\\n');
}).join('\\n')"""
NODE = """(() => {{ const box = document.querySelectorAll('.sankey-node .node-rect')[{number}].getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2]; }})()"""
LINK = """(() => {{ const path = document.querySelectorAll('.sankey-link')[{number}];
  const box = path.getBoundingClientRect();
  const inside = (x, y) => document.elementFromPoint(x, y) === path;
  for (let i = 1; i < 200; i++) for (let j = 1; j < 60; j++) {{
    const x = box.x + box.width * i / 200, y = box.y + box.height * j / 60;
    if (inside(x, y) && inside(x + 1, y)) return [x, y];
  }} return null; }})()"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_says_of_each_node_and_edge_what_it_is_without_a_network(page, tmp_path, dark):
    graph, path = page
    browser = Browser(tmp_path / "profile", path.as_uri(), dark)
    try:
        nodes = [node for node in graph.nodes if node.kind == "group" or abs(node.mass) > 1e-6]
        assert browser.ask("document.querySelectorAll('.sankey-link').length") == len(drawn(graph))
        assert browser.ask("document.querySelectorAll('.sankey-node').length") == len(nodes)
        browser.wait("document.querySelector('.main-svg').style.background")
        paper = browser.ask("getComputedStyle(document.querySelector('.main-svg')).backgroundColor")
        assert paper == ("rgb(22, 24, 28)" if dark else "rgb(255, 255, 255)")
        by_label = {f"{node.layer} {node.label}": node for node in nodes}
        seen = set()
        for number in range(len(nodes)):
            first, mass = browser.hover(NODE.format(number=number)).split("\n")
            node = by_label[first]
            assert mass == f"mass {percent(node.mass)}"
            seen.add(node.key)
        assert seen == {node.key for node in nodes}
        edges = {(f"{e.upper.layer} {e.upper.label} → {e.lower.layer} {e.lower.label}"): e for e in graph.edges}
        found = set()
        for number in range(0, len(drawn(graph)), 4):
            if browser.ask(LINK.format(number=number)) is None:
                continue  # hidden by others
            name, joint, *given = browser.hover(LINK.format(number=number)).split("\n")
            edge = edges[name]
            assert joint == f"joint relevance {percent(edge.mass)}"
            for line, condition in zip(given, (edge.given_upper, edge.given_lower), strict=False):
                assert line.rpartition(": ")[2] == percent(condition)
            found.add(name)
        assert len(found) > 3
        assert [url for url in browser.asked if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
        shown = [node for node in nodes if node.kind == "group" and node.layer != "input"]
        assert browser.ask("document.querySelectorAll('.layer-above image').length") == len(shown)
        assert browser.ask("document.title") == "A <b>bold</b> & odd title"
        picture = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
    finally:
        browser.close()
    with Image.open(io.BytesIO(picture)) as image:
        assert len(image.convert("RGB").resize((200, 150)).getcolors(30_000)) > 100


def test_nodes_fit_into_the_drawing_also_where_signs_cancel(full):
    pytest.importorskip("plotly")
    for graph in (full, full.smaller(top=1), full.smaller(top=3)):
        figure = sankey_figure(graph)
        nodes = [node for layer in graph.layers[::-1] for _, node in drawn_nodes(layer)]
        (drawn_,) = figure.data
        inner = figure.layout.height - figure.layout.margin.t - figure.layout.margin.b
        sizes = np.zeros((2, len(nodes)))
        for side, ends in enumerate((drawn_.link.source, drawn_.link.target)):
            np.add.at(sizes[side], list(ends), list(drawn_.link.value))
        heights, y = sizes.max(0), np.array(drawn_.node.y)
        columns = [[n for n, node in enumerate(nodes) if node.layer == layer.name] for layer in graph.layers]
        pad = drawn_.node.pad
        unit = min((inner - pad * (len(column) - 1)) / heights[column].sum() for column in columns)
        for column in columns:
            ends = [(y[n] * inner - heights[n] * unit / 2, y[n] * inner + heights[n] * unit / 2) for n in column]
            assert all(low[1] + pad <= high[0] + 0.5 for low, high in itertools.pairwise(ends))
            assert ends[0][0] >= -0.5
            assert ends[-1][1] <= inner + 0.5


def test_without_plotly_the_extra_is_named(full, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'nrm-plugin\[html\]'"):
        sankey(full.smaller(top=2))
