"""Fingerprint of a model: its structure, tensors, and the code and attributes of its modules."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ..recording.recording import _RECORDING
from .fingerprints import described, digest, hashed, is_installed, package_version, tensor_bytes, user_code

MODULE_STATE = frozenset(vars(nn.Module()))
"""Attributes of every module."""
HOOKS = ("_forward_pre_hooks", "_forward_hooks")


def model_fingerprint(model: nn.Module) -> dict[str, Any]:
    """Hashes everything in a model that affects its outputs.

    Waits until no other thread is recording a model. The hooks of a recording are not part of the model.

    Returns:
        A mapping with the keys ``class``; ``structure``, a hash of the model's repr; ``tensors``, a hash of the
        parameters and buffers; ``code``, a hash of each user-defined class and function and the versions of all other
        packages; and ``attributes``, keyed by name for user-defined modules, with a single hash for all other modules.
    """
    with _RECORDING:
        content = hashlib.blake2b(digest_size=16)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            content.update(tensor_bytes(tensor))
        return {
            "class": type(model).__name__,
            "structure": hashed(repr(model).encode()),
            "tensors": content.hexdigest(),
            "code": _code(model),
            "attributes": _attributes(model),
        }


def _code(model: nn.Module) -> dict[str, str]:
    kinds = dict.fromkeys(type(module) for module in model.modules())
    codes: dict[str, str] = {}
    for kind in kinds:
        codes |= {} if is_installed(kind) else user_code(kind)
        top = kind.__module__.partition(".")[0]
        codes |= {f"{top} (version)": package_version(top)} if is_installed(kind) and top != "torch" else {}
    for name, module in model.named_modules():
        generated = getattr(module, "code", None) if isinstance(module, _GENERATED) else None
        codes |= {f"code of {name!r}": hashed(generated.encode())} if isinstance(generated, str) else {}
    return dict(sorted(codes.items()))


_GENERATED = (torch.fx.GraphModule, torch.jit.ScriptModule)
"""Classes of modules with generated code."""


def _attributes(model: nn.Module) -> dict[str, Any]:
    known: dict[int, Any] = {}  # objects that modules share, such as a configuration
    own: dict[str, Any] = {}
    others: list[Any] = []
    for name, module in model.named_modules():
        for attribute, value in _values(module):
            if id(value) not in known:
                known[id(value)] = _short(described(value, 0, (id(module),)))
            if is_installed(type(module)):
                others.append([name, attribute, known[id(value)]])
            else:
                own[f"{name}.{attribute}" if name else attribute] = known[id(value)]
    return {**own, "(of installed modules)": digest(others)}


def _values(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name in HOOKS:
        hooks = list(getattr(module, name, {}).values())
        yield from [(name, hooks)] if hooks else []
    for name, value in sorted(vars(module).items()):
        if name not in MODULE_STATE or name == "training":
            yield name, value


def _short(value: Any) -> Any:
    """Returns numbers and short strings unchanged. Hashes any other value."""
    is_short = value is None or isinstance(value, (bool, int)) or (isinstance(value, str) and len(value) <= 40)
    return value if is_short else digest(value)


__all__ = ["model_fingerprint"]
