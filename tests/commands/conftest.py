"""Fixtures of the tests of commands."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.shell import NETS, PHOTO


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, which contains an image and a user's own models."""
    monkeypatch.chdir(tmp_path)
    PHOTO.save("china.png")
    Path("own_nets.py").write_text(NETS)
    Path("wrong.py").write_text("def make(:\n")
    yield tmp_path
    for name in ("own_nets", "other_nets", "wrong"):
        sys.modules.pop(name, None)


@pytest.fixture
def fast(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same folder; figures are created but not written, which would take most of the time."""
    monkeypatch.setattr("nrm_plugin.commands.output_files.save", lambda figure, path, *_: path.touch())
    return here
