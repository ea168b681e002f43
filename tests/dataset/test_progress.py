"""The progress bar of a sweep."""

from __future__ import annotations

import sys

from nrm_plugin.dataset import Sink, sweep
from nrm_plugin.dataset.progress import memory, resident
from tests.dataset.sweep_nets import OPTIONS, Data, net


def test_the_progress_bar_shows_rate_and_memory(tmp_path, capsys):
    sweep(net(), Data(10), [Sink("4")], tmp_path, **{**OPTIONS, "progress": True})
    printed = capsys.readouterr().err
    assert "10/10" in printed
    assert "memory" in printed
    assert "sample/s" in printed


def test_memory_is_unknown_without_the_module_resource(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert resident() is None
    assert memory().startswith("unknown")
