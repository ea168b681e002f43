"""Tensors that only have shapes: in an estimate of memory, a measure is computed on torch's fake tensors.

Everything else in the package treats such tensors like all others, with the exceptions defined here.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PLAIN = (Tensor, FakeTensor)
"""Types of tensors without a behavior of their own, unlike other subclasses of ``Tensor``."""


class _Active(threading.local):
    """Thread-local state: whether tensors only have shapes."""

    is_valueless = False


_ACTIVE = _Active()


def is_valueless() -> bool:
    """Returns True if tensors only have shapes in this thread, so that checks of their values are skipped."""
    return _ACTIVE.is_valueless


@contextmanager
def valueless() -> Iterator[None]:
    """Context manager for computations on tensors that only have shapes."""
    outer, _ACTIVE.is_valueless = _ACTIVE.is_valueless, True
    try:
        yield
    finally:
        _ACTIVE.is_valueless = outer


def has_values(tensor: Tensor) -> bool:
    """Returns False if a tensor only has a shape."""
    return not isinstance(tensor, FakeTensor)


def storage_address(tensor: Tensor) -> int:
    """Returns the memory address of a tensor's storage; without values, a number that identifies the storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr() if has_values(tensor) else int(storage._cdata) << 40


def data_address(tensor: Tensor) -> int:
    """Returns the memory address of the first entry of a tensor, based on :func:`storage_address`."""
    if has_values(tensor):
        return tensor.data_ptr()
    return storage_address(tensor) + int(tensor.storage_offset()) * tensor.element_size()


__all__ = ["PLAIN", "data_address", "has_values", "is_valueless", "storage_address", "valueless"]
