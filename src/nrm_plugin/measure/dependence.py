r"""Partitions of channels (or other members of layers) that preserve most of the dependence between the layers.

Let ``J`` be the joint relevance of the members (channels, positions, neurons) of two layers, with row sums ``r``,
column sums ``c`` and total ``Z`` (1 if every walk crosses both layers). The dependence ``D``, and the fraction ``κ`` of
it that a pair of partitions preserves, are

.. math:: D = J - \frac{r c^\top}{Z}, \qquad
          \kappa = \frac{\sum_{gh} |\sum_{i \in g, j \in h} D_{ij}|}{\sum_{ij} |D_{ij}|} \in [0, 1]

Unless stated otherwise, functions are pure and operate on NumPy arrays. The search is new in this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

SWEEPS = 30
"""Maximum number of sweeps; a sweep visits every member once."""
SHAKEN = 0.3
"""Fraction of a layer's members assigned to random groups in a restart."""
LLOYD = 12
"""Maximum number of k-means iterations for the initial partition."""
CANCELLED = 1e-3
"""Smallest accepted divisor: total joint relevance, relative to its absolute sum."""
INDEPENDENT = 1e-5
"""Largest dependence attributed to float32 rounding errors, as a fraction of the absolute joint relevance."""
STILL = 1e-12
"""Largest gain attributed to rounding errors, as a fraction of the sum of absolute values."""


def dependence(joint: Array) -> Array:
    """Computes the dependence ``D`` between two layers as a matrix of shape ``(members, members below)``.

    Its rows and columns sum to 0. If the layers are independent up to rounding, the result is zero. For example, the
    output is independent of all other layers if the measure explains a single class.

    Args:
        joint: Joint relevance of shape ``(members, members below)``; returned unchanged if its elements cancel in the
            sum.
    """
    total, size = joint.sum(), np.abs(joint).sum()
    if abs(total) <= CANCELLED * size:
        return joint
    values: Array = joint - np.outer(joint.sum(1), joint.sum(0) / total)
    return values if np.abs(values).sum() > INDEPENDENT * size else np.zeros_like(values)


def kept(dependence: Array, rows: Labels, columns: Labels) -> float:
    """Computes κ, the fraction of the dependence preserved by two partitions, between 0 and 1, or NaN if undefined."""
    size = np.abs(dependence).sum()
    return float(np.abs(group_sums(group_sums(dependence, rows).T, columns)).sum() / size) if size else math.nan


def group_sums(values: Array, labels: Labels, count: int | None = None) -> Array:
    """Sums the rows of an array of shape ``(members, n)`` within each group. Returns shape ``(groups, n)``."""
    members = np.zeros((int(labels.max()) + 1 if count is None else count, len(labels)))
    members[labels, np.arange(len(labels))] = 1
    return members @ values


def find_partitions(
    dependences: Sequence[Array], counts: Sequence[int], restarts: int, seed: int, fixed: Sequence[Labels | None]
) -> list[Labels]:
    """Finds partitions of all layers that preserve much of the dependence between consecutive layers.

    The search starts from k-means clusters. Individual members (channels or positions) are then moved to the group that
    most increases the retained fraction of dependence, summed over the pairs, until no move increases it. The search is
    then restarted from the best partitions found so far, with some members of one layer assigned to random groups.

    Args:
        dependences: The dependence of each pair of consecutive layers, of shape ``(members, members below)``.
        counts: Maximum number of groups in each layer.
        restarts: Number of restarts.
        seed: Random seed for the initial partitions and the order of moves.
        fixed: A fixed partition for each layer, or None if the partition is to be found.

    Returns:
        The group of each member in each layer, of shape ``(members,)``.
    """
    random = np.random.default_rng(seed)
    pairs = [part / (np.abs(part).sum() or 1.0) for part in dependences]
    best = _Search.started(pairs, counts, random, fixed)
    best.run()
    for _ in range(restarts if best.free else 0):
        search = best.shaken()
        search.run()
        if search.kept() > best.kept():
            best = search
    return best.labels


@dataclass
class _Search:
    """State of a local search that improves its partitions in place.

    Attributes:
        pairs: The dependence of each pair of consecutive layers, scaled to an absolute sum of 1.
        counts: Maximum number of groups in each layer.
        labels: The group of each member in each layer.
        free: Indices of the layers whose partitions are searched.
        random: Random number generator.
    """

    pairs: list[Array]
    counts: Sequence[int]
    labels: list[Labels]
    free: list[int]
    random: np.random.Generator

    @classmethod
    def started(
        cls,
        pairs: list[Array],
        counts: Sequence[int],
        random: np.random.Generator,
        fixed: Sequence[Labels | None],
    ) -> _Search:
        labels = [
            _k_means(_profiles(pairs, layer), counts[layer], random) if given is None else given
            for layer, given in enumerate(fixed)
        ]
        return cls(pairs, counts, labels, [layer for layer, given in enumerate(fixed) if given is None], random)

    def shaken(self) -> _Search:
        """Returns a copy with some members of one layer assigned to random groups."""
        labels = [own.copy() for own in self.labels]
        layer = self.free[self.random.integers(len(self.free))]
        own = labels[layer]
        moved = self.random.random(len(own)) < SHAKEN
        own[moved] = self.random.integers(self.counts[layer], size=int(moved.sum()))
        return replace(self, labels=labels)

    def kept(self) -> float:
        """Returns the sum of κ over all pairs of layers with nonzero dependence."""
        each = (kept(pair, *self.labels[above : above + 2]) for above, pair in enumerate(self.pairs))
        return sum(share for share in each if not math.isnan(share))

    def run(self) -> None:
        for _ in range(SWEEPS):
            if not sum(self._sweep(layer) for layer in self.free):
                return

    def _sweep(self, layer: int) -> int:
        """Moves each member of a layer to its best group, in random order. Returns the number of moves."""
        order = self.random.permutation(len(self.labels[layer]))
        return move_members(self._grouped(layer), self.labels[layer], self.counts[layer], order)

    def _grouped(self, layer: int) -> Array:
        """Returns the dependence of shape ``(members, adjacent groups)`` on the groups of adjacent layers."""
        sides = []
        if layer > 0:
            sides.append(group_sums(self.pairs[layer - 1], self.labels[layer - 1], self.counts[layer - 1]).T)
        if layer < len(self.pairs):
            sides.append(group_sums(self.pairs[layer].T, self.labels[layer + 1], self.counts[layer + 1]).T)
        return np.concatenate(sides, 1)


def refined(
    labels: Sequence[Labels], counts: Sequence[int], free: Sequence[int], grouped: Callable[[int, list[Labels]], Array]
) -> list[Labels]:
    """Improves partitions by moving single members, layer by layer, until no move increases the sum of κ.

    Args:
        labels: The group of each member in each layer.
        counts: Number of groups in each layer.
        free: Indices of the layers whose members are moved.
        grouped: Function ``(layer index, partitions)`` that returns the dependence of each member on the groups of
            adjacent layers, of shape ``(members, adjacent groups)``.

    Returns:
        The improved group of each member in each layer.
    """
    better = [own.copy() for own in labels]
    random = np.random.default_rng(0)
    for layer in free:
        values = grouped(layer, better)
        for _ in range(SWEEPS):
            if not move_members(values, better[layer], counts[layer], random.permutation(len(values))):
                break
    return better


def move_members(values: Array, labels: Labels, count: int, order: Labels) -> int:
    r"""Moves single members to the group that most increases :math:`\sum_g \|\sum_{i \in g} v_i\|_1`.

    Args:
        values: A vector ``v`` for each member, of shape ``(members, n)``.
        labels: Group of each member, of shape ``(members,)``, modified in place.
        count: Number of groups.
        order: The order in which members are considered.

    Returns:
        The number of moves.
    """
    sums = group_sums(values, labels, count)
    sizes = np.abs(sums).sum(1)
    least = STILL * np.abs(values).sum()
    moves = 0
    for member in order:
        own, value = labels[member], values[member]
        without = sums[own] - value
        size = np.abs(without).sum()
        joined = np.abs(sums + value).sum(1)
        gains = joined - sizes
        gains[own] = sizes[own] - size
        group = int(gains.argmax())
        if gains[group] - gains[own] <= least:
            continue
        sums[own], sizes[own] = without, size
        sums[group] += value
        sizes[group] = joined[group]
        labels[member] = group
        moves += 1
    return moves


def _profiles(pairs: Sequence[Array], layer: int) -> Array:
    """Returns the dependence of shape ``(members, adjacent members)`` on the members of the adjacent layers."""
    sides = [*(pair.T for pair in pairs[max(0, layer - 1) : layer]), *pairs[layer : layer + 1]]
    return np.concatenate(sides, 1)


def _k_means(points: Array, count: int, random: np.random.Generator) -> Labels:
    """Clusters points by Lloyd's algorithm with k-means++ initialization. Returns labels of shape ``(points,)``."""
    squares = (points**2).sum(1)
    centers = np.empty((min(count, len(points)), points.shape[1]))
    distances = np.ones(len(points))
    for number in range(len(centers)):
        total = distances.sum()
        chosen = random.choice(len(points), p=distances / total) if total > 0 else random.integers(len(points))
        centers[number] = points[chosen]
        distances = np.minimum(
            distances if number else np.inf, (squares - 2 * points @ centers[number] + squares[chosen]).clip(0)
        )
    labels: Labels = np.zeros(len(points), dtype=np.int64)
    for _ in range(LLOYD):
        nearest = (squares[:, None] - 2 * points @ centers.T + (centers**2).sum(1)).argmin(1).astype(np.int64)
        if (nearest == labels).all():
            break
        labels = nearest
        sizes = np.bincount(labels, minlength=len(centers))
        sums = group_sums(points, labels, len(centers))
        centers[sizes > 0] = sums[sizes > 0] / sizes[sizes > 0, None]
    return labels
