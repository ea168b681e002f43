"""Search for groups of channels, positions or neurons that preserve most of the dependence between layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError, brief
from .dependence import Array, Labels, dependence, find_partitions, group_sums, kept, refined
from .flow_thresholds import NEGLIGIBLE
from .groups import Over
from .joint_sketches import PairJoints
from .layer_groups import Groups
from .layer_taps import several_layers
from .mean_joints import MeanJoints, Measure, Members, mean_joints, signed_sum
from .partitions import Names

K = 8
"""Default number of groups in a layer."""
ROUNDS = 1
"""Number of refinements of each layer by exact joint relevance after a search on an estimate."""
FEW_RESTARTS = 2
"""Maximum number of search restarts on an estimate. The estimate is too inaccurate to justify more."""
RESTARTS = 30
"""Default number of restarts of the search."""


@runtime_checkable
class JointSource(Protocol):
    """Protocol for objects that store joint relevance, such as a sweep."""

    def mean_joints(self, layers: Sequence[str]) -> MeanJoints: ...


def find_groups(
    measures: Measure | Iterable[Measure] | MeanJoints | JointSource,
    layers: Sequence[Any],
    k: int | Mapping[str, int | None] = K,
    members: Members | None = None,
    *,
    names: Mapping[str, Names] | None = None,
    restarts: int = RESTARTS,
    seed: int = 0,
) -> Groups:
    r"""Groups the channels (or other members) of several layers to preserve the dependence between the layers.

    Let ``J`` be the mean joint relevance of the members of two layers, with row sums ``r``, column sums ``c`` and total
    ``Z``. The groups preserve the fraction κ of the dependence :math:`D = J - r c^\top / Z`,

    .. math:: \kappa = \sum_{gh} \Bigl|\sum_{i \in g, j \in h} D_{ij}\Bigr| \Big/ \sum_{ij} |D_{ij}|

    The search maximizes the sum of κ over pairs of consecutive layers. It starts from k-means clusters and moves
    single members to the group that most increases this sum until no move increases it. If at most ``k`` members of a
    layer have nonzero mass, as in the output, each of them forms its own group. Groups are sorted by decreasing
    absolute mass. The result is deterministic for a given seed.

    The exact joint relevance of non-adjacent layers takes one pass per member. If both layers have more than 64
    members, the search therefore starts from an estimate, based on the positions that the layers have in common or, if
    there are none, on a sketch of rank 8. Members are then moved according to their exact joint relevance with groups,
    and κ is not computed (NaN). For parts of a large image, joint relevance is computed at the positions of a layer
    that all walks to the image cross.

    Args:
        measures: A measure with one or more samples, several measures, or a sweep that stores the joint relevance of
            these layers.
        layers: Two or more layers, each below the previous one.
        k: Maximum number of groups per layer, or a dictionary keyed by layer name. With None, each member of a layer is
            its own group.
        members: The members to be grouped in each layer, keyed by layer name: ``"channel"`` (the default),
            ``"position"``, ``"neuron"``, an integer label for every neuron (such as heads ``torch.arange(768) // 64``,
            or segments of an image), or boolean masks keyed by name. By default, the input is grouped by position, in a
            grid of at most 16 × 16 cells.
        names: Member names, keyed by layer, such as ``{"output": classes}``. A group is named after its member with the
            largest mass.
        restarts: Number of restarts from the best groups found so far, with some members assigned to random groups.
        seed: Random seed for the search.

    Raises:
        InputError: If ``k`` is below 1, ``restarts`` is below 0, or no measure is given.
        EventError: If a layer is not below the previous one.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(5, 3), 1)
        >>> find_groups(mu, ["output", "1", "input"], k=2)
        Groups(output: 2, 1: 2, input: 2; κ=...)

    Source: docs/groups.md. The method is new in this package.
    """
    chosen = several_layers(layers)
    if len(chosen) < 2:
        raise InputError(
            "groups are found from the dependence between layers, but only one layer was given: give two or more."
        )
    joints, source = _joints(measures, chosen, members)
    counts = [_count(k, layer) for layer in joints.layers]
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 0:
        raise InputError(f"restarts={brief(restarts)} must be a whole number of at least 0.")
    parts = [dependence(joint) for joint in joints.joints]
    fixed = [_apart(each, count) for each, count in zip(joints.masses, counts, strict=True)]
    sizes = [count or 0 if given is None else int(given.max()) + 1 for count, given in zip(counts, fixed, strict=True)]
    is_exact = all(joints.are_exact)
    labels = find_partitions(parts, sizes, restarts if is_exact else min(restarts, FEW_RESTARTS), seed, fixed)
    if source is not None and not is_exact:
        free = [layer for layer, given in enumerate(fixed) if given is None]
        sides = _Sides(joints, source, parts)
        for _ in range(ROUNDS):
            labels = refined(labels, sizes, free, sides)
    return _groups(joints, parts, labels, names or {})


@dataclass(frozen=True)
class _Sides:
    """Exact dependence of each member (channel, position, neuron) of a layer on the groups of the adjacent layers.

    Attributes:
        joints: Joint relevance of all members, exact or estimated.
        source: Object that computes the exact joint relevance of groups.
        parts: Dependence of all members of each pair of layers, of shape ``(members, members below)``.
    """

    joints: MeanJoints
    source: PairJoints
    parts: Sequence[Array]

    def __call__(self, layer: int, labels: list[Labels]) -> Array:
        sides = [self._above(layer - 1, labels)] if layer > 0 else []
        sides += [self._below(layer, labels)] if layer < len(self.parts) else []
        return np.concatenate(sides, 1)

    def _above(self, pair: int, labels: list[Labels]) -> Array:
        size = np.abs(self.parts[pair]).sum() or 1.0
        if self.joints.are_exact[pair]:
            return group_sums(self.parts[pair], labels[pair]).T / size
        groups = self.source.labels(pair, torch.from_numpy(labels[pair]))
        return self._dependence(pair, groups, self.source.kinds[pair + 1]).T / size

    def _below(self, pair: int, labels: list[Labels]) -> Array:
        size = np.abs(self.parts[pair]).sum() or 1.0
        if self.joints.are_exact[pair]:
            return group_sums(self.parts[pair].T, labels[pair + 1]).T / size
        groups = self.source.labels(pair + 1, torch.from_numpy(labels[pair + 1]))
        return self._dependence(pair, self.source.kinds[pair], groups) / size

    def _dependence(self, pair: int, above: Over, below: Over) -> Array:
        matrix = self.source.of_groups(pair, above, below)
        return dependence(signed_sum(self.source.mu, matrix) / self.joints.samples)


def _joints(source: Any, layers: Sequence[Any], members: Members | None) -> tuple[MeanJoints, PairJoints | None]:
    if isinstance(source, MeanJoints):
        return source, None
    if isinstance(source, JointSource):
        return source.mean_joints(layers), None
    measures = iter([source] if hasattr(source, "joints") else source)
    first = next(measures, None)
    if first is None:
        raise InputError("find_groups needs at least one measure, got none.")
    return mean_joints(chain([first], measures), [(layer_name(first, layer), layer) for layer in layers], members)


def layer_name(mu: Any, layer: Any) -> str:
    """Returns the name of a layer, given as a name, module or tap."""
    if isinstance(layer, str):
        return layer
    names = mu._tap(layer).names
    return names[0] if names else str(layer)


def _count(k: int | Mapping[str, int | None], layer: str) -> int | None:
    count = k.get(layer, K) if isinstance(k, Mapping) else k
    if count is None:
        return None
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"k={brief(count)} must be a whole number of at least 1: the number of groups of {layer!r}.")
    return count


def _apart(masses: Array, count: int | None) -> Labels | None:
    """Assigns each member with nonzero mass to its own group and all others to one group.

    Returns None if more than ``count`` members have nonzero mass. If ``count`` is None, every member is its own group.
    """
    if count is None:
        return np.arange(masses.shape[1], dtype=np.int64)
    carriers = np.flatnonzero(np.abs(masses).max(0) > NEGLIGIBLE)
    if len(carriers) > count:
        return None
    labels = np.full(masses.shape[1], len(carriers), dtype=np.int64)
    labels[carriers] = np.arange(len(carriers))
    return labels


def _groups(joints: MeanJoints, parts: Sequence[Array], labels: Sequence[Labels], names: Mapping[str, Names]) -> Groups:
    """Constructs :class:`Groups` from partitions, sorted by decreasing absolute mass."""
    ordered = [_by_mass(each, own) for each, own in zip(joints.masses, labels, strict=True)]
    sums = [group_sums(each.T, own).T for each, own in zip(joints.masses, ordered, strict=True)]
    exact = joints.are_exact or (True,) * len(parts)
    kappas = [kept(part, *ordered[n : n + 2]) if exact[n] else math.nan for n, part in enumerate(parts)]
    called = [
        _names(each.mean(0), own, kind, names.get(layer))
        for layer, each, own, kind in zip(joints.layers, joints.masses, ordered, joints.members, strict=True)
    ]
    is_known = len(joints.masses[0]) == joints.samples
    return Groups(
        layers=joints.layers,
        labels=tuple(torch.from_numpy(own) for own in ordered),
        members=joints.members,
        names=tuple(called),
        masses=tuple(tuple(each.mean(0).tolist()) for each in sums),
        kappas=tuple(kappas),
        examples=tuple(tuple(np.abs(each).argmax(0).tolist() if is_known else ()) for each in sums),
        samples=joints.samples,
    )


def _by_mass(masses: Array, labels: Labels) -> Labels:
    """Renumbers groups by decreasing absolute mean mass, dropping empty groups."""
    used, labels = np.unique(labels, return_inverse=True)
    sums = np.abs(group_sums(masses.mean(0)[:, None], labels, len(used))[:, 0])
    places = np.empty(len(used), dtype=np.int64)
    places[np.argsort(-sums, kind="stable")] = np.arange(len(used))
    return places[labels]


def _names(masses: Array, labels: Labels, kind: Over, names: Names | None) -> tuple[str, ...]:
    """Names each group after its member with the largest absolute mass and the number of its other members."""
    given = dict(enumerate(names)) if names is not None and not isinstance(names, Mapping) else names or {}
    called = []
    for group in range(int(labels.max()) + 1):
        members = np.flatnonzero(labels == group)
        largest = int(members[np.abs(masses[members]).argmax()])
        word = "member" if isinstance(kind, Tensor) else kind
        name = given.get(largest, f"{word} {largest}")
        others = len(members) - 1
        is_empty = not np.abs(masses[members]).any()
        called.append("others" if is_empty and others else f"{name} + {others}" if others else name)
    return tuple(called)
