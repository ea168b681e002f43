"""The mass of every walk over groups, against events and enumerated walks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from nrm_plugin import NRMAbsolute, RelevanceMeasure, find_groups, top_walks
from nrm_plugin.errors import InputError
from nrm_plugin.search import group_walks as module
from nrm_plugin.search.group_walks import all_masses, group_walks, least_passes
from nrm_plugin.search.layer_chain import LayerChain
from tests.measure.test_group_search import LAYERS, conv_net, images


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return RelevanceMeasure(conv_net(), images(1), 2, against=1)


@pytest.mark.parametrize("layers", [LAYERS[1:], LAYERS[1:3], LAYERS])
def test_every_walk_is_its_event(mu, layers):
    groups = find_groups(mu, layers, 2)
    walks = group_walks(mu, layers[::-1], groups)
    assert walks.layers == tuple(layers)
    for walk in itertools.product(*map(range, walks.masses.shape)):
        event = groups.event(mu, layers[0], walk[0])
        for layer, group in zip(layers[1:], walk[1:], strict=True):
            event = event & groups.event(mu, layer, group)
        assert walks.masses[walk] == pytest.approx(float(mu(event) * mu.sign), abs=1e-12)


@pytest.mark.medium
def test_walks_are_named_and_pass_through_nodes_of_the_flow(mu):
    groups = find_groups(mu, LAYERS[1:], 3)
    walks = group_walks(mu, LAYERS[1:], groups)
    labels = {node.key: node.label for node in mu.flow(LAYERS[1:], groups=groups, top=None).nodes}
    for (keys, mass), (name, same) in zip(walks.through_nodes(7), walks.strongest(7), strict=True):
        assert mass == same
        assert " → ".join(labels[key] for key in keys) == name


@pytest.mark.medium
def test_walks_add_up_to_the_flow(mu):
    groups = find_groups(mu, LAYERS[1:], 3)
    walks = group_walks(mu, LAYERS[1:], groups)
    graph = mu.flow(LAYERS[1:], groups=groups, top=None)
    for pair, joint in enumerate(graph.joints):
        others = tuple(place for place in range(4) if place not in (pair, pair + 1))
        assert np.allclose(walks.masses.sum(others), joint[:-2, :-2], atol=1e-12)
    assert walks.masses.sum() == pytest.approx(float(mu.sign) * (1 - float(mu.sink("input"))))


def test_relevance_and_groups_may_meet_at_any_layer(mu, monkeypatch):
    groups = find_groups(mu, LAYERS[1:], 2)
    chain = LayerChain(mu, LAYERS[1:], [groups.over(mu, layer) for layer in LAYERS[1:]])
    found = []
    for middle in range(4):
        monkeypatch.setattr(module, "_passes", lambda counts, level, middle=middle: abs(level - middle))
        with torch.no_grad():
            found.append(all_masses(chain, [2, 2, 2, 2]))
    assert all(np.allclose(found[0], one, atol=1e-13) for one in found[1:])


def test_the_least_number_of_passes():
    # Down from the first layer, or up from the last one: one for each walk over the layers on this side.
    assert least_passes([1, 2, 3]) == min(1 + 1 * 2, 1 + 3, 3 + 2 * 3)


@pytest.mark.medium
def test_top_walks_over_groups_are_the_strongest_of_all(mu):
    groups = find_groups(mu, LAYERS[1:], 2)
    walks = group_walks(mu, LAYERS[1:], groups)
    top = top_walks(mu, LAYERS[1:], 5, over="groups", groups=groups)
    largest = np.sort(np.abs(walks.masses), axis=None)[::-1]
    assert [abs(walk.mass) for walk in top.walks] == pytest.approx(largest[:5].tolist())
    assert top.missed == pytest.approx(largest[5])
    assert top.certified == 5
    assert torch.allclose(mu(top.event(0)), torch.tensor(top.walks[0].mass).double())
    named = walks.strongest(1)[0]
    names = [groups.names[n][group] for n, group in enumerate(top.walks[0].groups)]
    assert named == (" → ".join(names[::-1]), pytest.approx(top.walks[0].mass * float(mu.sign)))
    assert len(top_walks(mu, LAYERS[1:3], 3, over="groups").walks) == 3


def test_walks_are_of_one_sample_and_not_too_many(mu, monkeypatch):
    several = RelevanceMeasure(conv_net(), images(2), 2, composite=NRMAbsolute())
    with pytest.raises(ValueError, match="the measure has 2"):
        group_walks(several, LAYERS)
    monkeypatch.setattr(module, "MOST", 3)
    with pytest.raises(InputError, match="there are 4 walks over these groups"):
        group_walks(mu, LAYERS[1:3], k=2)
