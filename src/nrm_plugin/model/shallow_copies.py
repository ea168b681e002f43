"""Copies of modules that share their tensors. Modifying a copy leaves the module unchanged."""

from __future__ import annotations

import types
from collections import OrderedDict

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
    forward = copy.__dict__.get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        # A method that a canonizer bound to the module is bound to the copy, so that it reads the copy's parameters.
        copy.__dict__["forward"] = types.MethodType(forward.__func__, copy)
    return copy


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
    return None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)
