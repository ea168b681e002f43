"""Best-first search for the group walks with the largest joint relevance."""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .layer_chain import LayerChain
from .walk_bounds import CompletionBounds, now

BATCH = 8
"""Maximum number of prefixes propagated in one pass."""
SHARE_OF_BOUNDS = 0.6
"""Fraction of the time budget spent on computing bounds."""


@dataclass(frozen=True, eq=False)
class Prefix:
    """Upper part of a group walk (one group per layer), which the search extends by the layers below.

    Attributes:
        groups: Index of the group in each layer of the prefix.
        bound: Upper bound on the absolute mass of any completion.
        number: Creation index. It breaks ties.
        mass: Absolute joint relevance of the groups.
        relevance: Relevance of each neuron in the last layer of the prefix, restricted to the walks through the groups
            above, of shape ``(n,)``.
    """

    groups: tuple[int, ...]
    bound: float
    number: int
    mass: float
    relevance: Tensor

    def __lt__(self, other: Prefix) -> bool:
        """Compares by decreasing bound. A heap then returns the prefix with the largest bound first."""
        return (-self.bound, self.number) < (-other.bound, other.number)


@dataclass(frozen=True)
class CompleteWalk:
    """Walk with one group in every layer and the signed joint relevance of these groups."""

    groups: tuple[int, ...]
    mass: float

    def __lt__(self, other: CompleteWalk) -> bool:
        """Compares by absolute mass. A heap then returns the walk with the smallest mass first."""
        return (abs(self.mass), self.groups) < (abs(other.mass), other.groups)


class BestFirstSearch:
    """Best-first search with one heap of upper parts to extend (prefixes) and one of the best complete walks.

    Args:
        chain: The layers and their groups.
        k: Number of walks to return.
        begin: Time at which the budget starts.
        budget: Time limit in seconds.
        expansions: Number of expanded prefixes after which the search stops, or None for no limit.
    """

    def __init__(self, chain: LayerChain, k: int, begin: float, budget: float, expansions: int | None) -> None:
        self.chain, self.k, self.expansions = chain, k, expansions
        self.deadline = begin + budget
        self.bounds = CompletionBounds(chain, begin + SHARE_OF_BOUNDS * budget)
        self.prefixes: list[Prefix] = []
        self.best: list[CompleteWalk] = []
        self.expanded = 0
        self._slack = 1 + (1e-4 if chain.mu._start.dtype == torch.float32 else 1e-9)
        self._dropped = 0.0
        self._numbers = itertools.count()

    @property
    def missed(self) -> float:
        """Upper bound on the absolute mass of every walk that is not among the best."""
        return max(self._dropped, self.prefixes[0].bound if self.prefixes else 0.0)

    def largest_first(self) -> list[CompleteWalk]:
        """Returns the best complete walks, sorted by decreasing absolute mass."""
        return sorted(self.best, key=lambda walk: -abs(walk.mass))

    def run(self) -> None:
        """Searches until the best walks are certified or the budget is exhausted."""
        self._add_continuations((), self.chain.first())
        for width in (1, 2 * math.isqrt(self.k)):  # a single walk first, in any case, and then a greedy search
            for depth in range(1, self.chain.last + 1):
                self._expand_largest(depth, width, is_required=not self.best)
        while self.prefixes and self.prefixes[0].bound > self._threshold() and not self._is_over():
            self._expand(self._most_promising())
            deepest = max((len(prefix.groups) for prefix in self.prefixes), default=0)
            self._expand_largest(deepest, BATCH)  # with loose bounds, prefixes with a large mass lead to better walks

    def _threshold(self) -> float:
        """Returns the absolute mass that a walk must exceed to be among the best ``k``."""
        return abs(self.best[0].mass) if len(self.best) == self.k else 0.0

    def _is_over(self) -> bool:
        is_enough = self.expansions is not None and self.expanded >= self.expansions
        return self.expanded > 0 and (is_enough or now() > self.deadline)

    def _batch(self, depth: int) -> int:
        return min(BATCH, self.chain.widths[depth - 1])

    def _expand_largest(self, depth: int, width: int, is_required: bool = False) -> None:
        """Expands the prefixes of a given length with the largest mass unless the budget is exhausted.

        With ``is_required``, the largest one is expanded in any case.
        """
        threshold = self._threshold()
        candidates = [prefix for prefix in self.prefixes if len(prefix.groups) == depth and prefix.bound > threshold]
        chosen = heapq.nlargest(width, candidates, key=lambda prefix: prefix.mass)
        batch = self._batch(depth) if chosen else 1
        for first in range(0, len(chosen), batch):
            if self._is_over() and (first or not is_required):
                return
            part = chosen[first : first + batch]
            expanded = {prefix.number for prefix in part}
            self.prefixes = [prefix for prefix in self.prefixes if prefix.number not in expanded]
            heapq.heapify(self.prefixes)
            self._expand(part)

    def _most_promising(self) -> list[Prefix]:
        """Pops the prefix with the largest bound and the next prefixes as long as they have the same length."""
        chosen = [heapq.heappop(self.prefixes)]
        depth, threshold = len(chosen[0].groups), self._threshold()
        while self.prefixes and len(chosen) < self._batch(depth):
            if len(self.prefixes[0].groups) != depth or self.prefixes[0].bound <= threshold:
                break
            chosen.append(heapq.heappop(self.prefixes))
        return chosen

    def _expand(self, prefixes: list[Prefix]) -> None:
        level = len(prefixes[0].groups) - 1
        self.expanded += len(prefixes)
        labels = self.chain.labels[level]
        vectors = [prefix.relevance * (labels == prefix.groups[-1]) for prefix in prefixes]
        rows = self.chain.propagate(level, torch.stack(vectors))
        for prefix, relevance in zip(prefixes, rows, strict=True):
            self._add_continuations(prefix.groups, relevance)

    def _add_continuations(self, groups: tuple[int, ...], relevance: Tensor) -> None:
        """Extends a prefix by one layer in all possible ways, given its relevance at that layer."""
        level = len(groups)
        if level == self.chain.last:
            self._complete(groups, self.chain.sums(level, relevance)[:, None], 1)
        elif level == self.chain.last - 1 and self.bounds.exact is not None:
            self._complete(groups, self.chain.sums(level, relevance * self.bounds.exact).T, 2)
        else:
            bounds = (self.bounds.of_groups(level, relevance) * self._slack).tolist()
            masses = self.chain.sums(level, relevance).abs().tolist()
            for group, (bound, mass) in enumerate(zip(bounds, masses, strict=True)):
                if bound > self._threshold():
                    prefix = Prefix((*groups, group), bound, next(self._numbers), mass, relevance)
                    heapq.heappush(self.prefixes, prefix)
                else:
                    self._dropped = max(self._dropped, bound)

    def _complete(self, groups: tuple[int, ...], masses: Tensor, missing: int) -> None:
        """Adds complete walks, given ``masses[g]`` or ``masses[g, g']`` for the one or two missing groups."""
        flat = masses.flatten()
        sizes, numbers = flat.abs().topk(min(len(flat), self.k + 1))
        for size, number in zip(sizes.tolist(), numbers.tolist(), strict=True):
            if size <= self._threshold():
                self._dropped = max(self._dropped, size)
                break
            walk = CompleteWalk((*groups, *divmod(number, masses.shape[1])[:missing]), float(flat[number]))
            if len(self.best) < self.k:
                heapq.heappush(self.best, walk)
            else:
                self._dropped = max(self._dropped, abs(heapq.heappushpop(self.best, walk).mass))
