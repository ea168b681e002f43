"""Restriction against enumerated walks, and selection against the properties that it guarantees."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon, Pass

from nrm_plugin import (
    ABSORBED,
    NRMAbsolute,
    RelevanceMeasure,
    at,
    mse,
    restriction,
    select_neurons,
    smape,
)
from nrm_plugin.demo import load_digits, load_model
from nrm_plugin.errors import InputError
from tests.nets import Chain, rule_maps, tiny_nets, zennit_composite
from tests.oracles import enumerate_walks

LAYERS = ["features.7", "features.2"]
slowly = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def slow_mse(r, s):
    return sum((a - b) ** 2 for a, b in zip(r, s, strict=True)) / len(r)


def slow_smape(r, s):
    pairs = zip(r, s, strict=True)
    return 100 / len(r) * sum(0.0 if a == b == 0 else abs(a - b) / ((abs(a) + abs(b)) / 2) for a, b in pairs)


values = st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, -0.5, 1e-30, 3.0])] * 2), min_size=1, max_size=6)


@given(pairs=values)
def test_errors_equal_their_formulas_also_at_zero(pairs):
    r, s = (list(part) for part in zip(*pairs, strict=True))
    full, left = (torch.tensor([part, part], dtype=torch.float64) for part in (r, s))
    assert mse(full, left).tolist() == pytest.approx([slow_mse(r, s)] * 2)
    assert smape(full, left).tolist() == pytest.approx([slow_smape(r, s)] * 2)


@st.composite
def restricted(draw):
    case = draw(tiny_nets(["chain_mlp", "conv_chain", "conv1d_chain", "no_bias_relu", "skip"], max_batch=2))
    rules = draw(rule_maps(case))
    taps = [node.tap for node in case.spec if node.kind not in ("stack", "input")]
    layers = draw(st.lists(st.sampled_from(taps), min_size=1, max_size=3, unique=True))
    return case, rules, layers, draw(st.integers(0, 1000))


@pytest.mark.slow
@slowly
@given(restricted())
def test_a_restriction_is_the_sum_over_walks_through_kept_neurons(drawn):
    case, rules, layers, seed = drawn
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=zennit_composite(case.spec, rules))
    coin = torch.Generator().manual_seed(seed)
    kept = {name: torch.rand(mu.shape(name), generator=coin) < 0.6 for name in layers}
    part = restriction(mu, kept)
    for n, (x, start) in enumerate(zip(case.x, case.start, strict=True)):
        walks = enumerate_walks(case.spec, x, start, rules)
        inside = np.ones(len(walks), dtype=bool)
        for name, mask in kept.items():
            inside &= walks.crosses(name, indices=mask[n].flatten().nonzero().flatten().tolist())
        scale = max(1.0, walks.variation())
        full, left = walks.marginal("input").flatten(), walks.marginal("input", event=inside).flatten()
        assert abs(float(part.mass[n]) - walks.mass(inside)) <= 1e-9 * scale
        assert np.abs(part.heat_map[n].flatten().numpy() - left).max() <= 1e-9 * scale
        assert abs(float(part.mse[n]) - slow_mse(full, left)) <= 1e-9 * scale**2
        for name in layers:
            masses = [walks.marginal(name, event=event) for event in (None, inside)]
            channels = [part.reshape(len(part), -1).sum(1) for part in masses]
            assert abs(float(part.layers[name][0][n]) - slow_mse(*channels)) <= 1e-9 * scale**2


@pytest.mark.slow
@slowly
@given(restricted())
def test_pruned_relevance_is_the_measure_given_what_is_kept(drawn):
    """One common factor for the kept neurons, which preserves the total relevance of the layer: the λ of PLRP."""
    case, rules, layers, seed = drawn
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=zennit_composite(case.spec, rules))
    layer = layers[0]
    kept = torch.rand(mu.shape(layer)[1:], generator=torch.Generator().manual_seed(seed)) < 0.6
    expected = []
    for x, start in zip(case.x, case.start, strict=True):
        walks = enumerate_walks(case.spec, x, start, rules)
        inside = walks.crosses(layer, indices=kept.flatten().nonzero().flatten().tolist())
        mass = walks.mass(inside)
        assume(abs(mass) > 1e-3 * walks.variation())
        expected.append((walks.marginal("input", event=inside) * (1 / mass), walks.variation()))
    conditional = mu.marginal("input", given=at(layer)[kept], min_ratio=0)
    for row, (pruned, spread) in zip(conditional, expected, strict=True):
        assert np.abs(row.numpy() - pruned).max() <= 1e-6 * max(1.0, spread)


def test_queries_over_input_groups_are_events():
    """Symbolic XAI: the mass of the walks that end in some patches and not in others, with and, or and not."""
    images, labels = load_digits()
    mu = RelevanceMeasure(load_model(), images[:2], labels[:2])
    left, top = torch.zeros(1, 16, 16, dtype=torch.bool), torch.zeros(1, 16, 16, dtype=torch.bool)
    left[..., :8], top[:, :8] = True, True
    heat_map = mu.marginal("input")
    a, b = at("input")[left], at("input")[top]
    for event, mask in ((a & b, left & top), (a | b, left | top), (a - b, left & ~top), (a & ~(a & b), left & ~top)):
        torch.testing.assert_close(mu(event), (heat_map * mask).flatten(1).sum(1), atol=1e-5, rtol=1e-4)


def test_pruning_layer_after_layer_is_one_conditional():
    """By plain autograd: keep the most relevant neurons, rescale them to the former total, go to the next layer."""
    torch.manual_seed(0)
    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) if n % 2 == 0 else nn.ReLU() for n in range(5))).double().eval()
    x = torch.rand(1, 6, dtype=torch.float64)
    rules = NameMapComposite([(["0", "2", "4"], Epsilon(0.0)), (["1", "3"], Pass())])
    mu = RelevanceMeasure(net, x, 2, composite=rules)
    event, values = None, [x]
    for module in net:
        values.append(module(values[-1]).detach())
    relevance = torch.eye(6).double()[2:3]
    for number, layer in ((4, "3"), (2, "1")):
        below, weight = values[number], net[number].weight.detach()
        relevance = below * ((relevance / values[number + 1].where(values[number + 1] != 0, 1.0)) @ weight)
        marginal = mu.marginal(layer) if event is None else mu.marginal(layer, given=event, min_ratio=0)
        torch.testing.assert_close(marginal, relevance)
        kept = relevance[0].abs() >= relevance[0].abs().sort().values[-3]
        relevance = relevance * kept * (relevance.sum() / (relevance * kept).sum())
        event = at(layer)[kept] if event is None else event & at(layer)[kept]
    first = x * ((relevance / values[1].where(values[1] != 0, 1.0)) @ net[0].weight.detach())
    torch.testing.assert_close(mu.marginal("input", given=event, min_ratio=0), first)


def test_queries_over_tokens_are_events():
    """Symbolic XAI: a walk visits one token in every layer; Möbius terms of subsets, compared with events."""
    torch.manual_seed(1)
    net = Chain(conv1=nn.Conv1d(1, 2, 3, padding=1), relu1=nn.ReLU(), conv2=nn.Conv1d(2, 1, 3, padding=1),
                relu2=nn.ReLU(), flatten=nn.Flatten(), head=nn.Linear(4, 2)).double().eval()  # fmt: skip
    x, layers, tokens = torch.randn(1, 1, 4, dtype=torch.float64), ["relu2", "relu1", "input"], range(4)
    mu = RelevanceMeasure(net, x, 1, composite=zennit_composite(net.spec()), residual="sink")
    walks = enumerate_walks(net.spec(), x[0], 1, residual="sink")
    places = [walks.neurons[:, walks.node(layer)] % 4 for layer in layers]  # channels first, so tokens are the rest
    alive = walks.survives

    def inside(subset):
        """R(S): the walks that are at tokens of S in all layers."""
        return walks.mass(alive & np.logical_and.reduce([np.isin(place, list(subset)) for place in places]))

    subsets = [set(s) for size in range(1, 5) for s in itertools.combinations(tokens, size)]
    terms = {frozenset(s): sum((-1) ** (len(s) - len(t)) * inside(t) for t in subsets if t <= s) for s in subsets}

    def somewhere(token):
        first, *rest = (at(layer)[:, token] for layer in layers)
        for other in rest:
            first = first | other
        return first

    a, b, c, d = map(somewhere, tokens)
    queries = [
        (a & b, lambda s: 0 in s and 1 in s),
        (a | b, lambda s: 0 in s or 1 in s),
        ((a & b) - c, lambda s: {0, 1} <= s and 2 not in s),
        (~a & ~d, lambda s: 0 not in s and 3 not in s),
        ((a & ~b) | (c & ~d), lambda s: (0 in s and 1 not in s) or (2 in s and 3 not in s)),
    ]
    for event, query in queries:
        expected = sum(value for subset, value in terms.items() if query(subset))
        assert float(mu(event & ~ABSORBED)) == pytest.approx(expected, abs=1e-10 * max(1.0, walks.variation()))
    assert sum(terms.values()) == pytest.approx(walks.mass(alive))


def measured(count=3, composite=None):
    images, labels = load_digits()
    return RelevanceMeasure(load_model(), images[:count], labels[:count], composite=composite)


@pytest.mark.medium
def test_the_budget_is_met_and_every_layer_keeps_a_group():
    selection = select_neurons(measured(), LAYERS, budget=7)
    total = sum(mask.sum(1) for mask in selection.kept.values())
    assert total.tolist() == [7, 7, 7]
    assert all(bool(mask.any(1).all()) for mask in selection.kept.values())


@pytest.mark.medium
@pytest.mark.parametrize("error", [{"mse": 1e-6}, {"smape": 30.0}])
def test_the_smallest_nested_set_within_an_error(error):
    mu = measured(composite=NRMAbsolute())
    selection = select_neurons(mu, LAYERS, error=error)
    ((metric, limit),) = error.items()
    assert bool((getattr(restriction(mu, selection.kept), metric) <= limit).all())
    smaller = (selection.order < selection.count[:, None] - 1).split([32, 16], 1)
    worse = restriction(mu, dict(zip(LAYERS, smaller, strict=True)))
    assert bool((getattr(worse, metric) > limit).all())


@pytest.mark.medium
def test_the_curve_has_the_errors_of_the_elimination_order():
    mu = measured(composite=NRMAbsolute())
    selection = select_neurons(mu, LAYERS, budget=5, rounds=4)
    assert (selection.curve[0].count, selection.curve[-1].count) == (48, 5)
    for point in selection.curve:
        masks = (selection.order < point.count).split([32, 16], 1)
        left = restriction(mu, dict(zip(LAYERS, masks, strict=True)))
        torch.testing.assert_close(left.mse, point.mse)
        torch.testing.assert_close(left.smape, point.smape)
        torch.testing.assert_close(left.mass, point.mass)
    errors = torch.stack([point.mse for point in selection.curve])
    assert bool((errors.diff(dim=0) >= -1e-12).all()), "with non-negative kernels the error only grows"


@pytest.mark.medium
def test_joint_relevance_selects_better_than_marginals():
    """The purpose of elimination: groups are scored together with the kept groups of other layers."""
    mu = measured(20, NRMAbsolute())
    selection = select_neurons(mu, LAYERS, budget=8)
    marginals = torch.cat([mu.marginal(layer, "channel") for layer in LAYERS], 1)
    tops = torch.zeros_like(marginals, dtype=torch.bool).scatter(1, marginals.topk(8).indices, True)
    plain = restriction(mu, dict(zip(LAYERS, tops.split([32, 16], 1), strict=True)))
    assert float(restriction(mu, selection.kept).mass.mean()) > float(plain.mass.mean())


def test_single_neurons_can_be_selected():
    mu = measured(2)
    selection = select_neurons(mu, ["features.12"], budget=10, over="neuron")
    assert selection.kept["features.12"].shape == (2, 64 * 16)
    assert restriction(mu, {"features.12": selection.kept["features.12"].view(2, 64, 4, 4)}).mass.shape == (2,)


@pytest.mark.parametrize(
    "arguments",
    [
        {"layers": LAYERS},
        {"layers": LAYERS, "budget": 5, "error": {"mse": 1.0}},
        {"layers": LAYERS, "budget": 1},
        {"layers": LAYERS, "error": {"rmse": 1.0}},
        {"layers": LAYERS, "budget": 5, "rounds": 0},
        {"layers": [], "budget": 5},
        {"layers": "features.2", "budget": 5},
    ],
)
def test_invalid_arguments_raise(arguments):
    with pytest.raises(ValueError, match=r"give|keep|must"):
        select_neurons(measured(1), **arguments)


def test_masks_that_do_not_fit_raise():
    mu = measured(2)
    with pytest.raises(InputError, match="has shape"):
        restriction(mu, {"features.2": torch.ones(5, dtype=torch.bool)})
    with pytest.raises(InputError, match="boolean"):
        restriction(mu, {"features.2": torch.ones(16)})
    with pytest.raises(InputError, match="at least one"):
        restriction(mu, {})
