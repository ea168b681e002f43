"""Loading of weight files without executing code and matching of their parameters with a model."""

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

from ..errors import NRMError, printable

NESTS = ("state_dict", "model_state_dict", "model", "net")
"""Checkpoint keys under which training scripts store the state dict."""
PREFIXES = ("module.", "_orig_mod.", "model.")
"""Key prefixes added by data parallelism, compilation or training frameworks."""
SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
NONE = "none"
"""Value of ``--weights`` that selects random weights."""
HEAD = 512
"""Number of leading bytes read to detect the type of a file."""
PAGE = "a page of HTML, such as an error of the server; download the file again"
KINDS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself; run: git lfs pull"),
    (b"gguf", "GGUF, whose weights are quantized; use the state dict of the PyTorch model"),
    (b"<!doctype html", PAGE),
    (b"<html", PAGE),
    (b"<?xml", "XML, such as an error of the server; download the file again"),
    (b"\x89hdf", "HDF5, such as weights of Keras; save the state dict of a PyTorch model"),
    (b"\x1f\x8b", "compressed by gzip; unpack it"),
    (b"\x93numpy", "an array of NumPy; save a state dict: torch.save(model.state_dict(), FILE)"),
)
"""Leading bytes of other types of files, in lower case, with descriptions of these types."""

State = dict[str, Tensor]


class WeightsError(NRMError, ValueError):
    """Raised if weights cannot be read, cannot be downloaded or do not match the model."""


def read_state(path: Path) -> State:
    """Reads a state dict from a file.

    Args:
        path: A safetensors file, or a state dict or checkpoint saved by ``torch.save``.

    Raises:
        WeightsError: If the file is missing, cannot be read, or does not contain a state dict.
    """
    name = printable(path)
    head = _check_file(path, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about old protocols
            if head[8:9] == b"{" and head[9:10] in b'"} ':
                content: Any = safetensors.torch.load_file(path)
            else:
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{name} was not written by torch.save, or contains objects other than tensors, which could run code when "
            "it is read. Save the state dict alone: torch.save(model.state_dict(), FILE)."
        ) from error
    except Exception as error:  # a file of another type may raise any error
        is_of_torch = head.startswith((b"PK", b"\x80")) or head[8:9] == b"{"
        reason = (
            _first_line(error).rstrip(".") if is_of_torch else "it was written by neither torch.save nor safetensors"
        )
        raise WeightsError(f"{name} cannot be read as weights: {reason}.") from error
    return _state(content, name)


def _check_file(path: Path, name: str) -> bytes:
    """Returns the leading bytes of a file. Checks that it can contain weights."""
    if not path.is_file():
        what = f"{name} is a folder" if path.is_dir() else f"the file {name} does not exist"
        raise WeightsError(f"{what}. --weights takes a file with a state dict.")
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError as error:
        raise WeightsError(f"{name} cannot be read: {error.strerror or error}.") from error
    entries = _entries(path)
    other = _other_kind(head, [entry.filename for entry in entries], path.suffix)
    if other:
        raise WeightsError(f"{name} cannot be read as weights: it is {other}.")
    unpacked = sum(entry.file_size for entry in entries)
    if unpacked > path.stat().st_size:
        raise WeightsError(
            f"{name} is compressed, which torch.save never does, and unpacks to {unpacked / 2**20:.4g} MiB. If you "
            "trust the file, load it and save the state dict again: torch.save(model.state_dict(), FILE)."
        )
    return head


def _entries(path: Path) -> list[zipfile.ZipInfo]:
    """Returns the entries of a zip archive, or none for other files, such as safetensors or torch's before 1.6."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.infolist()
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return []


def _other_kind(head: bytes, entries: Sequence[str], suffix: str) -> str:
    """Describes a file without a state dict, with a remedy. Returns an empty string if the file can contain one."""
    if any(entry.endswith("/archive_format") for entry in entries):
        return "a program of torch.export; save its weights: torch.save(torch.export.load(FILE).state_dict, OTHER)"
    if head.startswith(b"PK\x03\x04") and not entries:
        return "cut off or damaged; copy or download it again"
    if entries and not any(entry.endswith("data.pkl") for entry in entries):
        return "a zip archive without weights; unpack it, and pass the file in it"
    if any(entry.endswith("constants.pkl") for entry in entries):
        return (
            "a TorchScript model; save its weights: torch.save(torch.jit.load(FILE).state_dict(), OTHER), and give the "
            "model by --model"
        )
    if suffix == ".onnx" or (b"pytorch" in head[:32] and head[:1] == b"\x08"):
        return "an ONNX model; save the state dict of the PyTorch model that it was exported from"
    return next((kind for start, kind in KINDS if head.lstrip().lower().startswith(start)), "" if head else "empty")


def _state(content: Any, name: str) -> State:
    if isinstance(content, Mapping):
        for nest in NESTS:
            if isinstance(content.get(nest), Mapping):
                return _state(content[nest], name)
        tensors = {key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)}
        if tensors and len(tensors) == len(content):
            return tensors
        keys = ", ".join(str(key) for key in list(content)[:5])
        raise WeightsError(f"{name} contains no state dict: its keys are {keys or 'none'}.")
    kind = type(content).__name__
    raise WeightsError(f"{name} contains a {kind}, not a state dict. Save one: torch.save(model.state_dict(), FILE).")


def without_prefixes(state: State, model: nn.Module) -> State:
    """Removes key prefixes added by wrappers to a state dict unless the model's keys have them as well."""
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
    """Returns the number of classes that the weights imply if they otherwise match the model, or None.

    Args:
        state: The weights, as a state dict.
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
    # A file that repeats a row can have more rows than it stores, for which a large model would be built.
    is_stored = all(state[key].numel() <= _stored(state[key]) for key in differing)
    return int(count[0]) if rest_agrees and count and is_stored else None


def _stored(tensor: Tensor) -> int:
    """Returns the number of elements in the storage of a tensor, or 0 for non-strided layouts."""
    return tensor.untyped_storage().nbytes() // tensor.element_size() if tensor.layout == torch.strided else 0


def fill(model: nn.Module, state: State, name: str, where: str) -> None:
    """Loads weights into a model, possibly on the meta device.

    Args:
        model: The model to fill.
        state: The weights, as a state dict.
        name: Name of the model, for error messages.
        where: Name of the weight file, for error messages.

    Raises:
        WeightsError: If the weights do not match the model. The message summarizes the differences.
    """
    own = model.state_dict()
    # Checkpoints of old torch versions lack the batch counters, which only training reads.
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in state if key not in own]
    shapes = [key for key in own if key in state and own[key].shape != state[key].shape]
    kinds = [key for key in own if key in state and own[key].is_floating_point() and not state[key].is_floating_point()]
    if missing or unexpected or shapes or kinds:
        differences = [
            _summary(f"of {name} are missing", missing),
            _summary("of the file are unknown", unexpected),
            _summary("have other shapes", [f"{key} {_sizes(state[key])} for {_sizes(own[key])}" for key in shapes]),
            _summary("are not real numbers", [f"{key} {state[key].dtype}" for key in kinds]),
        ]
        raise WeightsError(
            f"{where} does not contain the weights of {name}: {'; '.join(filter(None, differences))}. "
            "Is it the file of another model?"
        )
    counters = {key: torch.tensor(0) for key in own if key not in state}
    complete = OrderedDict({**state, **counters})
    complete._metadata = own._metadata  # type: ignore[attr-defined]  # versions of layers, which some layers require
    model.load_state_dict(complete, assign=True)


def _summary(what: str, keys: Sequence[str]) -> str:
    first = ", ".join(keys[:3]) + (", …" if len(keys) > 3 else "")
    return f"{len(keys)} {'entry' if len(keys) == 1 else 'entries'} {what} ({first})" if keys else ""


def _sizes(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "()"


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [""])[0]) or type(error).__name__
