"""Only one sweep at a time writes to a folder, and a lock ends with its process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from nrm_plugin.dataset import Manifest, Marginal, Sink, Sweep, SweepError, sweep
from nrm_plugin.dataset.processes import FolderLocks, ProcessRank
from tests.dataset.sweep_nets import OPTIONS, Data, contents, net


def both(first, second) -> list[object]:
    """Results or errors of two calls that start together."""
    barrier, results = threading.Barrier(2), {}

    def started(number, call):
        barrier.wait()
        try:
            results[number] = call()
        except Exception as error:
            results[number] = error

    threads = [threading.Thread(target=started, args=pair) for pair in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[0], results[1]]


@pytest.mark.medium
@pytest.mark.parametrize("options", [{"target": "label"}, {}], ids=["other settings", "same settings"])
def test_of_two_sweeps_at_once_one_is_rejected(options, tmp_path):
    def call(more):
        model = net()
        return lambda: sweep(model, Data(12, wait=0.01), [Marginal("4")], tmp_path / "swept", **OPTIONS, **more)

    results = both(call({}), call(options))
    stored = [result for result in results if isinstance(result, Sweep)]
    (rejected,) = (result for result in results if isinstance(result, SweepError))
    assert len(stored) == 1
    assert "another process writes to" in str(rejected)
    assert stored[0].is_complete
    winner = {} if stored[0] is results[0] else options
    sweep(net(), Data(12), [Marginal("4")], tmp_path / "alone", **OPTIONS, **winner)
    assert contents(tmp_path / "swept") == contents(tmp_path / "alone")


@pytest.mark.medium
def test_a_lock_is_released_after_an_error(tmp_path):
    for _ in range(2):
        with pytest.raises(SweepError, match="sample 1 cannot be read"):
            sweep(net(), Data(4, bad=[1]), [Sink("4")], tmp_path, **OPTIONS)
    assert sweep(net(), Data(4), [Sink("4")], tmp_path, **OPTIONS).is_complete


def test_a_manifest_is_not_replaced_while_another_rank_runs(tmp_path, monkeypatch):
    """Rank 1 has no results yet; a sweep with other settings must not take its folder."""
    with pytest.raises(KeyError):
        sweep(net(), Data(4), [Marginal("nothing")], tmp_path, **OPTIONS)  # leaves a manifest and no results
    with FolderLocks(tmp_path, ProcessRank(1, 2)) as locks:
        with locks.beginning():
            pass
        with pytest.raises(SweepError, match="different settings"):
            sweep(net(), Data(4), [Sink("4")], tmp_path, **OPTIONS)
    assert sweep(net(), Data(4), [Sink("4")], tmp_path, **OPTIONS).is_complete
    assert list(Manifest.read(tmp_path).settings["queries"]) == ["sink(4)"]


def hold(folder: Path) -> None:
    with FolderLocks(folder, ProcessRank(0, 1)) as locks:
        with locks.beginning():
            (folder / "held").touch()
        time.sleep(60)


@pytest.mark.slow
def test_a_killed_process_leaves_no_lock(tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=hold, args=(tmp_path,))
    process.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.05)
    with pytest.raises(SweepError, match="another process writes to"):
        sweep(net(), Data(4), [Sink("4")], tmp_path, **OPTIONS)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert sweep(net(), Data(4), [Sink("4")], tmp_path, **OPTIONS).is_complete


def test_a_file_system_without_locks_is_rejected(tmp_path, monkeypatch):
    def acquire(*_: object, **options: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr("filelock.BaseFileLock.acquire", acquire)
    with pytest.raises(SweepError, match="does not support file locks"):
        sweep(net(), Data(4), [Sink("4")], tmp_path, **OPTIONS)
