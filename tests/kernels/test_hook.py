"""What a hook does with a module that does more than turn one tensor into another."""

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


class Own(nn.Module):
    """A module of somebody's own: what it computes is given."""

    def __init__(self, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(*args, **kwargs)


class Net(nn.Module):
    """Two layers, something done with what they return, and a layer."""

    def __init__(self, own: Own, ask: Callable[[Own, Tensor, Tensor], Tensor], width: int = 6) -> None:
        super().__init__()
        self.left, self.right, self.own, self.head = nn.Linear(4, 6), nn.Linear(4, 6), own, nn.Linear(width, 3)
        self.ask = ask

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.ask(self.own, self.left(x), self.right(x)))


def net(own: Own, ask: Callable[[Own, Tensor, Tensor], Tensor], width: int = 6) -> Net:
    torch.manual_seed(0)
    return Net(own, ask, width).double().eval()


def rules(of_own: Any) -> LayerMapComposite:
    return LayerMapComposite(layer_map=[(Own, of_own), (Linear, Epsilon(epsilon=1e-9))])


@pytest.mark.parametrize(
    "ask",
    [lambda own, a, b: own(a, b), lambda own, a, b: own(a, b=b), lambda own, a, b: own(a=a, b=b)],
    ids=["by place", "one by keyword", "by keyword"],
)
def test_of_two_inputs_a_rule_hands_all_to_the_first_as_zennit_does_and_says_so(ask):
    model = net(Own(lambda a, b: a + b), ask)
    with pytest.warns(UserWarning, match=r"layer 'own' \(Own\) has a rule and 2 inputs"):
        mu = RelevanceMeasure(model, X, 1, composite=rules(Pass()))
    torch.testing.assert_close(mu.output, model(X)[:, 1].detach())
    torch.testing.assert_close(mu.marginal("left"), mu.marginal("own"))
    assert float(mu.marginal("own").abs().sum()) > 0.5
    assert "right" not in mu.layers  # no walk goes there


def test_a_rule_is_that_of_the_input_also_where_it_comes_by_keyword():
    pool = Own(lambda a: nn.functional.avg_pool1d(a, 2))
    models = net(pool, lambda own, a, b: own(a) + b[:, :3], 3), net(pool, lambda own, a, b: own(a=a) + b[:, :3], 3)
    one, other = (RelevanceMeasure(model, X, 1, composite=rules(Norm())) for model in models)
    for layer in ("own", "left", "right", "input"):
        torch.testing.assert_close(one.marginal(layer), other.marginal(layer))


def test_a_rule_on_a_module_that_returns_numbers_of_things_is_not_asked():
    model = net(Own(lambda a: a.argmax(-1)), lambda own, a, b: a + b * (own(b) >= 0).double()[:, None])
    plain = net(Own(lambda a: a), lambda own, a, b: a + b)
    found = RelevanceMeasure(model, X, 1, composite=rules(Norm()))
    expected = RelevanceMeasure(plain, X, 1, composite=rules(Norm()))
    for layer in ("left", "right", "input"):
        torch.testing.assert_close(found.marginal(layer), expected.marginal(layer))


@pytest.mark.parametrize("again", [False, True], ids=["read once", "read again"])
def test_what_a_module_writes_on_the_way_to_something_else_is_what_the_model_reads(again):
    """Half as many numbers as it was handed, so that what it wrote is not what it returned."""

    def halves(a: Tensor) -> Tensor:
        a.mul_(2)
        return nn.functional.avg_pool1d(a, 2)

    def ask(own: Own, a: Tensor, b: Tensor) -> Tensor:
        pooled = own(b)
        return pooled + b[:, :3] if again else pooled

    model = net(Own(halves), ask, width=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mu = RelevanceMeasure(model, X, 1, composite=rules(Norm()))
    torch.testing.assert_close(mu.output, model(X)[:, 1].detach())
    accounted = mu.marginal("input").sum(1) + mu.sink("input") + mu.bypass("input")
    torch.testing.assert_close(accounted, torch.ones(2).double())
