"""pytorch-grad-cam together with this package: `make test-hosts`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import LayerNRM, RelevanceMeasure
from tests.conftest import untouched

cam = pytest.importorskip("pytorch_grad_cam", reason="pytorch-grad-cam is not installed; `make test-hosts` installs it")

from pytorch_grad_cam.utils.image import show_cam_on_image  # noqa: E402
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget  # noqa: E402


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(80, 6)]
    return nn.Sequential(*layers).eval()


@pytest.fixture
def x():
    return torch.randn((2, 3, 8, 8), generator=torch.Generator().manual_seed(1))


def test_a_cam_and_a_measure_of_the_same_model_do_not_interfere(net, x):
    expected = RelevanceMeasure(net, x, 1).marginal("2")
    with cam.GradCAM(model=net, target_layers=[net[2]]) as explainer:
        before = explainer(input_tensor=x, targets=[ClassifierOutputTarget(1)] * 2)
        torch.testing.assert_close(RelevanceMeasure(net, x, 1).marginal("2"), expected)
        after = explainer(input_tensor=x, targets=[ClassifierOutputTarget(1)] * 2)
    np.testing.assert_array_equal(before, after)
    net.zero_grad()
    with untouched(net, x):
        torch.testing.assert_close(RelevanceMeasure(net, x, 1).marginal("2"), expected)


def test_its_overlays_can_be_plotted_from_our_heat_maps(net, x):
    relevance = LayerNRM(net, net[2]).attribute(x, 1).sum(1, keepdim=True)
    mask = LayerNRM.interpolate(relevance, (8, 8))[0, 0].clamp(min=0)
    overlay = show_cam_on_image(np.zeros((8, 8, 3), np.float32), (mask / mask.max()).numpy(), use_rgb=True)
    assert overlay.shape == (8, 8, 3)
    assert overlay.dtype == np.uint8
    assert overlay.std() > 0


def test_our_relevance_can_weight_the_channels_of_a_cam(net, x):
    """A subclass of its base class, whose channel weights are the masses of the channels."""

    class RelevanceCAM(cam.base_cam.BaseCAM):
        def get_cam_weights(self, input_tensor, target_layer, targets, activations, grads):
            mu = RelevanceMeasure(net, input_tensor.detach(), [target.category for target in targets])
            return mu.marginal("2", over="channel").numpy()

    with RelevanceCAM(net, [net[2]]) as explainer:
        heat_maps = explainer(input_tensor=x, targets=[ClassifierOutputTarget(1)] * 2)
    mass = RelevanceMeasure(net, x, 1).marginal("2", over="channel")
    raw = (mass[:, :, None, None] * net[:3](x)).sum(1).clamp(min=0)
    expected = (raw - raw.amin((1, 2), True)) / (raw.amax((1, 2), True) - raw.amin((1, 2), True) + 1e-7)
    assert heat_maps.shape == (2, 8, 8)
    reduced = nn.functional.interpolate(torch.as_tensor(heat_maps).unsqueeze(1), (4, 4), mode="area")
    assert np.corrcoef(reduced.ravel(), expected.detach().ravel())[0, 1] > 0.8
