"""Damaged shards are detected when they are read."""

from __future__ import annotations

import json

import pyarrow.parquet as parquet
import pytest

from nrm_plugin.dataset import Sweep, SweepError, sweep
from nrm_plugin.dataset.sweep_layout import ShardError
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, net, write_sums


@pytest.mark.medium
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


def test_a_shard_with_row_groups_that_its_footer_does_not_list_raises(swept):
    path = swept / "rows/part-0000-000000.parquet"
    table, info = parquet.read_table(path), json.loads(parquet.read_metadata(path).metadata[b"nrm-plugin"])
    with parquet.ParquetWriter(path, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({"nrm-plugin": json.dumps({**info, "chunks": [*info["chunks"], ["x", 0, 0]]})})
    write_sums(path)
    with pytest.raises(ShardError, match="its row groups differ from those listed in its footer"):
        Sweep.open(swept).rows()
