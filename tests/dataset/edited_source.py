"""Modules of a user, made from source text in which passages are replaced."""

from __future__ import annotations

import types


def edited_module(name: str, source: str, *edits: tuple[str, str]) -> types.ModuleType:
    """Runs the source with each passage replaced with another one; every passage must be in it."""
    for before, after in edits:
        assert before in source
        source = source.replace(before, after)
    module = types.ModuleType(name)
    exec(source, module.__dict__)
    return module
