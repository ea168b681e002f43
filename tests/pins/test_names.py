"""Every name that was documented before the packages were laid out as they are now can still be imported."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path

import pytest

NAMES: dict[str, list[str]] = json.loads(Path(__file__).with_name("names.json").read_text())


@pytest.mark.parametrize("module", NAMES)
def test_documented_names_are_where_they_were(module: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = importlib.import_module(module)
        missing = [name for name in NAMES[module] if not hasattr(found, name)]
    assert not missing
