"""Models by name: torchvision's with their weights, or the user's own."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import os
import re
import socket
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from ..dataset.images import shown
from ..dataset.preprocessing import STANDARD, Preprocessing, preprocessing
from ..errors import NRMError
from .weight_files import SUFFIXES, WeightsError, classes_of, fill, fitted, read_state

DEFAULT, NONE = "DEFAULT", "none"
SEED = 0
PATIENCE = 30
"""Seconds that a download may be silent."""
FORCED = ("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
"""Settings of torch: files hold nothing but weights; and its contrary."""
TASKS = {"detection": "object detection", "video": "video", "optical_flow": "optical flow"}
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|relu|conv))\.([12]\.)")
"""Names in torchvision's own files for DenseNet, from a time when names could hold dots."""


class ModelError(NRMError, ValueError):
    """A name that no model belongs to, or a model that cannot be made."""


@dataclass(frozen=True)
class Subject:
    """A model that is ready to be asked, and what belongs to it.

    Attributes:
        name: As it was given.
        weights: Where its weights are from.
        model: In evaluation mode, float32.
        prepare: How pictures become its inputs.
        categories: Names of its classes, empty where they are not known.
        notes: What a user should know.
    """

    name: str
    weights: str
    model: nn.Module
    prepare: Preprocessing
    categories: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load(
    name: str,
    weights: str | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    categories: Sequence[str] = (),
) -> Subject:
    """A model by its name.

    Args:
        name: Of a torchvision classification model, or ``package.module:factory`` or ``file.py:factory``.
        weights: Name of torchvision's weights, a file, or ``"none"``; None for torchvision's default, or for what the
            user's own factory returns.
        size: As in :func:`~nrm_plugin.dataset.preprocessing.preparation`.
        mean: As there.
        std: As there.
        categories: Names of the classes, instead of those that belong to the weights.

    Raises:
        ModelError: No such model, or it is no classifier, or making it failed.
        WeightsError: No such weights, they could not be downloaded, or are not those of the model.
        PreprocessingError: Size, mean and deviation fit no picture.
    """
    made = _own(name, weights) if ":" in name else _torchvision(name, DEFAULT if weights is None else weights)
    model, source, make, known, notes = made
    prepare = preprocessing(make, size, mean, std)
    return Subject(name, source, model.eval().float(), prepare, tuple(categories or known), tuple(notes))


Made = tuple[nn.Module, str, Callable[..., Any], Sequence[str], list[str]]
"""Model, where its weights are from, transforms, names of the classes, notes."""


# -- torchvision ----------------------------------------------------------------------------------------------------


def _torchvision(name: str, weights: str) -> Made:
    check_torchvision_name(name)
    every = get_model_weights(name)
    default = every.DEFAULT
    if weights == NONE:
        return _random(name), NONE, default.transforms, (), [f"{name} has random weights: what it sees means nothing"]
    if weights in (DEFAULT, *every.__members__):
        chosen = every[weights]
        return _downloaded(name, chosen), chosen.name, chosen.transforms, _categories(chosen), []
    if not Path(weights).exists() and not weights.endswith(SUFFIXES) and "/" not in weights:
        near = difflib.get_close_matches(weights, [*every.__members__, DEFAULT, NONE], n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise WeightsError(
            f"--weights {weights} is neither a file nor weights of {name}.{hint} It has "
            f"{', '.join(every.__members__)}; none stands for random ones."
        )
    return _from_file(name, Path(weights), every)


def check_torchvision_name(name: str) -> None:
    """Raises :class:`ModelError` unless torchvision has a classifier of this name; the message lists near names."""
    classifiers = list_models(module=torchvision.models)
    if name in classifiers:
        return
    own = "A model of your own is given as package.module:factory or file.py:factory."
    if name in list_models():
        family = get_model_builder(name).__module__.split(".")[2]
        if family == "quantization":
            raise ModelError(f"{name} is quantized, and has no gradients. Take the model that it was made from.")
        raise ModelError(
            f"{name} is made for {TASKS.get(family, family)}. Explained are classifiers, with one number for each "
            f"class: wrap it in a module that reduces its output to these. {own}"
        )
    if name.endswith(".py"):
        raise ModelError(
            f"--model {shown(name)} is a file. Say what in it makes the model: --model {shown(name)}:NAME."
        )
    near = difflib.get_close_matches(name.lower().replace("-", "_"), classifiers, n=4, cutoff=0.6)
    hint = f"Near names: {', '.join(near)}. " if near else f"It has {', '.join(classifiers[:6])}, … "
    raise ModelError(f"torchvision has no classification model {name!r}. {hint}{own}")


def _random(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]), _quiet():
        torch.default_generator.manual_seed(SEED)
        return _built(name)


def _built(name: str, **arguments: Any) -> nn.Module:
    model: nn.Module = get_model_builder(name)(weights=None, **arguments)
    return model


def _categories(weights: Any) -> Sequence[str]:
    return weights.meta.get("categories") or ()


def _downloaded(name: str, weights: WeightsEnum) -> nn.Module:
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = Path(urlsplit(weights.url).path).name
    # Its words on stdout would stand among the results.
    try:
        with contextlib.redirect_stdout(sys.stderr), _patience(), _quiet(), _weights_only():
            model: nn.Module = get_model_builder(name)(weights=weights)
            return model
    except Exception as error:  # what is no file of weights may raise anything
        why = (str(error).splitlines() or [""])[0] or type(error).__name__
        if (folder / file).exists():
            raise WeightsError(
                f"{folder / file} cannot be read ({why}). Delete it, and it is downloaded again."
            ) from error
        raise WeightsError(
            f"the weights {weights.name} of {name} are not on this machine, and could not be downloaded ({why}). "
            f"Download {weights.url} where there is a connection, and pass the file: --weights {file}. Or try the "
            "command with random weights: --weights none."
        ) from error


def _from_file(name: str, path: Path, every: Any) -> Made:
    """A model with the weights of a file; where that is one of torchvision's, with all that belongs to it."""
    state = read_state(path)
    where = shown(path)
    official = next((item for item in every if Path(urlsplit(item.url).path).name == path.name), None)
    arguments: dict[str, Any] = {}
    if name.startswith("densenet"):
        state = {OLD_DENSENET.sub(r"\1\2", key): value for key, value in state.items()}
    if name.startswith("vit") and official is not None:
        arguments["image_size"] = official.meta["min_size"][0]
    if name in ("googlenet", "inception_v3"):
        arguments |= {"aux_logits": any(key.lower().startswith("aux") for key in fitted(state, nn.Module()))}
        if official is not None:
            arguments["transform_input"] = True
    model = _without_storage(name, arguments)
    state = fitted(state, model)
    count = classes_of(state, model)
    if count is not None:
        model = _without_storage(name, {**arguments, "num_classes": count})
    fill(model, state, name, where)
    weights = official or every.DEFAULT
    return model, where, weights.transforms, _categories(weights) if count is None else (), []


def _without_storage(name: str, arguments: dict[str, Any]) -> nn.Module:
    """A model whose weights are about to be replaced: to draw those of VGG16 takes longer than to read them."""
    try:
        with torch.device("meta"), _quiet():
            return _built(name, **arguments)
    except NotImplementedError:  # RegNet reads numbers off tensors while it is built
        return _built(name, **arguments)


@contextlib.contextmanager
def _patience() -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.hub unpickles all that is in a file, also in one that was there before, unless torch is told not to."""
    before = {name: os.environ.pop(name, None) for name in FORCED}
    os.environ[FORCED[0]] = "1"
    try:
        yield
    finally:
        del os.environ[FORCED[0]]
        os.environ.update({name: value for name, value in before.items() if value is not None})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torchvision's warnings on how weights will be drawn in a future version."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- the user's own -------------------------------------------------------------------------------------------------


def imported(name: str, option: str = "--model") -> Any:
    """What ``package.module:name`` or ``file.py:name`` stands for.

    Args:
        name: Module or file, and a name in it.
        option: Where it was given, for messages.

    Raises:
        ModelError: There is no such thing.
    """
    place, _, attribute = name.rpartition(":")
    with _importable():
        return _attribute(_module(place, name, option), attribute, name, option)


def _own(name: str, weights: str | None) -> Made:
    with torch.random.fork_rng(devices=[]), _importable():
        torch.default_generator.manual_seed(SEED)
        factory = imported(name)
        model = factory if isinstance(factory, nn.Module) else _called(factory, name)
    source = "its own"
    if weights not in (None, NONE):
        path = Path(str(weights))
        fill(model, fitted(read_state(path), model), name, shown(path))
        source = shown(path)
    return model, source, STANDARD, (), []


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Modules of the current folder can be imported, as with ``python -m``."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _module(place: str, name: str, option: str) -> Any:
    if not place or not place.strip("."):
        raise ModelError(f"{option} {name!r} lacks the module: write package.module:factory or file.py:factory.")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        if not path.is_file():
            raise ModelError(f"there is no file {shown(path)}.")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None  # noqa: PT018  (the name ends in .py)
        module = importlib.util.module_from_spec(spec)
        is_first = sys.modules.setdefault(path.stem, module) is module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            if is_first:  # as after an import that failed
                del sys.modules[path.stem]
            raise
        return module
    except ModelError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            raise ModelError(
                f"there is no module {error.name!r}, neither installed nor in {shown(Path.cwd())}. Run the command "
                "where it can be imported, or give the file: file.py:factory."
            ) from error
        raise ModelError(f"importing {place} failed: {_told(error)}") from error
    except Exception as error:  # whatever the user's code raises
        raise ModelError(f"importing {place} failed: {_told(error)}") from error


def _attribute(module: Any, attribute: str, name: str, option: str) -> Any:
    if not attribute.isidentifier() or not hasattr(module, attribute):
        names = [item for item in vars(module) if not item.startswith("_")]
        near = difflib.get_close_matches(attribute, names, n=3, cutoff=0.5)
        hint = f" Near names: {', '.join(near)}." if near else ""
        if "(" in attribute:
            hint = " It is called without arguments; with some, write a function that passes them, and name that one."
        raise ModelError(f"{option} {name}: {module.__name__} has no {attribute!r}.{hint}")
    return getattr(module, attribute)


def _called(factory: Any, name: str) -> nn.Module:
    if not callable(factory):
        raise ModelError(f"--model {name} is {type(factory).__name__}, neither a model nor a function that makes one.")
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelError(
            f"{name} cannot be called without arguments: {error}. Write a function without any that returns the model, "
            "and name that one."
        ) from error
    except ValueError:  # has no signature that could be read
        pass
    try:
        model = factory()
    except Exception as error:  # whatever the user's code raises
        raise ModelError(f"calling {name} without arguments failed: {_told(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module.")
    return model


def _told(error: Exception) -> str:
    """An error of the user's code in one line, with the place."""
    # A syntax error tells its place itself; the frames are those of the import system.
    frames = [] if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return shown(" ".join(f"{type(error).__name__}: {error}".split())) + place
