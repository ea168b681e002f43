"""Metrics of attributions: areas, ranks, recovery, and bootstrap intervals."""

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
    """Returns the batch size for images of this size."""
    return max(1, min(CHUNK, 500_000 // images[0].numel()))


def ranks(scores: Tensor, most_first: bool) -> Tensor:
    """Returns the rank of each entry, from 0, ``(N, K)``; ties in the order of entries."""
    if not bool(scores.isfinite().all()):
        raise ValueError("a score is not finite and has no rank.")
    order = scores.argsort(dim=1, descending=most_first, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def area(curve: Tensor, shares: Sequence[float]) -> Tensor:
    """Returns the normalized area under a curve ``(S, N)`` over ablated shares, ``(N,)``."""
    places = torch.tensor(shares, dtype=curve.dtype)
    return torch.trapezoid(curve, places, dim=0) / (places[-1] - places[0])


def average_precision(scores: Tensor, truth: Tensor, draw: torch.Generator) -> Tensor:
    """Computes the average precision of scores ``(N, E)``, ``(N,)``; ties are in random order.

    Args:
        scores: ``(N, E)``.
        truth: ``(N, E)``, boolean, with a true entry in each row.
        draw: Generator that orders ties.
    """
    hits = _ranked_truth(scores, truth, draw)
    precision = hits.cumsum(1) / torch.arange(1, hits.shape[1] + 1)
    return (precision * hits).sum(1) / hits.sum(1)


def precision_at(scores: Tensor, truth: Tensor, share: float, draw: torch.Generator) -> Tensor:
    """Returns the precision at ``share`` times the number of true entries, ``(N,)``; equal to the recall at 1."""
    hits = _ranked_truth(scores, truth, draw)
    count = (share * truth.sum(1)).ceil().long().clamp(min=1)
    return hits.cumsum(1).gather(1, count[:, None] - 1)[:, 0] / count


def _ranked_truth(scores: Tensor, truth: Tensor, draw: torch.Generator) -> Tensor:
    """Returns the truth of the entries in order of decreasing scores, as 0 and 1."""
    shuffled = torch.randperm(scores.shape[1], generator=draw)
    order = ranks(scores[:, shuffled], most_first=True).argsort(1)
    return truth[:, shuffled].gather(1, order).to(torch.float64)


def rank_correlation(one: Tensor, other: Tensor) -> Tensor:
    """Returns the Spearman correlation of each row, ``(N,)``; 0 where a row is constant."""
    one, other = _mean_ranks(one), _mean_ranks(other)
    scale = (one.square().sum(1) * other.square().sum(1)).sqrt()
    return torch.where(scale > 0, (one * other).sum(1) / scale.clamp(min=1e-12), torch.zeros(len(one)).to(one))


def _mean_ranks(values: Tensor) -> Tensor:
    """Returns the centered ranks of each row; ties share their mean rank."""
    values = values.contiguous()
    rows = values.sort(1).values.contiguous()
    below, through = torch.searchsorted(rows, values), torch.searchsorted(rows, values, right=True)
    return (below + through).double() / 2 - values.shape[1] / 2


@contextmanager
def same_noise() -> Iterator[None]:
    """Seeds PyTorch and NumPy, and restores their random states afterwards."""
    state = np.random.get_state()
    np.random.seed(0)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            yield
    finally:
        np.random.set_state(state)


# -- intervals ------------------------------------------------------------------------------------------------------

Values = Mapping[str, Mapping[str, Tensor]]
"""Values by method and metric, ``(N,)``."""


@dataclass(frozen=True)
class Comparison:
    """Methods and metrics of a comparison; metrics that were not measured are omitted.

    Args:
        ours: Methods of this package.
        better: +1 for metrics that should be large, -1 for those that should be small.
        unranked: Reference methods that are reported but not ranked, such as chance.
        pairs: For one of ours, the other method with the same rules.
    """

    ours: tuple[str, ...]
    better: Mapping[str, int]
    unranked: tuple[str, ...] = ("chance",)
    pairs: Mapping[str, str] = field(default_factory=dict)

    def results(self, by_method: Values, weights: Tensor) -> dict[str, Any]:
        """Returns the means with intervals, and our paired differences, signed so that positive is better for us.

        Args:
            by_method: Values by sample.
            weights: Bootstrap resamples, ``(B, N)``.

        Returns:
            Methods with ``{metric: [mean, low, high]}``; by metric, the best other method and the lead of each of ours;
            for each pair, the lead of ours by metric.
        """

        def ahead(one: str, other: str, key: str) -> list[float]:
            return interval(self.better[key] * (by_method[one][key] - by_method[other][key]).float(), weights)

        keys = self.keys(by_method)
        table = {
            name: {key: interval(values[key].float(), weights) for key in keys} for name, values in by_method.items()
        }
        best = {}
        for key in keys:
            other = self.best_other(by_method, key)
            best[key] = {
                "other": other,
                "ahead": {one: ahead(one, other, key) for one in self.ours if one in by_method},
            }
        pairs = {
            f"{one} : {other}": {key: ahead(one, other, key) for key in keys}
            for one, other in self.pairs.items()
            if {one, other} <= set(by_method)
        }
        return {"methods": table, "best": best, "pairs": pairs}

    def keys(self, by_method: Mapping[str, Mapping[str, Any]]) -> list[str]:
        """Returns the measured metrics, in order."""
        return [key for key in self.better if all(key in values for values in by_method.values())]

    def best_other(self, by_method: Values, key: str) -> str:
        """Returns the best other method by the mean of a metric."""
        others = [name for name in by_method if name not in (*self.ours, *self.unranked)]
        return max(others, key=lambda name: self.better[key] * float(by_method[name][key].mean()))


def verdict(ahead: Sequence[float]) -> str:
    """Returns "better", "tied" or "worse", by the confidence interval of a difference."""
    _, low, high = ahead
    if math.isnan(low) or low <= 0 <= high:
        return "tied"
    return "better" if low > 0 else "worse"
