"""Copies of models with replaced layers call the copy, also if ``forward`` was replaced for a single module."""

from __future__ import annotations

import functools
import types

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure
from nrm_plugin.model.replaced_layers import with_replaced
from nrm_plugin.search.dictionaries import Dictionary
from nrm_plugin.search.features import with_features


def made() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.ReLU()), nn.Linear(6, 3)).eval()


def hooked(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.before(x.clone())


def by_method(module: nn.Module) -> None:
    module.forward = types.MethodType(type(module).forward, module)


def by_partial(module: nn.Module) -> None:
    """As in Accelerate, which keeps the former method as an attribute."""
    module.before = module.forward
    module.forward = functools.update_wrapper(functools.partial(hooked, module), module.before)


def by_closure(module: nn.Module) -> None:
    module.forward = lambda x: type(module).forward(module, x.clone())


def by_closure_of_method(module: nn.Module) -> None:
    before = module.forward
    module.forward = lambda x: before(x.clone())


WAYS = [by_method, by_partial, by_closure, by_closure_of_method]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_replaced_forward_belongs_to_the_copy(way, everywhere):
    model, x = made(), torch.randn(2, 4)
    before = model(x)
    for module in model.modules() if everywhere else [model]:
        way(module)
    copied = with_replaced(model, {"0.0": lambda layer: nn.Sequential(layer, nn.Hardtanh(-0.01, 0.01))}, "bounds")
    assert (copied(x) - before).abs().max() > 0.01
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)  # the model itself still calls its own layers


@pytest.mark.parametrize("way", WAYS)
def test_features_of_a_model_with_a_replaced_forward(way):
    dictionary, x = Dictionary(torch.rand(6, 8), torch.rand(8, 6)), torch.randn(2, 4)
    model = made()
    expected = RelevanceMeasure(with_features(model, {"0.0": dictionary}), x, 1).marginal("0.0.features")
    for module in model.modules():
        way(module)
    mu = RelevanceMeasure(with_features(model, {"0.0": dictionary}), x, 1)
    torch.testing.assert_close(mu.marginal("0.0.features"), expected, rtol=0, atol=1e-6)
