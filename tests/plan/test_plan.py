"""The forms of calls of a plan; tests/test_plans.py has control flow and models that change."""

import io

import pytest
import torch
from torch import nn
from torchvision.models import SwinTransformer

from nrm_plugin import NRMEpsilonPlus, Plan, RelevanceMeasure
from nrm_plugin.errors import StorageError
from nrm_plugin.plan.plan import MOST
from nrm_plugin.plan.planned_measure import PlannedMeasure


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double().eval()


def inputs(count: int = 5) -> torch.Tensor:
    return torch.randn(count, 3, dtype=torch.float64)


def answers(mu: RelevanceMeasure) -> list[torch.Tensor]:
    return [*mu.marginal(mu.layers).values(), mu.output, mu.sign, mu.outputs, *mu.sinks().values()]


@pytest.mark.parametrize(
    ("of_call", "settings"),
    [
        (lambda: {}, {}), (lambda: {"start": torch.tensor([1.0, 2, 0.5])}, {}), (lambda: {"against": 2}, {}),
        (lambda: {"against": "rest"}, {}), (lambda: {"reference": inputs()}, {}),
        (lambda: {"reference": inputs(), "against": 0}, {}), (lambda: {"reference": [inputs(), inputs()]}, {}),
        (lambda: {"reference": inputs()}, {"slopes": "tangent"}), (lambda: {}, {"residual": "sink"}),
        (lambda: {"reference": inputs()}, {"composite": NRMEpsilonPlus()}), (lambda: {}, {"gain_limit": 1.0}),
    ],
)  # fmt: skip
def test_a_plan_answers_as_a_measure_with_the_same_arguments(net, of_call, settings):
    torch.manual_seed(1)
    first = of_call()
    plan = Plan(net, inputs(), reference=first.get("reference"), **settings)
    for _ in range(3):
        x, given = inputs(), of_call()
        target = None if "start" in given else 1
        mu = plan(x, target, **given)
        expected = RelevanceMeasure(net, x, target, **settings, **given)
        assert isinstance(mu, PlannedMeasure)
        for one, other in zip(answers(mu), answers(expected), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)
        assert mu.explains_difference == expected.explains_difference
        assert repr(mu) == repr(expected)
    assert "recorded" not in plan.explain()


@pytest.mark.medium
def test_measures_with_and_without_compared_outputs_take_turns(net):
    plan = Plan(net, inputs())
    for _ in range(3):
        for given in ({}, {"against": 0}, {"against": "rest"}):
            x = inputs()
            mu, expected = plan(x, 1, **given), RelevanceMeasure(net, x, 1, **given)
            assert mu.layers == expected.layers
            torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"), rtol=1e-12, atol=1e-13)


@pytest.mark.medium
def test_few_forms_are_stored(net):
    plan = Plan(net, inputs(1))
    for count in range(1, MOST + 4):
        x = inputs(count)
        torch.testing.assert_close(plan(x, 1).marginal("0"), RelevanceMeasure(net, x, 1).marginal("0"))
    assert len(plan._forms) == MOST


def test_a_plan_is_not_stored(net):
    with pytest.raises(StorageError, match="plan"):
        torch.save(Plan(net, inputs()), io.BytesIO())


@pytest.mark.medium
@pytest.mark.parametrize("count", [1, 2])
def test_windows_that_are_folded_into_the_batch_are_planned(count):
    torch.manual_seed(0)
    net = SwinTransformer([4, 4], 12, [2, 2], [2, 2], [4, 4], num_classes=3).eval()
    plan = Plan(net, torch.randn(count, 3, 32, 32))
    for _ in range(2):
        x = torch.randn(count, 3, 32, 32)
        expected = RelevanceMeasure(net, x, 1).marginal("input")
        torch.testing.assert_close(plan(x, 1).marginal("input"), expected, rtol=1e-4, atol=1e-6)
    assert "recorded every time" not in plan.explain()
