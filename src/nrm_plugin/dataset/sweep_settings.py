"""Settings of a sweep that affect its results, as JSON values that can be compared with a stored sweep."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from ..composites import Normalized
from ..errors import warn
from .evaluation import Evaluation, Unpack, device_of, dtype_of
from .fingerprints import described, digest
from .model_identity import model_fingerprint
from .sample_batches import DataSource
from .sweep_layout import SettingsError

PACKAGES = ("nrm-plugin", "torch", "zennit", "torchvision", "pillow")
RECORDED = 2
"""First settings version that identifies the model and the data."""
NOT_COMPARED = ("batch_size", "shard_batches")
"""Batch settings. They affect results only by rounding errors."""
MAX_LISTED = 8
"""Maximum number of differences listed in a message."""


class SettingsWarning(UserWarning):
    """Issued when a sweep of an earlier version is resumed. Its settings do not identify code and data."""


def settings_of(
    evaluation: Evaluation,
    source: DataSource,
    shard_batches: int,
    seed: int,
    unpack: Unpack | None = None,
    device: str | None = None,
) -> dict[str, Any]:
    """Returns all settings of a sweep that affect its results.

    Args:
        evaluation: Evaluation of a batch.
        source: Dataset with its loading options.
        shard_batches: Number of batches per shard.
        seed: Seed for the random state set before each sample is read.
        unpack: The user's function for splitting batches, or None.
        device: Device type. Defaults to the device type of the model.
    """
    model, composite, target = evaluation.model, evaluation.composite, evaluation.target
    against = evaluation.against
    rules, fingerprint = composite.normalization, getattr(source.data, "fingerprint", None)
    return {
        "recorded": RECORDED,
        "versions": {**{name: version(name) for name in PACKAGES}, "python": platform.python_version_tuple()[1]},
        "model": model_fingerprint(model),
        "composite": {"name": readable(composite), "settings": digest(described(composite.composite))},
        "residual": rules.residual,
        "gain_limit": "inf" if math.isinf(rules.gain_limit) else rules.gain_limit,
        "normalization": {key: getattr(composite, key) for key in ("uncovered", "sums", "attention")},
        "target": target if isinstance(target, (str, int, type(None))) else described(target),
        # Without a comparison, the key is absent, as in sweeps of earlier versions.
        **({} if against is None else {"against": against if isinstance(against, (str, int)) else described(against)}),
        "unpack": described(unpack),
        "output": described(evaluation.output),
        "collate": None if source.collate is default_collate else described(source.collate),
        "samples": source.count,
        "data": fingerprint if isinstance(fingerprint, str) else None,
        "preparation": source.preparation,
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


def check_same(folder: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Checks that the settings of a stored sweep match the settings of a call.

    Args:
        folder: Folder of the sweep, for error messages.
        stored: The stored settings. Settings that an earlier version did not record are not compared, and a warning is
            issued.
        settings: The settings of the call.

    Raises:
        SettingsError: If the settings differ. The message lists the differences.
    """
    now = json.loads(json.dumps(settings))  # tuples become lists in a file
    if "recorded" not in stored:
        now = _as_recorded_before(stored, now)
        warn(
            f"the sweep in {folder} was begun by an earlier version, which did not record the code of the model, the "
            "preprocessing, or the content of the data. These are not compared.",
            SettingsWarning,
        )
    ignored = NOT_COMPARED if now["samples"] is not None else ()
    before, after = ({key: one[key] for key in one if key not in ignored} for one in (stored, now))
    changed = differences(before, after)
    if changed:
        more = f" and {len(changed) - MAX_LISTED} more" if len(changed) > MAX_LISTED else ""
        raise SettingsError(
            f"{folder} contains a sweep with different settings: {'; '.join(changed[:MAX_LISTED])}{more}. Choose "
            "another folder, delete this one, or restore these settings."
        )


def _as_recorded_before(stored: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in now.items() if key not in ("recorded", "preparation")}
    for name in ("versions", "model"):
        kept[name] = {key: value for key, value in now[name].items() if key in stored.get(name, {})}
    if now["collate"] is None and stored["collate"] == json.loads(json.dumps(described(default_collate))):
        kept["collate"] = stored["collate"]
    return kept


def is_same_model(stored: Mapping[str, Any], model: torch.nn.Module) -> bool:
    """Returns True if stored settings identify the same model. Earlier versions did not identify its code."""
    now: dict[str, Any] = json.loads(json.dumps(model_fingerprint(model)))
    before: dict[str, Any] = stored["model"]
    return {key: value for key, value in now.items() if key in before} == before


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Lists the settings that differ as ``name (was old, now new)``. Long values are omitted."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        keys = dict.fromkeys([*old, *new])
        parts = [differences(old.get(key), new.get(key), f"{name}.{key}" if name else key) for key in keys]
        return [line for part in parts for line in part]
    if old == new:
        return []
    if name.startswith(("queries.", "model.code.", "model.attributes.")) and None in (old, new):
        return [f"{name} ({'added' if old is None else 'removed'})"]
    texts = [json.dumps(value, ensure_ascii=False) for value in (old, new)]
    is_hash = name.startswith("model") and not name.startswith("model.attributes")
    is_short = all(len(text) <= 60 for text in texts) and not is_hash and not name.startswith("model.attributes.(")
    return [f"{name} (was {texts[0]}, now {texts[1]})" if is_short else name]


def readable(composite: Normalized) -> str:
    """Returns the name of a composite for messages."""
    return f"Normalized({type(composite.composite).__name__})"


__all__ = [
    "SettingsWarning",
    "check_same",
    "described",
    "differences",
    "digest",
    "is_same_model",
    "model_fingerprint",
    "readable",
    "settings_of",
]
