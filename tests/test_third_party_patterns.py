"""Patterns of models in other packages, each compared with an equivalent net in plain spelling.

Covers: nrm_plugin.functional.unsupported, nrm_plugin.kernels.layer_call, nrm_plugin.kernels.modified_layers,
nrm_plugin.model.affine_layers, nrm_plugin.model.custom_layers, nrm_plugin.kernels.known_rules.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonAlpha2Beta1, EpsilonPlus, EpsilonPlusFlat, LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.rules import Epsilon, Gamma, Pass
from zennit.types import Linear

from nrm_plugin import FuseBatchNorm, NRMAbsolute, NRMDefault, RelevanceMeasure, at, coverage
from nrm_plugin.errors import UncoveredLayerError, UnsupportedOperationError


def gamma() -> Composite:
    """γ reads the sign of what a layer returned."""
    return LayerMapComposite([*layer_map_base(), (Linear, Gamma(0.25))], canonizers=[FuseBatchNorm()])


COMPOSITES = {
    kind.__name__: kind for kind in (NRMDefault, NRMAbsolute, EpsilonPlus, EpsilonPlusFlat, EpsilonAlpha2Beta1, gamma)
}


@pytest.fixture(params=COMPOSITES)
def composite(request: pytest.FixtureRequest) -> Composite:
    return COMPOSITES[request.param]()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def prepared(model: nn.Module) -> nn.Module:
    """In double precision, with random statistics and weights of batch norms."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.double().eval()


def check_same_measure(model: nn.Module, other: nn.Module, images: Tensor, composite: Composite) -> None:
    """The same output, the same map and a measure that sums to one."""
    images = images.double()
    with torch.enable_grad():
        mu, nu = (RelevanceMeasure(net, images, 1, composite=composite) for net in (model, other))
    torch.testing.assert_close(mu.output, model(images)[:, 1])
    torch.testing.assert_close(nu.output, other(images)[:, 1])
    torch.testing.assert_close(mu.output, nu.output)
    total = mu.marginal("input").flatten(1).sum(1) + mu.sink("input") + mu.bypass("input")
    bound = 1e-9 * mu.variation("input").max().item()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=bound)
    torch.testing.assert_close(mu.marginal("input"), nu.marginal("input"), rtol=0, atol=1e-9 + bound)


class InPlace(nn.Module):
    """A residual block that writes in place, or not; ε-rules store the output of convolutions without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.last, self.head = nn.Conv2d(4, 4, 3), nn.Linear(4, 3)
        self.writes = True

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.stem(x), inplace=self.writes)
        y = self.conv(x)
        if self.writes:
            y *= 2
            y += x
            y.add_(self.last(nn.functional.pad(x, (1, 1, 1, 1))))
        else:
            y = 2 * y + x + self.last(nn.functional.pad(x, (1, 1, 1, 1)))
        return self.head(nn.functional.relu(y, inplace=self.writes).mean((2, 3)))


def test_an_in_place_sum_splits_by_its_former_values(composite: Composite) -> None:
    model = prepared(InPlace())
    plain = copy.deepcopy(model)
    plain.writes = False
    check_same_measure(model, plain, torch.randn(2, 3, 6, 6), composite)


class PreActivation(nn.Module):
    """The skip connection reads the in-place output of the first ReLU of the branch, or the same in plain spelling."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.last, self.head = nn.ReLU(inplace=inplace), nn.ReLU(inplace=inplace), nn.Linear(4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.relu(x)
        if not self.inplace:
            x = y
        y = self.conv(y)
        z = self.last(y)
        return self.head((x + (y if self.inplace else z)).mean((2, 3)))


class Writing(nn.Module):
    """A custom module that clamps its input in place."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp_(min=0)


def test_in_place_modules_write_to_the_input_of_a_skip_connection(composite: Composite) -> None:
    model, plain = PreActivation(inplace=True), PreActivation(inplace=False)
    plain.load_state_dict(model.state_dict())
    check_same_measure(prepared(model), prepared(plain), torch.randn(2, 3, 5, 5), composite)


def test_a_module_with_a_rule_that_writes_in_place() -> None:
    model, plain = PreActivation(inplace=True), PreActivation(inplace=False)
    plain.load_state_dict(model.state_dict())
    model.relu = Writing()  # type: ignore[assignment]
    composite = NRMDefault(layer_map=[(Writing, Pass())])
    check_same_measure(prepared(model), prepared(plain), torch.randn(2, 3, 5, 5), composite)


class NormAct(nn.BatchNorm2d):
    """A batch normalization with an activation."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        norm = nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(norm)


class Dense(nn.Module):
    """Two layers of a DenseNet: each reads all earlier outputs, normalized and rectified."""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.norm1, self.conv1 = norm(4), nn.Conv2d(4, 2, 3, padding=1)
        self.norm2, self.conv2 = norm(6), nn.Conv2d(6, 2, 1)
        self.head = nn.Linear(8, 3)
        self.relu = nn.ReLU() if norm is nn.BatchNorm2d else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([x, self.conv1(self.relu(self.norm1(x)))], 1)
        x = torch.cat([x, self.conv2(self.relu(self.norm2(x)))], 1)
        return self.head(x.mean((2, 3)))


def test_a_batch_norm_with_an_activation_inside(composite: Composite) -> None:
    model, plain = prepared(Dense(NormAct)), prepared(Dense(nn.BatchNorm2d))
    plain.load_state_dict(model.state_dict())
    check_same_measure(model, plain, torch.randn(2, 3, 6, 6), composite)


class Shared(nn.Module):
    """A convolution with a batch norm and a skip connection as readers, and one with two batch norms.

    ``apart`` puts an identity between layer and norm, so that they cannot be fused.
    """

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.stem, self.norm, self.relu = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
        self.conv, self.one, self.two = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.gap = nn.LeakyReLU(1.0) if apart else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.conv(self.relu(self.norm(self.gap(x))))
        y = self.relu(self.one(self.gap(y))) + self.two(self.gap(y))
        return self.head((x + y).mean((2, 3)))


def test_a_layer_with_other_readers_is_not_fused_with_its_batch_norm(composite: Composite) -> None:
    model, plain = prepared(Shared(apart=False)), prepared(Shared(apart=True))
    plain.load_state_dict(model.state_dict())
    check_same_measure(model, plain, torch.randn(2, 3, 6, 6), composite)


class Standardized(nn.Conv2d):
    """Pads to the same size, and standardizes its weights."""

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.pad(x, (0, 1, 1, 1))
        return nn.functional.conv2d(x, self.effective(), self.bias, groups=self.groups)

    def effective(self) -> Tensor:
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / weight.std(1, keepdim=True)
        return weight.view_as(self.weight)


class Subclassed(nn.Sequential):
    """Convolutions of a subclass, or of torch with the same effective weights and an asymmetric padding in front."""

    def __init__(self) -> None:
        super().__init__(
            *(Standardized(3, 4, (3, 2)), nn.BatchNorm2d(4), nn.ReLU()),
            *(Standardized(4, 6, (3, 2), groups=2, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)),
        )


def in_plain_spelling(model: nn.Module) -> nn.Module:
    plain = copy.deepcopy(model)
    for number, module in enumerate(plain):
        if isinstance(module, Standardized):
            bias = module.bias is not None
            conv = nn.Conv2d(
                module.in_channels, module.out_channels, (3, 3), padding=1, groups=module.groups, bias=bias
            )
            conv.weight.data = nn.functional.pad(module.effective().detach(), (1, 0))
            conv.bias = module.bias
            plain[number] = conv.double()
    return plain


def test_a_convolution_that_computes_its_weight(composite: Composite) -> None:
    model = prepared(Subclassed())
    plain = in_plain_spelling(model)
    if isinstance(composite, EpsilonPlusFlat):  # Flat would count the column of zeros too
        composite = EpsilonPlus(canonizers=[FuseBatchNorm()])
    if isinstance(composite, NRMDefault):
        composite = NRMDefault(first_map=[(nn.Conv2d, Epsilon(0.1))], layer_map=[(nn.Conv2d, Epsilon(0.1))])
    check_same_measure(model, plain, torch.randn(2, 3, 6, 6), composite)


def test_flat_on_a_convolution_that_computes_its_weight_spreads_evenly() -> None:
    model = nn.Sequential(Standardized(2, 3, (3, 2)), nn.Flatten()).double()
    mu = RelevanceMeasure(model.eval(), torch.randn(1, 2, 5, 5).double(), 12)  # the middle neuron of channel 0
    expected = torch.zeros(1, 2, 5, 5).double()
    expected[..., 1:4, 2:4] = 1 / 12
    torch.testing.assert_close(mu.marginal("input"), expected)


class Activated(nn.Conv2d):
    """A convolution with an activation, which is not affine."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def test_a_subclass_that_is_not_affine_is_read_as_zennit_reads_it() -> None:
    model = nn.Sequential(Activated(2, 3, 3), nn.Flatten(), nn.Linear(27, 2)).double().eval()
    images = torch.randn(2, 2, 5, 5).double()
    mu = RelevanceMeasure(model, images, 1, composite=EpsilonPlus(), residual="sink")
    plain = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), *model[1:]).double()
    plain[0].load_state_dict(model[0].state_dict())
    nu = RelevanceMeasure(plain, images, 1, composite=EpsilonPlus(), residual="sink")
    torch.testing.assert_close(mu.marginal("1"), nu.marginal("2"))
    total = mu.marginal("input").flatten(1).sum(1) + mu.sink("input")
    torch.testing.assert_close(total, torch.ones_like(total))


class Octave(nn.Conv2d):
    """A convolution of two resolutions, which returns both; its weight has four parts."""

    def forward(self, x: Tensor, low: Tensor | None = None) -> tuple[Tensor, Tensor]:
        conv, pool = nn.functional.conv2d, nn.functional.avg_pool2d
        to_high, to_low = self.weight[:2], self.weight[2:]
        high = conv(x, to_high[:, :2], self.bias[:2], padding=1)
        down = conv(pool(x, 2), to_low[:, :2], self.bias[2:], padding=1)
        if low is None:
            return high, down
        up = nn.functional.interpolate(conv(low, to_high[:, 2:], padding=1), scale_factor=2)
        return high + up, down + conv(low, to_low[:, 2:], padding=1)


class TwoOctaves(nn.Module):
    """Two of them, or eight convolutions."""

    def __init__(self, apart: bool) -> None:
        super().__init__()
        self.stem, self.head, self.apart = nn.Conv2d(3, 2, 3, padding=1), nn.Linear(4, 3), apart
        self.one, self.two = Octave(2, 4, 3), Octave(4, 4, 3)
        self.parts = nn.ModuleDict({name: nn.Conv2d(2, 2, 3, padding=1, bias=name[0] == "h") for name in PARTS})

    def forward(self, x: Tensor) -> Tensor:
        x, pool, parts = self.stem(x).relu(), nn.functional.avg_pool2d, self.parts
        if self.apart:
            high, low = parts["hh1"](x), parts["hd1"](pool(x, 2))
            up = nn.functional.interpolate(parts["ll2"](low), scale_factor=2)
            high, low = parts["hh2"](high) + up, parts["hd2"](pool(high, 2)) + parts["ld2"](low)
        else:
            high, low = self.two(*self.one(x))
        return self.head(torch.cat([high.relu().mean((2, 3)), low.relu().mean((2, 3))], 1))


PARTS = ("hh1", "hd1", "hh2", "hd2", "ll2", "ld2")


def test_functions_inside_a_convolution_that_returns_two_tensors_are_observed(composite: Composite) -> None:
    model, plain = TwoOctaves(apart=False), TwoOctaves(apart=True)
    for name, layer, rows, cols in (
        *(("hh1", "one", slice(2), slice(2)), ("hd1", "one", slice(2, 4), slice(2))),
        *(("hh2", "two", slice(2), slice(2)), ("hd2", "two", slice(2, 4), slice(2))),
        *(("ll2", "two", slice(2), slice(2, 4)), ("ld2", "two", slice(2, 4), slice(2, 4))),
    ):
        layer, part = getattr(model, layer), plain.parts[name]
        part.weight.data = layer.weight.data[rows, cols].clone()
        if part.bias is not None:
            part.bias.data = layer.bias.data[rows].clone()
    plain.stem, plain.head = copy.deepcopy(model.stem), copy.deepcopy(model.head)
    check_same_measure(prepared(model), prepared(plain), torch.randn(2, 3, 6, 6), composite)
    assert "two.conv2d:0" in RelevanceMeasure(model, torch.randn(1, 3, 6, 6).double(), 1).layers


class Gated(nn.Module):
    """A gate as large as the signal, computed by a function or a module, and passed to a module that multiplies."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.spelling, self.sigmoid, self.drop = spelling, nn.Sigmoid(), nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        gate = self.gate(x)
        if self.spelling == "function":
            y = x * gate.sigmoid()
        elif self.spelling == "module":
            y = self.drop(self.sigmoid(gate)) * x
        else:
            gate = self.sigmoid(gate)
            gate.unsqueeze_(-1)
            gate *= x.unsqueeze(-1)
            y = gate.squeeze(-1)
        return self.head((y * torch.sigmoid(y)).mean((2, 3)))


@pytest.mark.parametrize("spelling", ["module", "in place"])
def test_gates_are_recognized_in_every_spelling(spelling: str, composite: Composite) -> None:
    model, plain = Gated(spelling), Gated("function")
    plain.load_state_dict(model.state_dict())
    check_same_measure(prepared(model), prepared(plain), torch.randn(2, 3, 5, 5), composite)


class ResponseNorm(nn.Module):
    """Weighs a signal by an operation that has no kernel."""

    def __init__(self, with_gate: bool) -> None:
        super().__init__()
        self.stem, self.head, self.with_gate = nn.Conv2d(3, 4, 3), nn.Linear(4, 3), with_gate

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        norm = x.norm(p=2, dim=(2, 3), keepdim=True)
        total = torch.logcumsumexp(x.flatten(1), 1)[:, -1].reshape(-1, 1, 1, 1).add(1e-5).expand(x.shape)
        y = x * (norm / (norm.mean(1, keepdim=True) + 1e-6))
        return self.head((y / total if self.with_gate else total).mean((2, 3)))


def test_an_operation_without_a_kernel_may_feed_a_gate(composite: Composite) -> None:
    model, images = prepared(ResponseNorm(with_gate=True)), torch.randn(2, 3, 6, 6).double()
    mu = RelevanceMeasure(model, images, 1, composite=composite)
    total = mu.marginal("input").flatten(1).sum(1) + mu.sink("input")
    torch.testing.assert_close(total, torch.ones_like(total))
    torch.testing.assert_close(mu(at("stem")[1] & at("head", side="input")[1]), mu(at("stem")[1]))
    assert bool(mu.conditional(at("input")[0], "stem").any())


def test_an_operation_without_a_kernel_raises_where_relevance_arrives() -> None:
    mu = RelevanceMeasure(prepared(ResponseNorm(with_gate=False)), torch.randn(2, 3, 6, 6).double(), 1)
    with pytest.raises(UnsupportedOperationError, match=r"'logcumsumexp' in 'the model' .*sumexp\(.*register_kernel"):
        mu.marginal("input")


class Chunked(nn.Module):
    """Writes to outputs of ``chunk``, which autograd rejects and a model without gradients may do."""

    def __init__(self, inplace: bool) -> None:
        super().__init__()
        self.stem, self.relu, self.head = nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace), nn.Linear(4, 3)
        self.inplace = inplace

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.stem(x).chunk(2, 1)
        two = self.relu(two)
        if self.inplace:
            one += two
        else:
            one = one + two
        return self.head(torch.cat([nn.functional.relu(one, inplace=self.inplace), two], 1).mean((2, 3)))


def test_chunks_of_a_tensor_may_be_written_to(composite: Composite) -> None:
    model, plain = Chunked(inplace=True), Chunked(inplace=False)
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        check_same_measure(prepared(model), prepared(plain), torch.randn(2, 3, 5, 5), composite)


class Swish(torch.autograd.Function):
    """x · sigmoid(x) with a backward of its own, to save memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        raise AssertionError("relevance is not a gradient")


class Centered(torch.autograd.Function):
    """Has the signature of an activation, but every element depends on all others of its channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x - x.mean((2, 3), keepdim=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Turned(Centered):
    """Has the signature of an activation, but permutes the elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(3)


def scripted(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class Activation(nn.Module):
    """A module around one function."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def activated(activation: nn.Module) -> nn.Module:
    convolutions = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
    return nn.Sequential(convolutions[0], activation, convolutions[1], activation, nn.Flatten(), nn.Linear(64, 3))


@pytest.mark.parametrize("spelling", ["autograd.Function", "TorchScript"])
def test_activations_that_only_autograd_records_are_recognized_by_their_values(
    spelling: str, composite: Composite
) -> None:
    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning):  # there are models with scripts all the same
            warnings.simplefilter("ignore", kind)
        function = Swish.apply if spelling == "autograd.Function" else torch.jit.script(scripted)
    model, plain = prepared(activated(Activation(function))), prepared(activated(nn.SiLU()))
    plain.load_state_dict(model.state_dict())
    images = torch.randn(2, 3, 6, 6)
    check_same_measure(model, plain, images, composite)
    assert coverage(model, images.double()).is_complete
    assert "1" in RelevanceMeasure(model, images[:1].double(), 1, composite=composite).layers[2]


@pytest.mark.parametrize("function", [Centered, Turned])
def test_other_functions_are_not_recognized_as_activations(function: type[torch.autograd.Function]) -> None:
    model = prepared(activated(Activation(function.apply)))
    with pytest.raises(UncoveredLayerError, match=rf"layer '1' \(Activation\).*{function.__name__}.*layer_map"):
        RelevanceMeasure(model, torch.randn(2, 3, 6, 6).double(), 1)


class Recurrent(nn.Module):
    """A recurrent net on top of a convolution; its output weighs a signal, or is the signal."""

    def __init__(self, kind: str, is_gate: bool) -> None:
        super().__init__()
        self.stem, self.head, self.is_gate = nn.Conv1d(3, 4, 3), nn.Linear(4, 3), is_gate
        self.rnn = getattr(nn, kind)(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).transpose(1, 2)
        y = self.rnn(x)[0]
        return self.head((x * y.sigmoid() if self.is_gate else y).mean(1))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("is_gate", [True, False])
def test_recurrent_layers_may_feed_a_gate_or_be_the_signal(kind: str, is_gate: bool) -> None:
    series = torch.randn(2, 3, 6).double()
    mu = RelevanceMeasure(prepared(Recurrent(kind, is_gate)), series, 1)
    torch.testing.assert_close(mu.marginal("input").flatten(1).sum(1), torch.ones(2).double())
    assert bool(mu.marginal("rnn[0]").any()) != is_gate
