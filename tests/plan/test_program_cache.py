"""Shortcuts whose conditions fail by chance are disabled in all layers, so a plan is made anew only a few times."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from nrm_plugin import Normalized, Plan, RelevanceMeasure
from nrm_plugin.plan import planned_measure, program_cache
from nrm_plugin.plan.program_cache import FAILURES, OF_SUMS

BRANCHES, WIDTH = 8, 2
RULES = Normalized(EpsilonPlus())


class Branches(nn.Module):
    """The sum of convolutions, each of its own part of the input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleList(nn.Conv1d(WIDTH, 3, 1) for _ in range(BRANCHES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([part(one) for part, one in zip(self.parts, x.chunk(BRANCHES, 1), strict=True)]).sum((0, 3))


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The disabled shortcuts of every recording that is made; None if it is not traced."""
    found: list[Any] = []
    made = planned_measure.TracedRecording.__init__
    monkeypatch.setattr(
        planned_measure.TracedRecording, "__init__", lambda *args: found.append(args[-1]) or made(*args)
    )
    return found


def inputs(negative: int | None) -> Tensor:
    """Positive inputs, but for those of one part."""
    x = torch.rand(2, BRANCHES * WIDTH, 4, dtype=torch.float64) + 0.1
    if negative is not None:
        x[:, negative * WIDTH] *= -1
    return x


@pytest.mark.medium
def test_a_shortcut_that_fails_in_one_layer_after_the_other_is_disabled_in_all(traces: list[Any]) -> None:
    net = Branches().double().eval()
    plan = Plan(net, inputs(None), composite=RULES)
    for negative in [None, None, *range(BRANCHES), *range(BRANCHES)]:
        x = inputs(negative)
        expected = RelevanceMeasure(net, x, 1, composite=RULES).marginal("input")
        assert torch.allclose(plan(x, 1).marginal("input"), expected, atol=1e-12)
    assert [one for one in traces if one is not None and "no negative input" in one]
    assert 1 + FAILURES <= len(traces) < 1 + BRANCHES


@pytest.mark.medium
def test_a_shortcut_that_fails_in_one_layer_is_taken_in_the_others() -> None:
    net = Branches().double().eval()
    plan = Plan(net, inputs(None), composite=RULES)
    for negative in [None, None, *[3] * 2 * FAILURES]:
        mu = plan(inputs(negative), 1)
        mu.marginal("input")
    disabled = mu._programs.disabled_shortcuts  # type: ignore[attr-defined]
    assert {name for name in disabled if name.startswith("no negative input")} == {"no negative input in parts.3:0"}


def small_sums(weight: float) -> tuple[nn.Module, Tensor]:
    """Two layers whose biases take up most of the output of the second one if its weight is small."""
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(1)
    return net, torch.full((1, 2), weight, dtype=torch.float64)


@pytest.mark.medium
def test_a_condition_on_column_sums_fails_once(traces: list[Any]) -> None:
    (net, large), small = small_sums(4.0), small_sums(0.01)[1]
    plan = Plan(net, large, composite=RULES)
    for x in [large, large, *[small, large] * 3]:
        expected = RelevanceMeasure(net, x, 1, composite=RULES).marginal("input")
        assert torch.allclose(plan(x, 1).marginal("input"), expected, atol=1e-12)
    planned = [one for one in traces if one is not None]
    assert len(planned) == 2
    assert planned[1] >= OF_SUMS


def test_a_loop_over_more_queries_than_programs_traces_few_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_cache, "MOST", 2)
    added: list[object] = []
    add = program_cache.Programs.add
    monkeypatch.setattr(program_cache.Programs, "add", lambda *args: added.append(args[1]) or add(*args))
    net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval(), torch.randn(5, 2, 4).double()
    plan = Plan(net, x[0])
    traced = []
    for one in x:
        mu, recorded = plan(one, 0), RelevanceMeasure(net, one, 0)
        for layer in ("input", "0", "1", "2"):
            torch.testing.assert_close(mu.marginal(layer, "neuron"), recorded.marginal(layer))
        torch.testing.assert_close(mu.walk_variation(), recorded.walk_variation())
        traced.append(len(added))
    assert traced[-1] - traced[0] <= 2
