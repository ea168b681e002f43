"""Shards are written completely or not at all, and their rows are sorted.

Covers: nrm_plugin.dataset.atomic_files.
"""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys
from contextlib import contextmanager

import pyarrow.parquet as parquet
import pytest
import torch

from nrm_plugin.dataset import Maps, Marginal, Sweep, SweepError, sweep
from tests.conftest import slow_but
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net


@pytest.mark.medium
def test_incomplete_files_of_dead_processes_are_removed(tmp_path):
    sweep(net(), Data(10), QUERIES, tmp_path, index=False, **OPTIONS)
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    mark = f"{platform.node()}.{int(dead.stdout)}.tmp"
    (tmp_path / f".by-query.{mark}").mkdir()
    (tmp_path / f".by-query.{mark}" / "0000.parquet").write_bytes(b"half")
    (tmp_path / "rows" / f".part-0000-000000.parquet.{mark}").write_bytes(b"half")
    alive = tmp_path / "rows" / f".part-0000-000000.parquet.{platform.node()}.{os.getppid()}.tmp"
    alive.write_bytes(b"half")
    assert sweep(net(), Data(10), QUERIES, tmp_path, **OPTIONS).is_complete
    assert list(tmp_path.rglob(".*")) == [alive]


@pytest.mark.medium
def test_a_full_disk_leaves_a_readable_sweep(tmp_path, uninterrupted, monkeypatch):
    original, written = os.fsync, []

    def full(descriptor):
        written.append(descriptor)
        if len(written) > 8:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SweepError, match=r"No space left.*free space on the disk and run the same sweep again"):
            sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    stored = Sweep.open(tmp_path)
    assert stored.samples()["sample"].to_pylist() == list(range(8))
    assert not list(tmp_path.rglob(".*"))
    sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    assert contents(tmp_path) == uninterrupted


@contextmanager
def largest_file(size):
    """A disk on which no file can become larger, as the operating system enforces it."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.medium
@pytest.mark.parametrize("query", [Marginal("2", "neuron"), Maps("2")], ids=["rows", "maps"])
def test_a_truncated_file_is_not_a_shard(query, tmp_path):
    with pytest.raises(SweepError, match=r"shard 0 cannot be written to .*File too large"), largest_file(3_900):
        sweep(net(), Data(), [query], tmp_path, **OPTIONS)
    assert Sweep.open(tmp_path).shards == []
    assert [path for path in tmp_path.rglob("*") if path.suffix in (".parquet", ".safetensors", ".tmp")] == []
    assert sweep(net(), Data(), [query], tmp_path, **OPTIONS).is_complete


@pytest.mark.medium
@pytest.mark.parametrize("at", slow_but([1, 2, 3, 4, 5, 8, 12, 17, 29], 29))
def test_a_disk_that_is_full_at_any_write_leaves_nothing_wrong(at, tmp_path, uninterrupted, monkeypatch):
    """Whatever file does not fit: rows, maps, checksums, index or manifest."""
    original, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SweepError, match="No space left"):
            sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    assert not list(tmp_path.rglob(".*"))
    if (tmp_path / "manifest.json").exists():
        stored = Sweep.open(tmp_path)
        values = {
            (row["query"], row["group"], row["lower"], row["sample"]): row["value"] for row in stored.rows().to_pylist()
        }
        assert values.items() <= {key: row[2] for key, row in uninterrupted[0].items()}.items()
    assert sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS).is_complete
    assert contents(tmp_path) == uninterrupted


@pytest.mark.medium
def test_the_rows_of_a_shard_are_sorted_so_that_readers_skip_row_groups(begun):
    for path in (begun / "rows").glob("*.parquet"):
        rows = parquet.read_table(path).to_pylist()
        keys = [(row["query"], row["group"], row["lower"], row["sample"]) for row in rows]
        assert keys == sorted(keys)
        metadata = parquet.read_metadata(path)
        for number in range(metadata.num_row_groups):
            statistics = metadata.row_group(number).column(3).statistics
            assert statistics.min == statistics.max


@pytest.mark.medium
def test_samples_of_different_sizes_have_channels_but_not_positions(tmp_path):
    data = [torch.randn(3, 12, 12) if k < 4 else torch.randn(3, 14, 14) for k in range(8)]
    assert sweep(net(), data, [Marginal("4")], tmp_path / "channels", **OPTIONS).is_complete
    with pytest.raises(SweepError, match="differ in size"):
        sweep(net(), data, [Marginal("4", "position")], tmp_path / "positions", **OPTIONS)
