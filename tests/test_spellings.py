"""Equivalent models have the same measure, in every spelling of their parts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonAlpha2Beta1, EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Composite
from zennit.layer import Sum

from nrm_plugin import FuseBatchNorm, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.composites import Normalized
from tests.conftest import slow_but

TOLERANCE = 1e-6
FUSE = [FuseBatchNorm()]
COMPOSITES: dict[str, Callable[[], Composite]] = {
    "default": NRMDefault,
    "default, not fused": lambda: NRMDefault(canonizers=[]),
    "absolute": NRMAbsolute,
    "plus flat": EpsilonPlusFlat,
    "plus flat, fused": lambda: EpsilonPlusFlat(canonizers=FUSE),
    "alpha beta": EpsilonAlpha2Beta1,
    "gamma box, fused": lambda: EpsilonGammaBox(-3.0, 3.0, canonizers=FUSE),
}


class Net(nn.Module):
    """A small residual net; every part can be spelled in another way."""

    def __init__(self, **spelled: Callable[..., Tensor]) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.pre, self.conv3 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, stride=2, groups=2)
        self.max, self.avg, self.flatten = nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Flatten()
        self.fc1, self.fc2 = nn.Linear(4, 5), nn.Linear(5, 3)
        self.spelled = spelled

    def spell(self, part: str, module: nn.Module | None, *args: Tensor) -> Tensor:
        if part in self.spelled:
            return self.spelled[part](*args) if module is None else self.spelled[part](module, *args)
        assert module is not None
        return module(*args)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spell("act", self.relu, self.spell("norm", self.bn1, self.spell("conv", self.conv1, x)))
        y = self.spell("norm", self.bn2, self.spell("conv", self.conv2, x))
        x = self.spelled["join"](x, y) if "join" in self.spelled else x + y
        x = self.spell("max", self.max, x)
        x = self.spell("conv", self.conv3, self.spell("act", self.relu, self.spell("norm", self.pre, x)))
        x = self.spell("act", self.relu, x)
        x = self.spell("flatten", self.flatten, self.spell("pool", self.avg, x))
        x = self.spell("act", self.relu, self.spell("linear", self.fc1, x))
        return self.spell("linear", self.fc2, x)


def build(bias: bool = True, **spelled: Callable[..., Tensor]) -> Net:
    torch.manual_seed(0)
    net = Net(**spelled).double().eval()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                for tensor in (module.running_mean, module.weight, module.bias):
                    tensor.normal_()
                module.running_var.uniform_(0.5, 2)
            if isinstance(module, nn.Linear) and not bias:
                module.bias.zero_()
    return net


X = torch.randn(2, 2, 11, 11, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def check_same_measure(
    first: nn.Module,
    second: nn.Module,
    composite: Composite,
    least: int,
    tolerance: float = TOLERANCE,
    residual: Any = None,
) -> None:
    """Checks equality at the input and at all common taps of equal shape, and that there are enough of these."""
    mu, nu = (RelevanceMeasure(net, X, [1, 2], composite=composite, residual=residual) for net in (first, second))
    torch.testing.assert_close(mu.output, nu.output)
    torch.testing.assert_close(mu.output, first(X)[[0, 1], [1, 2]].detach())
    torch.testing.assert_close(nu.output, second(X)[[0, 1], [1, 2]].detach())
    common = [name for name in mu.layers if name in nu.layers and mu.shape(name) == nu.shape(name)]
    assert len(common) >= least
    for name in common:
        bound = tolerance * float(mu.variation(name).max())
        torch.testing.assert_close(mu.marginal(name), nu.marginal(name), rtol=0, atol=bound, msg=name)
        torch.testing.assert_close(mu.sink(name), nu.sink(name), rtol=0, atol=bound, msg=name)
        torch.testing.assert_close(mu.bypass(name), nu.bypass(name), rtol=0, atol=bound, msg=name)


def twin(module: nn.Module, x: Tensor) -> Tensor:
    return F.conv2d(x, module.weight, module.bias, module.stride, module.padding, module.dilation, module.groups)


def spelled_norm(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda m, x: function(x, m.running_mean, m.running_var, m.weight, m.bias)


SPELLINGS: dict[str, dict[str, Callable[..., Tensor]]] = {
    "act": {
        "nn.ReLU(inplace)": lambda m, x: nn.ReLU(inplace=True)(x),
        "F.relu": lambda m, x: F.relu(x),
        "F.relu in place": lambda m, x: F.relu(x, inplace=True),
        "F.relu_": lambda m, x: F.relu_(x),
        "torch.relu": lambda m, x: torch.relu(x),
        "x.relu": lambda m, x: x.relu(),
        "x.relu_": lambda m, x: x.relu_(),
        "clamp": lambda m, x: x.clamp(min=0),
        "torch.clamp": lambda m, x: torch.clamp(x, 0),
        "clamp_": lambda m, x: x.clamp_(min=0.0),
        "clamp_min": lambda m, x: x.clamp_min(0),
    },
    "pool": {
        "F.avg_pool2d": lambda m, x: F.avg_pool2d(x, 2),
        "nn.AdaptiveAvgPool2d": lambda m, x: nn.AdaptiveAvgPool2d(1)(x),
        "F.adaptive_avg_pool2d": lambda m, x: F.adaptive_avg_pool2d(x, (1, 1)),
        "x.mean": lambda m, x: x.mean((2, 3), keepdim=True),
        "torch.mean": lambda m, x: torch.mean(x, dim=[2, 3]),
        "flattened": lambda m, x: x.flatten(2).mean(-1),
        "sum / 4": lambda m, x: x.sum((2, 3)) / 4,
    },
    "flatten": {
        "torch.flatten": lambda m, x: torch.flatten(x, 1),
        "x.flatten": lambda m, x: x.flatten(1),
        "view": lambda m, x: x.view(x.size(0), -1),
        "reshape": lambda m, x: x.reshape(len(x), -1),
        "squeeze": lambda m, x: x.squeeze(-1).squeeze(-1),
        "index": lambda m, x: x[:, :, 0, 0],
        "permute": lambda m, x: x.permute(0, 2, 3, 1).contiguous().view(len(x), -1),
    },
    "max": {
        "F.max_pool2d": lambda m, x: F.max_pool2d(x, 2),
        "torch.max_pool2d": lambda m, x: torch.max_pool2d(x, 2),
        "amax": lambda m, x: x[..., :10, :10].unflatten(3, (5, 2)).unflatten(2, (5, 2)).amax((3, 5)),
    },
    "conv": {
        "F.conv2d": twin,
        "torch.conv2d": lambda m, x: torch.conv2d(x, m.weight, m.bias, m.stride, m.padding, groups=m.groups),
        "by keyword": lambda m, x: F.conv2d(
            x, weight=m.weight, bias=m.bias, stride=m.stride, padding=m.padding, groups=m.groups
        ),
    },
    "norm": {
        "F.batch_norm": spelled_norm(F.batch_norm),
        "by keyword": spelled_norm(
            lambda x, mean, var, w, b: F.batch_norm(x, running_mean=mean, running_var=var, weight=w, bias=b)
        ),
        "torch.batch_norm": spelled_norm(
            lambda x, mean, var, w, b: torch.batch_norm(x, w, b, mean, var, False, 0.1, 1e-5, False)
        ),
    },
    "linear": {
        "F.linear": lambda m, x: F.linear(x, m.weight, m.bias),
        "by keyword": lambda m, x: F.linear(input=x, weight=m.weight, bias=m.bias),
        "addmm": lambda m, x: torch.addmm(m.bias, x, m.weight.T),
    },
    "join": {
        "y + x": lambda x, y: y + x,
        "x += y": lambda x, y: x.__iadd__(y),
        "torch.add": torch.add,
        "x.add_": lambda x, y: x.add_(y),
        "y.add_": lambda x, y: y.add_(x),
        "x - (-y)": lambda x, y: x - (-y),
        "sum of a list": lambda x, y: sum([x, y]),
    },
}
PAIRS = [pytest.param(part, name, id=f"{part}: {name}") for part, names in SPELLINGS.items() for name in names]


@pytest.mark.medium
@pytest.mark.parametrize("composite", slow_but(["default", "absolute", "plus flat, fused", "alpha beta"], "default"))
@pytest.mark.parametrize(("part", "name"), PAIRS)
def test_a_part_may_be_spelled_in_another_way(part, name, composite):
    check_same_measure(build(), build(**{part: SPELLINGS[part][name]}), COMPOSITES[composite](), least=6)


@pytest.mark.parametrize("composite", slow_but(COMPOSITES, "default", "alpha beta"))
def test_all_parts_may_be_spelled_in_another_way(composite):
    spelled = {part: next(iter(names.values())) for part, names in SPELLINGS.items()}
    check_same_measure(build(), build(**spelled), COMPOSITES[composite](), least=3, residual="sink")


BY_HAND: dict[str, Callable[..., Tensor]] = {
    "x @ W.T + b": lambda m, x: x @ m.weight.T + m.bias,
    "matmul, add_": lambda m, x: torch.matmul(x, m.weight.t()).add_(m.bias),
    "einsum": lambda m, x: torch.einsum("ni,oi->no", x, m.weight) + m.bias,
    "W @ x": lambda m, x: (m.weight @ x.T).T + m.bias,
}


@pytest.mark.medium
@pytest.mark.parametrize("name", BY_HAND)
@pytest.mark.parametrize("composite", slow_but(COMPOSITES, "default"))
def test_a_linear_layer_may_be_written_out(name, composite):
    """A separate bias is not part of the rule, which matters to rules that read it; for those it is zero."""
    bias = composite in ("default", "default, not fused", "absolute")
    check_same_measure(build(bias), build(bias, linear=BY_HAND[name]), COMPOSITES[composite](), least=6)


@pytest.mark.parametrize("composite", ["default, not fused", "absolute", "plus flat", "alpha beta"])
def test_batch_norm_may_be_written_out(composite):
    def by_hand(m: nn.BatchNorm2d, x: Tensor) -> Tensor:
        mean, var, weight, bias = (t[:, None, None] for t in (m.running_mean, m.running_var, m.weight, m.bias))
        return (x - mean) / torch.sqrt(var + m.eps) * weight + bias

    check_same_measure(build(), build(norm=by_hand), COMPOSITES[composite](), least=6)


@pytest.mark.medium
@pytest.mark.parametrize("composite", ["default", "absolute"])
@pytest.mark.parametrize(
    "join",
    [lambda x, y: torch.stack([x, y]).sum(0), lambda x, y: Sum()(torch.stack([x, y], -1))],
    ids=["stack, sum", "Sum"],
)
def test_a_sum_of_a_stack_is_a_sum(join, composite):
    """Up to the floor of the rule of averages, of 1e-6 mean inputs; ``+`` needs none."""
    check_same_measure(build(), build(join=join), COMPOSITES[composite](), least=6, tolerance=1e-5)


# -- fused by hand --------------------------------------------------------------------------------------------------


def folded(net: Net) -> Net:
    """Batch norms after convolutions, folded into their weights by the formula for one channel."""
    net = copy.deepcopy(net)
    for conv, norm in (("conv1", "bn1"), ("conv2", "bn2")):
        layer, bn = getattr(net, conv), getattr(net, norm)
        with torch.no_grad():
            for channel in range(len(layer.weight)):
                g = bn.weight[channel] / torch.sqrt(bn.running_var[channel] + bn.eps)
                layer.weight[channel] *= g
                layer.bias[channel] = g * (layer.bias[channel] - bn.running_mean[channel]) + bn.bias[channel]
        setattr(net, norm, nn.Identity())
    return net


@pytest.mark.medium
@pytest.mark.parametrize("residual", ["sink", "redistribute"])
@pytest.mark.parametrize("composite", ["default", "plus flat, fused", "gamma box, fused"])
def test_fusion_equals_folding_the_weights_by_hand(composite, residual):
    net = build()
    check_same_measure(net, folded(net), COMPOSITES[composite](), least=12, residual=residual)


def test_without_fusion_the_folded_net_differs():
    net = build()
    with pytest.raises(AssertionError):
        check_same_measure(net, folded(net), EpsilonPlus(), least=12)


# -- in place -------------------------------------------------------------------------------------------------------


class Dropped(nn.Module):
    """Writes in place and ignores the returned tensors; ``out_of_place`` computes the same out of place."""

    def __init__(self, out_of_place: bool = False) -> None:
        super().__init__()
        self.conv1, self.conv2, self.fc = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(4, 3)
        self.out_of_place = out_of_place

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        if self.out_of_place:
            h = F.relu(h)
            skip = h * 2
            h = skip + self.conv2(h)
            h = (h + 0.5).clamp(max=3.0)
            h = torch.cat([h[:, :1] * 2, h[:, 1:]], 1)
            h = torch.tanh(h)
        else:
            F.relu(h, inplace=True)
            skip = h.clone()
            skip.mul_(2)
            y = self.conv2(h)
            y.add_(skip)
            h = y
            h.add_(0.5)
            h.clamp_(max=3.0)
            h[:, :1].mul_(2)
            h.tanh_()
        return self.fc(h.mean((2, 3)))


@pytest.mark.parametrize("composite", COMPOSITES)
def test_in_place_updates_with_unused_results_are_part_of_the_model(composite):
    torch.manual_seed(0)
    net = Dropped().double().eval()
    out_of_place = Dropped(out_of_place=True).double().eval()
    out_of_place.load_state_dict(net.state_dict())
    with torch.no_grad():
        lost = net.fc(net.conv2(net.conv1(X)).mean((2, 3)))
    assert not torch.allclose(net(X), lost, atol=0.1)
    check_same_measure(net, out_of_place, COMPOSITES[composite](), least=4)


# -- events on a residual branch ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """One block between a stem and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv1, self.conv2 = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.stem(x))
        h = F.relu(h + self.conv2(F.relu(self.conv1(h))))
        return self.fc(h.mean((2, 3)))


def masked(net: nn.Module, composite: Normalized, layer: str, mask: Tensor) -> Tensor:
    """The naive joint: one backward pass in which the relevance of a layer is masked; mass at the input."""
    module = dict(net.named_modules())[layer]
    leaf = X.clone().requires_grad_()
    with composite.context(net):
        handle = module.register_forward_hook(lambda m, args, output: output.register_hook(lambda r: r * mask) and None)
        output = net(leaf)
        handle.remove()
        start = torch.zeros_like(output)
        start[[0, 1], [1, 2]] = 1
        (relevance,) = torch.autograd.grad(output, leaf, start)
    return relevance.flatten(1).sum(1)


@pytest.mark.parametrize("composite", ["default", "absolute", "plus flat"])
def test_an_event_on_a_residual_branch_does_not_count_walks_over_the_skip(composite):
    torch.manual_seed(0)
    net = Residual().double().eval()
    rules = Normalized(COMPOSITES[composite]())
    mu = RelevanceMeasure(net, X, [1, 2], composite=rules)
    mask = torch.tensor([1.0, 0, 1, 0]).double()[:, None, None]
    branch = at("conv2")[[0, 2]]
    exact, skip = mu(branch & at("input")), mu(~at("conv2") & at("input"))
    naive = masked(net, rules, "conv2", mask)
    torch.testing.assert_close(naive, exact + skip)
    assert float((naive - exact).abs().min()) > 0.05
    # The mass of the branch is that of a pass without the skip: with all masked, the skip alone is left.
    torch.testing.assert_close(masked(net, rules, "conv2", 0 * mask), skip)
    torch.testing.assert_close(naive - masked(net, rules, "conv2", 0 * mask), exact)
    # The skip also reads the tensor that the branch reads, but not the input side of the layer.
    read, fed = mu(at("conv1", side="input")), mu(at("relu:0"))
    assert float((fed - read).abs().min()) > 0.05
    torch.testing.assert_close(read + mu(at("relu:0") & ~at("conv1", side="input")), fed)
    parts = [mu(branch), mu(at("conv2") - branch), mu.bypass("conv2"), mu.sink("conv2")]
    torch.testing.assert_close(torch.stack(parts).sum(0), torch.ones(2).double())
