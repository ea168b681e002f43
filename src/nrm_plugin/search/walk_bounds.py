r"""Upper bounds on the mass of all walks that extend a given upper part, used in the search for relevant group walks.

.. math:: h_m(i) = \max_{g} \sum_{i' \in g} |\tilde T_{i'i}|\, h_{m+1}(i'), \qquad h_L = 1

Source: docs/critical-paths-details.md.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..measure.memory_budget import DEFAULT
from .layer_chain import LayerChain

MIN_ROWS = 16
"""Maximum number of rows of bound tables that are computed even after the deadline."""
OVERTIME = 0.5
"""Maximum expected overrun of the time limit for a bound table, as a fraction of the limit."""
NEGLIGIBLE = 1e-4
"""Maximum fraction of negative mass at which signed passes replace absolute ones."""


def now() -> float:
    """Returns the current time in seconds, from the clock used for all time budgets."""
    return time.perf_counter()


@dataclass(frozen=True)
class MergedGroups:
    """Groups of a layer, merged into fewer ones. A bound for a merged group is valid for all groups in it.

    Attributes:
        labels: Merged group of each neuron, of shape ``(n,)``.
        count: Number of merged groups.
    """

    labels: Tensor
    count: int


class CompletionBounds:
    """Upper bounds on the relevance of all walks that continue from a neuron to the last layer, from the inputs up.

    If there is not enough time for one pass per group, the groups with the smallest marginals are merged.

    Args:
        chain: The layers and their groups.
        deadline: Time of :func:`now` after which the coarsest bounds are used.

    Attributes:
        exact: ``μ(g at the last layer given i)`` for each neuron ``i`` of the layer above, of shape ``(groups, n)``, or
            None if time or memory did not suffice.
        completions: :math:`h_m` for each layer, of shape ``(n_m,)``.
        tables: The sums before the maximum, of shape ``(groups, n_m)``, or None if time or memory did not suffice.
    """

    def __init__(self, chain: LayerChain, deadline: float) -> None:
        self.chain, self.deadline = chain, deadline
        self.exact: Tensor | None = None
        last = chain.labels[-1]
        self.completions: list[Tensor] = [chain.mu._start.new_ones(len(last), device=last.device)]
        self.tables: list[Tensor | None] = []
        marginals = chain.mu.marginal(list(chain.atoms))
        self._sizes = [marginals[atom].flatten().abs() for atom in chain.atoms]
        for level in range(chain.last - 1, -1, -1):
            self._add(level)

    def of_groups(self, level: int, relevance: Tensor) -> Tensor:
        """Returns bounds on ``|μ|`` of the walks that extend a prefix by each group, in shape ``(groups,)``."""
        size = relevance.abs()
        bounds = self.chain.sums(level, size * self.completions[level])
        table = self.tables[level]
        return bounds if table is None else torch.minimum(bounds, self.chain.sums(level, size * table).amax(0))

    def _add(self, level: int) -> None:
        chain, below = self.chain, self.completions[0]
        until = now() + (self.deadline - now()) / min(2, level + 1)  # bounds of the layers above depend on this one
        if level == chain.last - 1:
            groups = MergedGroups(chain.labels[level + 1], chain.counts[level + 1])
            self.exact = self._table(level, groups, bound=False, until=until)
            if self.exact is not None:
                self._store(self.exact.abs())
                return
        begin = now()
        total = chain.collect(level, below.unsqueeze(0), bound=True)
        # If signed passes are used instead of absolute ones, twice the negative part of each column is added.
        negative = (total - chain.collect(level, below.unsqueeze(0))).clamp(min=0)
        is_signed_enough = bool((negative <= NEGLIGIBLE * total).all())
        affordable = (until - now()) / max(1e-9, (now() - begin) / 2)
        for rows in (affordable, MIN_ROWS):
            table = self._table(level, self._merged_groups(level, rows), bound=not is_signed_enough, until=until)
            if table is not None:
                self._store(torch.minimum(table.clamp(min=0) + (negative if is_signed_enough else 0), total))
                return
        self.completions.insert(0, total.squeeze(0))
        self.tables.insert(0, None)

    def _store(self, table: Tensor) -> None:
        self.completions.insert(0, table.amax(0))
        self.tables.insert(0, table)

    def _merged_groups(self, level: int, affordable: float) -> MergedGroups:
        """Merges the groups of the next layer into about ``affordable`` merged. Half of these are single groups."""
        labels, count = self.chain.labels[level + 1], self.chain.counts[level + 1]
        if max(affordable, MIN_ROWS) >= count:
            return MergedGroups(labels, count)
        order = self.chain.sums(level + 1, self._sizes[level + 1] * self.completions[0]).argsort(descending=True)
        single = max(MIN_ROWS, int(affordable)) // 2
        merged = torch.empty_like(order)
        merged[order[:single]] = torch.arange(single, device=order.device)
        merged[order[single:]] = single + torch.arange(count - single, device=order.device) % single
        return MergedGroups(merged[labels], min(count, 2 * single))

    def _table(self, level: int, merged: MergedGroups, bound: bool, until: float) -> Tensor | None:
        """Computes ``Σ_{i' ∈ g} T_{i'i} h(i')`` for each lump of the next layer. Returns None if too slow."""
        chain, values = self.chain, self.completions[0]
        size = merged.count * len(chain.labels[level]) * values.element_size()
        has_deadline = merged.count > MIN_ROWS
        if size > (chain.mu._max_memory or DEFAULT) or (has_deadline and now() > until):
            return None
        rows: list[Tensor] = []
        first, begin = 0, now()
        while first < merged.count:
            end = min(first + (chain.widths[level] if first else 1), merged.count)
            chunk = torch.arange(first, end, device=values.device)
            rows.append(chain.collect(level, (merged.labels == chunk[:, None]) * values, bound))
            first = end
            expected = now() + (merged.count - first) * (now() - begin) / first
            if has_deadline and expected > until + OVERTIME * (until - begin):
                return None
        return torch.cat(rows)
