"""Steering against the shifted activations written out, and the unchanged model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, at, steered
from nrm_plugin.errors import InputError, UnknownLayerError
from tests.conftest import untouched
from tests.feature_nets import Decoder


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


X = torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).double()
IDS = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(2))


def test_a_vector_is_added(net):
    vector = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    hidden = torch.tanh(net[0](X))
    with steered(net, "1", vector, scale=0.3) as model:
        torch.testing.assert_close(model(X), net[2](hidden + 0.3 * vector))
    each = torch.randn(5, 4).double()
    with steered(net, "1", each):
        torch.testing.assert_close(net(X), net[2](hidden + each))


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_a_direction_is_removed_at_every_token(scale):
    net = Decoder().double().eval()
    vector, seen = torch.randn(8).double(), []
    plain = net.blocks[0](net.embed(IDS) + net.place[:5]).detach()
    handle = net.blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with steered(net, "blocks.0", vector, scale, mode="remove"):
        net(IDS)
    handle.remove()
    for n in range(2):
        for t in range(5):
            a = plain[n, t]
            torch.testing.assert_close(seen[0][n, t], a - scale * float(a @ vector) / float(vector @ vector) * vector)
    if scale == 1:
        torch.testing.assert_close(seen[0] @ vector, torch.zeros(2, 5).double(), rtol=0, atol=1e-12)


def test_a_map_is_removed_from_each_sample(net):
    maps = torch.randn(5, 4).double()
    hidden = torch.tanh(net[0](X)).detach()
    maps[2] = 0  # has no direction
    with steered(net, "1", maps, mode="remove"):
        found = net(X)
    for n in range(5):
        share = float(hidden[n] @ maps[n]) / (float(maps[n] @ maps[n]) or 1.0)
        torch.testing.assert_close(found[n], net[2](hidden[n] - share * maps[n]))


def test_channels_of_images_are_in_dimension_one():
    conv = nn.Conv2d(1, 3, 3).double()
    x, vector = torch.randn(2, 1, 5, 5).double(), torch.randn(3).double()
    plain = conv(x)
    with steered(nn.Sequential(conv), "0", vector, dim=1) as model:
        torch.testing.assert_close(model(x), plain + vector.view(3, 1, 1))


def test_rows_of_a_conditional_move_the_output_towards_the_event(net):
    """Removing the neurons on which an event depends changes the output; a measure of the steered model sees it."""
    mu = RelevanceMeasure(net, X, 1)
    rows = mu.conditional(at("input")[0], "1")
    with steered(net, "1", rows.mean(0), scale=2.0):
        steered_output = net(X)
        measure = RelevanceMeasure(net, X, 1)
    torch.testing.assert_close(measure.outputs, steered_output)
    assert float((steered_output - net(X)).detach().abs().max()) > 1e-3


def test_no_trace_is_left(net):
    with untouched(net, X):
        with pytest.raises(ZeroDivisionError), steered(net, "1", torch.ones(4).double()):
            1 / 0  # noqa: B018
        with pytest.raises(InputError), steered(net, "1", torch.ones(7).double()):
            net(X)
    assert not net[1]._forward_hooks


def test_layers_that_return_tuples():
    class Pair(nn.Module):
        def forward(self, x):
            return x + 1, "state"

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            values, state = self.pair(x)
            assert state == "state"
            return values

    with steered(Around(), "pair", torch.ones(3).double()) as model:
        torch.testing.assert_close(model(X), X + 2)


def test_invalid_arguments_raise(net):
    one = torch.ones(4).double()
    for arguments, error, message in [
        ((net, "9", one), UnknownLayerError, "no layer named '9' to steer"),
        ((net, "1", one, 1.0, "drop"), InputError, "mode='drop' is unknown"),
        ((net, "1", one / 0), InputError, "finite floating-point tensor"),
        ((net, "1", one * 0, 1.0, "remove"), InputError, "no direction to remove"),
    ]:
        with pytest.raises(error, match=message), steered(*arguments):
            pass
    with pytest.raises(InputError, match="the vector has 3 channels"), steered(net, "1", one[:3]):
        net(X)
    with pytest.raises(InputError, match="does not broadcast"), steered(net, "1", torch.ones(2, 4).double()):
        net(X)
