"""Fusion of batch normalizations with preceding convolutions in the forward pass of a compiled program."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .trace import HOLE, Operation, Trace, Value

aten = torch.ops.aten
BLOCK = 1 << 15
"""Number of weights per block."""
CLOSE = 4
"""Largest relative difference, in units of the machine epsilon, between weights that are equal up to rounding.

It must be small: a newly initialized batch norm changes weights by half its ``eps``, which is 42 units in float32, and
such changes accumulate over layers.
"""


def fused(
    operations: list[Operation], trace: Trace, constants: dict[int, Tensor], results: list[int]
) -> list[Operation]:
    """Fuses each batch normalization into the preceding convolution if the convolution has no other consumer.

    Args:
        operations: The operations of a program.
        trace: The trace, to which the indices of new constants are added.
        constants: The constants, keyed by index, to which fused weights are added.
        results: Indices of the result tensors.

    Returns:
        The remaining operations.
    """
    norms = [one for one in operations if one.call.facts.function is aten.native_batch_norm.default]
    if not norms:
        return operations
    uses = Counter([number for one in operations for number in one.reads] + results)
    made = {number: one for one in operations for number in one.results if number is not None}
    written = {trace.memory(number) for one in operations for number in one.writes}
    images = _images(operations, constants)
    dropped: set[int] = set()
    replaced: dict[int, list[Operation]] = {}
    for one in norms:
        norm = one.args
        if norm[5] or uses[norm[0].number] != 1:
            continue
        layer = made.get(norm[0].number)
        if layer is None or layer.function is not aten.convolution.default or layer.call.args[6]:
            continue
        if trace.memory(norm[0].number) in written or any(number in uses for number in one.results[1:]):
            continue
        given = (*layer.args[1:3], *norm[1:5])
        values = [None if v is None else constants.get(v.number) for v in given]
        if any(v is not None and actual is None for v, actual in zip(given, values, strict=True)):
            continue
        fusion = _Fusion(values, norm[7])
        dropped.add(id(layer))
        replaced[id(one)] = _layer(one, layer, fusion, images, trace, constants, dropped)
    rest: list[Operation] = []
    for one in operations:
        if id(one) in replaced:
            rest += replaced[id(one)]
        elif id(one) not in dropped:
            rest.append(one)
    return rest


class _Fusion:
    """Weight and bias of a convolution fused with a batch normalization, computed in float64 and rounded once.

    Args:
        values: Weight and bias of the layer, and scale, shift, mean and variance of the batch normalization.
        eps: The ``eps`` of the batch normalization.
    """

    def __init__(self, values: list[Tensor | None], eps: float) -> None:
        weight, bias, gamma, beta, mean, variance = values
        assert weight is not None
        assert mean is not None
        assert variance is not None
        self._scale = torch.rsqrt(variance.double() + eps)
        self._scale = self._scale if gamma is None else self._scale * gamma.double()
        shift = (-mean.double() if bias is None else bias.double() - mean.double()) * self._scale
        self.bias = (shift if beta is None else shift + beta.double()).to(weight.dtype)
        self._weight = weight

    def weight(self) -> Tensor:
        """Computes the weight of the fused layer."""
        fused = torch.empty_like(self._weight)
        for rows in self._blocks():
            fused[rows] = self._rows(rows)
        return fused

    def is_close(self, other: Tensor) -> bool:
        """Returns True if a weight equals the weight of the fused layer up to rounding."""
        if other.shape != self._weight.shape or other.dtype != self._weight.dtype:
            return False
        return all(self._are_close(other[rows], self._rows(rows)) for rows in self._blocks())

    def _rows(self, rows: slice) -> Tensor:
        scale = self._scale[rows].reshape(-1, *(1,) * (self._weight.ndim - 1))
        return (self._weight[rows].double() * scale).to(self._weight.dtype)

    def _blocks(self) -> Iterator[slice]:
        """Yields blocks of output channels that fit into the CPU cache, starting with a single channel."""
        count, size = len(self._weight), max(1, self._weight[:1].numel())
        step = max(1, BLOCK // size) if self._weight.device.type == "cpu" else count
        yield slice(0, 1)
        yield from (slice(start, min(count, start + step)) for start in range(1, count, step))

    @staticmethod
    def _are_close(one: Tensor, other: Tensor) -> bool:
        rounding = min(torch.finfo(one.dtype).eps, torch.finfo(torch.float32).eps)
        return bool(((one - other).abs_() <= other.abs().mul_(CLOSE * rounding)).all())


def _images(operations: list[Operation], constants: dict[int, Tensor]) -> dict[Any, list[Operation]]:
    """Returns the convolutions without bias that rules compute, keyed by input and options."""
    convolutions: dict[Any, list[Operation]] = {}
    for one in operations:
        if (
            one.call.facts.function is aten.convolution.default
            and one.call.args[2] is None
            and one.reads[1] in constants
        ):
            convolutions.setdefault(_settings(one), []).append(one)
    return convolutions


def _settings(one: Operation) -> Any:
    return one.reads[0], tuple(tuple(v) if isinstance(v, list) else v for v in one.call.args[3:])


def _layer(
    norm: Operation,
    layer: Operation,
    fusion: _Fusion,
    images: dict[Any, list[Operation]],
    trace: Trace,
    constants: dict[int, Tensor],
    dropped: set[int],
) -> list[Operation]:
    """Returns the operations of the fused layer.

    If a rule computes the output of the fused layer without bias, it is reused.
    """
    output = norm.results[0]
    for image in images.get(_settings(layer), ()):
        other = constants[image.reads[1]]
        if fusion.is_close(other):
            dropped.add(id(image))
            shaped = fusion.bias.reshape(-1, *(1,) * (other.ndim - 2))
            shift = _constant(shaped, trace, constants)
            add = trace.operation(aten.add.Tensor, (Value(image.results[0]), Value(shift)), (output,))  # type: ignore[arg-type]
            return [image, add]
    number, shift = _constant(fusion.weight(), trace, constants), _constant(fusion.bias, trace, constants)
    call = trace.call(layer.call.facts, (HOLE, HOLE, HOLE, *layer.call.args[3:]), {})
    return [layer.changed((layer.reads[0], number, shift), (output,), (), call)]


def _constant(value: Tensor, trace: Trace, constants: dict[int, Tensor]) -> int:
    number, trace.count = trace.count, trace.count + 1
    constants[number] = value
    trace.forms[number] = (value.shape, value.stride(), 0, value.dtype, value.device, False, False)
    return number


__all__ = ["fused"]
