"""Layers in a short format: they multiply in it, while all totals are computed in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from zennit.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Composite

from nrm_plugin import LayerNRM, Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import InputError
from nrm_plugin.kernels import modified_layers
from nrm_plugin.model.autocast import shortened

# Rounding of one entry, and what four layers of it came to; a single output rounds once for all of its walks.
FORMATS = {torch.bfloat16: 2**-6, torch.float16: 2**-9}
COMPOSITES: dict[str, Composite] = {
    "EpsilonPlus": EpsilonPlus(),
    "EpsilonPlusFlat": EpsilonPlusFlat(),
    "EpsilonGammaBox": EpsilonGammaBox(-3.0, 3.0),
    "NRMDefault": NRMDefault(),
    "NRMAbsolute": NRMAbsolute(),
}


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, **options),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 12, 3, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 20),
        nn.ReLU(),
        nn.Linear(20, 5),
    ).eval()
    nn.init.uniform_(made[1].running_mean, -0.2, 0.2)
    return made


def images(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


class Formats(TorchDispatchMode):
    """Records the dtypes in which convolutions and matrix products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in ("convolution", "mm", "linear")):
            self.seen |= {value.dtype for value in args if isinstance(value, Tensor)}
        return func(*args, **(kwargs or {}))


@contextmanager
def formats() -> Iterator[set[torch.dtype]]:
    with Formats() as mode:
        yield mode.seen


@pytest.mark.parametrize("short", FORMATS)
@pytest.mark.parametrize("name", COMPOSITES)
def test_books_balance_to_the_digits_of_the_format(name: str, short: torch.dtype) -> None:
    exact = RelevanceMeasure(net().double(), images(torch.float64), 1, composite=COMPOSITES[name])
    with torch.autocast("cpu", short), formats() as seen:
        mu = RelevanceMeasure(net(), images(), 1, composite=COMPOSITES[name])
        maps = mu.marginal(mu.layers)
    assert seen == {short}, "a layer multiplied in another format"
    for layer, values in maps.items():
        assert values.dtype == torch.float32
        error = (values.flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer) - 1).abs()
        assert (error <= FORMATS[short] * mu.variation(layer)).all(), layer
        off = (values - exact.marginal(layer)).abs().flatten(1).sum(1)
        assert (off <= 4 * FORMATS[short] * exact.variation(layer)).all(), layer


@pytest.mark.parametrize("short", FORMATS)
def test_joints_events_and_conditionals_come_from_the_same_products(short: torch.dtype) -> None:
    exact = RelevanceMeasure(net().double(), images(torch.float64), 1, composite=EpsilonPlus())
    with torch.autocast("cpu", short):
        mu = RelevanceMeasure(net(), images(), 1, composite=EpsilonPlus())
    event = at("4")[3] & at("0")[[1, 5]]
    for ours, theirs in (
        (mu.joint("4", "0"), exact.joint("4", "0")),
        (mu.joint("9", "7", over="neuron"), exact.joint("9", "7", over="neuron")),
        (mu(event), exact(event)),
        (mu.marginal("input", joint=event), exact.marginal("input", joint=event)),
        (mu.conditional(at("0")[2], "4"), exact.conditional(at("0")[2], "4")),
    ):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), theirs, rtol=8 * FORMATS[short], atol=FORMATS[short] * 0.1)


def test_relevance_below_the_range_of_float16_survives() -> None:
    values = torch.tensor([0.0, 3e-12, -1e-12, 2e-13])
    short, scale = shortened(values, torch.float16)
    assert scale is not None
    torch.testing.assert_close(short.float() * scale, values, rtol=1e-3, atol=0)
    zeros, _ = shortened(torch.zeros(3), torch.float16)
    assert zeros.eq(0).all()


def test_a_large_dense_layer_is_shortened_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = RelevanceMeasure(net(), images(), 1, composite=EpsilonGammaBox(-3.0, 3.0)).marginal("input")
    monkeypatch.setattr(modified_layers, "LARGE", 16)
    with torch.autocast("cpu", torch.bfloat16), formats() as seen:
        short = RelevanceMeasure(net(), images(), 1, composite=EpsilonGammaBox(-3.0, 3.0)).marginal("input")
    assert seen == {torch.bfloat16}
    assert (short - plain).abs().sum() <= 0.05 * plain.abs().sum()


def test_float64_is_not_shortened() -> None:
    model, x = net().double(), images(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        mu = RelevanceMeasure(model, x, 1)
    plain = RelevanceMeasure(model, x, 1).marginal("input")
    torch.testing.assert_close(mu.marginal("input"), plain, rtol=1e-12, atol=1e-15)


def test_a_measure_taken_outside_is_asked_in_full_precision_inside() -> None:
    outside, inside = (RelevanceMeasure(net(), images(), 1) for _ in range(2))
    plain = outside.joint("9", "7")
    with torch.autocast("cpu", torch.bfloat16):
        assert inside.joint("9", "7").equal(plain)
        assert inside.marginal("input").equal(outside.marginal("input"))


@pytest.mark.medium
def test_layers_whose_maps_have_no_closed_form_balance_too() -> None:
    model = net(padding_mode="reflect")
    with torch.autocast("cpu", torch.bfloat16):
        mu = RelevanceMeasure(model, images(), 1)
        error = (mu.marginal("input").flatten(1).sum(1) + mu.sink("input") + mu.bypass("input") - 1).abs()
    assert (error <= FORMATS[torch.bfloat16]).all()


def test_captum_classes_work_inside() -> None:
    model = net()
    plain = LayerNRM(model, model[4]).attribute(images(), target=1)
    with torch.autocast("cpu", torch.bfloat16):
        short = LayerNRM(model, model[4]).attribute(images(), target=1)
    assert short.dtype == torch.float32
    assert not short.equal(plain)
    assert (short - plain).abs().sum() <= 0.05 * plain.abs().sum()


def test_relevance_of_a_composite_by_itself_is_not_shortened() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    x = images().requires_grad_()
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InputError, match=r"'0' \(Conv2d\).*autocast.*RelevanceMeasure"),
        Normalized(EpsilonPlus()).context(model),
    ):
        model(x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert all(value.equal(before[key]) for key, value in model.state_dict().items())
    with Normalized(EpsilonPlus()).context(model):
        output = model(x)
    with torch.autocast("cpu", torch.bfloat16):  # of the backward pass alone
        (inside,) = torch.autograd.grad(output[:, 1].sum(), x, retain_graph=True)
    assert inside.equal(torch.autograd.grad(output[:, 1].sum(), x)[0])


class Inner(nn.Module):
    """A model that runs a part of its layers under autocast itself, in float32 without a format."""

    def __init__(self, kind: str, short: torch.dtype | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.conv, self.norm = nn.Conv1d(1, 8, 6), nn.LayerNorm(8)
        self.kind, self.short = kind, short

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.short, enabled=self.short is not None):
            hidden = getattr(self, self.kind)(x)
        return self.c(hidden.float().relu())

    def layers(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())

    def functions(self, x: Tensor) -> Tensor:
        first = nn.functional.linear(x, self.a.weight, self.a.bias).relu()
        return nn.functional.linear(first, self.b.weight, self.b.bias)

    def skip(self, x: Tensor) -> Tensor:
        hidden = self.a(x).relu()
        return self.norm(hidden + self.b(hidden))

    def convolution(self, x: Tensor) -> Tensor:
        return self.b(self.conv(x[:, None])[:, :, 0].relu())


@pytest.mark.parametrize("short", FORMATS)
@pytest.mark.parametrize("kind", ["layers", "functions", "skip", "convolution"])
@pytest.mark.parametrize("name", COMPOSITES)
def test_a_model_may_use_autocast_inside(name: str, kind: str, short: torch.dtype) -> None:
    """Regression test: an error with a wrong remedy. Relevance is that of float32 for the rounded activations."""
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    model, exact = Inner(kind, short).eval(), Inner(kind, None).eval()
    mu, plain = (RelevanceMeasure(one, x, 1, composite=COMPOSITES[name]) for one in (model, exact))
    assert torch.equal(mu.outputs, model(x))
    assert mu.layers == plain.layers
    for layer in mu.layers:
        values = mu.marginal(layer)
        assert values.dtype == torch.float32
        error = (values.flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer) - 1).abs()
        assert (error <= 1e-5 * mu.variation(layer)).all(), layer
    difference = (mu.marginal("input") - plain.marginal("input")).abs().flatten(1).sum(1)
    assert (difference <= 16 * FORMATS[short] * plain.walk_variation()).all()
    alone = torch.cat(
        [RelevanceMeasure(model, one[None], 1, composite=COMPOSITES[name]).marginal("input") for one in x]
    )
    torch.testing.assert_close(mu.marginal("input"), alone, rtol=1e-4, atol=1e-4)


def test_layers_and_functions_agree_under_autocast_inside() -> None:
    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    layers, functions = (
        RelevanceMeasure(Inner(kind, torch.bfloat16).eval(), x, 1, composite=NRMAbsolute())
        for kind in ("layers", "functions")
    )
    torch.testing.assert_close(layers.marginal("input"), functions.marginal("input"))
    torch.testing.assert_close(layers.joint("output", "input"), functions.joint("output", "input"))


@pytest.mark.parametrize("short", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_tensors_of_eight_bits_inside_have_relevance_in_float32(short: torch.dtype) -> None:
    """Regression test: every query raised NotImplementedError, since torch does not sum tensors of this dtype."""

    class Rounded(nn.Module):
        def __init__(self, function: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.function = nn.Linear(6, 8), nn.Linear(8, 3), function

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.function(self.a(x)).relu())

    def straight_through(h: Tensor) -> Tensor:
        return h + (h.detach().to(short).float() - h).detach()

    x = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    for composite in (NRMDefault(), NRMAbsolute()):
        mu, expected = (
            RelevanceMeasure(Rounded(function).eval(), x, 1, composite=composite)
            for function in (lambda h: h.to(short).float(), straight_through)
        )
        torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))
        torch.testing.assert_close(mu.marginal("to").flatten(1).sum(1) + mu.sink("to"), torch.ones(3))
        assert mu.marginal("to").dtype == torch.float32
