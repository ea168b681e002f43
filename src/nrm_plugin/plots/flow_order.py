"""Order of the nodes in the columns of a flow, chosen to reduce crossings of ribbons."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .arrays import Array

Order = NDArray[np.int64]
ROUNDS = 2
"""Number of rounds of swapping adjacent nodes in all columns."""
STARTS, SMALL = 6, 16
"""Number of additional random initializations and the maximum column length for which they are used."""
SWEEPS = 12
"""Number of sweeps over the columns, alternating between left to right and right to left."""


def column_orders(weights: Sequence[Array], free: Sequence[int]) -> list[list[int]]:
    """Orders the nodes of each column to reduce crossings, by the barycenter heuristic and swaps of adjacent nodes.

    At each node, positive ribbons are above negative ones. A sweep sorts each column by the mean position of the other
    ends of its ribbons. Adjacent nodes are then swapped as long as this reduces crossings. The result never has more
    crossings than the given order.

    Args:
        weights: Values of the ribbons between each pair of adjacent columns, of shape ``(left nodes, right nodes)``.
        free: Number of nodes in each column that may be moved. All other nodes remain last.

    Returns:
        The indices of the nodes in each column, from top to bottom.
    """
    widths = [np.asarray(weight, dtype=float) for weight in weights]
    counts = [width.shape[0] for width in widths] + [widths[-1].shape[1]] if widths else [free[0]]
    given = [np.arange(count) for count in counts]
    if not widths:
        return [order.tolist() for order in given]
    shuffled = np.random.default_rng(0)
    starts = [given]
    for _ in range(STARTS if max(counts) <= SMALL else 0):
        starts.append([_shuffled(order, movable, shuffled) for order, movable in zip(given, free, strict=True)])
    candidates = [given, *(_improved(widths, start, free) for start in starts)]
    best = min(candidates, key=lambda orders: total_crossings(widths, orders))
    return [order.tolist() for order in best]


def _improved(widths: Sequence[Array], start: Sequence[Order], free: Sequence[int]) -> list[Order]:
    """Returns the orders with the fewest crossings over all sweeps, further improved by swaps of adjacent nodes."""
    orders = [order.copy() for order in start]
    best, least = [order.copy() for order in orders], total_crossings(widths, orders)
    for sweep in range(SWEEPS):
        columns = range(len(orders)) if sweep % 2 == 0 else reversed(range(len(orders)))
        for column in columns:
            orders[column] = _by_barycenter(widths, orders, column, free[column], sweep % 2 == 0)
        crossings = total_crossings(widths, orders)
        if crossings < least * (1 - 1e-9):
            best, least = [order.copy() for order in orders], crossings
    _swap(widths, best, free)
    return best


def _shuffled(order: Order, free: int, generator: np.random.Generator) -> Order:
    return np.concatenate([generator.permutation(order[:free]), order[free:]])


def total_crossings(widths: Sequence[Array], orders: Sequence[Order]) -> float:
    """Sums the product of the widths of two crossing ribbons over all crossings."""
    pairs = zip(widths, orders, orders[1:], strict=False)
    return sum(crossings(width[np.ix_(left, right)]) for width, left, right in pairs)


def crossings(widths: Array) -> float:
    """Returns the weighted number of crossings between two columns in the given order.

    At each node, positive ribbons are above negative ones.
    """
    places = np.zeros((2 * widths.shape[0], 2 * widths.shape[1]))
    places[::2, ::2], places[1::2, 1::2] = widths.clip(min=0), -widths.clip(max=0)
    below = np.zeros_like(places)  # total width of the ribbons that start below and end above
    below[:-1, 1:] = np.cumsum(np.cumsum(places[::-1], 0)[::-1], 1)[1:, :-1]
    return float((places * below).sum())


def _by_barycenter(
    widths: Sequence[Array], orders: Sequence[Order], column: int, free: int, is_rightward: bool
) -> Order:
    """Sorts the nodes of a column by the mean position at which their ribbons end in the previous column."""
    places, total = np.zeros(len(orders[column])), np.zeros(len(orders[column]))
    sides = [(column - 1, 1), (column, 0)] if is_rightward else [(column, 0), (column - 1, 1)]
    for pair, side in sides[:1] if 0 <= sides[0][0] < len(widths) else sides[1:]:
        width = widths[pair] if side == 0 else widths[pair].T
        neighbor = orders[column + 1 if side == 0 else column - 1]
        rank = np.empty(len(neighbor))
        rank[neighbor] = np.arange(len(neighbor))
        places = width.clip(min=0) @ rank - width.clip(max=0) @ (rank + 0.5)
        total = np.abs(width).sum(1)
    order = orders[column]
    means = np.where(total > 0, places / np.maximum(total, 1e-300), np.inf)
    moved = sorted((node for node in order if node < free), key=lambda node: means[node])
    return np.array([*moved, *(node for node in order if node >= free)], dtype=np.int64)


def _swap(widths: Sequence[Array], orders: list[Order], free: Sequence[int]) -> None:
    """Swaps adjacent nodes in all columns as long as this reduces crossings."""
    for column, order in [*enumerate(orders)] * ROUNDS:
        above = _pair_crossings(widths, orders, column)
        saved = above - above.T  # by swapping the node of the row, if it is directly above that of the column
        for _ in range(free[column]):
            gains = saved[order[: free[column]][:-1], order[: free[column]][1:]]
            if not gains.size or gains.max() <= 1e-12:
                break
            place = int(gains.argmax())
            order[[place, place + 1]] = order[[place + 1, place]]


def _pair_crossings(widths: Sequence[Array], orders: Sequence[Order], column: int) -> Array:
    """Returns the weighted crossings of each pair of nodes of a column if the first is above the second."""
    count = len(orders[column])
    crossed = np.zeros((count, count))
    for pair, side in ((column - 1, 1), (column, 0)):
        if 0 <= pair < len(widths):
            width = (widths[pair] if side == 0 else widths[pair].T)[:, orders[column + 1 if side == 0 else column - 1]]
            ends = np.zeros((count, 2 * width.shape[1]))  # at each node, positive ribbons are above negative ones
            ends[:, ::2], ends[:, 1::2] = width.clip(min=0), -width.clip(max=0)
            crossed += ends @ (np.cumsum(ends, 1) - ends).T
    return crossed


__all__ = ["column_orders", "crossings", "total_crossings"]
