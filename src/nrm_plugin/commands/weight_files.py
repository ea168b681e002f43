"""Weight files, which are read without running code in them, and matched to a model."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from ..dataset.images import shown
from ..errors import NRMError

NESTS = ("state_dict", "model_state_dict", "model", "net")
"""Keys of a checkpoint under which training scripts store the state dict."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""Key prefixes added by wrappers: data parallel, compilation, training frameworks."""
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
NONE = "none"
"""The value in place of a file for which no weights are read."""

State = dict[str, Tensor]


class WeightsError(NRMError, ValueError):
    """Raised if the weights cannot be read or downloaded, or belong to a different model."""


def read_state(path: Path) -> State:
    """Reads the state dict in a file.

    Args:
        path: A ``.safetensors`` file, or a file of ``torch.save`` with a state dict or a checkpoint.

    Raises:
        WeightsError: If the file is missing, cannot be read, or contains no state dict.
    """
    name = shown(path)
    _check_file(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings on old protocols
            if path.suffix == ".safetensors":
                content: Any = safetensors.torch.load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{name} was not written by torch.save, or holds more than tensors, which could run code when it is read. "
            "Save the state dict alone: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # a file of another kind may raise anything
        raise WeightsError(f"{name} cannot be read as weights: {_first_line(error)}") from error
    return _state(content, name)


def _check_file(path: Path, name: str) -> None:
    if not path.is_file():
        what = f"{name} is a folder" if path.is_dir() else f"the file {name} does not exist"
        raise WeightsError(f"{what}. --weights takes a file with a state dict.")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError):  # safetensors files, and files of torch before 1.6
        return
    if unpacked > path.stat().st_size:
        raise WeightsError(
            f"{name} is compressed, which torch.save never does, and unpacks to {unpacked / 2**20:.4g} MiB. If you "
            "trust the file, load it and save the state dict again: torch.save(model.state_dict(), FILE)."
        )


def _state(content: Any, name: str) -> State:
    if isinstance(content, Mapping):
        for nest in NESTS:
            if isinstance(content.get(nest), Mapping):
                return _state(content[nest], name)
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors and len(tensors) == len(content):
            return tensors
        keys = ", ".join(str(key) for key in list(content)[:5])
        raise WeightsError(f"{name} holds no state dict: its keys are {keys or 'none'}.")
    kind = type(content).__name__
    raise WeightsError(f"{name} holds a {kind}, not a state dict. Save one: torch.save(model.state_dict(), FILE).")


def without_prefixes(state: State, model: nn.Module) -> State:
    """Renames the state to the names of the model, without the prefixes of wrappers."""
    known = model.state_dict().keys()
    stripped = True
    while stripped:
        stripped = False
        for prefix in PREFIXES:
            own = any(key.startswith(prefix) for key in known)
            if state and not own and all(key.startswith(prefix) for key in state):
                state = {key.removeprefix(prefix): value for key, value in state.items()}
                stripped = True
    return state


def classes_of(state: State, model: nn.Module) -> int | None:
    """Returns the number of classes of the weights if nothing else differs from the model; None otherwise.

    Args:
        state: The weights.
        model: The model with its default number of classes.
    """
    own = model.state_dict()
    differing = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    counts = {
        (own[key].shape[:1], state[key].shape[:1], own[key].shape[1:] == state[key].shape[1:]) for key in differing
    }
    if len(counts) != 1:
        return None
    ((_, count, rest_agrees),) = counts
    # A file can claim more rows than it stores by repeating a row, and a model of that size would be built.
    is_stored = all(state[key].numel() <= _stored(state[key]) for key in differing)
    return int(count[0]) if rest_agrees and count and is_stored else None


def _stored(tensor: Tensor) -> int:
    """Returns the number of stored entries."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() if tensor.layout == torch.strided else 0


def fill(model: nn.Module, state: State, name: str, where: str) -> None:
    """Writes weights into a model, which may be without storage.

    Args:
        model: The model.
        state: The weights.
        name: Name of the model.
        where: The file of the weights.

    Raises:
        WeightsError: If the weights belong to a different model; the message summarizes the differences.
    """
    own = model.state_dict()
    # Checkpoints of old versions of torch lack the counters of batches, which only training reads.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        differences = [
            _summary(f"of {name} are missing", missing),
            _summary("of the file are unknown", unexpected),
            _summary("have other shapes", [f"{key} {_sizes(state[key])} for {_sizes(own[key])}" for key in shapes]),
        ]
        raise WeightsError(
            f"{where} does not hold the weights of {name}: {'; '.join(filter(None, differences))}. "
            "Is it the file of another model?"
        )
    counters = {key: torch.tensor(0) for key in own if key not in state}
    complete = OrderedDict({**state, **counters})
    complete._metadata = own._metadata  # type: ignore[attr-defined]  # versions of layers, which some require
    model.load_state_dict(complete, assign=True)


def _summary(what: str, keys: Sequence[str]) -> str:
    first = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} {'entry' if len(keys) == 1 else 'entries'} {what} ({first})" if keys else ""


def _sizes(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "()"


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [""])[0]) or type(error).__name__
