"""The search for sets of groups against enumerated walks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from nrm_plugin import RelevanceMeasure, at, top_sets
from tests.search.enumerated import conv_net, enumerated, ordered, slowly


@pytest.mark.slow
@slowly
@given(net=enumerated(), data=st.data())
def test_exact_sets_are_optimal_and_greedy_sets_are_no_better(net, data):
    assume(math.prod(net.joint.shape) <= 3000)
    sizes = [data.draw(st.integers(1, min(2, n))) for n in net.joint.shape]
    sets = ordered(lambda: top_sets(net.mu, net.layers, sizes, net.over, exact=True))
    best = max(
        net.joint[np.ix_(*choice)].sum()
        for choice in itertools.product(
            *(itertools.combinations(range(n), s) for n, s in zip(net.joint.shape, sizes, strict=True))
        )
    )
    assert abs(sets.mass - best) <= 1e-9 * net.spread
    greedy = top_sets(net.mu, net.layers, sizes, net.over)
    assert [len(part) for part in greedy.groups] == sizes
    assert abs(greedy.mass - net.joint[np.ix_(*map(list, greedy.groups))].sum()) <= 1e-9 * net.spread
    assert greedy.mass <= sets.mass + 1e-9 * net.spread


def test_a_greedy_choice_is_optimal_in_each_layer_given_the_others():
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1)
    sets = top_sets(mu, ["6", "4", "2"], 2)
    for level, layer in enumerate(["6", "4", "2"]):
        others = [at(name).channel(list(sets.groups[n])) for n, name in enumerate(["6", "4", "2"]) if n != level]
        share = mu.marginal(layer, "channel", joint=others[0] & others[1])[0]
        assert float(share.topk(2).values.sum()) <= sets.mass * (1 + 1e-5)


def test_too_many_combinations_and_invalid_sizes_raise():
    mu = RelevanceMeasure(conv_net(), torch.rand(1, 1, 6, 6), 1)
    with pytest.raises(ValueError, match="have to be tried"):
        top_sets(mu, ["6", "input"], [3, 18], over="neuron", exact=True)
    with pytest.raises(ValueError, match="from 1 to"):
        top_sets(mu, ["6"], 6)
