"""Failing samples and damaged shards raise, or are skipped and evaluated again."""

from __future__ import annotations

import json
import shutil

import pyarrow.parquet as parquet
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from nrm_plugin import RelevanceMeasure
from nrm_plugin.dataset import Maps, Marginal, Sweep, SweepError, sweep
from nrm_plugin.dataset import sweep_layout as layout
from nrm_plugin.dataset.sweep_layout import ShardError
from nrm_plugin.errors import InputError
from tests.conftest import slow_but
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net, write_sums


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


@pytest.mark.medium
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


@pytest.mark.medium
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


@pytest.mark.medium
@pytest.mark.parametrize("how", slow_but(["truncated", "empty", "of another sweep"], "of another sweep"))
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


@pytest.mark.medium
def test_missing_maps_are_evaluated_again(tmp_path, uninterrupted):
    sweep(net(), Data(), QUERIES, tmp_path, **OPTIONS)
    (tmp_path / "maps/part-0000-000001.safetensors").unlink()
    sweep(net(), Data(), QUERIES, tmp_path, on_error="skip", **OPTIONS)
    (tmp_path / "rows/bad-part-0000-000001.parquet").unlink()
    assert contents(tmp_path) == uninterrupted


def test_an_error_of_a_batch_without_a_failing_sample_is_raised_unchanged(tmp_path):
    def unpack(batch):
        if len(batch[0]) > 1:
            raise InputError("the batch is too large")
        return batch

    with pytest.raises(InputError, match="the batch is too large"):
        sweep(net(), Data(8), Marginal("4"), tmp_path, unpack=unpack, on_error="skip", **OPTIONS)


def test_a_batch_of_failing_samples_is_skipped(tmp_path):
    def unpack(batch):
        if float(batch[0].sum()) in rejected:
            raise InputError("rejected")
        return batch

    data = Data(8)
    rejected = {float(data.x[k : k + 1].sum()) for k in range(4)} | {float(data.x[:4].sum())}
    stored = sweep(net(), data, Marginal("4"), tmp_path, unpack=unpack, on_error="skip", **OPTIONS)
    assert [entry["sample"] for entry in stored.manifest.failed] == [0, 1, 2, 3]
    assert set(stored.rows()["sample"].to_pylist()) == {4, 5, 6, 7}


def test_samples_that_cannot_be_collated_are_skipped(tmp_path):
    def collate(samples):
        raise ValueError("no batch today")

    loader = DataLoader(Data(4), batch_size=4, collate_fn=collate)
    stored = sweep(net(), loader, Marginal("4"), tmp_path, on_error="skip", shard=8, progress=False)
    assert [entry["sample"] for entry in stored.manifest.failed] == [0, 1, 2, 3]
    assert "no batch today" in stored.manifest.failed[0]["why"]
    assert len(stored.rows()) == 0


def again(folder):
    return sweep(net(), Data(16), [Marginal("4"), Maps("input", over="position")], folder, **OPTIONS)


def test_a_shard_with_the_number_of_another_raises(swept):
    shutil.copy(swept / "rows/part-0000-000000.parquet", swept / "rows/part-0000-000001.parquet")
    write_sums(swept / "rows/part-0000-000001.parquet")
    for use in (again, lambda folder: Sweep.open(folder).rows()):
        with pytest.raises(ShardError, match=r"part-0000-000001.* it contains shard 0"):
            use(swept)


def test_maps_of_fewer_samples_than_rows_raise(swept):
    path = swept / "maps/part-0000-000001.safetensors"
    save_file({name: tensor[:5].contiguous() for name, tensor in load_file(path).items()}, path)
    write_sums(swept / "rows/part-0000-000001.parquet")
    with pytest.raises(ShardError, match=r"contains 5 samples, which differs from part-0000-000001\.parquet"):
        again(swept)
