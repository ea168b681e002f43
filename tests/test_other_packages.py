"""The benchmark of models of other packages, on models defined here, so that none of the packages is required."""

from __future__ import annotations

import importlib
import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.other_packages import PACKAGES, PAGE, RESULTS, built, faults, run, tables


class Pair(nn.Module):
    """Two inputs, a dense output, and one that is not explained."""

    def __init__(self):
        super().__init__()
        self.left, self.norm, self.right = nn.Conv1d(2, 8, 3), nn.BatchNorm1d(8), nn.Conv1d(1, 8, 3)

    def forward(self, left, right):
        total = self.norm(self.left(left)).relu() + self.right(right).relu()
        return {"dense": total, "other": right}


@pytest.mark.slow
def test_a_model_with_two_inputs_and_a_dense_output_is_measured():
    case = (Pair, [(2, 9), (1, 9)], "dense")
    rows = list(run("torch", "Pair", case))
    assert [row["composite"] for row in rows] == ["NRMDefault", "EpsilonPlusFlat"]
    for row in rows:
        assert "failed" not in row
        assert row["error"] <= 1e-6
        assert row["difference"] <= 1e-6
        assert row["is_unchanged"]
    assert faults({**rows[0], "error": float("nan"), "residual": 0.1, "variation": 1.2, "is_unchanged": False}) == [
        "conservation",
        "sink",
        "variation",
        "state",
    ]


def test_the_weights_do_not_depend_on_imports_that_draw_numbers(tmp_path, monkeypatch):
    (tmp_path / "draws_when_imported.py").write_text("import numpy, torch\ntorch.rand(3), numpy.random.rand(3)\n")
    monkeypatch.syspath_prepend(tmp_path)

    def build():
        importlib.import_module("draws_when_imported")
        layer = nn.Linear(2, 2)
        layer.bias.data.fill_(np.random.rand())
        return layer

    try:
        first, second = built(build), built(build)
    finally:
        sys.modules.pop("draws_when_imported", None)
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)


@pytest.mark.slow
def test_a_model_that_fails_gives_a_row():
    (row,) = run("torch", "None", (lambda: nn.Conv1d(0, 0, -1), [(1, 1)], None))
    assert row["failed"].startswith("cannot be built")
    rows = list(run("torch", "Product", (lambda: Product(), [(4, 4)], None)))
    assert all(row["failed"].startswith("UnsupportedOperationError: relevance arrived") for row in rows)
    assert "torch: Product" in tables({"environment": {}, "rows": rows})


class Product(nn.Module):
    """An operation without a kernel."""

    def forward(self, x):
        return x.prod(2)


def test_the_committed_results_are_within_the_limits_and_shown_on_the_page():
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = results["rows"]
    assert {row["package"] for row in rows} == set(PACKAGES)
    assert len({(row["package"], row["model"]) for row in rows}) >= 200
    measured = [row for row in rows if "failed" not in row]
    assert not [row for row in measured if {"conservation", "output", "state"} & set(faults(row))]
    assert not [row for row in rows if row.get("failed", "").startswith("cannot be built")]
    kinds = {row["failed"].partition(":")[0] for row in rows if "failed" in row}
    assert kinds <= {"UnsupportedOperationError", "UncoveredLayerError", "InputError"}  # raised by this package
    assert tables(results) in PAGE.read_text(encoding="utf-8")
