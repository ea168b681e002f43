"""The sentence above a flow."""

from __future__ import annotations

import re
from itertools import pairwise

import numpy as np

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots.flow_finding import difference_finding, flow_finding, leading, together
from tests.plots.test_flow_caption import JOINTS, LOWEST, MIDDLE, TOP, layer, negative


def graph_of(*layers: FlowLayer) -> FlowGraph:
    sizes = [len(one.groups) + 2 for one in layers]
    return FlowGraph(layers, tuple(np.zeros(pair) for pair in pairwise(sizes)))


PARTS = layer("input", ("part 1", "part 2", "part 3"), (0.45, 0.3, 0.25))
GROUPS = layer("conv", ("A1", "A2", "A3", "A4"), (0.4, 0.3, 0.2, 0.1))


def test_the_fewest_nodes_with_half_of_the_relevance_are_named_with_their_sum():
    places = {"input/0": "top", "input/1": "top", "input/2": "left"}
    assert flow_finding(graph_of(TOP, GROUPS, PARTS), places=places) == (
        "75% of “zebra” comes from parts 1 and 2 (top); of all relevance, 70% passes through A1 and A2 of conv"
    )
    one = layer("input", ("part 1", "part 2"), (0.5, 0.5))
    assert flow_finding(graph_of(TOP, one)) == "50% of “zebra” comes from part 1"
    several = layer("output", ("teapot", "stupa", "cup"), (1.2, -0.2, 0.0))
    assert flow_finding(graph_of(several, one)) == "50% of all relevance comes from part 1"
    assert flow_finding(graph_of(layer("output", ("teapot", "cup"), (1.0, 0.001)), one)).startswith("50% of “teapot”")
    assert flow_finding(graph_of(one)).startswith("50% of all relevance comes from part 1")
    assert flow_finding(graph_of(GROUPS)) == "70% of all relevance passes through A1 and A2 of conv"
    spread = layer("input", tuple(f"part {n}" for n in range(10)), (0.1,) * 10)
    assert flow_finding(graph_of(TOP, spread), "it") == "30% of it comes from parts 0, 1 and 2"


def test_locations_and_areas_belong_to_the_named_parts():
    places = {"input/0": "top", "input/1": "left", "input/2": "left"}
    areas = {"input/0": 0.2, "input/1": 0.31, "input/2": 0.49}
    graph = graph_of(TOP, layer("input", ("part 1", "part 2", "part 3"), (0.2, 0.2, 0.15), rest=0.45))
    less = {key: 0.4 * area for key, area in areas.items()}
    assert flow_finding(graph, places=places, areas=less).endswith(
        "parts 1, 2 and 3 (top, left, left; 40% of the area)"
    )
    unknown = places | {"input/1": ""}  # the locations would not belong to the parts
    assert flow_finding(graph, places=unknown, areas=less).endswith("parts 1, 2 and 3 (40% of the area)")
    same = dict.fromkeys(places, "top")
    assert flow_finding(graph_of(TOP, PARTS), places=same, areas=areas).endswith("1 and 2 (top; 51% of the area)")
    assert flow_finding(graph_of(TOP, PARTS), areas=areas).endswith("parts 1 and 2 (51% of the area)")
    assert "area" not in flow_finding(graph_of(TOP, PARTS), areas={"input/2": 0.49})


UNEVEN = layer("input", ("part 1", "part 2", "part 3"), (0.6, 0.3, 0.1))
AREAS = {"input/0": 0.6, "input/1": 0.35, "input/2": 0.05}


def test_relevance_in_proportion_to_the_area_is_said_to_be_spread():
    graph = graph_of(TOP, GROUPS, UNEVEN)
    assert flow_finding(graph, places={"input/2": "top"}, areas=AREAS) == (
        "Relevance for “zebra” is divided among the parts like the area; densest in part 3 (top): 10% on 5.0% of the "
        "area (×2.0); 70% passes through A1 and A2 of conv"
    )
    assert flow_finding(negative(graph), areas=AREAS) == (
        "Evidence against “zebra” prevails: it is divided among the parts like the area; densest in part 3: −10% on "
        "5.0% of the area (×2.0); −70% passes through A1 and A2 of conv"
    )
    assert flow_finding(graph_of(UNEVEN), areas=AREAS).startswith(
        "Relevance is divided among the parts like the area; densest"
    )
    assert flow_finding(graph, areas=AREAS, half_area=0.09).startswith(
        "Relevance for “zebra” is divided among the parts like the area, but half of it lies on 9.0% of the image; "
    )
    assert "half of it" not in flow_finding(graph, areas=AREAS, half_area=0.26)
    assert "half of it" not in flow_finding(graph, areas={"input/0": 0.1, "input/1": 0.1}, half_area=0.09)
    even = {"input/0": 0.55, "input/1": 0.3, "input/2": 0.15}
    assert (
        flow_finding(graph_of(TOP, UNEVEN), areas=even)
        == "Relevance for “zebra” is divided among the parts like the area"
    )
    for area, spread in (
        (0.47, False),
        (0.49, True),
        (0.74, True),
        (0.76, False),
    ):  # 60% / 1.25 = 48%, 60% · 1.25 = 75%
        said = flow_finding(graph_of(TOP, UNEVEN), areas={**AREAS, "input/0": area})
        assert ("is divided among the parts like the area" in said) == spread


def test_relevance_is_not_spread_if_parts_have_clearly_more_than_their_area():
    parts = layer("input", ("part 1", "part 2", "part 3", "part 4"), (0.3, 0.25, 0.25, 0.2))
    areas = {"input/0": 0.18, "input/1": 0.29, "input/2": 0.4, "input/3": 0.13}  # 55% on 47%, but 50% on 31%
    graph = graph_of(TOP, parts)
    assert flow_finding(graph, areas=areas) == "50% of “zebra” comes from parts 1 and 4 (31% of the area)"
    assert flow_finding(negative(graph), areas=areas).endswith("−50% comes from parts 1 and 4 (31% of the area)")
    nearly = {**areas, "input/0": 0.23, "input/3": 0.17}  # part 1 has 7% more, part 4 no 1.25 times as much
    assert "among the parts like the area; densest in part 1: 30% on 23%" in flow_finding(graph, areas=nearly)


def test_parts_with_more_relevance_than_their_area_lead():
    areas = {"input/0": 0.8, "input/1": 0.15, "input/2": 0.05}
    assert (
        flow_finding(graph_of(TOP, UNEVEN), areas=areas) == "40% of “zebra” comes from parts 2 and 3 (20% of the area)"
    )
    few = {"input/0": 0.3, "input/1": 0.5, "input/2": 0.2}
    assert flow_finding(graph_of(TOP, UNEVEN), areas=few) == "60% of “zebra” comes from part 1 (30% of the area)"
    unknown = {"input/1": 0.15, "input/2": 0.05}  # part 1 lies in the margins
    assert flow_finding(graph_of(TOP, UNEVEN), places={"input/0": "mostly margin"}, areas=unknown) == (
        "60% of “zebra” comes from part 1 (mostly margin)"
    )


def test_a_flow_against_the_output_is_about_the_evidence_against_it():
    channels = layer("conv", ("3", "8", "9"), (1.2, 0.2, -0.4))
    graph = negative(graph_of(TOP, channels, PARTS))
    places = {"input/0": "top", "input/1": "left"}
    assert flow_finding(graph, places=places) == (
        "Evidence against “zebra” prevails: −75% comes from parts 1 and 2 (top, left); of all relevance, −120% "
        "passes through channel 3 of conv and 40% through channel 9"
    )
    assert [node.label for node in leading(graph.layers[1], -1)] == ["3"]
    hidden = negative(graph_of(TOP, layer("conv", ("3", "8"), (0.2, 0.1), rest=0.7), PARTS))
    assert flow_finding(hidden).endswith("−70% passes through the 7 channels of conv that are not shown")
    around = negative(graph_of(TOP, layer("attn", ("head 1",), (0.3,), bypass=0.7), PARTS))
    assert flow_finding(around).endswith("; of all relevance, −70% bypasses attn")


def test_every_number_of_a_finding_is_a_sum_over_named_nodes():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    said = flow_finding(graph)
    assert re.findall(r"[−\d]+%", said) == ["50%", "80%"]
    nodes = {node.label: node.mass for node in graph.nodes}
    assert (nodes["legs"], nodes["group 1"]) == (0.5, 0.8)


def test_the_finding_is_about_the_layer_in_which_the_fewest_nodes_hold_half():
    upper = layer("block", ("B1", "B2"), (0.6, 0.4))
    assert "60% passes through B1 of block" in flow_finding(graph_of(TOP, upper, GROUPS, PARTS))
    assert "60% passes through B1 of block" in flow_finding(graph_of(TOP, GROUPS, upper, PARTS))
    more = layer("block", ("B1", "B2", "B3"), (0.37, 0.35, 0.28))
    assert "72% passes through B1 and B2 of block" in flow_finding(graph_of(TOP, GROUPS, more, PARTS))


def test_strong_evidence_against_the_output_is_part_of_the_finding():
    channels = layer("conv", ("3", "8", "9"), (1.5, 0.2, -0.7))
    said = flow_finding(graph_of(TOP, channels, PARTS))
    assert said.endswith("150% passes through channel 3 of conv and −70% through channel 9")
    weak = layer("conv", ("3", "8", "9"), (1.0, 0.2, -0.2))
    assert "against" not in flow_finding(graph_of(TOP, weak, PARTS))


def test_most_relevance_outside_of_the_shown_nodes_is_the_finding():
    channels = layer("conv", ("3", "8"), (0.2, 0.1), rest=0.7)
    said = flow_finding(graph_of(TOP, channels, PARTS))
    assert said.endswith("70% passes through the 7 channels of conv that are not shown")
    few = layer("input", ("part 1",), (0.3,), rest=0.7)
    assert flow_finding(graph_of(TOP, few)) == "70% of “zebra” comes from the 7 groups that are not shown"


def test_a_layer_that_most_relevance_bypasses_is_said_to_be_bypassed():
    heads = layer("attn", ("head 1", "head 2"), (0.3, 0.1), bypass=0.6)
    assert flow_finding(graph_of(TOP, heads, PARTS)).endswith("; of all relevance, 60% bypasses attn")
    assert flow_finding(graph_of(TOP, heads)) == "60% of “zebra” bypasses attn"


def test_a_common_word_is_named_once():
    assert together(["part 1", "part 2"]) == "parts 1 and 2"
    assert together(["head 1", "head 2", "head 10"]) == "heads 1, 2 and 10"
    assert together(["part 1"]) == "part 1"
    assert together(["part 1", "A2"]) == "part 1 and A2"
    assert together(["part 1", "head 2"]) == "part 1 and head 2"


def test_negative_nodes_do_not_lead():
    assert [node.label for node in leading(layer("conv", ("A1", "A2", "A3"), (0.3, -0.1, 0.1)))] == ["A1", "A3"]
    assert [node.label for node in leading(layer("conv", ("A1", "A2"), (-0.3, -0.1)))] == ["A2"]
    assert flow_finding(graph_of(layer("input", (), (), sink=1.0))) == ""
    assert flow_finding(graph_of(layer("input", ("part 1", "part 2"), (0.3, -0.3)))) == ""  # of two flows


def test_the_finding_of_a_difference_names_the_largest_on_both_sides():
    outputs = layer("output", ("zebra", "horse"), (1.0, -1.0))
    groups, parts = layer("conv", ("B1", "B2"), (0.3, -0.2)), layer("input", ("part 1", "part 2"), (0.25, -0.1))
    graph = graph_of(outputs, groups, parts)
    assert difference_finding(graph, "zebra", "horse", {"input/0": "top"}) == (
        "More for zebra: part 1 (top, 25%) and B1 of conv (30%); more for horse: part 2 (−10%) and B2 of conv (−20%)"
    )
    same = graph_of(outputs, layer("conv", ("B1", "B2"), (0.004, -0.003)), layer("input", ("part 1",), (0.0,)))
    assert difference_finding(same, "zebra", "horse") == (
        "The flows of zebra and horse hardly differ: no share by more than 0.40%"
    )
