"""Forms of tensors, which stand for a tensor where its values are not needed."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..model.autocast import working_dtype
from ..model.shapes_without_values import PLAIN
from ..model.trace_guards import untraced


class Form:
    """Shape, device and relevance dtype of a tensor whose values are not needed, in place of the tensor.

    Args:
        tensor: The tensor.

    Attributes:
        shape: Shape of the tensor.
        dtype: The dtype of the tensor's relevance.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.shape, self.dtype = tensor.shape, working_dtype(tensor.dtype)
        is_plain = type(tensor) in PLAIN
        self._entry = _entry(self.dtype, tensor.device) if is_plain else tensor.new_empty((), dtype=self.dtype)

    @functools.cached_property
    def tensor(self) -> Tensor:
        """An expanded scalar of this form."""
        return self._entry.expand(self.shape)


@functools.cache
def _entry(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), untraced():
        return torch.zeros((), dtype=dtype, device=device)
