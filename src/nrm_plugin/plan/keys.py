"""Hashable keys of model calls and queries: structure, shapes, types and plain values, but no tensor values."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from ..events.event import Event
from ..model.autocast import asked

_LARGEST = 1 << 20
"""Maximum number of elements of a query tensor, such as neuron labels, that is compared by value."""


def call_key(values: Any) -> tuple[Hashable, list[Tensor]]:
    """Returns a key for the form of a model's arguments and the tensors among them, each listed once.

    Raises:
        TypeError: If an argument has no hashable equivalent.
    """
    leaves, form = tree_flatten(values)
    tensors: list[Tensor] = []
    key: list[Hashable] = []
    first: dict[int, int] = {}
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            known = first.setdefault(id(leaf), len(tensors))
            if known == len(tensors):
                tensors.append(leaf)
            key.append((known, leaf.shape, leaf.stride(), leaf.dtype, leaf.device))
        else:
            key.append(frozen(leaf))
    return (form, tuple(key), tuple(asked().items()), torch.get_default_dtype()), tensors


def shapes_of(key: Any) -> str:
    """Formats the tensor shapes of a call, given its key."""
    leaves = key[1] if isinstance(key, tuple) else ()
    shapes = [str(tuple(leaf[1])) for leaf in leaves if isinstance(leaf[1], torch.Size)]
    return ", ".join(shapes) or "that are not tensors"


def frozen(value: Any) -> Hashable:
    """Converts an argument to a hashable equivalent, which includes the values of tensors.

    Raises:
        TypeError: If the argument has no hashable equivalent.
    """
    if value is None or isinstance(value, (bool, int, float, str, Event, nn.Module)):
        return (type(value).__name__, value)
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *map(frozen, value))
    if isinstance(value, dict):
        return ("dict", *((frozen(key), frozen(item)) for key, item in value.items()))
    if isinstance(value, Tensor) and value.numel() <= _LARGEST and value.layout == torch.strided:
        return ("tensor", value.shape, value.dtype, value.device, value.detach().cpu().numpy().tobytes())
    if isinstance(value, (torch.dtype, torch.device)) or callable(value):
        return value  # type: ignore[no-any-return]
    raise TypeError(f"{type(value).__name__} cannot be compared")
