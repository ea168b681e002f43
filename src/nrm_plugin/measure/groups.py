"""Groups of the neurons of one tap: channels, positions, single neurons, or arbitrary labels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import EventError, brief
from ..recording.taps import Tap

Over = str | Tensor
"""Grouping of neurons: ``"channel"``, ``"position"``, ``"neuron"``, or an integer label for every neuron."""

KINDS = ("channel", "position", "neuron")


def labels_of(tap: Tap, over: Over) -> Tensor:
    """Returns the group index of every neuron of a tap as an integer tensor of shape ``tap.shape[1:]`` on the CPU.

    Raises:
        EventError: If the group labels in ``over`` are not nonnegative integers or do not match the shape of the tap.
    """
    inner = tap.shape[1:]
    if isinstance(over, Tensor):
        return _own_labels(tap, over)
    if over == "neuron" or not inner:
        return torch.arange(inner.numel()).reshape(inner)
    dim = tap.channel_dim % len(tap.shape) - 1
    if over == "channel":
        view = [1] * len(inner)
        view[dim] = -1
        return torch.arange(inner[dim]).view(view).expand(inner)
    rest = [1 if at == dim else size for at, size in enumerate(inner)]
    return torch.arange(math.prod(rest)).reshape(rest).expand(inner)


def _own_labels(tap: Tap, over: Tensor) -> Tensor:
    inner = tap.shape[1:]
    if over.is_floating_point() or over.is_complex() or over.dtype == torch.bool:
        raise EventError(f"over= takes integer labels, got {over.dtype}. Use labels.long().")
    try:
        labels = over.detach().cpu().long().expand(inner)
    except RuntimeError:
        labels = None
    if labels is None or not labels.numel() or int(labels.min()) < 0:
        raise EventError(
            f"over= must have a non-negative label for every neuron of {tap.names[0] if tap.names else 'the tap'!r}, "
            f"in a shape that broadcasts to {tuple(inner)}; got shape {tuple(over.shape)}. Give the rest its own label."
        )
    return labels


def check_over(over: Any) -> None:
    """Raises an error if ``over`` is neither a known grouping nor a tensor."""
    if not isinstance(over, Tensor) and over not in KINDS:
        raise ValueError(f"over={brief(over)} is unknown; choose 'channel', 'position', 'neuron', or integer labels.")


def over_each(over: Over | Sequence[Over], count: int) -> list[Over]:
    """Expands ``over`` to a list with one grouping per layer.

    Raises:
        ValueError: If a list has the wrong length.
    """
    kinds = [over] * count if isinstance(over, (str, Tensor)) else list(over)
    if len(kinds) != count:
        raise ValueError(f"over= has {len(kinds)} entries for {count} layers; give one, or one for each.")
    return kinds


def pair_of(over: Any) -> tuple[Over, Over]:
    """Returns the groupings of the upper and the lower tap, given as a pair or as one value for both."""
    pair = over if isinstance(over, tuple) and len(over) == 2 else (over, over)
    for one in pair:
        check_over(one)
    return pair


def summed(values: Tensor, tap: Tap, over: Over) -> Tensor:
    """Sums values of shape ``(…, N, *shape)`` of a tap within each group.

    Returns:
        A tensor of shape ``(…, N, C)`` for channels, ``(…, N, *positions)`` for positions, or ``(…, N, groups)`` for
        labels. For neurons, the values themselves.
    """
    check_over(over)
    lead = values.ndim - len(tap.shape)
    if isinstance(over, Tensor):
        return by_label(values.flatten(lead + 1), labels_of(tap, over))
    if over == "neuron":
        return values
    channels = {lead + tap.channel_dim % len(tap.shape)}
    inner = set(range(lead + 1, values.ndim))
    rest = sorted(inner - channels if over == "channel" else inner & channels)
    return values.sum(rest) if rest else values


def by_label(values: Tensor, labels: Tensor) -> Tensor:
    """Sums values of shape ``(…, neurons)`` within each group. Returns shape ``(…, groups)``."""
    flat = labels.reshape(-1).to(values.device)
    total = values.new_zeros((*values.shape[:-1], int(labels.max()) + 1))
    return total.index_add_(-1, flat, values)
