"""Samples that depend on each other by thresholds, ids or hooks raise; others have the measures of single samples."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import NRM, LayerNRM, RelevanceMeasure
from nrm_plugin.errors import FoldingError
from tests.conftest import in_turn


class Net(nn.Module):
    """Two layers, with a function between them."""

    def __init__(self, between: Callable[..., Tensor], seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.between = nn.Linear(4, 6), nn.Linear(6, 2), between

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.b(self.between(self.a(x).relu(), *more))


class Words(nn.Module):
    """A mean of embeddings, changed by the ids of the batch."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.b, self.change = nn.Embedding(12, 6), nn.Linear(6, 2), change

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.change(self.e(ids).mean(1), ids))


def drawn(count: int, seed: int = 1, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))


def assert_is_that_of_samples(net: nn.Module, x: Tensor, tap: str = "input", **more: Any) -> None:
    alone = torch.cat([RelevanceMeasure(net, row[None], 1, **more).marginal(tap) for row in x])
    torch.testing.assert_close(RelevanceMeasure(net, x, 1, **more).marginal(tap), alone, rtol=1e-4, atol=1e-5)


THRESHOLDS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda h: h.sigmoid() if h.sum() > 3 else h.tanh(),
    "sum as a number": lambda h: h.tanh() if float(h.detach().sum()) > 3 else h,
    "quantile": lambda h: h * (h >= h.detach().quantile(0.5, 0)),
    "place in the sorted batch": lambda h: h * (h >= h.sort(0).values[len(h) // 2]),
    "rank": lambda h: h * (h.argsort(0).argsort(0) > 0),
    "step at the median": lambda h: h + 0.3 * (h.detach() > h.detach().median()).float(),
    "numpy": lambda h: h * torch.from_numpy((h.detach().numpy() > np.median(h.detach().numpy(), 0)).astype("float32")),
}


@pytest.mark.parametrize(("name", "count"), in_turn(THRESHOLDS, [2, 3, 6]))
def test_a_threshold_of_the_batch_raises_or_changes_no_sample(name, count):
    for seed in range(4):
        net, x = Net(THRESHOLDS[name], seed).eval(), drawn(count, 100 + seed, (0.3, 1.0, 5.0)[seed % 3]) + seed % 2
        if torch.allclose(torch.cat([net(row[None]) for row in x]), net(x), atol=1e-5):
            with contextlib.suppress(FoldingError):  # other values of the samples may cross the threshold
                assert_is_that_of_samples(net, x)
            continue
        for entry in (lambda n, x: RelevanceMeasure(n, x, 1), lambda n, x: NRM(n).attribute(x, 1)):
            with pytest.raises(FoldingError):
                entry(net, x)


@pytest.mark.recorded
def test_many_samples_are_not_all_run_alone():
    rows: list[int] = []
    net = Net(lambda h: rows.append(len(h)) or h * (1 + 0 * float(h.detach().sum()))).eval()
    RelevanceMeasure(net, drawn(100), 1)
    assert 10 <= rows.count(1) <= 16


def by_position(h: Tensor, table: Tensor | None = None) -> Tensor:
    position = torch.linspace(0, 1, 6)[: len(h), None] if table is None else table
    return (h + position) * (1 + 0 * float(h.detach().max()))


def test_samples_with_a_position_in_the_batch_do_not_depend_on_each_other():
    net, x = Net(by_position).eval(), drawn(4)
    alone = []
    for number, row in enumerate(x):
        mu = RelevanceMeasure(net, row.expand(4, 4).clone(), 1)  # the same row at the same position
        alone.append(mu.marginal("input")[number])
    torch.testing.assert_close(RelevanceMeasure(net, x, 1).marginal("input"), torch.stack(alone))


@pytest.mark.parametrize("rows", [4, 1])
def test_further_arguments_have_rows_of_samples_or_not(rows):
    net, x, table = Net(by_position).eval(), drawn(4), torch.linspace(0, 1, rows)[:, None]
    found = RelevanceMeasure(net, x, 1, additional_forward_args=(table,)).marginal("input")
    for number, row in enumerate(x):
        own = table[number : number + 1] if rows > 1 else table
        alone = RelevanceMeasure(net, row[None], 1, additional_forward_args=(own,)).marginal("input")
        torch.testing.assert_close(found[number], alone[0])


IDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda h, ids: h * (1 + (ids.float().mean() > 5).float()),
    "largest": lambda h, ids: h * (ids.max() / 12),
    "largest in each column": lambda h, ids: h * (ids.amax(0).float().mean() / 12),
    "sorted samples": lambda h, ids: h * (ids.sort(0).values[:1].sum(1, keepdim=True) / 24),
    "transposed": lambda h, ids: h * (ids.t().max(1).values.float().sum() / 48),
    "a branch": lambda h, ids: h.tanh() if ids.max().item() > 9 else h,
    "counts": lambda h, ids: h * (1 + ids.flatten().bincount(minlength=12)[7] / 4),
}


@pytest.mark.parametrize("name", IDS)
def test_statistics_of_the_ids_of_a_batch_raise(name):
    ids = torch.tensor([[0, 3, 1, 10], [7, 7, 2, 5], [9, 0, 4, 4]])
    with pytest.raises(FoldingError):
        RelevanceMeasure(Words(IDS[name]).eval(), ids, 1)


OF_ROWS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "largest": lambda h, ids: h * (ids.max(1, keepdim=True).values / 12),
    "number of words": lambda h, ids: h / (1 + (ids > 0).sum(1, keepdim=True)),
    "positions": lambda h, ids: h * (1 + (ids > 0).cumsum(1)[:, -1:]),
    "last word": lambda h, ids: h * (1 + ids.argmax(-1)[:, None]),
    "integers of a mask": lambda h, ids: h * (ids > 0).int().sum(1, keepdim=True),
    "a branch that all samples take": lambda h, ids: h if bool((ids >= 0).all()) else h * 0,
}


@pytest.mark.parametrize("name", OF_ROWS)
def test_statistics_of_the_ids_of_a_sample_do_not(name):
    ids = torch.tensor([[0, 3, 1, 10], [7, 7, 2, 5], [9, 0, 4, 4]])
    assert_is_that_of_samples(Words(OF_ROWS[name]).eval(), ids, "e")


def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * (output.detach() > output.detach().mean(0)).float()


def write(module: nn.Module, args: Any, output: Tensor) -> None:
    output.mul_((output.detach() > output.detach().mean(0)).float())


def scale(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * output.detach().mean()


def gate_inputs(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (args[0] * (args[0] > args[0].detach().mean(0)),)


HOOKS = [("a", gate), ("a", write), ("a", scale), ("b", gate), ("a", gate_inputs), ("", gate_inputs), ("", gate)]


@pytest.mark.parametrize(("layer", "hook"), HOOKS)
@pytest.mark.parametrize("entry", [NRM, LayerNRM], ids=["inputs", "layer"])
def test_hooks_that_join_samples_raise(layer, hook, entry):
    net = Net(lambda h: h).eval()
    module = net.get_submodule(layer)
    register = module.register_forward_pre_hook if hook is gate_inputs else module.register_forward_hook
    register(hook)
    with pytest.raises(FoldingError):
        entry(net).attribute(drawn(5), 1)


@pytest.mark.recorded
def test_models_that_compute_only_tensors_of_the_graph_do_not_run_on_single_samples():
    rows: list[int] = []
    net = Net(lambda h: rows.append(len(h)) or h.flip(0).flip(0)).eval()
    RelevanceMeasure(net, drawn(5), 1)
    assert set(rows) == {5}
    words = Words(lambda h, ids: rows.append(len(h)) or h * (ids > 0).int().sum(1, keepdim=True)).eval()
    RelevanceMeasure(words, torch.tensor([[0, 3, 1, 10], [7, 7, 2, 5]]), 1)
    assert rows.count(2) == 1


HOOKS_OF_SAMPLES: dict[str, Callable[[nn.Module, Any, Tensor], Any]] = {
    "gate": lambda module, args, output: output * (output.detach() > output.detach().mean(1, keepdim=True)),
    "values of the batch": lambda module, args, output: setattr(module, "mean", output.detach().mean(0)),
    "constant": lambda module, args, output: output * 2 + 1,
}


@pytest.mark.parametrize("name", HOOKS_OF_SAMPLES)
def test_hooks_that_treat_samples_alike_do_not(name):
    net = Net(lambda h: h.flip(0).flip(0)).eval()
    net.a.register_forward_hook(HOOKS_OF_SAMPLES[name])
    assert_is_that_of_samples(net, drawn(5))


def test_hooks_that_only_work_on_the_inputs_of_the_user():
    net, x, stored = Net(lambda h: h.flip(0).flip(0)).eval(), drawn(5), torch.rand(5, 6)
    net.a.register_forward_hook(lambda module, args, output: output + stored)
    mu = RelevanceMeasure(net, x, 1)
    twin = Net(lambda h: h, 0).eval()
    twin.a.register_forward_hook(lambda module, args, output: output + stored)
    torch.testing.assert_close(mu.marginal("input"), RelevanceMeasure(twin, x, 1).marginal("input"))
