"""Forward pass on the reference, whose function calls are matched with the forward pass on the inputs.

Source: docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import DifferenceError
from ..model.autocast import working_dtype
from ..model.trace_guards import holds
from .forward_state import Saved

LEAST = {torch.float32: 1e-20, torch.float64: 1e-100}
"""Offset added to the magnitude of differences, keyed by dtype. Much larger differences remain unchanged.

The relevance of a neuron whose difference is zero is this offset times the multiplier, and masses conditioned on the
neuron are divided by it. It lies midway between the rounding error and the smallest float, for values of up to about
1e15.
"""


class Difference:
    """Difference between a tensor and the same tensor at the reference, without zeros, so that it can be a divisor.

    Args:
        delta: The difference ``δ``, in which :func:`difference` has replaced zeros by the tiny number :data:`LEAST`.
        has_zeros: Whether elements of the difference may have been zero.

    Attributes:
        delta: The difference ``δ``, as passed.
    """

    def __init__(self, delta: Tensor, has_zeros: bool) -> None:
        self.delta, self._has_zeros = delta, has_zeros

    @cached_property
    def is_zero(self) -> Tensor | None:
        """Mask of the elements whose difference is zero, or None if there are none."""
        return self.delta.abs() < 2 * LEAST[self.delta.dtype] if self._has_zeros else None


def difference(value: Tensor, reference: Tensor) -> Difference:
    """Computes the difference between a tensor and its reference.

    To avoid zeros, the offset :data:`LEAST` is added to the magnitude of each element. This is faster than a search for
    zeros. The difference between equal infinities is zero.
    """
    dtype = working_dtype(value.dtype)
    delta = value.to(dtype) - reference.to(dtype)
    if not delta.numel() or holds("differences without zeros", lambda: delta.abs().amin() >= LEAST[dtype]):
        return Difference(delta, False)
    if not holds("differences between finite numbers", lambda: delta.amax() <= torch.inf):  # not if any is nan
        delta = delta.nan_to_num(0.0, torch.inf, -torch.inf)
    least = torch.full((), LEAST[dtype], dtype=dtype, device=delta.device)
    return Difference(least.copysign(delta).add_(delta), True)


@dataclass(frozen=True)
class ReferenceCall:
    """Function call in the forward pass on the reference.

    Attributes:
        name: Name of the function.
        where: Name of the module that called the function.
        tensors: The inputs and outputs of the call that depend on the reference.
        constants: All other arguments, with tensors as :class:`Saved`.
    """

    name: str
    where: str
    tensors: tuple[Saved, ...]
    constants: Any


class ReferencePass:
    """Forward pass on the reference (baseline) input, stored as a sequence of function calls.

    The calls are stored during the forward pass on the reference. After :meth:`replay`, they are compared with the
    calls in the forward pass on the inputs, and an error is raised where the two passes differ.

    Args:
        is_tangent: Whether slopes are derivatives at the input instead of secants.
        is_wanted: Function that returns True if the tensors of the next call are needed; otherwise, only their shapes
            are stored.
    """

    def __init__(self, is_tangent: bool = False, is_wanted: Callable[[], bool] = lambda: True) -> None:
        self.is_tangent = is_tangent
        self._is_wanted = is_wanted
        self._calls: list[ReferenceCall] = []
        self._number = 0
        self._is_replayed = False
        self._deltas: dict[tuple[int, int, torch.Size, tuple[int, ...]], tuple[Tensor, Tensor, Difference]] = {}

    def difference(self, value: Tensor, other: Tensor) -> Difference:
        """Returns the difference between a tensor and its reference, computed once for all steps."""
        key = (value.data_ptr(), other.data_ptr(), value.shape, value.stride())
        if key not in self._deltas:
            self._deltas[key] = (value, other, difference(value, other))  # keeps the memory from being reused
        return self._deltas[key][2]

    @property
    def is_replayed(self) -> bool:
        """True if the forward pass on the inputs has started."""
        return self._is_replayed

    def replay(self) -> None:
        """Starts the forward pass on the inputs, whose calls are compared with the stored ones."""
        self._is_replayed = True

    def drop(self) -> None:
        """Frees the tensors of all stored calls, keeping their shapes and the constants."""
        self._calls = [replace(call, tensors=tuple(map(_without_values, call.tensors))) for call in self._calls]
        self._deltas.clear()

    def close(self) -> None:
        """Frees all stored calls at the end of the forward pass on the inputs, even after an error."""
        self._calls.clear()

    def meet(self, name: str, where: str, tensors: Sequence[Tensor], constants: Any = ()) -> tuple[Saved, ...]:
        """Stores a call of the pass on the reference, or matches a call of the pass on the inputs with the stored one.

        Args:
            name: Name of the function.
            where: Name of the module that called the function.
            tensors: The tensors that depend on the inputs.
            constants: All other arguments.

        Returns:
            The tensors of this call in the forward pass on the reference.

        Raises:
            DifferenceError: If the call, a shape, or a constant differs between the two passes.
        """
        if not self._is_replayed:
            saved = tuple(Saved(tensor) for tensor in tensors)
            kept = saved if self._is_wanted() else tuple(map(_without_values, saved))
            self._calls.append(ReferenceCall(name, where, kept, _kept(constants)))
            return saved
        other = self._calls[self._number] if self._number < len(self._calls) else None
        self._number += 1
        if other is None or (other.name, other.where) != (name, where):
            actual = "nothing further" if other is None else f"{other.name!r} in {other.where or 'the model'!r}"
            raise DifferenceError(_CONTROL.format(name=name, where=where or "the model", found=actual))
        shapes = [tuple(tensor.shape) for tensor in tensors], [tuple(saved.tensor.shape) for saved in other.tensors]
        if shapes[0] != shapes[1]:
            raise DifferenceError(_SHAPES.format(name=name, where=where or "the model", one=shapes[0], two=shapes[1]))
        difference = _difference(_kept(constants), other.constants)
        if difference:
            raise DifferenceError(_CONSTANTS.format(name=name, where=where or "the model", what=difference))
        return other.tensors

    def finish(self) -> None:
        """Raises :class:`DifferenceError` if the forward pass on the reference made further calls."""
        if not self._is_replayed:
            return
        if self._number < len(self._calls):
            other = self._calls[self._number]
            actual = f"{other.name!r} in {other.where or 'the model'!r}"
            raise DifferenceError(_CONTROL.format(name="nothing further", where="the model", found=actual))
        self._calls.clear()


def _without_values(saved: Saved) -> Saved:
    """Returns a saved tensor of the same shape that takes no memory."""
    tensor = saved.tensor
    return Saved(tensor.new_zeros(()).expand(tensor.shape), values=False)


def _kept(value: Any) -> Any:
    """Replaces the tensors in nested arguments with :class:`Saved` objects."""
    if isinstance(value, Tensor):
        return Saved(value)
    if isinstance(value, (list, tuple)):
        return [_kept(item) for item in value]
    if isinstance(value, dict):
        return [[key, _kept(item)] for key, item in value.items()]
    if isinstance(value, slice):
        return [_kept(value.start), _kept(value.stop), _kept(value.step)]
    return value


def _difference(one: Any, two: Any) -> str:
    """Describes the first difference between the constants of two calls. Returns an empty string if there is none."""
    if isinstance(one, Saved) and isinstance(two, Saved):
        return _difference_of_tensors(one.tensor, two.tensor)
    if isinstance(one, list) and isinstance(two, list):
        if len(one) != len(two):
            return f"lists of {len(one)} and {len(two)} items"
        return next(filter(None, (_difference(*pair) for pair in zip(one, two, strict=True))), "")
    if isinstance(one, (bool, int, float, str)) and isinstance(two, (bool, int, float, str)):
        return "" if one == two or one != one else f"{one!r} and {two!r}"
    return "" if type(one) is type(two) else f"{type(one).__name__} and {type(two).__name__}"


def _difference_of_tensors(one: Tensor, two: Tensor) -> str:
    if one.layout != torch.strided or two.layout != torch.strided:
        return "" if one.layout == two.layout and one.shape == two.shape else "sparse tensors"
    if one.shape != two.shape or one.dtype != two.dtype:
        return f"{one.dtype} of shape {tuple(one.shape)} and {two.dtype} of shape {tuple(two.shape)}"
    is_same_memory = one.data_ptr() == two.data_ptr() and one.stride() == two.stride()
    if is_same_memory or torch.equal(one, two):
        return ""
    if one.is_floating_point() and torch.equal(one.nan_to_num(), two.nan_to_num()):
        return ""
    kind = "a mask" if one.dtype == torch.bool else "numbers" if one.is_floating_point() else "indices"
    return f"{kind} of shape {tuple(one.shape)} with {int((one != two).sum())} different elements"


_CONTROL = (
    "the model runs different operations for the reference and the inputs: it calls {name!r} in {where!r} for the "
    "inputs, but {found} for the reference. A difference requires the same operations for both. Choose a reference "
    "on the same path, or explain the output without reference=."
)
_SHAPES = (
    "{name!r} in {where!r} has tensors of shape {one} for the inputs, but {two} for the reference. A difference "
    "requires the same operations for both. Choose another reference, or explain the output without reference=."
)
_CONSTANTS = (
    "{name!r} in {where!r} depends on values that differ between inputs and reference but carry no relevance: {what}. "
    "No relevance passes through indices, masks and detached values, so the difference of the outputs would not be "
    "explained completely. Choose a reference with the same values (the same padding mask, the same order), or explain "
    "the output without reference=."
)

__all__ = ["LEAST", "Difference", "ReferencePass", "difference"]
