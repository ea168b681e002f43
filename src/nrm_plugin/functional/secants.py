r"""Secant (finite-difference) kernels of elementwise functions, sums and products.

.. math:: \frac{\varphi(z) - \varphi(z^0)}{z - z^0}, \qquad
    ab - a^0 b^0 = \frac{b + b^0}{2} (a - a^0) + \frac{a + a^0}{2} (b - b^0)

The inputs of a function of several tensors are changed one at a time, and the slopes are averaged over all orders.

Source: docs/differences.md.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels.base import Kernel
from .differences import DifferenceCall, secant_of
from .elementwise import ACTIVATIONS, ELEMENTWISE
from .function_call import Slot
from .function_kernels import SplitKernel

NOT_ELEMENTWISE = frozenset(
    "log_softmax softmin layer_norm native_layer_norm group_norm rms_norm instance_norm local_response_norm "
    "normalize renorm".split()
)
CONVERSIONS = ("to", "type", "type_as", "float", "double", "half", "bfloat16")
"""Functions that convert their first argument to another dtype or device."""
CLOSE = 0.7
"""Exponent of the machine epsilon ε. For relative differences below ``ε ** CLOSE``, slopes are derivatives."""


def change(
    function: Callable[[Tensor], Tensor], pair: tuple[Tensor, Tensor], difference: Tensor | None = None
) -> Tensor:
    """Computes the change of an elementwise function between two points, by linearization where they are close.

    Args:
        function: Function that acts on each element separately.
        pair: The two points, which broadcast to the shape of the output.
        difference: The difference between the two points. Zeros may be replaced by tiny numbers.
    """
    run = pair[0] - pair[1]
    scale = torch.maximum(pair[0].abs(), pair[1].abs())
    is_far = (run.abs() > torch.finfo(run.dtype).eps ** CLOSE * scale) | run.isinf()
    rise = function(pair[0]) - function(pair[1])
    if bool(is_far.all()):
        return rise
    slope = derivative(function, torch.where(run.isfinite(), pair[0] - run / 2, torch.zeros_like(run)))
    return torch.where(is_far, rise, slope * (run.nan_to_num(0.0) if difference is None else difference))


def derivative(function: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Computes the derivative of an elementwise function. NaN and infinity are replaced by zero."""
    with torch.enable_grad():
        leaf = point.detach().requires_grad_()
        output = function(leaf)
        if not output.requires_grad:
            return torch.zeros_like(output)
        (slope,) = torch.autograd.grad(output.sum(), leaf)
    return slope.nan_to_num(0.0, 0.0, 0.0)


def by_slopes(call: DifferenceCall, slopes: Sequence[Tensor]) -> SplitKernel:
    """Returns the kernel of an elementwise function with the given slopes, which broadcast to the output."""
    after = call.divisor.reciprocal()
    shares = [slope * before * after for slope, before in zip(slopes, call.before, strict=True)]
    return SplitKernel(shares, call.shapes, None, call.is_exact)


def by_factors(call: DifferenceCall, factors: Sequence[float]) -> SplitKernel:
    """Returns the kernel of a linear combination of tensors."""
    pairs = zip(factors, call.before, strict=True)
    after = call.divisor
    shares = [(before if factor == 1 else factor * before) / after for factor, before in pairs]
    return SplitKernel(shares, call.shapes, None, call.is_exact)


@secant_of(*ACTIVATIONS, *(name for name in ELEMENTWISE if name not in NOT_ELEMENTWISE), "div", "hypot")
def elementwise(call: DifferenceCall) -> Kernel:
    """Returns the kernel of an elementwise function. With rules, it is the identity for functions of one tensor."""
    if call.has_rules and call.shapes == [call.after.shape]:
        return call.call.identity()
    if len(call.values) > 1:
        after = call.divisor.reciprocal()
        return SplitKernel([part * after for part in averaged_changes(call)], call.shapes, None, call.is_exact)
    if call.is_tangent:
        return by_slopes(call, [derivative(call.call.run, call.values[0].expand(call.after.shape))])
    is_same = call.differences[0].is_zero
    if is_same is None:
        return call.call.identity()
    return SplitKernel([_propagated_share(call, is_same)], call.shapes, None, call.is_exact)


def _propagated_share(call: DifferenceCall, is_same: Tensor) -> Tensor:
    """Returns the fraction of its relevance that a function of one tensor propagates.

    The slope is the quotient of the two differences, so the fraction is 1 where the input differs. If only the output
    is the same, its relevance is negligible. Where the input is the same, the slope is the derivative.

    Args:
        call: The call on the input and on the reference.
        is_same: Mask of the elements at which the input is the same.
    """
    if call.name == "mul":
        slope = call.call.run(torch.ones_like(call.values[0]))
    else:
        slope = derivative(call.call.run, call.values[0].expand(call.after.shape).nan_to_num(0.0, 0.0, 0.0))
    return torch.where(is_same, slope * call.before[0] / call.after, 1.0)


secant_of("logaddexp", "logaddexp2")(elementwise)


def averaged_changes(call: DifferenceCall) -> list[Tensor]:
    """Computes the change of the output due to each input, changed one at a time and averaged over all orders."""
    numbers = range(len(call.values))
    totals: list[Tensor | None] = [None for _ in numbers]
    orders = list(itertools.permutations(numbers))
    for order in orders:
        point = list(call.reference_values)
        for number in order:
            part = _change_by_one(call, point, number) / len(orders)
            total = totals[number]
            totals[number] = part if total is None else total + part
            point[number] = call.values[number]
    return [total for total in totals if total is not None]


def _change_by_one(call: DifferenceCall, point: list[Tensor], number: int) -> Tensor:
    shape = call.after.shape

    def function(value: Tensor) -> Tensor:
        return call.call.run(*point[:number], value, *point[number + 1 :])  # type: ignore[no-any-return]

    pair = call.values[number].expand(shape), call.reference_values[number].expand(shape)
    return change(function, pair, call.before[number].expand(shape))


@secant_of("add", "sub", "rsub")
def addition(call: DifferenceCall) -> Kernel:
    """Returns the kernel of a sum or difference of tensors, in which a constant summand cancels."""
    options = call.call
    alpha = float(options.kwargs.get("alpha", options.args[2] if len(options.args) > 2 else 1))
    factors = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[call.name]
    if len(call.values) > 1:
        return by_factors(call, factors)
    if call.name != "rsub" and call.shapes == [call.after.shape] and isinstance(options.args[0], Slot):
        return options.identity()
    return elementwise(call)


@secant_of("mul")
def product(call: DifferenceCall) -> Kernel:
    """Returns the kernel for a product.

    The slope with respect to each factor is the mean of the other factor over the two inputs.
    """
    if len(call.values) == 1:
        return elementwise(call)
    first, second = ((one + two) / 2 for one, two in zip(call.values, call.reference_values, strict=True))
    return by_slopes(call, [second, first])


@secant_of(*CONVERSIONS)
def conversion(call: DifferenceCall) -> Kernel:
    """Returns the kernel of a dtype conversion. The sink absorbs the rounding error."""
    shares = [call.before[0] / call.divisor, *(torch.zeros_like(call.after) for _ in call.shapes[1:])]
    return SplitKernel(shares, call.shapes, None, False)


__all__ = ["CONVERSIONS", "averaged_changes", "by_slopes", "change", "derivative"]
