"""Stores an interrupted sweep for :mod:`tests.pins.test_sweep`: ``python -m tests.pins.record_sweep``."""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path

from nrm_plugin import NRMDefault
from nrm_plugin.dataset import Manifest, sweep
from nrm_plugin.dataset.sweep_settings import described, digest
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, net

STORED = Path(__file__).with_name("stopped")
DIGESTS = Path(__file__).with_name("digests.json")
SAMPLES = 24


def environment() -> str:
    """Versions that change the digest of a composite: Python's bytecode and Zennit's classes."""
    return f"Python 3.{platform.python_version_tuple()[1]}, Zennit {version('zennit')}"


def composite_digest() -> str:
    """The digest of the default composite in the settings of a sweep."""
    return digest(described(NRMDefault()))


def main() -> None:
    """Command line."""
    digests = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    DIGESTS.write_text(json.dumps({**digests, environment(): composite_digest()}, indent=1) + "\n")
    if STORED.exists():
        return
    sweep(net(), Data(SAMPLES), QUERIES, STORED, **{**OPTIONS, "index": False})
    sorted(STORED.glob("rows/part-*"))[-1].unlink()
    sorted(STORED.glob("maps/*"))[-1].unlink()
    manifest = json.loads((STORED / "manifest.json").read_text())
    manifest["state"] = "interrupted"
    (STORED / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    shutil.rmtree(STORED / "by-query", ignore_errors=True)
    assert Manifest.read(STORED).state == "interrupted"


if __name__ == "__main__":
    main()
