"""Search for the walks over groups of neurons that carry most relevance.

A *group walk* is one group of neurons in each of several layers; its mass is the joint relevance of those groups. The
bound is ours, and so is the search, after the relevant walk search of Xiong et al. (ICML 2023) for single neurons.

Source: MEASURE, section 4.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import EventError
from ..events.event import Atom, Event, at
from ..measure.groups import Over, check_over, labels_of
from ..measure.joints import propagated
from ..measure.layer_taps import Layer
from ..measure.measure import RelevanceMeasure
from ..measure.memory import DEFAULT, width_of
from ..recording.passes import push

TOGETHER = 8
"""Prefixes that are carried down at once."""
FOR_TABLES = 0.6
"""Part of the budget that completions may take."""
LEAST = 16
"""Rows of a table that are made even where there is no time."""
OVERTIME = 0.5
"""Part of its time that a table may take beyond it, as estimated from its first rows."""
NEARLY = 1e-4
"""Share of negative mass up to which a segment counts as one without negative kernels."""

Open = tuple[float, int, tuple[int, ...], Tensor, float]
"""A prefix that may go on: less its bound, a number, its groups, the relevance of all groups at its last layer, and its
own mass without sign."""


@dataclass(frozen=True)
class GroupWalk:
    """One group in each layer, and what the walks through all of them carry.

    Attributes:
        groups: Number of the channel (position, neuron, label) in each layer, the upper ones first.
        mass: Joint relevance, signed.
        certified: Whether no walk that is not returned can carry more, by absolute value.

    Examples:
        >>> GroupWalk((3, 0), 0.5, True).groups
        (3, 0)
    """

    groups: tuple[int, ...]
    mass: float
    certified: bool


@dataclass(frozen=True)
class TopWalks:
    """What a search found.

    Attributes:
        layers: The layers, from the output to the input.
        walks: The walks of largest absolute mass, the largest first.
        missed: No walk that is not among ``walks`` carries more than this, by absolute value.
        expanded: Prefixes that were carried down.
        seconds: Time taken.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1)
        >>> found = top_walks(mu, ["1", "input"], 2)
        >>> found.certified, torch.allclose(mu(found.event(0)), torch.tensor(found.walks[0].mass), atol=1e-5)
        (2, True)
    """

    layers: tuple[str, ...]
    walks: tuple[GroupWalk, ...]
    missed: float
    expanded: int
    seconds: float
    _atoms: tuple[Atom, ...] = field(default=(), repr=False)
    _labels: tuple[Tensor, ...] = field(default=(), repr=False)

    @property
    def certified(self) -> int:
        """How many walks are proven to be among the largest.

        Examples:
            >>> TopWalks(("1",), (GroupWalk((3,), 0.5, True), GroupWalk((0,), 0.1, False)), 0.2, 1, 0.0).certified
            1
        """
        return sum(walk.certified for walk in self.walks)

    @property
    def mass(self) -> float:
        """Mass of all walks that were found together; they are disjoint.

        Examples:
            >>> TopWalks(("1",), (GroupWalk((3,), 0.5, True), GroupWalk((0,), 0.25, False)), 0.3, 1, 0.0).mass
            0.75
        """
        return sum(walk.mass for walk in self.walks)

    def event(self, number: int) -> Event:
        """One of the walks as an event.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1)
            >>> top_walks(mu, ["1", "input"], 2).event(0)
            at('1')[mask of 1 in (4,)] & at('input')[mask of 1 in (3,)]
        """
        parts = zip(self._atoms, self._labels, self.walks[number].groups, strict=True)
        return every([atom[labels == group] for atom, labels, group in parts])


def top_walks(
    mu: RelevanceMeasure,
    layers: Sequence[Layer],
    k: int = 10,
    over: Over | Sequence[Over] = "channel",
    budget: float = 60.0,
    expansions: int | None = None,
) -> TopWalks:
    r"""The ``k`` walks over groups that carry most, by absolute value, and a bound on all others.

    .. math:: \mu(g_1, \dots, g_L) = \mu(n_{l_1} \in g_1 \wedge \dots \wedge n_{l_L} \in g_L)

    Best-first: of all prefixes the one is carried down whose best completion may carry most,

    .. math:: |\mu(g_1, \dots, g_L)| \le \sum_{i \in g_m} |r_m(i)|\, h_m(i), \qquad
              h_m(i) = \max_{g} \sum_{i' \in g} |\tilde T_{i'i}|\, h_{m+1}(i'), \qquad h_L = 1

    where :math:`r_m` is the relevance of the prefix and :math:`\tilde T` the kernel of all steps between two layers.
    Where memory allows the maximum is taken outside of the sum, which is smaller. Before that, and in turn with it,
    those prefixes are carried down that carry most, as a greedy choice does, for the sake of a search that is stopped
    early. It may be stopped at any time: masses are exact, and the bound is proven, up to rounding.

    Args:
        mu: A measure of one sample.
        layers: One or more taps, each below the one before.
        k: How many walks.
        over: ``"channel"``, ``"position"``, ``"neuron"`` or labels; a list of them for each layer.
        budget: Seconds after which the search stops; ``math.inf`` for a proven answer whatever it takes. A few passes
            for each two layers are always made.
        expansions: Prefixes after which it stops, so that two runs stop at the same place.

    Raises:
        ValueError: Several samples, no layer, or ``k`` below 1.
        EventError: A layer is not below the one before.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(1, 3), 1, composite=NRMAbsolute())
        >>> found = top_walks(mu, ["0", "input"], 3)
        >>> len(found.walks), found.missed <= abs(found.walks[-1].mass)
        (3, True)

    Source: MEASURE, section 4 (the bound is ours).
    """
    check_count(k, "k")
    check_one(mu)
    mu._check_fresh()
    with torch.inference_mode(False), torch.no_grad():
        search = _Search(mu, layers, over, k, budget)
        return search.run(expansions)


class _Search:
    """Prefixes on a heap, complete walks on another."""

    def __init__(
        self, mu: RelevanceMeasure, layers: Sequence[Layer], over: Over | Sequence[Over], k: int, budget: float
    ) -> None:
        self.begin, self.budget, self.k = time.perf_counter(), budget, k
        self.chain = Chain(mu, layers, over)
        self.slack = 1 + (1e-4 if mu._start.dtype == torch.float32 else 1e-9)
        self.completions = Completions(self.chain, self.begin + FOR_TABLES * budget)
        self.open: list[Open] = []
        self.best: list[tuple[float, tuple[int, ...], float]] = []
        self.dropped = 0.0
        self.expanded = 0
        self.expansions: int | None = None
        self._count = itertools.count()

    def run(self, expansions: int | None) -> TopWalks:
        self._enter((), self.chain.first())
        self.expansions = expansions
        for width in (1, 2 * math.isqrt(self.k)):  # something soon, then what a greedy choice finds
            for depth in range(1, self.chain.last + 1):
                self._dive(depth, width)
        while self.open and -self.open[0][0] > self._least() and not self._is_over():
            self._expand(self._most_promising())
            deepest = max((len(prefix) for _, _, prefix, _, _ in self.open), default=0)
            self._dive(deepest, TOGETHER)  # where bounds are loose, what carries most finds the better walks
        return self._result()

    def _dive(self, depth: int, width: int) -> None:
        """Carries down those prefixes of one length that carry most."""
        least = self._least()
        known = [(entry[4], number) for number, entry in enumerate(self.open) if len(entry[2]) == depth]
        chosen = [self.open[number] for _, number in heapq.nlargest(width, known) if -self.open[number][0] > least]
        together = min(TOGETHER, self.chain.widths[depth - 1]) if chosen else 1
        for first in range(0, len(chosen), together):
            if self._is_over():
                return
            part = chosen[first : first + together]
            taken = {entry[1] for entry in part}
            self.open = [entry for entry in self.open if entry[1] not in taken]
            heapq.heapify(self.open)
            self._expand(part)

    def _least(self) -> float:
        """What a walk must carry to be among the ``k``."""
        return self.best[0][0] if len(self.best) == self.k else 0.0

    def _is_over(self) -> bool:
        late = time.perf_counter() - self.begin > self.budget
        counted = self.expansions is not None and self.expanded >= self.expansions
        return self.expanded > 0 and (late or counted)

    def _most_promising(self) -> list[Open]:
        chosen = [heapq.heappop(self.open)]
        depth, least = len(chosen[0][2]), self._least()
        while self.open and len(chosen) < min(TOGETHER, self.chain.widths[depth - 1]):
            bound, _, prefix, _, _ = self.open[0]
            if len(prefix) != depth or -bound <= least:
                break
            chosen.append(heapq.heappop(self.open))
        return chosen

    def _expand(self, chosen: list[Open]) -> None:
        depth = len(chosen[0][2])
        self.expanded += len(chosen)
        vectors = [vector * (self.chain.labels[depth - 1] == prefix[-1]) for _, _, prefix, vector, _ in chosen]
        rows = self.chain.down(depth - 1, torch.stack(vectors))
        for (_, _, prefix, _, _), row in zip(chosen, rows, strict=True):
            self._enter(prefix, row)

    def _enter(self, prefix: tuple[int, ...], vector: Tensor) -> None:
        """All prefixes that go on from one, given the relevance at the next layer."""
        level = len(prefix)
        if level == self.chain.last:
            self._complete(prefix, self.chain.sums(level, vector)[:, None], 1)
        elif level == self.chain.last - 1 and self.completions.exact is not None:
            self._complete(prefix, self.chain.sums(level, vector * self.completions.exact).T, 2)
        else:
            bounds = (self.completions.bounds(level, vector) * self.slack).tolist()
            own = self.chain.sums(level, vector).abs().tolist()
            for group, (bound, mass) in enumerate(zip(bounds, own, strict=True)):
                if bound > self._least():
                    heapq.heappush(self.open, (-bound, next(self._count), (*prefix, group), vector, mass))
                else:
                    self.dropped = max(self.dropped, bound)

    def _complete(self, prefix: tuple[int, ...], masses: Tensor, missing: int) -> None:
        """``masses[g]`` or ``masses[g, g']`` of the groups that are missing."""
        flat = masses.flatten()
        values, places = flat.abs().topk(min(len(flat), self.k + 1))
        for value, place in zip(values.tolist(), places.tolist(), strict=True):
            if value <= self._least():
                self.dropped = max(self.dropped, value)
                break
            groups = divmod(place, masses.shape[1])[:missing]
            entry = (value, (*prefix, *groups), float(flat[place]))
            if len(self.best) < self.k:
                heapq.heappush(self.best, entry)
            else:
                self.dropped = max(self.dropped, heapq.heappushpop(self.best, entry)[0])

    def _result(self) -> TopWalks:
        missed = max(self.dropped, -self.open[0][0] if self.open else 0.0)
        walks = [
            GroupWalk(groups, mass, value >= missed) for value, groups, mass in sorted(self.best, key=lambda w: -w[0])
        ]
        chain = self.chain
        labels = tuple(group.reshape(tap.shape[1:]) for group, tap in zip(chain.labels, chain.taps, strict=True))
        seconds = time.perf_counter() - self.begin
        return TopWalks(chain.names, tuple(walks), missed, self.expanded, seconds, chain.atoms, labels)


class Chain:
    """Several layers, each below the one before, and the groups of their neurons; tensors are flat.

    Attributes:
        labels: Group of each neuron, ``(n_m,)``.
        counts: Number of groups.
        widths: Vectors that may be carried at once to the next layer.
    """

    def __init__(self, mu: RelevanceMeasure, layers: Sequence[Layer], over: Over | Sequence[Over]) -> None:
        if isinstance(layers, str) or not len(layers):
            raise ValueError(f"walks are searched over a list of one or more layers, got {layers!r}.")
        self.mu, self.recording = mu, mu._recording
        self.taps = [mu._tap(layer) for layer in layers]
        for (above, below), names in zip(itertools.pairwise(self.taps), itertools.pairwise(layers), strict=True):
            if not mu._is_below(below.place, above):
                raise EventError(f"{names[1]!r} is not below {names[0]!r}; list layers from the output to the input.")
        self.atoms = tuple(layer if isinstance(layer, Atom) else at(layer) for layer in layers)
        self.names = tuple(layer if isinstance(layer, str) else str(layer) for layer in layers)
        self.last = len(self.taps) - 1
        kinds = overs(over, len(self.taps))
        device = mu._start.device
        self.labels = [labels_of(tap, kind).reshape(-1).to(device) for tap, kind in zip(self.taps, kinds, strict=True)]
        self.counts = [int(labels.max()) + 1 for labels in self.labels]
        self.widths = [
            width_of(self.recording, mu._max_memory, [above.place, below.place])
            for above, below in itertools.pairwise(self.taps)
        ]

    def first(self) -> Tensor:
        """Relevance at the first layer."""
        return self.mu.marginal(self.atoms[0]).flatten()

    def down(self, level: int, vectors: Tensor) -> Tensor:
        """Relevance ``(K, n_m)`` to the next layer, ``(K, n_{m+1})``."""
        upper, lower = self.taps[level : level + 2]
        rows = {number: row.view(upper.shape) for number, row in enumerate(vectors)}
        return propagated(self.recording, upper, lower, rows)[0].flatten(1)

    def up(self, level: int, values: Tensor, bound: bool = False) -> Tensor:
        """Values ``(K, n_{m+1})`` at the next layer to what a walk from this one collects, or a bound, ``(K, n_m)``."""
        upper, lower = self.taps[level : level + 2]
        rows = values.view(len(values), *lower.shape)
        found, _ = push(self.recording.graph, lower.place, upper.place, rows, bound)
        like = self.mu._start
        return like.new_zeros(len(values), len(self.labels[level])) if found is None else found.flatten(1)

    def sums(self, level: int, values: Tensor) -> Tensor:
        """``(…, n_m)`` summed over the groups."""
        total = values.new_zeros((*values.shape[:-1], self.counts[level]))
        return total.index_add_(-1, self.labels[level], values)


class Completions:
    """How much of what is at a layer the best groups below can carry: segment passes up, made once.

    Where time does not suffice for a pass for each group, the groups that carry least are taken together: no group of a
    lump carries more than the lump.

    Attributes:
        exact: ``μ(g at the last layer given i)`` for each neuron ``i`` of the last but one, ``(groups, n)``; None where
            time or memory did not suffice.
    """

    def __init__(self, chain: Chain, deadline: float) -> None:
        self.chain, self.deadline = chain, deadline
        self.exact: Tensor | None = None
        self.reach: list[Tensor] = [chain.mu._start.new_ones(len(chain.labels[-1]))]
        self.tables: list[Tensor | None] = []
        masses = chain.mu.marginal(list(chain.atoms))
        self._sizes = [masses[atom].flatten().abs() for atom in chain.atoms]
        for level in range(chain.last - 1, -1, -1):
            self._add(level)

    def bounds(self, level: int, vector: Tensor) -> Tensor:
        """A bound on ``|μ|`` of every walk that goes on from a prefix through each group of a layer, ``(groups,)``."""
        table = self.tables[level]
        absolute = vector.abs()
        outside = self.chain.sums(level, absolute * self.reach[level])
        if table is None:
            return outside
        return torch.minimum(outside, self.chain.sums(level, absolute * table).amax(0))

    def _add(self, level: int) -> None:
        chain, values = self.chain, self.reach[0]
        everything = values.unsqueeze(0)
        labels, count = chain.labels[level + 1], chain.counts[level + 1]
        until = self._now() + (self.deadline - self._now()) / min(2, level + 1)  # all above builds on what is below
        if level == chain.last - 1:
            table = self._table(level, values, (labels, count), bound=False, until=until)
            if table is not None:
                self.exact = table
                self._keep(table.abs())
                return
        begin = self._now()
        whole = chain.up(level, everything, bound=True)
        # What is negative in a column, twice: it is added where a pass without absolute values is used.
        lost = (whole - chain.up(level, everything)).clamp(min=0)
        signed = bool((lost <= NEARLY * whole).all())
        affordable = (until - self._now()) / max(1e-9, (self._now() - begin) / 2)
        for rows in (affordable, LEAST):
            table = self._table(level, values, self._lumped(level, rows), bound=not signed, until=until)
            if table is not None:
                break
        if table is None:
            self.reach.insert(0, whole.squeeze(0))
            self.tables.insert(0, None)
        else:
            self._keep(torch.minimum(table.clamp(min=0) + (lost if signed else 0), whole))

    def _keep(self, table: Tensor) -> None:
        self.reach.insert(0, table.amax(0))
        self.tables.insert(0, table)

    def _lumped(self, level: int, affordable: float) -> tuple[Tensor, int]:
        """Labels of the next layer with about so many groups; half of them are what they were."""
        labels, count = self.chain.labels[level + 1], self.chain.counts[level + 1]
        if max(affordable, LEAST) >= count:
            return labels, count
        order = self.chain.sums(level + 1, self._sizes[level + 1] * self.reach[0]).argsort(descending=True)
        alone = max(LEAST, int(affordable)) // 2
        places = torch.empty_like(order)
        places[order[:alone]] = torch.arange(alone, device=order.device)
        places[order[alone:]] = alone + torch.arange(count - alone, device=order.device) % alone
        return places[labels], min(count, 2 * alone)

    def _table(
        self, level: int, values: Tensor, groups: tuple[Tensor, int], bound: bool, until: float
    ) -> Tensor | None:
        """``Σ_{i' ∈ g} T_{i'i} h(i')`` of every group of the next layer, ``(groups, n_m)``."""
        chain, (labels, count) = self.chain, groups
        size = count * len(chain.labels[level]) * values.element_size()
        is_hurried = count > LEAST
        if size > (chain.mu._max_memory or DEFAULT) or (is_hurried and self._now() > until):
            return None
        rows: list[Tensor] = []
        first, begin = 0, self._now()
        while first < count:
            chunk = torch.arange(first, min(first + (chain.widths[level] if first else 1), count), device=labels.device)
            rows.append(chain.up(level, (labels == chunk[:, None]) * values, bound))
            first += len(chunk)
            expected = self._now() + (count - first) * (self._now() - begin) / first
            if is_hurried and expected > until + OVERTIME * (until - begin):
                return None
        return torch.cat(rows)

    @staticmethod
    def _now() -> float:
        return time.perf_counter()


def overs(over: Over | Sequence[Over], count: int) -> list[Over]:
    """What a group is in each of several layers."""
    kinds = [over] * count if isinstance(over, (str, Tensor)) else list(over)
    if len(kinds) != count:
        raise ValueError(f"over= has {len(kinds)} entries for {count} layers; give one for each, or one for all.")
    for kind in kinds:
        check_over(kind)
    return kinds


def every(events: Sequence[Event]) -> Event:
    """All events at once."""
    first, *rest = events
    for event in rest:
        first = first & event
    return first


def check_one(mu: RelevanceMeasure) -> None:
    """Raises unless the measure is of one sample."""
    if mu.batch != 1:
        raise ValueError(f"every sample has other relevant walks: take a measure of one sample, not of {mu.batch}.")


def check_count(value: object, name: str) -> None:
    """Raises unless a value is a whole number of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}={value!r} must be a whole number of at least 1.")
