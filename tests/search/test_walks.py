"""The search for group walks against enumerated walks: masses, certificates, and the bound on all other walks.

Covers: nrm_plugin.search.best_first_walks, nrm_plugin.search.layer_chain.
"""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nrm_plugin import NRMAbsolute, RelevanceMeasure, top_sets, top_walks
from nrm_plugin.errors import EventError
from nrm_plugin.search import walk_bounds
from tests.search.enumerated import conv_net, enumerated, ordered, slowly


@pytest.mark.medium
@slowly
@given(net=enumerated(), k=st.integers(1, 12))
def test_the_walks_are_the_largest(net, k):
    top = ordered(lambda: top_walks(net.mu, net.layers, k, net.over, budget=math.inf))
    ranked = net.check(top)
    wanted = min(k, int((ranked > 1e-9 * net.spread).sum()))
    assert top.certified >= wanted
    assert top.certified == len(top.walks)


@pytest.mark.slow
@slowly
@given(net=enumerated(), k=st.integers(1, 12), expansions=st.integers(0, 12), budget=st.sampled_from([0.0, math.inf]))
def test_the_bound_holds_wherever_the_search_stops(net, k, expansions, budget):
    net.check(ordered(lambda: top_walks(net.mu, net.layers, k, net.over, budget=budget, expansions=expansions)))


@pytest.mark.slow
@slowly
@given(net=enumerated(), memory=st.sampled_from([1, 2000]))
def test_the_search_is_correct_without_memory_for_tables(net, memory):
    net.mu._max_memory = memory
    net.check(ordered(lambda: top_walks(net.mu, net.layers, 5, net.over, budget=math.inf)))


@pytest.mark.slow
@slowly
@given(net=enumerated(), k=st.integers(1, 6), expansions=st.integers(0, 6))
def test_merged_groups_are_bounded_by_their_lump(net, k, expansions):
    with patch.object(walk_bounds, "MIN_ROWS", 2):  # the rows computed after the deadline
        net.check(ordered(lambda: top_walks(net.mu, net.layers, k, net.over, budget=0.0)))
    top = ordered(lambda: lumped(net, k, expansions))
    net.check(top)


def lumped(net, k, expansions):
    """A search with unlimited time whose bounds merge the groups into two."""
    original = walk_bounds.CompletionBounds._merged_groups
    with (
        patch.object(walk_bounds, "MIN_ROWS", 2),
        patch.object(
            walk_bounds.CompletionBounds, "_merged_groups", lambda self, level, rows: original(self, level, 2)
        ),
    ):
        return top_walks(net.mu, net.layers, k, net.over, budget=math.inf, expansions=expansions)


def test_the_bound_excludes_most_prefixes():
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1, composite=NRMAbsolute())
    top = top_walks(mu, ["6", "4", "2", "0"], 1, budget=math.inf)
    assert top.certified == 1
    assert top.expanded < 5 + 5 * 7, "as many expansions as without a bound"


def test_a_search_without_budget_certifies_nothing_and_still_has_a_bound():
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1)
    top = top_walks(mu, ["6", "4", "2", "0"], 3, budget=0.0)
    assert top.certified == 0
    assert top.missed > 0
    assert top.walks
    assert top.expanded <= 3  # the prefixes of one walk


@pytest.mark.medium
def test_a_search_that_is_stopped_early_returns_k_walks():
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1, max_memory=1)
    top = top_walks(mu, ["6", "4", "2", "0"], 3, budget=math.inf, expansions=3)
    assert len(top.walks) == 3


def test_a_walk_is_an_event_and_walks_are_disjoint():
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1)
    top = top_walks(mu, ["6", "2"], 4)
    masses = mu([top.event(number) for number in range(4)])[:, 0]
    torch.testing.assert_close(masses, torch.tensor([walk.mass for walk in top.walks]), atol=1e-6, rtol=1e-4)
    either = top.event(0) | top.event(1) | top.event(2) | top.event(3)
    assert abs(float(mu(either)) - top.mass) < 1e-5


def test_each_layer_may_have_its_own_kind_of_groups():
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1)
    top = top_walks(mu, ["6", "input"], 2, over=["channel", "position"])
    best = mu.joint("6", "input", over=("channel", "position"))[0].abs()
    assert top.walks[0].groups == tuple(int(i) for i in torch.unravel_index(best.argmax(), best.shape))


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"layers": []}, ValueError),
        ({"layers": "6"}, ValueError),
        ({"layers": ["0", "6"]}, EventError),
        ({"layers": ["6"], "k": 0}, ValueError),
        ({"layers": ["6"], "over": ["channel", "channel"]}, ValueError),
        ({"layers": None}, ValueError),
    ],
)
def test_invalid_arguments_raise(arguments, kind):
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1)
    with pytest.raises(kind):
        top_walks(mu, **arguments)


def test_several_samples_raise():
    mu = RelevanceMeasure(conv_net(), torch.rand(2, 1, 6, 6), 1)
    searches = (
        lambda: top_walks(mu, ["6"]),
        lambda: top_walks(mu, k=1, over="neuron"),
        lambda: top_sets(mu, ["6"], 1),
    )
    for search in searches:
        with pytest.raises(ValueError, match="one sample"):
            search()
