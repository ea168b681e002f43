"""Quantized linear layers: the measure is that of the model with the dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonPlus

from nrm_plugin import NRM, FuseBatchNorm, NRMAbsolute, NRMDefault, RelevanceMeasure, at, coverage
from nrm_plugin.errors import StaleMeasureError, UnsupportedOperationError
from nrm_plugin.model.quantized import ROWS, dequantized, is_quantized

X = torch.randn((3, 6), generator=torch.Generator().manual_seed(0))


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Integers and the scale of each row."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round().to(torch.int8), scale


class Integers(nn.Linear):
    """A linear layer with a weight of integers, and its scale, as those of bitsandbytes."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features)
        integers, self.scale = quantized(layer.weight.detach())
        self.weight, self.bias = nn.Parameter(integers, requires_grad=False), layer.bias

    def forward(self, source: Tensor) -> Tensor:
        return F.linear(source, self.weight.to(source.dtype) * self.scale, self.bias)


class Wrapper(Tensor):
    """A tensor that holds integers and their scale, as those of torchao."""

    integers: Tensor
    scale: Tensor

    @staticmethod
    def __new__(cls, integers: Tensor, scale: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, integers.shape, dtype=scale.dtype)
        made.integers, made.scale = integers, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["integers", "scale"], None

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            return F.linear(args[0], args[1].integers.to(args[0].dtype) * args[1].scale, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Wrapper(args[0].integers, args[0].scale)
        raise NotImplementedError(f"Wrapper has no {func}")


def wrapped(layer: nn.Linear) -> nn.Linear:
    made = nn.Linear(layer.in_features, layer.out_features)
    made.weight = nn.Parameter(Wrapper(*quantized(layer.weight.detach())), requires_grad=False)
    made.bias = layer.bias
    return made


class Packed(nn.Module):
    """A linear layer whose weight is no parameter, as those of torch.ao."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._packed = (*quantized(layer.weight.detach()), layer.bias.detach())

    def weight(self) -> Tensor:
        return self._packed[0]

    def forward(self, source: Tensor) -> Tensor:
        integers, scale, bias = self._packed
        return source @ (integers.to(source.dtype) * scale).T + bias


KINDS: dict[str, Callable[[nn.Linear], nn.Module]] = {"integers": Integers, "wrapper": wrapped, "packed": Packed}


def net(change: Callable[[nn.Linear], nn.Module]) -> nn.Sequential:
    torch.manual_seed(1)
    layers = [nn.Linear(6, 300), nn.Linear(300, 8), nn.Linear(8, 3)]
    norm = nn.BatchNorm1d(8)
    norm.running_mean.normal_()
    first, second, third = map(change, layers)
    return nn.Sequential(first, nn.ReLU(), second, norm, nn.ReLU(), third).eval()


def plain(layer: nn.Linear) -> nn.Linear:
    integers, scale = quantized(layer.weight.detach())
    layer.weight.data = integers * scale
    return layer


COMPOSITES = [NRMDefault, NRMAbsolute, EpsilonPlus, lambda: NRMDefault(canonizers=[FuseBatchNorm()])]


@pytest.mark.medium
@pytest.mark.parametrize("max_memory", [None, 1])
@pytest.mark.parametrize("composite", COMPOSITES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_measure_is_that_of_the_dequantized_model(kind, composite, max_memory):
    model = net(KINDS[kind])
    mu = RelevanceMeasure(model, X, 1, composite=composite(), max_memory=max_memory)
    full = RelevanceMeasure(net(plain), X, 1, composite=composite())
    tolerance = 1e-5 * float(full.walk_variation().max())
    layers = [layer for layer in full.layers if layer in mu.layers]
    assert {"input", "0", "2", "5"} <= {*layers}
    for layer in layers:
        torch.testing.assert_close(mu.marginal(layer), full.marginal(layer), rtol=0, atol=tolerance)
    event = at("2").channel(1) & ~at("0").channel(3)
    torch.testing.assert_close(mu(event), full(event), rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_a_contrast_and_the_coverage(kind):
    model = net(KINDS[kind])
    mu, full = (RelevanceMeasure(one, X, 1, against=0) for one in (model, net(plain)))
    torch.testing.assert_close(mu.marginal("input"), full.marginal("input"), rtol=0, atol=1e-4)
    rows = coverage(model, X).rows
    assert [row.rule for row in rows if row.name in "025"] == ["ConservingEpsilon"] * 3
    torch.testing.assert_close(NRM(model).attribute(X, 1), NRM(net(plain)).attribute(X, 1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_not_changed_and_changes_are_seen(kind):
    model = net(KINDS[kind])
    before, layer = model(X), model[0]
    weight = layer.weight
    mu = RelevanceMeasure(model, X, 1)
    mu.marginal("input")
    assert model[0] is layer
    assert layer.weight == weight if kind == "packed" else layer.weight is weight
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)
    if kind == "packed":
        return
    integers = layer.weight.integers if kind == "wrapper" else layer.weight
    with torch.no_grad():
        integers.add_(1)
    with pytest.raises(StaleMeasureError, match=r"0\.weight"):
        mu.marginal("input")


def test_a_layer_that_is_not_linear_is_an_error_that_names_it():
    class Clipped(Integers):
        def forward(self, source: Tensor) -> Tensor:
            return super().forward(source.clamp(-0.5, 0.5)).relu()

    with pytest.raises(UnsupportedOperationError, match=r"layer '2' \(.*Clipped\) is quantized, and is not linear"):
        RelevanceMeasure(net(lambda layer: Clipped(layer) if layer.in_features == 300 else layer), X, 1).marginal(
            "input"
        )


def test_layers_that_round_their_input_have_the_weights_of_exact_inputs():
    class Rounding(Packed):
        def forward(self, source: Tensor) -> Tensor:
            scale = source.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
            return super().forward((source / scale).round() * scale)

    layer = nn.Linear(ROWS + 7, 5)
    full = dequantized(Rounding(layer), lambda module, source: module(source), torch.randn(2, ROWS + 7), "layer")
    torch.testing.assert_close(full.weight, plain(layer).weight)
    torch.testing.assert_close(full.bias, layer.bias)


def test_which_layers_are_quantized():
    layer = nn.Linear(4, 4)
    assert all(is_quantized(change(layer)) for change in KINDS.values())
    others = [layer, layer.bfloat16(), nn.LazyLinear(3), nn.Conv2d(1, 1, 1), nn.Sequential(layer), nn.Bilinear(2, 2, 2)]
    assert not any(map(is_quantized, others))
