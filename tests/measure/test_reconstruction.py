"""Reconstructions compared with a deconvolution written out, and receptive fields with their formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from nrm_plugin import at, reconstruct
from nrm_plugin.demo import load_digits, load_model
from nrm_plugin.errors import EventError
from nrm_plugin.measure.reconstruction import receptive_fields


def by_hand(model, image, keep, method):
    """Zeiler and Fergus: unpool with switches, rectify, convolve with flipped kernels; ``keep`` masks layers."""
    stack, value = [], image
    for number, layer in enumerate(model.features[:9]):
        before = value
        if isinstance(layer, nn.MaxPool2d):
            value, switches = functional.max_pool2d(value, 2, return_indices=True)
            stack.append((number, "pool", switches, before.shape))
        elif isinstance(layer, nn.ReLU):
            value = torch.relu(value)
            stack.append((number, "relu", before, None))
        else:
            value = functional.conv2d(value, layer.weight, layer.bias, padding=1)
            stack.append((number, "conv", layer.weight, None))
    signal = torch.zeros_like(value)
    last, first = max(keep), value.clamp(min=0) * keep[max(keep)]
    signal.view(-1)[first.flatten().argmax()] = first.max()
    for number, kind, item, shape in reversed(stack):
        if number in keep and number != last:
            signal = signal * keep[number]
        if kind == "pool":
            signal = functional.max_unpool2d(signal, item, 2, output_size=shape[2:])
        elif kind == "relu":
            signal = signal.clamp(min=0) * (item > 0 if method == "guided_backprop" else 1)
        else:
            signal = functional.conv_transpose2d(signal, item, padding=1)
    return signal


@pytest.mark.parametrize("method", ["deconvnet", "guided_backprop"])
@pytest.mark.parametrize("through", [None, [3, 7, 9]])
def test_reconstructions_equal_a_deconvolution_written_out(method, through):
    model, images = load_model(), load_digits()[0][:3]
    event = at("features.8").channel(5)
    keep = {8: torch.zeros(1, 32, 1, 1)}
    keep[8][:, 5] = 1
    if through:
        event = event & at("features.3").channel(through)
        keep[3] = torch.zeros(1, 16, 1, 1)
        keep[3][:, through] = 1
    reconstruction = reconstruct(model, images, event, method)
    for n in range(3):
        expected = by_hand(model, images[n : n + 1], keep, method)
        torch.testing.assert_close(reconstruction.images[n : n + 1], expected.detach(), atol=1e-5, rtol=1e-4)
    assert float(reconstruction.images.abs().max()) > 0


def test_methods_and_walks_give_different_images():
    model, images = load_model(), load_digits()[0][:2]
    top = at("features.8").channel(5)
    images_of_methods = [
        reconstruct(model, images, top).images,
        reconstruct(model, images, top, "guided_backprop").images,
        reconstruct(model, images, top & at("features.3").channel(3)).images,
        reconstruct(model, images, top, strongest=False).images,
    ]
    for number, one in enumerate(images_of_methods):
        assert all(not torch.allclose(one, other) for other in images_of_methods[:number])


@pytest.mark.parametrize("position", [(0, 0), (4, 3), (7, 7)])
def test_receptive_fields_equal_their_formula(position):
    """Two convolutions of 3×3, a pooling of 2×2, two more convolutions: 14 pixels around twice the position."""
    model, images = load_model(), load_digits()[0][:2]
    mask = torch.zeros(2, 32, 8, 8, dtype=torch.bool)
    mask[:, 2, position[0], position[1]] = True
    ends = [(max(0, 2 * p - 6), min(16, 2 * p + 8)) for p in position]
    expected = (ends[0][0], ends[1][0], ends[0][1], ends[1][1])
    assert receptive_fields(model, images, "features.8", mask) == [expected] * 2


def test_images_are_zero_outside_of_the_receptive_field():
    model, images = load_model(), load_digits()[0][:4]
    reconstruction = reconstruct(model, images, at("features.6").channel(4))
    for image, crop, (top, left, bottom, right) in zip(
        reconstruction.images, reconstruction.crops, reconstruction.boxes, strict=True
    ):
        assert crop.shape == (1, bottom - top, right - left)
        assert float(crop.abs().sum()) == pytest.approx(float(image.abs().sum()))
        assert bottom - top <= 10
        assert right - left <= 10


def test_the_former_name_of_the_images_warns():
    reconstruction = reconstruct(load_model(), load_digits()[0][:1], at("features.6").channel(4))
    with pytest.warns(
        DeprecationWarning, match=r"Reconstruction\.pictures is deprecated .* Use Reconstruction\.images"
    ):
        assert reconstruction.pictures is reconstruction.images


def test_no_neuron_has_an_empty_receptive_field():
    model, images = load_model(), load_digits()[0][:1]
    assert receptive_fields(model, images, "features.6", torch.zeros(1, 32, 8, 8, dtype=torch.bool)) == [(0, 0, 0, 0)]


def test_the_model_is_unchanged():
    model, images = load_model(), load_digits()[0][:2]
    before = copy.deepcopy(model.state_dict())
    output = model(images)
    reconstruct(model, images, at("features.8").channel(5) & at("features.1").channel(0))
    assert torch.equal(model(images), output)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (at("features.8") | at("features.3"), EventError),
        (~at("features.8").channel(1), EventError),
        (at("features.8", side="sink"), EventError),
        (at("features.8").channel(1) & at("features.8").channel(2), EventError),
    ],
)
def test_events_that_are_not_walks_raise(event, kind):
    with pytest.raises(kind):
        reconstruct(load_model(), load_digits()[0][:1], event)


def test_an_unknown_method_raises():
    with pytest.raises(ValueError, match="unknown"):
        reconstruct(load_model(), load_digits()[0][:1], at("features.8").channel(1), "gradcam")
