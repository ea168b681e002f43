"""Named groups of neurons in a layer: channels, patches, superpixels, named regions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import EventError, InputError, brief, extra
from ..recording.taps import Tap
from .groups import Over, check_over, labels_of

Names = Sequence[str] | Mapping[int, str]
Regions = Mapping[str, Tensor]
"""Boolean masks keyed by region name. Neurons outside all masks form the rest."""


@dataclass(frozen=True)
class Partition:
    """Partition of the neurons of one layer (tap) into named groups.

    Attributes:
        labels: Group of each neuron, of shape ``tap.shape[1:]``, or ``count`` for neurons outside all groups.
        names: Function that returns the name of a group, given its index.
        count: Number of groups.
        are_channels: Whether the groups are the channels.
    """

    labels: Tensor
    names: Callable[[int], str]
    count: int
    are_channels: bool = False


def partition(tap: Tap, over: Over | Regions, names: Names | None) -> Partition:
    """Partitions the neurons of a tap into named groups.

    Args:
        tap: Tap whose neurons are grouped.
        over: A kind of group, integer labels, or masks keyed by name.
        names: Names of the groups, keyed by index; by default, their indices or, for positions and neurons,
            coordinates.
    """
    if isinstance(over, Mapping):
        return Partition(_region_labels(tap, over), list(over).__getitem__, len(over))
    check_over(over)
    labels = labels_of(tap, over)
    count = int(labels.max()) + 1 if labels.numel() else 0
    is_channel = isinstance(over, str) and over == "channel"
    return Partition(labels, _namer(tap, over, names), count, is_channel)


def _namer(tap: Tap, over: Over, names: Names | None) -> Callable[[int], str]:
    """Returns a function that maps the index of a group to its name."""
    if names is not None:
        given = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
        return lambda group: given.get(group, str(group))
    inner = list(tap.shape[1:])
    if isinstance(over, str) and over == "position" and len(inner) > 1:
        inner.pop(tap.channel_dim % len(tap.shape) - 1)
    if isinstance(over, str) and over in ("position", "neuron") and len(inner) > 1:
        return lambda group: ",".join(map(str, np.unravel_index(group, inner)))
    return str


def _region_labels(tap: Tap, masks: Regions) -> Tensor:
    name = tap.names[0] if tap.names else "the tap"
    inner = tap.shape[1:]
    labels = torch.full(inner, len(masks), dtype=torch.long)
    if not masks:
        raise EventError(f"over= of {brief(name)} contains no region. Give at least one mask.")
    for number, (key, mask) in enumerate(masks.items()):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise EventError(
                f"the region {brief(key)} of {brief(name)} must be a boolean tensor with one entry per neuron."
            )
        try:
            region = mask.detach().cpu().expand(inner)
        except RuntimeError:
            raise EventError(
                f"the region {brief(key)} of shape {tuple(mask.shape)} does not broadcast to the neurons of "
                f"{brief(name)}, {tuple(inner)}."
            ) from None
        taken = labels[region] < len(masks)
        if bool(taken.any()):
            raise EventError(
                f"the region {brief(key)} of {brief(name)} shares {int(taken.sum())} neurons with an earlier region."
            )
        labels[region] = number
    return labels


def patches(size: Sequence[int], parts: Sequence[int] | int) -> Tensor:
    """Returns labels that divide an image into rectangular patches, for use as ``over=``.

    Patches are numbered from 0, row by row.

    Args:
        size: Size of the image, such as ``(H, W)`` or ``(D, H, W)``.
        parts: Number of patches along each dimension; a single number applies to all dimensions.

    Returns:
        Integer labels of shape ``size``.

    Raises:
        InputError: If the number of patches along a dimension is less than one or exceeds its size.

    Examples:
        >>> patches((4, 4), 2)
        tensor([[0, 0, 1, 1],
                [0, 0, 1, 1],
                [2, 2, 3, 3],
                [2, 2, 3, 3]])
    """
    cuts = [parts] * len(size) if isinstance(parts, int) else list(parts)
    if len(cuts) != len(size) or not all(1 <= cut <= length for cut, length in zip(cuts, size, strict=False)):
        raise InputError(
            f"an image of size {tuple(size)} has no {cuts} patches: give a number between 1 and the size for each "
            "dimension."
        )
    labels = torch.zeros(tuple(size), dtype=torch.long)
    for dim, (cut, length) in enumerate(zip(cuts, size, strict=True)):
        view = [1] * len(size)
        view[dim] = -1
        labels = labels * cut + (torch.arange(length) * cut // length).view(view)
    return labels


def segments(image: Tensor, count: int = 64, compactness: float = 10.0) -> Tensor:
    """Returns labels that divide an image into superpixels, for use as ``over=`` or ``members=``.

    Args:
        image: Image of shape ``(C, H, W)`` with values in [0, 1].
        count: Approximate number of superpixels.
        compactness: Weight of spatial proximity relative to color similarity. Larger values give more compact
            superpixels.

    Returns:
        Integer labels of shape ``(H, W)``, starting from 0.

    Raises:
        InputError: If the image is not three-dimensional.
        MissingExtraError: If scikit-image is not installed.

    Source: SLIC, Achanta et al., IEEE TPAMI 2012.
    """
    if image.ndim != 3:
        raise InputError(f"superpixels are computed for one image (C, H, W), got shape {tuple(image.shape)}.")
    pixels = image.detach().cpu().double().clamp(0, 1).movedim(0, -1).numpy()
    slic = extra("skimage.segmentation", "segments").slic
    labels = slic(pixels, n_segments=count, compactness=compactness, start_label=0, convert2lab=pixels.shape[-1] == 3)
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1].reshape(labels.shape)).long()


__all__ = ["Names", "Partition", "Regions", "partition", "patches", "segments"]
