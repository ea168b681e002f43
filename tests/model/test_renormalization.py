"""Embeddings with ``max_norm`` have the measure of a table that is renormalized already, and keep their weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonPlus

from nrm_plugin import LayerNRM, Normalized, NRMAttributor, RelevanceMeasure
from nrm_plugin.errors import ModelStateError

IDS = torch.tensor([[0, 3, 1, 10], [7, 7, 2, 5], [9, 0, 4, 4]])


class Words(nn.Module):
    """A mean of embeddings."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **options: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.e, self.b, self.function = nn.Embedding(12, 6, **options), nn.Linear(6, 2), function
        self.bag = nn.EmbeddingBag.from_pretrained(self.e.weight.detach().clone(), mode="mean", **options)

    def forward(self, ids: Tensor) -> Tensor:
        return self.b(self.function(self, ids))


def looked_up(net: nn.Module, ids: Tensor) -> Tensor:
    return net.e(ids).mean(1)


FORMS: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], dict[str, float]]] = {
    "layer": (looked_up, {"max_norm": 0.5}),
    "another norm": (looked_up, {"max_norm": 0.5, "norm_type": 1.0}),
    "keyword": (lambda net, ids: F.embedding(ids, net.e.weight, max_norm=0.5).mean(1), {}),
    "position": (lambda net, ids: F.embedding(ids, net.e.weight, None, 0.5).mean(1), {}),
    "all by keyword": (lambda net, ids: F.embedding(input=ids, weight=net.e.weight, max_norm=0.5).mean(1), {}),
    "twice": (lambda net, ids: (net.e(ids) * 0.5).mean(1) + (net.e(ids) * 0.5).mean(1), {"max_norm": 0.5}),
    "with runs of single samples": (lambda net, ids: net.e(ids).mean(1) * (1 + (ids < 0).sum()), {"max_norm": 0.5}),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_measure_is_that_of_a_renormalized_table(form):
    function, options = FORMS[form]
    net, twin = Words(function, **options).eval(), Words(looked_up).eval()
    before = net.e.weight.detach().clone()
    mu = RelevanceMeasure(net, IDS, 1)
    assert torch.equal(net.e.weight, before)
    twin.e.weight.data = torch.renorm(before, options.get("norm_type", 2.0), 0, 0.5)
    layers = ["e:0", "e:1"] if form == "twice" else mu.layers[:1]
    expected = RelevanceMeasure(twin, IDS, 1).marginal("e")
    torch.testing.assert_close(sum(mu.marginal(layer) for layer in layers), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mu.outputs, twin(IDS))


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_keep_their_weights(mode):
    net = Words(lambda net, ids: net.bag(ids), max_norm=0.5).eval()
    net.bag.mode = mode
    before = net.bag.weight.detach().clone()
    outputs = RelevanceMeasure(net, IDS, 1).outputs
    assert torch.equal(net.bag.weight, before)
    torch.testing.assert_close(outputs, net(IDS))


def by_layer(net: nn.Module) -> None:
    LayerNRM(net, "e").attribute(IDS, 1)


def by_attributor(net: nn.Module) -> None:
    with NRMAttributor(net) as attributor:
        attributor(IDS, torch.eye(2)[[1, 1, 1]])


def by_context(net: nn.Module) -> None:
    with Normalized(EpsilonPlus()).context(net) as hooked:
        hooked(IDS)


@pytest.mark.parametrize("entry", [by_layer, by_attributor, by_context])
def test_every_entry_point_keeps_the_weights(entry):
    net = Words(looked_up, max_norm=0.5).eval()
    before = net.e.weight.detach().clone()
    entry(net)
    assert torch.equal(net.e.weight, before)


def by_head(net: nn.Module, ids: Tensor) -> Tensor:
    return net.head(net.e(ids)).mean(1)[:, :6]


AGAIN: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "look-up without it": lambda net, ids: net.e(ids).mean(1) + F.embedding(ids, net.e.weight).mean(1),
    "product": lambda net, ids: (net.e(ids).mean(1) @ net.e.weight.T)[:, :6],
    "part": lambda net, ids: net.e(ids).mean(1) * net.e.weight[0],
    "layer of the same weight": by_head,
}


@pytest.mark.parametrize("form", AGAIN)
def test_a_table_with_another_use_raises_until_it_is_renormalized(form):
    net = Words(AGAIN[form], max_norm=0.5).eval()
    net.head = nn.Linear(6, 12)
    net.head.weight = net.e.weight
    before = net.e.weight.detach().clone()
    with pytest.raises(ModelStateError, match="max_norm"):
        RelevanceMeasure(net, IDS, 1)
    assert torch.equal(net.e.weight, before)
    outputs = net(IDS)
    torch.testing.assert_close(RelevanceMeasure(net, IDS, 1).outputs, outputs)


def test_the_shape_of_a_table_is_no_other_use():
    net = Words(lambda net, ids: net.e(ids).mean(1) * net.e.weight.shape[1], max_norm=0.5).eval()
    assert RelevanceMeasure(net, IDS, 1).batch == 3
