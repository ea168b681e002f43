"""The rules of this package compared with matrices that are formed here, one weight at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.core import Hook
from zennit.rules import Epsilon
from zennit.types import Convolution, ConvolutionTranspose, Linear

from nrm_plugin import Absolute, ConservingEpsilon, NRMDefault, RelevanceMeasure
from nrm_plugin.composites import Depthwise
from tests.test_oracles import LINEAR_MODULES, drawn

EPSILONS = [0.0, 0.2, 1.0, 3.0]
WEIGHTED = [name for name, (module, _) in LINEAR_MODULES.items() if any(True for _ in module.parameters())]


def parts(module: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    """Contributions ``a_i w_ij`` without bias, and ``|a_i|`` times the mean weight; ``(inputs, outputs)`` each."""
    plain = copy.deepcopy(module)
    if getattr(plain, "bias", None) is not None:
        plain.bias.data.zero_()
    even = copy.deepcopy(plain)
    if isinstance(getattr(even, "weight", None), Tensor):
        for channel in even.weight.data.transpose(0, int(isinstance(module, ConvolutionTranspose))):
            channel.fill_(float(channel.abs().mean()))
    size = torch.where(a == 0, max(1e-6 * float(a.abs().mean()), 1e-15), a.abs())

    def matrix(of: nn.Module) -> Tensor:
        unit = torch.eye(a.numel(), dtype=a.dtype).reshape(-1, *a.shape)
        return of(unit).detach().flatten(1)

    return matrix(plain) * a.flatten()[:, None], matrix(even) * size.flatten()[:, None]


def columns(module: nn.Module, a: Tensor, rule: Hook) -> RelevanceMeasure:
    """The measure of one module under its rule without gain, one sample for each column."""
    shape = module(a[None]).shape[1:]
    units = torch.eye(shape.numel(), dtype=a.dtype).reshape(-1, *shape)
    composite = NameMapComposite([(["0"], rule)])
    inputs = a.expand(len(units), *a.shape)
    return RelevanceMeasure(nn.Sequential(module), inputs, start=units, composite=composite, residual="sink")


def conserving(z: Tensor, size: Tensor, epsilon: float) -> Tensor:
    """The rule entry by entry: a denominator is raised to ``ε m_j``, and the inputs share the difference by size."""
    T = torch.zeros_like(z)
    for j in range(z.shape[1]):
        total, whole = float(z[:, j].sum()), float(size[:, j].sum())
        lacking = max(0.0, epsilon * whole - abs(total))
        if abs(total) + lacking > 0:  # else there is nothing to share by
            sign = (total > 0) - (total < 0)
            T[:, j] = (sign * z[:, j] + lacking * size[:, j] / whole) / (abs(total) + lacking)
    return T


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("name", LINEAR_MODULES)
def test_the_conserving_epsilon_is_its_formula(name: str, epsilon: float) -> None:
    module, a = drawn(name)
    mu = columns(module, a, ConservingEpsilon(epsilon))
    expected = conserving(*parts(module, a), epsilon).T
    scale = max(1.0, float(expected.abs().max()))
    assert float((mu.marginal("input").flatten(1) - expected).abs().max()) <= 1e-10 * scale
    assert float((mu.sink("input") + expected.sum(1) - 1).abs().max()) <= 1e-10 * scale
    assert set(expected.sum(1).round(decimals=9).tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("epsilon", [0.2, 1.0])
@pytest.mark.parametrize("name", LINEAR_MODULES)
def test_no_denominator_is_smaller_than_epsilon_times_the_mean_sum(name: str, epsilon: float) -> None:
    module, a = drawn(name)
    z, size = parts(module, a)
    T = columns(module, a, ConservingEpsilon(epsilon)).marginal("input").flatten(1)
    ratio = z.abs().sum(0) / size.sum(0).clamp(min=1e-30)
    assert bool((T.abs().sum(1) <= 1 + ratio / epsilon + 1e-9).all())


@pytest.mark.parametrize("name", WEIGHTED)
def test_without_epsilon_it_is_lrp_0_without_bias(name: str) -> None:
    module, a = drawn(name)
    ours = columns(module, a, ConservingEpsilon(0.0)).marginal("input")
    zennit = columns(module, a, Epsilon(epsilon=0.0, zero_params=["bias"])).marginal("input")
    assert torch.allclose(ours, zennit, rtol=1e-10)


@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "transposed1d"])
def test_a_neuron_without_input_shares_by_weight_or_evenly(name: str) -> None:
    module, a = drawn(name)
    dead = torch.zeros_like(a)
    by_weight, even = columns(module, dead, Absolute()), columns(module, dead, ConservingEpsilon())
    size = parts(module, dead)[1]
    weights = copy.deepcopy(module)
    for parameter in weights.parameters():
        parameter.data.abs_()
    share = parts(weights, torch.ones_like(a))[0]
    assert torch.allclose(by_weight.marginal("input").flatten(1), (share / share.sum(0)).T)
    assert torch.allclose(even.marginal("input").flatten(1), (size / size.sum(0)).T)
    for mu in (by_weight, even):
        assert float(mu.sink("input").abs().max()) <= 1e-12


def test_a_neuron_without_weights_absorbs_everything() -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight[0] = 0
    mu = columns(module, torch.tensor([1.0, -2.0, 0.0]), ConservingEpsilon())
    assert torch.equal(mu.marginal("input")[0], torch.zeros(3))
    assert torch.allclose(mu.sink("input"), torch.tensor([1.0, 0.0]), atol=1e-6)


@pytest.mark.medium
def test_columns_that_nearly_cancel_sum_to_one_in_single_precision() -> None:
    weight = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0))
    module = nn.Linear(500, 2000, bias=False)
    module.weight.data = weight - weight.mean(1, keepdim=True)  # every column sums to nearly zero
    T = columns(module, torch.ones(500), ConservingEpsilon(0.2)).marginal("input")
    assert float((T.sum(1) - 1).abs().max()) <= 1e-5
    assert float(T.abs().sum(1).max()) <= 6 + 1e-5


@pytest.mark.parametrize("name", [name for name in WEIGHTED if "transposed" not in name and "reflect" not in name])
def test_its_walk_variation_needs_no_columns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, a = drawn(name)
    monkeypatch.setattr("nrm_plugin.kernels.absolute_kernels.DENSE_LIMIT", 4096 if "circular" in name else 0)
    for epsilon in EPSILONS:
        mu = columns(module, a, ConservingEpsilon(epsilon))
        expected = mu.marginal("input").flatten(1).abs().sum(1) + mu.sink("input").abs()
        assert torch.allclose(mu.walk_variation(), expected, rtol=1e-9)


def test_zennit_alone_gives_the_same_relevance() -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU()]
    layers += [nn.ConvTranspose2d(4, 3, 2), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(3, 3)]
    net = nn.Sequential(*layers).double().eval()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    mu = RelevanceMeasure(net, x, [0, 2], composite=NRMDefault(canonizers=[]), residual="sink")
    with NRMDefault(canonizers=[]).context(net):
        leaf = x.clone().requires_grad_()
        (relevance,) = torch.autograd.grad(net(leaf), leaf, nn.functional.one_hot(torch.tensor([0, 2]), 3).double())
    assert torch.allclose(mu.marginal("input"), relevance, atol=1e-10)
    assert torch.allclose(relevance.flatten(1).sum(1), torch.ones(2, dtype=torch.float64), atol=1e-6)


def test_depthwise_convolutions_are_those_that_mix_no_channels() -> None:
    depthwise = nn.Conv2d(4, 8, 3, groups=4)
    assert isinstance(depthwise, Depthwise)
    assert isinstance(nn.ConvTranspose1d(4, 4, 3, groups=4), Depthwise)
    for other in (nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(1, 4, 3), nn.Linear(1, 1)):
        assert isinstance(other, Linear)
        assert not isinstance(other, Depthwise)
    assert isinstance(depthwise, Convolution)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_a_negative_epsilon_is_rejected(epsilon: float) -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        ConservingEpsilon(epsilon)
