"""Sentences about a flow."""

from __future__ import annotations

import re

import numpy as np

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots.flow_caption import flow_caption, named_walks
from nrm_plugin.plots.flow_text import wrapped_lines


def layer(name: str, labels: tuple[str, ...], masses: tuple[float, ...], rest=0.0, sink=0.0, bypass=0.0) -> FlowLayer:
    return FlowLayer(name, tuple(range(len(labels))), labels, masses, rest, 7 if rest else 0, sink, bypass)


def clean(text: str) -> str:
    return text.replace("\u00a0", " ")


TOP = layer("output", ("zebra",), (1.0,))
MIDDLE = layer("conv", ("group 1", "group 2"), (0.8, -0.1), rest=0.3)
LOWEST = layer("input", ("legs", "head", "sky"), (0.5, 0.3, -0.05), rest=0.15, sink=0.1)
JOINTS = (
    np.array([[0.8, -0.1, 0.3, 0.0], [0, 0, 0, 0], [0, 0, 0, 0]]),
    np.array([[0.4, 0.25, 0.05, 0.1, 0.0], [0.0, 0.0, -0.1, 0.0, 0.0], [0.1, 0.05, 0.0, 0.05, 0.1], [0, 0, 0, 0, 0]]),
)


def test_the_caption_says_the_largest_numbers():
    said = flow_caption(FlowGraph((TOP, MIDDLE, LOWEST), JOINTS))
    assert said == (
        "Of “zebra”, 50% comes from legs; the other 2 shown together have 25%. Against “zebra”: group 2 of conv with "
        "−10%. The other 7 of conv have 30%. 10% is lost to biases and constants above the input."
    )


def test_the_caption_names_the_file_of_the_groups():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS, origin="pets.safetensors, where they were found on 3 samples")
    end = " The groups are from pets.safetensors, where they were found on 3 samples."
    assert flow_caption(graph) == flow_caption(FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)) + end


def test_walks_over_groups_are_named_with_the_parts_that_hold_most():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    walks = [
        (("input/0", "conv/0", "output/0"), 0.4),
        (("input/1", "conv/0", "output/0"), 0.25),
        (("input/2", "conv/1", "output/0"), 0.1),
    ]
    said = flow_caption(graph, walks=walks).replace("\u00a0", " ")
    assert said.startswith(
        "Of “zebra”, 50% comes from legs; the other 2 shown together have 25%. The strongest of 6 walks (paths through "
        "one node of each layer) from a part to the output are legs → group 1 → zebra (40%) and head → group 1 → zebra "
        "(25%); an even split would give each 17%. Against “zebra”:"
    )
    one = flow_caption(graph, walks=walks[:1], areas={"input/0": 0.1}, places={"input/0": "bottom"})
    assert "50% comes from legs (bottom, 10% of the area);" in one.replace("\u00a0", " ")
    assert "from a part to the output is legs → group 1 → zebra (40%);" in one.replace("\u00a0", " ")
    lines = wrapped_lines(one, 60, 7)
    assert not any(line.startswith("→") or line == "group" for line in lines)
    spread = [(keys, 0.24 * mass) for keys, mass in walks]  # the strongest has 9.6%
    assert "No single walk (path through one node of each layer) stands out: the strongest of 6 from" in flow_caption(
        graph, walks=spread
    )
    assert (len(named_walks(walks)), len(named_walks(spread))) == (2, 0)
    weak = [(keys, 1e-4 * mass) for keys, mass in walks]
    assert "walk" not in flow_caption(graph, walks=weak)


def test_two_layers_name_the_source():
    joint = np.array([[0.7, 0.2, 0.05, 0.05, 0.0], [0.0] * 5, [0.0] * 5])
    graph = FlowGraph((TOP, LOWEST), (joint,))
    assert flow_caption(graph).startswith("Of “zebra”, 50% comes from legs;")


def test_relevance_passes_through_a_lowest_layer_that_is_hidden():
    upper = FlowGraph((TOP, MIDDLE), JOINTS[:1])
    assert flow_caption(upper).replace("\u00a0", " ").startswith("Of “zebra”, 80% passes through group 1 of conv.")
    channels = layer("conv", ("3", "8"), (0.4, 0.2), rest=0.4)
    assert "The other 7 channels of conv have 40%." in flow_caption(FlowGraph((channels,), ()))


def test_hidden_layers_name_the_widest_way_and_bypass():
    upper = layer("block", ("group 3", "group 4"), (0.6, 0.4), bypass=0.2)
    middle = JOINTS[0][[0, 1, 2, 2]] * 0
    middle[0, 0] = 0.55
    graph = FlowGraph((TOP, upper, MIDDLE, LOWEST), (np.array([[0.6, 0.4, 0, 0]] + [[0.0] * 4] * 2), middle, JOINTS[1]))
    said = flow_caption(graph)
    assert "The widest ribbon between the shown groups of conv and block is group 1 → group 3: 55%." in clean(said)
    assert "20% bypasses block." in said


def test_the_widest_ribbon_may_be_negative_and_joins_channels():
    upper, lower = layer("block", ("3", "4"), (0.6, 0.4)), layer("conv", ("366", "8"), (0.8, 0.2))
    joint = np.array([[0.3, 0.2, 0, 0], [-0.5, 0.1, 0, 0], [0.9, 0, 0, 0], [0, 0, 0, 0]])
    graph = FlowGraph((TOP, upper, lower, LOWEST), (np.zeros((3, 4)), joint, JOINTS[1]))
    said = clean(flow_caption(graph))
    assert "between the shown channels of conv and block is channel 366 → channel 4: −50%." in said


def test_ribbons_that_are_narrower_than_a_named_walk_are_explained():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    walks = [(("input/0", "conv/0", "output/0"), 0.5), (("input/1", "conv/0", "output/0"), 0.25)]
    said = clean(flow_caption(graph, walks=walks))
    assert "The ribbon legs → group 1 (40%) is narrower, since other walks through it are negative" in said
    both = clean(flow_caption(graph, walks=[walks[0], (walks[1][0], 0.3)]))
    assert "The ribbons legs → group 1 (40%) and head → group 1 (25%) are narrower" in both
    assert "narrower" not in flow_caption(graph, walks=[(walks[0][0], 0.4), walks[1]])


def test_walks_against_the_target_are_named_with_their_sign():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    against, towards = ("input/1", "conv/0", "output/0"), ("input/0", "conv/0", "output/0")
    said = clean(flow_caption(graph, walks=[(against, -0.5), (towards, 0.3)]))
    assert "are head → group 1 → zebra (−50%) and legs → group 1 → zebra (30%); an even split" in said
    assert "The ribbons head → group 1 (25%) and group 1 → zebra (80%) are narrower, since other" in said
    assert "through them are positive" in said


def test_few_channels_are_said_before_the_ribbons():
    few = layer("conv", ("3", "8"), (0.1, 0.05), rest=0.85)
    more = layer("conv", ("3", "8"), (0.2, 0.05), rest=0.75)
    said = flow_caption(FlowGraph((TOP, few, LOWEST), JOINTS))
    assert (
        "The 2 shown channels of conv carry 15%; groups of channels (--groups, or over='groups') show all of it."
        in said
    )
    assert "The other 7" not in said
    said = flow_caption(FlowGraph((TOP, more, LOWEST), JOINTS))
    assert "--groups" not in said
    assert "The other 7 channels of conv have 75%." in said
    opposed = layer("conv", ("3", "8"), (-0.9, 0.05), rest=1.85)  # carries much, of either sign
    assert "--groups" not in flow_caption(FlowGraph((TOP, opposed, LOWEST), JOINTS))


def test_the_part_with_most_relevance_per_area_is_named_if_it_is_another_one():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    areas = {"input/0": 0.3, "input/1": 0.1, "input/2": 0.4}
    assert "Relevance is densest in head: 3 times its share of the area." in flow_caption(graph, areas=areas)
    assert "densest" not in flow_caption(graph, areas={**areas, "input/0": 0.05})  # it is the largest
    assert "densest" not in flow_caption(graph, areas={**areas, "input/0": 0.6, "input/1": 0.25})  # about alike
    assert "densest" not in flow_caption(graph, areas={**areas, "input/0": 0.5, "input/1": 0.22})  # the title names it
    assert "densest" not in flow_caption(graph)


def test_every_number_of_a_caption_is_one_of_the_graph():
    said = flow_caption(FlowGraph((TOP, MIDDLE, LOWEST), JOINTS))
    assert re.findall(r"[−\d]+%", said) == ["50%", "25%", "−10%", "30%", "10%"]


def negative(graph: FlowGraph) -> FlowGraph:
    """The same flow for an output that is behind: all relevance with the opposite sign."""
    layers = [
        FlowLayer(one.name, one.groups, one.labels, tuple(-mass for mass in one.masses), -one.rest, one.others,
                  -one.sink, -one.bypass)
        for one in graph.layers
    ]  # fmt: skip
    return FlowGraph(tuple(layers), tuple(-joint for joint in graph.joints))


def test_a_negative_flow_has_the_sentences_of_the_positive_one_with_opposite_signs():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    walks = [(("input/0", "conv/0", "output/0"), 0.4), (("input/1", "conv/0", "output/0"), 0.25)]
    areas = {"input/0": 0.3, "input/1": 0.1, "input/2": 0.4}
    said = clean(flow_caption(negative(graph), walks=[(keys, -mass) for keys, mass in walks], areas=areas))
    assert said == (
        "Of “zebra”, −50% comes from legs (30% of the area); the other 2 shown together have −25%. Relevance is "
        "densest in head: 3 times its share of the area. The strongest of 6 walks (paths through one node of each "
        "layer) from a part to the output are legs → group 1 → zebra (−40%) and head → group 1 → zebra (−25%); an even "
        "split would "
        "give each −17%. For “zebra”: group 2 of conv with 10%. The other 7 of conv have −30%. −10% is lost to biases "
        "and constants above the input."
    )
    positive = clean(flow_caption(graph, walks=walks, areas=areas)).replace("Against “zebra”", "For “zebra”")
    assert said.replace("−", "") == positive.replace("−", "")


def test_all_that_speak_against_are_named():
    middle = layer("conv", ("A1", "A2", "A3", "A4"), (0.9, 0.5, -0.3, -0.1))
    graph = FlowGraph((TOP, middle, LOWEST), (np.zeros((3, 6)), np.zeros((6, 5))))
    said = flow_caption(graph)
    assert "Against “zebra”: A3 of conv with −30% and A4 of conv with −10%." in said


def test_totals_of_both_signs_are_stated_where_they_cancel():
    upper = layer("conv", ("A1", "A2", "A3"), (0.9, 0.51, -0.41))
    less = layer("block", ("B1", "B2"), (1.3, -0.3))
    graph = FlowGraph((TOP, less, upper, LOWEST), (np.zeros((3, 4)), np.zeros((4, 5)), np.zeros((5, 5))))
    said = "In conv, 100% = 141% − 41%, the totals of its nodes for and against."
    assert said in flow_caption(graph)
    assert "In conv, −100% = 41% − 141%, the" in flow_caption(negative(graph))
    assert "In block" not in flow_caption(graph)
    for mass, stated in ((0.21, True), (0.19, False)):
        one = layer("conv", ("A1", "A2"), (1 + mass, -mass))
        assert ("% − " in flow_caption(FlowGraph((TOP, one), (np.zeros((3, 4)),)))) == stated
    difference = layer("conv", ("A1", "A2"), (0.5, -0.5))
    assert "% − " not in flow_caption(FlowGraph((difference,), ()))


def test_a_graph_without_relevance_has_no_caption():
    nothing = FlowLayer("input", (), (), (), 0.0, 0, 1.0, 0.0)
    assert flow_caption(FlowGraph((nothing,), ())) == "100% is lost to biases and constants above the input."
