"""Import hooks that resolve deprecated module paths and register composites with Zennit.

To keep ``nrm-plugin --version`` fast, this module does not import torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import types
import warnings
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

PACKAGE = "nrm_plugin"
REMOVED = "0.3"
"""Version in which deprecated paths will be removed."""
MOVED = {
    "coverage": "recording.coverage",
    "dataset.maximization": "dataset.example_search",
    "dataset.reference_search": "dataset.example_search",
    "flow_maps": "measure.flow_heat_maps",
    "flow_plots": "plots.flow",
    "profiles": "measure.layer_profile",
    "reconstruct": "measure.reconstruction",
    "restriction": "search.selection",
    "sankey": "plots.flow_html",
    "text_plots": "plots.text",
}
"""Current path of each deprecated module, relative to the package."""
STORED = {
    "events.event": "events",
    "functional.canonizer": "functional.interception",
    "kernels.batch_norm_fusion": "fusion",
    "kernels.normalization": "steps",
} | {present: former for former, present in reversed(MOVED.items())}
"""Path by which the settings of stored sweeps identify each moved module, relative to the package.

If a module has moved twice, this is the path that is listed first.
"""
REGISTRY = "zennit.composites"


def warn_deprecated(what: str, instead: str, stacklevel: int = 2) -> None:
    """Issues a :class:`DeprecationWarning` attributed to the caller of the deprecated function.

    Args:
        what: The deprecated name, as written by the user.
        instead: The replacement to name in the warning.
        stacklevel: As in :func:`warnings.warn`, counted from the caller of this function.
    """
    message = f"{what} is deprecated and will be removed in nrm-plugin {REMOVED}. Use {instead} instead."
    warnings.warn(message, DeprecationWarning, stacklevel + 1)


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator that accepts keyword arguments under their former names and issues a deprecation warning.

    Args:
        names: The current names, keyed by former name.
    """

    def decorated(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for former in names.keys() & kwargs.keys():
                warn_deprecated(f"the argument {former}= of {function.__name__}", f"{names[former]}=")
                kwargs[names[former]] = kwargs.pop(former)
            return function(*args, **kwargs)

        return call

    return decorated


def stored_path(module: str) -> str:
    """Returns the module path recorded in stored sweeps, which does not change when the module is moved."""
    package, _, name = module.partition(".")
    return f"{package}.{STORED[name]}" if package == PACKAGE and name in STORED else module


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Meta path finder and loader for deprecated module paths. It also registers the composites with Zennit."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        package, _, name = fullname.partition(".")
        if package == PACKAGE and name in MOVED:
            return importlib.util.spec_from_loader(fullname, self)
        if fullname == REGISTRY or (package == PACKAGE and name):
            return _registering_composites(importlib.machinery.PathFinder.find_spec(fullname, path))
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType | None:
        return None

    def exec_module(self, module: types.ModuleType) -> None:
        """Populates the deprecated module with the attributes of its replacement."""
        path = f"{PACKAGE}.{MOVED[module.__name__.partition('.')[2]]}"
        warn_deprecated(f"the module {module.__name__}", path)
        replacement = importlib.import_module(path)
        module.__dict__.update({name: value for name, value in vars(replacement).items() if name[:2] != "__"})


class _Depth(threading.local):
    """Number of nested imports in progress in the current thread."""

    value = 0


_DEPTH = _Depth()


def _registering_composites(spec: importlib.machinery.ModuleSpec | None) -> importlib.machinery.ModuleSpec | None:
    """Wraps the loader of a module. Importing the module then also registers the composites with Zennit.

    Registration is deferred to the end of the outermost import. Until then, modules of this package that import Zennit
    are only partially initialized.
    """
    if spec is not None and spec.loader is not None:
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            _DEPTH.value += 1
            try:
                execute(module)
            finally:
                _DEPTH.value -= 1
            if not _DEPTH.value and REGISTRY in sys.modules:
                importlib.import_module(f"{PACKAGE}.composites")

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


class _Package(types.ModuleType):
    """Module type of this package, which prevents deprecated modules from shadowing functions such as ``coverage``."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (isinstance(value, types.ModuleType) and name in MOVED):
            super().__setattr__(name, value)


def install() -> None:
    """Installs the finder once and registers the composites if Zennit's registry is already imported."""
    sys.modules[PACKAGE].__class__ = _Package
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())
    if REGISTRY in sys.modules:
        importlib.import_module(f"{PACKAGE}.composites")
