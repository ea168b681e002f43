"""Gain, deficit and the columns of kernels that were read as branches."""

from __future__ import annotations

import math

import pytest
import torch

from nrm_plugin.kernels.normalization import ColumnSums, Deficit, Normalization, gain


def test_the_gain_is_continuous_bounded_and_never_less_than_one() -> None:
    c = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for limit in (1.0, 1.5, 2.0, 10.0):
        g = gain(c, limit)
        assert float(g.diff().abs().max()) < 1e-3 * limit**2
        assert float(g[c <= 1].min()) >= 1.0
        assert float(g.max()) <= limit + 1e-12
        assert torch.equal(g[c <= 0], torch.ones_like(g[c <= 0]))
        assert torch.allclose(g[c >= 1 / limit] * c[c >= 1 / limit], torch.ones_like(c[c >= 1 / limit]))
    assert torch.allclose(gain(c, math.inf)[c > 0] * c[c > 0], torch.ones_like(c[c > 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1.0, 1.5, 3.0, math.inf])
def test_a_column_that_the_gain_raises_to_one_has_no_deficit(limit: float, dtype: torch.dtype) -> None:
    raised = torch.cat([torch.rand(500, dtype=dtype) * 4 + 1 / limit, torch.tensor([1 / limit, 0.9, 1.0]).to(dtype)])
    raised = raised[(raised >= 1 / limit) & (raised > 0)]
    redistribute = Normalization("redistribute", limit)
    assert redistribute.scaling(raised).deficit is None
    assert torch.equal(redistribute.scaling(raised).gain, 1 / raised)
    mixed = torch.cat(
        [raised, torch.linspace(-2, 0, 50, dtype=dtype), torch.linspace(0, 1 / limit, 50, dtype=dtype)[1:-1]]
    )
    scaling = redistribute.scaling(mixed)
    assert not scaling.deficit[: len(raised)].any()  # exactly, also where rounding leaves 1 - g c ≠ 0
    torch.testing.assert_close(scaling.gain * mixed + scaling.deficit, torch.ones_like(mixed))
    for column_sum in (raised, mixed, mixed[:0]):
        scaling = Normalization("sink", limit).scaling(column_sum)
        assert scaling.gain is None
        assert torch.equal(scaling.deficit, 1 - column_sum)
        rows = column_sum.repeat(200, 1)
        by_blocks, whole = redistribute.scaling_by_blocks(rows), redistribute.scaling(rows)
        for one, other in ((by_blocks.gain, whole.gain), (by_blocks.deficit, whole.deficit)):
            assert (one is None) == (other is None)
            assert other is None or torch.equal(one, other)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [((0.3, 1.0), (1.0, 0.2), (0.3, 0.2)), (None, (1.0, 1.0), None), ((1.0, 1.0), None, None), (None, None, None)],
)
def test_joined_deficits_are_those_of_the_branches_of_each_column(first, second, expected) -> None:
    """Branches of one kind have a deficit of 1 in the columns of the other kind; None is zero everywhere."""
    first, second = (None if c is None else torch.tensor([c], dtype=torch.float64) for c in (first, second))
    joined = Deficit(first).joined(Deficit(second))
    assert (joined.share is None) == (expected is None)
    sums = 1 - torch.tensor([expected or (0.0, 0.0)], dtype=torch.float64)
    torch.testing.assert_close(joined.sums(torch.zeros(1, 2, dtype=torch.float64)), sums)


def test_joined_column_sums_are_added() -> None:
    joined = ColumnSums(torch.tensor([[0.3, 0.0]])).joined(ColumnSums(torch.tensor([[0.0, -0.5]])))
    assert torch.equal(joined.sums(torch.zeros(1, 2)), torch.tensor([[0.3, -0.5]]))
