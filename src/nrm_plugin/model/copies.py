"""The user's modules, left alone: shells that share tensors with them, and a guard that puts everything back."""

from __future__ import annotations

import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
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


def shell_of(module: nn.Module) -> nn.Module:
    """A module over the same tensors with dictionaries of its own and no hooks.

    Zennit's ``ParamMod`` writes the modified parameters into the module for a moment; into a shell it may.
    A shallow copy will not do: it shares the parameter dictionary.
    """
    kind: type[nn.Module] = parametrize.type_before_parametrizations(module)
    shell: nn.Module = kind.__new__(kind)
    shell.__dict__ = dict(module.__dict__)
    for key in _HOOK_DICTS:
        if key in shell.__dict__:
            shell.__dict__[key] = OrderedDict()
    shell._parameters = {name: _shared(parameter) for name, parameter in module._parameters.items()}
    shell._buffers = dict(module._buffers)
    shell._modules = {name: child and shell_of(child) for name, child in module._modules.items()}
    _compute_parametrized(shell, module)
    forward = shell.__dict__.get("forward")
    if isinstance(forward, types.MethodType) and forward.__self__ is module:
        # A canonizer bound a method to the module; on the shell it must read the shell's parameters.
        shell.__dict__["forward"] = types.MethodType(forward.__func__, shell)
    return shell


def _compute_parametrized(shell: nn.Module, module: nn.Module) -> None:
    """Puts computed weights where the layer would have its own: a rule modifies what the layer multiplies with."""
    if parametrize.is_parametrized(module):
        del shell._modules["parametrizations"]
        for name in module.parametrizations:  # type: ignore[union-attr]
            shell._parameters[name] = _shared(getattr(module, name))
    for name in ("weight", "bias"):  # torch's older weight and spectral norms keep it as an attribute
        if isinstance(shell.__dict__.get(name), Tensor):
            shell._parameters[name] = _shared(shell.__dict__.pop(name))


def _shared(parameter: Tensor | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(parameter.detach(), requires_grad=False)


@contextmanager
def preserved(model: nn.Module) -> Iterator[None]:
    """Puts back, on the way out, everything that recording may touch.

    Attributes, hooks, parameters (the objects, their data, ``requires_grad`` and ``grad``), buffers, training mode
    and random state. What did not change is not written to.
    """
    modules = [(module, _state(module)) for module in model.modules()]
    parameters = [(p, p.data, p.requires_grad) for p in model.parameters()]
    buffers = [(b, b.data, b.requires_grad) for b in model.buffers()]
    random = torch.get_rng_state()
    try:
        yield
    finally:
        for module, state in modules:
            _restore(module, state)
        for tensor, data, requires_grad in parameters + buffers:
            if tensor.shape != data.shape or _address(tensor) != _address(data):
                tensor.data = data
            if tensor.requires_grad != requires_grad:
                tensor.requires_grad_(requires_grad)
        torch.set_rng_state(random)


_State = tuple[dict[str, Any], dict[str, dict[Any, Any]]]
"""Attributes of a module, and what was in those that are dictionaries with something in them."""


def _state(module: nn.Module) -> _State:
    attributes = module.__dict__
    return dict(attributes), {key: dict(v) for key, v in attributes.items() if v.__class__ in _DICTS and v}


_DICTS = (dict, OrderedDict)


def _restore(module: nn.Module, state: _State) -> None:
    attributes, (before, contents) = module.__dict__, state
    for key in [key for key in attributes if key not in before]:
        del attributes[key]
    for key, value in before.items():
        if attributes.get(key) is not value or key not in attributes:
            attributes[key] = value
        # The same dictionary object, since handles of the user's own hooks refer to it.
        if value.__class__ in _DICTS and not _is_same(value, contents.get(key, {})):
            value.clear()
            value.update(contents.get(key, {}))


def _is_same(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    """Whether two dictionaries hold the same objects in the same order."""
    if not one and not other:
        return True
    pairs = zip(one.items(), other.items(), strict=True)
    return len(one) == len(other) and all(a == b and value is known for (a, value), (b, known) in pairs)


def _address(tensor: Tensor) -> int:
    """Where a tensor is in memory; a sparse one by its values."""
    return _stored(tensor).data_ptr()


def _stored(tensor: Tensor) -> Tensor:
    """The entries of a tensor that are kept."""
    if tensor.layout == torch.strided:
        return tensor
    values: Tensor = tensor._values() if tensor.layout == torch.sparse_coo else tensor.values()
    return values


class Fingerprint:
    """Notices that a parameter or buffer was changed in place, by version counter and by a sample of its entries.

    The sample also catches writes through ``parameter.data``, which leave the version counter alone, unless they spare
    every entry of the sample; small tensors are in it as a whole.
    """

    def __init__(self, model: nn.Module, entries: int = 4096) -> None:
        self._seen: list[tuple[str, Tensor, tuple[int, int], Tensor, Tensor]] = []
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            flat = _stored(tensor.detach()).flatten()
            entry = flat[:: max(1, -(-flat.numel() // entries))]
            is_view = flat.data_ptr() == _address(tensor) and flat.numel() > 0
            sample = entry.clone()
            # Of a tensor that is laid out otherwise, flattening makes a copy, which would not change with it.
            place = entry if is_view and not bool((sample != sample).any()) else torch.empty(0)
            self._seen.append((name, tensor, (tensor._version, _address(tensor)), place, sample))
        self._entries = entries

    def changed(self) -> list[str]:
        """Names of the tensors that are not what they were."""
        return [
            name
            for name, tensor, state, place, sample in self._seen
            if (tensor._version, _address(tensor)) != state
            or not torch.equal(*((place, sample) if place.numel() else self._finite(tensor, sample)))
        ]

    def _finite(self, tensor: Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Both samples without nan, which equals nothing."""
        flat = _stored(tensor.detach()).flatten()
        entries = flat[:: max(1, -(-flat.numel() // self._entries))]
        return (torch.nan_to_num(entries), torch.nan_to_num(sample)) if flat.is_floating_point() else (entries, sample)
