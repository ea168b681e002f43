"""Copies of modules that share their tensors. Modifying a copy leaves the module unchanged."""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)

_UNBOUND = frozenset([bool, int, float, str, tuple, list, set, dict, OrderedDict, type(None), Tensor])
"""Types of attributes that are not functions. Most attributes of a module have one of them."""

MAX_DEPTH = 4
"""Maximum depth of nested functions in which a module is replaced by its copy."""


def shared_copy(module: nn.Module) -> nn.Module:
    """Returns a copy of a module that shares its tensors but has its own dictionaries and no hooks.

    Zennit's ``ParamMod`` temporarily writes modified parameters into a module. This is safe for such a copy, but not
    for a shallow copy, which shares the dictionary of parameters.
    """
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    copy: nn.Module = kind.__new__(kind)
    copy.__dict__ = dict(module.__dict__)
    # One dictionary serves all kinds of hooks, since no hook is ever registered on a copy.
    none: OrderedDict[int, object] = OrderedDict()
    copy.__dict__.update({key: none for key in _HOOK_DICTS if key in copy.__dict__})
    with torch._C.DisableTorchFunction():
        copy._parameters = {name: _shared(parameter) for name, parameter in module._parameters.items()}
    copy._buffers = dict(module._buffers)
    copy._modules = {name: child and shared_copy(child) for name, child in module._modules.items()}
    _compute_parametrized(copy, module)
    rebind(copy, module)
    return copy


def rebind(copy: nn.Module, module: nn.Module) -> None:
    """Binds the functions among the attributes of a copy to the copy, so that they read its layers and parameters.

    Canonizers replace the ``forward`` of a single module by a bound method, and Accelerate by a partial function.
    """
    for name, value in copy.__dict__.items():
        if type(value) not in _UNBOUND and callable(value) and not isinstance(value, (type, nn.Module)):
            copy.__dict__[name] = _rebound(value, module, copy)


def _rebound(value: Any, module: nn.Module, copy: nn.Module, depth: int = 0) -> Any:
    """Replaces a module by its copy in a bound method, a partial function or the closure of a function."""
    if value is module:
        return copy
    if depth > MAX_DEPTH:  # a function can refer to itself
        return value
    rebound = functools.partial(_rebound, module=module, copy=copy, depth=depth + 1)
    if isinstance(value, types.MethodType) and value.__self__ is module:
        return types.MethodType(value.__func__, copy)
    if isinstance(value, functools.partial):
        keywords = {key: rebound(item) for key, item in value.keywords.items()}
        called, arguments = rebound(value.func), [rebound(item) for item in value.args]
        before = (value.func, *value.args, *value.keywords.values())
        after = (called, *arguments, *keywords.values())
        is_same = all(one is other for one, other in zip(before, after, strict=True))
        return value if is_same else functools.partial(called, *arguments, **keywords)
    if isinstance(value, types.FunctionType) and value.__closure__:
        contents = [_content(cell) for cell in value.__closure__]
        cells = {k: rebound(item) for k, item in enumerate(contents) if callable(item)}
        changed = {k: types.CellType(item) for k, item in cells.items() if item is not contents[k]}
        return _with_cells(value, changed) if changed else value
    return value


def _with_cells(function: types.FunctionType, changed: dict[int, types.CellType]) -> types.FunctionType:
    """Returns a copy of a function with some variables of its closure replaced."""
    cells = tuple(changed.get(k, cell) for k, cell in enumerate(function.__closure__ or ()))
    copy = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not assigned yet
        return None


def _compute_parametrized(copy: nn.Module, module: nn.Module) -> None:
    """Converts computed weights to parameters. Rules modify the weight that the layer uses."""
    if parametrize.is_parametrized(module):
        del copy._modules["parametrizations"]
        for name in module.parametrizations:  # type: ignore[union-attr]
            copy._parameters[name] = _shared(getattr(module, name))
    for name in ("weight", "bias"):  # torch's older weight and spectral norms store the computed weight as an attribute
        if isinstance(copy.__dict__.get(name), Tensor):
            copy._parameters[name] = _shared(copy.__dict__.pop(name))


def _shared(parameter: Tensor | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter, requires_grad=False)
