"""Loops over layers take one pass for all layers, with the answers of separate queries."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nrm_plugin.measure.totals as totals_module
from nrm_plugin import LayerNRM, Plan, RelevanceMeasure, at
from nrm_plugin.errors import EventError, StaleMeasureError, UnknownLayerError
from nrm_plugin.measure.layer_loops import SEVERAL
from nrm_plugin.plan.reuse import measures_of

Query = Callable[[Any, Any], Tensor]
QUERIES: dict[str, Query] = {
    "marginal": lambda mu, layer: mu.marginal(layer),
    "sums": lambda mu, layer: mu.marginal(layer, "channel"),
    "joint": lambda mu, layer: mu.marginal(layer, joint=at("4")[1]),
    "given": lambda mu, layer: mu.marginal(layer, given=[at("6")[1], at("output")]),
    "sink": lambda mu, layer: mu.sink(layer),
    "constants": lambda mu, layer: mu.sink(layer, "constants"),
    "bypass": lambda mu, layer: mu.bypass(layer),
    "variation": lambda mu, layer: mu.variation(layer),
    "conditional": lambda mu, layer: mu.conditional(at("input")[1], layer),
}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.conv(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), Residual(), Residual(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers).double().eval()


def images(seed: int) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(model: nn.Module, seed: int, **settings: Any) -> RelevanceMeasure:
    return RelevanceMeasure(model, images(seed), 1, **settings)


def layers_of(name: str, mu: RelevanceMeasure) -> list[str]:
    return [layer for layer in mu.layers if name != "conditional" or layer != "input"]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of tensors stored by each pass."""
    counts: list[int] = []
    plain = totals_module.pull

    def counted(graph: Any, start: Any, visitor: Any, absolute: bool = False) -> Any:
        counts.append(len(visitor.stored))
        return plain(graph, start, visitor, absolute)

    monkeypatch.setattr(totals_module, "pull", counted)
    return counts


@pytest.mark.medium
@pytest.mark.parametrize("is_planned", [False, True])
@pytest.mark.parametrize("name", QUERIES)
def test_loops_give_the_answers_of_separate_queries(name, is_planned):
    model, query = net(), QUERIES[name]
    plan = Plan(model, images(0)) if is_planned else None
    for seed in range(3):
        mu = recorded(model, seed) if plan is None else plan(images(seed), 1)
        layers = layers_of(name, mu)
        for order in (layers, layers[::-1]):
            answers = {layer: query(mu, layer) for layer in order}
            for layer, answer in answers.items():
                torch.testing.assert_close(answer, query(recorded(model, seed), layer), rtol=0, atol=1e-12)
            for answer in answers.values():
                answer.fill_(7)  # changes no other answer, now or later
        assert not mu._kept._answers or name in ("marginal", "sums")  # names of one tensor are kept apart


@pytest.mark.parametrize("as_named", [str, lambda layer: at(layer)])
def test_a_loop_over_marginals_takes_few_passes(passes, as_named):
    mu = recorded(net(), 0)
    for layer in mu.layers:
        mu.marginal(as_named(layer))
    assert len(passes) == SEVERAL
    assert passes[:2] == [1, 1]
    assert mu.cost.steps == 0  # the last answer was kept


def test_few_queries_keep_nothing(passes):
    mu = recorded(net(), 0)
    for layer in ["input", "4", "input", "4"]:
        mu.marginal(layer)
    assert passes == [1] * 4
    assert not mu._kept._answers


@pytest.mark.parametrize("is_planned", [False, True])
def test_kept_answers_respect_the_budget(is_planned):
    model = net()
    mu = Plan(model, images(0))(images(0), 1) if is_planned else recorded(model, 0)
    largest = max(mu._layer_sizes.values())
    mu._max_memory = 2 * largest
    for layer in mu.layers:
        answer = mu.marginal(layer)
        torch.testing.assert_close(answer, recorded(model, 0).marginal(layer), rtol=0, atol=1e-12)
        kept = [one for answers, _ in mu._kept._answers.values() for one in answers.values()]
        assert sum(one.numel() * one.element_size() for one in kept) <= 2 * largest
    mu._max_memory = largest // 2
    mu.marginal("0")
    assert all("0" not in answers for answers, _ in mu._kept._answers.values())


@pytest.mark.parametrize("is_planned", [False, True])
def test_kept_answers_do_not_survive_a_change(is_planned):
    model = net()
    x = images(0)
    mu = Plan(model, x)(x, 1) if is_planned else RelevanceMeasure(model, x, 1)
    for layer in ["input", "0", "1"]:
        mu.marginal(layer)
    assert mu._kept._answers
    if is_planned:
        x.add_(1)
        with pytest.raises(StaleMeasureError, match="inputs were overwritten"):
            mu.marginal("4")
    with torch.no_grad():
        model[0].weight.mul_(2)
    with pytest.raises(StaleMeasureError):
        mu.marginal("6")


def test_errors_remain_those_of_single_queries():
    mu = recorded(net(), 0)
    for name in ["a", "b", "c", "d"]:
        with pytest.raises(UnknownLayerError, match=f"'{name}'"):
            mu.marginal(name)
    for layer in mu.layers:
        with pytest.raises(ValueError, match="over='rows' is unknown"):
            mu.marginal(layer, "rows")
    for layer in mu.layers:
        if layer in ("5", "6", "output"):
            mu.conditional(at("4")[1], layer)
            continue
        with pytest.raises(EventError, match="is not below"):
            mu.conditional(at("4")[1], layer)


@pytest.mark.medium
def test_plans_need_few_programs_for_a_loop():
    plan = Plan(net(), images(0))
    for seed in range(3):
        mu = plan(images(seed), 1)
        for layer in mu.layers:
            mu.marginal(layer)
    assert plan._count == SEVERAL
    assert "marginal of several layers: " in plan.explain()
    mu = plan(images(5), 1)
    mu.marginal("4")  # from the program of several layers
    assert plan._count == SEVERAL
    assert mu._recorded is None


@pytest.mark.medium
def test_deltas_and_sinks_of_all_layers_need_few_programs():
    method = LayerNRM(net())
    for seed in range(4):
        relevance, deltas, sinks = method.attribute(
            images(seed), 1, return_convergence_delta=True, return_sink=True, unit="measure"
        )
        mu = recorded(method.model, seed)
        for layer, *values in zip(mu.layers, relevance, deltas, sinks, strict=True):
            torch.testing.assert_close(values[0], mu.marginal(layer), rtol=0, atol=1e-12)
            torch.testing.assert_close(values[1], torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
            torch.testing.assert_close(values[2], recorded(method.model, seed).sink(layer), rtol=0, atol=1e-12)
    plan = measures_of(method).plan
    assert plan is not None
    assert plan._count <= 1 + 3 * SEVERAL


def test_measures_with_kept_answers_cannot_be_copied():
    mu = recorded(net(), 0)
    for layer in mu.layers[:4]:
        mu.marginal(layer)
    with pytest.raises(Exception, match="cannot be copied"):
        copy.deepcopy(mu)
