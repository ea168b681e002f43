"""Relevance of every neuron of one or several recorded tensors: marginal, joint with events, or conditional on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..recording.recording import Recording
from ..recording.taps import Tap
from .conditions import divided
from .event_masses import EventResult
from .totals import Totals


def separate_maps(totals: Totals, taps: Sequence[Tap]) -> list[Tensor]:
    """Returns ``μ(j)`` for every neuron ``j`` of each tap, as one tensor of shape ``(N, *shape)`` per tap.

    The tensors share no memory. In a pass, the taps before and after a step share memory if the step does not change
    the relevance.
    """
    used = {_storage(totals.start)}
    maps = []
    for tap in taps:
        values = totals.relevance(tap)
        memory = _storage(values)
        maps.append(copied(values) if memory in used else values)
        used.add(memory)
    return maps


def _storage(values: Tensor) -> int:
    """Returns the identity of a tensor's storage. Reading its address instead would end a lazy copy and change it."""
    return int(values.untyped_storage()._cdata)


def copied(values: Tensor) -> Tensor:
    """Copies a tensor. The copy is made lazily, on the first write, if torch supports this on the device."""
    lazily = getattr(torch, "_lazy_clone", None)
    copy: Tensor = values.clone() if lazily is None or values.device.type != "cpu" else lazily(values)
    return copy


def event_maps(
    recording: Recording, results: Sequence[EventResult], taps: Sequence[Tap], is_given: bool
) -> list[Tensor]:
    """Returns ``μ(j & event)`` or ``μ(j given event)`` for every neuron ``j`` of each tap and each of ``E`` events.

    Args:
        recording: The recording of the forward pass.
        results: The result of each event, with one map per tap.
        taps: Taps at which relevance is read.
        is_given: Whether to divide by the mass of the event.

    Returns:
        One tensor of shape ``(E, N, *shape)`` per tap.
    """
    stacks = []
    for number, tap in enumerate(taps):
        rows = [divided(result.maps[number], result.mass) if is_given else result.maps[number] for result in results]
        stacks.append(torch.stack(rows) if rows else recording.output.new_zeros((0, *tap.shape)))
    return stacks
