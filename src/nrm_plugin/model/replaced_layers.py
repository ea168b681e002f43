"""Copies of models with some layers replaced. A copy shares all weights with the model, which is not modified."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import InputError, UnknownLayerError, brief
from .shallow_copies import rebind

Replacement = Callable[[nn.Module], nn.Module]


def with_replaced(model: nn.Module, replacements: Mapping[str, Replacement], what: str) -> nn.Module:
    """Returns a copy of a model with some layers replaced, which shares all other layers and parameters.

    Args:
        model: The network whose layers are replaced.
        replacements: Functions that map a layer to its replacement, keyed by layer name.
        what: Description of the replacement for error messages, such as ``"subspaces"``.

    Raises:
        UnknownLayerError: If one of the layers is not in the model.
        InputError: If one of the layers contains another.
    """
    known = dict(model.named_modules())
    for name in replacements:
        if not name or name not in known:
            raise UnknownLayerError(
                f"no layer named {brief(name)} to decompose into {what}; model.named_modules() lists them."
            )
        if any(other != name and other.startswith(f"{name}.") for other in replacements):
            raise InputError(f"{brief(name)} contains another layer with {what}; give {what} for only one of them.")
    return _replaced(model, replacements, "")


def _replaced(module: nn.Module, replacements: Mapping[str, Replacement], path: str) -> nn.Module:
    copied: nn.Module = module.__class__.__new__(module.__class__)
    copied.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(module).items()}
    for name, child in module._modules.items():
        full = f"{path}{name}"
        if child is not None and full in replacements:
            copied._modules[name] = replacements[full](child)
        elif child is not None and any(layer.startswith(f"{full}.") for layer in replacements):
            copied._modules[name] = _replaced(child, replacements, f"{full}.")
    rebind(copied, module)
    return copied


def first_tensor(values: Any) -> Tensor | None:
    """Returns the first tensor in a tuple, list or mapping, the value itself if it is a tensor, or else None."""
    if isinstance(values, Tensor):
        return values
    items = values.values() if isinstance(values, Mapping) else values if isinstance(values, (tuple, list)) else ()
    return next((item for item in items if isinstance(item, Tensor)), None)


def with_first_tensor(values: Any, tensor: Tensor) -> Any:
    """Returns a tuple or list with its first tensor replaced, or ``tensor`` if the value is a tensor.

    Raises:
        InputError: If the value is neither a tensor nor a tuple or list.
    """
    if isinstance(values, Tensor):
        return tensor
    if type(values) not in (tuple, list):
        raise InputError(f"a layer that returns {brief(values)} has no single output; use a layer inside of it.")
    position = next(number for number, item in enumerate(values) if isinstance(item, Tensor))
    return type(values)([*values[:position], tensor, *values[position + 1 :]])


__all__ = ["Replacement", "first_tensor", "with_first_tensor", "with_replaced"]
