"""The command `flow` with groups."""

from __future__ import annotations

import json
import sys

import pytest

from nrm_plugin import FlowGraph, Groups, patches
from nrm_plugin.commands import flow_groups
from nrm_plugin.commands.cli import main
from tests.commands.test_flow import OWN, here  # noqa: F401

LAYERS = ("--layers", "input", "a", "stem", "output")


def run(*argv: str) -> int:
    return main(["flow", "noise.png", *OWN, "--out", "out", *argv])


@pytest.mark.medium
def test_a_number_of_groups_shows_all_relevance_and_stores_the_groups(here, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(flow_groups, "find_spec", lambda name: None)  # without scikit-image, patches are grouped
    assert run(*LAYERS, "--groups", "3") == 0
    graph = FlowGraph.from_json((here / "out/noise-flow.json").read_text())
    assert [len(layer.groups) for layer in graph.layers] == [1, 3, 3, 3]
    for layer in graph.layers:
        assert layer.rest == pytest.approx(0, abs=1e-5)
        assert sum(layer.masses) + layer.sink + layer.bypass == pytest.approx(1, abs=1e-4)
    assert sorted(graph.layers[-1].labels) == ["part 1", "part 2", "part 3"]
    groups = Groups.load(here / "out/noise-groups.safetensors")
    assert groups.layers == ("output", "a", "stem", "input")
    assert "noise-groups.safetensors" in capsys.readouterr().out
    page = (here / "out/noise-flow.html").read_text()
    for layer in ("a", "stem"):
        counts = groups.labels[groups.layers.index(layer)].bincount().tolist()
        names = [name for name in groups.names[groups.layers.index(layer)] if len(name) == 2]
        assert names
        for name in names:
            count = counts[int(name[1:]) - 1]
            assert f"<td>{name} · {count}\u00a0channel{'' if count == 1 else 's'}</td>" in page
    assert "part 1 ·" not in page


@pytest.mark.medium
def test_stored_groups_are_applied_and_wrong_files_are_named(here, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(flow_groups, "find_spec", lambda name: None)
    assert run(*LAYERS, "--groups", "2") == 0
    first = FlowGraph.from_json((here / "out/noise-flow.json").read_text())
    assert run(*LAYERS, "--groups", "out/noise-groups.safetensors", "--target", "1") == 0
    again = FlowGraph.from_json((here / "out/noise-2-flow.json").read_text())
    assert again.layers[1].rest == pytest.approx(0, abs=1e-5)
    assert {*again.layers[1].labels} == {*first.layers[1].labels}
    assert not (here / "out/noise-2-groups.safetensors").exists()
    assert json.loads((here / "out/noise-2-flow.json").read_text())["settings"]["groups"].endswith("groups.safetensors")
    assert run(*LAYERS, "--groups", "flow_nets.py") != 0
    assert "error: --groups flow_nets.py: flow_nets.py was not written by Groups.save()" in capsys.readouterr().err
    assert run(*LAYERS, "--groups", "nothing.safetensors") != 0
    sys.modules.pop("flow_nets", None)


@pytest.mark.medium
@pytest.mark.parametrize("has_superpixels", [False, True])
def test_an_image_alone_with_one_output_has_parts_of_its_own(here, monkeypatch, has_superpixels):  # noqa: F811
    asked = []
    monkeypatch.setattr(flow_groups, "find_spec", lambda name: has_superpixels or None)
    monkeypatch.setattr(
        flow_groups,
        "segments",
        lambda image, count=16, *more: asked.append(count) or patches(image.shape[-2:], round(count**0.5)),
    )
    assert run("--layers", "input", "output", "--groups", "4") == 0
    graph = FlowGraph.from_json((here / "out/noise-flow.json").read_text())
    assert sorted(graph.layers[1].labels) == ["part 1", "part 2", "part 3", "part 4"]
    assert sum(graph.layers[1].masses) + graph.layers[1].sink == pytest.approx(1, abs=1e-4)
    assert asked == ([16, 4] if has_superpixels else [])
    caption = json.loads((here / "out/noise-flow.json").read_text())["caption"]
    assert "25% of the area" in caption
    assert any(f"({place}, " in caption for place in ("upper left", "upper right", "lower left", "lower right"))
