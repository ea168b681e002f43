"""Quantiles, integrals and derivatives have the kernels of what a user would write entry by entry."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import Apply, Op, alone, check, columns, draw

A, X = draw(2, 5), torch.tensor([0.0, 1.0, 1.5, 4.0, 4.5]).double()
HOLES = torch.tensor([[False, True, False, False, False], [False, False, False, True, True]])


def ordered(a: Tensor, number: int, dim: int = -1) -> Tensor:
    return a.sort(dim)[0].select(dim, number)


def steps(a: Tensor) -> Tensor:
    return (a[..., 1:] + a[..., :-1]) / 2


SINGLE: dict[str, tuple[Op, Op]] = {
    "quantile": (
        lambda a: a.quantile(0.3, dim=2),
        lambda a: ordered(a, 1) * (1 - 0.2) + ordered(a, 2) * 0.2,
    ),
    "quantiles": (
        lambda a: torch.quantile(a, torch.tensor([0.3, 0.5], dtype=torch.float64), 2, keepdim=True).permute(1, 2, 3, 0),
        lambda a: torch.stack([ordered(a, 1) * 0.8 + ordered(a, 2) * 0.2, ordered(a, 2)], -1).unsqueeze(2),
    ),
    "quantile over the first dimension": (
        lambda a: torch.quantile(a, 0.25, 1),
        lambda a: ordered(a, 0, 1) * 0.75 + ordered(a, 1, 1) * 0.25,
    ),
    "midpoint": (
        lambda a: torch.quantile(a, 0.3, -1, interpolation="midpoint"),
        lambda a: (ordered(a, 1) + ordered(a, 2)) / 2,
    ),
    "higher": (lambda a: torch.quantile(a, 0.3, -1, interpolation="higher"), lambda a: ordered(a, 2)),
    "nanquantile": (
        lambda a: a.masked_fill(HOLES, math.nan).nanquantile(0.25, 2),
        lambda a: torch.stack(
            [
                ordered(a[:, 0][:, [0, 2, 3, 4]], 0) * 0.25 + ordered(a[:, 0][:, [0, 2, 3, 4]], 1) * 0.75,
                ordered(a[:, 1, :3], 0) * 0.5 + ordered(a[:, 1, :3], 1) * 0.5,
            ],
            1,
        ),
    ),
    "trapezoid": (lambda a: torch.trapezoid(a, dx=0.5), lambda a: (steps(a) * 0.5).sum(-1)),
    "trapz at points": (lambda a: torch.trapz(a, X, dim=2), lambda a: (steps(a) * X.diff()).sum(-1)),
    "trapezoid over the first dimension": (
        lambda a: torch.trapezoid(a, X[:2], dim=1),
        lambda a: ((a[:, 1] + a[:, 0]) / 2 * (X[1] - X[0])).unsqueeze(1).sum(1),
    ),
    "cumulative_trapezoid": (torch.cumulative_trapezoid, lambda a: steps(a).cumsum(-1)),
    "gradient": (
        lambda a: torch.gradient(a, spacing=2.0, dim=2)[0],
        lambda a: torch.cat(
            [(a[..., 1:2] - a[..., :1]) / 2, (a[..., 2:] - a[..., :-2]) / 4, (a[..., 4:] - a[..., 3:4]) / 2], -1
        ),
    ),
}


@pytest.mark.parametrize("name", SINGLE)
def test_a_function_along_a_dimension_is_what_it_consists_of(name):
    op, by_hand = SINGLE[name]
    torch.testing.assert_close(op(A[None]), by_hand(A[None]))
    expected = columns(by_hand, [A])
    assert bool(expected[0].any())
    check(columns(op, [A]), expected)


def test_a_quantile_of_all_entries_and_with_nan():
    x = draw(2, 3)
    flat = alone(lambda x: x[0].quantile(0.1)[None], x)
    torch.testing.assert_close(
        flat, alone(lambda x: ordered(x.flatten(1), 0) * 0.5 + ordered(x.flatten(1), 1) * 0.5, x)
    )
    for q, keepdim in (
        (0.1, True),
        (torch.tensor([0.1, 0.6], dtype=torch.float64), True),
        (torch.tensor([0.1], dtype=torch.float64), False),
    ):
        seen: list[Tensor] = []
        net = Apply(lambda x, q=q, k=keepdim, s=seen: (s.append(x.quantile(q, keepdim=k)), x)[1]).eval()
        RelevanceMeasure(net, x[None], start=torch.ones(1, 2, 3).double())
        torch.testing.assert_close(seen[0], x[None].quantile(q, keepdim=keepdim))


def test_a_quantile_with_nan_is_nan():
    """The function of torch is run by its decomposition, so this has to return the same."""
    holes = torch.zeros(1, 2, 3).double()
    holes[0, 0, 1] = math.nan
    seen: list[Tensor] = []
    net = Apply(lambda x: (seen.append((x + holes).quantile(0.5, 2)), x)[1]).eval()
    RelevanceMeasure(net, draw(1, 2, 3), start=torch.ones(1, 2, 3).double())
    torch.testing.assert_close(seen[0], (draw(1, 2, 3) + holes).quantile(0.5, 2), equal_nan=True)


def test_an_order_of_edges_that_is_not_written_out_raises():
    with pytest.raises(UnsupportedOperationError, match="'gradient'"):
        RelevanceMeasure(
            Apply(lambda x: torch.gradient(x, dim=1, edge_order=2)[0]).eval(),
            draw(1, 4),
            start=torch.ones(1, 4).double(),
        ).marginal("input")
