"""The order of the nodes in a flow, against all orders."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from nrm_plugin.plots.flow_order import column_orders, crossings, total_crossings


def counted(widths: np.ndarray) -> float:
    """Crossings by the definition: ribbons at separate places, the positive ones of a node above its negative ones."""
    ribbons = [((a, widths[a, b] < 0), (b, widths[a, b] < 0), abs(widths[a, b])) for a, b in np.ndindex(*widths.shape)]
    pairs = itertools.combinations(ribbons, 2)
    return sum(w * v for (a, b, w), (c, d, v) in pairs if (a < c and b > d) or (a > c and b < d))


@pytest.mark.parametrize("seed", range(4))
def test_crossings_are_those_of_the_definition(seed):
    widths = np.random.default_rng(seed).standard_normal((4, 5))
    assert crossings(widths) == pytest.approx(counted(widths))


@pytest.mark.parametrize("seed", range(6))
def test_two_columns_have_nearly_as_few_crossings_as_the_best_order(seed):
    widths = np.random.default_rng(seed).random((4, 4)) ** 3
    orders = column_orders([widths], [4, 4])
    least = min(
        counted(widths[np.ix_(one, other)])
        for one in itertools.permutations(range(4))
        for other in itertools.permutations(range(4))
    )
    found = counted(widths[np.ix_(*orders)])
    assert least <= found <= 1.1 * least + 1e-9
    assert found <= counted(widths)


def test_a_shuffled_diagonal_is_untangled_and_fixed_nodes_stay_last():
    rng = np.random.default_rng(0)
    places = [rng.permutation(6) for _ in range(4)]
    weights = [(one[:, None] == other).astype(float) for one, other in itertools.pairwise(places)]
    orders = column_orders(weights, [6] * 4)
    assert total_crossings(weights, [np.array(order) for order in orders]) == 0
    assert all(sorted(order) == list(range(6)) for order in orders)
    fixed = column_orders(weights, [4] * 4)
    assert all(order[4:] == [4, 5] for order in fixed)


def test_negative_ribbons_to_one_node_go_to_the_bottom():
    assert column_orders([np.array([[-1.0], [2.0], [-3.0]])], [3, 1])[0][0] == 1


def test_one_column_keeps_its_order():
    assert column_orders([], [3]) == [[0, 1, 2]]
