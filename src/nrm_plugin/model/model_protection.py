"""Protection of the user's model: its state is restored after a recording, and in-place changes are detected."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .devices import random_states, restore_random_states
from .quantized import PLAIN_TYPES, is_quantized, packed_tensors, plain_tensors
from .shapes_without_values import data_address, storage_address
from .trace_guards import unwatched


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Context manager that restores all state of the model that a recording might change.

    The state consists of attributes, hooks, parameters (the objects, their data, ``requires_grad`` and ``grad``),
    buffers, training mode and the random state. Unchanged state is not written. Quantized layers are not restored:
    at their first call, some convert their weights together with state outside the module.
    """
    with unwatched():
        every = list(model.modules())
        quantized = [module for module in every if is_quantized(module)]
        modules = [(module, _state(module)) for module in every if module not in quantized]
        packed = {id(tensor) for module in quantized for tensor in packed_tensors(module)}
        named = [tensor for _, tensor in named_tensors(model) if id(tensor) not in packed]
        tensors = [(tensor, tensor.data, tensor.requires_grad) for tensor in named]
        versions = [(tensor, tensor._version) for tensor, _, _ in tensors if isinstance(tensor, nn.Parameter)]
        drawn = random_states()
    try:
        yield
    finally:
        for module, state in modules:
            _restore(module, state)
        with unwatched():
            for tensor, data, requires_grad in tensors:
                if tensor.shape != data.shape or _address(tensor) != _address(data):
                    tensor.data = data
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
        for tensor, version in versions:
            if tensor._version != version:  # a canonizer has overwritten and restored the weight
                note_restored(tensor, version)
        restore_random_states(drawn)


def named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns the names and tensors of all parameters and buffers; shared tensors are listed once."""
    names: dict[Tensor, str] = {}  # tensors are hashed by identity
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                names.setdefault(tensor, f"{path}.{name}" if path else name)
    return [(name, tensor) for tensor, name in names.items()]


_State = tuple[dict[str, Any], dict[str, dict[Any, Any]]]
"""Attributes of a module and the contents of nonempty dictionaries among them."""


def _state(module: nn.Module) -> _State:
    attributes = module.__dict__
    return dict(attributes), {key: dict(v) for key, v in attributes.items() if v.__class__ in _DICTS and v}


_DICTS = (dict, OrderedDict)


def _restore(module: nn.Module, state: _State) -> None:
    attributes, (before, contents) = module.__dict__, state
    for key in [key for key in attributes if key not in before]:
        del attributes[key]
    for key, value in before.items():
        if key not in attributes or attributes[key] is not value:
            attributes[key] = value
        # The dictionary is modified in place, since handles of the user's hooks refer to it.
        if value.__class__ in _DICTS and (value or key in contents) and not _is_same(value, contents.get(key, {})):
            value.clear()
            value.update(contents.get(key, {}))


def _is_same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Returns True if two dictionaries map the same keys to the same objects in the same order."""
    pairs = zip(one.items(), other.items(), strict=True)
    return len(one) == len(other) and all(a == b and value is known for (a, value), (b, known) in pairs)


_RESTORED: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Number of in-place writes to each tensor that have been undone."""


def values_state(tensor: Tensor) -> tuple[int, int]:
    """Returns a key that changes when a tensor is modified: its version, without undone writes, and its address."""
    undone = int(_RESTORED.get(tensor, 0)) if _RESTORED.data else 0  # type: ignore[no-untyped-call, unused-ignore]
    return tensor._version - undone, _address(tensor)


def note_restored(tensor: Tensor, version: int) -> None:
    """Records that a tensor again has the values of an earlier version."""
    _RESTORED[tensor] = tensor._version - version + int(_RESTORED.get(tensor, 0))  # type: ignore[no-untyped-call, unused-ignore]


def _address(tensor: Tensor) -> int:
    """Returns the data address of a tensor, or of its values if it is sparse or a wrapper."""
    plain = tensor if type(tensor) in PLAIN_TYPES else next(plain_tensors(tensor))
    return data_address(_stored(plain))


def memory_address(tensor: Tensor) -> int:
    """Returns the storage address of a tensor, or of its values if it is sparse."""
    return storage_address(_stored(tensor))


def _stored(tensor: Tensor) -> Tensor:
    """Returns the tensor of the stored values of a sparse tensor. Returns a dense tensor unchanged."""
    if tensor.layout == torch.strided:
        return tensor
    values: Tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    return values


def step_between(size: int, entries: int) -> int:
    """Returns the stride at which a flattened tensor is subsampled to at most ``entries`` elements.

    The stride is coprime to the size. The samples of a matrix thus fall into all rows and columns.
    """
    step = max(1, -(-size // entries))
    while math.gcd(step, size) > 1:
        step += 1
    return step


class Fingerprint:
    """Fingerprint of a model's parameters and buffers, for the detection of in-place changes.

    It consists of version counters and a subsample of the elements. Writes through ``parameter.data`` do not change
    the version counter and are detected only if they change a sampled element. Small tensors are sampled completely.
    """

    def __init__(self, model: nn.Module, entries: int = 4096) -> None:
        every = [(name, part) for name, tensor in named_tensors(model) for part in plain_tensors(tensor)]
        self._states = [(name, tensor, values_state(tensor)) for name, tensor in every]
        groups: dict[Any, list[_Sample]] = {}
        with torch.no_grad():
            for name, tensor in every:
                groups.setdefault((tensor.device, tensor.dtype), []).append(_Sample(name, tensor, entries))
            self._groups = [(samples, _joined(samples)) for samples in groups.values()]

    def changed(self) -> list[str]:
        """Returns the names of the tensors that have changed."""
        names = {name for name, tensor, state in self._states if values_state(tensor) != state}
        with torch.no_grad():
            for samples, before in self._groups:
                now = _joined(samples)
                if not torch.equal(now, before):
                    sizes = [sample.size for sample in samples]
                    pairs = zip(samples, torch.split(now, sizes), torch.split(before, sizes), strict=True)
                    names.update(sample.name for sample, one, other in pairs if not _is_equal(one, other))
        return [name for name, _, _ in self._states if name in names]


class _Sample:
    """Elements of a tensor at a regular distance, as a view if possible.

    Args:
        name: Name of the tensor.
        tensor: The tensor.
        entries: Maximum number of elements.
    """

    def __init__(self, name: str, tensor: Tensor, entries: int) -> None:
        self.name, self._tensor, self._entries = name, tensor, entries
        values = self.values()
        self.size = values.numel()
        # Flattening a non-contiguous tensor returns a copy, which does not reflect later changes.
        self._view = values if self.size > 0 and data_address(values) == _address(tensor) else None

    def values(self) -> Tensor:
        """Returns the current values of the elements."""
        flat = _stored(self._tensor)
        flat = flat if flat.ndim == 1 else flat.flatten()
        step = step_between(flat.numel(), self._entries)
        return flat if step == 1 else flat[::step]

    def current(self) -> Tensor:
        """Returns the current values, without flattening the tensor again."""
        return self.values() if self._view is None else self._view


def _joined(samples: list[_Sample]) -> Tensor:
    return torch.cat([sample.current() for sample in samples])


def _is_equal(one: Tensor, other: Tensor) -> bool:
    """Returns True if two tensors are equal, with NaN equal to NaN."""
    if one.is_floating_point():
        one, other = torch.nan_to_num(one), torch.nan_to_num(other)
    return torch.equal(one, other)
