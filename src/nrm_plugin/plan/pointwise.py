"""Transposed convolutions with kernels of one pixel, computed as matrix products.

On a CPU, the backward pass of such a convolution takes up to four times as long as the matrix product to which it is
equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .reshapes import is_contiguous
from .trace import Operation, Trace, Value

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.float64)


class PointwiseProducts:
    """Rewrites a trace so that input gradients of convolutions with kernels of one pixel are matrix products.

    Args:
        trace: The trace (list of tensor operations) to rewrite. New tensors are added to it.
        constants: The constants, keyed by index, to which views of weights are added.
    """

    def __init__(self, trace: Trace, constants: dict[int, Tensor]) -> None:
        self.trace, self.constants = trace, constants
        self._written: list[Operation] = []
        self._matrices: dict[Any, int] = {}

    def rewritten(self, operations: list[Operation]) -> list[Operation]:
        """Returns equivalent operations: the same list if there are no such gradients."""
        found = {id(one) for one in operations if self._is_pointwise(one)}
        if not found:
            return operations
        for one in operations:
            if id(one) in found:
                self._write_product(one)
            else:
                self._written.append(one)
        return self._written

    def _is_pointwise(self, one: Operation) -> bool:
        """Returns True if an operation is the input gradient of a convolution with a constant kernel of one pixel."""
        if one.function is not aten.convolution_backward.default:
            return False
        _, _, _, _, _, padding, _, is_transposed, _, groups, wanted = one.call.args
        relevance, _, weight = one.reads
        forms, result = self.trace.forms, one.results[0]
        if is_transposed or groups != 1 or any(padding) or list(wanted) != [True, False, False] or result is None:
            return False
        kernel, (_, _, _, dtype, device, *_) = self.constants.get(weight), forms[relevance]
        return (
            kernel is not None
            and kernel.shape[2:].numel() == 1
            and kernel.is_contiguous()
            and dtype in _DTYPES
            and device.type == "cpu"
            and is_contiguous(forms[relevance])
            and is_contiguous(forms[result])
        )

    def _write_product(self, one: Operation) -> None:
        relevance, _, weight = one.reads
        forms, result = self.trace.forms, one.results[0]
        assert result is not None
        shape, given = list(forms[result][0]), list(forms[relevance][0])
        (samples, channels), pixels = given[:2], math.prod(given[2:])
        if pixels == 1:
            size = [samples, shape[1]]
            left, right = self._view(relevance, [samples, channels]), self._matrix(weight)
        else:
            size = [*(samples,) * (samples > 1), shape[1], pixels]
            left = self._matrix(weight, samples)
            right = self._view(relevance, [*(samples,) * (samples > 1), channels, pixels])
        multiply = aten.mm.default if len(size) == 2 else aten.bmm.default
        product = self._new(size, relevance)
        self._written.append(self.trace.operation(multiply, (Value(left), Value(right)), (product,)))
        small = [samples, shape[1], *given[2:]]
        if small == shape:
            self.trace.aliases[result] = product
            self._written.append(self.trace.operation(aten.view.default, (Value(product), shape), (result,)))
            return
        self._spread(self._view(product, small), small, result, one.call.args[4])

    def _spread(self, source: int, small: list[int], result: int, strides: Sequence[int]) -> None:
        """Writes the operations that move the pixels of a strided convolution apart, with zeros between them."""
        shape = list(self.trace.forms[result][0])
        dims = [dim for dim in range(2, len(shape)) if small[dim] != shape[dim]]
        for dim in reversed(dims):
            small = [*small[:dim], shape[dim], *small[dim + 1 :]]
            made = result if dim == dims[0] else self._new(small, source)
            stride = list(strides)[(dim - 2) % len(strides)]
            arguments = (Value(source), small, dim, 0, shape[dim], stride)
            self._written.append(self.trace.operation(aten.slice_backward.default, arguments, (made,)))
            source = made

    def _matrix(self, weight: int, samples: int | None = None) -> int:
        """Returns the index of a weight as a matrix, transposed and repeated if the number of samples is given."""
        if (weight, samples) not in self._matrices:
            matrix = self.constants[weight].flatten(1)
            if samples is not None:
                matrix = matrix.t() if samples == 1 else matrix.t().expand(samples, -1, -1)
            number = self._new(list(matrix.shape), weight, matrix.stride())
            self.constants[number] = matrix
            self._matrices[weight, samples] = number
        return self._matrices[weight, samples]

    def _view(self, source: int, shape: list[int]) -> int:
        number = self._new(shape, source)
        self.trace.aliases[number] = source
        self._written.append(self.trace.operation(aten.view.default, (Value(source), shape), (number,)))
        return number

    def _new(self, shape: list[int], like: int, strides: Sequence[int] | None = None) -> int:
        """Adds a tensor with the dtype and device of another to the trace and returns its index."""
        number, self.trace.count = self.trace.count, self.trace.count + 1
        strides = strides or [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
        _, _, _, dtype, device, *_ = self.trace.forms[like]
        self.trace.forms[number] = (torch.Size(shape), tuple(strides), 0, dtype, device, False, False)
        return number


__all__ = ["PointwiseProducts"]
