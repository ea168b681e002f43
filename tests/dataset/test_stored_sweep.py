"""Reading a sweep equals sorting and filtering all rows."""

from __future__ import annotations

import pytest

from nrm_plugin.dataset import Maps, Sweep, SweepError, sweep
from tests.conftest import slow_but
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, net


@pytest.mark.medium
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
        selected = stored.top(
            query, None if group < 0 else group, 9, lower=lower, target=target, largest=largest
        ).to_pylist()
        assert [(row["value"], row["sample"], row["lower"]) for row in selected] == wanted


@pytest.mark.medium
def test_rows_of_a_group_and_columns(begun):
    stored = Sweep.open(begun)
    selected = stored.rows("joint(4, 2)", 5, ["sample", "lower", "value"])
    assert selected.column_names == ["sample", "lower", "value"]
    assert len(selected) == 50 * 6
    for wrong in ({"query": "joint(2, 4)"}, {"columns": ["channel"]}):
        with pytest.raises(SweepError, match=r"no column named|has no query"):
            stored.rows(**wrong)
    with pytest.raises(SweepError, match="no sweep in"):
        Sweep.open(begun / "rows")
    with pytest.raises(SweepError, match="read them with rows"):
        stored.maps("sink(4)", [1])


def test_the_representation_and_errors_of_a_sweep(swept):
    stored = Sweep.open(swept)
    assert repr(stored) == f"Sweep({str(swept)!r}, complete, 2 queries)"
    with pytest.raises(SweepError, match=r"has maps instead of rows; read them with maps\(\)"):
        stored.top(Maps("input", over="position").name)
    with pytest.raises(ValueError, match="on_error='ignore' is unknown"):
        Sweep.open(swept, on_error="ignore")
