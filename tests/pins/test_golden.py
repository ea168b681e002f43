"""The numbers of a dozen networks equal the recorded ones."""

from __future__ import annotations

import json

import pytest

from tests.conftest import slow_but
from tests.pins.golden import NETS, STORED, measured

pytestmark = pytest.mark.zennit

RECORDED = json.loads(STORED.read_text())


@pytest.mark.medium
@pytest.mark.parametrize("name", slow_but([*NETS, "digits"], "conv", "residual", "attention"))
def test_the_numbers_equal_the_recorded_ones(name: str) -> None:
    values_by_composite = measured(name)
    assert values_by_composite.keys() == RECORDED[name].keys()
    for composite, answers in values_by_composite.items():
        recorded = RECORDED[name][composite]
        assert answers.keys() == recorded.keys()
        for query, values in answers.items():
            # Rounding errors grow with the variation of the measure: each number is a sum of terms of that size.
            size = max(1.0, *map(abs, recorded["variation"]), *map(abs, recorded["output"]))
            assert values == pytest.approx(recorded[query], rel=0, abs=1e-12 * size), (composite, query)
