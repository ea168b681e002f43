"""Queries as a function of batches, called as by Ray Data and Hugging Face datasets, without either."""

from __future__ import annotations

import numpy as np
import pytest

from nrm_plugin.dataset import Joint, Maps, Marginal, SweepBatches, SweepError, sweep
from tests.dataset.sweep_nets import EVENT, OPTIONS, Data, net

QUERIES = [Marginal("4"), Joint("4", "2"), Marginal("2", given=EVENT, min_ratio=0.45, name="given")]


def rows_of(columns):
    assert len({len(column) for column in columns.values()}) == 1
    rows = zip(*(columns[name].tolist() for name in ("query", "group", "lower", "sample", "value")), strict=True)
    return {row[:4]: None if row[4] != row[4] else row[4] for row in rows}


@pytest.mark.medium
@pytest.mark.parametrize("as_lists", [True, False], ids=["indices", "column"])
def test_the_rows_of_batches_equal_those_of_a_sweep(as_lists, tmp_path):
    data = Data(10)
    stored = sweep(net(), data, QUERIES, tmp_path, target="label", **OPTIONS).rows().to_pylist()
    evaluate, rows = SweepBatches(net, QUERIES, target="label"), {}
    for start in (0, 4, 8):
        indices = range(start, min(10, start + 4))
        batch = {"inputs": data.x[indices].numpy(), "label": np.array([k % 4 for k in indices])}
        if as_lists:
            batch = {key: column.tolist() for key, column in batch.items()}
            rows |= rows_of(evaluate(batch, list(indices)))
        else:
            rows |= rows_of(evaluate({**batch, "sample": np.array(indices)}))
    assert rows == {(row["query"], row["group"], row["lower"], row["sample"]): row["value"] for row in stored}
    assert None in rows.values()


def test_incomplete_batches_raise():
    evaluate = SweepBatches(net(), QUERIES)
    with pytest.raises(SweepError, match="no column 'sample'"):
        evaluate({"inputs": np.zeros((1, 3, 12, 12))})
    with pytest.raises(SweepError, match="unpack="):
        evaluate({"image": np.zeros((1, 3, 12, 12))}, [0])
    with pytest.raises(SweepError, match="not rows"):
        SweepBatches(net(), Maps())
