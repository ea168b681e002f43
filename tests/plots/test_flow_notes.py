"""Parts of the image that stand out in groups of channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots import flow_figure
from nrm_plugin.plots.flow_html import sankey
from nrm_plugin.plots.flow_layout import SMALLEST
from nrm_plugin.plots.flow_notes import is_group, standing_out
from tests.plots.test_flow_caption import negative


def layer(name: str, labels: tuple[str, ...], masses: tuple[float, ...]) -> FlowLayer:
    return FlowLayer(name, tuple(range(len(labels))), labels, masses, 0.0, 0, 0.0, 0.0)


def joint(rows: list[list[float]]) -> np.ndarray:
    return np.pad(np.array(rows), ((0, 2), (0, 2)))


@pytest.fixture
def graph() -> FlowGraph:
    """Group A1 draws on part 1 most, A2 on part 2, and B1, against the class, on part 2."""
    layers = (
        layer("output", ("zebra",), (1.0,)),
        layer("upper", ("B1", "B2"), (-0.2, 1.2)),
        layer("lower", ("A1", "A2"), (0.4, 0.6)),
        layer("input", ("part 1", "part 2"), (0.6, 0.4)),
    )
    joints = (joint([[-0.2, 1.2]]), joint([[-0.1, -0.1], [0.5, 0.7]]), joint([[0.34, 0.06], [0.26, 0.34]]))
    return FlowGraph(layers, joints)


PAIRS = {
    ("upper/0", "input/0"): -0.05, ("upper/0", "input/1"): -0.15,
    ("upper/1", "input/0"): 0.65, ("upper/1", "input/1"): 0.55,
}  # fmt: skip


def maps_of(graph: FlowGraph) -> dict[str, np.ndarray]:
    return {node.key: np.ones((60, 60)) for node in graph.nodes if node.kind == "group"}


def with_layer(graph: FlowGraph, number: int, **changes) -> FlowGraph:
    layers = list(graph.layers)
    layers[number] = replace(layers[number], **changes)
    return replace(graph, layers=tuple(layers))


def test_the_part_whose_share_of_a_group_exceeds_its_share_of_all_relevance_is_named(graph):
    said = {"lower/0": "most: part 1 85%", "lower/1": "most: part 2 57%", "upper/0": "most: part 2 75%"}
    assert standing_out(graph, PAIRS) == {
        key: (note, f"part {end.replace(' ', ': ')}", end.replace(" ", ": "))
        for key, note in said.items()
        for end in [note.removeprefix("most: part ")]
    }
    assert standing_out(graph, {}).keys() == {"lower/0", "lower/1"}  # no joint relevance with the upper layer


@pytest.fixture
def uneven(graph) -> FlowGraph:
    """Group A2 draws on part 1 most, as all relevance does, but more on part 2 than this does."""
    joints = (*graph.joints[:2], joint([[0.38, 0.02], [0.33, 0.27]]))
    return with_layer(replace(graph, joints=joints), 3, masses=(0.71, 0.29))


def test_the_largest_source_is_named_before_a_part_that_stands_out(uneven):
    assert standing_out(uneven, {})["lower/1"] == (
        "most: part 1 55%, high: part 2 45%", "most: part 1 55%", "part 1: 55%", "1: 55%",
    )  # fmt: skip


def test_notes_do_not_depend_on_the_sign_of_the_total(graph, uneven):
    for one, pairs in ((graph, PAIRS), (uneven, {})):
        opposite = {key: -mass for key, mass in pairs.items()}
        assert standing_out(negative(one), opposite) == standing_out(one, pairs)


@pytest.fixture
def many(graph) -> FlowGraph:
    """Like ``uneven``, with nine groups, whose bars are lower than their thumbnails."""
    rows = [[0.113, 0.00825]] * 8 + [[0.0165, 0.0135]]
    groups = layer("lower", tuple(f"A{n + 1}" for n in range(9)), (*[0.12125] * 8, 0.03))
    parts = replace(graph.layers[3], masses=(0.9205, 0.0795))
    return FlowGraph((graph.layers[0], groups, parts), (joint([[*groups.masses]]), joint(rows)))


@pytest.mark.medium
@pytest.mark.parametrize(("width", "said"), [(20, True), (3.3, False)])
def test_notes_use_the_longest_version_that_fits(many, width, said):
    drawn = flow_figure(many, width=width, pairs={}, maps=maps_of(many)).axes[0].texts
    found = [text.get_text() for text in drawn]
    assert any("most: part 1 55%, high: part 2 45%" in text for text in found) == said
    assert ("“High” is" in " ".join(found)) == said
    assert any(text in ("part 1: 55%", "1: 55%") for text in found) != said


@pytest.mark.medium
@pytest.mark.parametrize(("width", "name"), [(12, "A1 · 41\u00a0channels"), (6, "A1 · 41\u00a0ch."), (2.2, "A1")])
def test_numbers_of_channels_are_written_where_they_fit(graph, width, name):
    counts = {"lower/0": 41, "lower/1": 1}
    drawn = flow_figure(graph, width=width, counts=counts, maps=maps_of(graph)).axes[0].texts
    found = [text.get_text() for text in drawn]
    assert any(text == name or text.startswith(f"{name}  ") for text in found)
    assert any("A2 · 1\u00a0channel" in text for text in found) == ("channels" in name)
    page = sankey(graph, counts=counts)
    assert "<td>A1 · 41\u00a0channels</td>" in page
    assert 'aria-label="lower, A1 · 41\u00a0channels: 40%"' in page  # and when pointing to it
    assert "<td>B1</td>" in page


def test_small_groups_channels_and_flows_that_end_elsewhere_have_no_notes(graph):
    assert "upper/0" not in standing_out(with_layer(graph, 1, masses=(-0.009, 1.009)), PAIRS)
    assert "upper/0" not in standing_out(graph, {**PAIRS, ("upper/0", "input/1"): -0.3})  # more than all of the group
    assert "lower/0" not in standing_out(with_layer(graph, 2, labels=("3", "5")), PAIRS)
    assert standing_out(with_layer(graph, 3, name="stem"), PAIRS) == {}
    assert standing_out(FlowGraph(graph.layers[2:], graph.joints[2:]), PAIRS) == {}
    assert [is_group("A1", "lower"), is_group("A1", "input"), is_group("channel 1", "lower")] == [True, False, False]


@pytest.mark.medium
@pytest.mark.parametrize("width", [None, 3.3])
def test_notes_are_drawn_below_their_groups_and_explained(graph, width):
    drawn = flow_figure(graph, width=width, maps=maps_of(graph), pairs=PAIRS).axes[0].texts
    found = [text.get_text() for text in drawn]
    start, end = ("most: part ", " ") if width is None else ("", ": ")
    assert {f"{start}1{end}85%", f"{start}2{end}57%", f"{start}2{end}75%"} <= {*found}
    note = next(text for text in drawn if text.get_text() == f"{start}1{end}85%")
    assert note.get_fontsize() >= SMALLEST
    name = next(text for text in drawn if text.get_text().split(" ")[0] == "A1")
    assert note.get_position()[0] == name.get_position()[0]
    assert 0 < note.get_position()[1] - name.get_position()[1] < 20
    assert "Below a group" in " ".join(found)
    plain = [text.get_text() for text in flow_figure(graph, width=width).axes[0].texts]
    assert not any("85%" in text for text in plain)
    assert "Below a group" not in " ".join(plain)
    assert "most: part 1 85%" in sankey(graph, maps=maps_of(graph), pairs=PAIRS)
