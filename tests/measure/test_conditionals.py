"""Conditionals given each neuron of a tap compared with products of kernels."""

from __future__ import annotations

import pytest
import torch
import zennit.rules
from torch import nn
from zennit.composites import LayerMapComposite

from nrm_plugin import Event, RelevanceMeasure, at
from nrm_plugin.errors import EventError
from tests.flows import X as IMAGES
from tests.flows import net


class Skip(nn.Module):
    """``c(b(r) + r)`` of ``r = relu(a(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.relu, self.b, self.c = nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.relu(self.a(x))
        return self.c(self.b(hidden) + hidden)


@pytest.fixture(scope="module")
def skip() -> tuple[RelevanceMeasure, torch.Tensor, torch.Tensor]:
    """The measure of such a net under LRP-0, its leaks accounted, and the kernels ``(in, out)`` of ``a`` and ``b``."""
    draw = torch.Generator().manual_seed(3)
    net = Skip().double().eval()
    for parameter in net.parameters():
        parameter.data.copy_(torch.rand(parameter.shape, generator=draw, dtype=torch.float64) + 0.1)
    x = torch.rand((1, 3), generator=draw, dtype=torch.float64)
    rules = LayerMapComposite([(nn.Linear, zennit.rules.Epsilon(epsilon=0.0)), (nn.ReLU, zennit.rules.Pass())])
    mu = RelevanceMeasure(net, x, 1, composite=rules, residual="sink")
    kernels, values = [], x[0]
    for layer in (net.a, net.b):
        output = layer(values).detach()
        kernels.append((layer.weight.detach() * values / output[:, None]).T)
        values = output  # all are positive, so that the activation changes nothing
    return mu, *kernels


def test_conditionals_given_a_neuron_are_products_of_kernels(skip) -> None:
    mu, a, b = skip
    read = at("b", side="input")  # by walks through b, not by those that take the skip
    follows = [
        (at("input")[1], "a", a[1]),
        (at("input")[1], read, a[1]),
        (at("input")[1], "b", a[1] @ b),
        (at("relu")[2], read, torch.eye(4)[2]),
        (at("relu")[2], "b", b[2]),
        (read[2], "b", b[2]),
        (at("a", side="sink"), "a", 1 - a.sum(0)),
        (at("a", side="sink"), read, 1 - a.sum(0)),
        (at("b", side="sink"), "b", 1 - b.sum(0)),
        (at("b", side="sink")[3], "b", (1 - b.sum(0)) * torch.eye(4)[3]),
        (~at("input"), read, 1 - a.sum(0)),
    ]
    for event, layer, expected in follows:
        torch.testing.assert_close(mu.conditional(event, layer), expected.to(a)[None], msg=f"{event} given {layer}")


@pytest.mark.parametrize(
    ("event", "layer"),
    [
        (at("b", side="input")[0], at("b", side="input")),
        (at("b")[0], at("b", side="input")),
        (at("b", side="sink"), at("b", side="input")),
        (at("c", side="sink"), "b"),
        (at("b", side="sink"), "relu"),
        (at("output")[0], "c"),
        (at("relu")[0], "a"),
    ],
    ids=str,
)
def test_conditionals_of_events_above_the_neuron_raise(skip, event: Event, layer: object) -> None:
    mu, _, _ = skip
    with pytest.raises(EventError, match="not below"):
        mu.conditional(event, layer)


def test_an_event_is_conditional_on_all_taps_above_it(skip) -> None:
    mu, _, _ = skip
    names = list(mu.layers)
    for event, lowest in ((at("input")[0], "a"), (at("relu")[0], "b"), (at("a", side="sink"), "a")):
        conditionals = mu.conditional(event)
        assert list(conditionals) == names[names.index(lowest) :]
        for name, values in conditionals.items():
            assert torch.equal(values, mu.conditional(event, name))


def test_conditionals_on_all_neurons_above_an_event_take_one_pass():
    mu = RelevanceMeasure(net(), IMAGES, 1)
    event = at("2").channel(3) & ~at("0")[1]
    conditionals = mu.conditional(event)
    cost = mu.cost.steps
    assert list(conditionals) == [name for name in mu.layers if name not in ("input", "0", "1", "2")]
    mu.marginal(["input"])
    assert cost <= mu.cost.steps
    for name, values in conditionals.items():
        torch.testing.assert_close(values, mu.conditional(event, name))
        torch.testing.assert_close((values * mu.marginal(name)).flatten(1).sum(1), mu(event))
