"""Estimates of joint relevance from marginals, in networks in which they are exact."""

from __future__ import annotations

import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, patches
from nrm_plugin.measure.joint_sketches import _of_one_layer
from nrm_plugin.measure.local_joints import at_positions, local_joint


def test_channels_of_layers_of_one_channel_each_are_estimated_exactly():
    net = nn.Sequential(nn.Conv2d(1, 6, 1, bias=False), nn.ReLU(), nn.Conv2d(6, 1, 1, bias=False), nn.Flatten())
    net = nn.Sequential(*net, nn.Linear(25, 2, bias=False)).double()
    mu = RelevanceMeasure(net, torch.rand(2, 1, 5, 5, dtype=torch.double) + 0.1, 1)
    upper, lower = mu._tap("2"), mu._tap("0")
    found = local_joint(upper, lower, mu.marginal("2"), mu.marginal("0"))
    assert torch.allclose(found, mu.joint("2", "0"), atol=1e-12)


def test_layers_without_common_positions_have_no_estimate():
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(18, 4), nn.ReLU(), nn.Linear(4, 2))
    mu = RelevanceMeasure(net, torch.rand(1, 1, 5, 5), 1)
    assert local_joint(mu._tap("3"), mu._tap("0"), mu.marginal("3"), mu.marginal("0")) is None


def test_a_position_belongs_to_the_part_of_its_central_pixel():
    net = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 2))
    mu = RelevanceMeasure(net, torch.rand(1, 3, 6, 6), 1)
    found = at_positions(mu._tap("input"), patches((6, 6), 3), mu._tap("0"))
    assert found is not None
    assert found.tolist() == [torch.arange(9).reshape(3, 3).tolist()] * 2
    assert at_positions(mu._tap("input"), "channel", mu._tap("0")) is None


def test_pairs_of_groups_of_one_layer_share_their_neurons():
    relevance = torch.rand(2, 3, 4, dtype=torch.double)
    above, below = torch.arange(3)[:, None].expand(3, 4) // 2, torch.arange(4).expand(3, 4) // 2
    found = _of_one_layer(relevance, above, below)
    for a in range(2):
        for b in range(2):
            mask = (above == a) & (below == b)
            assert torch.allclose(found[:, a, b], (relevance * mask).sum((1, 2)))
