"""The benchmark of time and memory with targets: its arithmetic, its comparisons, and its tables."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from benchmarks.cost import __main__ as command
from benchmarks.cost import dynamic_lrp_way, lxt_way, page, pages, summary, timing, timm_models, ways
from benchmarks.cost.nets import BATCHED, NETS, Graph, Net, Recurrent, draw_zeros, settle, tiny
from benchmarks.cost.page import Figure
from benchmarks.cost.stages import STAGES, stages
from nrm_plugin import RelevanceMeasure

PLAIN, ZENNIT, RECORDED, PLANNED = ways.PLAIN, ways.ZENNIT, ways.RECORDED, ways.PLANNED
SMALL = Net(partial(tiny, 4), (16,), all_rules=True)


def row_of(net="VGG16 224", threads=1, **ratios):
    """A row with the same times in every round."""
    given = {PLAIN: 1.0, **{name.replace("_", ", "): value for name, value in ratios.items()}}
    spreads = {name: [value] * 3 for name, value in given.items()}
    return {"net": net, "threads": threads, "rounds": 3, "seconds": spreads, "ratios": spreads, "failed": {}}


# -- times ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    """A collection before each run takes long in a process that has imported all tests."""
    monkeypatch.setattr(timing.gc, "collect", lambda: 0)


def test_computations_alternate_within_a_round_and_the_first_round_is_not_counted():
    order = []
    work = {name: partial(order.append, name) for name in "ab"}
    clocks = timing.alternated(work, 3, seconds=0)
    assert order == list("ab" * 4)
    assert {name: len(runs) for name, runs in clocks.items()} == {"a": 3, "b": 3}


def test_short_computations_run_more_often():
    clocks = timing.alternated({"a": lambda: None}, 2, seconds=60)
    assert len(clocks["a"]) == 8


def test_a_computation_that_has_run_before_is_timed_once():
    order = []
    work = {name: partial(order.append, name) for name in (PLAIN, "a")}
    clocks = timing.alternated(work, 2, seconds=0, once=["a"])
    assert order == [PLAIN, PLAIN, "a", PLAIN]
    assert len(timing.summary(clocks)["ratios"]["a"]) == 3


def test_processor_time_does_not_count_waiting():
    processor, wall = timing.clocked(lambda: __import__("time").sleep(0.05))
    assert processor < 0.04 <= wall


def test_ratios_refer_to_the_plain_gradient_of_the_same_round():
    clocks = {PLAIN: [(1.0, 2.0), (2.0, 2.0), (4.0, 2.0)], "ours": [(2.0, 2.0), (6.0, 4.0), (4.0, 8.0)]}
    found = timing.summary(clocks)
    assert found["seconds"]["ours"] == [4.0, 2.0, 6.0]
    assert found["ratios"]["ours"] == [2.0, 1.0, 3.0]  # 2, 3, 1
    assert found["wall ratios"]["ours"] == [2.0, 1.0, 4.0]
    assert found["ratios"][PLAIN] == [1.0, 1.0, 1.0]


def test_shares_of_a_profile():
    events = [
        ("aten::mul", 300_000.0, 4),
        ("aten::add", 500_000.0, 2),
        ("MulBackward0", 9e5, 9),
        ("autograd::engine", 9e5, 9),
    ]
    found = timing.shares(events, took=2.0, repeats=2, top=1)
    assert found == {"seconds": 1.0, "outside operators": 0.6, "calls": 3, "operators": {"aten::add": [0.25, 1]}}


def test_a_profile_counts_the_operators_of_one_run():
    x = torch.randn(300, 300)
    found = timing.profile(lambda: x @ x @ x, seconds=0.01)
    assert found["operators"]["aten::mm"][1] == 2
    assert 0 <= found["outside operators"] <= 1


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_forked_computation_returns_its_result_or_raises_its_error():
    assert timing.forked(lambda x: 2 * x, 4) == 8
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        timing.forked(lambda: 1 // 0)
    with pytest.raises(RuntimeError, match="more than 0 s"):
        timing.forked(lambda: time.sleep(60), seconds=0.01)


@pytest.mark.medium
def test_a_forked_computation_does_not_wait_for_threads_of_its_parent():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        large = torch.ones(1500, 1500)
        large @ large
        assert timing.forked(lambda: float((large @ large)[0, 0]), seconds=30) == 1500
    finally:
        torch.set_num_threads(before)


PEAK = """
import torch
from benchmarks.cost import timing
torch.zeros(30 << 18)
timing.reset()
before, _ = timing.resident()
held = torch.ones(40 << 18)  # 40 MiB
_, peak = timing.resident()
print(peak - before)
"""


@pytest.mark.slow
def test_peak_memory_is_that_since_the_reset():
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(40, abs=8)


class Layer(nn.Module):
    """A model in which relevance passes one matrix."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(16, 10)

    def forward(self, x):
        return self.layer(x)


def test_the_stages_of_a_first_call_add_up_and_methods_are_restored():
    net = Net(Layer, (16,))
    model, x = net.made(), net.inputs()
    before = {name: getattr(*where) for name, where in STAGES.items()}
    found = stages(lambda: ways.all_marginals(ways.planned(net, model, x, ways.NRMDefault())(x, 3)))
    assert list(found) == [*STAGES, "rest"]
    several = {"second run, with two samples", "search for samples"}  # not needed here
    assert {name for name in STAGES if found[name] == 0} == several
    assert {name: getattr(*where) for name, where in STAGES.items()} == before
    assert "forward pass" in page.stages_text(found, 1.0, "NRMDefault")


LIMITED = """
import torch
from benchmarks.cost import timing
timing.limit_memory(1.0)
try:
    torch.ones(3 << 28)
except RuntimeError as error:
    print("refused")
"""


@pytest.mark.slow
def test_memory_of_a_process_is_limited():
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "refused"


# -- comparisons ------------------------------------------------------------------------------------------------------


def test_differences_are_relative_to_the_variation_of_each_sample():
    one = {"a": torch.tensor([[1.0, -3.0], [10.0, 10.0]])}
    other = {"a": torch.tensor([[1.0, -1.0], [10.0, 11.0]])}
    assert ways.apart(other, one) == {"neuron": 0.5, "sum": 0.5}
    assert ways.apart(one, {"a": one["a"] + 1}) == {"neuron": 0.25, "sum": 0.5}
    assert ways.apart(one, one) == {"neuron": 0.0, "sum": 0.0}
    with pytest.raises(ValueError, match="different taps"):
        ways.apart(one, {"b": one["a"]})


def test_the_sum_is_compared_in_float64_and_single_neurons_in_float32():
    found = {"plan, X, float64": {"neuron": 0.0, "sum": 2e-6}, "plan, X, float32": {"neuron": 1e-7, "sum": 1.0}}
    assert ways.faults(found) == ["plan, X, float64 differs by 2.0e-06 V"]
    assert ways.faults({"plan, X, float32": {"neuron": math.nan, "sum": 0.0}})


def test_rounding_with_any_composite_excuses_a_difference_in_float32_alone():
    off = {"neuron": 3e-6, "sum": 3e-6}
    rounding = {"rounding, X": {"neuron": 1e-8, "sum": 0.0}, "rounding, Y": {"neuron": 1e-6, "sum": 0.0}}
    assert ways.faults({"plan, X, float32": off, **rounding}) == []
    assert ways.faults({"plan, X, float64": off, **rounding}) == ["plan, X, float64 differs by 3.0e-06 V"]
    assert ways.faults({"plan, X, float32": off, "rounding, X": rounding["rounding, X"]})


@pytest.mark.medium
def test_a_measure_is_compared_with_zennit(monkeypatch):
    made = ways.Ways(SMALL, SMALL.made(), SMALL.inputs())
    found = ways.differences(made)
    assert found["zennit, float64"]["sum"] <= 1e-12
    assert not ways.faults(found)
    assert set(ways.differences(made, exact=False)) == {name for name in found if not name.startswith("plan")} | {
        name for name in found if name.endswith("float32")
    }
    monkeypatch.setattr(ways, "with_context", lambda model, x, composite: 1.00001 * torch.ones_like(x))
    assert ways.faults(ways.differences(made))


def test_relevance_of_another_package_must_be_finite_and_not_zero():
    ways.check(torch.ones(2))
    ways.check((torch.ones(2), None))
    with pytest.raises(ArithmeticError, match="not finite"):
        ways.check(torch.tensor([math.nan, 1.0]))
    with pytest.raises(ArithmeticError, match="zero"):
        ways.check(torch.zeros(2))


@pytest.mark.slow
def test_every_computation_runs_and_those_that_cannot_are_reported(monkeypatch):
    monkeypatch.setitem(NETS, "small", SMALL)
    monkeypatch.setattr(command, "profile", lambda run: run() and "profiled")
    row, of_two = command.one("small", [1, 2], 1, seconds=0)["rows"]
    assert of_two["threads"] == 2
    assert not row["faults"]
    assert not row["not planned"]
    assert all(set(parts) == {*STAGES, "rest"} for parts in row["stages"].values())
    assert set(row["profiles"].values()) <= {"profiled"}
    ours = {f"{way}, {name}" for way in (PLANNED, ways.FIRST, RECORDED, ways.AGAIN) for name in ways.COMPOSITES}
    assert set(row["ratios"]) >= {PLAIN, ZENNIT, ways.ZENNIT_FIRST, ways.CAPTUM} | ours
    assert row["failed"].keys() - {ways.DYNAMIC_LRP} == {ways.LXT}
    assert json.dumps(row)
    assert all(low <= middle <= high for middle, low, high in row["ratios"].values())


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_results_of_a_large_net_are_compared_in_another_process(monkeypatch):
    monkeypatch.setitem(NETS, "small", replace(SMALL, is_large=True))
    monkeypatch.setattr(command, "differences", lambda *of, **more: {str(os.getpid()): {"neuron": 1.0, "sum": 1.0}})
    (row,) = command.one("small", [1], 1)["rows"]
    assert row["differences"].keys() != {str(os.getpid())}
    assert row["faults"]


def test_results_that_differ_are_not_timed(monkeypatch):
    monkeypatch.setitem(NETS, "small", SMALL)
    monkeypatch.setattr(command, "differences", lambda *of, **more: {"plan, float64": {"neuron": 1.0, "sum": 1.0}})
    (row,) = command.one("small", [1], 1, seconds=0)["rows"]
    assert row["faults"]
    assert "ratios" not in row
    assert "differs by 1.0e+00 V" in page.line(row)


class StubPlan:
    """What the benchmark calls of a plan; ``factor`` makes its measures wrong."""

    factor = 1.0
    memory = 0

    def __init__(self, model, inputs, *, composite, batched):
        self.model, self.composite, self.batched = model, composite, batched
        self.asked, self._forms = [], {}

    def __call__(self, inputs, target):
        self.asked.append(inputs)
        mu = RelevanceMeasure(self.model, inputs, target, composite=self.composite)
        marginal = mu.marginal

        def scaled(layer):
            found = marginal(layer)
            return {k: v * self.factor for k, v in found.items()} if isinstance(found, dict) else found * self.factor

        mu.marginal = scaled
        return mu

    def explain(self):
        return "recorded every time: a stub"


@pytest.fixture
def plan(monkeypatch):
    monkeypatch.setattr(ways, "Plan", StubPlan)
    monkeypatch.setattr(command, "profile", lambda run: None)
    monkeypatch.setitem(NETS, "small", SMALL)
    return monkeypatch


@pytest.mark.slow
def test_a_plan_is_compared_and_timed(plan):
    (row,) = command.one("small", [1], 1, seconds=0)["rows"]
    assert not row["faults"]
    assert {f"{PLANNED}, {name}, float{bits}" for name in ways.COMPOSITES for bits in (32, 64)} < set(
        row["differences"]
    )
    assert set(row["not planned"]) == set(ways.COMPOSITES)
    assert "- small, NRMDefault, no plan: recorded every time: a stub" in "- " + "\n- ".join(page.failures([row]))


def test_a_plan_has_answered_for_other_inputs_before_it_is_timed(plan):
    x = SMALL.inputs()
    made = ways.Ways(SMALL, SMALL.made(), x)
    made.ours("NRMDefault")
    (asked,) = made.plans["NRMDefault"].asked
    assert asked.shape == x.shape
    assert not (asked == x).any()


@pytest.mark.medium
def test_a_plan_that_differs_by_more_than_a_millionth_is_not_timed(plan):
    plan.setattr(StubPlan, "factor", 1 + 3e-6)
    (row,) = command.one("small", [1], 1, seconds=0)["rows"]
    assert "plan, NRMDefault, float64 differs by 3.0e-06 V" in row["faults"]
    assert "ratios" not in row


def test_the_peak_of_a_plan_is_that_of_its_first_and_of_its_second_call(plan):
    found = command.peak(SMALL, SMALL.made(), "plan, NRMDefault", 2)
    assert found.keys() == {f"{name}, NRMDefault" for name in ("first call", "plan", "constants", "state")}
    assert all(0 <= peak < 50 for peak in found.values())
    for way in (PLAIN, ways.ZENNIT_FIRST):
        assert command.peak(SMALL, SMALL.made(), way, 2).keys() == {way}


def test_dynamic_lrp_reuses_its_engine_and_restores_the_parameters(monkeypatch):
    engines = []

    class LRPEngine:
        def __init__(self, params_to_interpret, use_z_plus, starting_relevance):
            self.leaf, self.start, self.runs = params_to_interpret[0], starting_relevance, 0
            engines.append(self)

        def run(self, output):
            self.runs += 1
            assert all(parameter.requires_grad for parameter in model.parameters())
            return ([], [self.leaf.detach() * self.start[0, 3]]) if self.runs < 3 else ("node", KeyError("lost"))

    monkeypatch.setitem(sys.modules, "lrp_engine.lrp", type(sys)("lrp"))
    monkeypatch.setattr(sys.modules["lrp_engine.lrp"], "LRPEngine", LRPEngine, raising=False)
    model, x = SMALL.made(), SMALL.inputs()
    work = dynamic_lrp_way.way(model, x, 3)
    assert torch.equal(work(), x)
    assert torch.equal(work(), x)
    assert len(engines) == 1
    with pytest.raises(KeyError, match="lost"):
        work()
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_methods_that_lxt_replaces_are_restored():
    class Layer(nn.Module):
        def forward(self, x):
            return x

    def patch(kind):
        kind.original_forward = kind.forward
        kind.forward = lambda self, x: 2 * x

    before = Layer.forward
    with lxt_way.patched({Layer: patch}):
        assert Layer()(3) == 6
    assert Layer.forward is before
    assert not hasattr(Layer, "original_forward")


def test_what_a_plan_holds_is_its_constants_and_the_tensors_between_its_stages():
    model = nn.Sequential(nn.Linear(3, 500), nn.ReLU(), nn.Linear(500, 4))
    plan = ways.prepared(Net(lambda: model, (3,)), model, torch.randn(2, 3), ways.EpsilonPlusFlat())
    found = ways.held(plan)
    assert found["constants"] == plan.memory >= 500 * 4 * 4
    assert 2 * 500 * 4 <= found["state"] <= 10 * 2 * 500 * 4


# -- nets -------------------------------------------------------------------------------------------------------------


def test_batch_normalization_has_statistics_of_one_batch_and_no_weight_is_zero():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(1), nn.LazyLinear(2))
    model(torch.randn(1, 3, 8, 8))
    nn.init.zeros_(model[1].weight)
    nn.init.zeros_(model[4].weight)
    draw_zeros(model)
    settle(model, (3, 8, 8))
    assert model[1].weight.all()
    assert model[4].weight.all()
    assert model[1].running_mean.any()
    assert model[1].momentum == 0.1
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    "net", [Net(partial(Graph, 20, 3, 5), (20, 5), is_batched=False), Net(Recurrent, (3, 64)), SMALL]
)
def test_relevance_reaches_the_inputs_of_own_nets(net):
    model, x = net.made(), net.inputs()
    assert torch.equal(net.made()(x), model(x))
    mu = ways.recorded(net, model, x, ways.NRMDefault())
    assert float(mu.marginal("input").abs().sum()) > 0.2
    gradient = ways.gradient(model, x)
    assert gradient.any()


def test_all_nets_have_targets():
    assert list(page.TARGETS) == list(NETS)
    assert set(BATCHED) <= set(NETS)
    assert len(timm_models.NAMES) == len(set(timm_models.NAMES)) > 90


def test_nets_of_missing_packages_are_skipped_with_a_message(monkeypatch, capsys):
    monkeypatch.setitem(NETS, "absent", Net(nn.Identity, (1,), package="no_such_package"))
    assert list(command.chosen(["abs*", "vgg*"], list(NETS))) == ["VGG16 224"]
    assert "absent: skipped, because no_such_package is not installed" in capsys.readouterr().out


# -- tables -----------------------------------------------------------------------------------------------------------


def test_a_figure_shows_measured_target_and_miss():
    assert str(Figure(1.234, 1.6)) == "1.23 / 1.6"
    assert str(Figure(1.61, 1.6)) == "1.61 / 1.6 ✗"
    assert str(Figure(math.nan, 1.6)).endswith("✗")
    assert str(Figure(2.0)) == "2"
    assert str(Figure(None, 1.6)) == ""


def test_a_plan_is_compared_with_the_target_and_with_other_packages():
    row = row_of(zennit=4.0, recorded_NRMDefault=3.0, plan_NRMDefault=1.5)
    found = page.figures(row, "NRMDefault")
    assert str(found["plan"]) == "1.5 / 1.6"
    assert str(found["recorded"]) == "3"
    assert str(found["plan : Zennit"]) == "0.375 / 0.7"
    assert str(found["plan : Captum"]) == ""


def test_there_is_no_target_relative_to_zennit_where_it_has_no_rule():
    assert ways.without_rule(nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Linear(1, 1))) == []
    assert ways.without_rule(nn.Sequential(nn.LSTM(1, 1), nn.LayerNorm(1), nn.Linear(1, 1))) == ["LSTM", "LayerNorm"]
    row = {**row_of(zennit=1.0, plan_NRMDefault=3.0), "without rule": ["LSTM"]}
    assert str(page.figures(row, "NRMDefault")["plan : Zennit"]) == "3"


def test_memory_is_relative_to_the_plain_gradient_and_to_zennit():
    mib = {PLAIN: 10.0, ways.ZENNIT_FIRST: 16.0, "plan, NRMDefault": 18.0, "first call, NRMDefault": 30.0}
    found = page.memory({"net": "VGG16 224", "batch": 1, "MiB": mib}, "NRMDefault")
    assert [str(found[name]) for name in ("plan", "first call", "plan : Zennit")] == [
        "1.8 / 2",
        "3 / 2.5 ✗",
        "1.12 / 1 ✗",
    ]


def test_the_tables_list_targets_missed_with_a_profile_and_rows_that_failed():
    slow = row_of(zennit=4.0, plan_NRMDefault=3.0, plan_EpsilonPlusFlat=1.5)
    slow["profiles"] = {"NRMDefault": {"seconds": 1, "outside operators": 0.3, "operators": {"aten::mul": [0.2, 7]}}}
    slow["load"] = 2.5
    late = row_of("ResNet-18 224")
    late["ratios"]["first call, NRMDefault"] = [9.0] * 3
    late["stages"] = {"NRMDefault": {"source": 1.0, "simplification": 2.5}}
    failed = {"net": "Swin-T", "threads": 1, "failed run": "exit status 3"}
    peaks = {"net": "VGG16 224", "batch": 8, "MiB": {PLAIN: 10.0, "plan, NRMDefault": 21.0}}
    peaks["MiB"] |= {"constants, NRMDefault": 2.0, "state, NRMDefault": 12.0}
    peaks["failed"] = {"recorded, NRMDefault": "no memory", ways.ZENNIT_FIRST: "hook"}
    timm = [row_of(f"timm/net{i}", plan_NRMDefault=float(i)) for i in (1, 2, 6)]
    results = {"environment": {"torch": "2"}, "rows": [failed, slow, late], "peaks": [peaks], "timm": timm}
    text = page.tables(results)
    assert "| VGG16 224 | EpsilonPlusFlat | 1.5 / 1.6 |" in text
    assert "| VGG16 224 | NRMDefault | 3 / 1.6 ✗ |" in text
    missed = "plan 3 / 1.6 ✗, plan : Zennit 0.75 / 0.7 ✗"
    assert f"- **VGG16 224, NRMDefault**: 1 thread: {missed}. Plan: outside of operators 30%; `mul` 20% (7 c" in text
    late_text = "first call 9 / 3 ✗. First call, in gradients: simplification 2.5, source 1."
    assert f"- **ResNet-18 224, NRMDefault**: 1 thread: {late_text}" in text
    assert "Load of the machine meanwhile: 2.5 to 2.5 processes." in text
    assert "- VGG16 224, batch 8, peak memory of recorded, NRMDefault: no memory" in text
    assert "hook" not in text
    assert "- **VGG16 224, batch 8, NRMDefault, peak memory**: plan 2.1 / 2 ✗. Of it, constants 0.2, tensors" in text
    assert "- Swin-T, 1 thread: exit status 3" in text
    assert "| NRMDefault | plan | 3 | 2 / 1.8 ✗ | 6 / 4 ✗ (net6) |" in text


def test_the_overview_counts_targets_and_names_the_largest_miss():
    rows = [row_of(plan_NRMDefault=1.5), row_of("ResNet-18 224", plan_NRMDefault=3.4)]
    rows[1]["ratios"][ways.CAPTUM] = [4.0] * 3
    rows += [row_of("Swin-T", plan_NRMDefault=1.9), {"net": "MobileNetV2", "threads": 1, "failed run": "exit status 3"}]
    batch = {**row_of("VGG16 224", zennit=2.0, plan_NRMDefault=3.0, plan_EpsilonPlusFlat=1.0), "batch": 8}
    peak = {"net": "VGG16 224", "batch": 8, "MiB": {PLAIN: 10.0, "plan, NRMDefault": 21.0}, "failed": {}}
    timm = [row_of(f"timm/net{i}", plan_NRMDefault=float(i)) for i in (1, 2, 6)]
    text = page.overview({"rows": rows, "batches": [batch], "peaks": [peak], "timm": timm})
    assert "| timm | plan, median of 3 | 0 of 1 | 2 / 1.8 ✗ (NRMDefault) |" in text
    assert "| timm | plan, worst of 3 | 0 of 1 | 6 / 4 ✗ (net6, NRMDefault) |" in text
    assert "| time, 1 thread | plan | 1 of 3 | 3.4 / 1.7 ✗ (ResNet-18 224, NRMDefault) |" in text
    assert "| time, 1 thread | plan : Captum | 1 of 1 |  |" in text
    assert "| time of batches, 1 thread | plan : Zennit | 1 of 2 | 1.5 / 0.7 ✗ (VGG16 224, batch 8," in text
    assert "| peak memory | plan | 0 of 1 | 2.1 / 2 ✗ (VGG16 224, batch 8, NRMDefault) |" in text


def test_results_replace_those_of_the_same_net_and_keep_the_others(tmp_path):
    path = tmp_path / "cost.json"
    command.store(path, "rows", [{"net": "a", "threads": 1, "x": 1}, {"net": "a", "threads": 2}], ("net", "threads"))
    command.store(path, "peaks", [{"net": "a", "batch": 1}], ("net", "batch"))
    command.store(path, "rows", [{"net": "a", "threads": 1, "x": 2}], ("net", "threads"))
    stored = json.loads(path.read_text())
    assert stored["rows"] == [{"net": "a", "threads": 1, "x": 2}, {"net": "a", "threads": 2}]
    assert stored["peaks"] == [{"net": "a", "batch": 1}]
    assert {"torch", "zennit", "captum", "processor", "cores"} <= stored["environment"].keys()


def options(**given):
    """Options of the command line."""
    usual = {"nets": ["*"], "threads": [1, 2], "rounds": 7, "quick": False, "times": False, "peaks": False}
    usual |= {
        "batches": False,
        "timm": False,
        "missing": False,
        "memory": None,
        "seconds": command.SECONDS,
        "out": command.RESULTS,
    }
    return argparse.Namespace(**usual | given)


def test_the_options_select_what_is_measured(monkeypatch):
    calls = []
    monkeypatch.setattr(command, "measured", lambda names, given: calls.append(("rows", names)))
    monkeypatch.setattr(command, "of_timm", lambda names, given: calls.append(("timm", names)))
    monkeypatch.setattr(command, "batches", lambda names, given: calls.append(("batches", names)))
    monkeypatch.setattr(command, "peaks", lambda names, given: calls.append(("peaks", names)))
    monkeypatch.setattr(timm_models, "NAMES", [])
    rows, timm = ("rows", ["VGG16 224", "ResNet-18 224"]), ("timm", [])
    batches, peaks = ("batches", ["ResNet-18 224"]), ("peaks", rows[1])
    for selected, expected in (
        ({}, [rows, batches, peaks, timm]),
        ({"quick": True}, [rows]),
        ({"times": True}, [rows]),
        ({"batches": True}, [batches]),
        ({"peaks": True}, [peaks]),
        ({"timm": True}, [timm]),
    ):
        calls.clear()
        command.run(options(nets=["vgg16*", "resnet-18*"], **selected))
        assert calls == expected


def test_each_net_is_measured_once_with_all_numbers_of_threads(monkeypatch, tmp_path):
    calls = []

    def spawned(*arguments, **more):
        calls.append(arguments)
        return {"rows": [row_of(threads=1), row_of(threads=2)]} if len(calls) == 1 else {"failed run": "no memory"}

    monkeypatch.setattr(command, "spawned", spawned)
    given = options(out=tmp_path / "cost.json", memory=4.0)
    command.measured(["VGG16 224", "Swin-T"], given)
    assert calls[0] == ("--one", "VGG16 224", "--threads", 1, 2, "--rounds", 7, "--memory", 4.0)
    stored = json.loads(given.out.read_text())["rows"]
    assert [(row["net"], row["threads"], "failed run" in row) for row in stored] == [
        ("VGG16 224", 1, False),
        ("VGG16 224", 2, False),
        ("Swin-T", 1, True),
        ("Swin-T", 2, True),
    ]
    assert list(command.missing(["VGG16 224", "DeiT-tiny"], [1, 2], given, "rows", "threads")) == [
        "VGG16 224",
        "DeiT-tiny",
    ]
    given.missing = True
    assert list(command.missing(["VGG16 224", "DeiT-tiny"], [1, 2], given, "rows", "threads")) == ["DeiT-tiny"]
    assert list(command.missing(["VGG16 224"], [1, 4], given, "rows", "threads")) == ["VGG16 224"]


def test_models_of_timm_that_fail_are_stored_with_the_reason(monkeypatch, tmp_path):
    def forked(run, name, *arguments, seconds):
        if name == "timm/large":
            raise RuntimeError("no memory")
        return [row_of(name)]

    monkeypatch.setattr(command, "forked", forked)
    given = options(out=tmp_path / "cost.json", missing=True)
    command.of_timm(["timm/small", "timm/large"], given)
    small, large = json.loads(given.out.read_text())["timm"]
    assert small["net"] == "timm/small"
    assert large == {"net": "timm/large", "threads": 1, "failed run": "no memory"}


def test_batches_are_measured_with_one_thread_and_stored_apart(monkeypatch, tmp_path):
    calls = []

    def spawned(*arguments, **more):
        calls.append(arguments)
        return {"rows": [{**row_of(recorded_NRMDefault=2.0, plan_NRMDefault=3.0), "batch": arguments[7]}]}

    monkeypatch.setattr(command, "spawned", spawned)
    given = options(out=tmp_path / "cost.json", missing=True, seconds=0.0)
    failed = {"net": "VGG16 224", "threads": 1, "batch": 2, "failed run": "no memory"}
    command.store(given.out, "batches", [failed], ("net", "batch"))
    command.batches(["VGG16 224"], given)
    assert calls == [("--one", "VGG16 224", "--threads", 1, "--rounds", 7, "--batch", 8, "--seconds", 0.0)]
    text = page.tables(json.loads(given.out.read_text()))
    assert "| VGG16 224 | 8 | NRMDefault | 3 |" in text  # the targets are those of one sample
    assert "- VGG16 224, batch 2, 1 thread: no memory" in text


def test_a_plan_for_a_batch_is_made_for_other_inputs_of_the_same_size():
    made = ways.Ways(SMALL, SMALL.made(), SMALL.inputs(3))
    assert made.other.shape == (3, 16)
    assert not (made.other == made.x).any()


def test_the_pages_show_the_committed_results():
    results = json.loads(command.RESULTS.read_text())
    for path in pages.PARTS:
        assert pages.rendered(results, path) == path.read_text()
    assert "x 1" in pages.rendered({"environment": {"x": 1}}, page.DETAILS)


def test_misses_of_all_numbers_of_threads_share_the_profile_of_one_thread():
    one, two = row_of(plan_NRMDefault=1.5), row_of(threads=2, plan_NRMDefault=2.0)
    one["profiles"] = {"NRMDefault": {"seconds": 1, "outside operators": 0.3, "operators": {"aten::mul": [0.2, 7]}}}
    (text,) = page.misses({"rows": [two, one]})
    assert (
        text
        == "**VGG16 224, NRMDefault**: 2 threads: plan 2 / 1.6 ✗. Plan: outside of operators 30%; `mul` 20% (7 calls)."
    )


def test_rows_of_another_processor_are_named():
    rows = [
        {**row_of(net), "load": load, "processor": name}
        for net, load, name in (("a", 1, "X"), ("b", 3, "X"), ("c", 2, "Y"))
    ]
    assert page.loads(rows) == "Measured on X, load of the machine meanwhile: 1 to 3 processes. On Y: c."


def test_a_plan_pays_from_the_number_of_inputs_at_which_it_takes_less_time_in_total():
    assert summary.pays_from(10.0, 1.0, 4.0) == 3  # 10 + 1 + 1 = 4 + 4 + 4
    assert summary.pays_from(10.1, 1.0, 4.0) == 4
    assert summary.pays_from(2.0, 1.0, 3.0) == 1
    assert summary.pays_from(10.0, 4.0, 4.0) is None
    assert summary.pays_from(None, 4.0, 5.0) is None


def test_the_summary_shows_the_range_of_both_composites_and_the_peak_of_the_largest_batch():
    names = {"plan": (1.5, 1.25), "first call": (10.0, 4.0), "recorded": (4.0, 1.0)}
    given = {
        f"{way}, {c}": value for way, pair in names.items() for c, value in zip(ways.COMPOSITES, pair, strict=True)
    }
    row = row_of(zennit=4.0, **given)
    peaks = [
        {"net": "VGG16 224", "batch": batch, "MiB": {PLAIN: 10.0, "plan, NRMDefault": mib}}
        for batch, mib in ((1, 90), (8, 20))
    ]
    text = summary.summary({"rows": [row, row_of(threads=2)], "peaks": peaks})
    assert "| VGG16 224 | 1000 ms | 1.2–1.5 | 4–10 | 1–4 | 4 | 4 | 2 |" in text
    assert text.count("VGG16") == 1


def test_rounding_is_also_what_the_last_bit_of_the_inputs_changes(monkeypatch):
    made = ways.Ways(SMALL, SMALL.made(), SMALL.inputs())
    changed = ways.of_moved_inputs(made, ways.NRMDefault)
    assert 0 < changed["neuron"] < 1e-5
    off = {"neuron": 3e-6, "sum": 3e-6}
    assert ways.faults({"plan, X, float32": off, "rounding of inputs, Y": {"neuron": 1e-6, "sum": 0.0}}) == []
