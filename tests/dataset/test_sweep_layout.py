"""Manifests that are damaged or have another format raise."""

from __future__ import annotations

import json

import pytest

from nrm_plugin.dataset import Manifest, Sink, Sweep, SweepError, sweep
from tests.dataset.sweep_nets import OPTIONS, Data, net


@pytest.mark.medium
def test_a_damaged_manifest_raises(tmp_path):
    sweep(net(), Data(10), [Sink("4")], tmp_path, **OPTIONS)
    (tmp_path / "manifest.json").write_text('{"format": "nrm-plugin sweep 1"}')
    with pytest.raises(SweepError, match="damaged"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(SweepError, match="no manifest"):
        sweep(net(), Data(10), [Sink("4")], tmp_path, **OPTIONS)


def test_a_manifest_of_another_format_raises(swept):
    content = json.loads((swept / "manifest.json").read_text())
    (swept / "manifest.json").write_text(json.dumps(content | {"format": "nrm-plugin sweep 99"}))
    with pytest.raises(SweepError, match="a different format; this version of the package reads 'nrm-plugin sweep 1'"):
        Sweep.open(swept)
