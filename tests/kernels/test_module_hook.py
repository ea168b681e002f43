"""The hook on modules with several inputs, integer outputs or in-place writes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Linear

from nrm_plugin import RelevanceMeasure

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(1)).double()


class Given(nn.Module):
    """A module that computes a given function."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(*args, **kwargs)


class Net(nn.Module):
    """Two layers, a function of their outputs and of a module, and a layer."""

    def __init__(self, module: Given, combine: Callable[[Given, Tensor, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.left, self.right, self.module, self.head = nn.Linear(4, 6), nn.Linear(4, 6), module, nn.Linear(width, 3)
        self.combine = combine

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.combine(self.module, self.left(x), self.right(x)))


def net(module: Given, combine: Callable[[Given, Tensor, Tensor], Tensor], width: int = 6) -> Net:
    torch.manual_seed(0)
    return Net(module, combine, width).double().eval()


def rules(of_module: Any) -> LayerMapComposite:
    return LayerMapComposite(layer_map=[(Given, of_module), (Linear, Epsilon(epsilon=1e-9))])


@pytest.mark.parametrize(
    "combine",
    [lambda module, a, b: module(a, b), lambda module, a, b: module(a, b=b), lambda module, a, b: module(a=a, b=b)],
    ids=["by position", "one by keyword", "by keyword"],
)
def test_of_two_inputs_the_first_gets_all_relevance_as_in_zennit_with_a_warning(combine):
    model = net(Given(lambda a, b: a + b), combine)
    with pytest.warns(UserWarning, match=r"layer 'module' \(Given\) has a rule and 2 inputs"):
        mu = RelevanceMeasure(model, X, 1, composite=rules(Pass()))
    torch.testing.assert_close(mu.output, model(X)[:, 1].detach())
    torch.testing.assert_close(mu.marginal("left"), mu.marginal("module"))
    assert float(mu.marginal("module").abs().sum()) > 0.5
    assert "right" not in mu.layers  # no walk goes there


def test_an_input_may_be_passed_by_keyword():
    pool = Given(lambda a: nn.functional.avg_pool1d(a, 2))
    models = (
        net(pool, lambda module, a, b: module(a) + b[:, :3], 3),
        net(pool, lambda module, a, b: module(a=a) + b[:, :3], 3),
    )
    one, other = (RelevanceMeasure(model, X, 1, composite=rules(Norm())) for model in models)
    for layer in ("module", "left", "right", "input"):
        torch.testing.assert_close(one.marginal(layer), other.marginal(layer))


def test_a_module_that_returns_integers_is_not_a_step():
    model = net(Given(lambda a: a.argmax(-1)), lambda module, a, b: a + b * (module(b) >= 0).double()[:, None])
    plain = net(Given(lambda a: a), lambda module, a, b: a + b)
    actual = RelevanceMeasure(model, X, 1, composite=rules(Norm()))
    expected = RelevanceMeasure(plain, X, 1, composite=rules(Norm()))
    for layer in ("left", "right", "input"):
        torch.testing.assert_close(actual.marginal(layer), expected.marginal(layer))


@pytest.mark.parametrize("again", [False, True], ids=["read once", "read again"])
def test_the_model_reads_what_a_module_wrote_to_its_input(again):
    """The output has half as many entries as the input, so it is not what was written to the input."""

    def halves(a: Tensor) -> Tensor:
        a.mul_(2)
        return nn.functional.avg_pool1d(a, 2)

    def combine(module: Given, a: Tensor, b: Tensor) -> Tensor:
        pooled = module(b)
        return pooled + b[:, :3] if again else pooled

    model = net(Given(halves), combine, width=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mu = RelevanceMeasure(model, X, 1, composite=rules(Norm()))
    torch.testing.assert_close(mu.output, model(X)[:, 1].detach())
    accounted = mu.marginal("input").sum(1) + mu.sink("input") + mu.bypass("input")
    torch.testing.assert_close(accounted, torch.ones(2).double())
