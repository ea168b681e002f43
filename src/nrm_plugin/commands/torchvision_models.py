"""Loading of torchvision classifiers by name, with downloaded weights, random weights or weights from a file."""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import socket
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from ..errors import printable
from .built_model import BuiltModel, ModelError, seeded
from .weight_files import NONE, SUFFIXES, WeightsError, classes_of, fill, read_state, without_prefixes

DEFAULT = "DEFAULT"
TIMEOUT = 30
"""Seconds without data after which a download is aborted."""
FORCED = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
"""Environment variables of torch that enforce or disable ``weights_only`` loading."""
TASKS = {"detection": "object detection", "video": "video", "optical_flow": "optical flow"}
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""Pattern of parameter names in torchvision's old DenseNet files. These have dots inside submodule names."""


def torchvision_model(name: str, weights: str) -> BuiltModel:
    """Builds a torchvision classifier.

    Args:
        name: Model name, as listed by :func:`torchvision.models.list_models`.
        weights: Name of a torchvision weights entry, path to a checkpoint file, or ``"none"``.

    Raises:
        ModelError: If torchvision has no classifier with this name.
        WeightsError: If the weights do not exist, cannot be downloaded or do not match the model.
    """
    check_torchvision_name(name)
    available = get_model_weights(name)
    if weights == NONE:
        return _random(name, available.DEFAULT)
    if weights in (DEFAULT, *available.__members__):
        chosen = available[weights]
        return BuiltModel(_downloaded(name, chosen), chosen.name, chosen.transforms, _categories(chosen))
    if not Path(weights).exists() and not weights.endswith(SUFFIXES) and "/" not in weights:
        near = difflib.get_close_matches(weights, [*available.__members__, DEFAULT, NONE], n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise WeightsError(
            f"--weights {weights} is neither a file nor weights of {name}.{hint} It has "
            f"{', '.join(available.__members__)}; none stands for random weights."
        )
    return _from_file(name, Path(weights), available)


def check_torchvision_name(name: str) -> None:
    """Raises :class:`ModelError` with similar names unless torchvision has a classifier with this name."""
    classifiers = list_models(module=torchvision.models)
    if name in classifiers:
        return
    own = "Pass your own model as package.module:factory or file.py:factory."
    if name in list_models():
        raise ModelError(_not_a_classifier(name, own))
    if name.endswith(".py"):
        raise ModelError(
            f"--model {printable(name)} is a file. Add the name of the function in it: --model {printable(name)}:NAME."
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), classifiers, n=4, cutoff=0.6)
    hint = f"Similar names: {', '.join(near)}. " if near else f"It has {', '.join(classifiers[:6])}, … "
    raise ModelError(f"torchvision has no classification model {name!r}. {hint}{own}")


def _not_a_classifier(name: str, own: str) -> str:
    family = get_model_builder(name).__module__.split(".")[2]
    if family == "quantization":
        return f"{name} is quantized and has no gradients. Use the original model instead."
    return (
        f"{name} is a model for {TASKS.get(family, family)}, but a classifier is needed, with one output for each "
        f"class. Wrap it in a module that reduces its output to these. {own}"
    )


def _random(name: str, weights: WeightsEnum) -> BuiltModel:
    with seeded(), _without_warnings():
        model = _built(name)
    note = f"{name} has random weights: its explanations are meaningless"
    return BuiltModel(model, NONE, weights.transforms, (), (note,))


def _built(name: str, **arguments: Any) -> nn.Module:
    model: nn.Module = get_model_builder(name)(weights=None, **arguments)
    return model


def _categories(weights: Any) -> Sequence[str]:
    return weights.meta.get("categories") or ()


def _downloaded(name: str, weights: WeightsEnum) -> nn.Module:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = Path(urlsplit(weights.url).path).name
    # torch.hub prints to stdout, which is for results.
    try:
        with contextlib.redirect_stdout(sys.stderr), _timeout(), _without_warnings(), _weights_only():
            model: nn.Module = get_model_builder(name)(weights=weights)
            return model
    except Exception as error:  # a file of another type may raise any error
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if (folder / file).exists():
            raise WeightsError(
                f"{folder / file} cannot be read ({reason}). Delete it, and it will be downloaded again."
            ) from error
        raise WeightsError(
            f"the weights {weights.name} of {name} are not on this machine and could not be downloaded ({reason}). "
            f"Download {weights.url} on a machine with a connection, and pass the file: --weights {file}. Or try the "
            "command with random weights: --weights none."
        ) from error


def _from_file(name: str, path: Path, available: Any) -> BuiltModel:
    """Builds a model with weights from a file. Torchvision's own files also determine class names and preprocessing."""
    state = read_state(path)
    official = next((item for item in available if Path(urlsplit(item.url).path).name == path.name), None)
    if name.startswith("densenet"):
        state = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    arguments = _arguments(name, state, official)
    model = _without_storage(name, arguments)
    state = without_prefixes(state, model)
    count = classes_of(state, model)
    if count is not None:
        model = _without_storage(name, {**arguments, "num_classes": count})
    fill(model, state, name, printable(path))
    weights = official or available.DEFAULT
    return BuiltModel(model, printable(path), weights.transforms, _categories(weights) if count is None else ())


def _arguments(name: str, state: dict[str, Any], official: Any) -> dict[str, Any]:
    """Infers the arguments of the model builder from the weights."""
    arguments: dict[str, Any] = {}
    if name.startswith("vit") and official is not None:
        arguments["image_size"] = official.meta["min_size"][0]
    if name in ("googlenet", "inception_v3"):
        keys = without_prefixes(state, nn.Module())
        arguments["aux_logits"] = any(key.lower().startswith("aux") for key in keys)
        if official is not None:
            arguments["transform_input"] = True
    return arguments


def _without_storage(name: str, arguments: dict[str, Any]) -> nn.Module:
    """Builds a model on the meta device. Random initialization of VGG16 would take longer than reading a file."""
    try:
        with torch.device("meta"), _without_warnings():
            return _built(name, **arguments)
    except NotImplementedError:  # RegNet reads values of tensors while it is built
        return _built(name, **arguments)


@contextlib.contextmanager
def _timeout() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Context manager in which torch.hub loads only tensors.

    By default, torch.hub unpickles arbitrary objects, even from cached files.
    """
    before = {name: os.environ.pop(name, None) for name in FORCED}
    os.environ[FORCED[0]] = "1"
    try:
        yield
    finally:
        del os.environ[FORCED[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Context manager that suppresses torchvision's warnings about weight initialization."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
