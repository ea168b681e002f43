"""Batch normalization in the forward pass of a program, fused with the convolution or linear layer before it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .trace import UNKNOWN, Operation, Trace, Value

aten = torch.ops.aten
CLOSE = 4
"""Largest relative difference, in units of rounding, of weights that count as equal but are computed in another order.

A newly initialized batch norm changes weights by half its ``eps``, which is 42 such units in float32, and these changes
accumulate over layers.
"""


def fused(
    operations: list[Operation], trace: Trace, constants: dict[int, Tensor], results: list[int]
) -> list[Operation]:
    """Returns the operations, with each batch normalization fused into a convolution that has no other reader.

    Args:
        operations: The operations.
        trace: The trace, in which new constants are numbered.
        constants: The constants, to which fused weights are added.
        results: Numbers of the result tensors.
    """
    uses = Counter(number for one in operations for number in one.reads) + Counter(results)
    made = {number: one for one in operations for number in one.results if number is not None}
    written = {trace.memory(number) for one in operations for number in one.writes}
    images = _images(operations, constants)
    dropped: set[int] = set()
    replaced: dict[int, list[Operation]] = {}
    for one in operations:
        if one.function is not aten.native_batch_norm.default or one.args[5] or uses[one.args[0].number] != 1:
            continue
        layer = made.get(one.args[0].number)
        if layer is None or layer.function is not aten.convolution.default or layer.args[6]:
            continue
        if trace.memory(one.args[0].number) in written or any(number in uses for number in one.results[1:]):
            continue
        values = [None if v is None else constants.get(v.number) for v in (*layer.args[1:3], *one.args[1:5])]
        given = (*layer.args[1:3], *one.args[1:5])
        if any(v is not None and found is None for v, found in zip(given, values, strict=True)):
            continue
        weight, bias = _folded(values, one.args[7])
        dropped.add(id(layer))
        replaced[id(one)] = _layer(one, layer, weight, bias, images, trace, constants, dropped)
    rest: list[Operation] = []
    for one in operations:
        if id(one) in replaced:
            rest += replaced[id(one)]
        elif id(one) not in dropped:
            rest.append(one)
    return rest


def _folded(values: list[Tensor | None], eps: float) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the fused layer, computed in float64, so that they are rounded only once."""
    like = next(value for value in values if value is not None)
    weight, bias, gamma, beta, mean, variance = (None if value is None else value.double() for value in values)
    assert weight is not None
    assert mean is not None
    assert variance is not None
    scale = torch.rsqrt(variance + eps)
    scale = scale if gamma is None else scale * gamma
    shift = (-mean if bias is None else bias - mean) * scale
    shift = shift if beta is None else shift + beta
    return (weight * scale.reshape(-1, *(1,) * (weight.ndim - 1))).to(like.dtype), shift.to(like.dtype)


def _images(operations: list[Operation], constants: dict[int, Tensor]) -> dict[Any, list[Operation]]:
    """Returns the convolutions without bias that the rules use, by input and settings."""
    found: dict[Any, list[Operation]] = {}
    for one in operations:
        if one.function is aten.convolution.default and one.args[2] is None and one.args[1].number in constants:
            found.setdefault(_settings(one), []).append(one)
    return found


def _settings(one: Operation) -> Any:
    return one.args[0].number, tuple(tuple(v) if isinstance(v, list) else v for v in one.args[3:])


def _layer(
    norm: Operation,
    layer: Operation,
    weight: Tensor,
    bias: Tensor,
    images: dict[Any, list[Operation]],
    trace: Trace,
    constants: dict[int, Tensor],
    dropped: set[int],
) -> list[Operation]:
    """Returns the operations of the fused layer, which reuse the output without bias if a rule computes it."""
    output = norm.results[0]
    shift = _constant(bias, trace, constants)
    for image in images.get(_settings(layer), ()):
        other = constants[image.args[1].number]
        if other.shape == weight.shape and _is_close(other, weight):
            dropped.add(id(image))
            shaped = bias.reshape(-1, *(1,) * (weight.ndim - 2))
            shift = _constant(shaped, trace, constants)
            add = Operation(aten.add.Tensor, (Value(image.results[0]), Value(shift)), {}, (output,))  # type: ignore[arg-type]
            return [image, add]
    number = _constant(weight, trace, constants)
    args = (layer.args[0], Value(number), Value(shift), *layer.args[3:])
    return [replace(layer, args=args, results=(output,), reads=UNKNOWN)]


def _is_close(one: Tensor, other: Tensor) -> bool:
    rounding = min(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps)
    return bool(((one - other).abs() <= CLOSE * rounding * other.abs()).all())


def _constant(value: Tensor, trace: Trace, constants: dict[int, Tensor]) -> int:
    number, trace.count = trace.count, trace.count + 1
    constants[number] = value
    trace.forms[number] = (value.shape, value.stride(), 0, value.dtype, value.device)
    return number


__all__ = ["fused"]
