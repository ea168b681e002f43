"""Import of the user's own models and datasets, given as ``package.module:name`` or ``file.py:name``."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from ..dataset.preprocessing import STANDARD
from ..errors import printable
from .built_model import BuiltModel, ModelError, seeded
from .weight_files import NONE, fill, read_state, without_prefixes


def imported(name: str, option: str = "--model") -> Any:
    """Imports an object given as ``package.module:name`` or ``file.py:name``.

    Args:
        name: Module or file, followed by the name of the object.
        option: Name of the command-line option, for error messages.

    Raises:
        ModelError: If the module, file or object does not exist.
    """
    module, _, attribute = name.rpartition(":")
    with _importable():
        return _attribute(_module(module, name, option), attribute, name, option)


def own_model(name: str, weights: str | None) -> BuiltModel:
    """Builds the user's own model, which is the imported module or the return value of an imported function.

    Args:
        name: As in :func:`imported`.
        weights: A weight file. With None or ``"none"``, the model keeps its weights.

    Raises:
        ModelError: If the model does not exist or cannot be built.
        WeightsError: If the weights in the file do not match the model.
    """
    with seeded(), _importable():
        factory = imported(name)
        model = factory if isinstance(factory, nn.Module) else _called(factory, name)
    source = "its own"
    if weights not in (None, NONE):
        path = Path(str(weights))
        source = printable(path)
        fill(model, without_prefixes(read_state(path), model), name, source)
    return BuiltModel(model, source, STANDARD)


@contextlib.contextmanager
def _importable() -> Iterator[None]:
    """Context manager that adds the current folder to ``sys.path``, as ``python -m`` does."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(here)


def _module(module: str, name: str, option: str) -> Any:
    if not module.strip("."):
        raise ModelError(f"{option} {name!r} has no module: write package.module:factory or file.py:factory.")
    try:
        return _module_of_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except ModelError:
        raise
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(f"{error.name}.")):
            raise ModelError(
                f"no module named {error.name!r}, neither installed nor in {printable(Path.cwd())}. Run the command "
                "where it can be imported, or give the file: file.py:factory."
            ) from error
        raise ModelError(f"importing {module} failed: {_one_line(error)}") from error
    except SystemExit as error:
        raise ModelError(
            f"importing {module} ended by sys.exit({error.code!r}). Let a script call its main function only under "
            "if __name__ == '__main__'."
        ) from error
    except Exception as error:  # any error that the user's code raises
        raise ModelError(f"importing {module} failed: {_one_line(error)}") from error


def _module_of_file(path: Path) -> Any:
    if not path.is_file():
        raise ModelError(f"the file {printable(path)} does not exist.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # noqa: PT018  (the name ends in .py)
    module = importlib.util.module_from_spec(spec)
    is_first = sys.modules.setdefault(path.stem, module) is module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if is_first:  # the state after a failed import
            del sys.modules[path.stem]
        raise
    return module


def _attribute(module: Any, attribute: str, name: str, option: str) -> Any:
    if attribute.isidentifier() and hasattr(module, attribute):
        return getattr(module, attribute)
    names = [item for item in vars(module) if not item.startswith("_")]
    near = difflib.get_close_matches(attribute, names, n=3, cutoff=0.5)
    hint = f" Similar names: {', '.join(near)}." if near else ""
    if "(" in attribute:
        hint = " It is called without arguments; if it requires any, give a function that passes them."
    raise ModelError(f"{option} {name}: {module.__name__} has no {attribute!r}.{hint}")


def _called(factory: Any, name: str) -> nn.Module:
    if not callable(factory):
        raise ModelError(
            f"--model {name} is {type(factory).__name__}, neither a model nor a function that returns one."
        )
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise ModelError(
            f"{name} cannot be called without arguments: {error}. Write a function without arguments that returns the "
            "model, and pass its name."
        ) from error
    except ValueError:  # the signature cannot be read
        pass
    try:
        model = factory()
    except Exception as error:  # any error that the user's code raises
        raise ModelError(f"calling {name} without arguments failed: {_one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{name} returned {type(model).__name__}, expected a torch.nn.Module.")
    return model


def _one_line(error: Exception) -> str:
    """Formats an error raised by the user's code in one line, with its file name and line number."""
    # The message of a syntax error contains the position; its frames belong to the import system.
    frames = [] if isinstance(error, SyntaxError) else traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return printable(" ".join(f"{type(error).__name__}: {error}".split())) + place
