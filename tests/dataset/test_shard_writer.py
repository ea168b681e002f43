"""Shards are written completely or not at all, and their rows are sorted."""

from __future__ import annotations

import errno
import os
import platform
import signal
import subprocess
import sys

import pyarrow.parquet as parquet
import pytest
import torch

from nrm_plugin.dataset import Marginal, Sweep, SweepError, sweep
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net


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


def test_a_truncated_file_is_not_a_shard(tmp_path):
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (tmp_path / "rows").mkdir()
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, before[1]))
        with pytest.raises(SweepError, match="cannot be written"):
            sweep(net(), Data(), [Marginal("2", "neuron")], tmp_path, **OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert Sweep.open(tmp_path).shards == []
    assert not list(tmp_path.rglob("*.parquet"))


def test_the_rows_of_a_shard_are_sorted_so_that_readers_skip_row_groups(begun):
    for path in (begun / "rows").glob("*.parquet"):
        rows = parquet.read_table(path).to_pylist()
        keys = [(row["query"], row["group"], row["lower"], row["sample"]) for row in rows]
        assert keys == sorted(keys)
        metadata = parquet.read_metadata(path)
        for number in range(metadata.num_row_groups):
            statistics = metadata.row_group(number).column(3).statistics
            assert statistics.min == statistics.max


def test_samples_of_different_sizes_have_channels_but_not_positions(tmp_path):
    data = [torch.randn(3, 12, 12) if k < 4 else torch.randn(3, 14, 14) for k in range(8)]
    assert sweep(net(), data, [Marginal("4")], tmp_path / "channels", **OPTIONS).is_complete
    with pytest.raises(SweepError, match="differ in size"):
        sweep(net(), data, [Marginal("4", "position")], tmp_path / "positions", **OPTIONS)
