"""No number of a dozen networks has moved since it was recorded."""

from __future__ import annotations

import json

import pytest

from tests.pins.golden import NETS, STORED, measured

RECORDED = json.loads(STORED.read_text())


@pytest.mark.parametrize("name", [*NETS, "digits"])
def test_the_numbers_are_as_recorded(name: str) -> None:
    found = measured(name)
    assert found.keys() == RECORDED[name].keys()
    for composite, answers in found.items():
        before = RECORDED[name][composite]
        assert answers.keys() == before.keys()
        for query, values in answers.items():
            # Rounding grows with the variation of the measure: each number is a sum of terms of that size.
            size = max(1.0, *map(abs, before["variation"]), *map(abs, before["output"]))
            assert values == pytest.approx(before[query], rel=0, abs=1e-12 * size), (composite, query)
