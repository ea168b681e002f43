"""The mean joint relevance of the members of consecutive layers, over the samples of measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..recording.taps import Tap
from .groups import Over, labels_of
from .partitions import partition, patches

Array = NDArray[np.float64]
Members = Mapping[str, Any]
"""The members of layers by name: ``"channel"``, ``"position"``, ``"neuron"``, an integer label for every neuron, or
boolean masks by name."""

CELLS = 16
"""Cells along each side into which positions are divided where there are more, so that few members are left."""


class Measure(Protocol):
    """The queries of a :class:`~nrm_plugin.RelevanceMeasure` that its mean joint relevance needs."""

    @property
    def sign(self) -> Tensor: ...
    def joints(self, layers: Any, over: Any = ...) -> list[Tensor]: ...
    def marginal(self, layer: Any, over: Any = ...) -> Any: ...
    def _tap(self, layer: Any) -> Tap: ...


@dataclass(frozen=True, eq=False)
class MeanJoints:
    """Mean joint relevance of the members of consecutive layers.

    Attributes:
        layers: Names of the layers, from the output to the input.
        members: The members of each layer: a kind of group, or an integer label for every neuron.
        joints: For each pair of consecutive layers, ``(members, members below)``.
        masses: For each layer the mass of each member, ``(samples, members)``, or ``(1, members)`` if only the mean is
            known.
        samples: Number of samples.
    """

    layers: tuple[str, ...]
    members: tuple[Over, ...]
    joints: tuple[Array, ...]
    masses: tuple[Array, ...]
    samples: int


def mean_joints(
    measures: Iterable[Measure], layers: Sequence[tuple[str, Any]], members: Members | None = None
) -> MeanJoints:
    """Computes the mean joint relevance of consecutive layers over all samples of measures.

    Args:
        measures: Measures of one or more samples.
        layers: Names of the layers, from the output to the input, and how the measures call them.
        members: The members of layers; by default channels, and cells of an image for the input.

    Raises:
        InputError: If there is no measure.
    """
    kinds: list[Over] = []
    totals: list[Array] = []
    masses: list[list[Array]] = [[] for _ in layers]
    for mu in measures:
        if not kinds:
            kinds = [_members(mu._tap(layer), name, members) for name, layer in layers]
        sums, batch = _of_batch(mu, [layer for _, layer in layers], kinds)
        totals = sums if not totals else [total + more for total, more in zip(totals, sums, strict=True)]
        for known, more in zip(masses, batch, strict=True):
            known.append(more)
    if not kinds:
        raise InputError("groups need at least one measure; the iterable is empty.")
    each = tuple(np.concatenate(parts) for parts in masses)
    count = len(each[0])
    return MeanJoints(tuple(n for n, _ in layers), tuple(kinds), tuple(t / count for t in totals), each, count)


def _of_batch(mu: Measure, layers: Sequence[Any], kinds: Sequence[Over]) -> tuple[list[Array], list[Array]]:
    """Returns the sums of the joint relevance over samples, and the mass of each member of each layer."""
    signs = mu.sign.double().cpu()
    matrices = mu.joints(layers, list(kinds)) if len(layers) > 1 else []
    sums = [_array(torch.einsum("n,nij->ij", signs, matrix.double().cpu())) for matrix in matrices]
    maps = mu.marginal(list(layers))
    masses = []
    for layer, kind in zip(layers, kinds, strict=True):
        labels = labels_of(mu._tap(layer), kind).reshape(-1)
        values = maps[layer].double().cpu().flatten(1) * signs[:, None]
        masses.append(_array(values.new_zeros(len(values), int(labels.max()) + 1).index_add_(1, labels, values)))
    return sums, masses


def _array(values: Tensor) -> Array:
    array: Array = values.numpy()
    return array


def _members(tap: Tap, name: str, members: Members | None) -> Over:
    """Returns the members of a layer."""
    given = (members or {}).get(name)
    if given is not None:
        return given if isinstance(given, str) else partition(tap, given, None).labels
    if name != "input" or len(tap.shape) < 3:
        return "channel"
    positions = list(tap.shape[1:])
    channel = positions.pop(tap.channel_dim % len(tap.shape) - 1)
    if math.prod(positions) <= CELLS**2:
        return "position"
    cells = patches(positions, [min(CELLS, size) for size in positions])
    return cells.unsqueeze(tap.channel_dim % len(tap.shape) - 1).expand(tap.shape[1:]) if channel else cells
