"""Detection of changes to the model or composite that would invalidate a plan."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any

import torch
import torch.nn.modules.module as all_modules
from torch import Tensor, nn

from ..model.model_protection import step_between, values_state
from ..model.quantized import PLAIN_TYPES
from ..recording.recording import _RECORDING
from .python_state import PythonState
from .tensor_sums import TensorSums

_ENTRIES = 64
"""Number of elements per tensor that are compared by value. Writes through ``.data`` do not change versions."""


class ModelState:
    """Ids and versions of all objects in a model's modules, for the detection of changes.

    Args:
        model: The model to monitor.
        composite: The composite whose rules are applied to the model.
    """

    def __init__(self, model: nn.Module, composite: Any = None) -> None:
        with _RECORDING:
            self._take(model)
            self._python = PythonState([*model.modules(), composite])
            # Modules and tensors that the model reads but that are not registered in it, such as those in a list.
            modules = self._python.modules
            weights = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
            tensors = [tensor for tensor in (*self._python.tensors, *weights) if tensor.layout == torch.strided]
            self._further = _Objects(modules, tensors)
            self._sums = TensorSums([tensor for _, tensor in self._tensors] + weights)

    def _take(self, model: nn.Module) -> None:
        self._tensors = [*model.named_parameters(), *model.named_buffers()]
        self._names = {id(one): name for name, one in (*model.named_modules(), *self._tensors)}
        self._common = _common_hooks()
        self._objects = _Objects(model.modules(), [tensor for _, tensor in self._tensors])
        self._entries = _entries([tensor for _, tensor in self._tensors])
        self._values = [torch.cat(views).clone() for views in self._entries]

    def is_outdated(self) -> bool:
        """Returns True if anything that the plan depends on has changed: any weight, buffer or Python object.

        A plan makes this comparison once per call. :meth:`changed` is faster and checks only what a measure that has
        already been computed depends on.
        """
        if self.changed():
            return True
        with _RECORDING:
            return self._sums.have_changed() or self._python.has_changed() or self._further.changed() is not None

    def changed(self) -> str:
        """Describes the first change found. Returns an empty string if there is none."""
        if not self._changed():
            return ""
        with _RECORDING:  # the change may consist of hooks that another thread removes after its recording
            return self._changed()

    def _changed(self) -> str:
        if _common_hooks() != self._common:
            return "the hooks of all modules"
        changed = self._objects.changed()
        if changed is not None:
            name = self._names[id(changed)]
            return "the model" if not name else f"module {name!r}" if isinstance(changed, nn.Module) else f"{name!r}"
        for views, values in zip(self._entries, self._values, strict=True):
            if not torch.equal(torch.cat(views), values):
                return "a weight"
        return ""

    def memories(self) -> set[int]:
        """Returns the storage addresses of all parameters and buffers."""
        dense = (tensor for _, tensor in self._tensors if tensor.layout == torch.strided)
        return {tensor.untyped_storage().data_ptr() for tensor in dense}


class _Objects:
    """Attributes of modules and versions of tensors, for the detection of changes."""

    def __init__(self, modules: Iterable[nn.Module], tensors: Iterable[Tensor]) -> None:
        self._modules = [(module, _Contents([module])) for module in modules]
        self._all = _Contents([module for module, _ in self._modules])
        self._tensors = [(tensor, values_state(tensor)) for tensor in tensors]
        self._plain = [
            tensor for tensor, _ in self._tensors if type(tensor) in PLAIN_TYPES and tensor.layout == torch.strided
        ]
        self._states = self._states_of_plain()

    def changed(self) -> nn.Module | Tensor | None:
        """Returns the first module or tensor that has changed, or None."""
        if self._all.have_changed():
            return next((module for module, one in self._modules if one.have_changed()), self._modules[0][0])
        if len(self._plain) == len(self._tensors) and self._states_of_plain() == self._states:
            return None
        return next((tensor for tensor, state in self._tensors if values_state(tensor) != state), None)

    def _states_of_plain(self) -> list[int]:
        """Returns versions and addresses. If they are unchanged, so are those of :func:`values_state`, more slowly."""
        return [tensor._version for tensor in self._plain] + [tensor.data_ptr() for tensor in self._plain]


_DICTS = (dict, OrderedDict)


class _Contents:
    """Attributes of modules and the items of containers among them, compared by identity without Python loops.

    The attributes are kept alive, so that new objects cannot reuse their ids.

    Args:
        modules: The modules.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._modules = modules
        self._dicts = [module.__dict__ for module in modules]
        held = [value for one in self._dicts for value in one.values()]
        containers = [value for value in held if value.__class__ in (*_DICTS, list, set, tuple)]
        self._empty = [value for value in containers if not value]
        filled = [value.values() if value.__class__ in _DICTS else value for value in containers if value]
        # Views of dictionaries show later changes.
        self._views = [*(one.values() for one in self._dicts), *filled]
        self._sizes, self._held = [*map(len, self._views)], [*chain.from_iterable(self._views)]

    def have_changed(self) -> bool:
        """Returns True if an attribute or an item has been replaced, added or removed."""
        return (
            not all(map(is_, map(vars, self._modules), self._dicts))
            or [*map(len, self._views)] != self._sizes
            or any(self._empty)
            or not all(map(is_, chain.from_iterable(self._views), self._held))
        )


def hooked(model: nn.Module) -> str:
    """Describes the first hook of the user in a model. Returns an empty string if there is none.

    Such hooks must run in every forward pass. Hooks of PyTorch, such as those of weight norm, merely compute tensors
    and are ignored.
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


def _entries(tensors: list[Tensor]) -> list[list[Tensor]]:
    """Returns views of a few elements of each floating-point tensor, grouped by device and dtype."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.layout == torch.strided and tensor.is_contiguous() and tensor.is_floating_point() and tensor.numel():
            flat = tensor.detach().view(-1)
            groups.setdefault((tensor.device, tensor.dtype), []).append(flat[:: step_between(flat.numel(), _ENTRIES)])
    return [views for views in groups.values() if not bool(torch.cat(views).isnan().any())]


def settings(value: Any, depth: int = 4) -> Any:
    """Returns the settings of a composite as nested tuples of the attributes of its rules."""
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
"""Attributes of composites and hooks that running the model changes."""

__all__ = ["ModelState", "hooked", "settings"]
