"""A sweep begun by an older version can be continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from nrm_plugin.dataset import Manifest, Sweep, sweep, sweep_settings
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, net
from tests.pins.record_sweep import DIGESTS, SAMPLES, STORED, composite_digest, environment

RECORDED: dict[str, str] = json.loads(DIGESTS.read_text())


@pytest.mark.medium
def test_a_stored_sweep_is_continued(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Names of rules and canonizers are part of its settings, so a class that moves must keep its stored name."""
    folder = tmp_path / "swept"
    shutil.copytree(STORED, folder)
    stored = Manifest.read(folder).settings
    if environment() in RECORDED:
        assert composite_digest() == RECORDED[environment()]
    python = ("3", stored["versions"]["python"], "0")
    monkeypatch.setattr(sweep_settings, "version", stored["versions"].get)
    monkeypatch.setattr(sweep_settings.platform, "python_version_tuple", lambda: python)
    # The digest depends on the versions of Python and Zennit, and the one above is recorded for each.
    digest = sweep_settings.digest
    monkeypatch.setattr(
        sweep_settings,
        "digest",
        lambda value: stored["composite"]["settings"] if _is_composite(value) else digest(value),
    )
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("rows/part-*")}
    assert len(times) == 2
    with pytest.warns(sweep_settings.SettingsWarning, match="begun by an earlier version"):
        sweep(net(), Data(SAMPLES), QUERIES, folder, **OPTIONS)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("rows/part-*") if path.name in times} == times
    rows = Sweep.open(folder).rows("marginal(4)").to_pylist()
    assert Manifest.read(folder).state == "complete"
    fresh = sweep(net(), Data(SAMPLES), QUERIES, tmp_path / "fresh", **OPTIONS).rows("marginal(4)").to_pylist()
    values = [{(row["sample"], row["group"]): row["value"] for row in table} for table in (rows, fresh)]
    assert len(values[0]) == SAMPLES * 8
    assert values[0] == pytest.approx(values[1], abs=1e-5)


def _is_composite(value: object) -> bool:
    return isinstance(value, dict) and any("composites" in str(key) for key in value)
