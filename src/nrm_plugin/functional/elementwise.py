"""Kernels of elementwise operations: activations, normalization layers and arithmetic.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from zennit.core import Stabilizer
from zennit.rules import Pass

from ..kernels.base import Kernel
from ..kernels.step import step_of
from .function_call import CallInput, FunctionCall
from .function_kernels import HalvesKernel, SplitKernel, total_of
from .registry import kernel_of

STABILIZER = 1e-12
"""Stabilizer in the denominator of signed fractions."""

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
"""Functions with an equivalent module, whose rule applies to them."""

ELEMENTWISE = (
    "log_softmax softmin dropout alpha_dropout feature_dropout feature_alpha_dropout dropout1d dropout2d dropout3d "
    "layer_norm native_layer_norm group_norm rms_norm instance_norm local_response_norm pow float_power exp exp2 expm1 "
    "sqrt rsqrt neg clamp clamp_min clamp_max abs log log2 log10 log1p square reciprocal erf sin cos sinh cosh tan "
    "atan asinh nan_to_num round floor ceil trunc frac sign logit normalize rdiv rpow stochastic_depth fmod remainder "
    "log_sigmoid erfc erfcx erfinv sinc deg2rad rad2deg lgamma digamma atanh acosh acos asin i0 i0e i1 i1e ndtr ndtri "
    "log_ndtr polygamma renorm ldexp"
).split()


@kernel_of(*ACTIVATIONS)
def activation(call: FunctionCall) -> Kernel:
    """Returns the kernel of the equivalent module's rule, or the identity if there is no rule."""
    rule = call.settings.rules.of_module(ACTIVATIONS[call.name]())
    return call.identity() if rule is None or type(rule) is Pass else call._by_rule(rule, is_linear=False)


@kernel_of(*ELEMENTWISE, "div")
def elementwise(call: FunctionCall) -> Kernel:
    """Returns the kernel that passes all relevance to the same element of the first input."""
    return call.identity()


@kernel_of("add", "sub", "rsub")
def addition(call: FunctionCall) -> Kernel:
    r"""Returns the kernel of a sum, which splits relevance in proportion to absolute values.

    .. math:: T_a = \frac{|a|}{|a| + |b|}

    A constant summand is treated as a bias. With ``sums="signed"``, the fractions are ``a / (a + b)``.
    """
    if len(call.inputs) == 1:
        return call.identity()
    alpha = float(call.kwargs.get("alpha", call.args[2] if len(call.args) > 2 else 1))
    factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[call.name]
    summands = [value if factor == 1 else factor * value for factor, value in zip(factors, call.values, strict=True)]
    return _signed_sum(call, summands) if call.settings.sums == "signed" else _absolute_sum(call, summands)


def _signed_sum(call: FunctionCall, summands: list[Tensor]) -> SplitKernel:
    total = Stabilizer(STABILIZER)(total_of(summands))
    return SplitKernel([summand / total for summand in summands], call.shapes, None, False)


def _absolute_sum(call: FunctionCall, summands: list[Tensor]) -> HalvesKernel:
    def sizes() -> tuple[Tensor, Tensor]:
        first, second = (_magnitude(one, item) for one, item in zip(summands, call.inputs, strict=True))
        return first, second

    return HalvesKernel(sizes, call.shapes)


def _magnitude(summand: Tensor, item: CallInput) -> Tensor:
    """Returns the absolute value of a summand.

    If the summand is a sum with no other consumer, the absolute values of its summands are added. As a result,
    ``(a + b) + c``, ``a + (b + c)`` and ``sum([a, b, c])`` split relevance in the same way.
    """
    step = step_of(item.producer)
    if step is not None and step.uses <= 1 and step.rule == "sum":
        kernel = step.kernel
        if isinstance(kernel, HalvesKernel) and kernel.magnitude.shape == summand.shape:
            return kernel.magnitude
    return summand.abs()


@kernel_of("mul")
def product(call: FunctionCall) -> Kernel:
    """Returns the kernel of a multiplication. All relevance passes to the signal and none to the gate.

    If neither factor is a gate, or both are, all relevance passes to the larger tensor, or half to each if they have
    the same size.
    """
    if len(call.inputs) == 1:
        return call.identity()
    if call.gates[0] != call.gates[1]:
        return call.identity(to=call.gates.index(False))
    sizes = [value.numel() for value in call.values]
    return call.split([0.5, 0.5]) if sizes[0] == sizes[1] else call.identity(to=sizes.index(max(sizes)))


@kernel_of("maximum", "minimum")
def extremum(call: FunctionCall) -> Kernel:
    """Returns the kernel that passes relevance to the larger (or smaller) input, or half to each if they are equal."""
    if len(call.inputs) == 1:
        return call.identity()
    first, second = call.values
    wins = (first > second) if call.name == "maximum" else (first < second)
    share = wins.to(first.dtype) + (first == second).to(first.dtype) / 2
    return SplitKernel([share, 1 - share], call.shapes, None, True)


@kernel_of("hypot")
def hypotenuse(call: FunctionCall) -> Kernel:
    """Returns the kernel that splits relevance in proportion to squares, :math:`T_a = a^2 / (a^2 + b^2)`."""
    if len(call.inputs) == 1:
        return call.identity()
    squares = [value.square() for value in call.values]
    total = total_of(squares)
    shares = [torch.where(total == 0, 0.5, square / torch.where(total == 0, 1.0, total)) for square in squares]
    return SplitKernel(shares, call.shapes, None, True)
