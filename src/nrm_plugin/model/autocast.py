"""Mixed precision, as under ``torch.autocast``: layers run in reduced precision, and all sums stay in float32.

Only products with a weight are computed in reduced precision, both in the layer itself and in the linear map and its
transpose in each branch of the rule. Relevance, column sums, gains and all other sums have the dtype of the
inputs. If the model itself has a dtype of lower precision than float32, these quantities and all products in kernels
are computed in float32.

Source: new in this package.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .linear_maps import LinearMap

SHORT = (torch.bfloat16, torch.float16)
"""Half-precision dtypes supported for models, inputs and outputs."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype of a tensor's relevance: its own dtype, but at least float32."""
    return torch.float32 if is_short_format(dtype) else dtype


def is_short_format(dtype: torch.dtype) -> bool:
    """Returns True if a dtype is a floating-point dtype of less than 32 bits, such as bfloat16 or an 8-bit float."""
    return dtype.is_floating_point and dtype.itemsize < torch.float32.itemsize


def is_short(tensor: Tensor) -> bool:
    """Returns True if a tensor has a floating-point dtype of less than 32 bits."""
    return is_short_format(tensor.dtype)


class InFloat32(TorchFunctionMode):
    """Torch function mode that converts floating-point arguments of less than 32 bits to float32."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _DTYPE:
            return working_dtype(func(*args))
        if getattr(func, "__name__", "") in _METADATA:
            return func(*args, **(kwargs or {}))
        values = {key: _in_float32(value) for key, value in (kwargs or {}).items()}
        return _SHORTENING.get(func, func)(*_in_float32(args), **values)


_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_METADATA = frozenset("__get__ size stride numel dim data_ptr untyped_storage is_floating_point is_set_to".split())
"""Functions that read only metadata. Their arguments need no conversion."""
_SHORTENING: dict[Any, Callable[..., Any]] = {Tensor.half: Tensor.float, Tensor.bfloat16: Tensor.float}


def _in_float32(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(working_dtype(value.dtype)) if is_short(value) else value
    if isinstance(value, torch.dtype):
        return working_dtype(value)
    return type(value)(_in_float32(item) for item in value) if type(value) in (list, tuple) else value


Formats = Mapping[str, torch.dtype]
"""Dtype in which layers with a weight run, for each type of device with autocast."""


class _Current(threading.local):
    """Thread-local state of mixed precision."""

    def __init__(self) -> None:
        self.formats: Formats = {}


_CURRENT = _Current()


def current(device: torch.device) -> torch.dtype | None:
    """Returns the dtype set by :func:`layers_in`, or None if layers run in the dtype of their inputs."""
    return _CURRENT.formats.get(device.type)


@contextmanager
def layers_in(formats: Formats) -> Iterator[None]:
    """Context manager in which layers with a weight run in the given dtypes."""
    outer, _CURRENT.formats = _CURRENT.formats, formats
    try:
        yield
    finally:
        _CURRENT.formats = outer


def asked_for(device: torch.device) -> torch.dtype | None:
    """Returns the dtype of the active ``torch.autocast``, or None if autocast is disabled."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    dtype = torch.get_autocast_dtype(device.type)
    return dtype if dtype in SHORT else None


def asked() -> dict[str, torch.dtype]:
    """Returns the dtype of each active ``torch.autocast``, keyed by the type of its devices."""
    formats = {kind: asked_for(torch.device(kind)) for kind in _active()}
    return {kind: dtype for kind, dtype in formats.items() if dtype is not None}


def _active() -> list[str]:
    """Returns the types of devices for which ``torch.autocast`` is active."""
    accelerator = torch.accelerator.current_accelerator()
    kinds = ("cpu",) if accelerator is None else ("cpu", accelerator.type)
    return [kind for kind in kinds if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]


@contextmanager
def exact() -> Iterator[None]:
    """Context manager that disables ``torch.autocast`` on all devices."""
    with ExitStack() as stack:
        for kind in _active():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def precise_layers() -> Iterator[None]:
    """Context manager in which layers run in the dtypes of autocast, and all other operations in float32 or float64."""
    with layers_in(asked() or _CURRENT.formats), exact():
        yield


def shortened(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Casts a tensor to reduced precision, rescaled for float16.

    Relevance can be far smaller than the smallest positive float16. The scale is a power of two, which makes rescaling
    exact.

    Returns:
        The tensor divided by the scale, in the given dtype; and the scale, or None if it is 1.
    """
    if dtype is not torch.float16 or not values.numel():
        return values.to(dtype), None
    largest = values.abs().amax()
    scale = torch.exp2(torch.floor(torch.log2(largest.clamp(min=torch.finfo(values.dtype).tiny))))
    return (values / scale).to(dtype), scale


def lowered(maps: LinearMap, dtype: torch.dtype) -> LinearMap:
    """Wraps a linear map so that its products are computed in reduced precision.

    Args:
        maps: The linear map of a weight in reduced precision.
        dtype: The dtype of the weight.

    Returns:
        A linear map that accepts any dtype and returns results of the same dtype.
    """

    def down(relevance: Tensor) -> Tensor:
        short, scale = shortened(relevance, dtype)
        return _restored(maps.down(short), scale, relevance.dtype)

    def up(values: Tensor) -> Tensor:
        short, scale = shortened(values, dtype)
        return _restored(maps.up(short), scale, values.dtype)

    slope = maps.weight_gradient

    def weight_gradient(values: Tensor, relevance: Tensor) -> Tensor:
        assert slope is not None
        given, unit = shortened(values, dtype)
        short, scale = shortened(relevance, dtype)
        return _restored(_restored(slope(given, short), scale, relevance.dtype), unit, relevance.dtype)

    return LinearMap(down, up, None if slope is None else weight_gradient)


def _restored(values: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    restored = values.to(dtype)
    return restored if scale is None else restored.mul_(scale)


__all__ = [
    "SHORT",
    "Formats",
    "InFloat32",
    "asked",
    "asked_for",
    "current",
    "exact",
    "is_short",
    "is_short_format",
    "layers_in",
    "lowered",
    "precise_layers",
    "shortened",
    "working_dtype",
]
