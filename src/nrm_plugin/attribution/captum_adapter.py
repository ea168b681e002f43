"""Captum's private helpers, in one place: they move between its versions."""

from __future__ import annotations

from typing import Any

from captum._utils.common import _format_output, _format_tensor_into_tuples
from captum.log import log_usage
from torch import Tensor


def as_tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], bool]:
    """Inputs as a tuple, and whether they were one."""
    return _format_tensor_into_tuples(inputs), isinstance(inputs, tuple)


def as_given(values: tuple[Tensor, ...], was_tuple: bool) -> Any:
    """A tuple for a tuple, a tensor for a tensor."""
    return _format_output(was_tuple, values)


__all__ = ["as_given", "as_tuple", "log_usage"]
