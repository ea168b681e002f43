"""Batch norms in the forward pass of a plan."""

import copy

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlusFlat

from nrm_plugin import NRMDefault, Plan


def deep_net() -> nn.Module:
    """Many new batch norms, each of which changes weights by a few units of rounding: ``1 / sqrt(1 + eps)``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for number in range(30):
        layers += [nn.Conv2d(3 if number == 0 else 8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
        nn.init.dirac_(layers[-3].weight)
        layers[-3].weight.data += 0.05 * torch.randn_like(layers[-3].weight)
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 36, 3)).eval()


def drawn(seed: int) -> Tensor:
    return torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.medium
@pytest.mark.parametrize("composite", [EpsilonPlusFlat, NRMDefault])
def test_outputs_of_a_deep_plan_are_as_exact_as_those_of_the_model(composite):
    net = deep_net()
    exact = copy.deepcopy(net).double()
    plan = Plan(net, drawn(0), composite=composite())
    for seed in range(4):
        measure = plan(drawn(seed), 1)
        measure.marginal("0")
        expected = exact(drawn(seed).double()).detach()
        error = float((measure.outputs - expected).norm() / expected.norm())
        assert error <= 1e-5, "30 batch norms left out change the outputs by 1.5e-4"
    assert all(len(programs) and not programs.reason_not_replayable for programs in plan._forms.values())
