"""Pixel maps against several references, compared with one measure for each of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Gamma
from zennit.types import Convolution

from nrm_plugin import Normalized, RelevanceMeasure
from nrm_plugin.errors import InputError
from nrm_plugin.measure import pixel_maps
from nrm_plugin.measure.pixel_maps import covered, focused, is_fine_grained, pixel_map


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)]
    return nn.Sequential(*layers).double().eval()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.rand(3, 3, 16, 16).double(), torch.full((3, 16, 16), 0.25).double()


def focused_by_hand(heat: torch.Tensor) -> torch.Tensor:
    """Weights from a matrix product with the Gaussian, whose borders are reflected."""

    def matrix(size: int, width: float, radius: int) -> torch.Tensor:
        rows = torch.zeros(size, size).double()
        distances = torch.arange(-radius, radius + 1)
        weights = torch.exp(-(distances.double() ** 2) / (2 * width**2))
        for place in range(size):
            for distance, weight in zip(distances.tolist(), (weights / weights.sum()).tolist(), strict=True):
                at_ = abs(place + distance)
                rows[place, 2 * (size - 1) - at_ if at_ >= size else at_] += weight
        return rows

    height, width = heat.shape
    deviation = 0.25 * min(height, width)
    radius = min(round(4 * deviation), min(height, width) - 1)
    smooth = matrix(height, deviation, radius) @ heat @ matrix(width, deviation, radius).T
    if float(smooth.max()) <= 0:
        return heat
    weights = (smooth.clamp(min=0) / smooth.max()) ** 3
    return torch.where(heat > 0, heat * weights, heat)


def test_the_map_is_the_weighted_mean_of_differences_from_covered_images():
    model, (inputs, ground), targets = net(), images(), [1, 0, 2]
    rules = Normalized(LayerMapComposite([(Convolution, Gamma(0.05)), (nn.Linear, Epsilon())]))
    found = pixel_map(model, inputs, targets, reference=ground)
    for place, target in enumerate(targets):
        image = inputs[place : place + 1]
        total = torch.zeros(16, 16).double()
        references = covered(image, ground[None])
        for reference in references:
            mu = RelevanceMeasure(model, image, target, reference=reference, composite=rules)
            difference = model(image)[0, target] - model(reference)[0, target]
            total += difference.detach() * mu.marginal("input")[0].sum(0)
        torch.testing.assert_close(total.sum(), sum(
            (model(image) - model(reference))[0, target].detach() for reference in references
        ))  # fmt: skip
        expected = focused_by_hand(total / total.sum().abs())
        torch.testing.assert_close(found[place], expected)
        assert bool((found[place] < 0).any())


def test_references_are_the_background_and_complementary_halves_of_the_image():
    torch.manual_seed(0)
    image, ground = torch.rand(2, 3, 20, 33), torch.full((2, 3, 20, 33), -1.0)
    references = covered(image, ground)
    assert len(references) == 9
    assert torch.equal(references[0], ground)
    shown = torch.stack([(one != ground).all(1) for one in references[1:]])
    for one, kept in zip(references[1:], shown, strict=True):
        assert torch.equal(one, torch.where(kept[:, None], image, ground))
    assert torch.equal(shown[:4], ~shown[4:])
    assert all(0.2 < float(one.double().mean()) < 0.8 for one in shown)
    for one in shown.reshape(16, 20, 33):  # squares of three pixels
        assert torch.equal(one, one[::3, ::3].repeat_interleave(3, 0).repeat_interleave(3, 1)[:20, :33])
    assert all(torch.equal(*pair) for pair in zip(references, covered(image, ground), strict=True))


def test_images_in_which_nothing_is_covered_are_no_references():
    ground = torch.zeros(1, 3, 14, 14)
    image = ground.clone()
    image[..., 0, 0] = 1.0
    assert len(covered(image, ground)) == 5  # either half of a pair covers the pixel


def test_positive_relevance_is_kept_where_relevance_is_densest():
    heat = torch.zeros(1, 28, 56)
    heat[:, 10:18, 10:18] = 1.0
    heat[:, 10:18, 38:46] = torch.eye(8) - 0.1  # mostly against
    found = focused(heat)
    assert float(found[:, 10:18, 10:18].mean()) > 0.5
    assert float(found[:, :, 28:].clamp(min=0).sum()) < 0.01 * float(heat[:, :, 28:].clamp(min=0).sum())
    assert torch.equal(found.clamp(max=0), heat.clamp(max=0))
    assert torch.equal(focused(-heat.abs()), -heat.abs())
    torch.testing.assert_close(focused(1e-3 * heat), 1e-3 * found)


@pytest.mark.medium
def test_one_class_for_all_images_and_a_tensor_of_classes():
    model, (inputs, ground) = net(), images()
    expected = pixel_map(model, inputs, [1, 1, 1], reference=ground)
    torch.testing.assert_close(pixel_map(model, inputs, 1, reference=ground.expand(3, 3, 16, 16)), expected)
    torch.testing.assert_close(pixel_map(model, inputs, torch.tensor([1, 1, 1]), reference=ground), expected)


def test_a_model_without_late_layers_has_a_pixel_map():
    torch.manual_seed(0)
    model, (inputs, ground) = nn.Sequential(nn.Flatten(), nn.Linear(768, 3)).double(), images()
    mu = RelevanceMeasure(model, inputs[:1], 1, reference=ground[None])
    contributions = (model[1].weight[1] * (inputs[0] - ground).flatten()).reshape(3, 16, 16).detach().sum(0)
    shown = torch.stack([(one != ground).all(1)[0] for one in covered(inputs[:1], ground[None])])
    expected = contributions * (len(shown) - shown.sum(0))  # a pixel contributes where it is covered
    torch.testing.assert_close(pixel_map(model, inputs[:1], 1, reference=ground)[0],
                               focused_by_hand(expected / expected.sum().abs()))  # fmt: skip
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
