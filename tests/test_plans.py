"""Plans give correct results or record the model again: data-dependent control flow, and changed models.

Covers: nrm_plugin.plan.model_state, nrm_plugin.plan.trace, nrm_plugin.plan.program_cache,
nrm_plugin.plan.planned_measure.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.modules.module as all_modules
from torch import Tensor, nn

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import InputError, StaleMeasureError
from nrm_plugin.plan.plan import Plan

DTYPE = torch.float64


def sample(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, 4, generator=torch.Generator().manual_seed(seed), dtype=DTYPE)


INPUTS = [sample(seed) for seed in range(8)]


class Net(nn.Module):
    """Two heads over hidden units, joined by a function of the module and the hidden units."""

    def __init__(self, joined: Callable[[Any, Tensor], Tensor] = lambda net, h: net.b(h)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b, self.c = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3), nn.Linear(6, 3)
        self.joined, self.factors, self.settings = joined, [1.0], {"scale": 1.0}
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.joined(self, torch.relu(self.norm(self.a(x))) * self.factors[0] * self.settings["scale"])


def planned_like_recorded(net: nn.Module, change: Callable[[Any], Any] = lambda net: None) -> Plan:
    """Asserts that a plan equals recordings, after a change of the model; a few inputs are planned before."""
    plan = Plan(net, INPUTS[0])
    for x in INPUTS[:2]:
        plan(x, 0).marginal("input")
    change(net)
    for x in INPUTS:
        ours, recorded = plan(x, 0), RelevanceMeasure(net, x, 0)
        torch.testing.assert_close(ours.outputs, recorded.outputs, rtol=0, atol=1e-12)
        torch.testing.assert_close(ours.marginal("input"), recorded.marginal("input"), rtol=0, atol=1e-10)
    return plan


def branch(net: Net, h: Tensor) -> Tensor:
    return net.b(h) if h.sum() > 2.4 else net.c(h)


def loop(net: Net, h: Tensor) -> Tensor:
    while h.sum() > 1:
        h = h * 0.6
    return net.b(h)


def experts(net: Net, h: Tensor) -> Tensor:
    first = h.topk(2, 1).indices[:, 0] % 2
    out = h.new_zeros(len(h), 3)
    for number, expert in enumerate([net.b, net.c]):
        rows = (first == number).nonzero()[:, 0]
        if len(rows):
            out = out.index_add(0, rows, expert(h[rows]))
    return out


def masked(net: Net, h: Tensor) -> Tensor:
    out = net.c(h).clone()
    chosen = h[:, 0] > 0.3
    out[chosen] = net.b(h[chosen])
    return out


READERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "if": branch,
    "while": loop,
    "experts": experts,
    "masked rows": masked,
    "item": lambda net, h: net.b(h * h.detach().sum().item()),
    "tolist": lambda net, h: net.b(h * max(h.detach()[0].tolist())),
    "numpy": lambda net, h: net.b(h * float(h.detach().numpy().max())),
    "array": lambda net, h: net.b(h * float(np.asarray(h.detach()).max())),
    "index by int": lambda net, h: net.b(h * h[:, int(h[0].argmax())][:, None]),
    "index by a list of tensors": lambda net, h: net.b(h[:, list(h[0].argsort())]),
    "tensor of a list": lambda net, h: net.b(h * torch.tensor([*h.detach()[0]], dtype=DTYPE)),
    "format": lambda net, h: net.b(h) if f"{h.detach()[0, 0]}".startswith("0.") else net.c(h),
    "range": lambda net, h: net.b(h * 0.5 ** len(range(int(h[0].argmax())))),
    "unique": lambda net, h: net.b(h * len(torch.unique(h.detach()))),
    "allclose": lambda net, h: net.b(h) if torch.allclose(h, torch.ones_like(h), atol=0.9) else net.c(h),
    "finite": lambda net, h: net.b(h) if torch.isfinite(h).all() else net.c(h),
    "data": lambda net, h: net.b(h * h.data.amax(1, keepdim=True)),
}


@pytest.mark.medium
@pytest.mark.parametrize("kind", READERS)
def test_control_flow_that_reads_values_is_not_frozen(kind):
    planned_like_recorded(Net(READERS[kind]))


@pytest.mark.medium
def test_a_plan_says_what_reads_values():
    assert "tolist" in planned_like_recorded(Net(READERS["tolist"])).explain()
    assert "recorded every time" in planned_like_recorded(Net(READERS["item"])).explain()


def replaced_data(net: Net) -> None:
    net.a.weight.data = net.a.weight.data * 2


def written_entry(net: Net) -> None:
    net.a.weight.data[3, 2] += 1


def optimized(net: Net) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(INPUTS[0]).sum().backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "data replaced": replaced_data,
    "data scaled": lambda net: net.a.weight.data.mul_(2),
    "one entry": written_entry,
    "NumPy": lambda net: np.copyto(net.a.weight.detach().numpy()[:1], 3.0),
    "state dict": lambda net: net.load_state_dict({key: value * 1.5 for key, value in net.state_dict().items()}),
    "assigned state dict": lambda net: net.load_state_dict(
        {key: value * 1.5 for key, value in net.state_dict().items()}, assign=True
    ),
    "optimizer": optimized,
    "submodule": lambda net: setattr(net, "b", nn.Linear(6, 3).double()),
    "attribute": lambda net: setattr(net.norm, "eps", 0.5),
    "item of a list": lambda net: net.factors.__setitem__(0, 3.0),
    "item of a dictionary": lambda net: net.settings.update(scale=3.0),
    "function": lambda net: setattr(net, "joined", lambda net, h: net.c(h)),
    "forward hook": lambda net: net.a.register_forward_hook(lambda module, args, output: output * 2),
    "hook before": lambda net: net.a.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
}


@pytest.mark.medium
@pytest.mark.parametrize("kind", CHANGES)
def test_a_model_that_changed_is_planned_anew(kind):
    planned_like_recorded(Net(), CHANGES[kind])


@pytest.mark.parametrize("kind", ["data scaled", "attribute", "forward hook"])
def test_a_measure_of_a_model_that_changed_refuses(kind):
    net = Net()
    mu = Plan(net, INPUTS[0])(INPUTS[1], 0)
    CHANGES[kind](net)
    with pytest.raises(StaleMeasureError):
        mu.marginal("input")


def test_hooks_of_the_user_run_for_every_input():
    net, seen = Net(), []
    net.a.register_forward_hook(lambda module, args, output: seen.append(1))
    plan = Plan(net, INPUTS[0])
    for x in INPUTS:
        plan(x, 0).marginal("input")
    assert len(seen) >= len(INPUTS)
    assert "recorded every time: module 'a' has hooks" in plan.explain()


def test_hooks_of_all_modules_run_for_every_input():
    net, seen = Net(), []
    plan = Plan(net, INPUTS[0])
    plan(INPUTS[1], 0).marginal("input")
    handle = all_modules.register_module_forward_hook(lambda module, args, output: seen.append(1))
    try:
        for x in INPUTS:
            plan(x, 0).marginal("input")
    finally:
        handle.remove()
    assert len(seen) >= len(INPUTS)


def test_hooks_of_torch_are_planned():
    net = Net()
    net.b = torch.nn.utils.spectral_norm(net.b).eval()
    assert "operations" in planned_like_recorded(net).explain()


@pytest.mark.parametrize("draw", [random.random, np.random.rand, lambda: torch.rand(6, dtype=DTYPE)])
def test_random_numbers_are_drawn_for_every_input(draw):
    plan = Plan(Net(lambda net, h: net.b(h * draw())), INPUTS[0])
    for x in INPUTS[:2]:
        plan(x, 0).marginal("input")
    assert "random numbers" in plan.explain()


def test_a_query_that_was_not_traced_leaves_no_constants():
    """The first query of an event is not traced; kernels that it builds must not be constants of later programs."""
    net = Net()
    plan = Plan(net, INPUTS[0])
    first = plan(INPUTS[0], 0)
    for _ in range(2):
        first(at("a")[0] & at("relu")[1])
    first.marginal("input", joint=at("a")[0])
    first.sink("input")
    for x in INPUTS:
        ours, recorded = plan(x, 0), RelevanceMeasure(net, x, 0)
        torch.testing.assert_close(ours(at("a")[0] & at("relu")[1]), recorded(at("a")[0] & at("relu")[1]))
        torch.testing.assert_close(ours.sink("input"), recorded.sink("input"))


def test_queries_beside_the_measure_leave_no_constants():
    net = Net()
    plan = Plan(net, INPUTS[0])
    first = plan(INPUTS[0], 0)
    for vertex in first._recording.graph.vertices:
        if vertex.step is not None:
            _ = vertex.step.kernel  # as a search or a plot does
    first.marginal("input")
    for x in INPUTS:
        expected = RelevanceMeasure(net, x, 0).marginal("input")
        torch.testing.assert_close(plan(x, 0).marginal("input"), expected)


def test_overwritten_inputs_are_refused():
    plan = Plan(Net(), INPUTS[0])
    for x in INPUTS[:2]:
        plan(x, 0).marginal("input")
    x = INPUTS[2].clone()
    mu = plan(x, 0)
    x.mul_(3)
    with pytest.raises(StaleMeasureError, match="inputs were overwritten"):
        mu.marginal("input")


def test_overwritten_results_change_no_answer():
    plan = Plan(Net(), INPUTS[0])
    for x in INPUTS[:2]:
        plan(x, 0).marginal(["input", "a"])
    mu = plan(INPUTS[2], 0)
    before = {name: values.clone() for name, values in mu.marginal(["input", "a"]).items()}
    outputs = mu.outputs.clone()
    for values in (*mu.marginal(["input", "a"]).values(), mu.outputs, mu.output):
        values.zero_()
    assert torch.equal(mu.outputs, outputs)
    assert all(torch.equal(values, before[name]) for name, values in mu.marginal(["input", "a"]).items())


def test_invalid_inputs_drop_no_programs():
    plan = Plan(Net(), INPUTS[0])
    for x in INPUTS[:2]:
        plan(x, 0).marginal("input")
    before = plan.explain()
    for _ in range(4):
        with pytest.raises(InputError, match="nan"):
            plan(INPUTS[2] * torch.nan, 0)
    assert plan.explain() == before


def test_an_interrupted_query_leaves_the_plan_usable():
    net = Net()

    def interrupted(net: Any, h: Tensor) -> Tensor:
        raise KeyboardInterrupt

    plan = Plan(net, INPUTS[0])
    plan(INPUTS[0], 0).marginal("input")
    joined, net.joined = net.joined, interrupted
    with pytest.raises(KeyboardInterrupt):
        plan(INPUTS[1], 0)
    net.joined = joined
    torch.testing.assert_close(
        plan(INPUTS[1], 0).marginal("input"), RelevanceMeasure(net, INPUTS[1], 0).marginal("input")
    )


@pytest.mark.medium
def test_threads_share_a_plan():
    net, failures = Net(), []
    plan = Plan(net, INPUTS[0])

    def work(seed: int) -> None:
        try:
            for number in range(6):
                x = sample(100 * seed + number)
                ours, recorded = plan(x, 0).marginal("input"), RelevanceMeasure(net, x, 0).marginal("input")
                torch.testing.assert_close(ours, recorded)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("other", [sample(1, rows=3), sample(1).float(), sample(1, rows=2).T.contiguous().T])
def test_other_forms_are_planned_anew(other):
    net = Net()
    plan = Plan(net, sample(0, rows=2))
    plan(sample(0, rows=2), 0).marginal("input")
    net.to(other.dtype)
    torch.testing.assert_close(plan(other, 0).marginal("input"), RelevanceMeasure(net, other, 0).marginal("input"))


@pytest.mark.medium
def test_a_long_trace_is_begun_anew_without_constants(monkeypatch):
    monkeypatch.setattr("nrm_plugin.plan.planned_measure.LONGEST", 0)
    net = Net()
    plan = Plan(net, INPUTS[0])
    first = plan(INPUTS[0], 0)
    for query in (first.sink, first.bypass, first.marginal):
        query("a")
    for x in INPUTS:
        ours, recorded = plan(x, 0), RelevanceMeasure(net, x, 0)
        for name in ("sink", "bypass", "marginal"):
            torch.testing.assert_close(getattr(ours, name)("a"), getattr(recorded, name)("a"))


def test_outputs_of_a_graph_are_known_before_relevance():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4, dtype=DTYPE), nn.Linear(4, 2, dtype=DTYPE)

        def forward(self, kinds: Tensor, edges: Tensor) -> Tensor:
            messages = torch.relu(self.table(kinds))[edges[:, 0]]
            return self.head(torch.zeros(len(kinds), 4, dtype=DTYPE).index_add(0, edges[:, 1], messages))

    torch.manual_seed(0)
    net, edges = Graph().eval(), torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2]])
    plan = Plan(net, torch.tensor([3, 1, 7]), additional_forward_args=edges, batched=False)
    for kinds in ([3, 1, 7], [1, 2, 3], [8, 0, 0]):
        inputs = torch.tensor(kinds)
        ours = plan(inputs, (0, 1), additional_forward_args=edges)
        recorded = RelevanceMeasure(net, inputs, (0, 1), additional_forward_args=edges, batched=False)
        torch.testing.assert_close(ours.outputs, recorded.outputs)
        torch.testing.assert_close(ours.marginal("table"), recorded.marginal("table"))
