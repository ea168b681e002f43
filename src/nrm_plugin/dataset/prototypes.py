"""Prototypes: clusters of similar explanations, such as the typical explanations of a class.

Each explanation is a vector: the relevance of the channels in a layer. Explanations are clustered by a Gaussian mixture
or k-means. A prototype is the center of a cluster, its members are the samples in the cluster, and its coverage is the
fraction of all samples that are members. A new sample is described by its nearest prototype and its differences from
this prototype.
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
from .examples import ReferencesError, query_named
from .stored_sweep import Sweep

Array = NDArray[np.float64]
Method = Literal["mixture", "kmeans"]
Covariance = Literal["diag", "full", "tied", "spherical"]


@dataclass(frozen=True, eq=False)
class Nearest:
    """Assignment of a sample to a prototype.

    Attributes:
        prototype: Index of the prototype.
        distance: Euclidean distance to the center.
        difference: Relevance of the sample minus relevance of the center, of shape ``(K,)``.
        outlying: Fraction of the clustered samples that fit worse than this sample, by likelihood for a mixture and
            by distance for k-means. It behaves like a p-value: small values mean that the sample is atypical; 0 means
            that every clustered sample fits better.
    """

    prototype: int
    distance: float
    difference: Array
    outlying: float

    def strongest(self, top: int = 8) -> list[tuple[int, float]]:
        """Returns the ``top`` groups with the largest absolute differences, each with its difference."""
        order = np.argsort(-np.abs(self.difference), kind="stable")[:top]
        return [(int(group), float(self.difference[group])) for group in order]


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Clusters of explanations, ordered by coverage, as returned by :func:`find_prototypes`.

    Attributes:
        centers: Relevance of each prototype, of shape ``(P, K)``.
        members: Prototype index of each sample, of shape ``(N,)``.
        samples: Sample indices in the dataset, of shape ``(N,)``.
        distances: Euclidean distance from each sample to the center of its prototype, of shape ``(N,)``.
    """

    centers: Array
    members: NDArray[np.int64]
    samples: NDArray[np.int64]
    distances: Array
    _fitted: Any = field(repr=False)
    _order: NDArray[np.int64] = field(repr=False)
    _scale: float = field(repr=False)
    _fits: Array = field(repr=False)

    def __repr__(self) -> str:
        shares = ", ".join(f"{share:.0%}" for share in self.coverage)
        return f"Prototypes({len(self.centers)} of {self.centers.shape[1]} groups; {shares} of {len(self.samples)})"

    @property
    def coverage(self) -> Array:
        """Fraction of the samples in each prototype, of shape ``(P,)``."""
        coverage: Array = np.bincount(self.members, minlength=len(self.centers)) / len(self.members)
        return coverage

    def of(self, prototype: int) -> list[int]:
        """Returns the members of a prototype, in order of increasing distance to its center.

        Raises:
            InputError: If there is no prototype with this index.
        """
        if not 0 <= prototype < len(self.centers):
            raise InputError(f"no prototype {prototype}; {len(self.centers)} were found, counted from 0.")
        own = np.flatnonzero(self.members == prototype)
        order = own[np.lexsort((self.samples[own], self.distances[own]))]
        return [int(sample) for sample in self.samples[order]]

    def strongest(self, prototype: int, top: int = 8) -> list[tuple[int, float]]:
        """Returns the ``top`` groups with the largest absolute relevance in a prototype, each with its relevance."""
        center = self.centers[prototype]
        order = np.argsort(-np.abs(center), kind="stable")[:top]
        return [(int(group), float(center[group])) for group in order]

    def nearest(self, vectors: Tensor | Array) -> list[Nearest]:
        """Assigns new samples to prototypes.

        Args:
            vectors: Relevance of the same groups, of shape ``(N, K)``.

        Raises:
            InputError: If the number of groups does not match or if values are not finite.
        """
        values = _vectors(vectors)
        if values.shape[1] != self.centers.shape[1]:
            raise InputError(f"prototypes have {self.centers.shape[1]} groups, got {values.shape[1]}.")
        scaled = values / self._scale
        members = self._order[self._fitted.predict(scaled)]
        differences = values - self.centers[members]
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
    """Clusters explanations, for example all explanations of one class.

    Vectors are divided by the square root of their mean variance. This makes scikit-learn's regularization of the
    covariance negligible.

    Args:
        vectors: Relevance of the groups in each sample, of shape ``(N, K)``, from
            ``mu.marginal(layer, over="channel")`` or :func:`vectors_of_sweep`.
        count: Number of prototypes.
        method: ``"mixture"`` of Gaussians, or ``"kmeans"``.
        samples: Sample indices in the dataset. Defaults to 0 to N - 1.
        covariance: ``covariance_type`` of scikit-learn's ``GaussianMixture``. A full covariance requires many samples.
        seed: Seed for the initialization.

    Raises:
        MissingExtraError: If scikit-learn is not installed.
        InputError: If there are fewer samples than prototypes, values are not finite, or other arguments are invalid.

    Examples:
        >>> from nrm_plugin.dataset.prototypes import find_prototypes
        >>> vectors = torch.cat([torch.randn(30, 4) * 0.1, torch.randn(10, 4) * 0.1 + 1])
        >>> prototypes = find_prototypes(vectors, 2)
        >>> prototypes
        Prototypes(2 of 4 groups; 75%, 25% of 40)
        >>> prototypes.nearest(torch.ones(1, 4))[0].prototype
        1

    Source: Dreyer et al. (Prototypical Concept-based Explanations, CVPR workshops 2024) for mixtures of concept
    relevance; the scaling and ``outlying`` are new in this package.
    """
    values = _vectors(vectors)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= len(values):
        raise InputError(f"count={count!r} must be from 1 to the number of samples, {len(values)}.")
    numbers = np.arange(len(values)) if samples is None else np.asarray(samples, dtype=np.int64)
    if numbers.shape != (len(values),):
        raise InputError(f"samples= must have {len(values)} indices, got shape {numbers.shape}.")
    scale = float(np.sqrt(values.var(0).mean())) or 1.0
    fitted = _model(method, count, covariance, seed).fit(values / scale)
    labels = fitted.predict(values / scale)
    by_coverage = np.argsort(-np.bincount(labels, minlength=count), kind="stable")
    order = np.argsort(by_coverage)
    centers = (fitted.means_ if method == "mixture" else fitted.cluster_centers_)[by_coverage] * scale
    members = order[labels]
    distances = np.linalg.norm(values - centers[members], axis=1)
    return Prototypes(centers, members, numbers, distances, fitted, order, scale, _fits(fitted, values / scale))


def _model(method: str, count: int, covariance: str, seed: int) -> Any:
    if method == "mixture":
        mixture = extra("sklearn.mixture", "prototypes")
        return mixture.GaussianMixture(count, covariance_type=covariance, random_state=seed, n_init=3)
    if method == "kmeans":
        return extra("sklearn.cluster", "prototypes").KMeans(count, random_state=seed, n_init=10)
    raise InputError(f"method={method!r} is unknown; choose 'mixture' or 'kmeans'.")


def _fits(fitted: Any, scaled: Array) -> Array:
    """Computes the goodness of fit of each sample: the log-likelihood or minus the distance to the nearest center."""
    fits: Array = fitted.score_samples(scaled) if hasattr(fitted, "means_") else -fitted.transform(scaled).min(1)
    return fits


def _vectors(values: Tensor | Array) -> Array:
    vectors = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, dtype=float)
    if vectors.ndim != 2 or not vectors.size or not np.isfinite(vectors).all():
        raise InputError(f"explanations must be finite numbers (samples, groups), got shape {vectors.shape}.")
    return vectors


def vectors_of_sweep(
    sweep: Sweep | str | os.PathLike[str], query: str, target: int | None = None
) -> tuple[Array, NDArray[np.int64]]:
    """Reads the relevance of the groups in each sample of a sweep, without the model.

    Args:
        sweep: The sweep, or its folder.
        query: Name of a query with one value per group, or name of a layer that has a ``Marginal`` query.
        target: Class whose explanations are read; None reads all samples.

    Returns:
        The vectors, of shape ``(N, K)``, and the sample indices, of shape ``(N,)``.

    Raises:
        ReferencesError: If the query is unknown, there are no samples with this target, or conditional values are
            undefined.
        SweepError: If the folder does not contain a sweep or if a file is damaged.
    """
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.open(sweep)
    queries = sweep.queries.values()
    candidates = [info for info in queries if not info.is_map and info.groups is not None and len(info.groups) < 2]
    info = query_named(query, candidates, "Marginal", "a value for each group")
    rows = sweep.rows(info.name, columns=["sample", "target", "group", "value"])
    sample, targets, group, value = (rows[name].to_numpy() for name in rows.column_names)
    if target is not None:
        keep = targets == target
        sample, group, value = sample[keep], group[keep], value[keep]
    numbers, row = np.unique(sample, return_inverse=True)
    if not len(numbers):
        raise ReferencesError(f"{info.name!r} has no samples{'' if target is None else f' with target {target}'}.")
    vectors = np.full((len(numbers), info.groups[0] if info.groups else 1), np.nan)
    vectors[row, group.clip(0)] = value
    incomplete = numbers[~np.isfinite(vectors).all(1)]
    if len(incomplete):
        raise ReferencesError(
            f"{info.name!r} has undefined values in {len(incomplete)} samples, the first is {incomplete[0]}: the "
            "condition has (almost) no mass there. Use a query with joint= instead of given=."
        )
    return vectors, numbers


__all__ = ["Nearest", "Prototypes", "find_prototypes", "vectors_of_sweep"]
