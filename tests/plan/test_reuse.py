"""Repeated measures of the same form: planned from the third one on, with the same results."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zennit.composites import EpsilonPlus

from nrm_plugin import (
    NRM,
    ConceptNRM,
    DataLoaderNRM,
    JointNRM,
    LayerNRM,
    NeuronNRM,
    Normalized,
    NRMAttributor,
    Plan,
    RelevanceMeasure,
    at,
)
from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.plan import reuse
from nrm_plugin.plan.planned_measure import PlannedMeasure
from nrm_plugin.plan.program_cache import QueryProgram
from nrm_plugin.plan.reuse import Measures, measures_of
from tests.conftest import slow_but

RULES = Normalized(EpsilonPlus())


def small_net() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(20, 3)
    return nn.Sequential(*layers).double().eval()


def images(seed: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the answers of programs."""
    count = [0]
    answer = QueryProgram.answer

    def counted(self: QueryProgram, results: Any) -> Any:
        count[0] += 1
        return answer(self, results)

    monkeypatch.setattr(QueryProgram, "answer", counted)
    return count


def expected(net: nn.Module, x: Tensor, layer: str = "input", **settings: Any) -> Tensor:
    """The oracle: a measure that is recorded for each sample alone."""
    measures = [RelevanceMeasure(net, x[n : n + 1], 1, **settings) for n in range(len(x))]
    return torch.cat([mu.marginal(layer) * mu.output.reshape(-1, 1, 1, 1) for mu in measures])


def nrm(net: nn.Module) -> Callable[[Tensor], Tensor]:
    method = NRM(net)
    return lambda x: method.attribute(x, target=1)


def layer_nrm(net: nn.Module) -> Callable[[Tensor], Tensor]:
    method = LayerNRM(net, "0")
    return lambda x: method.attribute(x, target=1)


def neuron_nrm(net: nn.Module) -> Callable[[Tensor], Tensor]:
    method = NeuronNRM(net, "5")
    return lambda x: method.attribute(x, 1)


def joint_nrm(net: nn.Module) -> Callable[[Tensor], Tensor]:
    method = JointNRM(net, "2", "0")
    return lambda x: method.attribute(x, target=1)


def concept_nrm(net: nn.Module) -> Callable[[Tensor], Tensor]:
    method = ConceptNRM(net)
    return lambda x: method.attribute(x, [{"2": [0, 1, 2, 3, 4], "y": [1]}])[0]


def data_loader_nrm(net: nn.Module) -> Callable[[Tensor], Tensor]:
    method = DataLoaderNRM(NRM(net))
    return lambda x: method.attribute([x], target=1)


def attributor(net: nn.Module) -> Callable[[Tensor], Tensor]:
    method = NRMAttributor(net)

    def attribute(x: Tensor) -> Tensor:
        start = torch.eye(3, dtype=x.dtype)[[1] * len(x)]
        output, mu = method(x, start)
        return torch.as_tensor(mu.marginal("input") * output[:, 1].reshape(-1, 1, 1, 1))

    return attribute


def joint_expected(net: nn.Module, x: Tensor) -> Tensor:
    measures = [RelevanceMeasure(net, x[n : n + 1], 1) for n in range(len(x))]
    return torch.cat([mu.joint("2", "0") * mu.output.reshape(-1, 1, 1) for mu in measures])


INTERFACES: dict[str, tuple[Callable[..., Any], Callable[..., Tensor]]] = {
    "NRM": (nrm, expected),
    "LayerNRM": (layer_nrm, lambda net, x: expected(net, x, "0")),
    "NeuronNRM": (neuron_nrm, expected),
    "JointNRM": (joint_nrm, joint_expected),
    "ConceptNRM": (concept_nrm, expected),
    "DataLoaderNRM": (data_loader_nrm, expected),
    "NRMAttributor": (attributor, expected),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", slow_but(INTERFACES, "NRM", "LayerNRM", "NRMAttributor"))
def test_an_interface_answers_by_programs_from_the_third_call_on(name, answered):
    make, oracle = INTERFACES[name]
    net = small_net()
    attribute = make(net)
    for seed in range(6):
        x = images(seed)
        torch.testing.assert_close(attribute(x), oracle(net, x), rtol=1e-9, atol=1e-12)
        if seed < 2:
            assert answered == [0]
    assert answered[0] >= 2  # the third call traces the query, or the third and the fourth if it names neurons


def test_references_by_relevance_are_searched_by_programs(answered):
    net = small_net()
    data = torch.utils.data.TensorDataset(images(0, 12), torch.zeros(12, dtype=torch.long))
    found = find_references(net, data, ["2"], k=3, by=["relevance"], batch_size=2)
    assert answered[0] >= 3
    whole = find_references(net, data, ["2"], k=3, by=["relevance"], batch_size=12)
    assert torch.equal(found.of("2").samples, whole.of("2").samples)
    torch.testing.assert_close(found.of("2").values, whole.of("2").values)


def taken(measures: Measures, net: nn.Module, count: int, composite: Normalized = RULES, seed: int = 0) -> list[bool]:
    """Takes measures, and returns which are planned."""
    kinds = []
    for number in range(count):
        mu = measures(net, images(seed + number), 1, composite=composite)
        oracle = RelevanceMeasure(net, images(seed + number), 1, composite=composite)
        torch.testing.assert_close(mu.marginal("input"), oracle.marginal("input"), rtol=1e-9, atol=1e-12)
        kinds.append(isinstance(mu, PlannedMeasure))
    return kinds


def test_each_form_of_inputs_is_recorded_twice_before_it_is_planned():
    measures, net = Measures(), small_net()
    assert taken(measures, net, 3) == [False, False, True]
    for count, is_planned in ((1, False), (2, True), (1, False), (1, True)):
        mu = measures(net, images(0, count), 1, composite=RULES)
        assert isinstance(mu, PlannedMeasure) == is_planned


@pytest.mark.parametrize("change", ["weight", "attribute", "mode", "hook", "data"])
def test_a_change_of_the_model_drops_the_plan(change):
    measures, net = Measures(), small_net()
    assert taken(measures, net, 4)[-1]
    if change == "weight":
        with torch.no_grad():
            net[0].weight.mul_(1.5)
    elif change == "attribute":
        net[1] = nn.Tanh()
    elif change == "mode":
        net.train()
        net.eval()
        net[1] = nn.LeakyReLU()
    elif change == "data":
        net[0].weight.data.mul_(2)
    else:
        net[0].register_forward_hook(lambda module, args, output: output * 2)
    assert taken(measures, net, 2) == [False, False]


@pytest.mark.medium
@pytest.mark.parametrize("change", slow_but(["model", "composite", "output", "batched"], "composite"))
def test_a_change_of_a_setting_drops_the_plan(change):
    measures, net = Measures(), small_net()
    assert taken(measures, net, 4)[-1]
    first = weakref.ref(measures.plan)
    settings: dict[str, Any] = {"composite": RULES}
    other = net
    if change == "model":
        other = copy.deepcopy(net)
        with torch.no_grad():
            other[5].bias.add_(1)
    else:
        settings[change] = {"composite": Normalized(EpsilonPlus(), gain_limit=1.0), "output": at("2"), "batched": True}[
            change
        ]
    start = torch.ones_like if change == "output" else None
    target = None if change == "output" else 1
    mu = measures(other, images(9), target, start=start, **settings)
    if change == "batched":
        assert measures.plan is first()
        return
    oracle = RelevanceMeasure(other, images(9), target, start=start, **settings)
    torch.testing.assert_close(mu.marginal("input"), oracle.marginal("input"))
    gc.collect()
    assert measures.plan is None
    assert first() is None


def test_atoms_and_strings_are_compared_by_value():
    measures, net = Measures(), small_net()
    for number in range(4):
        mu = measures(net, images(number), start=torch.ones_like, composite=RULES, output=at("2"))
    assert isinstance(mu, PlannedMeasure)


@pytest.mark.medium
def test_a_model_that_changes_after_each_plan_is_planned_ever_more_rarely():
    measures, net = Measures(), small_net()
    planned = 0
    for number in range(60):
        mu = measures(net, images(number), 1, composite=RULES)
        if isinstance(mu, PlannedMeasure):
            planned += 1
            with torch.no_grad():
                net[0].weight.mul_(1.01)
    assert 1 <= planned <= 4


@pytest.mark.medium
def test_queries_that_are_new_each_time_are_recorded_without_a_plan():
    measures, net = Measures(), small_net()
    kinds = []
    for number in range(20):
        mu = measures(net, images(0), 1, composite=RULES)
        mu(at("input")[0, number // 6, number % 6])
        kinds.append(isinstance(mu, PlannedMeasure))
    assert any(kinds)
    assert not any(kinds[-3:])


def test_a_plan_that_needs_too_much_memory_is_dropped(monkeypatch):
    monkeypatch.setattr(reuse, "MEMORY", 0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)).double().eval()
    measures = Measures()
    assert taken(measures, net, 8) == [False, False, True, False, False, False, False, False]
    assert measures.plan is None


def test_many_forms_are_not_planned():
    measures, net = Measures(), nn.Linear(3, 1)
    for _ in range(4):
        for count in range(1, 11):
            assert not isinstance(measures(net, torch.rand(count, 3), composite=RULES), PlannedMeasure)
    assert len(measures._seen) == 8


def test_a_mode_of_the_caller_prevents_a_plan():
    class Doubled(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return function(*args, **(kwargs or {}))

    measures, net = Measures(), small_net()
    with Doubled():
        for number in range(4):
            assert not isinstance(measures(net, images(number), 1, composite=RULES), PlannedMeasure)


def test_arguments_that_cannot_be_compared_are_recorded():
    class Shifted(nn.Module):
        def forward(self, x: Tensor, shift: Any) -> Tensor:
            return x.sum(1, keepdim=True) + shift.value

    measures = Measures()
    for _ in range(4):
        mu = measures(
            Shifted(), torch.rand(2, 3), composite=RULES, additional_forward_args=(SimpleNamespace(value=1.0),)
        )
        assert type(mu) is RelevanceMeasure


@pytest.fixture
def method() -> NRM:
    net = small_net()
    found = NRM(net, EpsilonPlus())
    for seed in range(4):
        found.attribute(images(seed), target=1)
    assert measures_of(found).plan is not None
    return found


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_of_an_owner_have_no_plan(method, duplicate):
    other = duplicate(method)
    assert measures_of(other).plan is None
    assert measures_of(method).plan is not None
    torch.testing.assert_close(other.attribute(images(7), target=1), method.attribute(images(7), target=1))


def test_measures_themselves_are_copied_and_stored_without_a_plan(method):
    measures = measures_of(method)
    for other in (copy.copy(measures), copy.deepcopy(measures), pickle.loads(pickle.dumps(measures))):
        assert other.plan is None


@pytest.mark.medium
def test_the_plan_is_dropped_with_its_owner():
    net = small_net()
    found = NRM(net)
    for seed in range(4):
        found.attribute(images(seed), target=1)
    plan = weakref.ref(measures_of(found).plan)
    del found
    gc.collect()
    assert plan() is None


def test_a_plan_explains_shapes_operations_memory_and_reasons():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)).eval()
    plan = Plan(net, torch.rand(2, 3, 6, 6))
    assert plan.explain() == "nothing is planned yet"
    plan(torch.rand(2, 3, 6, 6), 1).marginal("input")
    plan(torch.rand(1, 3, 6, 6), 1).sink("input")
    text = plan.explain()
    for part in (
        r"inputs \(2, 3, 6, 6\):\n  marginal: \d+ operations, \d+\.\d MiB of constants",
        "no negative input in",
    ):
        assert re.search(part, text), text
    assert re.search(r"inputs \(1, 3, 6, 6\):\n  sink: ", text), text
