"""A module that is registered under several names is the same layer under each of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import LayerNRM, NeuronNRM, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import UnknownLayerError
from nrm_plugin.recording.module_names import first_name, module_names
from nrm_plugin.recording.module_outputs import module_outputs

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.output = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.linear(x).relu()
        return hidden, self.output(hidden)


class Shared(nn.Module):
    """A block with two names, one of them in a list, that is called once, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = Block()
        self.second = nn.ModuleList([self.first])
        self.twice = nn.Linear(4, 4)
        self.again, self.head = self.twice, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden, other = self.second[0](x)
        return self.head(self.again(self.twice(hidden).relu()).relu() + other)


ALIASES = {
    "second.0[0]": "first[0]",
    "second.0[1]": "first[1]",
    "second.0.linear": "first.linear",
    "second.0.output": "first.output",
    "second.0.relu": "first.relu",
    "again:0": "twice:0",
    "again:1": "twice:1",
}


@pytest.fixture
def mu() -> RelevanceMeasure:
    return RelevanceMeasure(Shared().eval(), X, 1, composite=NRMDefault())


@pytest.mark.parametrize("alias", ALIASES)
def test_a_layer_is_found_by_each_of_its_names(mu, alias):
    name = ALIASES[alias]
    assert alias not in mu.layers
    queries: list[Callable[[str], Tensor]] = [
        mu.marginal,
        lambda layer: mu(at(layer)),
        lambda layer: mu.marginal("input", joint=at(layer)),
        lambda layer: mu.joint("output", layer),
        lambda layer: mu.sink(layer),
        lambda layer: mu.marginal("input", joint=at(layer) & ~at("head")),
    ]
    for ask in queries:
        assert torch.equal(ask(alias), ask(name))


def test_calls_sides_and_sinks_of_another_name(mu):
    assert torch.equal(mu(at("again", call=1)), mu(at("twice", call=1)))
    assert torch.equal(mu(at("again", call="any")), mu(at("twice", call="any")))
    assert torch.equal(mu.marginal(at("second.0.linear", side="input")), mu.marginal(at("first.linear", side="input")))
    assert torch.equal(mu(at("second.0.linear", side="sink")), mu(at("first.linear", side="sink")))
    with pytest.raises(UnknownLayerError, match="called 2 times"):
        mu(at("again"))


def test_other_entry_points_take_another_name():
    net = Shared().eval()
    for method in (LayerNRM, NeuronNRM):
        found = [
            method(net, layer).attribute(X, 1)
            if method is LayerNRM
            else method(net, layer).attribute(X, lambda values: values[:, 1])
            for layer in ("second.0.linear", "first.linear")
        ]
        assert torch.equal(*found)
    with module_outputs(net, ["second.0.linear"]) as outputs:
        net(X)
    assert torch.equal(outputs["second.0.linear"][0], net.first.linear(X))


def test_names_that_are_no_module_are_unchanged():
    names = module_names(Shared())
    for name in ("input", "output", "head", "nothing", "first.nothing", "relu", "first.relu:1", "twice:1", ""):
        assert first_name(name, names) == name
    assert first_name("second.0.nothing:3", names) == "first.nothing:3"


def test_a_name_of_no_module_raises(mu):
    with pytest.raises(UnknownLayerError, match=r"no tap named 'second\.1'"):
        mu.marginal("second.1")
    with pytest.raises(UnknownLayerError, match="no tap named"):
        mu.marginal("second.0.sigmoid")
