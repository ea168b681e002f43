"""Names of modules, which are also the names of their taps (hook points)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..errors import UnknownLayerError

INPUT, OUTPUT = "input", "output"
RESERVED = {INPUT: f".{INPUT}", OUTPUT: f".{OUTPUT}"}
"""Tap names of child modules whose own names are reserved for the model input and output."""


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Returns the tap name of each module: its name in ``named_modules()``, unless this name is reserved."""
    return {module: RESERVED.get(name, name) for name, module in model.named_modules()}


def name_of(layer: str | nn.Module, modules: Mapping[nn.Module, str]) -> str:
    """Returns the tap name of a layer given by name or as a module. The model itself is ``"output"``.

    Raises:
        UnknownLayerError: If the module is not part of the model.
    """
    if isinstance(layer, str):
        return layer
    if layer not in modules:
        raise UnknownLayerError(
            f"the given {type(layer).__name__} is not a module of the measured model. Pass one of "
            "`model.modules()`, not a copy of it, or its name."
        )
    return modules[layer] or OUTPUT


def first_name(name: str, modules: Mapping[nn.Module, str]) -> str:
    """Returns a name in which a module registered under several names is referred to by its first name.

    Examples are shared blocks and shared embeddings, such as ``shared`` and ``encoder.embed_tokens`` in T5. The name
    may continue with a function inside the module or with a call index.
    """
    if name in RESERVED:
        return name
    module = next((module for module, known in modules.items() if not known), None)
    parts, stem = name.split("."), ""
    for number, part in enumerate(parts):
        child = None if module is None else module._modules.get(part)
        call = ""
        if child is None and module is not None:
            part, colon, index = part.rpartition(":")
            child, call = module._modules.get(part), colon + index
        if child is None or child not in modules:
            return ".".join([stem, *parts[number:]]) if stem else name
        module, stem = child, modules[child] + call
    return stem


__all__ = ["INPUT", "OUTPUT", "RESERVED", "first_name", "module_names", "name_of"]
