"""Conditions in the format of zennit-crp: errors and forms; hosts/test_crp.py compares the numbers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from zennit.composites import EpsilonPlus

from nrm_plugin import NRM, ConceptNRM, NRMAttributor, RelevanceMeasure, at
from nrm_plugin.attribution.concepts import condition_event
from nrm_plugin.errors import EventError


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize(
    ("conditions", "message"),
    [
        ([], "no condition was given"),
        ([[3]], r"a condition is a mapping such as .* got list"),
        ([{"1": "3"}], r"condition on '1' is '3'; give a list of channel numbers"),
        ([{"1": [1.5]}], r"condition on '1' is \[1.5\]; give a list of channel numbers"),
        ([{"1": True}], "condition on '1' is True; give a list"),
        ([{"y": [2]}], "'y' names output 2, but there are 2"),
        ([{"y": [0, -3]}], "'y' names output -3, but there are 2"),
    ],
)
def test_invalid_conditions_raise(net: nn.Module, conditions, message):
    with pytest.raises(EventError, match=message):
        ConceptNRM(net).attribute(X, conditions)


@pytest.mark.parametrize("ids", [2, [2], (2,), range(2, 3), np.array([2]), torch.tensor([2]), np.int64(2)])
def test_channels_may_be_any_sequence_of_integers(ids):
    assert condition_event({"1": ids}) == at("1").channel([2])


def test_without_outputs_all_are_explained_in_units_of_their_sum(net: nn.Module):
    """Every output starts with its value, as in a measure with this start vector."""
    relevance = ConceptNRM(net).attribute(X, [{"1": [2]}, {}])
    output = net(X).detach()
    mu = RelevanceMeasure(net, X, start=output, composite=NRM(net).composite)
    total = output.sum(1, keepdim=True)
    torch.testing.assert_close(relevance[0], mu.marginal("input", joint=at("1")[2]) * total)
    torch.testing.assert_close(relevance[1], mu.marginal("input") * total)


DIFFERENCES = [
    {"against": 1},
    {"against": "rest"},
    {"baselines": 0},
    {"baselines": torch.ones_like(X)},
    {"baselines": 0.5, "against": 1},
]


@pytest.mark.parametrize("composite", [None, EpsilonPlus()], ids=["default", "rules"])
@pytest.mark.parametrize("settings", DIFFERENCES, ids=str)
def test_channels_of_a_difference_sum_to_the_difference(net: nn.Module, settings, composite):
    """The channels of a layer without bypass divide the walks, whose total is the difference of the outputs."""
    conditions = [{"1": [channel], "y": [0]} for channel in range(4)]
    relevance = ConceptNRM(net, composite).attribute(X, conditions, **settings)
    expected = NRM(net, composite).attribute(X, target=0, **settings)
    torch.testing.assert_close(relevance.sum(0), expected)
    if composite is None and "against" not in settings:
        given = settings["baselines"] * torch.ones_like(X)
        torch.testing.assert_close(relevance.sum((0, 2)), (net(X) - net(given))[:, 0])


@pytest.mark.parametrize("condition", [{"1": [2]}, {"1": [2], "y": [0, 1]}], ids=str)
def test_a_contrast_needs_one_output(net: nn.Module, condition):
    with pytest.raises(EventError, match="every condition must contain it"):
        ConceptNRM(net).attribute(X, [condition], against="rest")


@pytest.mark.parametrize("composite", [None, EpsilonPlus()], ids=["default", "rules"])
def test_an_attributor_explains_the_difference_to_a_baseline(net: nn.Module, composite):
    start = torch.eye(2, dtype=torch.float64)[[1] * 5]
    attributor = NRMAttributor(net, composite, baseline_fn=lambda x: x.roll(1, 0))
    output, mu = attributor(X, start)
    reference = X.roll(1, 0)
    torch.testing.assert_close(output, net(X))
    torch.testing.assert_close(mu.output, (net(X) - net(reference))[:, 1])
    expected = RelevanceMeasure(net, X, 1, composite=composite, reference=reference)
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))
