"""Heat maps averaged over layers, against a loop over positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision import models
from torchvision.models import SwinTransformer, VisionTransformer

from nrm_plugin import NRMAbsolute, Plan, RelevanceMeasure
from nrm_plugin.errors import InputError
from nrm_plugin.measure.layer_averages import blurred, late_layers, layer_average, layer_map, layers_by_resolution


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
    between = share[:, 0, 0] * 0.625 + share[:, 0, 1] * 0.375  # pixel 3 is 1.5 of 4 pixels from the first center
    assert torch.allclose(heat[:, 0, 3], between)


def test_layers_without_positions_are_errors():
    with pytest.raises(InputError, match="has no spatial positions"):
        layer_average(measure(), ["8"])
    with pytest.raises(InputError, match="has no spatial positions"):
        layers_by_resolution(RelevanceMeasure(nn.Linear(3, 2), torch.rand(2, 3), target=0))


# -- the map of late layers -----------------------------------------------------------------------------------------


def deep_net():
    """Grids of 16, 8, 4 and 2 positions along each side."""
    torch.manual_seed(0)
    blocks = [layer for below, above in ((3, 4), (4, 5), (5, 6), (6, 7)) for layer in _block(below, above)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(28, 3)).double().eval()


def _block(below: int, above: int):
    return nn.Conv2d(below, above, 3, 2, 1), nn.ReLU(), nn.Conv2d(above, above, 3, padding=1), nn.ReLU()


def test_late_layers_are_on_the_two_coarsest_grids_of_at_least_four_positions():
    mu = RelevanceMeasure(deep_net(), torch.rand(2, 3, 32, 32, dtype=torch.float64), target=0)
    assert layers_by_resolution(mu) == ["15", "11", "7", "3", "input"]
    assert late_layers(mu) == ["11", "7"]
    assert late_layers(measure()) == []  # a single grid of at least 4 × 4


class Pooled(nn.Module):
    """Applies a function to the last features."""

    def __init__(self, pool) -> None:
        super().__init__()
        self.features, self.pool, self.head = deep_net()[:12], pool, nn.Linear(6, 3).double()

    def forward(self, x):
        return self.head(self.pool(self.features(x)).mean((2, 3)))


@pytest.mark.parametrize("is_compared", [False, True])
@pytest.mark.parametrize(
    "pool",
    [
        nn.MaxPool2d(2),
        nn.Sequential(nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(4), nn.Identity()),
        nn.Sequential(nn.MaxPool2d(2), nn.AdaptiveMaxPool2d(4), nn.Dropout()),
        lambda x: nn.functional.max_pool2d(x, 2),
        lambda x: nn.functional.avg_pool2d(x, 2)[:, :, :, :],
    ],
    ids=["max", "averages", "maxima", "max_pool2d", "avg_pool2d"],
)
def test_layers_that_only_pool_are_not_layers_of_their_own_grid(pool, is_compared):
    # features.11 has the grid 8 × 8, its pooling the grid 4 × 4
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    settings = {"reference": blurred(images)} if is_compared else {}
    mu = RelevanceMeasure(Pooled(pool).eval(), images, target=0, **settings)
    assert [mu.shape(name)[2] for name in late_layers(mu)] == [8, 16]
    assert layers_by_resolution(mu)[0] == late_layers(mu)[0] != "pool"


@pytest.mark.parametrize(
    "pool",
    [
        nn.Sequential(nn.MaxPool2d(2), nn.ReLU()),
        nn.Sequential(nn.MaxPool2d(2), nn.Conv2d(6, 6, 1).double(), nn.MaxPool2d(3, 1, 1)),
        lambda x: torch.cat([nn.functional.max_pool2d(x, 2), x[:, :, ::2, ::2] * 2], 1)[:, :6],
    ],
    ids=["ReLU", "a pooling with stride 1", "a branch"],
)
def test_layers_that_pool_and_compute_are_layers_of_their_own_grid(pool):
    mu = RelevanceMeasure(Pooled(pool).eval(), torch.rand(2, 3, 64, 64, dtype=torch.float64), target=0)
    last, _ = late_layers(mu)
    assert mu.shape(last)[2] == 4
    assert mu.layers[mu.layers.index(last) + 1] == "mean"


@pytest.mark.slow
@pytest.mark.parametrize("is_compared", [False, True])
@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("vgg16", ["features.29", "features.22"]),
        ("alexnet", ["features.11", "features.4"]),
        ("resnet18", ["layer4", "layer3"]),
        ("efficientnet_b0", ["features", "features.6.0.block.0"]),
        ("densenet121", ["relu", "features.transition3.conv"]),
    ],
)
def test_late_layers_of_networks_are_their_last_computations(name, layers, is_compared):
    model, images = models.get_model(name, weights=None).eval(), torch.rand(1, 3, 224, 224)
    settings = {"reference": blurred(images)} if is_compared else {}
    assert late_layers(RelevanceMeasure(model, images, target=0, **settings)) == layers


def test_the_map_of_late_layers_is_the_average_of_slopes_from_the_blurred_images():
    model, images = deep_net(), torch.rand(2, 3, 32, 32, dtype=torch.float64)
    mu = RelevanceMeasure(model, images, [0, 2], against="rest", reference=blurred(images))
    expected = layer_average(mu, ["11", "7"])
    torch.testing.assert_close(layer_map(model, images, [0, 2]), expected)
    # another comparison, another reference, and rules
    grey = torch.zeros_like(images)
    mu = RelevanceMeasure(model, images, [0, 2], against=1, reference=grey, composite=NRMAbsolute())
    found = layer_map(model, images, [0, 2], against=1, reference=grey, composite=NRMAbsolute())
    torch.testing.assert_close(found, layer_average(mu, ["11", "7"]))
    assert not torch.allclose(found, expected)


def test_images_are_blurred_by_a_gaussian_of_an_eighth_of_the_shorter_side():
    images = torch.rand(1, 2, 16, 24, dtype=torch.float64)
    weights = torch.exp(-0.5 * (torch.arange(-6.0, 7.0, dtype=torch.float64) / 2) ** 2)
    weights = weights / weights.sum()
    padded = nn.functional.pad(images, (6, 6, 6, 6), mode="reflect")
    rows = sum(weight * padded[:, :, number : number + 16] for number, weight in enumerate(weights))
    expected = sum(weight * rows[..., number : number + 24] for number, weight in enumerate(weights))
    torch.testing.assert_close(blurred(images), expected)


@pytest.mark.parametrize(
    "model",
    [
        VisionTransformer(32, 8, 1, 2, 8, 16, num_classes=3),
        nn.Sequential(nn.Flatten(), nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 3)),
    ],
    ids=["ViT", "MLP"],
)
def test_models_without_late_layers_are_errors(model):
    images = torch.rand(2, 3, 32, 32)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert late_layers(RelevanceMeasure(model.eval(), images, target=0)) == []
    with pytest.raises(InputError, match="a map of layers needs layers with positions"):
        layer_map(model, images, target=0)


@pytest.mark.recorded
def test_an_average_does_not_sum_masses_and_stops_at_the_lowest_layer():
    mu = RelevanceMeasure(deep_net(), torch.rand(2, 3, 32, 32, dtype=torch.float64), target=0)
    whole = mu.marginal(["11", "7"])
    steps = mu.cost.steps
    with mu._without_sums():
        part = mu.marginal(["11", "7"])
    assert 0 < mu.cost.steps < steps
    for name in whole:
        torch.testing.assert_close(part[name], whole[name])
    late = RelevanceMeasure(deep_net(), torch.rand(2, 3, 32, 32, dtype=torch.float64), target=0)
    layer_average(late, ["11", "7"])
    assert late._totals_once is None
    total = late.marginal("input").sum((1, 2, 3)) + late.sink("input")
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


@pytest.mark.medium
def test_channels_may_be_the_last_dimension():
    # the attention of Swin has the shape (N, heads, tokens, tokens), which is no grid
    model = SwinTransformer([4, 4], 8, [1, 1], [2, 2], [2, 2], num_classes=3).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    mu = RelevanceMeasure(model, torch.rand(2, 3, 32, 64, dtype=torch.float64), target=0)
    assert late_layers(mu) == ["norm", "features.2.pad"]
    assert mu.shape("features.2.pad") == (2, 8, 16, 8)
    relevance = mu.marginal("features.2.pad").sum(3)
    share = relevance / relevance.abs().sum((1, 2), keepdim=True)
    heat = layer_average(mu, ["features.2.pad"])
    assert heat.shape == (2, 32, 64)
    torch.testing.assert_close(heat[:, 0, 0], share[:, 0, 0] / 16)
    torch.testing.assert_close(heat[:, -1, -1], share[:, -1, -1] / 16)


def test_the_average_of_a_planned_measure_runs_its_program():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)]
    model, images = nn.Sequential(*layers).double().eval(), torch.rand(4, 1, 3, 16, 16).double()
    plan = Plan(model, images[0])
    for image in images:
        mu = plan(image, 1, reference=blurred(image))
        expected = layer_average(RelevanceMeasure(model, image, 1, reference=blurred(image)), ["3", "1"])
        torch.testing.assert_close(layer_average(mu, ["3", "1"]), expected)
    assert mu._recorded is None
    assert "marginal" in plan.explain()
