"""Sweeps that are killed, interrupted, damaged or split among processes store the same as an uninterrupted one."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, Subset, WeightedRandomSampler
from torch.utils.data.distributed import DistributedSampler
from zennit.composites import EpsilonPlus, EpsilonPlusFlat

from nrm_plugin import NRMDefault, RelevanceMeasure
from nrm_plugin.dataset import Manifest, Marginal, Sink, Sweep, SweepError, sweep
from nrm_plugin.dataset import sweep_layout as layout
from nrm_plugin.dataset.settings import described
from nrm_plugin.errors import UnknownLayerError
from tests.conftest import slow_but
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, net

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def contents(folder):
    """All rows and maps by sample; asserts that no row is repeated."""
    stored = Sweep.open(folder)
    order = [(name, "ascending") for name in ("query", "group", "lower", "sample")]
    files = [parquet.read_table(path) for path in sorted((Path(folder) / "rows").glob("*.parquet"))]
    rows = {}
    for table in files:
        for row in table.to_pylist():
            key = (row["query"], row["group"], row["lower"], row["sample"])
            assert key not in rows, "a row is repeated"
            rows[key] = (row["target"], row["prediction"], row["value"])
    assert len(rows) == len(stored.rows())
    assert stored.rows().num_columns == len(order) + 3
    maps = {}
    for path in sorted((Path(folder) / "maps").glob("*.safetensors")):
        from safetensors.torch import load_file

        tensors = load_file(path)
        for name in tensors.keys() - {"sample", "target", "prediction"}:
            maps |= {(name, int(k)): row.tolist() for k, row in zip(tensors["sample"], tensors[name], strict=True)}
    return rows, maps


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    sweep(net(), Data(), QUERIES, folder, **OPTIONS)
    return contents(folder)


def test_every_row_is_stored_once(uninterrupted):
    rows, maps = uninterrupted
    assert len(rows) == 50 * (8 + 8 * 6 + 1 + 1)
    assert len(maps) == 50


# -- killed -----------------------------------------------------------------------------------------------------------


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
    kills = [int(number) for number in script(HERE / "killed.py", tmp_path, 3, 5).split()]
    assert len(kills) == 3
    assert min(kills) >= 3
    for where in ("time", "fsync", "replace"):
        assert contents(tmp_path / where) == contents(tmp_path / "uninterrupted")
        assert Sweep.open(tmp_path / where).is_complete
        assert not list((tmp_path / where).rglob(".*"))


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


def test_a_complete_sweep_is_not_run_again(tmp_path):
    sweep(net(), Data(10), QUERIES, tmp_path, **OPTIONS)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    assert sweep(net(), Data(10, bad=range(10)), QUERIES, tmp_path, **OPTIONS).is_complete
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")} == before


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


# -- different settings -----------------------------------------------------------------------------------------------


def changed_weight():
    model = net()
    with torch.no_grad():
        model[4].bias[3] += 1e-6
    return model


CHANGES = {
    "weights": ({"model": changed_weight()}, "model"),
    "structure": ({"model": torch.nn.Sequential(*net(), torch.nn.Identity()).eval()}, "model.structure"),
    "length": ({"data": Data(49)}, r"samples \(was 50, now 49\)"),
    "queries": ({"queries": [*QUERIES, Sink("2")]}, r"queries.sink\(2\)"),
    "other query": (
        {"queries": [Marginal("2"), *QUERIES[1:]]},
        r"queries.marginal\(4\) \(removed\); queries.marginal\(2\) \(added\)",
    ),
    "batch size": ({"batch_size": 8}, r"batch_size \(was 4, now 8\)"),
    "seed": ({"seed": 1}, r"seed \(was 0, now 1\)"),
    "target": ({"target": "label"}, "target"),
    "composite": ({"composite": EpsilonPlusFlat()}, "composite.name"),
    "a rule": ({"composite": NRMDefault(epsilon=0.3)}, "composite.settings"),
    "residual": ({"residual": "sink"}, "residual"),
    "gain limit": ({"gain_limit": 4.0}, r"gain_limit \(was 2.0, now 4.0\)"),
    "unpack": ({"unpack": lambda batch: (batch[0] + 1, batch[1])}, "unpack"),
}


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    sweep(net(), Data(), QUERIES, folder, **OPTIONS)
    return folder


@pytest.mark.parametrize(("changes", "message"), CHANGES.values(), ids=CHANGES)
def test_different_settings_are_not_mixed(begun, changes, message):
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    given = {"model": net(), "data": Data(), "queries": QUERIES, **OPTIONS, **changes}
    with pytest.raises(SweepError, match=message):
        sweep(out=begun, **given)
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_an_existing_sweep_raises_if_it_must_not_be_resumed(begun):
    with pytest.raises(SweepError, match="already contains a sweep"):
        sweep(net(), Data(), QUERIES, begun, resume=False, **OPTIONS)


def test_a_failed_query_does_not_block_the_folder(tmp_path):
    with pytest.raises(UnknownLayerError):
        sweep(net(), Data(10), [Marginal("nothing")], tmp_path, **OPTIONS)
    assert sweep(net(), Data(10), [Marginal("4")], tmp_path, **OPTIONS).is_complete


def test_the_description_of_a_composite_does_not_depend_on_its_use():
    rules = EpsilonPlusFlat()
    before = described(rules)
    RelevanceMeasure(net(), Data(2).x, 1, composite=rules).marginal("4")
    assert described(rules) == before == described(EpsilonPlusFlat())
    assert described(EpsilonPlus()) != before != described(EpsilonPlusFlat(epsilon=1e-5))


# -- failing samples and damaged files ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_unreadable_sample_stops_a_sweep_or_is_skipped(tmp_path, uninterrupted):
    with pytest.raises(SweepError, match=r"sample 13 cannot be read: OSError: the file is cut off.*on_error='skip'"):
        sweep(net(), Data(bad=(13, 14, 40)), QUERIES, tmp_path, **OPTIONS)
    assert Sweep.open(tmp_path).samples()["sample"].to_pylist() == list(range(8))
    stored = sweep(net(), Data(bad=(13, 14, 40)), QUERIES, tmp_path, on_error="skip", **OPTIONS)
    assert stored.is_complete
    assert [(entry["sample"], entry["why"]) for entry in stored.manifest.failed] == [
        (number, "OSError: the file is cut off") for number in (13, 14, 40)
    ]
    rows, _ = contents(tmp_path)
    assert {key[3] for key in rows} == set(range(50)) - {13, 14, 40}
    with pytest.raises(SweepError, match="sample 13"):
        stored.maps("maps(input, over=position)", [13])
    again = sweep(net(), Data(), QUERIES, tmp_path, on_error="skip", retry_failed=True, **OPTIONS)
    assert again.manifest.failed == ()
    assert contents(tmp_path) == uninterrupted
    assert len(again.top("marginal(4)", 0, k=60)) == 50


@pytest.mark.parametrize("why", ["not finite", "of another size"])
def test_a_sample_without_a_measure_is_skipped(why, tmp_path):
    data = [list(sample) for sample in Data(12)]
    data[5][0] = data[5][0] * torch.nan if why == "not finite" else data[5][0][:, :7]
    with pytest.raises(SweepError, match="sample"):
        sweep(net(), data, [Marginal("4")], tmp_path, **OPTIONS)
    stored = sweep(net(), data, [Marginal("4")], tmp_path, on_error="skip", **OPTIONS)
    assert [entry["sample"] for entry in stored.manifest.failed] == [5]
    assert stored.samples()["sample"].to_pylist() == [*range(5), *range(6, 12)]
    good = torch.stack([data[k][0] for k in (4, 6, 7)])
    mass = RelevanceMeasure(net(), good, net()(good).argmax(1)).marginal("4", "channel")
    rows = {(row["sample"], row["group"]): row["value"] for row in stored.rows().to_pylist()}
    assert [rows[k, 3] for k in (4, 6, 7)] == mass[:, 3].tolist()


def test_a_shard_of_failing_samples_has_no_rows(tmp_path):
    stored = sweep(net(), Data(20, bad=range(8)), QUERIES, tmp_path, on_error="skip", **OPTIONS)
    assert stored.is_complete
    assert stored.samples()["sample"].to_pylist() == list(range(8, 20))
    assert stored.queries["marginal(4)"].groups == (8,)
    assert len(stored.top("marginal(4)", 2)) == 9


def damaged(path, how):
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    if how == "empty":
        content = b""
    if how == "of another sweep":
        table = parquet.read_table(path)
        info = json.loads(parquet.read_metadata(path).metadata[layout.KEY])
        with parquet.ParquetWriter(path, table.schema.remove_metadata()) as writer:
            for number, (name, _, _) in enumerate(info["chunks"]):
                writer.write_table(table.slice(number, 1) if name else table)
            writer.add_key_value_metadata({layout.KEY: json.dumps({**info, "settings": "another"})})
        return
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "empty", "of another sweep"])
def test_a_damaged_shard_raises_or_is_evaluated_again(how, tmp_path, uninterrupted):
    sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    damaged(tmp_path / "rows/part-0000-000002.parquet", how)
    with pytest.raises(SweepError, match=r"part-0000-000002.*on_error='skip'"):
        sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    with pytest.raises(SweepError, match="part-0000-000002"):
        Sweep.open(tmp_path).rows()
    rest = Sweep.open(tmp_path, on_error="skip")
    assert set(rest.rows("sink(4)")["sample"].to_pylist()) == set(range(50)) - set(range(16, 24))
    assert [entry["file"] for entry in rest.bad_shards] == ["rows/part-0000-000002.parquet"]
    repaired = sweep(net(), Data(), QUERIES, tmp_path, on_error="skip", **OPTIONS)
    assert [entry["file"] for entry in repaired.manifest.bad_shards] == ["rows/part-0000-000002.parquet"]
    (tmp_path / "rows/bad-part-0000-000002.parquet").unlink()
    assert contents(tmp_path) == uninterrupted


def test_a_flipped_bit_is_detected(tmp_path):
    sweep(net(), Data(), QUERIES, tmp_path, index=False, **OPTIONS)
    path = tmp_path / "rows/part-0000-000002.parquet"
    whole, name = path.read_bytes(), "joint(4, 2)"
    index = [chunk[0] for chunk in Sweep.open(tmp_path).shards[2].chunks].index(name)
    column = parquet.read_metadata(path).row_group(index).column(6)
    for number in range(1, 20):
        content = bytearray(whole)
        content[column.data_page_offset + number * column.total_compressed_size // 20] ^= 4
        path.write_bytes(bytes(content))
        with pytest.raises(SweepError, match="part-0000-000002"):
            Sweep.open(tmp_path).rows(name)
    rest = Sweep.open(tmp_path, on_error="skip")
    assert len(set(rest.rows(name)["sample"].to_pylist())) == 42
    assert len(rest.bad_shards) == 1


def test_missing_maps_are_evaluated_again(tmp_path, uninterrupted):
    sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    (tmp_path / "maps/part-0000-000001.safetensors").unlink()
    sweep(net(), Data(), QUERIES, tmp_path, on_error="skip", **OPTIONS)
    (tmp_path / "rows/bad-part-0000-000001.parquet").unlink()
    assert contents(tmp_path) == uninterrupted


# -- reading----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("query", slow_but(["marginal(4)", "joint(4, 2)", "sink(4)"], "joint(4, 2)"))
@pytest.mark.parametrize("index", [True, False], ids=["sorted", "unsorted"])
def test_top_equals_the_sorted_rows(query, index, tmp_path, uninterrupted):
    stored = sweep(net(), Data(), QUERIES, tmp_path, index=index, **OPTIONS)
    group = -1 if query == "sink(4)" else 3
    rows = [(key, row) for key, row in uninterrupted[0].items() if key[:2] == (query, group)]
    for lower, target, largest in ((None, None, True), (None, 2, True), (4, None, False)):
        if lower is not None and query != "joint(4, 2)":
            continue
        fitting = [
            (row[2], key[3], key[2]) for key, row in rows if lower in (None, key[2]) and target in (None, row[0])
        ]
        wanted = sorted(fitting, key=lambda one: ((-1 if largest else 1) * one[0], one[2], one[1]))[:9]
        found = stored.top(
            query, None if group < 0 else group, 9, lower=lower, target=target, largest=largest
        ).to_pylist()
        assert [(row["value"], row["sample"], row["lower"]) for row in found] == wanted


def test_the_index_has_all_rows_by_group_and_decreasing_value(begun, uninterrupted):
    found = {}
    for number, name in enumerate(Sweep.open(begun).queries):
        path = begun / f"by-query/{number:04}.parquet"
        if name.startswith(("maps", "joint")):
            assert not path.exists()
            continue
        rows = parquet.read_table(path).to_pylist()
        keys = [(row["group"], -row["value"], row["sample"]) for row in rows]
        assert keys == sorted(keys)
        for row in rows:
            assert row["query"] == name
            key = (name, row["group"], row["lower"], row["sample"])
            found[key] = (row["target"], row["prediction"], row["value"])
    assert found == {key: row for key, row in uninterrupted[0].items() if key[0] != "joint(4, 2)"}


def test_rows_of_a_group_and_columns(begun):
    stored = Sweep.open(begun)
    found = stored.rows("joint(4, 2)", 5, ["sample", "lower", "value"])
    assert found.column_names == ["sample", "lower", "value"]
    assert len(found) == 50 * 6
    for wrong in ({"query": "joint(2, 4)"}, {"columns": ["channel"]}):
        with pytest.raises(SweepError, match=r"there is no column|has no query"):
            stored.rows(**wrong)
    with pytest.raises(SweepError, match="there is no sweep"):
        Sweep.open(begun / "rows")
    with pytest.raises(SweepError, match="read them with rows"):
        stored.maps("sink(4)", [1])


def test_the_rows_of_a_shard_are_sorted_so_that_readers_skip_row_groups(begun):
    for path in (begun / "rows").glob("*.parquet"):
        rows = parquet.read_table(path).to_pylist()
        keys = [(row["query"], row["group"], row["lower"], row["sample"]) for row in rows]
        assert keys == sorted(keys)
        metadata = parquet.read_metadata(path)
        for number in range(metadata.num_row_groups):
            statistics = metadata.row_group(number).column(3).statistics
            assert statistics.min == statistics.max


def test_a_damaged_manifest_raises(tmp_path):
    sweep(net(), Data(10), [Sink("4")], tmp_path, **OPTIONS)
    (tmp_path / "manifest.json").write_text('{"format": "nrm-plugin sweep 1"}')
    with pytest.raises(SweepError, match="damaged"):
        Manifest.read(tmp_path)
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(SweepError, match="no manifest"):
        sweep(net(), Data(10), [Sink("4")], tmp_path, **OPTIONS)


# -- loaders ----------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    def __init__(self, count=50, stop=None):
        self.data, self.stop = Data(count), stop

    def __iter__(self):
        for index in range(len(self.data)):
            if index == self.stop:
                raise RuntimeError("the connection is lost")
            yield self.data[index]


@pytest.mark.slow
def test_a_loader_gives_the_rows_of_its_data_set(tmp_path, uninterrupted):
    loaders = {
        "plain": DataLoader(Data(), 4),
        "shuffled, with workers": DataLoader(Data(), 4, shuffle=True, num_workers=1),
        "distributed": DataLoader(Data(), 4, sampler=DistributedSampler(Data(), num_replicas=3, rank=1)),
        "iterable": DataLoader(Stream(), 4),
    }
    options = {key: value for key, value in OPTIONS.items() if key != "batch_size"}
    for name, loader in loaders.items():
        sweep(net(), loader, QUERIES, tmp_path / name, **options)
        assert contents(tmp_path / name) == uninterrupted


def test_an_iterable_data_set_is_read_again_and_resumes(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="connection is lost"):
        sweep(net(), Stream(stop=30), QUERIES, tmp_path, **OPTIONS)
    assert Sweep.open(tmp_path).samples()["sample"].to_pylist() == list(range(24))
    with pytest.raises(SweepError, match="must yield the same samples in the same order"):
        sweep(net(), Stream(22), QUERIES, tmp_path, **OPTIONS)
    stored = sweep(net(), Stream(), QUERIES, tmp_path, **OPTIONS)
    assert stored.manifest.samples == 50
    assert contents(tmp_path) == uninterrupted
    assert sweep(net(), Stream(stop=0), QUERIES, tmp_path, **OPTIONS).is_complete


@pytest.mark.slow
def test_random_transforms_are_the_same_in_every_run(tmp_path):
    plain = sweep(net(), Data(is_noisy=True), [Sink("4"), Marginal("4")], tmp_path / "plain", **OPTIONS)
    read = sweep(net(), Data(is_noisy=True), [Sink("4"), Marginal("4")], tmp_path / "read", num_workers=1, **OPTIONS)
    other = sweep(net(), Data(is_noisy=True), [Sink("4"), Marginal("4")], tmp_path / "other", seed=1, **OPTIONS)
    assert plain.rows("marginal(4)").equals(read.rows("marginal(4)"))
    assert not plain.rows("marginal(4)").equals(other.rows("marginal(4)"))


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (DataLoader(Data(), sampler=WeightedRandomSampler([1.0] * 50, 9)), {}, "Subset"),
        (iter([1]), {}, "with a length"),
        (Subset(Data(), []), {}, "no samples"),
        (Stream(), {"num_workers": 2}, "several times"),
        (Data(), {"batch_size": 0}, "at least 1"),
        (Data(), {"shard": 0}, "positive number of samples"),
        (Data(), {"target": "class"}, "choose 'prediction'"),
        (Data().x, {"target": "label"}, "the data have no labels"),
        ([(x, 1, 2) for x in Data(3).x], {}, "unpack="),
    ],
)
def test_invalid_data_raise(data, options, message, tmp_path):
    with pytest.raises(SweepError, match=message):
        sweep(net(), data, [Sink("4")], tmp_path, **{**OPTIONS, **options})


def test_samples_of_different_sizes_have_channels_but_not_positions(tmp_path):
    data = [torch.randn(3, 12, 12) if k < 4 else torch.randn(3, 14, 14) for k in range(8)]
    assert sweep(net(), data, [Marginal("4")], tmp_path / "channels", **OPTIONS).is_complete
    with pytest.raises(SweepError, match="differ in size"):
        sweep(net(), data, [Marginal("4", "position")], tmp_path / "positions", **OPTIONS)


# -- several processes ------------------------------------------------------------------------------------------------


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


def test_the_progress_bar_shows_rate_and_memory(tmp_path, capsys):
    sweep(net(), Data(10), [Sink("4")], tmp_path, **{**OPTIONS, "progress": True})
    printed = capsys.readouterr().err
    assert "10/10" in printed
    assert "memory" in printed
    assert "sample/s" in printed


@pytest.mark.slow
def test_two_sweeps_of_one_model_in_threads(tmp_path, uninterrupted):
    model, found = net(), []
    threads = [
        threading.Thread(target=lambda k=k: found.append(sweep(model, Data(), QUERIES, tmp_path / str(k), **OPTIONS)))
        for k in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2
    for k in range(2):
        assert contents(tmp_path / str(k)) == uninterrupted
