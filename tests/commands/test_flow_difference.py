"""The difference of two flows in the shell."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nrm_plugin import FlowGraph, RelevanceMeasure, at
from nrm_plugin.commands import flow_difference
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.model_loading import load
from nrm_plugin.dataset.images import load_image
from nrm_plugin.measure import flow_heat_maps, flow_passes
from tests.commands.test_flow import OWN, here  # noqa: F401  (a fixture)

LAYERS = ("--layers", "output", "a", "stem", "input", "--patches", "2")


def measure(path: str, target: int, **more) -> RelevanceMeasure:
    loaded = load("flow_nets:Branches", size=16)
    return RelevanceMeasure(loaded.model, loaded.preprocessing(load_image(Path(path)).image), target, **more)


def difference(*options: str) -> FlowGraph:
    assert main(["flow", "noise.png", *OWN, *LAYERS, *options]) == 0
    return FlowGraph.from_json(Path("nrm-flow/noise-difference.json"))


def check(graph: FlowGraph, first: RelevanceMeasure, second: RelevanceMeasure) -> None:
    """Compares nodes and edges between channels with events of both measures."""
    for layer in graph.layers:
        total = sum(layer.masses) + layer.rest + layer.sink + layer.bypass
        assert total == pytest.approx(float(first.sign - second.sign), abs=1e-5)
    events = {}
    for layer in graph.layers[1:3]:
        for node in layer.nodes:
            if node.kind == "group":
                events[node.key] = at(layer.name).channel(int(node.label.removeprefix("channel ")))
    for node in (node for layer in graph.layers[1:3] for node in layer.nodes if node.key in events):
        expected = first.sign * first(events[node.key]) - second.sign * second(events[node.key])
        assert node.mass == pytest.approx(float(expected), abs=1e-5)
    edges = [edge for edge in graph.edges if edge.upper.key in events and edge.lower.key in events]
    for edge in edges:
        both = events[edge.upper.key] & events[edge.lower.key]
        assert edge.mass == pytest.approx(float(first.sign * first(both) - second.sign * second(both)), abs=1e-5)
    assert len(edges) >= 4


@pytest.mark.slow
def test_two_classes_are_compared_by_their_outputs_alone(here):  # noqa: F811
    graph = difference("--target", "1", "--minus", "2")
    check(graph, measure("noise.png", 1), measure("noise.png", 2))
    assert set(graph.layers[0].labels) == {"class 1", "class 2"}
    assert [layer.others for layer in graph.layers[1:3]] == [3, 3]
    stored = json.loads(Path("nrm-flow/noise-difference.json").read_text())
    assert re.match(r"More for class 1: .*; more for class 2: ", stored["finding"])
    assert stored["caption"] == "The softmax is 25% for class 1 and 27% for class 2."
    assert stored["settings"]["minus"] == "class 2"
    assert {path.suffix for path in Path("nrm-flow").iterdir()} == {".json", ".png", ".html"}


@pytest.mark.slow
def test_two_images_are_compared_for_the_same_class(here):  # noqa: F811
    draw = np.random.default_rng(5)
    Image.fromarray(draw.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save("other.png")
    graph = difference("--target", "1", "--minus", "other.png", "--against", "3")
    check(graph, measure("noise.png", 1, against=3), measure("other.png", 1, against=3))


@pytest.mark.medium
def test_two_images_are_drawn_side_by_side(here, monkeypatch):  # noqa: F811
    Image.fromarray(np.random.default_rng(5).integers(0, 255, (20, 20, 3), dtype=np.uint8)).save("other.png")
    drawn, draw = [], flow_difference.flow_figure
    monkeypatch.setattr(
        flow_difference, "flow_figure", lambda *args, **more: drawn.append((args, more)) or draw(*args, **more)
    )
    difference("--target", "1", "--minus", "other.png")
    ((graph, heading, _), more), *_ = drawn
    assert graph.layers[0].name != "output"
    assert heading == "flow of relevance for class 1: noise.png minus other.png"
    assert more["image"].colors.shape == (16, 33, 3)
    assert "Left: noise.png; right: other.png." in more["caption"]


@pytest.mark.medium
def test_groups_of_both_flows_are_the_same(here):  # noqa: F811
    graph = difference("--target", "1", "--minus", "2", "--groups", "2")
    assert [(len(layer.groups), layer.others) for layer in graph.layers[1:3]] == [(2, 0), (2, 0)]
    for layer in graph.layers:
        assert sum(layer.masses) + layer.rest + layer.sink + layer.bypass == pytest.approx(0, abs=1e-5)


@pytest.mark.medium
def test_heat_maps_are_differences_of_joint_relevance_with_the_positions_of_a_layer(here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(flow_passes, "POSITIONS", 5)
    drawn, draw = {}, flow_difference.flow_figure
    monkeypatch.setattr(flow_difference, "flow_figure", lambda *args, **more: drawn.update(more) or draw(*args, **more))
    graph = difference("--target", "1", "--minus", "2", "--against", "3")
    first, second = measure("noise.png", 1, against=3), measure("noise.png", 2, against=3)
    assert first.shape(drawn["maps_at"])[1:] == (6, 14, 14)
    cells = np.arange(16) * 14 // 16
    nodes = [node for node in graph.layers[1].nodes if node.kind == "group"]
    for node in nodes:
        event = at("a").channel(int(node.label.removeprefix("channel ")))
        asked = [mu.sign * mu.marginal(drawn["maps_at"], joint=event)[0].sum(0) for mu in (first, second)]
        found = np.zeros((14, 14))
        np.add.at(found, (cells[:, None], cells), drawn["maps"][node.key])
        np.testing.assert_allclose(found, (asked[0] - asked[1]).numpy(), atol=1e-6)
    assert len(nodes) == 3
    regions = drawn["image"].regions
    assert regions.keys() == {node.key for node in graph.layers[-1].nodes if node.kind == "group"}
    assert all(mask.shape == (16, 16) and mask.sum() == 64 for mask in regions.values())


@pytest.mark.medium
def test_each_flow_takes_one_pass_per_layer(here, monkeypatch):  # noqa: F811
    def no_pass(*args, **more):
        raise AssertionError("joint relevance was computed apart from the shared passes")

    monkeypatch.setattr(RelevanceMeasure, "joints", no_pass)
    calls, passes = [], flow_heat_maps.flow_passes
    monkeypatch.setattr(flow_heat_maps, "flow_passes", lambda *args: calls.append(args) or passes(*args))
    difference("--target", "1", "--minus", "2")
    assert len(calls) == 2


@pytest.mark.medium
def test_what_is_neither_a_class_nor_an_image_is_named_with_its_option(here, capsys):  # noqa: F811
    for minus, message in (("missing.png", "--minus 'missing.png' is a name"), ("9", "--minus 9 is out of range")):
        assert main(["flow", "noise.png", *OWN, *LAYERS, "--minus", minus]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert f"There is no image {minus} either." in error
