"""Batch-norm fusion compared with the rule on the dense matrix of the composed affine map.

Covers: nrm_plugin.canonizers, nrm_plugin.kernels.layer_step.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from zennit.composites import LayerMapComposite
from zennit.rules import Pass
from zennit.types import Activation, BatchNorm, Linear

from nrm_plugin import FuseBatchNorm, RelevanceMeasure
from nrm_plugin.errors import BatchNormWarning
from nrm_plugin.kernels.layer_step import LayerStep
from tests.conftest import in_turn, slow_but, untouched
from tests.nets import zennit_rule
from tests.oracles import AlphaBeta, Epsilon, Gamma, Rule, ZPlus, normalized

pytestmark = pytest.mark.zennit

RULES: tuple[Rule, ...] = (Epsilon(0.1), Epsilon(0.1, zero_params="bias"), ZPlus(), Gamma(), AlphaBeta())
Shape = tuple[int, ...]

LAYERS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "linear, no bias": (lambda: nn.Linear(6, 4, bias=False), (6,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3, padding=1), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3, padding=1), (2, 3, 4)),
    "conv2d, no bias": (lambda: nn.Conv2d(2, 2, 3, padding=1, bias=False), (2, 3, 3)),
    "conv2d, wide padding": (lambda: nn.Conv2d(1, 2, 3, padding=(3, 2)), (1, 2, 3)),
    "conv2d, same": (lambda: nn.Conv2d(2, 2, 3, padding="same"), (2, 3, 3)),
    "conv2d, strided": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 4, 5)),
    "conv2d, dilated": (lambda: nn.Conv2d(1, 2, 3, padding=2, dilation=2), (1, 4, 4)),
    "conv2d, grouped": (lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2), (4, 3, 3)),
    "conv2d, depthwise": (lambda: nn.Conv2d(3, 6, 3, padding=1, groups=3), (3, 3, 3)),
    "conv2d, all at once": (lambda: nn.Conv2d(4, 4, 3, 2, 2, 2, groups=2), (4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(1, 2, 2, padding=1), (1, 2, 3, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1), (2, 3, 2)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, padding=1, groups=2), (4, 3, 3)),
    "transposed1d": (lambda: nn.ConvTranspose1d(2, 2, 3, dilation=2), (2, 3)),
}


def norm_for(layer: nn.Module, channels: int) -> nn.Module:
    rank = 1 if isinstance(layer, nn.Linear) else len(layer.kernel_size)
    return {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[rank](channels)


def drawn(*modules: nn.Module, dead: bool = False) -> nn.Sequential:
    """Modules in series with random weights of both signs; ``dead`` sets the first scale of each norm to zero."""
    generator = torch.Generator().manual_seed(len(modules))
    net = nn.Sequential(*modules).double().eval()
    with torch.no_grad():
        for module in net:
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.normal_(generator=generator)
            if isinstance(module, _BatchNorm):
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight[-1] = -1.5
                if dead:
                    module.weight[0] = 0
    return net


def image(shape: Shape) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1 + sum(shape)), dtype=torch.float64)


def composed(function: Callable[[Tensor], Tensor], shape: Shape) -> nn.Linear:
    """An affine map as one dense layer: the bias is its value at zero, the columns are its values at unit vectors."""
    size = int(np.prod(shape))
    with torch.no_grad():
        bias = function(torch.zeros(1, *shape, dtype=torch.float64)).flatten()
        weight = function(torch.eye(size, dtype=torch.float64).reshape(-1, *shape)).flatten(1) - bias
    dense = nn.Linear(size, len(bias)).double()
    dense.weight.data, dense.bias.data = weight.T.contiguous(), bias
    return dense


def fused(net: nn.Module, a: Tensor, rule: Rule, residual: str = "sink") -> tuple[Tensor, Tensor, RelevanceMeasure]:
    """``T[j, i]`` from every output to the input, the absorbed share of each output, and the measure."""
    shape = net(a[None]).shape[1:]
    units = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    layer_map = [(Activation, Pass()), (BatchNorm, Pass()), (Linear, zennit_rule(rule))]
    composite = LayerMapComposite(layer_map, canonizers=[FuseBatchNorm()])
    x = a.expand(len(units), *a.shape)
    with untouched(net, x), warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        mu = RelevanceMeasure(net, x, start=units, composite=composite, residual=residual)
        return mu.marginal("input").flatten(1), mu.sink("input"), mu


def check(net: nn.Module, a: Tensor, rule: Rule, affine: Callable[[Tensor], Tensor], at: Tensor | None = None) -> None:
    """The kernel of the fused net is the rule on the composed map, at the tensor that it reads.

    Args:
        net: The net.
        a: Its input, without batch.
        rule: The rule.
        affine: The composed map, of a batch.
        at: What it reads; by default the input.
    """
    read = a if at is None else at
    dense = composed(affine, tuple(read.shape))
    # The composed map gives what the net gives: fusion leaves the output alone.
    torch.testing.assert_close(dense(read.flatten()), net(a[None]).flatten(), rtol=1e-10, atol=1e-10)
    for residual in ("sink", "redistribute"):
        expected, sink = normalized(rule(dense, read.flatten()), residual, 2.0)
        T, absorbed, mu = fused(net, a, rule, residual)
        scale = max(1.0, float(np.abs(expected).sum(0).max()))
        assert float((T - torch.as_tensor(expected.T)).abs().max()) <= 1e-9 * scale
        assert float((absorbed - torch.as_tensor(sink)).abs().max()) <= 1e-9 * scale
        check_outputs_of_fused_layers(mu, net, a.expand(len(mu.output), *a.shape))


def returned_by_modules(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The output of every module."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda module, args, output: outputs.update({name: output.detach().clone()})

    handles = [module.register_forward_hook(keep(name)) for name, module in net.named_modules()]
    net(x)
    for handle in handles:
        handle.remove()
    return outputs


def check_outputs_of_fused_layers(mu: RelevanceMeasure, net: nn.Module, x: Tensor, tolerance: float = 1e-10) -> None:
    """Fused layers at their changed inputs return the output of the fused pair in the model."""
    outputs = returned_by_modules(net, x)
    for vertex in mu._recording.graph.vertices:
        step = vertex.step
        if not isinstance(step, LayerStep) or isinstance(step.layer_call.module, (nn.ReLU, _BatchNorm)):
            continue
        assert step.kernel is not None  # building it fuses
        norms = [norm for norm in step.norms if norm.is_identity]
        expected = outputs[norms[0].name if norms else step.name]
        layer = copy.deepcopy(step.layer_call.module)
        bias = layer._parameters["bias"]
        layer._parameters["bias"] = None
        with torch.no_grad():
            returned = step.layer_call.run(layer, step.layer_call.input)
            if bias is not None:  # of each channel, or of each position
                flat = bias.ndim == 1 and returned.ndim > 2
                returned = returned + (bias.reshape(-1, *(1,) * (returned.ndim - 2)) if flat else bias)
        torch.testing.assert_close(returned, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


def cases(*without: str) -> list[object]:
    names = [name for name in LAYERS if not any(word in name for word in without)]
    return [pytest.param(name, rule, id=f"{name}-{rule}") for name in names for rule in RULES]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), cases())
def test_a_layer_before_batch_norm_is_fused_with_it(name, rule):
    make, shape = LAYERS[name]
    layer = make()
    channels = layer(torch.zeros(1, *shape)).shape[1]
    net = drawn(layer, norm_for(layer, channels))
    check(net, image(shape), rule, net)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), cases())
def test_a_layer_after_batch_norm_is_fused_with_it_at_the_borders_too(name, rule):
    make, shape = LAYERS[name]
    net = drawn(norm_for(make(), shape[0]), make())
    check(net, image(shape), rule, net)


@pytest.mark.parametrize("dead", slow_but([False, True], True))
@pytest.mark.parametrize(("name", "rule"), in_turn(LAYERS, RULES))
def test_a_layer_after_batch_norm_and_relu_is_fused_with_both(name, rule, dead):
    r"""``ReLU(g x + h) = g (clip(x) − t)`` with ``t = −h / g``; where ``g = 0`` it is the constant ``max(h, 0)``."""
    make, shape = LAYERS[name]
    norm, layer = norm_for(make(), shape[0]), make()
    net = drawn(norm, nn.ReLU(), layer, dead=dead)
    assert bool((norm.weight < 0).any()) or (dead and shape[0] == 1)
    live = bool(net[:2](image(shape)[None]).any())  # the sign of an exact zero would be that of its rounding
    assert live or (dead and shape[0] == 1)
    g = (norm.weight / torch.sqrt(norm.running_var + norm.eps)).detach()
    h = norm.bias.detach() - norm.running_mean * g
    a = image(shape)
    clipped = a.clone()
    constant = torch.zeros(shape[0], dtype=torch.float64)
    for channel in range(shape[0]):
        if g[channel] > 0:
            clipped[channel] = a[channel].clamp(min=float(-h[channel] / g[channel]))
        elif g[channel] < 0:
            clipped[channel] = a[channel].clamp(max=float(-h[channel] / g[channel]))
        else:
            clipped[channel] = 0
            constant[channel] = h[channel].clamp(min=0)
    view = (-1, *(1,) * (len(shape) - 1))

    def affine(z: Tensor) -> Tensor:
        """The layer on ``g (z − t) = g z + h``, in the form in which it is zero where the ReLU is."""
        return layer(g.reshape(view) * z + torch.where(g == 0, constant, h).reshape(view))

    check(net, a, rule, affine, at=clipped)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_batch_norm_is_fused_through_flattening(rule):
    net = drawn(nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(12, 3))
    check(net, image((2, 3, 2)), rule, net)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_layer_between_two_batch_norms_is_fused_with_both(rule):
    net = drawn(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3))
    check(net, image((2, 3, 3)), rule, net)


@pytest.mark.parametrize("mode", ["reflect", "circular", "replicate"])
def test_padding_that_repeats_entries(mode):
    """A batch norm after such a layer is fused exactly; one before it stays the identity."""
    conv = nn.Conv2d(2, 3, 3, padding=1, padding_mode=mode)
    rule = Epsilon(0.1)
    net = drawn(conv, nn.BatchNorm2d(3))
    check(net, image((2, 3, 3)), rule, net)
    net = drawn(nn.BatchNorm2d(2), conv)
    a = image((2, 3, 3))
    dense = composed(conv, (2, 3, 3))
    T, _, _ = fused(net, a, rule)
    expected = rule(dense, net[0](a[None])[0].detach().flatten())
    assert float((T - torch.as_tensor(expected.T)).abs().max()) <= 1e-9


def test_a_bias_for_each_channel_would_be_wrong_at_the_border():
    """With zero padding the exact bias depends on the position."""
    net = drawn(nn.BatchNorm2d(1), nn.Conv2d(1, 1, 3, padding=1))
    dense = composed(net, (1, 4, 4))
    bias = dense.bias.detach().reshape(4, 4)
    assert float((bias[1:-1, 1:-1] - bias[1, 1]).abs().max()) <= 1e-12
    assert float((bias[0] - bias[1, 1]).abs().min()) > 1e-3
    dense.bias.data = torch.full_like(dense.bias, float(bias[1, 1]))
    T, _, _ = fused(net, image((1, 4, 4)), Epsilon(0.1))
    naive = torch.as_tensor(Epsilon(0.1)(dense, image((1, 4, 4)).flatten()).T)
    off = (T - naive).abs().amax(1).reshape(4, 4)
    assert float(off[1:-1, 1:-1].max()) <= 1e-9
    assert float(off[0].max()) > 1e-3


class Shared(nn.Module):
    """The output of a layer is read by a batch norm and by a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return torch.cat([y, self.norm(y)], 1)


def test_a_layer_with_another_reader_is_not_fused():
    conv = drawn(nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2))
    net = Shared().double().eval()
    net.conv, net.norm = conv[0], conv[1]
    a, rule = image((2, 3, 3)), Epsilon(0.1)
    expected = torch.as_tensor(rule(composed(net.conv, (2, 3, 3)), a.flatten()).T)
    T, _, _ = fused(net, a, rule)
    assert float((T - torch.cat([expected, expected])).abs().max()) <= 1e-9


@pytest.mark.parametrize(
    "net",
    [
        lambda: drawn(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)),
        lambda: drawn(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, 2, 1)),
        lambda: drawn(nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 8, 3, padding=1)),
        lambda: drawn(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 64, 8)),
    ],
    ids=["conv, norm", "norm, conv", "norm, relu, conv", "norm, dense"],
)
def test_the_logits_are_the_same_in_single_precision(net):
    net = net().float()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    head = nn.Sequential(*net, nn.Flatten()).eval()
    layer_map = [(Activation, Pass()), (BatchNorm, Pass()), (Linear, zennit_rule(Epsilon(0.1)))]
    composite = LayerMapComposite(layer_map, canonizers=[FuseBatchNorm()])
    with untouched(head, x), warnings.catch_warnings():
        warnings.simplefilter("ignore", BatchNormWarning)
        mu = RelevanceMeasure(head, x, [0, 1], composite=composite)
        mu.marginal("input")
    torch.testing.assert_close(mu.output, head(x)[[0, 1], [0, 1]].detach(), rtol=0, atol=0)
    check_outputs_of_fused_layers(mu, head, x, tolerance=1e-5)


# -- the warning ----------------------------------------------------------------------------------------------------


def dense_pair(first: bool, bias: float) -> nn.Sequential:
    """A dense layer and a batch norm with this shift."""
    torch.manual_seed(0)
    norm, dense = nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False)
    nn.init.constant_(norm.bias, bias)
    nn.init.uniform_(dense.weight, 0.1, 1)
    net = nn.Sequential(norm, dense) if first else nn.Sequential(dense, norm)
    return net.double().eval()


def warned(net: nn.Module, canonizers: list[object]) -> list[str]:
    layer_map = [(Activation, Pass()), (BatchNorm, Pass()), (Linear, zennit_rule(Epsilon(1e-6)))]
    composite = LayerMapComposite(layer_map, canonizers=canonizers)
    x = torch.rand(2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.5
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        RelevanceMeasure(net, x, [0, 1], composite=composite).marginal("input")
    return [str(item.message) for item in caught if issubclass(item.category, BatchNormWarning)]


@pytest.mark.parametrize("first", [False, True], ids=["dense, norm", "norm, dense"])
def test_a_warning_where_the_bias_of_dense_and_norm_takes_most_of_the_mass(first):
    (message,) = warned(dense_pair(first, 10.0), [FuseBatchNorm()])
    assert f"linear layer '{int(first)}'" in message
    assert "2002.11018" in message
    assert not warned(dense_pair(first, 0.01), [FuseBatchNorm()])
    assert not warned(dense_pair(first, 10.0), [])


def test_no_warning_for_a_convolution_whose_bias_takes_most_of_the_mass():
    net = nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1), nn.Flatten(), nn.Linear(4, 2)).double().eval()
    nn.init.constant_(net[1].bias, 100.0)
    reshaped = nn.Sequential(nn.Unflatten(1, (1, 4)), net).eval()
    assert not warned(reshaped, [FuseBatchNorm()])
