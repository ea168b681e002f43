"""The cost of queries in kernels run, counted by the measure and independently."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zennit.composites import EpsilonPlusFlat

from nrm_plugin import ABSORBED, NRMDefault, RelevanceMeasure, at
from nrm_plugin.functional.interception_mode import InterceptionMode
from nrm_plugin.functional.registry import name_of
from nrm_plugin.kernels import forward_state
from nrm_plugin.kernels.step import Step

DEPTH, WIDTH = 20, 12


@pytest.fixture
def runs(monkeypatch):
    """Counts all kernels that run, and their vectors."""
    counted = {"kernels": 0, "vectors": 0}

    def counting(method):
        def wrapped(self, first, *rest):
            counted["kernels"] += 1
            rows = first if isinstance(first, torch.Tensor) else next(v for v in (*first, *rest) if v is not None)
            counted["vectors"] += len(rows)
            return method(self, first, *rest)

        return wrapped

    for name in ("pull", "pull_absolute", "push"):
        monkeypatch.setattr(Step, name, counting(getattr(Step, name)))
    return counted


@pytest.fixture
def mu():
    """The measure of a chain: linear layers named 0, 2, 4 … with a ReLU after each, then a linear head; 41 steps."""
    torch.manual_seed(0)
    layers = [module for _ in range(DEPTH) for module in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    net = nn.Sequential(*layers, nn.Linear(WIDTH, 3)).double().eval()
    return RelevanceMeasure(net, torch.randn(2, WIDTH, dtype=torch.double), 1)


ONE_PASS = 2 * DEPTH + 1


def down_to(linear):
    """Number of steps from the output to the output of this linear layer."""
    return ONE_PASS - linear - 1


def measured(mu, runs, query):
    """Cost of a query; the measure's own count must equal the independent one."""
    runs.update(kernels=0, vectors=0)
    query()
    assert (mu.cost.steps, mu.cost.vectors) == (runs["kernels"], runs["vectors"])
    return mu.cost


def test_the_marginals_of_all_taps_are_one_pass(mu, runs):
    assert mu.layers[-2:] == ["40", "output"]  # one tap
    assert len(mu.layers) == ONE_PASS + 2
    cost = measured(mu, runs, lambda: mu.marginal(mu.layers))
    assert (cost.steps, cost.vectors) == (ONE_PASS, ONE_PASS)


def test_sinks_bypasses_and_variations_of_all_taps_are_one_pass_together(mu, runs):
    for layer in mu.layers:
        mu.sink(layer), mu.bypass(layer), mu.variation(layer)
    mu.sinks()
    assert runs == {"kernels": ONE_PASS, "vectors": ONE_PASS}


def test_totals_after_a_marginal_are_free(mu, runs):
    mu.marginal("10")
    runs.update(kernels=0, vectors=0)
    mu.sink("10"), mu.bypass("4"), mu.variation("input"), mu.sinks()
    assert runs["kernels"] == 0


def test_totals_after_joint_matrices_are_free(mu, runs):
    mu.joints(["20", "10"])
    runs.update(kernels=0, vectors=0)
    mu.sink("10"), mu.bypass("4"), mu.variation("input"), mu.sinks()
    assert runs["kernels"] == 0


def test_the_walk_variation_is_one_pass(mu, runs):
    assert measured(mu, runs, mu.walk_variation).steps == ONE_PASS


@pytest.mark.parametrize("lower", [0, 10, 30])
def test_an_intersection_is_one_pass_down_to_its_lower_tap(mu, runs, lower):
    cost = measured(mu, runs, lambda: mu(at("36")[2:5] & at(str(lower))[[0, 3]]))
    assert (cost.steps, cost.vectors) == (down_to(lower), down_to(lower))


def test_an_intersection_over_many_taps_needs_one_vector(mu, runs):
    event = at("38")[0]
    for layer in range(0, 38, 2):
        event = event & at(str(layer))[:6]
    cost = measured(mu, runs, lambda: mu(event))
    assert (cost.steps, cost.vectors) == (down_to(0), down_to(0))


@pytest.mark.parametrize("lowest", [2, 20])
def test_a_union_over_many_taps_is_one_pass_down_to_the_lowest(mu, runs, lowest):
    event = at("36")[1]
    for layer in range(lowest, 36, 2):
        event = event | at(str(layer))[[0, 5]]
    cost = measured(mu, runs, lambda: mu(event))
    assert (cost.steps, cost.vectors) == (down_to(lowest), down_to(lowest))


def eight_pairs_over_two_layers():
    return [at("30")[i] & at("8")[i] for i in range(8)]


def eight_pairs_of_neighbours():
    """On sixteen layers, each pair below the other."""
    return [at(str(38 - 4 * i))[0] & at(str(36 - 4 * i))[1] for i in range(8)]


def eight_pairs_across_each_other():
    """On sixteen layers, all upper neurons above all lower ones: every set of pairs can be open at once."""
    return [at(str(38 - 2 * i))[0] & at(str(22 - 2 * i))[1] for i in range(8)]


@pytest.mark.parametrize(
    "pairs", [eight_pairs_over_two_layers, eight_pairs_of_neighbours, eight_pairs_across_each_other]
)
def test_one_of_eight_pairs_is_at_most_twice_one_pass(mu, runs, pairs):
    event = pairs()[0]
    for pair in pairs()[1:]:
        event = event | pair
    cost = measured(mu, runs, lambda: mu(event))
    assert cost.steps <= 2 * ONE_PASS


def test_one_of_eight_pairs_of_neighbours_needs_at_most_two_vectors(mu, runs):
    event = eight_pairs_of_neighbours()[0]
    for pair in eight_pairs_of_neighbours()[1:]:
        event = event | pair
    assert measured(mu, runs, lambda: mu(event)).vectors <= 2 * ONE_PASS


def test_a_formula_whose_normal_form_is_exponential_has_width_two(mu, runs):
    """``(a1 | b1) & (a2 | b2) & …`` over neighboring taps has 2¹² terms."""
    event = at("38")[:3] | at("36")[:3]
    for layer in range(34, 0, -4):
        event = event & (at(str(layer))[:3] | at(str(layer - 2))[:3])
    cost = measured(mu, runs, lambda: mu(event))
    assert cost.vectors <= 2 * ONE_PASS


def test_a_list_of_events_shares_one_pass(mu, runs):
    events = [at("30")[0], at("20")[1], at("30")[0] & at("20")[1], ABSORBED]
    cost = measured(mu, runs, lambda: mu(events))
    assert cost.steps == ONE_PASS
    assert cost.vectors <= len(events) * ONE_PASS


def test_a_pass_stops_once_the_event_is_decided(mu, runs):
    assert measured(mu, runs, lambda: mu(at("output")[1])).steps == 0
    assert measured(mu, runs, lambda: mu(at("38"))).steps <= 2


def test_a_map_below_its_condition_is_one_pass(mu, runs):
    cost = measured(mu, runs, lambda: mu.marginal("input", joint=at("20")[0]))
    assert (cost.steps, cost.vectors) == (ONE_PASS, ONE_PASS)


def test_a_map_above_its_condition_is_a_pass_down_and_one_up(mu, runs):
    cost = measured(mu, runs, lambda: mu.marginal("30", given=at("10")[0] | at("10")[1], min_ratio=0))
    assert cost.steps <= 2 * ONE_PASS


def test_conditionals_of_all_neurons_are_one_pass_up(mu, runs):
    cost = measured(mu, runs, lambda: mu.conditional(at("10")[0], "30"))
    assert (cost.steps, cost.vectors) == (20, 20)


def test_explain_reports_the_cost_of_a_query(mu, runs):
    event = at("30")[0] & at("10")[[1, 2]]
    text = mu.explain(event)
    assert runs["kernels"] == 0
    cost = measured(mu, runs, lambda: mu(event))
    assert f"one pass over {cost.steps} of {ONE_PASS} steps" in text


# -- what a measure does once per module, function and step -----------------------------------------------------------


class Doubled(nn.Module):
    """A module without a rule, which reads the form of its input and adds it to itself."""

    def forward(self, x):
        return x + x if x.shape[1] == WIDTH and x.dim() == 2 and x.requires_grad else x


def nested(depth):
    """A net in containers, with layers, batch normalization as a function, and modules without a rule."""
    torch.manual_seed(0)
    layers = [Doubled(), nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Identity()]
    net = nn.Sequential(*layers, nn.Sequential(nn.BatchNorm1d(WIDTH)))
    return nn.Sequential(net, *([nested(depth - 1)] if depth else []))


def test_the_hooks_of_a_measure_pass_no_functions_of_their_own_through_the_mode(monkeypatch):
    """The mode observes the functions that the model calls, and of modules with a rule the functions inside."""
    observed = []
    own = InterceptionMode._result

    def result(self, function, args, kwargs):
        observed.append(function)
        return own(self, function, args, kwargs)

    monkeypatch.setattr(InterceptionMode, "_result", result)
    RelevanceMeasure(nested(1).eval(), torch.randn(2, WIDTH), 1)
    names = Counter(name_of(function).base for function in observed)
    # "get" are shape and requires_grad of both inputs, and two reads of the output; each of six steps reads its type.
    assert names == {"get": 4 + 2, "dim": 2 + 2, "add": 2, "relu": 2, "batch_norm": 2, "is_floating_point": 6}


def test_a_measure_walks_over_the_modules_of_a_model_as_often_for_any_size(monkeypatch):
    walks = []
    own = nn.Module.named_modules
    for net in (nested(0).eval(), nested(3).eval()):
        count = [0]

        def named_modules(self, *args, net=net, count=count, **options):
            count[0] += self is net
            return own(self, *args, **options)

        monkeypatch.setattr(nn.Module, "named_modules", named_modules)
        RelevanceMeasure(net, torch.randn(2, WIDTH), 1)
        walks.append(count[0])
    assert walks[0] == walks[1] <= 15


def test_a_kernel_and_its_columns_are_computed_in_one_visit_of_a_step(monkeypatch, mu):
    entered = []
    own = forward_state.not_recorded.__enter__
    monkeypatch.setattr(forward_state.not_recorded, "__enter__", lambda self: entered.append(1) or own(self))
    mu.marginal(mu.layers)
    assert len(entered) == ONE_PASS


class Operations(TorchDispatchMode):
    """Counts the operations that torch executes."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("composite", "most"), [(NRMDefault, 95), (EpsilonPlusFlat, 100)])
def test_a_small_convolution_takes_few_operations(composite, most):
    """Operations cost more than their arithmetic in small layers, and their number does not depend on the machine."""

    def operations(blocks):
        torch.manual_seed(0)
        layers = [(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.Hardswish()) for _ in range(blocks)]
        net = nn.Sequential(*(layer for block in layers for layer in block), nn.Flatten(), nn.Linear(48, 3)).eval()
        x = torch.randn(1, 3, 4, 4)
        for _ in range(2):  # checks of rules and weights are made once
            with Operations() as counted:
                mu = RelevanceMeasure(net, x, 1, composite=composite())
                mu.marginal(mu.layers)
        return counted.count

    assert operations(6) - operations(5) <= most
