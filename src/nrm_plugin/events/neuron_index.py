"""Validation, comparison and formatting of neuron indices, as in ``at(layer)[…]``."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import EventError, brief

SHOWN = 12
"""Maximum number of neurons listed in a printed event."""


@dataclass(frozen=True)
class Index:
    """Neuron index, as in ``at(layer)[…]``. Indices are equal if they have the same form and the same numbers."""

    key: Hashable
    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def key_of(value: Any) -> Hashable:
    """Returns a hashable key of an index, equal for indices of the same form with the same numbers."""
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), tuple(value.shape), value.numpy().tobytes())
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if isinstance(value, tuple):
        return ("tuple", tuple(key_of(item) for item in value))
    return value  # type: ignore[no-any-return]


def checked_index(atom: object, value: Any) -> Any:
    """Validates an index and converts it to an int, slice, ellipsis, integer or boolean tensor, or a tuple of these.

    Raises:
        EventError: If the index is invalid.
    """
    if isinstance(value, tuple):
        if sum(item is Ellipsis for item in value) > 1:
            raise EventError(f"{atom}[…]: an index can contain only one `...`.")
        return tuple(checked_index(atom, item) for item in value)
    if value is Ellipsis:
        return value
    if isinstance(value, slice):
        return _checked_slice(atom, value)
    if isinstance(value, (Tensor, list, range)) or hasattr(value, "__array__"):
        tensor = _checked_tensor(atom, value)
        return tensor.item() if tensor.ndim == 0 else tensor
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise EventError(f"{atom}[{brief(value)}]: {_INDEX} Got {type(value).__name__}.")


_INDEX = "neurons are indexed by ints, slices, lists and tuples of them, integer tensors or boolean masks."


def _checked_slice(atom: object, value: slice) -> slice:
    bounds = (value.start, value.stop, value.step)
    if any(not (bound is None or hasattr(bound, "__index__")) for bound in bounds):
        raise EventError(f"{atom}[{show(value)}]: the bounds of a slice must be integers.")
    start, stop, step = (None if bound is None else operator.index(bound) for bound in bounds)
    if step is not None and step <= 0:
        raise EventError(f"{atom}[{show(value)}]: a slice of neurons needs a positive step.")
    return slice(start, stop, step)


def _checked_tensor(atom: object, value: Any) -> Tensor:
    """Converts an index to an integer or boolean tensor on the CPU."""
    if isinstance(value, list):
        kinds = {isinstance(item, bool) for item in value}
        if len(kinds) > 1:
            raise EventError(
                f"{atom}[{brief(value)}]: a list must contain either indices of neurons or booleans, not both."
            )
    try:
        tensor = value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)
        tensor = tensor.to_dense() if tensor.layout != torch.strided else tensor
        tensor = tensor.cpu().clone(memory_format=torch.contiguous_format)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise EventError(f"{atom}[{reprlib.repr(value)}]: {_INDEX} This is not one of them: {error}.") from error
    if tensor.numel() == 0 and isinstance(value, (list, range)):
        tensor = tensor.long()
    if tensor.dtype == torch.uint8:
        raise EventError(
            f"{atom}: an index of dtype uint8 is ambiguous: it may be a mask or indices of neurons. Convert it: "
            "`mask.bool()` or `index.long()`."
        )
    if tensor.dtype != torch.bool and (tensor.is_floating_point() or tensor.is_complex()):
        raise EventError(
            f"{atom}: {_INDEX} Got {type(value).__name__} of {str(tensor.dtype).removeprefix('torch.')}, shape "
            f"{tuple(tensor.shape)}; for a mask write `values > threshold`."
        )
    if tensor.ndim == 0 and tensor.dtype == torch.bool:
        raise EventError(f"{atom}[{bool(tensor)}]: a single boolean is not a mask; give one for each neuron.")
    return tensor


def shown_in_call(value: Any) -> str:
    """Formats an index as a function argument, as in ``slice(1, 3)``."""
    if not isinstance(value, slice):
        return show(value)
    bounds = [value.start, value.stop] + ([] if value.step is None else [value.step])
    return f"slice({', '.join(map(str, bounds))})"


def show(value: Any) -> str:
    """Formats an index as it is written in brackets, as in ``1:3``."""
    if isinstance(value, tuple):
        return ", ".join(show(item) for item in value)
    if isinstance(value, slice):
        bounds = ["" if bound is None else str(bound) for bound in (value.start, value.stop)]
        return ":".join(bounds + ([str(value.step)] if value.step is not None else []))
    if value is Ellipsis:
        return "..."
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return f"mask of {int(value.sum())} in {tuple(value.shape)}"
    if isinstance(value, Tensor) and value.numel() > SHOWN:
        return f"{value.numel()} numbers in {tuple(value.shape)}"
    if isinstance(value, Tensor):
        return str(value.tolist())
    return repr(value)


__all__ = ["Index", "checked_index", "key_of", "show", "shown_in_call"]
