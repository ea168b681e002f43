"""Every row of docs/special-cases.md: the printed expression agrees with the known method."""

from __future__ import annotations

import json

import pytest

from benchmarks.special_case import Row
from benchmarks.special_case_rows import ROWS
from benchmarks.special_cases import PAGE, RESULTS, key, rendered

SLOW = "VGG11", "ResNet-18"
"""Methods compared on models of torchvision."""


def _marked(row: Row) -> object:
    is_slow = any(name in row.reference for name in SLOW)
    return pytest.param(row, marks=[pytest.mark.slow] if is_slow else [], id=f"{row.method}: {row.reference}")


@pytest.mark.medium
@pytest.mark.parametrize("row", [_marked(row) for row in ROWS if not row.needs])
def test_the_expression_on_the_page_equals_the_known_method(row, worst):
    difference = row.difference()
    worst(f"{row.method}: {row.reference}", difference)
    assert difference <= row.tolerance


def test_the_page_shows_all_rows_as_measured():
    results = json.loads(RESULTS.read_text())
    assert [(*key(row), row["expression"]) for row in results["rows"]] == [(*key(row), row.expression) for row in ROWS]
    for row, defined in zip(results["rows"], ROWS, strict=True):
        assert 0 <= row["difference"] <= defined.tolerance
    assert PAGE.read_text() == rendered(results, PAGE.read_text())


def test_a_wrong_expression_differs_from_the_method():
    """Otherwise agreement would be no evidence."""
    (row,) = (row for row in ROWS if row.method == "Pruned LRP")
    assert Row(**{**vars(row), "expression": row.expression.replace("given=", "joint=")}).difference() > 1e-3
