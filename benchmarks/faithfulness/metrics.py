"""What is measured of an attribution: areas, ranks, recovery, and bootstrap intervals. Tensors in, tensors out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.default_composite import CHUNK, interval


def at_once(images: Tensor) -> int:
    """How many samples of this size go through a net together."""
    return max(1, min(CHUNK, 500_000 // images[0].numel()))


def ranks(scores: Tensor, most_first: bool) -> Tensor:
    """When each entry goes, from 0, ``(N, K)``; ties in the order of entries."""
    if not bool(scores.isfinite().all()):
        raise ValueError("a score is not finite, so that it has no rank.")
    order = scores.argsort(dim=1, descending=most_first, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def area(curve: Tensor, shares: Sequence[float]) -> Tensor:
    """Mean height of a curve ``(S, N)`` over shares of what was taken away, ``(N,)``."""
    places = torch.tensor(shares, dtype=curve.dtype)
    return torch.trapezoid(curve, places, dim=0) / (places[-1] - places[0])


def average_precision(scores: Tensor, truth: Tensor, draw: torch.Generator) -> Tensor:
    """Mean precision at the places of the true entries, largest scores first, ``(N,)``; ties in random order.

    Args:
        scores: ``(N, E)``.
        truth: ``(N, E)``, boolean, some of it true in each row.
        draw: Orders ties.
    """
    found = _found(scores, truth, draw)
    precision = found.cumsum(1) / torch.arange(1, found.shape[1] + 1)
    return (precision * found).sum(1) / found.sum(1)


def precision_at(scores: Tensor, truth: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Precision of as many entries as there are true ones, times ``share``, ``(N,)``; at 1 it is the recall too."""
    found = _found(scores, truth, draw)
    count = (share * truth.sum(1)).ceil().long().clamp(min=1)
    return found.cumsum(1).gather(1, count[:, None] - 1)[:, 0] / count


def _found(scores: Tensor, truth: Tensor, draw: torch.Generator) -> Tensor:
    """Whether the entry of each place is true, as 0 and 1, largest scores first."""
    shuffled = torch.randperm(scores.shape[1], generator=draw)
    order = ranks(scores[:, shuffled], most_first=True).argsort(1)
    return truth[:, shuffled].gather(1, order).to(torch.float64)


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Spearman's, of each row, ``(N,)``; 0 where a row is constant."""
    one, other = _mean_ranks(one), _mean_ranks(other)
    scale = (one.square().sum(1) * other.square().sum(1)).sqrt()
    return torch.where(scale > 0, (one * other).sum(1) / scale.clamp(min=1e-12), torch.zeros(len(one)).to(one))


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks about their mean, of each row; ties share the mean of their ranks."""
    values = values.contiguous()
    rows = values.sort(1).values.contiguous()
    below, through = torch.searchsorted(rows, values), torch.searchsorted(rows, values, right=True)
    return (below + through).double() / 2 - values.shape[1] / 2


@contextmanager
def same_noise() -> Iterator[None]:
    """Random numbers of PyTorch and NumPy from one seed, and afterwards as if none had been drawn."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        np.random.set_state(state)


# -- intervals ------------------------------------------------------------------------------------------------------

Found = Mapping[str, Mapping[str, Tensor]]
"""By method and metric, ``(N,)``."""


@dataclass(frozen=True)
class Contest:
    """Who is compared with whom, by what; metrics that were not measured are left out.

    Args:
        ours: Methods of this package.
        better: +1 for metrics that should be large, -1 for those that should be small.
        apart: Methods that are shown and are nobody's competitor, such as chance.
        pairs: Of one of ours, the other method with the same rules.
    """

    ours: tuple[str, ...]
    better: Mapping[str, int]
    apart: tuple[str, ...] = ("chance",)
    pairs: Mapping[str, str] = field(default_factory=dict)

    def results(self, found: Found, weights: Tensor) -> dict[str, Any]:
        """Means with intervals, and our paired differences, signed so that positive is better for us.

        Args:
            found: Values of samples.
            weights: Bootstrap resamples, ``(B, N)``.

        Returns:
            Methods with ``{metric: [mean, low, high]}``; by metric the best other one, and how far each of ours is
            ahead of it; of each pair, by metric, how far ours is ahead.
        """

        def ahead(one: str, other: str, key: str) -> list[float]:
            return interval(self.better[key] * (found[one][key] - found[other][key]).float(), weights)

        keys = self.keys(found)
        table = {name: {key: interval(values[key].float(), weights) for key in keys} for name, values in found.items()}
        best = {}
        for key in keys:
            other = self.best_other(found, key)
            best[key] = {"other": other, "ahead": {one: ahead(one, other, key) for one in self.ours if one in found}}
        pairs = {
            f"{one} : {other}": {key: ahead(one, other, key) for key in keys}
            for one, other in self.pairs.items()
            if {one, other} <= set(found)
        }
        return {"methods": table, "best": best, "pairs": pairs}

    def keys(self, found: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Metrics that were measured, in their order."""
        return [key for key in self.better if all(key in values for values in found.values())]

    def best_other(self, found: Found, key: str) -> str:
        """The best method that is not ours, by the mean of a metric."""
        others = [name for name in found if name not in (*self.ours, *self.apart)]
        return max(others, key=lambda name: self.better[key] * float(found[name][key].mean()))


def verdict(ahead: Sequence[float]) -> str:
    """In a word, by the interval of a difference."""
    _, low, high = ahead
    if math.isnan(low) or low <= 0 <= high:
        return "even"
    return "better" if low > 0 else "worse"
