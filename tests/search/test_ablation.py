"""Ablation against a network with an inserted module, and activations."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from nrm_plugin import ablation, activations
from nrm_plugin.demo import load_digits, load_model
from nrm_plugin.errors import InputError, UnknownLayerError


def with_replacement(model, layer, mask, value):
    """The same network with a module that replaces activations after a layer."""
    net = copy.deepcopy(model)
    index = int(layer.split(".")[1])
    shaped = mask[:, :, None, None]

    class Replace(nn.Module):
        def forward(self, x):
            return shaped * x + ~shaped * value

    net.features = nn.Sequential(*net.features[: index + 1], Replace(), *net.features[index + 1 :])
    return net


@pytest.mark.parametrize("fill", ["zero", "mean", "resample"])
def test_ablation_equals_a_network_with_an_inserted_module(fill):
    images, _ = load_digits()
    model, images, others = load_model(), images[:4], images[10:13]
    mask = torch.rand(4, 64) < 0.5
    reference = activations(model, others, ["features.12"])
    same = model.features[:13](others)
    torch.testing.assert_close(reference["features.12"], same.detach())
    value = {"zero": torch.zeros(()), "mean": same.mean(0), "resample": same[[0, 1, 2, 0]]}[fill]
    expected = with_replacement(model, "features.12", mask, value)(images)
    with ablation(model, {"features.12": mask}, fill, reference):
        output = model(images)
    torch.testing.assert_close(output, expected)
    assert not torch.allclose(output, model(images))
    assert not model.features[12]._forward_hooks


def test_hooks_are_removed_when_the_model_raises():
    model = load_model()
    with pytest.raises(RuntimeError), ablation(model, {"features.12": torch.ones(5, dtype=torch.bool)}):
        model(load_digits()[0][:2])
    assert not model.features[12]._forward_hooks


@pytest.mark.parametrize(("fill", "message"), [("mean", "reference"), ("noise", "unknown")])
def test_invalid_fills_raise(fill, message):
    mask = torch.ones(16, dtype=torch.bool)
    with pytest.raises(ValueError, match=message), ablation(load_model(), {"features.2": mask}, fill):
        pass


def test_modules_without_activations_raise():
    net = nn.ModuleDict({"used": nn.Linear(3, 2), "unused": nn.Linear(3, 2)})
    net.forward = net["used"].forward
    x = torch.rand(1, 3)
    with pytest.raises(UnknownLayerError, match="'other'"):
        activations(net, x, ["other"])
    with pytest.raises(InputError, match="was not called"):
        activations(net, x, ["unused"])
    with pytest.raises(InputError, match="does not return a tensor"):
        activations(nn.LSTM(3, 2), x, [""])
