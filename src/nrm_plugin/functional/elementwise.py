"""Kernels of operations that are no module.

Source: MEASURE, section 5 (ours).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Stabilizer
from zennit.rules import Pass

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.rule_reader import PlainGradient, read_rule_at
from ..model.affine import Weightless
from ..rules import Absolute
from .registry import FunctionCall, Slot, kernel
from .unknown import Unknown

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


def shapes_of(call: FunctionCall) -> list[torch.Size]:
    """Shapes of the tensors that carry relevance."""
    return [value.shape for value in call.values]


@kernel(*ACTIVATIONS)
def activation(call: FunctionCall) -> Kernel:
    """The rule of the module twin, else the identity."""
    rule = call.rules.of_module(ACTIVATIONS[call.name]())
    if rule is None or type(rule) is Pass:
        return BroadcastKernel(shapes_of(call))
    return by_rule(rule, call)


@kernel(*ELEMENTWISE)
def elementwise(call: FunctionCall) -> Kernel:
    """The identity per element; all to the first input, the others are gates."""
    return BroadcastKernel(shapes_of(call))


@kernel("add", "sub", "rsub")
def addition(call: FunctionCall) -> Kernel:
    r"""Sums share by absolute contribution; a constant is a bias.

    .. math:: T_a = \frac{|a|}{|a| + |b|}
    """
    if len(call.saved) == 1:
        return BroadcastKernel(shapes_of(call))
    alpha = float(call.kwargs.get("alpha", call.args[2] if len(call.args) > 2 else 1))
    factors = [1.0, alpha] if call.name == "add" else [1.0, -alpha] if call.name == "sub" else [-alpha, 1.0]
    return split(call, [factor * value for factor, value in zip(factors, call.values, strict=True)])


def split(call: FunctionCall, parts: list[Tensor]) -> SplitKernel:
    """The kernel of a sum of parts."""
    total = total_of(parts)
    if call.sums == "signed":
        stabilize = Stabilizer(STABILIZER)
        shares = [part / stabilize(total) for part in parts]
        return SplitKernel(shares, shapes_of(call), None, False)
    sizes = [_magnitude(part, producer) for part, producer in zip(parts, call.producers, strict=True)]
    # Where all are zero, they share alike; to look for zeros would take longer than all the rest.
    raised = [size + 1e-30 for size in sizes]
    factor = total_of(raised).reciprocal()
    return SplitKernel([size * factor for size in raised], shapes_of(call), total_of(sizes), True)


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
    shapes = shapes_of(call)
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
    return BroadcastKernel(shapes_of(call))


@kernel("maximum", "minimum")
def pick(call: FunctionCall) -> Kernel:
    """The larger (smaller) of two gets all; equal ones half each."""
    if len(call.saved) == 1:
        return BroadcastKernel(shapes_of(call))
    first, second = call.values
    wins = (first > second) if call.name == "maximum" else (first < second)
    share = wins.to(first.dtype) + (first == second).to(first.dtype) / 2
    return SplitKernel([share, 1 - share], shapes_of(call), None, True)


@kernel("hypot")
def length(call: FunctionCall) -> Kernel:
    r"""The legs of a right triangle share by their squares: :math:`T_a = a^2 / (a^2 + b^2)`."""
    if len(call.saved) == 1:
        return BroadcastKernel(shapes_of(call))
    squares = [value.square() for value in call.values]
    whole = total_of(squares)
    shares = [torch.where(whole == 0, 0.5, square / torch.where(whole == 0, 1.0, whole)) for square in squares]
    return SplitKernel(shares, shapes_of(call), None, True)


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
        return by_rule(PlainGradient(), call)  # a route: nothing is averaged
    if call.name == "grid_sample" and call.argument(2, "mode", "bilinear") == "bicubic":
        return Unknown(UnsupportedOperationError(_BICUBIC), shapes_of(call))
    rule = call.rules.of_module(nn.AvgPool2d(1))
    if rule is None or _is_sum_of_stack(call):
        rule = Absolute()
    if mode == "bicubic" and isinstance(rule, Absolute):
        call = _without_signs(call)
    return by_rule(rule, call)


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
    return PlacedKernel(handler(single), 0, shapes_of(call))


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

    def complete_for(self, relevance: Tensor | None) -> bool:
        return self.inner.complete_for(relevance)

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


def by_rule(rule: Any, call: FunctionCall) -> Kernel:
    """A rule on the function as a module without weights."""
    return read_rule_at(rule, Weightless(call.run), call.values[0], call.path)
