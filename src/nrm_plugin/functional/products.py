"""Kernels of matrix products and of other contractions of two tensors.

Source: MEASURE, section 5 (ours).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zennit.rules import Norm

from ..kernels.base import Kernel
from ..kernels.rule_reader import read_rule_at
from ..model.affine import Weighted, Weightless
from ..rules import Absolute
from .elementwise import STABILIZER, PlacedKernel, pooling, shapes_of, total_of
from .registry import FunctionCall, Slot, kernel
from .unknown import Unknown, uncovered


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
        return Unknown(uncovered(call.path, like, call.name), shapes_of(call))
    shell = Weighted(run, weight.detach(), None if bias is None else bias.detach(), bias_dim, padding_mode=padding_mode)
    kernel_ = read_rule_at(rule, shell, call.values[0], call.path)
    return kernel_ if len(call.saved) == 1 else PlacedKernel(kernel_, 0, shapes_of(call))


@kernel("matmul", "einsum", "tensordot")
def contraction(call: FunctionCall) -> Kernel:
    """With a constant matrix a linear layer; of two computed tensors, all to the one that is no gate."""
    values = call.values
    if len(values) == 1:
        return _with_constant(call)
    everyone = range(len(values))
    if call.attention == "halves":
        halves: dict[int, Kernel] = {number: _share_in(call, number, Norm(STABILIZER)) for number in everyone}
        return HalvesKernel(halves, shapes_of(call))
    signals = [number for number in everyone if not call.gates[number]] or list(everyone)
    largest = max(values[number].numel() for number in signals)
    signals = [number for number in signals if values[number].numel() == largest]
    if len(signals) == 1:
        return PlacedKernel(_share_in(call, signals[0], Absolute()), signals[0], shapes_of(call))
    return HalvesKernel({number: _share_in(call, number, Absolute()) for number in signals}, shapes_of(call))


def _with_constant(call: FunctionCall) -> Kernel:
    """A product with a constant as a linear layer, whose weight has a row for each output, as torch's have."""
    constants = constants_of(call)
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
    return PlacedKernel(kernel_, 0, shapes_of(call))


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

    return read_rule_at(rule, Weightless(run), values[signal], call.path)


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


def constants_of(call: FunctionCall) -> list[Tensor]:
    """The floating tensors among the arguments of a call that carry no relevance."""
    return [value for value in _tensors(call.args, call.kwargs) if value.is_floating_point()]


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
