"""The legend of a flow."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nrm_plugin.measure.flow_graph import FlowGraph
from nrm_plugin.plots.flow_legend import key_text
from tests.plots.test_flow_caption import JOINTS, LOWEST, MIDDLE, TOP, layer, negative


def test_the_key_explains_what_is_drawn():
    assert "hatched" in key_text(False, True)
    assert "hatched" not in key_text(True, False)
    assert "Thumbnails" in key_text(True, False)
    assert "lies (at the resolution of conv), whatever its amount" in key_text(True, False, maps_at="conv")
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    assert "blue evidence against it" in key_text(False, False, graph=graph)
    assert "cancel" in key_text(False, False, graph=graph)
    positive = FlowGraph((TOP, layer("input", ("legs",), (1.0,))), (np.ones((3, 3)),))
    assert "cancel" not in key_text(False, False, graph=positive)
    assert "blue" not in key_text(False, False, graph=positive)
    assert "blue" in key_text(False, False, graph=positive, has_blue=True)
    cancelling = FlowGraph(positive.layers, (np.array([[1.0, -2e-4, 0], [0, 2e-4, 0], [0, 0, 0]]),))
    assert "blue" in key_text(False, False, graph=cancelling)
    assert "Less than 0.5%" in key_text(False, False, graph=graph)
    assert "Less than 0.5%" not in key_text(False, True, graph=graph)
    assert "named walks" in key_text(False, False, graph=graph, walks=[(("input/0",), 0.4)])
    assert "named walks" not in key_text(False, False, graph=graph, walks=[(("input/0",), 0.01)])


def test_shares_above_all_relevance_and_differences_are_explained():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    assert "more than 100%" in key_text(False, False, graph=graph)
    assert "more than 100%" not in key_text(False, False, graph=FlowGraph((TOP,), ()))
    less = FlowGraph((layer("output", ("zebra", "horse"), (1.0, -1.0)),), ())
    assert "Each layer sums to 0. Percentages are differences" in key_text(False, False, graph=less)
    assert "more than 100%" not in key_text(False, False, graph=less)
    assert "white frame" in key_text(True, False, is_cropped=True)
    assert "white frame" not in key_text(True, False)


def test_a_flow_that_sums_to_minus_one_is_explained():
    graph = FlowGraph((TOP, MIDDLE, LOWEST), JOINTS)
    assert "sums to −100%" not in key_text(False, False, graph=graph)
    said = key_text(False, False, graph=negative(graph))
    assert "Each layer sums to −100%" in said
    assert "Evidence against the output adds up to more than 100%" in said


def test_the_first_column_is_called_the_input_only_if_it_is():
    for name, said in (
        ("input", "The input is on the left."),
        ("tokens", "The input"),
        ("conv", "Lower layers are on"),
    ):
        assert key_text(False, False, graph=FlowGraph((layer(name, ("legs",), (1.0,)),), ())).startswith(said)
    assert key_text(False, False).startswith("The input is on the left.")


def test_a_rest_that_is_not_drawn_is_not_explained():
    empty = layer("input", ("legs",), (1.0,))
    hidden = replace(empty, others=3)
    joint = (np.array([[1.0, 0, 0], [0, 0, 0], [0, 0, 0]]),)
    assert "gray" not in key_text(False, False, graph=FlowGraph((TOP, hidden), joint))
    assert "gray" in key_text(False, False, graph=FlowGraph((TOP, MIDDLE, LOWEST), JOINTS))


def test_groups_of_outputs_are_explained():
    outputs = layer("output", ("teapot + 474", "stupa + 3"), (1.5, -0.5))
    assert "“teapot + 474” is a group of outputs" in key_text(False, False, graph=FlowGraph((outputs,), ()))
    assert "group of outputs" not in key_text(False, False, graph=FlowGraph((TOP,), ()))


def test_each_topic_has_a_line_and_the_numbers_of_groups_are_explained_only_if_they_are_ranks():
    grouped = FlowGraph((TOP, layer("conv", ("A1", "A2"), (0.8, -0.1), rest=0.3), LOWEST), JOINTS)
    said = key_text(True, False, graph=grouped).split("\n")
    assert [line.split(" ")[0] for line in said] == ["The", "The", "A1,", "Thumbnails"]
    assert "together, numbered by their relevance. The nodes of a layer are in an order in which few" in said[2]
    stored = FlowGraph((TOP, layer("conv", ("A1", "A2"), (-0.1, 0.8), rest=0.3), LOWEST), JOINTS)
    assert "carry relevance together. The nodes" in key_text(True, False, graph=stored)
    assert "order" not in key_text(False, False, graph=FlowGraph((TOP,), ()))


def test_only_groups_of_channels_are_explained_as_such():
    grouped = FlowGraph((TOP, layer("conv", ("A1", "A2"), (0.8, -0.1), rest=0.3), LOWEST), JOINTS)
    patched = FlowGraph((TOP, MIDDLE, layer("input", ("A1", "B1", "A2"), (0.5, 0.3, -0.05), rest=0.15)), JOINTS)
    assert "groups of channels" in key_text(False, False, graph=grouped)
    assert "groups of channels" not in key_text(False, False, graph=patched)
    assert "patches of the image" in key_text(False, False, graph=patched)
    assert "patches of the image" not in key_text(False, False, graph=grouped)
    assert "Strongly colored ribbons" in key_text(False, False, graph=grouped)
    assert "Strongly colored ribbons" not in key_text(False, False, graph=FlowGraph((TOP,), ()))
