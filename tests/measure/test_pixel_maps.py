"""Pixel maps restricted to positions of a late layer, compared with a sum over these positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import InputError
from nrm_plugin.measure import pixel_maps
from nrm_plugin.measure.pixel_maps import is_fine_grained, pixel_map


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)]
    return nn.Sequential(*layers).double().eval()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(3, 3, 16, 16).double(), torch.full((3, 16, 16), 0.25).double()


def test_the_map_is_the_sum_over_positions_with_evidence():
    model, (inputs, ground), targets = net(), images(), [1, 0, 2]
    found = pixel_map(model, inputs, targets, reference=ground)
    for place, target in enumerate(targets):
        image = inputs[place : place + 1]
        contrast = RelevanceMeasure(model, image, target, against="rest", reference=ground[None])
        alone = RelevanceMeasure(model, image, target, reference=ground[None])
        evidence = float(contrast.sign) * contrast.marginal("3")[0].sum(0)
        assert bool((evidence > 0).any())
        assert bool(((evidence > 0) & (evidence < evidence.max() / 4)).any())
        assert bool((evidence < 0).any())
        expected = torch.zeros(16, 16).double()
        for row in range(4):
            for column in range(4):
                if float(evidence[row, column]) > float(evidence.max()) / 4:
                    expected += alone.marginal("input", joint=at("3")[:, row, column])[0].sum(0) * float(alone.sign)
        torch.testing.assert_close(found[place], expected)


@pytest.mark.medium
def test_one_class_for_all_images_and_a_tensor_of_classes():
    model, (inputs, ground) = net(), images()
    expected = pixel_map(model, inputs, [1, 1, 1], reference=ground)
    torch.testing.assert_close(pixel_map(model, inputs, 1, reference=ground.expand(3, 3, 16, 16)), expected)
    torch.testing.assert_close(pixel_map(model, inputs, torch.tensor([1, 1, 1]), reference=ground), expected)


def test_pixels_of_a_model_without_late_layers_are_all_pixels():
    torch.manual_seed(0)
    model, (inputs, ground) = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double(), images()
    mu = RelevanceMeasure(model, inputs[:1], 1, reference=ground[None])
    found = pixel_map(model, inputs[:1], 1, reference=ground)
    torch.testing.assert_close(found, float(mu.sign) * mu.marginal("input").sum(1))
    assert is_fine_grained(mu)


def test_pixels_are_fine_grained_if_little_cancels_below_late_layers(monkeypatch):
    model, (inputs, ground) = net(), images()
    mu = RelevanceMeasure(model, inputs[:1], 1, reference=ground[None])
    late = max(float(mu.marginal(name).abs().sum()) for name in ("3", "1"))
    ratio = float(mu.marginal("input").abs().sum()) / late
    monkeypatch.setattr(pixel_maps, "CANCELS", 1.01 * ratio)
    assert is_fine_grained(mu)
    monkeypatch.setattr(pixel_maps, "CANCELS", 0.99 * ratio)
    assert not is_fine_grained(mu)


def test_inputs_must_be_images():
    with pytest.raises(InputError, match="expected images"):
        pixel_map(net(), torch.rand(3, 8), 1, reference=torch.zeros(8))
