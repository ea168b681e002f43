"""Search for sets of groups, one set per layer, with the largest joint relevance."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import brief
from ..events.event import Event
from ..measure.groups import Over
from ..measure.layer_taps import Layer
from ..measure.measure import RelevanceMeasure
from .layer_chain import LayerChain, check_one_sample, intersection

MAX_COMBINATIONS = 200_000
"""Maximum number of combinations in an exact search."""


@dataclass(frozen=True)
class TopSets:
    """Sets of groups of neurons, one set per layer, with the mass of the walks that cross all of these sets.

    Attributes:
        layers: Names of the layers, from the output to the input.
        groups: Sorted indices of the selected groups in each layer.
        mass: Joint relevance of the sets.
        event: The event that a walk crosses a selected group in every layer.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1)
        >>> sets = top_sets(mu, ["0", "input"], 2)
        >>> torch.allclose(mu(sets.event), torch.tensor(sets.mass), atol=1e-5)
        True
    """

    layers: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    mass: float
    event: Event = field(repr=False)


def top_sets(
    mu: RelevanceMeasure,
    layers: Sequence[Layer],
    size: int | Sequence[int],
    over: Over | Sequence[Over] = "channel",
    exact: bool = False,
) -> TopSets:
    r"""Searches for the sets of ``size`` groups in each layer with the largest joint relevance.

    .. math:: \max_{S_1, \dots, S_L} \mu(n_{l_1} \in S_1 \wedge \dots \wedge n_{l_L} \in S_L), \qquad |S_m| = s_m

    The search is a coordinate ascent. From the output to the input, the set of each layer is replaced with the groups
    that have the largest joint relevance with the sets of the other layers, in one pass per layer, until the joint
    relevance no longer increases. Each set is then optimal given the others, but their combination need not be. With
    ``exact=True``, all combinations of sets in all layers except the last are enumerated; each of them determines the
    best set in the last layer.

    Args:
        mu: A single-sample measure.
        layers: Taps, each below the previous one.
        size: Number of groups per layer: one number for all layers, or one per layer.
        over: The kind of groups, as in :func:`top_walks`.
        exact: Whether to enumerate all combinations.

    Raises:
        ValueError: If the measure contains several samples, a size is not between 1 and the number of groups, or there
            are too many combinations.
        EventError: If a layer is not below the previous one.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1, composite=NRMAbsolute())
        >>> greedy, best = top_sets(mu, ["0", "input"], 2), top_sets(mu, ["0", "input"], 2, exact=True)
        >>> greedy.mass <= best.mass + 1e-6
        True

    Source: new in this package.
    """
    check_one_sample(mu)
    mu._check_fresh()
    chain = LayerChain(mu, layers, over)
    sizes = [size] * len(layers) if isinstance(size, int) else list(size)
    if len(sizes) != len(chain.taps) or not all(1 <= s <= n for s, n in zip(sizes, chain.counts, strict=True)):
        raise ValueError(f"size={brief(size)}: give one number for each layer, from 1 to {chain.counts}.")
    chosen = _exact_sets(chain, sizes) if exact else _greedy_sets(chain, sizes)
    event = _sets_event(chain, chosen)
    groups = tuple(tuple(sorted(part)) for part in chosen if part is not None)
    return TopSets(chain.names, groups, float(mu(event)), event)


def _greedy_sets(chain: LayerChain, sizes: list[int]) -> list[list[int] | None]:
    chosen: list[list[int] | None] = [None] * len(sizes)
    largest = -math.inf
    while True:
        total = -math.inf
        for level, size in enumerate(sizes):
            others = [*chosen]
            others[level] = None
            joint = chain.mu.marginal(chain.atoms[level], joint=_sets_event(chain, others)).flatten()
            values, places = chain.sums(level, joint).topk(size)
            chosen[level], total = places.tolist(), float(values.sum())
        if total <= largest + 1e-6 * abs(largest):
            return chosen
        largest = total


def _exact_sets(chain: LayerChain, sizes: list[int]) -> list[list[int] | None]:
    tries = math.prod(math.comb(n, s) for n, s in zip(chain.counts[:-1], sizes[:-1], strict=True))
    if tries > MAX_COMBINATIONS:
        raise ValueError(
            f"{tries} sets would have to be tried, which is more than {MAX_COMBINATIONS}. Omit exact=True."
        )
    joint = _all_walks(chain)
    best: tuple[float, list[list[int] | None]] = (-math.inf, [])
    choices = [itertools.combinations(range(n), s) for n, s in zip(chain.counts[:-1], sizes[:-1], strict=True)]
    for sets in itertools.product(*choices):
        part = joint
        for chosen in sets:
            part = part[list(chosen)].sum(0)
        values, places = part.topk(sizes[-1])
        if float(values.sum()) > best[0]:
            best = (float(values.sum()), [*map(list, sets), places.tolist()])
    return best[1]


def _all_walks(chain: LayerChain) -> Tensor:
    """Computes ``μ(g_1, …, g_L)`` for every combination of groups.

    One vector is propagated for each combination of groups in all layers except the last.
    """
    with torch.inference_mode(False), torch.no_grad():
        vectors = chain.first().unsqueeze(0)
        for level in range(chain.last):
            masks = chain.labels[level] == torch.arange(chain.counts[level], device=vectors.device)[:, None]
            split = (vectors[:, None] * masks).flatten(0, 1)
            vectors = torch.cat([chain.propagate(level, part) for part in torch.split(split, chain.widths[level])])
    return chain.sums(chain.last, vectors).view(*chain.counts)


def _sets_event(chain: LayerChain, chosen: Sequence[list[int] | None]) -> Event:
    parts = []
    for atom, tap, labels, groups in zip(chain.atoms, chain.taps, chain.labels, chosen, strict=True):
        inside = labels.new_ones(len(labels), dtype=torch.bool) if groups is None else _is_in(labels, groups)
        parts.append(atom[inside.view(tap.shape[1:])])
    return intersection(parts)


def _is_in(labels: Tensor, groups: list[int]) -> Tensor:
    return torch.isin(labels, torch.tensor(groups, device=labels.device))
