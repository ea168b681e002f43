r"""Function calls on an input and a reference, and the registry of kernels for differences.

.. math:: R_i = \delta_i \sum_j \frac{\mathrm{slope}_{ij}}{\delta_j} R_j, \qquad \delta = a(x) - a(x^0)

Relevance is the product of multiplier and difference. Where the difference is zero, the masses of the walks through the
neuron cancel, but the multiplier is still needed. Every kernel therefore replaces zero differences with the same tiny
number. The resulting relevance is smaller than any rounding error, and the next kernel can recover the multiplier by
dividing by this number.

Source: docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..kernels.base import Kernel
from ..kernels.forward_state import Saved
from ..kernels.reference_pass import Difference, ReferencePass
from ..model.autocast import working_dtype
from ..model.devices import on_device_of
from .function_call import FunctionCall


@dataclass(frozen=True)
class DifferenceCall:
    """Function call on an input, paired with the same call on a reference.

    Attributes:
        call: The call on the input.
        output: Output of the call.
        references: Inputs and output of the call on the reference.
        passes: The forward pass on the reference.
        has_rules: Whether layer rules are applied to differences. They can assign relevance where the difference is
            zero.
    """

    call: FunctionCall
    output: Saved
    references: tuple[Saved, ...]
    passes: ReferencePass
    has_rules: bool = False

    @property
    def is_tangent(self) -> bool:
        """True if slopes are derivatives at the input (tangents) instead of secants."""
        return self.passes.is_tangent

    @property
    def is_exact(self) -> bool:
        """True if all secant columns sum to one and their sums need not be computed."""
        return not self.is_tangent and not self.has_rules

    @property
    def values(self) -> list[Tensor]:
        """Inputs of the call, in the working precision."""
        return [_working(value) for value in self.call.values]

    @property
    def reference_values(self) -> list[Tensor]:
        """Inputs of the call on the reference or, for tangents, on the input itself."""
        values = [_working(saved.tensor) for saved in self.references[:-1]]
        return self.values if self.is_tangent else values

    @property
    def outputs(self) -> tuple[Tensor, Tensor]:
        """Outputs on the input and on the reference; for tangents, twice the former."""
        both = _working(self.output.tensor), _working(self.references[-1].tensor)
        return (both[0], both[0]) if self.is_tangent else both

    @property
    def shapes(self) -> list[torch.Size]:
        """Shape of each input."""
        return self.call.shapes

    @property
    def name(self) -> str:
        """Name of the function."""
        return self.call.name

    @property
    def before(self) -> list[Tensor]:
        """Difference ``δ`` of each input, on the device of the output."""
        return [on_device_of(difference.delta, self.after) for difference in self.differences]

    @property
    def after(self) -> Tensor:
        """Difference ``δ`` of the output."""
        return self.difference.delta

    @cached_property
    def divisor(self) -> Tensor:
        """Divisor that converts the relevance of the output to its multiplier.

        Without rules, this is ``δ``. With rules, relevance can be nonzero where the difference is zero, for example if
        a rule adds a floor to the inputs of a layer. Such relevance has no multiplier; it is divided by infinity and
        thus absorbed.
        """
        if not self.has_rules or self.difference.is_zero is None:
            return self.after
        return self.after.masked_fill(self.difference.is_zero, torch.inf)

    @cached_property
    def differences(self) -> list[Difference]:
        """Difference of each input, with the mask of its zeros."""
        pairs = zip(self.call.values, self.references[:-1], strict=True)
        return [self.passes.difference(value, saved.tensor) for value, saved in pairs]

    @cached_property
    def difference(self) -> Difference:
        """Difference of the output, with the mask of its zeros."""
        return self.passes.difference(self.output.tensor, self.references[-1].tensor)


def _working(value: Tensor) -> Tensor:
    return value.to(working_dtype(value.dtype))


SecantFactory = Callable[[DifferenceCall], Kernel]
SECANTS: dict[str, SecantFactory] = {}


def secant_of(*names: str) -> Callable[[SecantFactory], SecantFactory]:
    """Decorator that registers the kernel for differences of the functions with the given names."""

    def decorate(factory: SecantFactory) -> SecantFactory:
        assert not SECANTS.keys() & set(names), "the module that is imported later would win"
        SECANTS.update(dict.fromkeys(names, factory))
        return factory

    return decorate


__all__ = ["SECANTS", "DifferenceCall", "SecantFactory", "secant_of"]
