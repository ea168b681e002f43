"""Fingerprints of objects, including user code, as JSON values that are equal for objects with the same behavior.

Code of installed packages is identified by the package versions, and all other code by its bytecode and the objects
that it uses.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import hashlib
import importlib.metadata
import json
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..imports import stored_path
from ..model.user_code import cells, distributions, is_installed_module, referenced, slots_of

MAX_DEPTH = 12
"""Maximum depth of nested objects in a fingerprint."""
TRANSIENT = ("handles", "hook_refs", "stored_tensors", "__weakref__")
"""Hook attributes that are run-time state, not settings."""
PLAIN = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex, bytes, range, slice, Path, np.generic)
"""Types described by their string representation."""
NOT_BEHAVIOUR = {"__doc__", "__module__", "__dict__", "__weakref__", "__annotations__", "__qualname__", "__slots__",
                 "__firstlineno__", "__static_attributes__", "__annotate_func__", "__annotations_cache__"}  # fmt: skip
"""Class attributes that do not affect behavior."""

Function = types.FunctionType


def described(value: Any, depth: int = 0, seen: tuple[int, ...] = ()) -> Any:
    """Describes an object by a JSON value, equal for objects with the same behavior, even across processes.

    A function is described by its name, code, defaults and closure, a tensor by its hash. Classes and functions of this
    package are named by their path in stored sweeps (:func:`~nrm_plugin.imports.stored_path`).
    """
    if value is None or isinstance(value, (bool, int, str)):
        return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else value
    if isinstance(value, float):
        return repr(value)
    if id(value) in seen or depth > MAX_DEPTH:
        return "…"
    inner = (depth + 1, (*seen, id(value)))
    if isinstance(value, (Tensor, np.ndarray)):
        return _array(value)
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, Mapping):
        return {_key(key): described(item, *inner) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item, *inner) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(described(item, *inner)) for item in value)
    if isinstance(value, types.MethodType):
        return [described(value.__func__, *inner), described(value.__self__, *inner)]
    if isinstance(value, Function):
        return _function(value, *inner)
    if isinstance(value, functools.partial):
        return [described(part, *inner) for part in (value.func, value.args, value.keywords)]
    if isinstance(value, (*PLAIN, enum.Enum)):
        return f"{type(value).__name__} {value!r}" if isinstance(value, bytes) else f"{type(value).__name__} {value}"
    return {_name(type(value)): _state(value, *inner), **_code_entry(type(value))}


def digest(settings: Any) -> str:
    """Hashes a JSON value."""
    return hashed(json.dumps(settings, sort_keys=True).encode())


def hashed(content: Any) -> str:
    """Hashes bytes."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def tensor_bytes(tensor: Tensor) -> Any:
    """Returns the raw bytes of a tensor."""
    dense = tensor.detach()
    dense = dense.to_dense() if dense.layout != torch.strided else dense
    return dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if dense.numel() else b""


def content_hash(sample: Any) -> str:
    """Hashes the tensors, arrays, images, numbers and strings in a sample."""
    return digest(_content(sample))


def _content(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _content(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_content(item) for item in value]
    has_array = hasattr(value, "__array_interface__") or hasattr(value, "__array__")  # for example, a Pillow image
    if has_array and not isinstance(value, (Tensor, np.ndarray, *PLAIN)):
        return _array(np.asarray(value))
    return described(value)


def _array(value: Tensor | np.ndarray[Any, Any]) -> dict[str, Any]:
    if isinstance(value, Tensor):
        plain = value.dequantize() if value.is_quantized else value
        return {"tensor": [str(value.dtype), list(value.shape), hashed(tensor_bytes(plain.resolve_conj()))]}
    if value.dtype.hasobject:
        return {"array": [str(value.dtype), described(value.tolist())]}
    return {"array": [str(value.dtype), list(value.shape), hashed(np.ascontiguousarray(value).tobytes())]}


def _key(key: Any) -> str:
    return str(key) if isinstance(key, (str, int, float, bool, tuple, type(None))) else json.dumps(described(key))


def _name(value: type | Function) -> str:
    return f"{stored_path(value.__module__)}.{value.__qualname__}"


def _function(value: Function, depth: int, seen: tuple[int, ...]) -> Any:
    state = described([cells(value), value.__defaults__, value.__kwdefaults__], depth, seen)
    if not is_installed(value):
        return {"function": _name(value), "code": user_code(value), "around": state}
    code = f"{value.__code__.co_code.hex()} {[item for item in value.__code__.co_consts if _is_plain(item)]}"
    return {"function": _name(value), "code": hashed(code.encode()), "around": state}


def _state(value: Any, depth: int, seen: tuple[int, ...]) -> Any:
    state = getattr(value, "__dict__", None)
    slots = {name: getattr(value, name) for name in slots_of(type(value)) if hasattr(value, name)}
    if state is None and not slots:
        return getattr(value, "__name__", "")
    items = sorted({**slots, **(state or {})}.items())
    return {key: described(item, depth, seen) for key, item in items if key not in TRANSIENT}


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, type(None)))


# -- code -----------------------------------------------------------------------------------------------------------


def is_installed(value: type | Function) -> bool:
    """Returns True if a class or function is part of Python or of an installed package (with a version)."""
    return is_installed_module(value.__module__ or "builtins")


def package_version(module: str) -> str:
    """Returns the version of a module's package, or ``"?"`` if unknown."""
    top = module.partition(".")[0]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(top)
    with contextlib.suppress(KeyError):  # the general lookup is slower
        return importlib.metadata.version(distributions()[top][0])
    return str(getattr(sys.modules.get(top), "__version__", "?"))


def user_code(value: type | Function) -> dict[str, str]:
    """Hashes the code of a class or function and of the user's objects that it uses. Returns hashes keyed by name."""
    hashes: dict[str, str] = {}
    _visit(value, hashes, set())
    return dict(sorted(hashes.items()))


def _code_entry(kind: type) -> dict[str, Any]:
    return {} if is_installed(kind) else {"code": digest(user_code(kind))}


def _visit(value: Any, hashes: dict[str, str], seen: set[int]) -> None:
    """Adds the hashes of a user's class or function and of the objects that it uses to ``hashes``."""
    value = _unwrapped(value)
    if not isinstance(value, (type, Function)) or id(value) in seen or is_installed(value):
        return
    seen.add(id(value))
    if isinstance(value, type):
        _visit_class(value, hashes, seen)
        return
    wrapped = getattr(value, "__wrapped__", None)
    if wrapped is not None:
        _visit(wrapped, hashes, seen)
    constants: dict[str, Any] = {}
    for name, item in referenced(value):
        _visit_or_note(name, item, constants, hashes, seen)
    for number, item in enumerate([*cells(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]):
        _visit_or_note(f"around {number}", item, constants, hashes, seen)
    _add(hashes, _name(value), [_code(value.__code__, value.__doc__), constants])


def _visit_class(kind: type, hashes: dict[str, str], seen: set[int]) -> None:
    constants: dict[str, Any] = {"bases": [_name(base) for base in kind.__bases__]}
    for base in kind.__bases__:
        _visit(base, hashes, seen)
    for name, item in vars(kind).items():
        if name not in NOT_BEHAVIOUR and not name.startswith("_abc_"):
            _visit_or_note(name, item, constants, hashes, seen)
    _add(hashes, _name(kind), constants)


def _add(hashes: dict[str, str], name: str, content: Any) -> None:
    own = digest(content)
    hashes[name] = own if name not in hashes else digest(sorted([hashes[name], own]))


def _visit_or_note(name: str, item: Any, constants: dict[str, Any], hashes: dict[str, str], seen: set[int]) -> None:
    if isinstance(item, property):
        for part in (item.fget, item.fset):
            _visit(part, hashes, seen)
        return
    inner = _unwrapped(item)
    if isinstance(inner, (type, Function)):
        constants[name] = _name(inner)
        _visit(inner, hashes, seen)
    elif not isinstance(item, types.ModuleType):
        constants[name] = _constant(item)
        _visit(type(item), hashes, seen)


def _constant(item: Any) -> Any:
    """Describes a value used by code: data by content, other objects of installed packages by type."""
    data = (bool, int, float, str, type(None), Tensor, np.ndarray, list, tuple, dict, set, frozenset, functools.partial)
    is_data = isinstance(item, (*data, *PLAIN, enum.Enum)) or not is_installed(type(item))
    return described(item, MAX_DEPTH // 2) if is_data else _name(type(item))


def _unwrapped(value: Any) -> Any:
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        return value.__func__
    if isinstance(value, functools.cached_property):
        return value.func
    return value


def _code(code: types.CodeType, doc: str | None = None) -> Any:
    """Describes the instructions, names and constants of a code object, without line numbers and docstring."""
    constants = [
        _code(item) if isinstance(item, types.CodeType) else sorted(map(repr, item)) if isinstance(item, frozenset)
        else repr(None if item == doc else item) for item in code.co_consts
    ]  # fmt: skip
    return [code.co_code.hex(), list(code.co_names), list(code.co_freevars), code.co_argcount, constants]


__all__ = [
    "content_hash",
    "described",
    "digest",
    "hashed",
    "is_installed",
    "package_version",
    "tensor_bytes",
    "user_code",
]
