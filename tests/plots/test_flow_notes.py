"""Parts of the image that stand out in groups of channels."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots import flow_figure
from nrm_plugin.plots.flow import scene_of
from nrm_plugin.plots.flow_html import sankey
from nrm_plugin.plots.flow_layout import SMALLEST
from nrm_plugin.plots.flow_notes import BOTH_SIGNS, both_signs, densities, is_group, lines_of_notes, standing_out
from nrm_plugin.plots.flow_text import text_width
from nrm_plugin.plots.flow_thumbnails import Photo, node_thumbnails
from nrm_plugin.plots.ribbons import LIGHT
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


def test_the_most_over_represented_part_is_named_with_its_share_and_factor(graph):
    said = {"lower/0": "85% from part 1", "lower/1": "57% from part 2", "upper/0": "75% from part 2"}
    overall = {"1": "60%", "2": "40%"}
    assert standing_out(graph, PAIRS) == {
        key: (f"{note}, overall {overall[note[-1]]}", note) for key, note in said.items()
    }
    assert standing_out(graph, {}).keys() == {"lower/0", "lower/1"}  # no joint relevance with the upper layer


def test_nodes_in_which_most_relevance_cancels_state_both_totals(graph):
    joints = (*graph.joints[:2], joint([[0.5, -0.1], [-0.3, 0.9]]))  # both parts cancel, by 0.3 of 0.8 and 0.1 of 1.0
    assert both_signs(with_layer(replace(graph, joints=joints), 3, masses=(0.2, 0.8))) == {
        "input/0": ("+50%\u00a0−30%",),
    }
    opposed = negative(replace(graph, joints=joints))
    assert both_signs(with_layer(opposed, 3, masses=(-0.2, -0.8))) == {"input/0": ("+30%\u00a0−50%",)}
    assert both_signs(graph) == {}


def test_both_totals_are_drawn_below_a_node_and_explained(graph):
    joints = (*graph.joints[:2], joint([[0.5, -0.1], [-0.3, 0.9]]))
    cancelling = with_layer(replace(graph, joints=joints), 3, masses=(0.2, 0.8))
    texts = written(cancelling)
    assert "+50% −30%" in texts
    assert BOTH_SIGNS in " ".join(texts)
    assert not any(BOTH_SIGNS in text for text in written(graph))


def written(graph: FlowGraph) -> list[str]:
    return [text.get_text() for text in flow_figure(graph, maps=maps_of(graph)).axes[0].texts]


@pytest.fixture
def uneven(graph) -> FlowGraph:
    """Group A2 draws on part 1 most, but less than all relevance does, and more on part 2."""
    joints = (*graph.joints[:2], joint([[0.38, 0.02], [0.33, 0.27]]))
    return with_layer(replace(graph, joints=joints), 3, masses=(0.71, 0.29))


def test_the_largest_part_is_not_named_where_it_is_under_represented(uneven):
    assert standing_out(uneven, {})["lower/1"] == ("45% from part 2, overall 29%", "45% from part 2")


def test_a_part_below_the_factor_or_with_a_tiny_share_is_not_named(uneven):
    masses = (0.71, 0.29 - 0.08, 0.08)
    rows = [[0.38, 0.02, 0.0], [0.33, 0.19, 0.08]]
    parts = layer("input", ("part 1", "part 2", "part 3"), masses)
    few = FlowGraph((*uneven.layers[:3], parts), (*uneven.joints[:2], joint(rows)))
    assert standing_out(few, {})["lower/1"][0] == "13% from part 3, overall 8.0%"
    rows[1] = [0.36, 0.185, 0.055]  # 9% of the group, 1.1 times as much as of all relevance
    alike = FlowGraph(few.layers, (*few.joints[:2], joint(rows)))
    assert standing_out(alike, {})["lower/1"][0] == "31% from part 2, overall 21%"
    rows[1] = [0.385, 0.155, 0.06]  # 1.23 times and 1.25 times
    assert "lower/1" not in standing_out(with_layer(replace(few, joints=(*few.joints[:2], joint(rows))), 3,
                                                    masses=(0.71, 0.21, 0.081)), {})  # fmt: skip


def test_a_group_whose_relevance_cancels_has_no_note(graph):
    cancelling = joint([[0.34, 0.06], [0.26, 0.34]])
    cancelling[0, 2] = -0.95  # a rest
    cancelled = replace(graph, joints=(*graph.joints[:2], cancelling))
    assert standing_out(cancelled, PAIRS).keys() == {"lower/1", "upper/0"}
    cancelling[0, 2] = -0.5
    assert standing_out(cancelled, PAIRS).keys() == {"lower/0", "lower/1", "upper/0"}


def test_a_patch_is_called_a_patch(graph):
    patched = with_layer(graph, 3, labels=("A1", "B1"))
    assert standing_out(patched, PAIRS)["lower/0"] == ("85% from patch A1, overall 60%", "85% from patch A1")


def test_parts_are_noted_with_their_relevance_relative_to_their_area(graph):
    areas = {"input/0": 0.3, "input/1": 0.5}
    said = {"input/0": ("2.0 × area", "×2.0"), "input/1": ("0.8 × area", "×0.8")}
    assert densities(graph, areas) == densities(negative(graph), areas) == said
    assert densities(with_layer(graph, 3, masses=(1.2, -0.2)), areas) == {"input/0": ("4.0 × area", "×4.0")}
    assert densities(graph, {"input/0": 0.0}) == {}
    difference = [replace(one, masses=(0.5, -0.5)) for one in graph.layers[2:]]
    assert densities(FlowGraph(tuple(difference), graph.joints[2:]), areas) == {}
    regions = {"input/0": np.eye(60, dtype=bool), "input/1": np.arange(3600).reshape(60, 60) < 900}
    photo = Photo(torch.rand(3, 60, 60), regions=regions)
    found = [text.get_text() for text in flow_figure(graph, maps=maps_of(graph), image=photo).axes[0].texts]
    assert {"36 × area", "1.6 × area"} <= {*found}
    assert "Below a part: its share of all relevance as a multiple of its share of the area." in " ".join(found)
    assert "Below a group" not in " ".join(found)
    assert ">1.6 × area</text>" in sankey(graph, maps=maps_of(graph), image=photo)


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
@pytest.mark.parametrize(
    ("width", "said"),
    [
        (20, ["45% from part 2,", "overall 8.0%"]),
        (9, ["45% from part 2,", "overall 8.0%"]),
        (6, ["45% from", "part 2"]),
        (3.3, []),  # never only "part 2", which would read as the name of the group
    ],
)
def test_notes_use_the_longest_version_that_fits(many, width, said):
    scene = scene_of(many, "", "", node_thumbnails(many, maps_of(many)), None, width, pairs={})
    node = next(node for node in scene.nodes if node.node.label == "A9")
    lines = [label for label in node.labels if label.tone == "pale"]
    assert [line.text for line in lines] == said
    assert node.thumbnail is not None
    for line in lines:
        assert line.size >= SMALLEST
        assert text_width(line.text, line.size) <= node.thumbnail.width
    places = [label.y for label in node.labels]
    assert all(second - first > 0.9 * SMALLEST for first, second in pairwise(places))
    assert max(places, default=0) < node.box.bottom
    assert ("“Overall”" in " ".join(label.text for label in scene.legend)) == ("overall" in " ".join(said))


def test_all_notes_of_a_column_have_the_same_version():
    notes = {"a": ("45% from part 2, overall 20%", "45% from part 2"), "b": ("4% from a part 1, overall 2%", "4%")}
    assert lines_of_notes(["a", "b", "c"], notes, 500, 5) == [notes["a"][0], notes["b"][0], ""]
    narrow = text_width("45% from part 2,", 5) + 0.1
    assert lines_of_notes(["a"], notes, narrow, 5) == ["45% from part 2,\noverall 20%"]
    one = {"a": notes["a"], "b": ("an unbreakable-note-that-is-far-too-long", "4%")}
    assert lines_of_notes(["a", "b"], one, narrow, 5) == ["45% from part 2", "4%"]
    assert lines_of_notes(["a", "b"], one, 3, 5) == ["", ""]


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


@pytest.mark.medium
def test_names_with_numbers_of_channels_are_not_cut(graph):
    thumbnails = node_thumbnails(graph, maps_of(graph))
    for width in np.arange(3, 9, 0.25):
        scene = scene_of(graph, "", "", thumbnails, None, float(width), counts={"lower/0": 287, "lower/1": 9})
        assert [label.text for node in scene.nodes for label in node.labels if "…" in label.text] == []


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
    said = ["57% from part 2", "75% from part 2", "85% from part 1"]
    said = [f"{note}," for note in said] if width is None else [note[:8] for note in said]
    notes = [text for text in drawn if text.get_text() in said and text.get_color() == LIGHT.pale]
    assert sorted(text.get_text() for text in notes) == said
    note = next(text for text in notes if text.get_text().startswith("85%"))
    assert note.get_fontsize() >= SMALLEST
    name = next(text for text in drawn if text.get_text().split(" ")[0] == "A1")
    assert note.get_position()[0] == name.get_position()[0]
    assert 0 < note.get_position()[1] - name.get_position()[1] < 20
    assert "Below a group" in " ".join(found)
    plain = [text.get_text() for text in flow_figure(graph, width=width).axes[0].texts]
    assert not any("85%" in text for text in plain)
    assert "Below a group" not in " ".join(plain)
    assert "85% from part 1" in sankey(graph, maps=maps_of(graph), pairs=PAIRS)
