"""State of a model and settings of a composite on which a plan depends."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.modules.module as all_modules
from torch import Tensor, nn

from ..model.model_protection import step_between, values_state
from ..recording.recording import _RECORDING
from .python_state import PythonState
from .tensor_sums import TensorSums

_ENTRIES = 64
"""Number of entries per tensor that are compared by value, since writes through ``.data`` do not change the version."""


class ModelState:
    """Detects changes to a model from the ids and versions of all objects that its modules contain.

    Args:
        model: The model to watch.
        composite: The composite whose rules are applied to the model.
    """

    def __init__(self, model: nn.Module, composite: Any = None) -> None:
        with _RECORDING:
            self._take(model)
            self._python = PythonState([*model.modules(), composite])
            self._further = _Further(self._python)
            self._sums = TensorSums([tensor for _, tensor in self._tensors] + self._further.weights)

    def _take(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._modules = [(module, _attributes(module), _held(module)) for module in model.modules()]
        self._common = _common_hooks()
        self._tensors = [*model.named_parameters(), *model.named_buffers()]
        self._versions = [values_state(tensor) for _, tensor in self._tensors]
        self._entries = _entries([tensor for _, tensor in self._tensors])
        self._values = [torch.cat(views).clone() for views in self._entries]

    def is_outdated(self) -> bool:
        """Returns whether anything has changed, which includes all entries of weights, and Python objects.

        A plan compares once for each call. :meth:`changed` is faster, and compares what an existing measure needs.
        """
        if self.changed():
            return True
        with _RECORDING:
            return self._sums.have_changed() or self._python.has_changed() or self._further.have_changed()

    def changed(self) -> str:
        """Describes what has changed; returns an empty string if nothing has changed."""
        if not self._changed():
            return ""
        with _RECORDING:  # the change may consist of hooks that another thread removes after its recording
            return self._changed()

    def _changed(self) -> str:
        if _common_hooks() != self._common:
            return "the hooks of all modules"
        for module, attributes, _ in self._modules:
            if _attributes(module) != attributes:
                return f"module {self._names[id(module)]!r}" if self._names[id(module)] else "the model"
        for (name, tensor), state in zip(self._tensors, self._versions, strict=True):
            if values_state(tensor) != state:
                return f"{name!r}"
        for views, values in zip(self._entries, self._values, strict=True):
            if not torch.equal(torch.cat(views), values):
                return "a weight"
        return ""

    def memories(self) -> set[int]:
        """Returns the storage addresses of all parameters and buffers."""
        dense = (tensor for _, tensor in self._tensors if tensor.layout == torch.strided)
        return {tensor.untyped_storage().data_ptr() for tensor in dense}


class _Further:
    """Modules and tensors that a model reads, but which are not registered in it, such as those in a list.

    Attributes:
        weights: Parameters and buffers of the modules.
    """

    def __init__(self, state: PythonState) -> None:
        self.weights = [tensor for module in state.modules for tensor in (*module.parameters(), *module.buffers())]
        self._modules = [(module, _attributes(module), _held(module)) for module in state.modules]
        self._tensors = [tensor for tensor in (*state.tensors, *self.weights) if tensor.layout == torch.strided]
        self._versions = [values_state(tensor) for tensor in self._tensors]

    def have_changed(self) -> bool:
        """Returns whether one of them has changed."""
        if any(_attributes(module) != attributes for module, attributes, _ in self._modules):
            return True
        return any(values_state(one) != state for one, state in zip(self._tensors, self._versions, strict=True))


_DICTS = (dict, OrderedDict)


def hooked(model: nn.Module) -> str:
    """Returns a description of the first user hook in a model, or an empty string if there is none.

    Such hooks must run in every forward pass. Hooks of PyTorch itself, such as those of weight norm, only compute
    tensors and are ignored.
    """
    if _common_hooks():
        return "all modules have hooks"
    for name, module in model.named_modules():
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if any(not str(getattr(hook, "__module__", "")).startswith("torch.") for hook in hooks):
            return f"module {name!r} has hooks" if name else "the model has hooks"
    return ""


def _common_hooks() -> tuple[int, ...]:
    tables = (all_modules._global_forward_hooks, all_modules._global_forward_pre_hooks)
    return tuple(id(hook) for table in tables for hook in table.values())


def _attributes(module: nn.Module) -> tuple[Any, ...]:
    """Returns the ids of a module's attributes and of the items in its containers."""
    held = module.__dict__
    contents = [tuple(map(id, value.values())) for value in held.values() if value.__class__ in _DICTS and value]
    lists = [tuple(map(id, value)) for value in held.values() if value.__class__ in (list, set, tuple) and value]
    return (tuple(map(id, held.values())), *contents, *lists)


def _held(module: nn.Module) -> list[Any]:
    """Returns references to the attributes of a module, so that their ids cannot be reused by new objects."""
    values = list(module.__dict__.values())
    return [values, *(list(value.values()) for value in values if value.__class__ in _DICTS)]


def _entries(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Returns views of a few entries of each floating-point tensor, grouped by device and dtype."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.is_contiguous() and tensor.is_floating_point() and tensor.numel():
            flat = tensor.detach().view(-1)
            groups.setdefault((tensor.device, tensor.dtype), []).append(flat[:: step_between(flat.numel(), _ENTRIES)])
    return [views for views in groups.values() if not any(bool(view.isnan().any()) for view in views)]


def settings(value: Any, depth: int = 4) -> Any:
    """Returns the settings of a composite as a nested tuple of the attributes of its rules."""
    if value is None or isinstance(value, (bool, int, float, str, type)):
        return value
    if isinstance(value, Tensor):
        return (id(value), *values_state(value))
    if depth == 0:
        return id(value)
    if isinstance(value, (list, tuple)):
        return tuple(settings(item, depth) for item in value)
    if isinstance(value, dict):
        return tuple((settings(key, depth), settings(item, depth)) for key, item in value.items())
    if type(value).__module__.partition(".")[0] in ("zennit", "nrm_plugin"):
        return (type(value), tuple((key, settings(item, depth - 1)) for key, item in _own(value)))
    return id(value)


def _own(value: Any) -> Iterator[tuple[str, Any]]:
    for key, item in getattr(value, "__dict__", {}).items():
        if key not in _RUNNING:
            yield key, item


_RUNNING = frozenset(["handles", "hook_refs", "stored_tensors", "tensor_handles", "active", "_checked"])
"""Attributes of composites and hooks that change when the model runs."""

__all__ = ["ModelState", "hooked", "settings"]
