"""Selection of the groups that a flow graph shows in each layer and merging of all others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Real

import numpy as np

from ..errors import InputError, brief
from .flow_nodes import Array, FlowLayer

TOP = 8
"""Default maximum number of groups shown per layer."""
NEGLIGIBLE = 1e-12
"""Absolute mass up to which a group counts as zero and is not shown. Stabilizers produce such tiny values."""


@dataclass(frozen=True)
class Thresholds:
    r"""Criteria that select the groups to show.

    Without thresholds, all groups are shown in their original order. Otherwise, groups are sorted by decreasing
    absolute mass, and groups of zero mass are not shown.

    Attributes:
        top: Maximum number of groups.
        min_mass: Smallest absolute mass of a group.
        coverage: Fraction ``s`` of the absolute mass. The fewest groups are shown for which
            :math:`\sum_{\mathrm{shown}} |\mu| \ge s \sum |\mu|`.

    Raises:
        InputError: If a threshold is out of range.
    """

    top: int | None = None
    min_mass: float | None = None
    coverage: float | None = None

    def __post_init__(self) -> None:
        check_thresholds(self.top, self.min_mass, self.coverage)

    def selected(self, masses: Array) -> list[int]:
        """Returns the indices of the groups to show, given the mass of each group."""
        if self.top is None and self.min_mass is None and self.coverage is None:
            return list(range(len(masses)))
        size = np.abs(masses)
        order = [int(group) for group in np.argsort(-size, kind="stable") if size[group] > NEGLIGIBLE]
        if self.coverage is not None and order:
            held = np.cumsum(size[order])
            order = order[: int(np.searchsorted(held, self.coverage * held[-1] * (1 - 1e-12))) + 1]
        if self.min_mass is not None:
            order = [group for group in order if size[group] >= self.min_mass]
        return order[: self.top]


def check_thresholds(top: int | None, min_mass: float | None, coverage: float | None) -> None:
    """Raises :class:`~nrm_plugin.errors.InputError` if a threshold is out of range."""
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 1):
        raise InputError(f"top={brief(top)} must be a whole number of at least 1, or None for all groups.")
    if min_mass is not None and not (isinstance(min_mass, Real) and 0 <= min_mass < math.inf):
        raise InputError(f"min_mass={brief(min_mass)} must be a number of at least 0.")
    if coverage is not None and not (isinstance(coverage, Real) and 0 < coverage <= 1):
        raise InputError(f"coverage={brief(coverage)} must be above 0 and at most 1: 0.9 for 90%.")


def merging(count: int, shown: Sequence[int]) -> Array:
    """Returns a matrix of shape ``(shown + 2, count + 2)`` that merges the nodes of a layer for a smaller graph."""
    sums = np.zeros((len(shown) + 2, count + 2))
    sums[-2, :-1] = 1
    sums[-1, -1] = 1
    for row, position in enumerate(shown):
        sums[row, position], sums[-2, position] = 1, 0
    return sums


def merged(layer: FlowLayer, shown: Sequence[int]) -> FlowLayer:
    """Returns the layer with only the shown groups. The mass of the other groups is added to the rest."""
    dropped = [position for position in range(len(layer.groups)) if position not in set(shown)]
    return replace(
        layer,
        groups=tuple(layer.groups[position] for position in shown),
        labels=tuple(layer.labels[position] for position in shown),
        masses=tuple(layer.masses[position] for position in shown),
        rest=layer.rest + sum(layer.masses[position] for position in dropped),
        others=layer.others + len(dropped),
    )
