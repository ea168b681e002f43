"""Every documented name can still be imported from its former path."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import pytest

NAMES: dict[str, list[str]] = json.loads(Path(__file__).with_name("names.json").read_text())


@pytest.mark.parametrize("module", NAMES)
def test_documented_names_keep_their_paths(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        imported = importlib.import_module(module)
        missing = [name for name in NAMES[module] if not hasattr(imported, name)]
    assert not missing
