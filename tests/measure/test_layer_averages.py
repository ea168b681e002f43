"""Heat maps averaged over layers, against a loop over positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import NRMAbsolute, RelevanceMeasure
from nrm_plugin.errors import InputError
from nrm_plugin.measure.layer_averages import layer_average, layers_by_resolution


class Skip(nn.Module):
    """A convolution beside a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return x + self.conv(x)


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), Skip(), nn.ReLU(), nn.ZeroPad2d(1),
        nn.Conv2d(4, 6, 4, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3),
    ).double()  # fmt: skip


def measure(**settings):
    images = torch.rand(2, 3, 8, 8, dtype=torch.float64)
    return RelevanceMeasure(net(), images, target=[0, 2], **settings)


def test_each_resolution_has_its_last_layer_that_no_walk_bypasses():
    # 7 has the grid 2 × 2, 4 the grid 4 × 4 after the skip connection; the padded map of 5 has 6 × 6
    assert layers_by_resolution(measure()) == ["7", "4", "input"]


@pytest.mark.parametrize("settings", [{}, {"against": "rest"}, {"composite": NRMAbsolute(), "against": "rest"}])
def test_the_map_of_one_layer_has_the_sum_of_its_share(settings):
    mu = measure(**settings)
    for layer in ("7", "4", "input"):
        heat = layer_average(mu, [layer])
        relevance = mu.marginal(layer).sum(1) * mu.sign.reshape(-1, 1, 1)
        share = relevance / relevance.abs().sum((1, 2), keepdim=True)
        # bilinear interpolation keeps the sum over the image
        assert torch.allclose(heat.sum((1, 2)), share.sum((1, 2)))
        if layer == "input":
            assert torch.allclose(heat, share)


def test_the_mean_is_over_layers():
    mu = measure(against="rest")
    layers = layers_by_resolution(mu)
    each = torch.stack([layer_average(mu, [layer]) for layer in layers])
    assert torch.allclose(layer_average(mu), each.mean(0))
    assert not torch.allclose(layer_average(mu), each[-1])


def test_interpolation_is_bilinear_between_the_centres_of_cells():
    mu = measure()
    heat = layer_average(mu, ["7"])
    relevance = mu.marginal("7").sum(1) * mu.sign.reshape(-1, 1, 1)
    share = relevance / relevance.abs().sum((1, 2), keepdim=True) / 16
    assert torch.allclose(heat[:, 0, 0], share[:, 0, 0])
    between = share[:, 0, 0] * 0.625 + share[:, 0, 1] * 0.375  # pixel 3 is 1.5 of 4 pixels from the first centre
    assert torch.allclose(heat[:, 0, 3], between)


def test_layers_without_positions_are_errors():
    with pytest.raises(InputError, match="has no spatial positions"):
        layer_average(measure(), ["8"])
    with pytest.raises(InputError, match="has no spatial positions"):
        layers_by_resolution(RelevanceMeasure(nn.Linear(3, 2), torch.rand(2, 3), target=0))
