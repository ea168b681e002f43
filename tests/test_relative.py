"""The relative rule: its formula as matrices, its measure as a sum over walks, and its numerical stability."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from zennit.composites import COMPOSITES, LayerMapComposite
from zennit.layer import Sum
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

from nrm_plugin import ABSORBED, NRM, Absolute, Normalized, NRMRelative, Relative, RelevanceMeasure, at
from nrm_plugin.errors import NullEventError
from tests.conftest import images, lrp_0, torchvision_net, untouched
from tests.nets import tiny_net
from tests.oracles import contributions, dense, enumerate_walks, shares

CHAINS = ["chain_mlp", "conv_chain", "conv1d_chain"]


@dataclass(frozen=True)
class Contributions:
    """``factor a_i w_ij``; by default with the factor of the rule, ``Σ|z| / Σz²``."""

    factor: float | None = None

    def __call__(self, module, a):
        W, _ = dense(module, a, zero_params="bias" if getattr(module, "bias", None) is not None else None)
        part = contributions(a, W)
        z = part.sum(0)
        factor = np.abs(z).sum() / max((z**2).sum(), 1e-300) if self.factor is None else self.factor
        return factor * part


class Shares:
    """``|a_i w_ij| / Σ_i |a_i w_ij|``, of a sum of two branches."""

    def __call__(self, module, a):
        W, _ = dense(module, a)
        part = np.abs(contributions(a, W))
        return shares(part, part.sum(0), 1e-300)


def rules_of(case, rule):
    kinds = {"linear": rule, "avgpool": rule, "sum": Shares()}
    return {node.tap: kinds[node.kind] for node in case.spec if node.kind in kinds}


def measured(case):
    return RelevanceMeasure(case.net, case.x, start=case.start, composite=NRMRelative())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", [*CHAINS, "skip", "fork"])
def test_its_measure_is_the_sum_over_walks_and_the_one_given_survival(name, seed):
    case = tiny_net(name, seed=seed)
    mu = measured(case)
    taps = [node.tap for node in case.spec if node.tap in mu.layers]
    plain = mu.marginal(taps)
    dead = mu(~ABSORBED) == 0
    if bool(dead.any()):  # all outputs of a layer are zero
        with pytest.raises(NullEventError):
            mu.marginal(taps, given=~ABSORBED, min_ratio=0)
    given = None if bool(dead.any()) else mu.marginal(taps, given=~ABSORBED, min_ratio=0)
    near = 1e-8 if name in CHAINS else 1e-5  # where branches join, Absolute stands in for zeros by a floor of 1e-6
    for sample in range(case.batch):
        rules = rules_of(case, Contributions())
        walks = enumerate_walks(case.spec, case.x[sample], case.start[sample], rules, residual="sink")
        for tap in taps:
            same(plain[tap][sample], walks.marginal(tap), near)
        same(mu(ABSORBED)[sample], walks.mass(~walks.survives), near)
        if given is None:
            assert walks.mass(walks.survives) == 0 or not bool(dead[sample])
            continue
        surviving = walks.given(walks.survives)
        for tap in taps:
            same(given[tap][sample], surviving.marginal(tap), near * surviving.variation())
        same(mu.walk_variation(surviving=True)[sample], surviving.variation(), near * surviving.variation())


def same(actual, expected, near=1e-8):
    expected = torch.as_tensor(np.asarray(expected))
    scale = max(1.0, float(expected.abs().max()) if expected.numel() else 1.0)
    torch.testing.assert_close(actual, expected, rtol=near, atol=near * scale, check_dtype=False)


@pytest.mark.parametrize("seed", [0, 1, 3])
@pytest.mark.parametrize("name", CHAINS)
def test_in_a_chain_the_factor_of_a_layer_cancels(name, seed):
    """The measure is forward × backward / Z without any factor."""
    case = tiny_net(name, seed=seed, batch=1)
    walks = enumerate_walks(
        case.spec, case.x[0], case.start[0], rules_of(case, Contributions(factor=1.0)), residual="sink"
    )
    expected = walks.given(walks.survives)
    for node in case.spec:
        same(measured(case).marginal(node.tap, given=~ABSORBED, min_ratio=0)[0], expected.marginal(node.tap))


def plain_composite():
    rules = [(Activation, Pass()), (AvgPool, Relative()), (Sum, Absolute()), (Linear, Relative())]
    return LayerMapComposite(rules)


@pytest.mark.parametrize("name", [*CHAINS, "skip"])
def test_as_a_plain_rule_of_zennit_it_gives_the_same_relevance(name):
    case = tiny_net(name, batch=3)
    mu = measured(case)
    leaf = case.x.clone().requires_grad_()
    with plain_composite().context(copy.deepcopy(case.net)) as modified:
        (relevance,) = torch.autograd.grad(modified(leaf), leaf, case.start)
    scale = case.start.sum(1).reshape(-1, *(1,) * (leaf.ndim - 1))
    torch.testing.assert_close(mu.marginal("input") * scale, relevance, rtol=1e-9, atol=1e-12)


def test_relevance_in_proportion_to_the_sums_is_conserved():
    """Exactly, if all contributions are positive."""
    torch.manual_seed(0)
    layer, a = nn.Linear(7, 5).double(), torch.rand(3, 7).double()
    layer.weight.data.abs_()
    z = (a @ layer.weight.T).detach()
    mu = RelevanceMeasure(layer, a, start=z, composite=NRMRelative())
    torch.testing.assert_close(mu(ABSORBED), torch.zeros(3).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mu.marginal("input"), a * (z @ layer.weight) / (z**2).sum(1, keepdim=True))


@pytest.mark.slow
@pytest.mark.parametrize("scale", [1e-30, 1e-40, 1e30])
def test_it_is_finite_and_the_same_under_activations_of_any_size(scale):
    """Without biases the net is homogeneous: only LRP-ε depends on their size, since its ε has one."""
    model = copy.deepcopy(torchvision_net("vgg16"))
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    x = images(32)
    with untouched(model):
        actual = NRM(model, NRMRelative()).attribute(x * scale, 3, given=~ABSORBED, unit="measure")
    expected = NRM(model, NRMRelative()).attribute(x, 3, given=~ABSORBED, unit="measure")
    assert bool(torch.isfinite(actual).all())
    tolerance = 0.05 if scale < 1e-38 else 1e-3  # subnormal numbers have few digits
    assert float((actual - expected).norm() / expected.norm()) < tolerance
    if scale == 1e-30:
        rules = LayerMapComposite([(Activation, Pass()), (AvgPool, Norm()), (Linear, Epsilon())])
        lost = NRM(model, rules, residual="sink").attribute(x * scale, 3, unit="measure")
        assert float(lost.abs().max()) < 1e-12


def test_a_layer_of_zeros_and_a_zero_input_absorb_everything():
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    nn.init.constant_(net[0].bias, -100.0)
    for x in (torch.ones(2, 3), torch.zeros(2, 3)):
        mu = RelevanceMeasure(net, x, 1, composite=NRMRelative())
        assert torch.equal(mu.marginal("input"), torch.zeros(2, 3))
        torch.testing.assert_close(mu(ABSORBED), torch.ones(2))


def test_samples_are_independent():
    case = tiny_net("conv_chain", batch=3)
    whole = measured(case).marginal("input")
    for sample in range(3):
        mu = RelevanceMeasure(
            case.net, case.x[sample : sample + 1], start=case.start[sample : sample + 1], composite=NRMRelative()
        )
        torch.testing.assert_close(mu.marginal("input")[0], whole[sample])


def test_its_composite_uses_the_sink_and_is_registered_in_zennit():
    assert COMPOSITES["nrm_relative"] is NRMRelative
    assert isinstance(NRMRelative(), Normalized)
    assert NRMRelative().normalization.residual == "sink"
    case = tiny_net("chain_mlp")
    mu = RelevanceMeasure(
        case.net, case.x, start=case.start, composite=NRMRelative(layer_map=[(nn.Linear, Epsilon(0.0))])
    )
    expected = RelevanceMeasure(case.net, case.x, start=case.start, composite=lrp_0(), residual="sink")
    torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))


def test_joints_and_events_work_with_it():
    case = tiny_net("conv_chain")
    mu = measured(case)
    joint = mu.joint("conv2", "conv1")
    for channel in range(2):
        torch.testing.assert_close(
            joint[:, channel], mu.marginal("conv1", over="channel", joint=at("conv2")[channel]), rtol=1e-9, atol=1e-12
        )
