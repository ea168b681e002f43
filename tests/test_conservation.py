"""Mass, sink and bypass of every tap sum to 1 on torchvision's nets, for every linear composite.

Covers: nrm_plugin.measure.totals.
"""

from __future__ import annotations

import pytest
import torch
from zennit.canonizers import SequentialMergeBatchNorm

from nrm_plugin import Normalized, RelevanceMeasure
from nrm_plugin.errors import NonlinearRuleError
from tests.conftest import (
    LINEAR,
    NONLINEAR,
    SIZES,
    UNCOVERED,
    composite,
    each_once,
    images,
    slow_but,
    torchvision_net,
    untouched,
)

RESIDUALS = ("sink", "redistribute")
FAST = ("epsilon_plus_flat", "epsilon_gamma_box", "lrp_0")


def measure(net, x, name, residual, canonizers=None):
    uncovered = "gradient" if name in UNCOVERED else "error"
    rules = Normalized(composite(name, canonizers), residual=residual, uncovered=uncovered)
    return RelevanceMeasure(net, x, [3, 7][: len(x)], composite=rules)


def largest_error(mu, of="the tap"):
    """The largest ``|mass + sink + bypass − 1| / max(1, V)`` over all taps and samples.

    ``of="taps above"`` takes the largest V of the tap and of those above it, whose rounding a sum carries down: the
    variation of random vgg16 is 870 before its classifier and 1.07 at its input.
    """
    marginals = mu.marginal(mu.layers)
    errors, largest = [], torch.ones(mu.batch)
    for layer in reversed(mu.layers):
        variation = mu.variation(layer).clamp(min=1)
        largest = torch.maximum(largest, variation)
        error = (marginals[layer].flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer) - 1).abs()
        errors.append(error / (variation if of == "the tap" else largest))
    return float(torch.stack(errors).max())


@pytest.mark.medium
@pytest.mark.parametrize("name", slow_but(LINEAR, *FAST))
@pytest.mark.parametrize("net", slow_but(SIZES, "alexnet"))
def test_mass_sink_and_bypass_sum_to_one_at_every_tap(net, name, worst):
    model, x = torchvision_net(net), images(SIZES[net])
    for residual in RESIDUALS:
        with untouched(model, x):
            mu = measure(model, x, name, residual)
            error = largest_error(mu, of="taps above")
        worst(f"conservation, {net}, {name}, {residual}", error)
        assert len(mu.layers) > 20
        assert error <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("name", LINEAR)
def test_the_parts_sum_to_one_after_merging_batch_norm(name, worst):
    model, x = torchvision_net("vgg16_bn"), images(64)
    for residual in RESIDUALS:
        with untouched(model, x):
            mu = measure(model, x, name, residual, canonizers=[SequentialMergeBatchNorm()])
            error = largest_error(mu)
        worst(f"conservation, vgg16_bn merged, {name}, {residual}", error)
        assert error <= 1e-5
        torch.testing.assert_close(mu.output, model(x)[[0, 1], [3, 7]].detach(), rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "net"), each_once(LINEAR, SIZES))
def test_the_parts_sum_to_one_on_images_of_full_size(net, name, worst):
    model, x = torchvision_net(net, width=4096), images(224, batch=1)
    for residual in RESIDUALS:
        error = largest_error(measure(model, x, name, residual))
        worst(f"conservation at 224, {net}, {name}, {residual}", error)
        assert error <= 1e-5


@pytest.mark.parametrize("name", slow_but(LINEAR, *FAST))
@pytest.mark.parametrize("residual", slow_but(RESIDUALS, "redistribute"))
def test_the_three_parts_are_accumulated_separately(name, residual):
    """A part computed as 1 minus the others would balance exactly; sums in float32 never do at all taps."""
    mu = measure(torchvision_net("alexnet"), images(96), name, residual)
    marginals = mu.marginal(mu.layers)
    totals = [marginals[layer].flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer) for layer in mu.layers]
    assert len(torch.stack(totals).unique()) > 2


@pytest.mark.medium
@pytest.mark.parametrize("name", NONLINEAR)
@pytest.mark.parametrize("net", SIZES)
def test_a_nonlinear_rule_raises_with_its_name(net, name):
    model, x = torchvision_net(net), images(SIZES[net])
    with untouched(model, x), pytest.raises(NonlinearRuleError, match=r"rule ReLU\w+ of layer 'features\.\d+'"):
        measure(model, x, name, "redistribute")


@pytest.mark.medium
@pytest.mark.parametrize("residual", slow_but(RESIDUALS, "sink"))
@pytest.mark.parametrize("net", slow_but(SIZES, "alexnet"))
def test_absolute_shares_leave_no_negative_walk(net, residual, worst):
    mu = measure(torchvision_net(net), images(SIZES[net]), "nrm_absolute", residual)
    ones = torch.ones(2)
    for layer, marginal in mu.marginal(mu.layers).items():
        torch.testing.assert_close(mu.variation(layer), ones, rtol=0, atol=1e-5)
        assert float(marginal.min()) >= 0
    worst(f"walk variation - 1, {net}, nrm_absolute, {residual}", float((mu.walk_variation() - 1).abs().max()))
    torch.testing.assert_close(mu.walk_variation(), ones, rtol=0, atol=1e-5)


@pytest.mark.medium
def test_variation_shows_where_walks_of_opposite_sign_share_a_tap():
    mu = measure(torchvision_net("alexnet"), images(96), "epsilon_plus", "sink")
    assert float(mu.variation("input").min()) > 1.01
    assert all(float(mu.variation(layer).min()) >= 1 - 1e-5 for layer in mu.layers)
    assert bool((mu.walk_variation() >= mu.variation("input") - 1e-4).all())
