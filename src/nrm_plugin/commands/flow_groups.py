"""The groups of a flow: found for one image, or read from a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from torch import Tensor

from ..measure.flow import ordered_taps
from ..measure.group_search import find_groups
from ..measure.layer_groups import Groups
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, segments

INPUT = "input"


def groups_of(
    mu: RelevanceMeasure, layers: Sequence[str], wanted: int | Path, image: Tensor, names: Mapping[str, Names]
) -> Groups:
    """Returns the groups of the layers of a flow.

    Args:
        mu: The measure.
        layers: The layers, in any order.
        wanted: The number of groups of a layer, or the file of groups.
        image: The image, ``(C, H, W)`` in [0, 1].
        names: Names of members, by layer.

    Raises:
        InputError: If the file holds no groups, or they do not fit.
    """
    if isinstance(wanted, Path):
        return Groups.load(wanted)
    ordered = [layer for layer, _ in ordered_taps(mu, layers)]
    has_segments = INPUT in ordered and find_spec("skimage") is not None
    members = {INPUT: segments(image)} if has_segments else None
    groups = find_groups(mu, ordered, wanted, members, names=names)
    if INPUT not in ordered:
        return groups
    count = len(groups.names[groups.layers.index(INPUT)])
    return groups.named({INPUT: [f"part {number}" for number in range(1, count + 1)]})


def labels_of_groups(mu: RelevanceMeasure, layers: Sequence[str], groups: Groups) -> dict[str, Tensor]:
    """Returns the group of each neuron of each layer that has groups; for the input, of each pixel, ``(H, W)``."""
    labels = {layer: groups.over(mu, layer) for layer in layers if layer in groups.layers}
    if INPUT in labels and labels[INPUT].ndim > 2:
        labels[INPUT] = labels[INPUT].select(mu.channel_dim(INPUT) - 1, 0)
    return labels
