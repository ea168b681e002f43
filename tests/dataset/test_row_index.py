"""The index of a sweep has all rows, sorted."""

from __future__ import annotations

import pyarrow.parquet as parquet

from nrm_plugin.dataset import Sweep


def test_the_index_has_all_rows_by_group_and_decreasing_value(begun, uninterrupted):
    indexed = {}
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
            indexed[key] = (row["target"], row["prediction"], row["value"])
    assert indexed == {key: row for key, row in uninterrupted[0].items() if key[0] != "joint(4, 2)"}
