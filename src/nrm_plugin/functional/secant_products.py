"""Secant (finite-difference) kernels of layers with weights and of tensor products.

Source: docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from ..kernels.base import Kernel
from ..model.affine_layers import LAYERS, layer_like
from ..model.linear_maps import LinearMap, explicit_maps
from .differences import DifferenceCall, secant_of
from .function_call import FunctionCall, Slot
from .products import changed_constants, constants_of
from .secant_kernels import MultiplierKernel, Multipliers, PathKernel
from .weighted_functions import twin_of_call


class LinearKernel(MultiplierKernel):
    """Kernel of a layer with a constant weight, which propagates multipliers by the transposed linear map.

    Args:
        call: The recorded calls for the input and the reference.
        linear_map: The linear map of the layer and its transpose.
        absolute: Function that returns the linear map with absolute weights.
    """

    def __init__(self, call: DifferenceCall, linear_map: LinearMap, absolute: Callable[[], LinearMap]) -> None:
        super().__init__(call)
        self.linear_map, self._absolute = linear_map, absolute

    @cached_property
    def absolute(self) -> LinearMap:
        """Linear map with absolute weights."""
        return self._absolute()

    def multipliers(self, above: Tensor) -> Multipliers:
        return (self.linear_map.down(above),)

    def absolute_multipliers(self, above: Tensor) -> Multipliers:
        return (self.absolute.down(above),)

    def push(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        (value,) = values
        assert value is not None
        return self.linear_map.up(value * self.before[0]) / self.divisor

    def push_bound(self, values: tuple[Tensor | None, ...], shape: torch.Size) -> Tensor:
        (value,) = values
        assert value is not None
        return self.absolute.up(value * self.before[0].abs()) / self.divisor.abs()


@secant_of(*LAYERS)
def layer(call: DifferenceCall) -> Kernel:
    """Returns the kernel of a layer, or of a product if the model computes its weight."""
    weight = call.call.argument(1, "weight")
    if len(call.values) == 1 and isinstance(weight, Tensor):
        weight = weight.detach().to(call.values[0].dtype)
        twin = twin_of_call(call.call, layer_like(call.name))
        linear_map = explicit_maps(twin, weight, call.values[0])
        if linear_map is not None:
            return LinearKernel(call, linear_map, partial(_absolute_maps, twin, weight, call.values[0]))
    return product(call)


def _absolute_maps(twin: nn.Module, weight: Tensor, values: Tensor) -> LinearMap:
    linear_map = explicit_maps(twin, weight.abs(), values)
    assert linear_map is not None, "known for the weight itself"
    return linear_map


@secant_of("matmul", "einsum", "tensordot")
def product(call: DifferenceCall) -> Kernel:
    """Returns the kernel of a tensor product, whose factors may be constant."""
    return PathKernel(call, _with_absolute_constants, _is_linear(call.call))


def _is_linear(call: FunctionCall) -> bool:
    """Returns True if a product has a single computed factor, which may not occur twice, as in ``x @ x.T``."""
    factors = [value for value in call.args if isinstance(value, (Slot, Tensor))]
    return len(factors) == 2 and sum(isinstance(value, Slot) for value in factors) == 1


def _with_absolute_constants(call: FunctionCall) -> FunctionCall:
    return changed_constants(call, constants_of(call), Tensor.abs)


__all__ = ["LinearKernel"]
