"""Sweeps that are killed, interrupted or split among processes store the same as an uninterrupted one."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from nrm_plugin import at
from nrm_plugin.dataset import Activation, Marginal, Sweep, SweepError, sweep, sweep_runner
from nrm_plugin.errors import NRMError, UnknownLayerError
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net

HERE = Path(__file__).parent


ROOT = HERE.parents[1]


@pytest.mark.medium
def test_every_row_is_stored_once(uninterrupted):
    rows, maps = uninterrupted
    assert len(rows) == 50 * (8 + 8 * 6 + 1 + 1)
    assert len(maps) == 50


def script(*arguments, **environment):
    variables = {**os.environ, "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, *map(str, arguments)], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_killed_sweep_is_resumed_with_the_same_results(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sweep(net(), Data(60), QUERIES, tmp_path / "uninterrupted", batch_size=2, shard=2, progress=False)
    torch.set_num_threads(threads)
    kills = [int(number) for number in script(HERE / "killed.py", tmp_path, 3, 7).split()]
    assert len(kills) == 3
    assert min(kills) >= 3
    for where in ("time", "fsync", "replace"):
        assert contents(tmp_path / where) == contents(tmp_path / "uninterrupted")
        assert Sweep.open(tmp_path / where).is_complete
        assert not list((tmp_path / where).rglob(".*"))


@pytest.mark.medium
def test_ctrl_c_keeps_completed_shards_and_the_same_call_resumes(tmp_path, uninterrupted):
    class Stopped(Data):
        def __getitem__(self, index):
            if index == 29:
                raise KeyboardInterrupt
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        sweep(net(), Stopped(), QUERIES, tmp_path, **OPTIONS)
    stopped = Sweep.open(tmp_path)
    assert (stopped.manifest.state, stopped.is_complete) == ("interrupted", False)
    assert stopped.samples()["sample"].to_pylist() == list(range(24))
    assert stopped.maps("maps(input, over=position)", [3, 1]).shape == (2, 12, 12)
    assert len(stopped.top("marginal(4)", 3)) == 9
    with pytest.raises(SweepError, match="sample 40"):
        stopped.maps("maps(input, over=position)", [3, 40])
    assert sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS).is_complete
    assert contents(tmp_path) == uninterrupted


@pytest.mark.medium
def test_a_complete_sweep_is_not_run_again(tmp_path):
    class Known(Data):
        fingerprint = "noise 1"

    sweep(net(), Known(10), QUERIES, tmp_path, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert sweep(net(), Known(10, bad=range(10)), QUERIES, tmp_path, **OPTIONS).is_complete
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before


@pytest.mark.medium
def test_an_existing_sweep_raises_if_it_must_not_be_resumed(begun):
    with pytest.raises(SweepError, match="already contains a sweep"):
        sweep(net(), Data(), QUERIES, begun, resume=False, **OPTIONS)


@pytest.mark.medium
def test_a_failed_query_does_not_block_the_folder(tmp_path):
    with pytest.raises(UnknownLayerError):
        sweep(net(), Data(10), [Marginal("nothing")], tmp_path, **OPTIONS)
    assert sweep(net(), Data(10), [Marginal("4")], tmp_path, **OPTIONS).is_complete


@pytest.mark.medium
def test_ranks_share_the_shards_and_the_last_one_completes_the_sweep(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (2, 0, 1):
        monkeypatch.setenv("RANK", str(rank))
        stored = sweep(net(), DataLoader(Data(), 4), QUERIES, tmp_path, shard=8, progress=False)
        assert stored.is_complete == (rank == 1)
    assert stored.manifest.ranks == (0, 1, 2)
    assert len(list((tmp_path / "rows").glob("part-0002-*.parquet"))) == 2
    assert contents(tmp_path) == uninterrupted
    assert len(stored.top("marginal(4)", 3, 60)) == 50


@pytest.mark.medium
def test_a_different_number_of_processes_resumes(tmp_path, uninterrupted, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    monkeypatch.undo()
    assert sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS).is_complete
    assert contents(tmp_path) == uninterrupted


@pytest.mark.slow
def test_two_processes_of_torchrun_store_the_same_as_one(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import sys, torch\n"
        "from torch.utils.data import DataLoader\n"
        "from torch.utils.data.distributed import DistributedSampler\n"
        "from nrm_plugin.dataset import sweep\n"
        "from tests.dataset.sweep_nets import QUERIES, Data, net\n"
        "torch.distributed.init_process_group('gloo')\n"
        "loader = DataLoader(Data(), 4, sampler=DistributedSampler(Data()))\n"
        "stored = sweep(net(), loader, QUERIES, sys.argv[1], shard=8, progress=False)\n"
        "assert stored.is_complete and stored.manifest.ranks == (0, 1)\n"
        "torch.distributed.destroy_process_group()\n"
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sweep(net(), Data(), QUERIES, tmp_path / "one", **OPTIONS)
    torch.set_num_threads(threads)
    script("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, program, tmp_path / "two")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_two_sweeps_of_one_model_in_threads(tmp_path, uninterrupted):
    model, sweeps = net(), []
    threads = [
        threading.Thread(target=lambda k=k: sweeps.append(sweep(model, Data(), QUERIES, tmp_path / str(k), **OPTIONS)))
        for k in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sweeps) == 2
    for k in range(2):
        assert contents(tmp_path / str(k)) == uninterrupted


INVALID: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "engine": ({"engine": "spark"}, ValueError, "engine='spark' is unknown; choose 'local' or 'ray'"),
    "on_error": ({"on_error": "ignore"}, ValueError, "on_error='ignore' is unknown"),
    "target of another number": ({"target": lambda batch: [0, 1, 2]}, NRMError, "3 targets|target"),
    "inputs of other samples": ({"unpack": lambda batch: (batch[0][:2], None)}, SweepError, "inputs of 2"),
    "an unknown layer": ({"queries": Activation("nope")}, UnknownLayerError, "'nope'"),
    "activation at an input": ({"queries": Activation(at("4", side="input"))}, SweepError, "outputs of modules"),
    "activation of no such call": ({"queries": Activation(at("4", call=3))}, SweepError, "is called 1 times"),
    "a name of two lines": ({"queries": lambda: Marginal("4", name="a\nb")}, SweepError, "one line of text"),
}


@pytest.mark.parametrize("name", INVALID)
def test_invalid_arguments_raise(name: str, tmp_path):
    changed, error, message = INVALID[name]
    options = {**OPTIONS, **changed}
    queries = options.pop("queries", Marginal("4"))
    with pytest.raises(error, match=message):
        sweep(net(), Data(4), queries() if callable(queries) else queries, tmp_path, **options)


def test_a_path_that_is_not_a_folder_raises(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SweepError, match=r"cannot write to .*file.*Choose another folder"):
        sweep(net(), Data(4), Marginal("4"), tmp_path / "file" / "swept", **OPTIONS)


def test_rows_are_kept_if_sorting_fails(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sweep_runner, "write_index", full)
        with pytest.raises(SweepError, match=r"sorting them failed: No space left.*index=False"):
            sweep(net(), Data(4), Marginal("4"), tmp_path, **OPTIONS)
    assert len(Sweep.open(tmp_path).rows()) == 4 * 8
    assert sweep(net(), Data(4), Marginal("4"), tmp_path, **OPTIONS).is_complete
