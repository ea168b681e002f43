"""Prototypes: a few ways in which a model reaches a class, as clusters of the relevance of its channels.

Each explanation is a vector, the relevance of the channels of a layer. A mixture of Gaussians, or k-means, finds groups
of explanations that are alike: a prototype is the centre of one, its members are the samples in it, its coverage is
their share. A new sample is told by the prototype that it is nearest to, and by how it differs from it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError, extra
from .examples import ReferencesError
from .stored_sweep import Sweep
from .sweep_layout import QueryInfo

Array = NDArray[np.float64]
Method = Literal["mixture", "kmeans"]
Covariance = Literal["diag", "full", "tied", "spherical"]


@dataclass(frozen=True, eq=False)
class Nearest:
    """Where a sample is among the prototypes.

    Attributes:
        prototype: The one it belongs to.
        distance: Euclidean, to its centre.
        difference: Its relevance less that of the centre, ``(K,)``.
        outlying: Share of the samples, that prototypes were made of, which fit less well: 0 for one that fits worse
            than all of them. How well is the likelihood of a mixture, and the distance of k-means.
    """

    prototype: int
    distance: float
    difference: Array
    outlying: float

    def strongest(self, top: int = 8) -> list[tuple[int, float]]:
        """The groups that it differs in most, with the differences."""
        order = np.argsort(-np.abs(self.difference), kind="stable")[:top]
        return [(int(group), float(self.difference[group])) for group in order]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Clusters of explanations; made by :func:`find_prototypes`. Ordered by coverage.

    Attributes:
        centres: Relevance of each prototype, ``(P, K)``.
        members: Which prototype each sample belongs to, ``(N,)``.
        samples: Their numbers in the data set, ``(N,)``.
        distances: Of each sample to its centre, ``(N,)``.
    """

    centres: Array
    members: NDArray[np.int64]
    samples: NDArray[np.int64]
    distances: Array
    _fitted: Any = field(repr=False)
    _order: NDArray[np.int64] = field(repr=False)
    _scale: float = field(repr=False)
    _fits: Array = field(repr=False)

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.0%}" for share in self.coverage)
        return f"Prototypes({len(self.centres)} of {self.centres.shape[1]} groups; {shares} of {len(self.samples)})"

    @property
    def coverage(self) -> Array:
        """Share of the samples that belongs to each prototype, ``(P,)``."""
        found: Array = np.bincount(self.members, minlength=len(self.centres)) / len(self.members)
        return found

    def of(self, prototype: int) -> list[int]:
        """The samples that belong to a prototype, those nearest to its centre first.

        Raises:
            InputError: There is no such prototype.
        """
        if not 0 <= prototype < len(self.centres):
            raise InputError(f"there is no prototype {prototype}; there are {len(self.centres)}, counted from 0.")
        mine = np.flatnonzero(self.members == prototype)
        order = mine[np.lexsort((self.samples[mine], self.distances[mine]))]
        return [int(sample) for sample in self.samples[order]]

    def strongest(self, prototype: int, top: int = 8) -> list[tuple[int, float]]:
        """The groups of largest absolute relevance of a prototype, with their relevance."""
        centre = self.centres[prototype]
        order = np.argsort(-np.abs(centre), kind="stable")[:top]
        return [(int(group), float(centre[group])) for group in order]

    def nearest(self, vectors: Tensor | Array) -> list[Nearest]:
        """Which prototype each of some new samples belongs to, and how it differs from it.

        Args:
            vectors: Relevance of the same groups, ``(N, K)``.

        Raises:
            InputError: Other groups, or numbers that are not finite.
        """
        values = _vectors(vectors)
        if values.shape[1] != self.centres.shape[1]:
            raise InputError(f"prototypes are of {self.centres.shape[1]} groups, got {values.shape[1]}.")
        scaled = values / self._scale
        members = self._order[self._fitted.predict(scaled)]
        differences = values - self.centres[members]
        distances = np.linalg.norm(differences, axis=1)
        outlying = np.searchsorted(np.sort(self._fits), _fits(self._fitted, scaled), side="left") / len(self._fits)
        return [
            Nearest(int(member), float(distance), difference, float(share))
            for member, distance, difference, share in zip(members, distances, differences, outlying, strict=True)
        ]


def find_prototypes(
    vectors: Tensor | Array,
    count: int = 4,
    method: Method = "mixture",
    *,
    samples: Sequence[int] | NDArray[np.int64] | None = None,
    covariance: Covariance = "diag",
    seed: int = 0,
) -> Prototypes:
    """Clusters explanations; those of one class tell in which ways the model reaches it.

    Vectors are divided by one number, the root of their mean variance, so that the small constant that scikit-learn
    adds to variances is small beside them too.

    Args:
        vectors: Relevance of groups in each sample, ``(N, K)``, such as ``mu.marginal(layer, over="channel")``, or of
            :func:`vectors_of_sweep`.
        count: How many prototypes.
        method: ``"mixture"`` of Gaussians, or ``"kmeans"``.
        samples: Numbers of the samples in the data set; 0 to N - 1 by default.
        covariance: Of the mixture, as scikit-learn's ``covariance_type``; a full one needs many samples.
        seed: Of the random start.

    Raises:
        MissingExtraError: scikit-learn is not installed.
        InputError: Fewer samples than prototypes, numbers that are not finite, or other arguments that do not fit.

    Examples:
        >>> from nrm_plugin.dataset.prototypes import find_prototypes
        >>> vectors = torch.cat([torch.randn(30, 4) * 0.1, torch.randn(10, 4) * 0.1 + 1])
        >>> found = find_prototypes(vectors, 2)
        >>> found
        Prototypes(2 of 4 groups; 75%, 25% of 40)
        >>> found.nearest(torch.ones(1, 4))[0].prototype
        1

    Source: Dreyer et al. (Prototypical Concept-based Explanations, CVPR workshops 2024) for mixtures of concept
    relevance; the scale and ``outlying`` are ours.
    """
    values = _vectors(vectors)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(values):
        raise InputError(f"count={count!r} must be from 1 to the number of samples, {len(values)}.")
    numbers = np.arange(len(values)) if samples is None else np.asarray(samples, dtype=np.int64)
    if numbers.shape != (len(values),):
        raise InputError(f"samples= must number {len(values)} samples, got shape {numbers.shape}.")
    scale = float(np.sqrt(values.var(0).mean())) or 1.0
    fitted = _model(method, count, covariance, seed).fit(values / scale)
    found = fitted.predict(values / scale)
    by_coverage = np.argsort(-np.bincount(found, minlength=count), kind="stable")
    order = np.argsort(by_coverage)
    centres = (fitted.means_ if method == "mixture" else fitted.cluster_centers_)[by_coverage] * scale
    members = order[found]
    distances = np.linalg.norm(values - centres[members], axis=1)
    return Prototypes(centres, members, numbers, distances, fitted, order, scale, _fits(fitted, values / scale))


def _model(method: str, count: int, covariance: str, seed: int) -> Any:
    if method == "mixture":
        mixture = extra("sklearn.mixture", "prototypes")
        return mixture.GaussianMixture(count, covariance_type=covariance, random_state=seed, n_init=3)
    if method == "kmeans":
        return extra("sklearn.cluster", "prototypes").KMeans(count, random_state=seed, n_init=10)
    raise InputError(f"method={method!r} is unknown; choose 'mixture' or 'kmeans'.")


def _fits(fitted: Any, scaled: Array) -> Array:
    """How well each sample fits, the more the better: log-likelihood, or minus the distance to the nearest centre."""
    found: Array = fitted.score_samples(scaled) if hasattr(fitted, "means_") else -fitted.transform(scaled).min(1)
    return found


def _vectors(values: Tensor | Array) -> Array:
    found = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    if found.ndim != 2 or not found.size or not np.isfinite(found).all():
        raise InputError(f"explanations must be finite numbers (samples, groups), got shape {found.shape}.")
    return found


def vectors_of_sweep(
    sweep: Sweep | str | os.PathLike[str], query: str, target: int | None = None
) -> tuple[Array, NDArray[np.int64]]:
    """Relevance of the groups of a query in each sample of a sweep; no model is needed.

    Args:
        sweep: The sweep, or its folder.
        query: Name of a query with a value for each group, or of a layer that it has a ``Marginal`` of.
        target: Only samples of which this was explained.

    Returns:
        ``(N, K)``, and the numbers of the samples, ``(N,)``.

    Raises:
        ReferencesError: No such query, no sample with this target, or values are missing where a conditional has none.
        SweepError: There is no sweep, or a file of it is damaged.
    """
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.open(sweep)
    info = _query(sweep, query)
    rows = sweep.rows(info.name, columns=["sample", "target", "group", "value"])
    sample, of, group, value = (rows[name].to_numpy() for name in rows.column_names)
    if target is not None:
        keep = of == target
        sample, group, value = sample[keep], group[keep], value[keep]
    numbers, place = np.unique(sample, return_inverse=True)
    if not len(numbers):
        raise ReferencesError(f"{info.name!r} has no samples{'' if target is None else f' with target {target}'}.")
    found = np.full((len(numbers), info.groups[0] if info.groups else 1), np.nan)
    found[place, group.clip(0)] = value
    lacking = numbers[~np.isfinite(found).all(1)]
    if len(lacking):
        raise ReferencesError(
            f"{info.name!r} lacks values in {len(lacking)} samples, the first is {lacking[0]}: conditionals have none "
            "where the condition has (almost) no mass. Take a query with joint= instead of given=."
        )
    return found, numbers


def _query(sweep: Sweep, name: str) -> QueryInfo:
    fits = [info for info in sweep.queries.values() if not info.is_map and info.groups is not None
            and len(info.groups) < 2]  # fmt: skip
    plain = [info for info in fits if info.kind == "Marginal" and info.layers == (name,)
             and info.spec.get("joint") is None and info.spec.get("given") is None]  # fmt: skip
    found = [info for info in fits if info.name == name] or plain
    if not found:
        known = ", ".join(repr(info.name) for info in fits)
        raise ReferencesError(f"the sweep has no query {name!r} with a value for each group. It has: {known}.")
    return found[0]


__all__ = ["Nearest", "Prototypes", "find_prototypes", "vectors_of_sweep"]
