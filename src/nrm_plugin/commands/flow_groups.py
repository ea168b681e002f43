"""Options of a flow and the grouping of the neurons in its layers."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import NRMError, printable
from ..measure.contiguous_groups import connected_parts
from ..measure.flow import ordered_taps
from ..measure.flow_graph import FlowGraph
from ..measure.group_search import find_groups
from ..measure.layer_groups import Groups
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, patches, segments
from ..plots.flow_notes import Counts, is_group
from ..plots.heatmaps import DPI
from .model_loading import LoadedModel
from .output_files import class_name
from .request import Request, RequestError, compared_with, explained_class

INPUT = "input"
Regions = Mapping[str, NDArray[np.bool_]]
"""Regions of the image, of shape ``(H, W)``, keyed by node."""
NARROW = 5.0
"""Figure width in inches below which the resolution is doubled."""
MOST_PATCHES = 16
"""Maximum number of image patches along each side for grouping without scikit-image."""
COMPACT = 40.0
"""Compactness of SLIC for few superpixels. Lower values would merge them to even fewer."""
LISTED = re.compile(r"channel \d+( \+ \d+)?")
"""Pattern for group names that state the largest channel and the number of other channels."""


def resolution(width: float | None) -> int:
    """Returns the resolution of a figure in dots per inch, doubled for narrow ones because their letters are small."""
    return 2 * DPI if width is not None and width < NARROW else DPI


@dataclass(frozen=True)
class FlowOptions:
    """Options of a flow figure.

    Attributes:
        top: Maximum number of channels per layer.
        coverage: Fraction of the absolute mass of each layer that its channels must cover, or None for no limit.
        patches: Number of image patches along each side.
        dark: Whether to plot for a dark background.
        width: Width of the figure in inches, or None for the default.
        kind: File type of the figure.
        groups: Number of groups of channels per layer, a file of groups, or None for single channels.
        minus: Class or image file of a second flow to subtract, or None.
    """

    top: int = 8
    coverage: float | None = None
    patches: int = 4
    dark: bool = False
    width: float | None = None
    kind: str = "png"
    groups: int | Path | None = None
    minus: str | None = None

    @property
    def dpi(self) -> int:
        """Resolution in dots per inch, see :func:`resolution`."""
        return resolution(self.width)

    @property
    def count(self) -> int:
        """Number of groups to compute, 0 for single channels or groups from a file."""
        return self.groups if isinstance(self.groups, int) else 0


@dataclass(frozen=True)
class Division:
    """Grouping of the neurons in each layer of a flow.

    Attributes:
        over: Groups of neurons keyed by layer. All other layers are grouped by channel.
        names: Names of the groups, keyed by layer.
        groups: Groups of channels or input regions, or None if they were not requested.
    """

    over: Mapping[str, Any]
    names: Mapping[str, Names]
    groups: Groups | None = None


def division(
    loaded: LoadedModel, mu: RelevanceMeasure, request: Request, options: FlowOptions, image: Tensor
) -> Division:
    """Groups the neurons in each layer of a flow.

    Args:
        loaded: The loaded model, with its preprocessing.
        mu: The measure for the image.
        request: The request, with the layers.
        options: Options of the flow figure.
        image: Image of shape ``(C, H, W)`` with values in [0, 1].

    Raises:
        RequestError: If there are more patches than pixels or if the file of groups cannot be read.
        InputError: If the file does not contain groups or if the groups do not match the model.
    """
    height, width = mu.shape(INPUT)[-2:]
    if options.patches > min(height, width):
        raise RequestError(f"--patches {options.patches} exceeds the {height}×{width} pixels of the model's input.")
    over: dict[str, Any] = {INPUT: patches((height, width), options.patches)}
    names = _class_names(loaded, mu, request)
    if options.groups is None:
        return Division(over, {INPUT: patch_names(options.patches), **names})
    groups = groups_of(mu, request.layers, options.groups, image, names)
    return Division(over | labels_of_groups(mu, request.layers, groups), names, groups)


def groups_of(
    mu: RelevanceMeasure, layers: Sequence[str], wanted: int | Path, image: Tensor, names: Mapping[str, Names]
) -> Groups:
    """Reads or computes the groups of each layer of a flow. Groups of the input consist of superpixels or patches.

    Args:
        mu: The measure to query.
        layers: The layers, in any order.
        wanted: Number of groups per layer, or a file of groups.
        image: Image of shape ``(C, H, W)`` with values in [0, 1].
        names: Names of the group members, keyed by layer.

    Raises:
        RequestError: If the file cannot be read.
        InputError: If the file does not contain groups or if the groups do not match the model.
    """
    if isinstance(wanted, Path):
        return _with_short_names(_stored(wanted))
    ordered = [layer for layer, _ in ordered_taps(mu, layers)]
    if INPUT not in ordered:
        return _with_short_names(find_groups(mu, ordered, wanted, names=names))
    members = _members_of_the_input(image)
    groups = _connected(mu, find_groups(mu, ordered, wanted, {INPUT: members}, names=names), members)
    if _count(groups) == 1:  # all parts of the image depend in the same way on the only neuron of the layer above
        counts = {layer: None if layer == INPUT else wanted for layer in ordered}
        groups = find_groups(mu, ordered, counts, {INPUT: _few_parts(image, wanted)}, names=names)
    return _with_short_names(groups).named({INPUT: [f"part {number}" for number in range(1, _count(groups) + 1)]})


def labels_of_groups(mu: RelevanceMeasure, layers: Sequence[str], groups: Groups) -> dict[str, Tensor]:
    """Returns the group of each neuron in the grouped layers. For the input, groups of pixels have shape ``(H, W)``."""
    labels = {layer: groups.over(mu, layer) for layer in layers if layer in groups.layers}
    if INPUT in labels and labels[INPUT].ndim > 2:
        labels[INPUT] = labels[INPUT].select(mu.channel_dim(INPUT) - 1, 0)
    return labels


def regions_of(graph: FlowGraph, over: Mapping[str, Any]) -> Regions:
    """Returns the region of each input group that a flow shows, as masks of shape ``(H, W)``, keyed by node.

    Args:
        graph: The flow whose input groups are located.
        over: Group labels keyed by layer. The labels of the input have shape ``(H, W)``.
    """
    patched = [node for node in graph.nodes if node.layer == INPUT and node.kind == "group"]
    return {node.key: (over[INPUT] == node.group).numpy() for node in patched}


def channel_counts(graph: FlowGraph, groups: Groups | None) -> Counts:
    """Returns the number of channels of each group of channels in a flow, keyed by node."""
    if groups is None:
        return {}
    sizes = {
        layer: torch.bincount(labels.flatten()).tolist()
        for layer, labels, kind in zip(groups.layers, groups.labels, groups.members, strict=True)
        if kind == "channel"
    }
    return {
        node.key: sizes[node.layer][node.group]
        for node in graph.nodes
        if node.layer in sizes and node.group is not None and is_group(node.label, node.layer)
    }


def _members_of_the_input(image: Tensor) -> Tensor:
    if find_spec("skimage") is not None:
        return segments(image)
    size = image.shape[-2:]
    return patches(size, min(MOST_PATCHES, *size))


def _connected(mu: RelevanceMeasure, groups: Groups, members: Tensor) -> Groups:
    """Makes each group of the input a connected region and numbers the groups by relevance."""
    number = groups.layers.index(INPUT)
    masses = mu.marginal(INPUT, over=members)[0].double().cpu()
    labels = connected_parts(groups.labels[number].cpu(), members.cpu(), masses.abs())
    sums = torch.zeros(int(labels.max()) + 1, dtype=masses.dtype).index_add(0, labels, masses)
    order = sums.abs().argsort(descending=True, stable=True)
    return replace(
        groups,
        labels=(*groups.labels[:number], order.argsort()[labels], *groups.labels[number + 1 :]),
        masses=(*groups.masses[:number], tuple(sums[order].tolist()), *groups.masses[number + 1 :]),
        kappas=tuple(
            math.nan if INPUT in pair else kappa
            for pair, kappa in zip(pairwise(groups.layers), groups.kappas, strict=True)
        ),
    )


def _few_parts(image: Tensor, count: int) -> Tensor:
    """Returns labels of about ``count`` superpixels or, if scikit-image is not installed, patches."""
    if find_spec("skimage") is not None:
        return segments(image, count, COMPACT)
    size = image.shape[-2:]
    return patches(size, min(max(1, round(count**0.5)), *size))


def _count(groups: Groups) -> int:
    """Returns the number of input groups."""
    return len(groups.names[groups.layers.index(INPUT)])


def _with_short_names(groups: Groups) -> Groups:
    """Replaces the names of groups that list channels with short ones that fit below a thumbnail.

    Names are unique: each layer has its own letter, starting at the input, as in A1, A2, …, B1, …
    """
    short = {
        layer: [number for number, name in enumerate(names) if LISTED.fullmatch(name)]
        for layer, names in zip(groups.layers, groups.names, strict=True)
    }
    named = [layer for layer in reversed(groups.layers) if short[layer]]
    letters = dict(zip(named, string.ascii_uppercase, strict=False))
    return groups.named(
        {layer: {number: f"{letters.get(layer, 'group ')}{number + 1}" for number in short[layer]} for layer in named}
    )


def patch_names(count: int) -> dict[int, str]:
    """Returns names of ``count`` × ``count`` patches: letters for columns, numbers from 1 for rows."""
    letters = [chr(65 + column % 26) * (1 + column // 26) for column in range(count)]
    return {number: f"{letters[number % count]}{number // count + 1}" for number in range(count**2)}


def _class_names(loaded: LoadedModel, mu: RelevanceMeasure, request: Request) -> dict[str, Names]:
    """Returns the names of the outputs. A fused difference is a single output, named after the explained class."""
    count = mu.shape("output")[1:].numel()
    if count == 1 and compared_with(loaded, request, mu.outputs) is not None:
        target = explained_class(loaded, request.target, mu.outputs)
        return {"output": {0: class_name(loaded, target) or f"class {target}"}}
    return {"output": {number: class_name(loaded, number) or f"class {number}" for number in range(count)}}


def _stored(path: Path) -> Groups:
    try:
        return Groups.load(path)
    except OSError as error:
        raise RequestError(f"cannot read --groups {printable(path)}: {error.strerror or error}.") from error
    except NRMError as error:
        raise RequestError(f"--groups {printable(path)}: {error}") from error
