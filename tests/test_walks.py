"""The search for walks and sets against enumerated walks: what is found, and what is claimed of the rest."""

from __future__ import annotations

import itertools
import math
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from zennit.composites import NameMapComposite
from zennit.rules import AlphaBeta, Epsilon, Gamma, WSquare, ZBox

from nrm_plugin import Absolute, ConservingEpsilon, NRMAbsolute, RelevanceMeasure, at, best_walk, top_sets, top_walks
from nrm_plugin.errors import EventError, NRMError
from nrm_plugin.search import walks
from tests.nets import rule_maps, tiny_net, tiny_nets, zennit_composite
from tests.oracles import AbsoluteShare, enumerate_walks

NETS = ["chain_mlp", "conv_chain", "conv1d_chain", "skip", "no_bias_relu"]
slowly = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


class Searched:
    """A measure of one sample, some of its layers, and the mass of every walk over their groups by enumeration."""

    def __init__(self, case, rules, residual, gain_limit, layers, over):
        composite = zennit_composite(case.spec, rules)
        self.mu = RelevanceMeasure(
            case.net, case.x, start=case.start, composite=composite, residual=residual, gain_limit=gain_limit
        )
        self.layers, self.over = layers, over
        walks = enumerate_walks(case.spec, case.x[0], case.start[0], rules, residual, gain_limit)
        self.spread = max(1.0, walks.variation())
        joint = walks.joint(*((name, 0) for name in layers))
        for axis, name in enumerate(layers):
            shape = walks.shapes[walks.node(name)]
            if over == "channel":
                parts = np.split(joint, shape[0], axis)
                joint = np.concatenate([part.sum(axis, keepdims=True) for part in parts], axis)
        self.joint = joint

    def check(self, found):
        masses = np.abs(self.joint).flatten()
        tolerance = 1e-9 * self.spread
        groups = [walk.groups for walk in found.walks]
        assert len(set(groups)) == len(groups)
        for walk in found.walks:
            assert abs(walk.mass - self.joint[walk.groups]) <= tolerance
        rest = [abs(self.joint[place]) for place in np.ndindex(*self.joint.shape) if place not in set(groups)]
        assert max(rest, default=0.0) <= found.missed + tolerance
        ranked = np.sort(masses)[::-1]
        for number, walk in enumerate(found.walks):
            assert walk.certified == (abs(walk.mass) >= found.missed)
            if walk.certified:
                assert abs(abs(walk.mass) - ranked[number]) <= tolerance
        return ranked


@st.composite
def searched(draw, names=NETS, rules=None):
    case = draw(tiny_nets(names, max_batch=1))
    chosen = draw(rule_maps(case)) if rules is None else rules(case)
    taps = [node.tap for node in case.spec if node.kind != "stack"][::-1]
    picked = draw(st.lists(st.sampled_from(taps), min_size=1, max_size=4, unique=True))
    layers = sorted(picked, key=taps.index)
    policy = draw(st.sampled_from([("sink", 2.0), ("redistribute", 1.0), ("redistribute", 2.0)]))
    return Searched(case, chosen, *policy, layers, draw(st.sampled_from(["channel", "neuron"])))


def found_or_unordered(search):
    try:
        return search()
    except EventError:  # two branches of a skip
        assume(False)


@slowly
@given(net=searched(), k=st.integers(1, 12))
def test_the_walks_found_are_the_largest(net, k):
    found = found_or_unordered(lambda: top_walks(net.mu, net.layers, k, net.over, budget=math.inf))
    ranked = net.check(found)
    wanted = min(k, int((ranked > 1e-9 * net.spread).sum()))
    assert found.certified >= wanted
    assert found.certified == len(found.walks)


@pytest.mark.slow
@slowly
@given(net=searched(), k=st.integers(1, 12), expansions=st.integers(0, 12), budget=st.sampled_from([0.0, math.inf]))
def test_the_bound_holds_wherever_the_search_stops(net, k, expansions, budget):
    net.check(
        found_or_unordered(lambda: top_walks(net.mu, net.layers, k, net.over, budget=budget, expansions=expansions))
    )


@pytest.mark.slow
@slowly
@given(net=searched(), memory=st.sampled_from([1, 2000]))
def test_without_memory_for_tables_the_search_is_as_right(net, memory):
    net.mu._max_memory = memory
    net.check(found_or_unordered(lambda: top_walks(net.mu, net.layers, 5, net.over, budget=math.inf)))


@pytest.mark.slow
@slowly
@given(net=searched(), k=st.integers(1, 6), expansions=st.integers(0, 6))
def test_groups_that_share_a_pass_are_bounded_by_their_lump(net, k, expansions):
    with patch.object(walks, "LEAST", 2):  # in the time of none
        net.check(found_or_unordered(lambda: top_walks(net.mu, net.layers, k, net.over, budget=0.0)))
    found = found_or_unordered(lambda: lumped(net, k, expansions))
    net.check(found)


def lumped(net, k, expansions):
    """A search that has time for everything but a pass for each group."""
    kept = walks.Completions._lumped
    with (
        patch.object(walks, "LEAST", 2),
        patch.object(walks.Completions, "_lumped", lambda self, level, rows: kept(self, level, 2)),
    ):
        return top_walks(net.mu, net.layers, k, net.over, budget=math.inf, expansions=expansions)


def net_of(channels=(6, 8, 7, 5), seed=0):
    torch.manual_seed(seed)
    layers = []
    for below, above in itertools.pairwise((1, *channels)):
        layers += [nn.Conv2d(below, above, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels[-1] * 36, 3)).eval()


def test_the_bound_spares_most_prefixes():
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1, composite=NRMAbsolute())
    found = top_walks(mu, ["6", "4", "2", "0"], 1, budget=math.inf)
    assert found.certified == 1
    assert found.expanded < 5 + 5 * 7, "as many as without a bound"


def test_a_search_without_time_says_so_and_has_a_bound_all_the_same():
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1)
    found = top_walks(mu, ["6", "4", "2", "0"], 3, budget=0.0)
    assert found.certified == 0
    assert found.missed > 0
    assert found.expanded == 1


def test_a_search_has_walks_before_it_has_proofs():
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1, max_memory=1)
    found = top_walks(mu, ["6", "4", "2", "0"], 3, budget=math.inf, expansions=3)
    assert len(found.walks) == 3


def test_a_walk_is_an_event_and_walks_are_disjoint():
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1)
    found = top_walks(mu, ["6", "2"], 4)
    masses = mu([found.event(number) for number in range(4)])[:, 0]
    torch.testing.assert_close(masses, torch.tensor([walk.mass for walk in found.walks]), atol=1e-6, rtol=1e-4)
    either = found.event(0) | found.event(1) | found.event(2) | found.event(3)
    assert abs(float(mu(either)) - found.mass) < 1e-5


def test_each_layer_may_have_groups_of_its_own():
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1)
    found = top_walks(mu, ["6", "input"], 2, over=["channel", "position"])
    best = mu.joint("6", "input", over=("channel", "position"))[0].abs()
    assert found.walks[0].groups == tuple(int(i) for i in torch.unravel_index(best.argmax(), best.shape))


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"layers": []}, ValueError),
        ({"layers": "6"}, ValueError),
        ({"layers": ["0", "6"]}, EventError),
        ({"layers": ["6"], "k": 0}, ValueError),
        ({"layers": ["6"], "over": ["channel", "channel"]}, ValueError),
    ],
)
def test_what_makes_no_search_is_refused(arguments, kind):
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1)
    with pytest.raises(kind):
        top_walks(mu, **arguments)


def test_several_samples_are_refused():
    mu = RelevanceMeasure(net_of(), torch.rand(2, 1, 6, 6), 1)
    for search in (lambda: top_walks(mu, ["6"]), lambda: top_sets(mu, ["6"], 1), lambda: best_walk(mu)):
        with pytest.raises(ValueError, match="one sample"):
            search()


@pytest.mark.slow
@slowly
@given(net=searched(), data=st.data())
def test_exact_sets_are_the_best_and_greedy_ones_are_none_better(net, data):
    assume(math.prod(net.joint.shape) <= 3000)
    sizes = [data.draw(st.integers(1, min(2, n))) for n in net.joint.shape]
    found = found_or_unordered(lambda: top_sets(net.mu, net.layers, sizes, net.over, exact=True))
    best = max(
        net.joint[np.ix_(*sets)].sum()
        for sets in itertools.product(
            *(itertools.combinations(range(n), s) for n, s in zip(net.joint.shape, sizes, strict=True))
        )
    )
    assert abs(found.mass - best) <= 1e-9 * net.spread
    greedy = top_sets(net.mu, net.layers, sizes, net.over)
    assert [len(part) for part in greedy.groups] == sizes
    assert abs(greedy.mass - net.joint[np.ix_(*map(list, greedy.groups))].sum()) <= 1e-9 * net.spread
    assert greedy.mass <= found.mass + 1e-9 * net.spread


def test_no_single_layer_of_a_greedy_choice_can_be_improved():
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1)
    found = top_sets(mu, ["6", "4", "2"], 2)
    for level, layer in enumerate(["6", "4", "2"]):
        others = [at(name).channel(list(found.groups[n])) for n, name in enumerate(["6", "4", "2"]) if n != level]
        share = mu.marginal(layer, "channel", joint=others[0] & others[1])[0]
        assert float(share.topk(2).values.sum()) <= found.mass * (1 + 1e-5)


def test_too_many_sets_are_not_tried():
    mu = RelevanceMeasure(net_of(), torch.rand(1, 1, 6, 6), 1)
    with pytest.raises(ValueError, match="have to be tried"):
        top_sets(mu, ["6", "input"], [3, 18], over="neuron", exact=True)
    with pytest.raises(ValueError, match="from 1 to"):
        top_sets(mu, ["6"], 6)


RULES = [Epsilon(), Gamma(), AlphaBeta(), ZBox(-3, 3), WSquare(), Absolute(), ConservingEpsilon(0.5)]
MODULES = [
    (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    (nn.Linear(5, 4), (5,)),
    (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    (nn.ConvTranspose2d(2, 3, 3), (2, 4, 4)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_kernels_without_sign_are_handed_up_as_down(module, shape, rule):
    x = torch.randn(1, *shape, dtype=torch.float64)
    net = nn.Sequential(module.double(), nn.Flatten())
    composite = NameMapComposite([(["0"], rule)])
    mu = RelevanceMeasure(net, x, 0, composite=composite, residual="sink")
    step = next(vertex.step for vertex in mu._recording.graph.vertices if vertex.step is not None)
    values = torch.rand(2, *x.shape, dtype=torch.float64)
    found = step.push_bound((values,)).flatten(1)  # before anything made the branches that are waited for
    units = torch.eye(net(x).shape[1], dtype=torch.float64).view(-1, *step.shape)
    columns = step.pull(units)[0][0].flatten(1).detach()
    exact = values.flatten(1) @ columns.abs().T
    assert bool((found >= exact * (1 - 1e-12)).all())
    repeats = getattr(module, "padding_mode", "zeros") == "reflect"
    if not repeats and not isinstance(rule, (ZBox, ConservingEpsilon)):  # whose branches share entries
        torch.testing.assert_close(found, exact)


def absolute(case):
    return {node.tap: AbsoluteShare("equal") for node in case.spec if node.kind in ("linear", "sum", "avgpool")}


def unsigned(case):
    """Zennit's rules for what routes, shares of absolute values for all else."""
    shares = [([tap], Absolute(floor=0.0)) for tap in absolute(case)]
    rest = zennit_composite([node for node in case.spec if node.tap not in absolute(case)])
    return NameMapComposite([*shares, *rest.name_map])


@pytest.mark.slow
@slowly
@given(seed=st.integers(0, 10_000), name=st.sampled_from(["chain_mlp", "conv_chain", "skip", "no_bias_relu"]))
def test_the_best_walk_of_neurons_is_the_best_of_all(seed, name):
    case = tiny_net(name, seed, 1)
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=unsigned(case), residual="sink")
    walks = enumerate_walks(case.spec, case.x[0], case.start[0], absolute(case), "sink")
    alive = np.where(walks.survives, walks.masses, 0.0)
    assume(alive.max() > 1e-12)
    found = best_walk(mu, chunk=7)
    assert abs(found.mass - alive.max()) <= 1e-9
    inside = walks.survives
    for node in case.spec:
        if node.tap in found.neurons:
            flat = np.ravel_multi_index(found.neurons[node.tap], walks.shapes[walks.node(node.tap)])
            inside = inside & walks.crosses(node.tap, indices=[int(flat)])
    assert abs(walks.mass(inside) - found.mass) <= 1e-9


def test_the_best_walk_needs_kernels_without_sign():
    case = tiny_net("chain_mlp", 1, 1)
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=zennit_composite(case.spec))
    with pytest.raises(NRMError, match="negative"):
        best_walk(mu)
