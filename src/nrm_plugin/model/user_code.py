"""Inspection of user code: whether a module belongs to an installed package, and which names a function uses."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import sysconfig
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..imports import PACKAGE


@functools.cache
def is_installed_module(name: str) -> bool:
    """Returns True if a module belongs to Python or an installed package. A version then identifies its code."""
    top = name.partition(".")[0]
    if top == PACKAGE or top in sys.stdlib_module_names - {"__main__"} or top in sys.builtin_module_names:
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    if file is None:
        return False
    path = Path(file).resolve()
    if {"site-packages", "dist-packages"} & set(path.parts) or path.is_relative_to(sysconfig.get_path("stdlib")):
        return True
    return top in distributions() and any(
        path.is_relative_to(Path(str(importlib.metadata.distribution(one).locate_file(top))).resolve())
        for one in distributions()[top]
    )


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    """Returns the names of the installed distributions that provide each top-level package."""
    return importlib.metadata.packages_distributions()


def referenced(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the name and value of each global, or member of a user module, that a function uses."""
    for name, namespace, key in names_in(function):
        yield name, namespace[key]


def names_in(function: types.FunctionType) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yields each name as in :func:`referenced`, with the namespace that contains it and its key there."""
    names = sorted(set(_names(function.__code__)))
    for name in names:
        item = function.__globals__.get(name)
        if isinstance(item, types.ModuleType):
            if not is_installed_module(item.__name__):
                yield from ((f"{name}.{inner}", vars(item), inner) for inner in names if inner in vars(item))
        elif name in function.__globals__:
            yield name, function.__globals__, name


def cells(function: types.FunctionType) -> list[Any]:
    """Returns the values of a function's closure variables, except for None and unassigned ones."""
    return [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]


def slots_of(kind: type) -> Iterator[str]:
    """Yields the slot names of a class and its base classes."""
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        names = [slots] if isinstance(slots, str) else slots
        yield from (name for name in names if name not in ("__dict__", "__weakref__"))


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for item in code.co_consts:
        if isinstance(item, types.CodeType):
            yield from _names(item)


__all__ = ["cells", "distributions", "is_installed_module", "names_in", "referenced", "slots_of"]
