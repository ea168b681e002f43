"""Joint relevance between the members (channels, positions) of consecutive layers, averaged over samples."""

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
from .groups import Over
from .joint_sketches import PairJoints
from .partitions import partition, patches

Array = NDArray[np.float64]
Members = Mapping[str, Any]
"""Members of each layer, keyed by layer name: ``"channel"``, ``"position"``, ``"neuron"``, an integer label for
every neuron, or boolean masks keyed by name."""

CELLS = 16
"""Maximum number of cells along each side of the grid that groups positions, to limit the number of members."""


class Measure(Protocol):
    """Protocol for the methods of :class:`~nrm_plugin.RelevanceMeasure` that this module uses."""

    @property
    def sign(self) -> Tensor: ...
    def joints(self, layers: Any, over: Any = ...) -> list[Tensor]: ...
    def _tap(self, layer: Any) -> Tap: ...


@dataclass(frozen=True, eq=False)
class MeanJoints:
    """Mean joint relevance of the members (channels, positions) of consecutive layers.

    Attributes:
        layers: Names of the layers, from the output to the input.
        members: The members of each layer: a kind of group, or an integer label for every neuron.
        joints: Mean joint relevance of each pair of consecutive layers, of shape ``(members, members below)``.
        masses: Mass of each member in each layer, of shape ``(samples, members)``, or ``(1, members)`` if only the mean
            is known.
        samples: Number of samples.
        are_exact: Whether the joint relevance of each pair is exact rather than an estimate.
    """

    layers: tuple[str, ...]
    members: tuple[Over, ...]
    joints: tuple[Array, ...]
    masses: tuple[Array, ...]
    samples: int
    are_exact: tuple[bool, ...] = ()


def mean_joints(
    measures: Iterable[Measure], layers: Sequence[tuple[str, Any]], members: Members | None = None
) -> tuple[MeanJoints, PairJoints | None]:
    """Computes the mean joint relevance of consecutive layers over all samples of the given measures.

    Args:
        measures: Measures with one or more samples each.
        layers: Pairs (name, layer), from the output to the input.
        members: The members of each layer; by default its channels or, for the input, grid cells of the image.

    Returns:
        The mean joint relevance, and an object that computes the joint relevance of other groups in these layers; None
        if more than one measure is given.

    Raises:
        InputError: If no measure is given.
    """
    kinds: list[Over] = []
    totals: list[Array] = []
    exact = [True] * (len(layers) - 1)
    masses: list[list[Array]] = [[] for _ in layers]
    source: PairJoints | None = None
    for number, mu in enumerate(measures):
        if not kinds:
            kinds = [_members(mu._tap(layer), name, members) for name, layer in layers]
        joints = PairJoints(mu, [layer for _, layer in layers], kinds)
        source = None if number else joints
        parts = [joints.of_members(pair) for pair in range(len(layers) - 1)]
        sums = [signed_sum(mu, matrix) for matrix, _ in parts]
        exact = [before and now for before, (_, now) in zip(exact, parts, strict=True)]
        totals = sums if not totals else [total + more for total, more in zip(totals, sums, strict=True)]
        signs = mu.sign.double().cpu()[:, None]
        for place, known in enumerate(masses):
            known.append(_array(joints.masses(place).double().cpu() * signs))
    if not kinds:
        raise InputError("find_groups needs at least one measure, but the iterable is empty.")
    each = tuple(np.concatenate(parts) for parts in masses)
    count = len(each[0])
    means = tuple(total / count for total in totals)
    averages = MeanJoints(tuple(name for name, _ in layers), tuple(kinds), means, each, count, tuple(exact))
    return averages, source


def signed_sum(mu: Measure, matrix: Tensor) -> Array:
    """Sums joint relevance of shape ``(N, upper, lower)`` over samples, multiplied by the sign of each sample."""
    return _array(torch.einsum("n,nij->ij", mu.sign.double().cpu(), matrix.double().cpu()))


def _array(values: Tensor) -> Array:
    array: Array = values.numpy()
    return array


def _members(tap: Tap, name: str, members: Members | None) -> Over:
    """Returns the given members of a layer, or the default members."""
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
