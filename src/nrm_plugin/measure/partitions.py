"""What a layer is cut into, and what the parts are called: channels, patches, superpixels, named regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import EventError, InputError
from ..recording.taps import Tap
from .groups import Over, check_over, labels_of

Names = Sequence[str] | Mapping[int, str]
Regions = Mapping[str, Tensor]
"""Boolean masks by name; neurons of no mask are the rest."""


@dataclass(frozen=True)
class Partition:
    """Groups of the neurons of one tap.

    Attributes:
        labels: Group of each neuron, ``tap.shape[1:]``.
        names: What each group is called.
        count: Number of groups; neurons with this label are in none.
    """

    labels: Tensor
    names: Callable[[int], str]
    count: int


def partition(tap: Tap, over: Over | Regions, names: Names | None) -> Partition:
    """The groups of a tap and what they are called.

    Args:
        tap: The tap.
        over: A kind of group, labels, or masks by name.
        names: Of the groups, by number; the numbers, or the coordinates of positions and neurons, by default.
    """
    if isinstance(over, Mapping):
        labels, known = _regions(tap, over), list(over)
        return Partition(labels, lambda group: known[group], len(known))
    check_over(over)
    labels = labels_of(tap, over)
    count = int(labels.max()) + 1 if labels.numel() else 0
    if isinstance(names, Mapping):
        return Partition(labels, lambda group: names.get(group, str(group)), count)
    if names is not None:
        given = list(names)
        return Partition(labels, lambda group: given[group] if group < len(given) else str(group), count)
    inner = list(tap.shape[1:])
    if over == "position" and len(inner) > 1:
        inner.pop(tap.channel_dim % len(tap.shape) - 1)
    if over in ("position", "neuron") and len(inner) > 1:
        return Partition(labels, lambda group: ",".join(map(str, np.unravel_index(group, inner))), count)
    return Partition(labels, str, count)


def _regions(tap: Tap, masks: Regions) -> Tensor:
    name = tap.names[0] if tap.names else "the tap"
    inner = tap.shape[1:]
    labels = torch.full(inner, len(masks), dtype=torch.long)
    if not masks:
        raise EventError(f"over= of {name!r} names no region.")
    for number, (key, mask) in enumerate(masks.items()):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise EventError(f"the region {key!r} of {name!r} must be a boolean tensor, one entry for each neuron.")
        try:
            region = mask.detach().cpu().expand(inner)
        except RuntimeError:
            raise EventError(
                f"the region {key!r} of shape {tuple(mask.shape)} does not broadcast to the neurons of {name!r}, "
                f"{tuple(inner)}."
            ) from None
        taken = labels[region] < len(masks)
        if bool(taken.any()):
            raise EventError(f"the region {key!r} of {name!r} shares {int(taken.sum())} neurons with one before it.")
        labels[region] = number
    return labels


def patches(size: Sequence[int], parts: Sequence[int] | int) -> Tensor:
    """Labels that cut a picture into patches, for ``over=``: numbered from 0, row by row.

    Args:
        size: Of the picture, such as ``(H, W)``, or ``(D, H, W)``.
        parts: Patches along each of these; one number for all.

    Returns:
        Integers of shape ``size``.

    Raises:
        InputError: More patches than pixels, or none.

    Examples:
        >>> patches((4, 4), 2)
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1],
                [2, 2, 3, 3],
                [2, 2, 3, 3]])
    """
    cuts = [parts] * len(size) if isinstance(parts, int) else list(parts)
    if len(cuts) != len(size) or not all(1 <= cut <= length for cut, length in zip(cuts, size, strict=False)):
        raise InputError(f"a picture of size {tuple(size)} has no {cuts} patches: give 1 to its size for each side.")
    labels = torch.zeros(tuple(size), dtype=torch.long)
    for dim, (cut, length) in enumerate(zip(cuts, size, strict=True)):
        view = [1] * len(size)
        view[dim] = -1
        labels = labels * cut + (torch.arange(length) * cut // length).view(view)
    return labels


__all__ = ["Names", "Partition", "Regions", "partition", "patches"]
