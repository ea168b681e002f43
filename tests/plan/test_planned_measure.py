"""Queries of one planned measure share the forward pass, within a budget of memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.plan.plan import Plan
from nrm_plugin.plan.planned_measure import PlannedMeasure

aten = torch.ops.aten
QUERIES: list[Callable[[Any], Tensor]] = [
    lambda mu: mu.marginal("input"),
    lambda mu: mu.sink("1"),
    lambda mu: mu.marginal("2"),
    lambda mu: mu.variation("0"),
]


class Counting(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function] += 1
        return function(*args, **(kwargs or {}))


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double().eval()


def planned(model: nn.Module, **settings: Any) -> Plan:
    """A plan to which every query was put twice."""
    plan = Plan(model, images(0), **settings)
    for seed in range(2):
        mu = plan(images(seed), 1)
        for query in QUERIES:
            query(mu)
    return plan


def convolutions(run: Callable[[], Any]) -> int:
    with Counting() as counting:
        run()
    return counting.counts[aten.convolution.default]


def forward_convolutions(plan: Plan) -> int:
    """Number of convolutions in the first stage."""
    (programs,) = plan._forms.values()
    assert programs.latest is not None
    first = programs.latest.operations[: programs.latest.until]
    return sum(one.function is aten.convolution.default for one in first)


def test_several_queries_run_the_forward_pass_once():
    plan = planned(net())
    separate = []
    for query in QUERIES:
        mu = plan(images(5), 1)
        separate.append(convolutions(lambda query=query, mu=mu: query(mu)))  # the forward pass has run already
    assert forward_convolutions(plan) >= 2
    mu = plan(images(6), 1)
    assert convolutions(lambda: [query(mu) for query in QUERIES]) == sum(separate)
    assert convolutions(lambda: QUERIES[0](mu)) == separate[0]  # asked again


def test_shared_forward_passes_give_the_recorded_answers():
    model = net()
    plan = planned(model)
    x = images(7)
    mu, recorded = plan(x, 2), RelevanceMeasure(model, x, 2)
    for query in (*QUERIES, *QUERIES[::-1]):
        torch.testing.assert_close(query(mu), query(recorded))
    assert plan.explain().count("operations") == len(QUERIES)


def test_overwritten_results_change_no_other_query():
    model = net()
    plan = planned(model)
    mu, recorded = plan(images(8), 2), RelevanceMeasure(model, images(8), 2)
    for query in (*QUERIES, *QUERIES):
        answer = query(mu)
        torch.testing.assert_close(answer, query(recorded))
        answer.fill_(7)
        mu.outputs.zero_()


def test_states_above_the_budget_are_not_kept():
    plan = planned(net())
    mu, recorded = plan(images(6), 1), RelevanceMeasure(plan.model, images(6), 1)
    mu._max_memory = 8
    for query in QUERIES:
        torch.testing.assert_close(query(mu), query(recorded))
        assert mu._state is None


@pytest.mark.medium
@pytest.mark.parametrize("reference", [None, images(9)], ids=["output", "difference"])
@pytest.mark.parametrize(("limit", "is_limited"), [(1000, True), (10**8, False)])
def test_a_plan_with_little_memory_records_in_parts_and_says_so(reference, limit, is_limited):
    plan = Plan(net(), images(0), max_memory=limit)
    for seed in range(3):
        mu = plan(images(seed), 1, reference=reference)
        recorded = RelevanceMeasure(plan.model, images(seed), 1, reference=reference)
        for query in QUERIES:
            torch.testing.assert_close(query(mu), query(recorded))
        assert (mu.parts > 1) == is_limited
        assert (mu._recorded is not None) == (is_limited or seed == 0)
        assert mu._recorded is None or (mu._recorded.recording.parts is not None) == is_limited
    assert ("recorded every time: the recording exceeds max_memory" in plan.explain()) == is_limited
    assert (plan.memory == 0) or not is_limited


@pytest.mark.medium
def test_a_plan_with_little_memory_is_exported(tmp_path):
    plan = Plan(net(), images(0), max_memory=1000)
    plan.export(tmp_path / "relevance.pt2", images(0))
    program = torch.export.load(tmp_path / "relevance.pt2").module()
    relevance = program(images(3), torch.tensor([1, 1]))["relevance"]["input"]
    torch.testing.assert_close(relevance, plan(images(3), 1).marginal("input"))


def test_a_single_query_keeps_no_state():
    plan = Plan(net(), images(0))
    for seed in range(3):
        mu = plan(images(seed), 1)
        mu.marginal("input")
    assert isinstance(mu, PlannedMeasure)
    assert mu._state is None


@pytest.mark.medium
@pytest.mark.parametrize("first", [0, 1])
def test_queries_of_neurons_share_the_forward_pass(first):
    plan = planned(net())
    event = at("0")[2, 1, 1]
    for seed in range(3):
        mu, recorded = plan(images(seed), first), RelevanceMeasure(plan.model, images(seed), first)
        torch.testing.assert_close(mu(event), recorded(event))
        torch.testing.assert_close(mu.marginal("input", joint=event), recorded.marginal("input", joint=event))
    mu = plan(images(4), first)
    mu(event)
    before = convolutions(lambda: mu.marginal("input", joint=event))
    assert before == convolutions(lambda: mu.marginal("input", joint=event))


def test_zero_differences_take_no_mask_in_elementwise_functions_that_keep_all_relevance():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    x, reference = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    assert bool((net[:2](x) == net[:2](reference)).any())
    plan = Plan(net, x, reference=reference)
    plan(x, target=0, reference=reference).marginal("input")
    (programs,) = plan._forms.values()
    assert programs.latest is not None
    names = {str(one.function) for one in programs.latest.operations}
    assert names.isdisjoint(["aten.where.self", "aten.bitwise_not.default"])
