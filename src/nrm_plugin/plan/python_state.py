"""Detection of changes to Python objects that the model reads besides its parameters and buffers."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..model.user_code import cells, is_installed_module, names_in, slots_of

MOST = 20_000
"""Maximum number of objects that are compared."""
_LARGEST = 1 << 16
"""Maximum number of elements of an array that are compared by value."""
CONTAINERS = (dict, OrderedDict, list, set, tuple)
"""Containers that are compared item by item, with the attributes of the module to which they belong."""
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, np.generic)
_SETTLED = (*_PLAIN, types.ModuleType)
"""Types of objects that are compared by identity alone."""
_PASSED_OVER = frozenset("torch numpy logging threading weakref _weakrefset zennit captum nrm_plugin builtins".split())
"""Packages whose objects are compared elsewhere or do not affect what a model computes."""
_SKIPPED = frozenset(
    "_parameters _buffers _modules _non_persistent_buffers_set _backward_hooks _backward_pre_hooks _forward_hooks "
    "_forward_pre_hooks _state_dict_hooks __module__ __doc__ __dict__ __weakref__ __annotations__ "
    "handles hook_refs stored_tensors tensor_handles active _checked".split()
)
"""Attributes of modules, classes and composites that are compared elsewhere, or that running the model changes."""

Held = Callable[[], Iterable[Any]]


class PythonState:
    """State of the containers, configurations, functions and classes reachable from given objects, to detect changes.

    Containers and the attributes of objects are compared by identity, and arrays by value. Functions are compared by
    the variables of their closures and the globals that they use, and classes by their attributes. Code of installed
    packages is assumed not to change.

    Args:
        roots: The modules of the model and further objects such as its composite.

    Attributes:
        modules: Modules that were reached but are not among the roots, such as modules in a list. Attributes of these
            modules and of the roots are not compared.
        tensors: Tensors that were reached.
    """

    def __init__(self, roots: Iterable[Any]) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self._watched: list[tuple[Held, list[Any]]] = []
        self._arrays: list[tuple[np.ndarray[Any, Any], bytes]] = []
        waiting = deque(roots)
        known = {id(root) for root in waiting}
        seen: list[Any] = [*waiting]
        self._given, self._compared = frozenset(known), set[int]()
        while waiting and len(seen) < MOST:
            for item in self._note(waiting.popleft()):
                if id(item) not in known and not isinstance(item, _SETTLED):
                    known.add(id(item))
                    seen.append(item)
                    waiting.append(item)

    def has_changed(self) -> bool:
        """Returns True if any of the objects has changed."""
        for held, before in self._watched:
            now = _contents(held)
            if len(now) != len(before) or not all(map(is_, now, before)):
                return True
        return any(_bytes(array) != before for array, before in self._arrays)

    def _note(self, value: Any) -> Iterable[Any]:
        """Stores the contents of an object for later comparison and returns them."""
        if type(value) in CONTAINERS and not value and id(value) in self._compared:
            return ()  # most tables of hooks
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return ()
        if isinstance(value, np.ndarray):
            self._arrays.append((value, _bytes(value)))
            return ()
        held = _held(value)
        if held is None:
            return ()
        now = _contents(held)
        if isinstance(value, nn.Module):
            self._compared.update(id(item) for item in now if type(item) in CONTAINERS)
            if id(value) not in self._given:
                self.modules.append(value)
                now += value._modules.values()
        elif not isinstance(value, (tuple, frozenset)) and id(value) not in self._compared:
            self._watched.append((held, now))
        return now


def _held(value: Any) -> Held | None:
    """Returns a function that lists the contents of an object, or None if the object is not compared."""
    if isinstance(value, dict):
        return lambda: [*value, *value.values()]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return lambda: value
    if isinstance(value, types.FunctionType):
        return None if is_installed_module(value.__module__ or "builtins") else _of_function(value)
    if isinstance(value, types.MethodType):
        return lambda: (value.__func__, value.__self__)
    if isinstance(value, (staticmethod, classmethod)):
        return lambda: (value.__func__,)
    if isinstance(value, property):
        return lambda: (value.fget,)
    if isinstance(value, functools.partial):
        return lambda: (value.func, value.args, value.keywords)
    if isinstance(value, type):
        return None if is_installed_module(value.__module__) else lambda: (*_attributes(value), *value.__bases__)
    kind = type(value)
    is_passed_over = kind.__module__.partition(".")[0] in _PASSED_OVER
    if not (hasattr(value, "__dict__") or any(slots_of(kind))) or (
        is_passed_over and not isinstance(value, nn.Module) and not _is_rule(kind)
    ):
        return None
    return lambda: (*_attributes(value), kind)


def _contents(held: Held) -> list[Any]:
    try:
        return list(held())
    except RuntimeError:  # a container that another thread changes
        return []


def _is_rule(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in ("zennit", "nrm_plugin")


def _attributes(value: Any) -> list[Any]:
    entries = list(getattr(value, "__dict__", {}).items())
    slots = [getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)]
    return [item for name, item in entries if name not in _SKIPPED] + slots


def _of_function(function: types.FunctionType) -> Held:
    places = [(namespace, key) for _, namespace, key in names_in(function)]

    def held() -> Iterable[Any]:
        around = (*cells(function), *(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
        return (function.__code__, *around, *(namespace.get(key) for namespace, key in places))

    return held


def _bytes(array: np.ndarray[Any, Any]) -> bytes:
    flat = array.reshape(-1)
    return (flat[:: -(-flat.size // _LARGEST)] if flat.size > _LARGEST else flat).tobytes()


__all__ = ["CONTAINERS", "PythonState"]
