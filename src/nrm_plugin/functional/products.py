"""Kernels of matrix products and other tensor contractions.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from zennit.rules import Norm

from ..kernels.base import Kernel
from ..kernels.rule_reader import read_rule_at
from ..model.affine_layers import Weighted, Weightless, layer_like
from ..model.nested_tensors import tensors_in
from ..rules import Absolute
from .averaging import pooling
from .einsum_notation import Einsum, read_einsum
from .elementwise import STABILIZER
from .function_call import FunctionCall, Slot
from .function_kernels import EqualPartsKernel, SingleInputKernel
from .registry import kernel_of
from .unsupported import UnknownKernel, uncovered_layer_error

Affine = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Function ``(input, weight, bias) -> output``."""


def kernel_of_layer(
    call: FunctionCall,
    run: Affine,
    weight: Tensor,
    bias: Tensor | None,
    like: nn.Module,
    bias_dim: int = -1,
    padding_mode: str = "zeros",
) -> Kernel:
    """Returns the kernel of a function that is affine in its first input, by the composite's rule for this weight.

    Args:
        call: Call for which the kernel is constructed.
        run: Function ``(input, weight, bias) -> output``.
        weight: The weight, with one row per output.
        bias: The bias, or None.
        like: A layer of the equivalent type.
        bias_dim: Dimension of the output along which the bias is added.
        padding_mode: As in convolutions. It must not be ``"zeros"`` if an input can contribute to an output through two
            weights.
    """
    rule = call.settings.rules.of_weight(weight, like, call.path)
    if rule is None:  # in an operator such as @, Python would interpret it as an unsupported operand
        return UnknownKernel(uncovered_layer_error(call.path, like, call.name), call.shapes)
    shell = Weighted(run, weight.detach(), None if bias is None else bias.detach(), bias_dim, padding_mode=padding_mode)
    kernel = read_rule_at(rule, shell, call.values[0], call.path)
    return kernel if len(call.inputs) == 1 else SingleInputKernel(kernel, 0, call.shapes)


@kernel_of("matmul", "einsum", "tensordot")
def contraction(call: FunctionCall) -> Kernel:
    """Returns the kernel of a product of tensors.

    A product with a constant factor is a linear layer. Otherwise, relevance is split among the factors that are not
    gates.
    """
    if len(call.inputs) == 1:
        return _contraction_with_constant(call)
    factors = range(len(call.inputs))
    if call.settings.attention == "halves":
        kernels = {number: _one_factor(call, number, Norm(STABILIZER)) for number in factors}
        return EqualPartsKernel(kernels, call.shapes)
    sizes = [value.numel() for value in call.values]
    signals = [number for number in factors if not call.gates[number]] or list(factors)
    largest = max(sizes[number] for number in signals)
    signals = [number for number in signals if sizes[number] == largest]
    kernels = {number: _one_factor(call, number, Absolute()) for number in signals}
    if len(signals) == 1:
        return SingleInputKernel(kernels[signals[0]], signals[0], call.shapes)
    return EqualPartsKernel(kernels, call.shapes)


def _one_factor(call: FunctionCall, number: int, rule: Absolute | Norm) -> Kernel:
    """Returns the kernel of one factor of a product. The other factors are treated as constants."""
    values = call.values
    if isinstance(rule, Absolute):  # shares follow the magnitude of each product, including its constant factors
        values, call = [value.abs() for value in values], changed_constants(call, constants_of(call), Tensor.abs)

    def run(source: Tensor) -> Tensor:
        return call.run(*[source if other == number else value for other, value in enumerate(values)])  # type: ignore[no-any-return]

    return read_rule_at(rule, Weightless(run), values[number], call.path)


# -- a constant factor ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConstantMatrix:
    """Constant factor of a product, as the weight of a linear layer.

    Attributes:
        weight: The weight, with one row per output.
        restore: Function that converts the weight back to the original factor.
        is_layer: Whether the product is a linear layer along the last dimension, whose outputs are channels.
    """

    weight: Tensor
    restore: Callable[[Tensor], Tensor]
    is_layer: bool


def _contraction_with_constant(call: FunctionCall) -> Kernel:
    """Returns the kernel of a product with a constant, which is treated as a linear layer."""
    constants = constants_of(call)
    if not constants:  # an einsum of one tensor is a sum or a transpose
        return pooling(call)
    if len(constants) > 1:
        call = _with_one_constant(call)
        constants = constants_of(call)
    constant = constants[0]
    matrix = matrix_of(call, constant)

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return changed_constants(call, [constant], lambda _: matrix.restore(weight)).run(source)  # type: ignore[no-any-return]

    like = layer_like("linear")
    if matrix.is_layer:
        return kernel_of_layer(call, run, matrix.weight, None, like)
    # It is not marked as a layer, since channel pairs cannot be read from a weight in another layout.
    kernel = kernel_of_layer(call, run, matrix.weight, None, like, padding_mode="computed")
    return SingleInputKernel(kernel, 0, call.shapes)


def _with_one_constant(call: FunctionCall) -> FunctionCall:
    """Replaces the constant operands of an ``einsum`` with their product."""
    read = read_einsum(call.args, lambda one: call.values[0].ndim if isinstance(one, Slot) else one.ndim)
    pairs = list(zip(read.subscripts, read.operands, strict=True))
    signal = next(pair for pair in pairs if isinstance(pair[1], Slot))
    fixed = [pair for pair in pairs if pair is not signal]
    shared = set(signal[0] + read.output)
    kept = "".join(dict.fromkeys(letter for own, _ in fixed for letter in own if letter in shared))
    product = torch.einsum(",".join(own for own, _ in fixed) + f"->{kept}", *(factor for _, factor in fixed))
    merged = Einsum((signal[0], kept), read.output, (signal[1], product))
    return dataclasses.replace(call, args=merged.arguments, kwargs={})


def changed_constants(call: FunctionCall, constants: list[Tensor], change: Callable[[Tensor], Tensor]) -> FunctionCall:
    """Returns a copy of a call in which ``change`` is applied to the given constants."""
    for constant in constants:
        factor = change(constant)
        args = tuple(_replaced(value, constant, factor) for value in call.args)
        kwargs = {key: _replaced(value, constant, factor) for key, value in call.kwargs.items()}
        call = dataclasses.replace(call, args=args, kwargs=kwargs)
    return call


def matrix_of(call: FunctionCall, constant: Tensor) -> ConstantMatrix:
    """Returns the constant factor of a contraction as the weight of a linear layer."""
    if call.name == "einsum":
        matrix = _matrix_of_einsum(call, constant)
        return ConstantMatrix(constant, lambda weight: weight, False) if matrix is None else matrix
    is_right = isinstance(call.argument(0, "input"), Slot)
    if constant.ndim == 2 and is_right:
        return ConstantMatrix(constant.T, lambda weight: weight.T, True)
    if call.name == "matmul" and constant.ndim > 2:
        rows = constant.transpose(-1, -2) if is_right else constant

        def restore(weight: Tensor) -> Tensor:
            factor = weight.reshape(rows.shape)
            return factor.transpose(-1, -2) if is_right else factor

        return ConstantMatrix(rows.flatten(0, -2), restore, False)
    return ConstantMatrix(constant, lambda weight: weight, False)


def _matrix_of_einsum(call: FunctionCall, constant: Tensor) -> ConstantMatrix | None:
    """Returns the constant operand of an ``einsum`` as a matrix with a row per output position, or None."""
    equation, operands = call.args[0], list(call.args[1:])
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return None
    left, output = equation.replace(" ", "").split("->")
    own, other = left.split(",") if operands[0] is constant else left.split(",")[::-1]
    if len(set(own)) < len(own):
        return None
    rows, columns = [letter for letter in own if letter in output], [letter for letter in own if letter not in output]
    order = [own.index(letter) for letter in (*rows, *columns)]
    inverse = [order.index(dim) for dim in range(len(order))]
    matrix = constant.permute(order)
    if len(rows) == len(columns) == 1:
        is_layer = output[-1] == rows[0] and other[-1] == columns[0] and rows[0] not in other
        return ConstantMatrix(matrix, lambda weight: weight.permute(inverse), is_layer)
    shape, size = matrix.shape, math.prod(matrix.shape[: len(rows)])
    return ConstantMatrix(matrix.reshape(size, -1), lambda weight: weight.reshape(shape).permute(inverse), False)


def constants_of(call: FunctionCall) -> list[Tensor]:
    """Returns the floating-point tensor arguments that receive no relevance."""
    return [value for value in tensors_in((*call.args, *call.kwargs.values())) if value.is_floating_point()]


def _replaced(value: Any, old: Tensor, new: Tensor) -> Any:
    if value is old:
        return new
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(item, old, new) for item in value)
    return value


__all__ = ["changed_constants", "constants_of", "kernel_of_layer", "matrix_of"]
