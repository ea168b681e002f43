"""Sink, bypass and variation of each tap (named tensor), computed from the sums accumulated in one pass.

The sink is the relevance absorbed above the tap, and the bypass that of walks around it. At each tap, ``mass + sink +
bypass = 1``. The three terms are accumulated independently, so their sum is a check of the computation.

Source: docs/measure.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..errors import NullEventError, brief, samples
from ..recording.places import Buffer
from ..recording.recording import Recording
from ..recording.taps import Tap
from .layer_taps import is_reached
from .totals import Totals

Kind = Literal["residual", "constants"]
"""Kind of absorbed mass: ``"residual"`` if a rule does not propagate it, ``"constants"`` if it ends at a constant."""


def check_kind(kind: object) -> None:
    """Raises :class:`ValueError` for an unknown kind of sink."""
    if kind not in (None, "residual", "constants"):
        raise ValueError(f"kind={brief(kind)} is unknown; choose None, 'residual' or 'constants'.")


def absorbed(totals: Totals, taps: Sequence[Tap], kind: Kind | None = None, absolute: bool = False) -> Tensor:
    """Returns the mass absorbed above at least one of the taps, as a tensor of shape ``(N,)``.

    Args:
        totals: The totals of a pass.
        taps: The taps above which absorbed mass is counted.
        kind: The kind of absorbed mass, or None for both.
        absolute: Whether to sum absolute values.
    """
    check_kind(kind)
    recording = totals.recording
    bits = 0
    for tap in taps:
        bits |= 1 << recording.taps.index[tap.place]
    masses = []
    for (vertex, its_kind), mass in (totals.absolute_sinks if absolute else totals.sinks).items():
        if kind in (None, its_kind) and recording.taps.marks.below_vertex[vertex] & bits:
            if mass is None:  # names are formatted only if needed, since this is slower than the pass
                raise recording.samples.error(recording.taps.name_at(vertex))
            masses.append(mass)
    return _sum(totals, masses)


def _sum(totals: Totals, masses: list[Tensor]) -> Tensor:
    """Sums masses of shape ``(N,)`` by one operation, since a plan traces and repeats every operation.

    The sum has at least the precision of the outputs, also if a layer computes in a lower one.
    """
    return torch.stack([totals.start.new_zeros(totals.recording.samples.count), *masses]).sum(0)


def bypassing(totals: Totals, tap: Tap) -> Tensor:
    """Returns the mass of the walks that neither cross a tap nor are absorbed above it, for each sample."""
    recording = totals.recording
    if not is_reached(recording, tap):
        return recording.samples.checked_sums(totals.start, "the output", recording.graph.output)
    bit = 1 << recording.taps.index[tap.place]
    masses = []
    marks = recording.taps.marks
    for edge, mass in totals.branches.items():
        if marks.below_vertex[edge.vertex] & bit and not marks.below_edge[edge.vertex][edge.number] & bit:
            masses.append(checked(recording, mass, "an edge"))
    return _sum(totals, masses)


def step_sinks(totals: Totals, kind: Kind | None = None) -> dict[str, Tensor]:
    """Returns the mass absorbed in each step, as tensors of shape ``(N,)``, keyed by step name."""
    check_kind(kind)
    recording = totals.recording
    sinks: dict[str, Tensor] = {}
    for (vertex, its_kind), value in reversed(totals.sinks.items()):
        if kind in (None, its_kind):
            name = recording.taps.name_at(vertex)
            mass = checked(recording, value, name)
            sinks[name] = sinks[name] + mass if name in sinks else mass.clone()
    return sinks


def tap_variation(totals: Totals, tap: Tap) -> Tensor:
    """Computes the tap variation ``Σ_j |μ(j)| + Σ|absorbed above| + |bypass|`` of each sample."""
    recording = totals.recording
    crossing = checked(recording, totals.absolute.get(tap.place), "the tap") if is_reached(recording, tap) else 0
    return crossing + absorbed(totals, [tap], absolute=True) + bypassing(totals, tap).abs()


def walk_variation(absolute: Totals, signed: Totals | None) -> Tensor:
    """Computes the walk variation ``Σ_w |μ(w)|`` of each sample.

    Args:
        absolute: Totals of a pass with the absolute values of all kernels.
        signed: Totals of an ordinary pass, by which the measure is conditioned on survival, or None.

    Raises:
        NullEventError: If no relevance of a sample survives.
    """
    total = surviving_mass(absolute)
    if signed is not None:
        survived = surviving_mass(signed)
        if not bool(survived.all()):
            raise NullEventError(
                "the walk variation cannot be conditioned on survival: no relevance reaches an input "
                f"({samples((survived == 0).tolist())}). Omit these samples, or call walk_variation() without "
                "surviving=True."
            )
        return total / survived.abs()
    for mass in absolute.sinks.values():
        total = total + checked(absolute.recording, mass, "a sink")
    return total


def surviving_mass(totals: Totals) -> Tensor:
    """Returns the mass of the walks that end at an input, for each sample."""
    recording = totals.recording
    ends, total = _last_vertices(recording), totals.start.new_zeros(recording.samples.count)
    for place, mass in totals.mass.items():
        if isinstance(place, Buffer) and place.vertex in ends:
            total = total + checked(recording, mass, "the input")
    return total


def _last_vertices(recording: Recording) -> set[int]:
    """Returns the vertices directly above a leaf."""
    vertices = recording.graph.vertices
    leaves = {number for number, vertex in enumerate(vertices) if vertex.leaf is not None}
    return {
        number
        for number, vertex in enumerate(vertices)
        if any(edge is not None and edge.vertex in leaves for edge in vertex.edges)
    }


def checked(recording: Recording, mass: Tensor | None, what: str) -> Tensor:
    """Returns a mass of shape ``(N,)``, or raises an error if it is unknown.

    Raises:
        FoldingError: If the mass is None because the samples cannot be distinguished within the tensor.
    """
    if mass is None:
        raise recording.samples.error(what)
    return mass
