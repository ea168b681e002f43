"""Files with weights: read without running what is in them, and fitted to a model."""

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
"""Keys under which training scripts keep the state dict among other things."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers write before every key: data parallel, compilation, training frameworks."""
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")

State = dict[str, Tensor]


class WeightsError(NRMError, ValueError):
    """Weights that cannot be had, or are not those of the model."""


def read_state(path: Path) -> State:
    """The state dict in a file, without what is around it.

    Args:
        path: ``.safetensors``, or what ``torch.save`` wrote: a state dict, or a checkpoint that holds one.

    Raises:
        WeightsError: There is no such file, it cannot be read, or holds no state dict.
    """
    name = shown(path)
    _check_file(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old protocols
            if path.suffix == ".safetensors":
                found: Any = safetensors.torch.load_file(path)
            else:
                found = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{name} is no file of torch.save, or holds more than tensors, which could run code when it is read. Save "
            "the state dict alone: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # a file of another kind may raise anything
        raise WeightsError(f"{name} cannot be read as weights: {_first_line(error)}") from error
    return _state(found, name)


def _check_file(path: Path, name: str) -> None:
    if not path.is_file():
        what = f"{name} is a folder" if path.is_dir() else f"there is no file {name}"
        raise WeightsError(f"{what}. --weights takes a file with a state dict.")
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (OSError, zipfile.BadZipFile, NotImplementedError):  # safetensors, and what torch wrote before 1.6
        return
    if unpacked > path.stat().st_size:
        raise WeightsError(
            f"{name} is compressed, which torch.save never does, and unpacks to {unpacked / 2**20:.4g} MiB. If you "
            "trust it, load it and save the state dict again: torch.save(model.state_dict(), FILE)."
        )


def _state(found: Any, name: str) -> State:
    if isinstance(found, Mapping):
        for nest in NESTS:
            if isinstance(found.get(nest), Mapping):
                return _state(found[nest], name)
        tensors = {key: value for key, value in found.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors and len(tensors) == len(found):
            return tensors
        listed = ", ".join(str(key) for key in list(found)[:5])
        raise WeightsError(f"{name} holds no state dict: its keys are {listed or 'none'}.")
    kind = type(found).__name__
    raise WeightsError(f"{name} holds a {kind}, not a state dict. Save it so: torch.save(model.state_dict(), FILE).")


def fitted(state: State, model: nn.Module) -> State:
    """The state under the names of the model: without prefixes that wrappers left."""
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
    """How many classes the weights are for, where that alone tells them from a model; None where they fit, or not so.

    Args:
        state: The weights.
        model: A model with another number of classes.
    """
    own = model.state_dict()
    differing = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    counts = {
        (own[key].shape[:1], state[key].shape[:1], own[key].shape[1:] == state[key].shape[1:]) for key in differing
    }
    if len(counts) != 1:
        return None
    ((_, count, rest_agrees),) = counts
    # A file can claim more rows than it holds, by one that it repeats; a model of as many classes would be made.
    is_held = all(state[key].numel() <= _held(state[key]) for key in differing)
    return int(count[0]) if rest_agrees and count and is_held else None


def _held(tensor: Tensor) -> int:
    """How many numbers are in memory."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() if tensor.layout == torch.strided else 0


def fill(model: nn.Module, state: State, name: str, where: str) -> None:
    """Writes weights into a model; those of a model without storage become its own.

    Args:
        model: The model.
        state: Its weights.
        name: Of the model.
        where: The file.

    Raises:
        WeightsError: They are not those of the model; the message sums up how they differ.
    """
    own = model.state_dict()
    # A checkpoint of an old torch has no counters of batches; they are read in training only.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    if missing or unexpected or shapes:
        found = [
            _summary(f"of {name} are missing", missing),
            _summary("of the file are unknown", unexpected),
            _summary("have other shapes", [f"{key} {_sizes(state[key])} for {_sizes(own[key])}" for key in shapes]),
        ]
        raise WeightsError(
            f"{where} does not hold the weights of {name}: {'; '.join(filter(None, found))}. "
            f"Is it the file of another model?"
        )
    counters = {key: torch.tensor(0) for key in own if key not in state}
    complete = OrderedDict({**state, **counters})
    complete._metadata = own._metadata  # type: ignore[attr-defined]  # versions of the layers; some refuse to go without
    model.load_state_dict(complete, assign=True)


def _summary(what: str, keys: Sequence[str]) -> str:
    shown_keys = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} {'entry' if len(keys) == 1 else 'entries'} {what} ({shown_keys})" if keys else ""


def _sizes(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "()"


def _first_line(error: Exception) -> str:
    return shown((str(error).splitlines() or [""])[0]) or type(error).__name__
