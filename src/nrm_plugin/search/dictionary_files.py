"""Loading of dictionaries from local folders in the formats of SAELens and circuit-tracer.

Source: SAELens 6 and circuit-tracer 0.2 for the formats; docs/features.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import InputError, brief, extra
from .dictionaries import Crosscoder, Dictionary

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_INPUTS = ("mlp.hook_in", "ln2.hook_normalized", "hook_mlp_in")
"""Names of hook points at MLP inputs."""
ARCHITECTURES = (
    "standard", "gated", "jumprelu", "topk", "transcoder", "skip_transcoder", "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)  # fmt: skip
"""SAELens architectures with a linear encoder and decoder and an activation supported by :class:`Dictionary`."""
_SHORT = (torch.float16, torch.bfloat16)


def load_dictionary(folder: str | Path) -> Dictionary:
    """Loads a dictionary in the format of SAELens, from ``cfg.json`` and ``sae_weights.safetensors``.

    Supported are standard, gated, JumpReLU and top-k autoencoders, and transcoders with or without a skip path.

    Args:
        folder: Folder that contains the files.

    Raises:
        InputError: If a file or a weight is missing or cannot be read, if the dictionary normalizes its input, or if
            its architecture is not supported, such as batch top-k.

    Examples:
        >>> load_dictionary("no such folder")
        Traceback (most recent call last):
        nrm_plugin.errors.InputError: ...
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(
                f"no {name} in {str(folder)!r}; a dictionary of SAELens is a folder with {CONFIG} and {WEIGHTS}."
            )
    try:
        config: dict[str, Any] = dict(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{CONFIG} in {str(folder)!r} cannot be read: {error}") from error
    _check_config(config, folder)
    return _of_weights(config, _Weights(folder / WEIGHTS))


class _Weights(dict[str, Tensor]):
    """Tensors of a safetensors file, cast to at least single precision. Errors name the file."""

    def __init__(self, path: Path) -> None:
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{str(path)!r} cannot be read: {error}") from error
        super().__init__({name: w.float() if w.dtype in _SHORT else w for name, w in tensors.items()})
        self._path = path

    def __missing__(self, name: str) -> Tensor:
        raise InputError(f"{str(self._path)!r} has no tensor {name!r}; it has {', '.join(map(repr, self))}.")


def _check_config(config: Mapping[str, Any], folder: Path) -> None:
    unsupported = {
        "normalize_activations": (None, False, "none", "expected_average_only_in"),
        "finetuning_scaling_factor": (None, False),
        "activation_fn": (None, "relu", "topk"),
        "activation_fn_str": (None, "relu", "topk"),
        "architecture": (None, *ARCHITECTURES),
    }
    for key, known in unsupported.items():
        if config.get(key) not in known:
            raise InputError(
                f"the dictionary in {str(folder)!r} has {key}={brief(config[key])}, which is not part of a linear "
                "encoder and decoder. Fold it into the weights, and pass them as a Dictionary."
            )
    if "topk" in _activation(config) and _k(config) is None:
        raise InputError(f"{CONFIG} in {str(folder)!r} has no k, the number of active features.")


def _of_weights(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Dictionary:
    kind = config.get("architecture") or "standard"
    is_transcoder = "transcoder" in kind
    encoder, decoder, bias = weights["W_enc"], weights["W_dec"], weights.get("b_enc")
    threshold = weights["threshold"].clamp(min=0) if "threshold" in weights else torch.zeros(())
    if kind == "gated":  # gate and magnitude use the same encoder, so the gate is a threshold on the magnitude
        scale = weights["r_mag"].exp()
        encoder, bias = encoder * scale, weights["b_mag"]
        threshold = (bias - weights["b_gate"] * scale).clamp(min=0)
    if not is_transcoder and config.get("apply_b_dec_to_input", True) and "b_dec" in weights:
        shift = weights["b_dec"] @ encoder
        bias = -shift if bias is None else bias - shift
    if config.get("rescale_acts_by_decoder_norm"):
        norms = decoder.norm(dim=-1)
        encoder, decoder = encoder * norms, decoder / norms.unsqueeze(1)
        bias = None if bias is None else bias * norms
    k = _k(config) if "topk" in _activation(config) else None
    reads = "input" if is_transcoder else "output"
    skip = weights.get("W_skip")
    return Dictionary(encoder, decoder, bias, weights.get("b_dec"), threshold, k, skip, reads)  # type: ignore[arg-type]


def _activation(config: Mapping[str, Any]) -> str:
    return f"{config.get('architecture', '')} {config.get('activation_fn', config.get('activation_fn_str', ''))}"


def _k(config: Mapping[str, Any]) -> int | None:
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    return None if k is None else int(k)


def load_transcoders(folder: str | Path, site: str) -> dict[str, Dictionary] | Crosscoder:
    """Loads the transcoders of all layers, or a cross-layer transcoder, from files in the format of circuit-tracer.

    Per-layer transcoders are stored in files ``layer_0.safetensors`` and so on, or in local files listed in
    ``config.yaml``; a cross-layer transcoder is stored in files ``W_enc_0.safetensors``, ``W_dec_0.safetensors`` and so
    on.

    Args:
        folder: Folder that contains the files.
        site: Name of an MLP, with ``{}`` in place of the layer index, such as ``"model.layers.{}.mlp"``.

    Returns:
        Dictionaries keyed by layer name, or a crosscoder. Both can be passed to :func:`~nrm_plugin.with_features`.

    Raises:
        InputError: If there are no such files or ``config.yaml`` refers to hooks other than the input of the MLPs.
        MissingExtraError: If there is a ``config.yaml`` but PyYAML is not installed.

    Examples:
        >>> load_transcoders("no such folder", "h.{}.mlp")
        Traceback (most recent call last):
        nrm_plugin.errors.InputError: ...
    """
    folder = Path(folder)
    if "{}" not in site:
        raise InputError(
            f"site={brief(site)} needs {{}} in place of the number of a layer, as in 'model.layers.{{}}.mlp'."
        )
    config = _config(folder)
    encoders = _numbered(folder, "W_enc_{}.safetensors")
    if encoders:
        return _crosscoder(folder, sorted(encoders), site)
    files = _named_files(config, folder) or _numbered(folder, "layer_{}.safetensors")
    if not files:
        raise InputError(
            f"no transcoders in {str(folder)!r}: neither layer_0.safetensors nor W_enc_0.safetensors nor a config.yaml "
            "that lists local files."
        )
    return {site.format(layer): _transcoder(_Weights(path)) for layer, path in sorted(files.items())}


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    config: dict[str, Any] = extra("yaml", "features").safe_load(path.read_text(encoding="utf-8")) or {}
    hook = config.get("feature_input_hook")
    if hook is not None and not str(hook).endswith(_INPUTS):
        raise InputError(
            f"the transcoders in {str(folder)!r} read {brief(hook)}, which is not the input of the MLPs they replace. "
            "Pass a Dictionary for a module whose input this is."
        )
    return config


def _numbered(folder: Path, pattern: str) -> dict[int, Path]:
    before, after = pattern.split("{}")
    matches = {
        path: re.fullmatch(rf"{re.escape(before)}(\d+){re.escape(after)}", path.name) for path in folder.glob("*")
    }
    return {int(match[1]): path for path, match in matches.items() if match}


def _named_files(config: Mapping[str, Any], folder: Path) -> dict[int, Path]:
    entries = [entry for entry in config.get("transcoders") or [] if isinstance(entry, dict)]
    paths = {int(entry["layer"]): str(entry["filepath"]) for entry in entries}
    for path in paths.values():
        if path.startswith("hf://"):
            raise InputError(
                f"config.yaml lists {brief(path)}, but only local files are read. Download it, and list its path."
            )
    return {layer: folder / path for layer, path in paths.items()}


def _transcoder(weights: Mapping[str, Tensor]) -> Dictionary:
    """Returns the transcoder of one layer. Its encoder and decoder can be stored in either orientation."""
    if "log_thresholds" in weights:
        raise InputError(
            "the transcoders have log_thresholds, which circuit-tracer does not apply. Remove or apply them."
        )
    bias, encoder, decoder = weights["b_enc"], weights["W_enc"], weights["W_dec"]
    count, width = len(bias), len(weights["b_dec"])
    encoder = encoder if encoder.shape[1] == count != encoder.shape[0] else encoder.T
    decoder = decoder if tuple(decoder.shape) == (count, width) else decoder.T
    threshold = weights.get("activation_function.threshold", weights.get("threshold"))
    threshold = torch.zeros(()) if threshold is None else threshold
    skip = weights.get("W_skip")
    return Dictionary(encoder, decoder, bias, weights["b_dec"], threshold, None, skip, "input")


def _crosscoder(folder: Path, layers: list[int], site: str) -> Crosscoder:
    dictionaries, decoders = {}, {}
    for layer in layers:
        encoder = _Weights(folder / f"W_enc_{layer}.safetensors")
        decoder = _Weights(folder / f"W_dec_{layer}.safetensors")[f"W_dec_{layer}"]
        threshold = encoder.get(f"threshold_{layer}")
        dictionaries[site.format(layer)] = Dictionary(
            encoder[f"W_enc_{layer}"].T,
            decoder[:, 0],
            encoder[f"b_enc_{layer}"],
            encoder[f"b_dec_{layer}"],
            torch.zeros(()) if threshold is None else threshold,
            reads="input",
        )
        for distance in range(1, decoder.shape[1]):
            decoders[site.format(layer), site.format(layer + distance)] = decoder[:, distance]
    return Crosscoder(dictionaries, decoders)


__all__ = ["load_dictionary", "load_transcoders"]
