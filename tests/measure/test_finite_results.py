"""Values that are not finite inside a model: right numbers where they carry no relevance, a clear error elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nrm_plugin import JointNRM, LayerNRM, NRMAttributor, Plan, RelevanceMeasure, at, top_walks
from nrm_plugin.errors import NonFiniteError
from nrm_plugin.model.inputs_and_outputs import are_finite, is_finite

X = torch.tensor([[0.5, -1.0, 2.0, 0.3], [1.5, 0.2, -0.4, -0.7]]).double()
X0 = torch.tensor([[0.1, 0.4, -0.2, 0.6]]).double()
OPEN = torch.tensor([0.0, 0.0, -math.inf, 0.0]).double()


class Between(nn.Module):
    """A function between two linear layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.last, self.function = nn.Linear(4, 4).double(), nn.Linear(4, 3).double(), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


def attention(h: Tensor, mask: Tensor) -> Tensor:
    scores = h.unsqueeze(2) * h.unsqueeze(1) + mask.unsqueeze(1)
    return (scores.softmax(-1) * h.unsqueeze(1)).sum(-1)


HARMLESS = {
    "log of zero": lambda h: h.relu().log().exp(),
    "masked softmax": lambda h: (h + OPEN).softmax(-1),
    "filled softmax": lambda h: h.masked_fill(OPEN < 0, -math.inf).softmax(-1),
    "masked logsumexp": lambda h: h + (h + OPEN).logsumexp(-1, keepdim=True),
    "logaddexp": lambda h: torch.logaddexp(h.relu().log(), h),
    "saturated": lambda h: (h / 0.0).sigmoid() + h,
    "overflow": lambda h: 1 / (1 + (h * 1e4).exp()) + h,
    "maximum": lambda h: torch.maximum(h.relu().log(), -h),
    "computed mask": lambda h: (h + h.relu().log()).exp() + h,
    "computed mask on attention": lambda h: attention(h, h.relu().log()),
}
UNKNOWN = ("maximum", "computed mask", "computed mask on attention")
"""Functions whose slopes between a finite and an infinite value have no limit."""
HARMFUL = {
    "sub": lambda h: (h.relu().log() - h.relu().log()).nan_to_num(0.0) + h,
    "linear": lambda h: F.linear((h / 0.0).clamp(min=0), torch.ones(4, 4).double()).sigmoid() + h,
    "mean": lambda h: (h * 1e308 * 10).relu().mean(-1, keepdim=True).sigmoid() + h,
}


@pytest.mark.medium
@pytest.mark.parametrize("reference", [None, X0])
@pytest.mark.parametrize("name", HARMLESS)
def test_infinite_values_without_relevance_are_harmless(name, reference):
    mu = RelevanceMeasure(Between(HARMLESS[name]), X, 1, reference=reference)
    if reference is not None and name in UNKNOWN:
        with pytest.raises(NonFiniteError, match="Finite relevance arrives at"):
            mu.marginal("input")
        return
    for layer in mu.layers:
        total = mu.marginal(layer).flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer)
        torch.testing.assert_close(total, torch.ones(2).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["log of zero", "saturated"])
def test_against_a_reference_the_relevance_is_the_change_of_each_entry(name):
    net = Between(HARMLESS[name])
    mu = RelevanceMeasure(net, X, 1, reference=X0)
    change = net(X)[:, 1] - net(X0)[:, 1]
    parts = net.last.weight[1] * (net.function(net.first(X)) - net.function(net.first(X0)))
    torch.testing.assert_close(mu.marginal("first"), parts / change[:, None], rtol=0, atol=1e-9)


@pytest.mark.parametrize("reference", [None, X0])
@pytest.mark.parametrize("name", HARMFUL)
def test_the_error_names_the_step_at_which_relevance_stops_being_finite(name, reference):
    mu = RelevanceMeasure(Between(HARMFUL[name]), X, 1, reference=reference)
    with pytest.raises(NonFiniteError, match=f"Finite relevance arrives at '{name}'"):
        mu.marginal("input")
    assert bool(mu.marginal("last").isfinite().all())  # above the step


def walks_of(net: nn.Module) -> object:
    return top_walks(RelevanceMeasure(net, X[:1], 1), ["last", "first"], 2)


def planned(net: nn.Module) -> object:
    plan = Plan(net, X)
    return [plan(X, 1).marginal("input") for _ in range(4)]


QUERIES: dict[str, Callable[[nn.Module], object]] = {
    "list": lambda net: RelevanceMeasure(net, X, 1).marginal(["last", "input"]),
    "event": lambda net: RelevanceMeasure(net, X, 1)(at("first")[1]),
    "joint": lambda net: RelevanceMeasure(net, X, 1).joint("last", "first"),
    "given": lambda net: RelevanceMeasure(net, X, 1).marginal("input", given=at("output")),
    "conditional": lambda net: RelevanceMeasure(net, X, 1).conditional(at("input")[0], "last"),
    "variation": lambda net: RelevanceMeasure(net, X, 1).variation("first"),
    "walk variation": lambda net: RelevanceMeasure(net, X, 1).walk_variation(),
    "flow": lambda net: RelevanceMeasure(net, X, 1).flow(["last", "input"], sample=0),
    "walks": walks_of,
    "plan": planned,
    "layer": lambda net: LayerNRM(net, net.first).attribute(X, target=1),
    "joint class": lambda net: JointNRM(net, net.last, net.first).attribute(X, target=1),
    "attributor": lambda net: NRMAttributor(net)(X, torch.eye(3).double()[[1, 1]])[1].marginal("input"),
    "memory": lambda net: RelevanceMeasure(net, X, 1, max_memory=100).marginal("input"),
}


@pytest.mark.medium
@pytest.mark.parametrize("query", QUERIES)
def test_no_query_returns_numbers_that_are_not_finite(query):
    with pytest.raises(NonFiniteError, match="'linear'"):
        QUERIES[query](Between(HARMFUL["linear"]))


def test_neurons_that_do_not_change_have_finite_conditional_masses_in_large_networks():
    net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 2))
    net[0].weight.data = 1e15 * torch.tensor([[1.0, -1.0, 0.0, 0.0], [1.0, 2.0, 1.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    x = torch.tensor([[1.0, 2.0, 0.0, 1.0]])
    mu = RelevanceMeasure(net, x, 1, reference=x - 1)
    assert float(mu.marginal("0")[0, 0].abs()) < 1e-12  # inputs 0 and 1 cancel
    below = mu.conditional(at("input")[0], "0")
    assert bool(below.isfinite().all())
    assert float(below[0, 0].abs()) > 1e30
    torch.testing.assert_close((below * mu.marginal("0")).sum(1), mu(at("input")[0]), rtol=1e-4, atol=1e-5)


class InFloat32(nn.Module):
    """Root-mean-square normalization in float32, as in Llama."""

    def forward(self, h: Tensor) -> Tensor:
        short = h.to(torch.float32)
        return (short * (short.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).to(h.dtype)


def test_conditional_masses_in_float64_pass_through_conversions_to_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), InFloat32(), nn.Linear(4, 4), nn.Tanh(), InFloat32(), nn.Linear(4, 2)).double()
    net[0].weight.data[0] = torch.tensor([1.0, -1.0, 0.0, 0.0])  # inputs 0 and 1 cancel in neuron 0
    x = torch.tensor([[1.0, 2.0, 0.5, -1.0]]).double()
    mu = RelevanceMeasure(net, x, 1, reference=x - 1)
    event = at("input")[0]
    for layer in ("0", "2", "3"):
        below = mu.conditional(event, layer)
        assert bool(below.isfinite().all())
        joint = mu.marginal(layer, joint=event)
        torch.testing.assert_close(below * mu.marginal(layer), joint, rtol=0, atol=1e-6)
        torch.testing.assert_close(joint.sum(1), mu(event), rtol=0, atol=1e-6)


def test_large_results_are_finite():
    assert is_finite(torch.full((3,), 3e38))
    assert not is_finite(torch.tensor([1.0, math.nan]))
    assert is_finite(torch.zeros(0))
    assert is_finite(torch.ones(2, dtype=torch.long))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at_last", [False, True])
def test_one_entry_that_is_not_finite_is_found_among_several_tensors(bad, at_last):
    finite = [torch.ones(2, 3), torch.full((4,), 3e38), torch.zeros(0), torch.ones(2).double(), torch.tensor([1, 2])]
    assert are_finite(finite)  # although the sum of the second tensor overflows
    assert are_finite([])
    wrong = torch.ones(2, 2, dtype=torch.double if at_last else torch.float)
    wrong[1, 0] = bad
    assert not are_finite([*finite, wrong] if at_last else [wrong, *finite])
