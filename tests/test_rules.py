"""The rules of this package, against matrices that are formed here, one weight at a time."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.core import Hook
from zennit.rules import AlphaBeta, Epsilon
from zennit.types import Convolution, Linear

from nrm_plugin import Absolute, Bounded, NRMDefault, RelevanceMeasure
from nrm_plugin.composites import Depthwise
from tests.test_oracles import LINEAR_MODULES, drawn

BOUNDS = [1.0, 2.0, 4.0, math.inf]
WEIGHTED = [name for name, (module, _) in LINEAR_MODULES.items() if any(True for _ in module.parameters())]


def parts(module: nn.Module, a: Tensor) -> tuple[Tensor, Tensor]:
    """Signed contributions ``z_ij`` without bias, and their magnitudes; ``(inputs, outputs)`` each.

    Where padding repeats an input, a magnitude is that of each of its weights; an input of zero counts a little.
    """
    plain = copy.deepcopy(module)
    if getattr(plain, "bias", None) is not None:
        plain.bias.data.zero_()
    absolute = copy.deepcopy(plain)
    for parameter in absolute.parameters():
        parameter.data.abs_()

    size = torch.where(a == 0, 1e-6 * a.abs().mean(), a.abs())

    def matrix(of: nn.Module) -> Tensor:
        unit = torch.eye(a.numel(), dtype=a.dtype).reshape(-1, *a.shape)
        return of(unit).detach().flatten(1)

    return matrix(plain) * a.flatten()[:, None], matrix(absolute) * size.flatten()[:, None]


def columns(module: nn.Module, a: Tensor, rule: Hook) -> RelevanceMeasure:
    """The measure of one module, one sample for each column, its rule left as it is."""
    shape = module(a[None]).shape[1:]
    units = torch.eye(shape.numel(), dtype=a.dtype).reshape(-1, *shape)
    composite = NameMapComposite([(["0"], rule)])
    inputs = a.expand(len(units), *a.shape)
    return RelevanceMeasure(nn.Sequential(module), inputs, start=units, composite=composite, residual="sink")


def bounded(z: Tensor, size: Tensor, bound: float) -> Tensor:
    """The rule in words: contributions, mixed with absolute shares until the column varies by the bound."""
    T = torch.zeros_like(z)
    for j in range(z.shape[1]):
        total, whole = float(z[:, j].sum()), float(size[:, j].sum())
        sign = (total > 0) - (total < 0)
        if whole == 0 or (total == 0 and bound == math.inf):
            continue  # nothing to share by
        least = 0.0
        if whole > bound * abs(total):
            least = (whole - bound * abs(total)) / (bound * whole - abs(total))
        T[:, j] = (sign * z[:, j] + least * size[:, j]) / (abs(total) + least * whole)
    return T


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", LINEAR_MODULES)
def test_bounded_is_its_formula(name: str, bound: float) -> None:
    module, a = drawn(name)
    mu = columns(module, a, Bounded(bound))
    expected = bounded(*parts(module, a), bound).T
    scale = max(1.0, float(expected.abs().max()))
    assert float((mu.marginal("input").flatten(1) - expected).abs().max()) <= 1e-10 * scale
    assert float((mu.sink("input") + expected.sum(1) - 1).abs().max()) <= 1e-10 * scale
    assert set(expected.sum(1).round(decimals=9).tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("name", WEIGHTED)
def test_no_column_varies_by_more_than_the_bound_or_less_than_it_may(name: str, bound: float) -> None:
    module, a = drawn(name)
    T = columns(module, a, Bounded(bound)).marginal("input").flatten(1)
    z, size = parts(module, a)
    if "reflect" in name or "circular" in name:  # the parts of an entry that is read twice may cancel
        assert float(T.abs().sum(1).max()) <= bound + 1e-9
    else:
        cancels = z.sum(0) == 0  # shares by magnitude, which has a variation of one
        free = torch.where(cancels, 1.0, size.sum(0) / z.sum(0).abs())
        living = T.sum(1) > 0.5
        assert torch.allclose(T.abs().sum(1)[living], free.clamp(max=bound)[living], atol=1e-4)


@pytest.mark.parametrize("name", WEIGHTED)
def test_without_a_bound_it_is_lrp_0_without_bias(name: str) -> None:
    module, a = drawn(name)
    ours = columns(module, a, Bounded(math.inf)).marginal("input")
    zennit = columns(module, a, Epsilon(epsilon=0.0, zero_params=["bias"])).marginal("input")
    assert torch.allclose(ours, zennit, rtol=1e-10)


def test_where_contributions_cancel_it_is_alpha_beta() -> None:
    torch.manual_seed(0)
    module, a = nn.Linear(200, 20, bias=False).double(), torch.rand(200, dtype=torch.float64)
    z, size = parts(module, a)
    cancel = (z.sum(0) > 0) & (size.sum(0) > 3 * z.sum(0))
    assert int(cancel.sum()) >= 5
    ours = columns(module, a, Bounded(3.0)).marginal("input")[cancel]
    zennit = columns(module, a, AlphaBeta(alpha=2.0, beta=1.0, stabilizer=1e-30)).marginal("input")[cancel]
    assert torch.allclose(ours, zennit, atol=1e-9)


@pytest.mark.parametrize("rule", [Absolute(), Bounded(), Bounded(1.0), Bounded(2.0)], ids=lambda rule: str(type(rule)))
@pytest.mark.parametrize("name", [name for name in WEIGHTED if name != "transposed1d"])
def test_a_neuron_without_input_shares_by_weight(name: str, rule: Hook) -> None:
    module, a = drawn(name)
    weights = parts(module, torch.ones_like(a))[1]
    mu = columns(module, torch.zeros_like(a), rule)
    assert torch.allclose(mu.marginal("input").flatten(1), (weights / weights.sum(0)).T)
    assert float(mu.sink("input").abs().max()) <= 1e-12


def test_a_neuron_without_weights_absorbs_everything() -> None:
    module = nn.Linear(3, 2)
    with torch.no_grad():
        module.weight[0] = 0
    mu = columns(module, torch.tensor([1.0, -2.0, 0.0]), Bounded())
    assert torch.equal(mu.marginal("input")[0], torch.zeros(3))
    assert torch.allclose(mu.sink("input"), torch.tensor([1.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize("bound", [1.0, 4.0])
def test_columns_that_nearly_cancel_sum_to_one_in_single_precision(bound: float) -> None:
    weight = torch.randn(2000, 500, generator=torch.Generator().manual_seed(0))
    weight -= weight.mean(1, keepdim=True)  # every column sums to nearly zero
    module = nn.Linear(500, 2000, bias=False)
    module.weight.data = weight
    mu = columns(module, torch.ones(500), Bounded(bound))
    assert float((mu.marginal("input").sum(1) - 1).abs().max()) <= 1e-5
    assert float(mu.marginal("input").abs().sum(1).max()) <= bound + 1e-5


@pytest.mark.parametrize("name", ["linear", "tokens", "conv2d strided", "conv2d grouped", "conv3d", "transposed2d"])
def test_its_walk_variation_has_a_closed_form(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nrm_plugin.kernels.DENSE_LIMIT", 0)
    module, a = drawn(name)
    for bound in BOUNDS:
        mu = columns(module, a, Bounded(bound))
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


@pytest.mark.parametrize("bound", [0.5, 0.0, -1.0, math.nan])
def test_a_bound_below_one_is_refused(bound: float) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        Bounded(bound)
