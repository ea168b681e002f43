"""Sweeps on a local Ray cluster: `make test-hosts`.

Covers: nrm_plugin.dataset.ray_engine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from nrm_plugin.dataset import SweepError, sweep
from nrm_plugin.dataset.ray_engine import SweepBatches
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net

ray = pytest.importorskip("ray", reason="ray is not installed; `make test-hosts` installs it")
pytestmark = pytest.mark.filterwarnings("default")  # warnings of Ray and its dependencies


@pytest.fixture(scope="module", autouse=True)
def cluster():
    root = Path(__file__).parents[2]
    environment = dict(os.environ)
    os.environ |= {
        "PYTHONPATH": f"{root / 'src'}:{root}:{os.environ.get('PYTHONPATH', '')}",
        "RAY_AUTH_MODE": "disabled",
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        yield
        ray.shutdown()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("uninterrupted")
    sweep(net(), Data(), QUERIES, folder, **OPTIONS)
    torch.set_num_threads(threads)
    return contents(folder)


def test_two_workers_of_which_one_is_killed_store_the_same_as_one_process(tmp_path, uninterrupted):
    mark = tmp_path / "killed"
    options = {"engine": "ray", "engine_options": {"concurrency": 2}, **OPTIONS}
    stored = sweep(net(), Data(kill=mark), QUERIES, tmp_path / "out", **options)
    assert mark.exists()
    assert int(mark.read_text()) != os.getpid()
    assert stored.is_complete
    assert contents(tmp_path / "out") == uninterrupted


def test_an_error_on_a_worker_is_raised_and_the_sweep_resumes(tmp_path, uninterrupted):
    options = {"engine": "ray", "engine_options": {"concurrency": 1}, **OPTIONS}
    with pytest.raises(SweepError, match=r"sample 30 cannot be read.*the file is cut off"):
        sweep(net(), Data(bad=[30]), QUERIES, tmp_path, **options)
    assert sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS).is_complete
    assert contents(tmp_path) == uninterrupted


def test_map_batches_returns_the_same_rows(uninterrupted):
    data = Data()
    items = [{"sample": k, "inputs": data.x[k].numpy(), "label": k % 4} for k in range(50)]
    queries = [query for query in QUERIES if query.name in ("marginal(4)", "sink(4)")]
    rows = (
        ray.data.from_items(items, override_num_blocks=1)
        .map_batches(
            SweepBatches,
            fn_constructor_kwargs={"model": net, "queries": queries},
            batch_size=4,
            compute=ray.data.ActorPoolStrategy(size=1),
        )
        .take_all()
    )
    expected = {key: row for key, row in uninterrupted[0].items() if key[0] in ("marginal(4)", "sink(4)")}
    values = {
        (row["query"], row["group"], row["lower"], row["sample"]): (row["target"], row["prediction"], row["value"])
        for row in rows
    }
    assert values == expected
    assert len(rows) == len(expected)


@pytest.mark.slow
@pytest.mark.parametrize(("nodes", "change"), [(2, "remove"), (1, "replace")])
def test_a_node_that_is_killed_or_added_changes_no_rows(nodes, change, tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(root / "tests/hosts/ray_nodes.py"), str(tmp_path / "nodes"), str(nodes), change]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    printed = next(line for line in done.stdout.splitlines() if line.startswith("{"))  # Ray prints lines of its own
    assert len(json.loads(printed)["before"]) < 30
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    sweep(net(), Data(60), QUERIES, tmp_path / "one", batch_size=2, shard=2, progress=False)
    torch.set_num_threads(threads)
    assert contents(tmp_path / "nodes") == contents(tmp_path / "one")
