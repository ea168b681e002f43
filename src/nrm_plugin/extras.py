"""Packages that are no dependency: imported where they are needed, by an error that names the extra."""

from __future__ import annotations

import importlib
from types import ModuleType

from .errors import MissingExtraError


def extra(module: str, name: str) -> ModuleType:
    """An optional dependency.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"this needs {module.partition('.')[0]}: pip install 'nrm-plugin[{name}]'.") from error
