"""Joint relevance of the most relevant channels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.commands.demo_figures import LOWER, UPPER
from nrm_plugin.commands.demo_values import choose
from nrm_plugin.commands.joint_relevance import joint_heat_maps, joint_relevance
from nrm_plugin.demo import load_digits, load_model


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model()


@pytest.fixture(scope="module")
def mu(model: nn.Module) -> RelevanceMeasure:
    images, labels = load_digits()
    (sample,), _ = choose(model, images, labels, ["6"])
    return RelevanceMeasure(model, images[sample.index : sample.index + 1], sample.predicted)


@pytest.mark.medium
def test_joint_relevance_is_the_mass_of_each_event(mu: RelevanceMeasure):
    layers = ["features.5", "features.12", "features.7"]
    joint = joint_relevance(mu, layers, 3)
    assert joint.layers == ("features.12", "features.7", "features.5")
    assert joint.values.shape == (3, 3, 3)
    for place in [(0, 0, 0), (2, 1, 0), (1, 2, 2)]:
        a, b, c = (channels[index] for channels, index in zip(joint.channels, place, strict=True))
        event = at("features.12")[a] & at("features.7")[b] & at("features.5")[c]
        torch.testing.assert_close(joint.values[place], mu(event)[0], rtol=1e-4, atol=1e-7)


def test_joint_relevance_of_all_channels_is_the_joint_matrix(mu: RelevanceMeasure):
    joint = joint_relevance(mu, [UPPER, LOWER], 1000)
    matrix = mu.joint(UPPER, LOWER)[0]
    assert joint.sizes == tuple(matrix.shape)
    torch.testing.assert_close(joint.values, matrix[list(joint.channels[0])][:, list(joint.channels[1])])
    strongest = [(joint.channels[0][a], joint.channels[1][b]) for a, b in joint.strongest(4)]
    order = matrix.abs().flatten().argsort(descending=True)[:4]
    assert strongest == [divmod(int(place), matrix.shape[1]) for place in order]


def test_channels_are_the_most_relevant_ones(mu: RelevanceMeasure):
    joint = joint_relevance(mu, [LOWER, UPPER], 5)
    for layer, channels, marginals in zip(joint.layers, joint.channels, joint.marginals, strict=True):
        mass = mu.marginal(layer, over="channel")[0]
        torch.testing.assert_close(marginals, mass[list(channels)])
        assert marginals.abs().min() >= mass.abs().sort(descending=True).values[4]
        assert len(set(channels)) == 5


def test_joint_heat_maps_and_sinks_below_sum_to_the_joint_relevance(mu: RelevanceMeasure):
    joint = joint_relevance(mu, [UPPER, LOWER], 3)
    events = [joint.event(place) for place in joint.strongest(2)]
    below = [at(layer, side="sink") for layer in ("features.0", "features.2", "features.5")]
    absorbed = torch.stack([sum(mu(event & sink)[0] for sink in below) for event in events])
    sums = joint_heat_maps(mu, events).flatten(1).sum(1)
    values = torch.stack([joint.values[place] for place in joint.strongest(2)])
    torch.testing.assert_close(sums + absorbed, values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [[], [UPPER], [UPPER, UPPER]])
def test_joint_relevance_needs_two_different_layers(layers: list[str], mu: RelevanceMeasure):
    with pytest.raises(ValueError, match="two or more different layers"):
        joint_relevance(mu, layers, 3)


def test_joint_relevance_needs_one_sample(model: nn.Module):
    with pytest.raises(ValueError, match="one sample, not of 2"):
        joint_relevance(RelevanceMeasure(model, load_digits()[0][:2], [1, 2]), [UPPER, LOWER], 3)
