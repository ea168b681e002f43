"""The options of a flow, and what the neurons of each layer are summed over."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..dataset.images import shown
from ..measure.flow import GROUPS, ordered_taps, with_groups
from ..measure.layer_groups import Groups
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, patches
from .model_loading import LoadedModel
from .output_files import class_name
from .request import Request, RequestError, compared_with, explained_class

LISTED = re.compile(r"channel \d+( \+ \d+)?")
"""A name of a group that lists its largest channel, and the number of the others."""


@dataclass(frozen=True)
class FlowOptions:
    """Options of a flow figure.

    Attributes:
        top: Maximum number of channels of a layer.
        coverage: Fraction of the absolute mass of each layer that the shown channels must cover; None for no limit.
        patches: Patches of the image along each side.
        dark: Whether figures are for a dark background.
        width: Width of the figure in inches; None for the default.
        kind: File type of the figure.
        groups: Number of groups of channels of a layer, or a file of groups; None for single channels.
        minus: Class or image file of a second flow, to subtract; None for one flow.
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
    def count(self) -> int:
        """Number of groups to find."""
        return self.groups if isinstance(self.groups, int) else 0


def groups_of(
    loaded: LoadedModel, mu: RelevanceMeasure, request: Request, options: FlowOptions
) -> tuple[dict[str, Any], Mapping[str, Names]]:
    """Returns what the neurons of each layer are summed over, and the names of the groups.

    Raises:
        RequestError: If there are more patches than pixels, or the file holds no groups.
        NRMError: If groups do not fit the model.
    """
    height, width = mu.shape("input")[-2:]
    count = options.patches
    if count > min(height, width):
        raise RequestError(f"--patches {count} is more than the {height}×{width} pixels of the model's input.")
    over: dict[str, Any] = {"input": patches((height, width), count)}
    names: dict[str, Names] = {"input": patch_names(count), **_class_names(loaded, mu, request)}
    if options.groups is None:
        return over, names
    if isinstance(options.groups, int):
        over |= {layer: GROUPS for layer in request.layers if layer not in ("input", "output")}
    groups = _stored(options.groups) if isinstance(options.groups, Path) else None
    found, words = with_groups(mu, ordered_taps(mu, request.layers), over, names, options.count, groups)
    grouped = [layer for layer in found if layer not in ("input", "output") and not isinstance(found[layer], str)]
    return dict(found), dict(words or {}) | {layer: _short_names((words or {})[layer]) for layer in grouped}


def members_of(found: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """Returns the channels of each group, for each layer that is summed over groups of channels.

    Args:
        found: What the neurons of each layer are summed over, of :func:`groups_of`.
    """
    members = {}
    for layer, labels in found.items():
        if layer != "input" and isinstance(labels, Tensor):
            channels = labels.flatten(1)[:, 0] if labels.ndim > 1 else labels
            members[layer] = [
                torch.nonzero(channels == group).flatten().tolist() for group in range(int(labels.max()) + 1)
            ]
    return members


def _short_names(names: Names) -> dict[int, str]:
    """Returns numbers in place of names that list channels, which would not fit below a picture."""
    given = dict(names) if isinstance(names, Mapping) else dict(enumerate(names))
    return {number: f"group {number + 1}" if LISTED.fullmatch(name) else name for number, name in given.items()}


def patch_names(count: int) -> dict[int, str]:
    """Returns names of ``count`` × ``count`` patches as on a map: letters count columns, numbers count rows, from 1."""
    letters = [chr(65 + column % 26) * (1 + column // 26) for column in range(count)]
    return {number: f"{letters[number % count]}{number // count + 1}" for number in range(count**2)}


def _class_names(loaded: LoadedModel, mu: RelevanceMeasure, request: Request) -> dict[str, Names]:
    """Returns the names of the classes; a fused difference of classes is one number, named by the explained class."""
    count = mu.shape("output")[1:].numel()
    if count == 1 and compared_with(loaded, request, mu.outputs) is not None:
        target = explained_class(loaded, request.target, mu.outputs)
        return {"output": {0: class_name(loaded, target) or f"class {target}"}}
    return {"output": {number: class_name(loaded, number) or f"class {number}" for number in range(count)}}


def _stored(path: Path) -> Groups:
    try:
        return Groups.load(path)
    except OSError as error:
        raise RequestError(f"cannot read --groups {shown(path)}: {error.strerror or error}.") from error
