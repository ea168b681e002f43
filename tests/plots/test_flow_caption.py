"""Sentences about a flow."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.plots.flow_caption import difference_caption, flow_caption, key_text
from nrm_plugin.plots.flow_text import wrapped_lines


def layer(name: str, labels: tuple[str, ...], masses: tuple[float, ...], rest=0.0, sink=0.0, bypass=0.0) -> FlowLayer:
    return FlowLayer(name, tuple(range(len(labels))), labels, masses, rest, 7 if rest else 0, sink, bypass)


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
        "Of “zebra”, 50% comes from legs. Against it: group 2 of conv with −10%. The other 7 of conv hold 30%. "
        "Biases and stabilizers absorb 10% above the input."
    )


def test_walks_over_groups_are_named_with_the_parts_that_hold_most():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    walks = [
        (("input/0", "conv/0", "output/0"), 0.4),
        (("input/1", "conv/0", "output/0"), 0.25),
        (("input/2", "conv/1", "output/0"), 0.1),
    ]
    said = flow_caption(graph, walks=walks).replace("\u00a0", " ")
    assert said.startswith(
        "Of “zebra”, 50% comes from legs. Of the 6 walks from a part to the output, the strongest are "
        "legs → group 1 → zebra: 40%; head → group 1 → zebra: 25%; an even share would be 17%. Against it:"
    )
    one = flow_caption(graph, walks=walks[:1], areas={"input/0": 0.1}, places={"input/0": "bottom"})
    assert "50% comes from legs (bottom, 10% of the area)." in one.replace("\u00a0", " ")
    assert "the strongest is legs → group 1 → zebra: 40%;" in one.replace("\u00a0", " ")
    lines = wrapped_lines(one, 60, 7)
    assert not any(line.startswith("→") or line == "group" for line in lines)
    weak = [(keys, 1e-4 * mass) for keys, mass in walks]
    assert "walk" not in flow_caption(graph, walks=weak)


def test_two_layers_name_the_source():
    joint = np.array([[0.7, 0.2, 0.05, 0.05, 0.0], [0.0] * 5, [0.0] * 5])
    graph = FlowGraph((TOP, LOWEST), (joint,))
    assert flow_caption(graph).startswith("Of “zebra”, 50% comes from legs.")


def test_relevance_passes_through_a_lowest_layer_that_is_hidden():
    upper = FlowGraph((TOP, MIDDLE), JOINTS[:1])
    assert flow_caption(upper).replace("\u00a0", " ").startswith("Of “zebra”, 80% passes through group 1 of conv.")
    channels = layer("conv", ("3", "8"), (0.4, 0.2), rest=0.4)
    assert "The other 7 channels of conv hold 40%." in flow_caption(FlowGraph((channels,), ()))


def test_hidden_layers_name_the_widest_way_and_bypass():
    upper = layer("block", ("group 3", "group 4"), (0.6, 0.4), bypass=0.2)
    middle = JOINTS[0][[0, 1, 2, 2]] * 0
    middle[0, 0] = 0.55
    graph = FlowGraph((TOP, upper, MIDDLE, LOWEST), (np.array([[0.6, 0.4, 0, 0]] + [[0.0] * 4] * 2), middle, JOINTS[1]))
    said = flow_caption(graph)
    assert "The widest way up is group 1 of conv → group 3 of block: 55%." in said
    assert "20% bypasses block." in said


def test_every_number_of_a_caption_is_one_of_the_graph():
    said = flow_caption(FlowGraph((TOP, MIDDLE, LOWEST), JOINTS))
    assert re.findall(r"[−\d]+%", said) == ["50%", "−10%", "30%", "10%"]


def test_a_graph_without_relevance_has_no_caption():
    nothing = FlowLayer("input", (), (), (), 0.0, 0, 1.0, 0.0)
    assert flow_caption(FlowGraph((nothing,), ())) == "Biases and stabilizers absorb 100% above the input."


def test_the_key_explains_what_is_drawn():
    assert "hatched" in key_text(False, True)
    assert "hatched" not in key_text(True, False)
    assert "Thumbnails" in key_text(True, False)
    assert "traced down to conv" in key_text(True, False, maps_at="conv")
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    assert "blue evidence against it" in key_text(False, False, graph=graph)
    positive = FlowGraph((TOP, LOWEST), (np.abs(np.ones((3, 5))),))
    assert "no ribbon is evidence against" in key_text(False, False, graph=positive)
    assert "outlined" in key_text(False, False, graph=graph, walks=[(("input/0",), 0.4)])


def test_shares_above_all_relevance_and_differences_are_explained():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    assert "exceed 100%" in key_text(False, False, graph=graph)
    assert "exceed" not in key_text(False, False, graph=FlowGraph((TOP,), ()))
    less = FlowGraph((layer("output", ("zebra", "horse"), (1.0, -1.0)),), ())
    assert "differences between shares" in key_text(False, False, graph=less)
    assert "exceed" not in key_text(False, False, graph=less)
    assert "white frame" in key_text(True, False, is_cropped=True)
    assert "white frame" not in key_text(True, False)


def test_a_rest_that_is_not_drawn_is_not_explained():
    empty = layer("input", ("legs",), (1.0,))
    hidden = replace(empty, others=3)
    joint = (np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]),)
    assert "grey" not in key_text(False, False, graph=FlowGraph((TOP, hidden), joint))
    assert "grey" in key_text(False, False, graph=FlowGraph((TOP, MIDDLE, LOWEST), JOINTS))


def test_a_difference_names_parts_of_the_image_apart_from_other_nodes():
    middle = layer("conv", ("B1", "B2"), (0.3, -0.2))
    lowest = layer("input", ("part 1", "part 2", "part 3"), (0.25, -0.1, 0.001))
    graph = FlowGraph((layer("output", ("zebra", "horse"), (1.0, -1.0)), middle, lowest), JOINTS)
    assert difference_caption(graph, "zebra", "horse", {"input/0": "top"}) == (
        "More for zebra in the image: part 1 (top, 25 points). More for zebra in the network: B1 of conv (30 points). "
        "More for horse in the image: part 2 (10 points). More for horse in the network: B2 of conv (20 points)."
    )
    same = FlowGraph((layer("output", ("zebra",), (0.0,)),), ())
    assert difference_caption(same, "zebra", "horse") == "The flows hardly differ."


def test_only_groups_of_channels_are_explained_as_such():
    grouped = FlowGraph((TOP, layer("conv", ("A1", "A2"), (0.8, -0.1), rest=0.3), LOWEST), JOINTS)
    patched = FlowGraph((TOP, MIDDLE, layer("input", ("A1", "B1", "A2"), (0.5, 0.3, -0.05), rest=0.15)), JOINTS)
    assert "groups of channels" in key_text(False, False, graph=grouped)
    assert "groups of channels" not in key_text(False, False, graph=patched)
