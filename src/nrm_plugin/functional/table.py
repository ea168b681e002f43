"""Kernels of operations that are no module.

Source: MEASURE, section 5 (ours).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Stabilizer
from zennit.rules import Norm, Pass

from ..errors import UnsupportedOperationError
from ..kernels import Kernel
from ..layers import Weighted, Weightless
from ..reading import PlainGradient, read_rule
from ..rules import Absolute
from ..steps import LayerCall, Saved
from .opaque import Unknown, uncovered
from .registry import FunctionCall, Slot, fill, kernel

STABILIZER = 1e-12
"""Denominator of a signed share that is exactly zero."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "rrelu": nn.RReLU,
    "sigmoid": nn.Sigmoid,
    "hardsigmoid": nn.Hardsigmoid,
    "logsigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
    "hardshrink": nn.Hardshrink,
    "softshrink": nn.Softshrink,
    "threshold": lambda: nn.Threshold(0.0, 0.0),
    "batch_norm": lambda: nn.BatchNorm2d(1),
}
"""Functions that are modules too; they get the rule of that module."""

ELEMENTWISE = (
    "softmax log_softmax softmin dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d "
    "dropout3d layer_norm native_layer_norm group_norm rms_norm instance_norm local_response_norm pow float_power exp "
    "exp2 expm1 sqrt rsqrt neg clamp clamp_min clamp_max abs log log2 log10 log1p square reciprocal erf sin cos sinh "
    "cosh tan atan asinh nan_to_num round floor ceil trunc frac sign logit normalize rdiv rpow stochastic_depth "
    "fmod remainder sigmoid_ log_sigmoid erfc erfcx erfinv sinc deg2rad rad2deg lgamma digamma atanh acosh acos asin "
    "i0 i0e i1 i1e ndtr ndtri log_ndtr"
).split()


class BroadcastKernel(Kernel):
    """Hands everything to one of the inputs, summed over the dimensions in which it was broadcast.

    Args:
        shapes: Shape of each input.
        signal: Number of the input that gets all.
    """

    is_stochastic = True

    def __init__(self, shapes: Sequence[torch.Size], signal: int = 0) -> None:
        self.shapes, self.signal = list(shapes), signal

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            reduced(relevance, shape) if number == self.signal else relevance.new_zeros((len(relevance), *shape))
            for number, shape in enumerate(self.shapes)
        )

    pull_absolute = pull


class SplitKernel(Kernel):
    r"""Shares relevance among inputs, elementwise: :math:`T_k = q_k / \sum_k q_k`.

    Args:
        shares: One for each input, the shape of the output.
        shapes: Shape of each input.
        magnitude: Σ of the magnitudes, for a sum that this sum is a part of.
        is_stochastic: Whether the shares sum to one exactly.
    """

    def __init__(
        self, shares: list[Tensor], shapes: list[torch.Size], magnitude: Tensor | None, is_stochastic: bool
    ) -> None:
        self.shares, self.shapes, self.magnitude, self.is_stochastic = shares, shapes, magnitude, is_stochastic

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.shares, self.shapes, strict=True)
        return tuple(reduced(relevance * share, shape) for share, shape in pairs)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        pairs = zip(self.shares, self.shapes, strict=True)
        return tuple(reduced(relevance * share.abs(), shape) for share, shape in pairs)

    def column_sum(self, like: Tensor) -> Tensor:
        return torch.stack([share.expand_as(like) for share in self.shares]).sum(0)


def reduced(relevance: Tensor, shape: torch.Size) -> Tensor:
    """``(K, *out)`` summed over the dimensions in which an input of this shape was broadcast."""
    lead = relevance.ndim - 1 - len(shape)
    return relevance.sum_to_size((len(relevance), *(1,) * lead, *shape)).reshape(len(relevance), *shape)


def _shapes(call: FunctionCall) -> list[torch.Size]:
    return [value.shape for value in call.values]


@kernel(*ACTIVATIONS)
def activation(call: FunctionCall) -> Kernel:
    """The rule of the module twin, else the identity."""
    rule = call.rules.of_module(ACTIVATIONS[call.name]())
    if rule is None or type(rule) is Pass:
        return BroadcastKernel(_shapes(call))
    return _by_rule(rule, call)


@kernel(*ELEMENTWISE)
def elementwise(call: FunctionCall) -> Kernel:
    """The identity per element; all to the first input, the others are gates."""
    return BroadcastKernel(_shapes(call))


@kernel("add", "sub", "rsub")
def addition(call: FunctionCall) -> Kernel:
    r"""Sums share by absolute contribution; a constant is a bias.

    .. math:: T_a = \frac{|a|}{|a| + |b|}
    """
    if len(call.saved) == 1:
        return BroadcastKernel(_shapes(call))
    alpha = float(call.kwargs.get("alpha", call.args[2] if len(call.args) > 2 else 1))
    factors = [1.0, alpha] if call.name == "add" else [1.0, -alpha] if call.name == "sub" else [-alpha, 1.0]
    return split(call, [factor * value for factor, value in zip(factors, call.values, strict=True)])


def split(call: FunctionCall, parts: list[Tensor]) -> SplitKernel:
    """The kernel of a sum of parts."""
    total = total_of(parts)
    if call.sums == "signed":
        stabilize = Stabilizer(STABILIZER)
        shares = [part / stabilize(total) for part in parts]
        return SplitKernel(shares, _shapes(call), None, False)
    sizes = [_magnitude(part, producer) for part, producer in zip(parts, call.producers, strict=True)]
    # Where all are zero, they share alike; to look for zeros would take longer than all the rest.
    raised = [size + 1e-30 for size in sizes]
    factor = total_of(raised).reciprocal()
    return SplitKernel([size * factor for size in raised], _shapes(call), total_of(sizes), True)


def total_of(parts: Sequence[Tensor]) -> Tensor:
    """Sum of tensors."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _magnitude(part: Tensor, producer: Any) -> Tensor:
    """|part|, or for a part that is itself a sum read here only, the sum of its magnitudes.

    So ``(a + b) + c``, ``a + (b + c)`` and ``sum([a, b, c])`` share alike.
    """
    step = getattr(producer, "step", None)
    if step is not None and step.uses <= 1 and step.rule == "sum":
        inner = step.kernel.magnitude if isinstance(step.kernel, SplitKernel) else None
        if inner is not None and inner.shape == part.shape:
            return inner
    return part.abs()


@kernel("mul")
def product(call: FunctionCall) -> Kernel:
    """All to the signal; without a known gate the larger operand, else halves."""
    return weighting(call)


def weighting(call: FunctionCall) -> Kernel:
    """The kernel of ``a * b``."""
    shapes = _shapes(call)
    if len(shapes) == 1:
        return BroadcastKernel(shapes)
    if call.gates[0] != call.gates[1]:
        return BroadcastKernel(shapes, signal=call.gates.index(False))
    sizes = [shape.numel() for shape in shapes]
    if sizes[0] != sizes[1]:
        return BroadcastKernel(shapes, signal=sizes.index(max(sizes)))
    half = torch.full_like(call.values[0], 0.5)
    return SplitKernel([half, half], shapes, None, True)


@kernel("div")
def quotient(call: FunctionCall) -> Kernel:
    """All to the numerator."""
    return BroadcastKernel(_shapes(call))


@kernel("maximum", "minimum")
def pick(call: FunctionCall) -> Kernel:
    """The larger (smaller) of two gets all; equal ones half each."""
    if len(call.saved) == 1:
        return BroadcastKernel(_shapes(call))
    first, second = call.values
    wins = (first > second) if call.name == "maximum" else (first < second)
    share = wins.to(first.dtype) + (first == second).to(first.dtype) / 2
    return SplitKernel([share, 1 - share], _shapes(call), None, True)


@kernel("hypot")
def length(call: FunctionCall) -> Kernel:
    r"""The legs of a right triangle share by their squares: :math:`T_a = a^2 / (a^2 + b^2)`."""
    if len(call.saved) == 1:
        return BroadcastKernel(_shapes(call))
    squares = [value.square() for value in call.values]
    whole = total_of(squares)
    shares = [torch.where(whole == 0, 0.5, square / torch.where(whole == 0, 1.0, whole)) for square in squares]
    return SplitKernel(shares, _shapes(call), None, True)


POOLS = (
    "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "lp_pool2d interpolate upsample upsample_bilinear grid_sample cumsum roi_align fold col2im"
).split()


_BICUBIC = (
    "relevance arrived at 'grid_sample' with mode='bicubic', whose weights may be negative; it has no kernel. Use "
    "mode='bilinear', or tell how it hands relevance down: decorate a function with "
    "nrm_plugin.register_kernel(torch.nn.functional.grid_sample)."
)


@kernel(*POOLS)
def pooling(call: FunctionCall) -> Kernel:
    """Averages: by the composite's rule of average pooling."""
    if len(call.saved) > 1:
        return _first_only(call, pooling)
    mode = str(call.argument(3, "mode", "nearest")) if call.name in ("interpolate", "upsample") else ""
    if mode.startswith("nearest"):
        return _by_rule(PlainGradient(), call)  # a route: nothing is averaged
    if call.name == "grid_sample" and call.argument(2, "mode", "bilinear") == "bicubic":
        return Unknown(UnsupportedOperationError(_BICUBIC), _shapes(call))
    rule = call.rules.of_module(nn.AvgPool2d(1))
    if rule is None or _is_sum_of_stack(call):
        rule = Absolute()
    if mode == "bicubic" and isinstance(rule, Absolute):
        call = _without_signs(call)
    return _by_rule(rule, call)


def _without_signs(call: FunctionCall) -> FunctionCall:
    r"""Bicubic interpolation :math:`A X B^\top`, whose weights may be negative, as :math:`|A| X |B|^\top`."""
    value = call.values[0]
    height, width = value.shape[-2:]

    def along(unit: Tensor) -> Tensor:
        # One channel for each entry along one dimension, the same everywhere along the other: its weights sum to one.
        return call.run(unit.expand(len(unit), height, width).unsqueeze(0))[0].abs()  # type: ignore[no-any-return]

    with torch.no_grad():
        rows = along(torch.eye(height, dtype=value.dtype, device=value.device).unsqueeze(2))[:, :, 0]
        columns = along(torch.eye(width, dtype=value.dtype, device=value.device).unsqueeze(1))[:, 0, :]
    return dataclasses.replace(call, function=lambda source: rows.T @ source @ columns, args=(Slot(0),), kwargs={})


def _is_sum_of_stack(call: FunctionCall) -> bool:
    """``torch.stack([a, b]).sum(dim)`` is a sum like ``a + b``."""
    return call.name == "sum" and "Stack" in str(getattr(call.producers[0], "name", lambda: "")())


def _first_only(call: FunctionCall, handler: Callable[[FunctionCall], Kernel]) -> Kernel:
    """A kernel in which every input but the first is a constant."""
    fixed = call.values
    single = FunctionCall(
        call.name,
        lambda first: call.run(first, *fixed[1:]),
        call.path,
        (Slot(0),),
        {},
        call.saved[:1],
        call.gates[:1],
        call.producers[:1],
        call.rules,
        call.sums,
    )
    return PlacedKernel(handler(single), 0, _shapes(call))


class PlacedKernel(Kernel):
    """A kernel of one input of a call; the other inputs get nothing.

    Args:
        inner: The kernel of the one input.
        place: Its number.
        shapes: Shape of each input.
    """

    def __init__(self, inner: Kernel, place: int, shapes: list[torch.Size]) -> None:
        self.inner, self.place, self.shapes = inner, place, shapes
        self.is_stochastic = inner.is_stochastic

    def reach(self, relevance: Tensor | None) -> bool:
        return self.inner.reach(relevance)

    def _put(self, part: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            part if number == self.place else part.new_zeros((len(part), *shape))
            for number, shape in enumerate(self.shapes)
        )

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self._put(self.inner.pull(relevance)[0])

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self._put(self.inner.pull_absolute(relevance)[0])

    def column_sum(self, like: Tensor) -> Tensor:
        return self.inner.column_sum(like)


def _by_rule(rule: Any, call: FunctionCall) -> Kernel:
    """A rule on the function as a module without weights."""
    shell = Weightless(call.run)
    value = call.values[0]
    with torch.no_grad():
        output = shell(value)
    return read_rule(rule.copy(), shell, _forward, value, output, call.path)


LAYERS: dict[str, Callable[[], nn.Module]] = {  # on a device without values, so that no random number is drawn
    "linear": lambda: nn.Linear(1, 1, device="meta"),
    "conv1d": lambda: nn.Conv1d(1, 1, 1, device="meta"),
    "conv2d": lambda: nn.Conv2d(1, 1, 1, device="meta"),
    "conv3d": lambda: nn.Conv3d(1, 1, 1, device="meta"),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(1, 1, 1, device="meta"),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(1, 1, 1, device="meta"),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(1, 1, 1, device="meta"),
}


def layer_call(call: FunctionCall, output: Tensor | None = None) -> LayerCall | None:
    """A layer or batch normalization called as a function, as the call of a module; None for anything else."""
    if len(call.saved) != 1 or not isinstance(call.argument(0, "input"), Slot):
        return None
    if call.name == "batch_norm":
        return _norm_call(call)
    if call.name not in LAYERS:
        return None
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    rest, options = call.args[3:], {k: v for k, v in call.kwargs.items() if k not in ("input", "weight", "bias")}
    transposed = call.name.startswith("conv_transpose")
    groups = int(call.argument(6, "groups", 1)) if call.name != "linear" else 1

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = call.function(source, weight, bias, *rest, **options)
        return result

    like = LAYERS[call.name]()
    rule = call.rules.of_weight(weight, like)
    assert rule is not None, "looked up when the function ran"
    dim = -1 if call.name == "linear" else 1
    added = None if bias is None else bias.detach()
    shell = Weighted(run, weight.detach(), added, dim, groups, transposed, twin=_twin(call, like))
    kept = None if output is None else Saved(output)
    return LayerCall(rule.copy(), shell, _forward, call.saved[0], call.path, output=kept)


def _twin(call: FunctionCall, like: nn.Module) -> nn.Module:
    """A layer of torch with the options of the call."""
    if isinstance(like, nn.modules.conv._ConvNd):
        count = len(like.kernel_size)
        given = {
            "stride": call.argument(3, "stride", 1),
            "padding": call.argument(4, "padding", 0),
            "output_padding": call.argument(5, "output_padding", 0) if like.transposed else 0,
            "dilation": call.argument(7 if like.transposed else 5, "dilation", 1),
        }
        for option, value in given.items():
            setattr(like, option, value if isinstance(value, str) else _repeated(value, count))
        like.groups = int(call.argument(6, "groups", 1))
        like.kernel_size = tuple(call.argument(1, "weight").shape[2:])
    return like


def _repeated(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """An option of a convolution for each of its dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def _norm_call(call: FunctionCall) -> LayerCall | None:
    """``F.batch_norm`` as the module that it is the twin of."""
    # torch.batch_norm takes nine arguments in another order, F.batch_norm at most eight.
    swapped = len(call.args) + len(call.kwargs) > 8
    weight_at, mean_at = (1, 3) if swapped else (3, 1)
    mean, var = call.argument(mean_at, "running_mean"), call.argument(mean_at + 1, "running_var")
    if mean is None or var is None or call.argument(5, "training", False):
        return None
    weight, bias = call.argument(weight_at, "weight"), call.argument(weight_at + 1, "bias")
    twin = nn.BatchNorm2d(len(mean), eps=call.argument(7, "eps", 1e-5)).eval()
    twin.running_mean, twin.running_var = mean.detach(), var.detach()
    ones = torch.ones_like(mean)
    twin.weight = nn.Parameter(ones if weight is None else weight.detach(), requires_grad=False)
    twin.bias = nn.Parameter(torch.zeros_like(ones) if bias is None else bias.detach(), requires_grad=False)
    rule = call.rules.of_module(twin)
    return LayerCall(Pass() if rule is None else rule.copy(), twin, _normed, call.saved[0], call.path)


def _forward(module: nn.Module, source: Tensor) -> Tensor:
    result: Tensor = module.forward(source)
    return result


def _normed(module: nn.Module, source: Tensor) -> Tensor:
    """Batch normalization of any rank: the twin is made for images."""
    assert isinstance(module, nn.BatchNorm2d)
    return nn.functional.batch_norm(
        source, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
    )


@kernel("deform_conv2d")
def deformable(call: FunctionCall) -> Kernel:
    """A convolution that reads where offsets say: by the rule of the module that owns the weight."""
    weight, bias, fixed = call.args[1], call.args[4], tuple(call.values[1:])
    if not isinstance(call.args[0], Slot) or isinstance(weight, Slot):
        return Unknown(UnsupportedOperationError(_DEFORMED), _shapes(call))

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        filled = fill(call.args, (source, *fixed))
        none = weight.new_zeros(len(weight))
        result: Tensor = call.function(source, weight, *filled[2:4], none if bias is None else bias, *filled[5:])
        return result

    # Where two points lie between the same pixels, an input meets an output through two weights, as in a padding.
    return weighted(call, run, weight, bias, nn.Conv2d(1, 1, 1, device="meta"), 1, "computed")


_DEFORMED = (
    "relevance arrived at 'deform_conv2d' whose weight is computed by the model, which has no kernel. Tell how it "
    "hands relevance down: decorate a function with nrm_plugin.register_kernel(torch.ops.torchvision.deform_conv2d)."
)


def weighted(
    call: FunctionCall,
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    weight: Tensor,
    bias: Tensor | None,
    like: nn.Module,
    bias_dim: int = -1,
    padding_mode: str = "zeros",
) -> Kernel:
    """A function that is affine in its one input and linear in a constant weight, by the rule of a layer."""
    rule = call.rules.of_weight(weight, like)
    if rule is None:  # raised in an operator such as @, Python would take it for operands that do not fit
        return Unknown(uncovered(call.path, like, call.name), _shapes(call))
    shell = Weighted(run, weight.detach(), None if bias is None else bias.detach(), bias_dim, padding_mode=padding_mode)
    value = call.values[0]
    with torch.no_grad():
        output = shell(value)
    kernel_ = read_rule(rule.copy(), shell, _forward, value, output, call.path)
    return kernel_ if len(call.saved) == 1 else PlacedKernel(kernel_, 0, _shapes(call))


@kernel("matmul", "einsum", "tensordot", *LAYERS)
def contraction(call: FunctionCall) -> Kernel:
    """With a constant matrix a linear layer; of two computed tensors, all to the one that is no gate.

    So are layers whose weight is computed; others are read as :func:`layer_call` before.
    """
    values = call.values
    if len(values) == 1:
        return _with_constant(call)
    everyone = range(len(values))
    if call.attention == "halves":
        halves: dict[int, Kernel] = {number: _share_in(call, number, Norm(STABILIZER)) for number in everyone}
        return HalvesKernel(halves, _shapes(call))
    signals = [number for number in everyone if not call.gates[number]] or list(everyone)
    largest = max(values[number].numel() for number in signals)
    signals = [number for number in signals if values[number].numel() == largest]
    if len(signals) == 1:
        return PlacedKernel(_share_in(call, signals[0], Absolute()), signals[0], _shapes(call))
    return HalvesKernel({number: _share_in(call, number, Absolute()) for number in signals}, _shapes(call))


def _with_constant(call: FunctionCall) -> Kernel:
    """A product with a constant as a linear layer, whose weight has a row for each output, as torch's have."""
    constants = [value for value in _tensors(call.args, call.kwargs) if value.is_floating_point()]
    if not constants:  # einsum of one tensor only adds up and turns
        return pooling(call)
    constant = constants[0]
    matrix, restored, is_layer = as_matrix(call, constant)

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        factor = restored(weight)
        swapped = [_swap(value, constant, factor) for value in call.args]
        keywords = {key: _swap(value, constant, factor) for key, value in call.kwargs.items()}
        filled = FunctionCall(
            call.name, call.function, call.path, tuple(swapped), keywords, call.saved, call.gates, (), call.rules
        )
        return filled.run(source)  # type: ignore[no-any-return]

    like = nn.Linear(1, 1, device="meta")
    if is_layer:
        return weighted(call, run, matrix, None, like)
    # Weights meet inputs in another way than those of a layer: no channel matrix is read off them.
    kernel_ = weighted(call, run, matrix, None, like, padding_mode="computed")
    return PlacedKernel(kernel_, 0, _shapes(call))


def channel_dim(call: FunctionCall) -> int | None:
    """Where a function puts its channels: last where it works on features, 1 on images; None for anything else."""
    if call.name in LAYERS:
        return -1 if call.name == "linear" else 1
    if call.name in ("matmul", "einsum", "tensordot") and len(call.saved) == 1:
        constants = [value for value in _tensors(call.args, call.kwargs) if value.is_floating_point()]
        return -1 if constants and as_matrix(call, constants[0])[2] else None
    return -1 if call.name == "scaled_dot_product_attention" else None


def as_matrix(call: FunctionCall, constant: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor], bool]:
    """A constant factor with a row for each output.

    Returns:
        The matrix, a function that makes the factor of it again, and whether this is a layer over the last dimension.
    """
    if call.name == "einsum":
        found = _by_letters(call, constant)
        if found is not None:
            return found
    if call.name != "einsum" and constant.ndim == 2 and isinstance(call.argument(0, "input"), Slot):
        return constant.T, lambda weight: weight.T, True
    if call.name == "matmul" and constant.ndim > 2:
        last = isinstance(call.argument(0, "input"), Slot)
        rows = constant.transpose(-1, -2) if last else constant
        shape = rows.shape

        def restored(weight: Tensor) -> Tensor:
            factor = weight.reshape(shape)
            return factor.transpose(-1, -2) if last else factor

        return rows.flatten(0, -2), restored, False
    return constant, lambda weight: weight, False


def _by_letters(call: FunctionCall, constant: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor], bool] | None:
    """The same for ``einsum``: the letters of the factor that are in the output are its rows."""
    equation, operands = call.args[0], list(call.args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return None
    left, made = equation.replace(" ", "").split("->")
    words = left.split(",")
    own, other = (words[0], words[1]) if operands[0] is constant else (words[1], words[0])
    rows, columns = [letter for letter in own if letter in made], [letter for letter in own if letter not in made]
    if len(set(own)) < len(own):
        return None
    order = [own.index(letter) for letter in (*rows, *columns)]
    back = [order.index(place) for place in range(len(order))]
    turned = constant.permute(order)
    if len(rows) == len(columns) == 1:
        is_layer = made[-1] == rows[0] and other[-1] == columns[0] and rows[0] not in other
        return turned, lambda weight: weight.permute(back), is_layer
    shape, size = turned.shape, math.prod(turned.shape[: len(rows)])
    return turned.reshape(size, -1), lambda weight: weight.reshape(shape).permute(back), False


def _share_in(call: FunctionCall, signal: int, rule: Absolute | Norm) -> Kernel:
    """Share in one factor of a product, the others held."""
    values = [value.abs() for value in call.values] if isinstance(rule, Absolute) else call.values

    def run(source: Tensor) -> Tensor:
        return call.run(*[source if number == signal else value for number, value in enumerate(values)])  # type: ignore[no-any-return]

    shell = Weightless(run)
    with torch.no_grad():
        output = shell(values[signal])
    return read_rule(rule, shell, _forward, values[signal], output, call.path)


class HalvesKernel(Kernel):
    """An equal part of the relevance by the kernel of each of some factors; nothing to the others.

    Args:
        kernels: By number of the factor.
        shapes: Shape of every factor.
    """

    def __init__(self, kernels: dict[int, Kernel], shapes: list[torch.Size]) -> None:
        self.kernels, self.shapes = kernels, shapes

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        part = relevance / len(self.kernels)
        return self._put({number: kernel_.pull(part)[0] for number, kernel_ in self.kernels.items()}, relevance)

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        part = relevance / len(self.kernels)
        parts = {number: kernel_.pull_absolute(part)[0] for number, kernel_ in self.kernels.items()}
        return self._put(parts, relevance)

    def _put(self, parts: dict[int, Tensor], relevance: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            parts[number] if number in parts else relevance.new_zeros((len(relevance), *shape))
            for number, shape in enumerate(self.shapes)
        )

    def column_sum(self, like: Tensor) -> Tensor:
        return total_of([kernel_.column_sum(like) for kernel_ in self.kernels.values()]) / len(self.kernels)


def _tensors(args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += _tensors(value, {})
    return found


def _swap(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, (list, tuple)):
        return type(value)(_swap(item, old, new) for item in value)
    return value


__all__ = ["BroadcastKernel", "HalvesKernel", "PlacedKernel", "SplitKernel", "split"]
