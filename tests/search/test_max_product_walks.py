"""The walks of single neurons against enumerated walks, and the deprecated name of the best one.

Covers: nrm_plugin.search.neuron_walks.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from zennit.composites import NameMapComposite

from nrm_plugin import Absolute, NRMAbsolute, RelevanceMeasure, best_walk, top_walks
from nrm_plugin.errors import NRMError
from tests.nets import tiny_net, zennit_composite
from tests.oracles import AbsoluteShare, enumerate_walks
from tests.search.enumerated import slowly


def absolute(case):
    return {node.tap: AbsoluteShare("equal") for node in case.spec if node.kind in ("linear", "sum", "avgpool")}


def non_negative(case):
    """Zennit's rules for routes, shares of absolute values for all other layers."""
    shares = [([tap], Absolute(floor=0.0)) for tap in absolute(case)]
    rest = zennit_composite([node for node in case.spec if node.tap not in absolute(case)])
    return NameMapComposite([*shares, *rest.name_map])


@pytest.mark.slow
@slowly
@given(
    seed=st.integers(0, 10_000),
    name=st.sampled_from(["chain_mlp", "conv_chain", "skip", "no_bias_relu"]),
    k=st.integers(1, 6),
    memory=st.sampled_from([None, 1000]),
)
def test_walks_of_neurons_are_the_largest_of_all(seed, name, k, memory):
    case = tiny_net(name, seed, 1)
    composite = non_negative(case)
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=composite, residual="sink", max_memory=memory)
    walks = enumerate_walks(case.spec, case.x[0], case.start[0], absolute(case), "sink")
    masses = np.sort(np.where(walks.survives, walks.masses, 0.0))[::-1]
    assume(masses[0] > 1e-12)
    top = top_walks(mu, k=k, over="neuron", budget=math.inf)
    assert len(top.walks) >= min(k, int((masses > 1e-12).sum()))
    expected = np.append(masses, np.zeros(k))[: len(top.walks)]  # zeros of the enumeration may be 1e-16 here
    np.testing.assert_allclose([walk.mass for walk in top.walks], expected, rtol=0, atol=1e-9)
    assert top.certified == len(top.walks)
    assert masses[len(top.walks) :].max(initial=0) <= top.missed + 1e-9
    for number, walk in enumerate(top.walks):
        inside = walks.survives
        for node in case.spec:
            if node.tap in top.neurons(number):
                flat = np.ravel_multi_index(top.neurons(number)[node.tap], walks.shapes[walks.node(node.tap)])
                inside = inside & walks.crosses(node.tap, indices=[int(flat)])
            elif node.tap in top.layers:
                inside = inside & ~walks.crosses(node.tap)
        assert abs(walks.mass(inside) - walk.mass) <= 1e-9
        assert abs(float(mu(top.event(number))) - walk.mass) <= 1e-9


def chain_measure(composite):
    case = tiny_net("chain_mlp", 1, 1)
    return RelevanceMeasure(case.net, case.x, start=case.start, composite=composite(case), residual="sink")


def test_over_all_layers_of_a_chain_both_searches_agree():
    mu = chain_measure(non_negative)
    single = top_walks(mu, k=3, over="neuron")
    chain = top_walks(mu, single.layers, k=3, over="neuron")
    assert [walk.groups for walk in chain.walks] == [walk.groups for walk in single.walks]
    np.testing.assert_allclose([walk.mass for walk in chain.walks], [walk.mass for walk in single.walks])


def test_a_search_that_is_stopped_returns_the_largest_walk_and_bounds_the_missed_mass():
    mu = chain_measure(non_negative)
    best = top_walks(mu, k=2, over="neuron", budget=math.inf)
    for limits in ({"budget": math.inf, "expansions": 0}, {"budget": 0.0}):
        stopped = top_walks(mu, k=2, over="neuron", **limits)
        assert len(stopped.walks) == 1
        assert stopped.walks[0].mass == pytest.approx(best.walks[0].mass)
        assert best.walks[1].mass <= stopped.missed * (1 + 1e-9)


def test_a_search_among_equal_walks_is_stopped_after_one_walk():
    layers = [nn.Linear(4, 4, bias=False) for _ in range(6)]
    for layer in layers:
        nn.init.ones_(layer.weight)
    mu = RelevanceMeasure(nn.Sequential(*layers), torch.ones(1, 4), 1, composite=NRMAbsolute())
    stopped = top_walks(mu, k=3, over="neuron", expansions=1)
    assert len(stopped.walks) == 1
    assert stopped.walks[0].mass == pytest.approx(4**-6)
    assert stopped.expanded <= 20  # of 4**6 walks


def test_negative_kernels_raise():
    mu = chain_measure(lambda case: zennit_composite(case.spec))
    with pytest.raises(NRMError, match="negative"):
        top_walks(mu, k=1, over="neuron")


def test_best_walk_is_deprecated_and_returns_the_first_of_the_top_walks():
    mu = chain_measure(non_negative)
    with pytest.warns(DeprecationWarning, match="Use top_walks"):
        walk = best_walk(mu)
    top = top_walks(mu, k=1, over="neuron")
    assert (walk.mass, walk.neurons) == (top.walks[0].mass, top.neurons(0))
