"""Partitions of channels that do not use the dependence between layers, and the dependence that partitions keep."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nrm_plugin.measure.dependence import kept

K = 8
"""Number of sets of each layer."""
OTHERS = ("strongest and rest", "k-means of activations", "random")
Labels = Sequence[np.ndarray]


def kappas(dependences: Sequence[np.ndarray], labels: Labels) -> list[float]:
    """Returns κ of each pair of layers."""
    return [kept(part, *labels[above : above + 2]) for above, part in enumerate(dependences)]


def other_partitions(
    masses: Sequence[np.ndarray], activations: Sequence[np.ndarray], seed: int
) -> dict[str, list[np.ndarray]]:
    """Returns partitions of the channels of each layer that do not use the dependence between layers.

    Args:
        masses: For each layer, the mass of each channel, of shape ``(channels,)``.
        activations: For each layer, coordinates of the channels with the distances of their activations, of shape
            ``(channels, coordinates)``.
        seed: Seed of k-means and of the random sets.
    """
    from sklearn.cluster import KMeans

    random = np.random.default_rng(seed)
    found: dict[str, list[np.ndarray]] = {name: [] for name in OTHERS}
    for mass, coordinates in zip(masses, activations, strict=True):
        strongest = np.full(len(mass), K - 1)
        strongest[np.argsort(-np.abs(mass))[: K - 1]] = np.arange(K - 1)
        found["strongest and rest"].append(strongest)
        found["k-means of activations"].append(KMeans(K, n_init=3, random_state=seed).fit_predict(coordinates))
        found["random"].append(random.integers(K, size=len(mass)))
    return found
