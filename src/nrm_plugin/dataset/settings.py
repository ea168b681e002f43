"""The settings of a sweep: everything that its numbers depend on, as JSON that can be compared."""

from __future__ import annotations

import hashlib
import json
import math
import platform
import types
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..imports import stored_path
from .evaluation import Evaluation, Unpack, device_of, dtype_of
from .sample_batches import DataSource

PACKAGES = ("nrm-plugin", "torch", "zennit")
MAX_DEPTH = 12
"""Depth at which the description of nested objects stops."""


def settings_of(
    evaluation: Evaluation,
    source: DataSource,
    shard_batches: int,
    seed: int,
    unpack: Unpack | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Everything that changes numbers.

    Args:
        evaluation: The evaluation of a batch.
        source: The data.
        shard_batches: Batches per shard.
        seed: Seed of the random states with which samples are read.
        unpack: The user's function, if there is one.
        device: Type of the device; by default that of the model.
    """
    model, composite, target = evaluation.model, evaluation.composite, evaluation.target
    rules, fingerprint = composite.normalization, getattr(source.data, "fingerprint", None)
    return {
        "versions": {**{name: version(name) for name in PACKAGES}, "python": platform.python_version_tuple()[1]},
        "model": model_fingerprint(model),
        "composite": {"name": readable(composite), "settings": digest(described(composite.composite))},
        "residual": rules.residual,
        "gain_limit": "inf" if math.isinf(rules.gain_limit) else rules.gain_limit,
        "normalization": {key: getattr(composite, key) for key in ("uncovered", "sums", "attention")},
        "target": target if isinstance(target, (str, int, type(None))) else described(target),
        "unpack": described(unpack),
        "output": described(evaluation.output),
        "collate": described(source.options.get("collate_fn")),
        "samples": source.count,
        "data": fingerprint if isinstance(fingerprint, str) else None,
        "batch_size": source.batch_size,
        "shard_batches": shard_batches,
        "seed": seed,
        "dtype": str(dtype_of(model)).removeprefix("torch."),
        "device": device or device_of(model).type,
        "precision": {
            "matmul": torch.get_float32_matmul_precision(),
            "cudnn_tf32": torch.backends.cudnn.allow_tf32,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        "queries": {query.name: query.to_json() for query in evaluation.queries},
    }


def digest(settings: Any) -> str:
    """Hash of a JSON value."""
    return _hash(json.dumps(settings, sort_keys=True).encode())


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """The settings that differ, as ``name (was old, now new)``; long values are omitted."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        parts = [differences(old.get(key), new.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [line for part in parts for line in part]
    if old == new:
        return []
    if name.startswith("queries.") and None in (old, new):
        return [f"{name} ({'added' if old is None else 'removed'})"]
    texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    is_short = all(len(text) <= 60 for text in texts) and not name.startswith("model")
    return [f"{name} (was {texts[0]}, now {texts[1]})" if is_short else name]


def model_fingerprint(model: nn.Module) -> dict[str, str]:
    """Hashes of the structure of a model and of its parameters and buffers."""
    content = hashlib.blake2b(digest_size=16)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        content.update(_bytes(tensor))
    return {"class": type(model).__name__, "structure": _hash(repr(model).encode()), "tensors": content.hexdigest()}


def readable(composite: Normalized) -> str:
    """The name of a composite for messages."""
    return f"Normalized({type(composite.composite).__name__})"


def described(value: Any, depth: int = 0, seen: tuple[int, ...] = ()) -> Any:
    """The state of an object as JSON: equal for objects that behave the same, also across processes.

    A function is described by its name, code, defaults and closure, a tensor by its hash. Classes and functions of this
    package keep the module path that stored sweeps have (:func:`~nrm_plugin.imports.stored_path`).
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return repr(value)
    if id(value) in seen or depth > MAX_DEPTH:
        return "…"
    inner = (depth + 1, (*seen, id(value)))
    if isinstance(value, Tensor):
        return {"tensor": [str(value.dtype), list(value.shape), _hash(_bytes(value))]}
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, Mapping):
        return {str(key): described(item, *inner) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item, *inner) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(described(item, *inner)) for item in value)
    if isinstance(value, types.MethodType):
        return [described(value.__func__, *inner), described(value.__self__, *inner)]
    if isinstance(value, types.FunctionType):
        return _function(value, *inner)
    return {described(type(value)): _state(value, *inner)}


def _function(value: types.FunctionType, depth: int, seen: tuple[int, ...]) -> Any:
    cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
    code = f"{value.__code__.co_code.hex()} {[item for item in value.__code__.co_consts if _is_plain(item)]}"
    state = described([cells, value.__defaults__, value.__kwdefaults__], depth, seen)
    return {"function": _name(value), "code": _hash(code.encode()), "around": state}


def _name(value: type | types.FunctionType) -> str:
    return f"{stored_path(value.__module__)}.{value.__qualname__}"


def _state(value: Any, depth: int, seen: tuple[int, ...]) -> Any:
    state = getattr(value, "__dict__", None)
    if state is None:
        return getattr(value, "__name__", "")
    # What a hook holds while it is registered is not a setting.
    transient = ("handles", "hook_refs", "stored_tensors", "__weakref__")
    return {key: described(item, depth, seen) for key, item in sorted(state.items()) if key not in transient}


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str, bool, type(None)))


def _bytes(tensor: Tensor) -> Any:
    dense = tensor.detach()
    dense = dense.to_dense() if dense.layout != torch.strided else dense
    return dense.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if dense.numel() else b""


def _hash(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


__all__ = ["described", "differences", "digest", "model_fingerprint", "readable", "settings_of"]
