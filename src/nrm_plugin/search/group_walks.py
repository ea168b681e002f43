r"""Masses of all walks over the groups of several layers, if there are few enough to enumerate them.

.. math:: \mu(g_1, \dots, g_L) = \mu(n_{l_1} \in g_1 \wedge \dots \wedge n_{l_L} \in g_L)

Relevance is propagated down from the output to an intermediate layer, and transposed passes propagate the groups of the
lowest layer up to the same layer. The mass of a walk is the inner product of the two. The method is new in this
package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..measure.flow import ordered_taps
from ..measure.group_search import K, find_groups
from ..measure.layer_groups import Groups
from ..measure.measure import RelevanceMeasure
from ..measure.memory_budget import in_chunks
from .layer_chain import LayerChain, check_one_sample

Array = NDArray[np.float64]
MOST = 1 << 22
"""Maximum number of walks to enumerate."""


@dataclass(frozen=True, eq=False)
class GroupWalks:
    """Masses of all walks over the groups of several layers.

    Attributes:
        layers: Names of the layers, from the output to the input.
        names: Names of the groups in each layer.
        masses: Joint relevance of one group in each layer, with one dimension per layer. Summed over all dimensions
            except two adjacent ones, these are the ribbons of a flow.

    Examples:
        >>> from nrm_plugin.search.group_walks import group_walks
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.rand(1, 3), 1)
        >>> group_walks(mu, ["1", "input"], k=2).masses.shape
        (2, 2)
    """

    layers: tuple[str, ...]
    names: tuple[tuple[str, ...], ...]
    masses: Array

    def strongest(self, count: int = 10) -> list[tuple[str, float]]:
        """Returns the names and masses of the walks with the largest absolute mass.

        A walk is named after its groups, from the input to the output.
        """
        order = np.argsort(-np.abs(self.masses), axis=None, kind="stable")[:count]
        walks = zip(*np.unravel_index(order, self.masses.shape), strict=True)
        return [(self.name([int(group) for group in walk]), float(self.masses[walk])) for walk in walks]

    def through_nodes(self, count: int = 10) -> list[tuple[tuple[str, ...], float]]:
        """Returns the walks with the largest absolute mass, each as its nodes in a flow, with its mass.

        The nodes of a walk are given by their keys in a flow over the same groups, from the input to the output.
        """
        order = np.argsort(-np.abs(self.masses), axis=None, kind="stable")[:count]
        walks = zip(*np.unravel_index(order, self.masses.shape), strict=True)
        return [
            (
                tuple(f"{layer}/{group}" for layer, group in zip(self.layers, walk, strict=True))[::-1],
                float(self.masses[walk]),
            )
            for walk in walks
        ]

    def name(self, walk: Sequence[int]) -> str:
        """Returns the names of the groups along a walk, from the input to the output."""
        return " → ".join(reversed([names[group] for names, group in zip(self.names, walk, strict=True)]))


def group_walks(mu: RelevanceMeasure, layers: Sequence[str], groups: Groups | None = None, k: int = K) -> GroupWalks:
    """Computes the mass of every walk over the groups of several layers.

    Args:
        mu: A single-sample measure.
        layers: The layers, in any order; for any two of them, one must be below the other.
        groups: Groups of these layers; by default, they are found by a search on this measure.
        k: Number of groups per layer if ``groups`` is not given.

    Returns:
        The masses, multiplied by :attr:`~nrm_plugin.RelevanceMeasure.sign`.

    Raises:
        ValueError: If the measure has several samples.
        InputError: If there are more than four million walks, or if a layer has no groups.
    """
    check_one_sample(mu)
    ordered = [layer for layer, _ in ordered_taps(mu, layers)]
    groups = find_groups(mu, ordered, k) if groups is None else groups
    labels = [groups.over(mu, layer) for layer in ordered]
    names = tuple(groups.names[groups.layers.index(layer)] for layer in ordered)
    count = math.prod(len(each) for each in names)
    if count > MOST:
        raise InputError(f"there are {count:,} walks over these groups: give fewer layers, or use fewer groups.")
    with torch.inference_mode(False), torch.no_grad():
        chain = LayerChain(mu, ordered, labels)
        masses = all_masses(chain, [len(each) for each in names])
    return GroupWalks(tuple(ordered), names, masses * float(mu.sign[0]))


def all_masses(chain: LayerChain, counts: Sequence[int]) -> Array:
    """Computes the mass of every walk over the groups of a chain, with one dimension for each layer.

    Args:
        chain: The layers that the walks cross.
        counts: Number of groups in each layer, including empty groups at the end.
    """
    middle = min(range(chain.last + 1), key=lambda level: _passes(counts, level))
    rows = chain.first().unsqueeze(0)
    for level in range(middle):
        rows = _chunked(chain, level, _split(rows, chain.labels[level], counts[level]), chain.propagate)
    if middle == chain.last:
        values = _split(rows, chain.labels[middle], counts[middle]).sum(1)
        return _array(values, counts)
    below = _one_hot(chain.labels[chain.last], counts[chain.last], rows)
    for level in range(chain.last - 1, middle, -1):
        above = _chunked(chain, level, below, chain.collect)
        below = (_one_hot(chain.labels[level], counts[level], rows)[:, None] * above).flatten(0, 1)
    below = _chunked(chain, middle, below, chain.collect)
    return _array(_split(rows, chain.labels[middle], counts[middle]).double() @ below.T.double(), counts)


def least_passes(counts: Sequence[int]) -> int:
    """Returns the minimum number of partial passes for all walks over layers with the given group counts."""
    return min(_passes(counts, level) for level in range(len(counts)))


def _passes(counts: Sequence[int], middle: int) -> int:
    """Returns the number of partial passes if the downward and transposed passes meet at the given layer."""
    down = sum(math.prod(counts[: level + 1]) for level in range(middle))
    return down + sum(math.prod(counts[level + 1 :]) for level in range(middle, len(counts) - 1))


def _split(rows: Tensor, labels: Tensor, count: int) -> Tensor:
    """Restricts relevance of shape ``(R, n)`` to each group. Returns shape ``(R · count, n)``."""
    return (rows[:, None] * _one_hot(labels, count, rows)).flatten(0, 1)


def _one_hot(labels: Tensor, count: int, like: Tensor) -> Tensor:
    return (labels == torch.arange(count, device=labels.device)[:, None]).to(like)


def _chunked(chain: LayerChain, level: int, rows: Tensor, step: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Applies a function to all nonzero rows in chunks that fit into memory."""
    used = rows.any(1).nonzero()[:, 0]

    def run(some: Sequence[int]) -> list[Tensor]:
        return list(step(level, rows[list(some)]))

    parts = in_chunks(used.tolist(), chain.widths[level], run, "walks over groups")
    width = len(chain.labels[level + 1] if step == chain.propagate else chain.labels[level])
    result = rows.new_zeros((len(rows), width))
    return result.index_copy(0, used, torch.stack(parts)) if parts else result


def _array(values: Tensor, counts: Sequence[int]) -> Array:
    array: Array = values.double().cpu().numpy().reshape(counts)
    return array
