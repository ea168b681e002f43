"""Reference examples cropped to the receptive field of a channel, with masks of the relevant pixels."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm
from zennit.core import Composite

from ..composites import Uncovered, normalize
from ..errors import InputError
from ..events.event import Event, at
from ..imports import renamed_arguments
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..measure.reconstruction import Box, receptive_fields
from ..model.devices import by_sample
from .evaluation import device_of
from .examples import References, ReferencesError

MASK_THRESHOLD = 0.2
"""Mask threshold, as a fraction of the smoothed heat map's maximum."""
SMOOTHING = 1 / 60
"""Standard deviation of the smoothing kernel, as a fraction of the longer image side."""
PROBE_BATCH = 8
"""Number of positions per batch when computing receptive fields."""


class IndexableDataset(Protocol):
    """Dataset whose samples are accessible by index."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Crop:
    """Cropped reference example.

    Attributes:
        sample: Index of the sample in the dataset.
        value: Relevance or activation of the group.
        target: The explained class.
        box: Receptive field of the position with the largest value, as ``(top, left, bottom, right)``, where ``bottom``
            and ``right`` are exclusive.
        image: The cropped image, of shape ``(C, h, w)``.
        heat: Joint relevance of each pixel with the group, summed over the color channels, of shape ``(h, w)``.
        mask: Mask of the relevant pixels, of shape ``(h, w)``.
    """

    sample: int
    value: float
    target: int
    box: Box
    image: Tensor
    heat: Tensor
    mask: Tensor


@renamed_arguments(found="references", picture="to_image")
def crops(
    model: nn.Module,
    data: IndexableDataset,
    references: References,
    groups: Sequence[int | str] | None = None,
    k: int | None = None,
    *,
    events: Mapping[str, Event] | None = None,
    layer: str | None = None,
    against: Any = None,
    whole: bool = False,
    to_image: Callable[[Tensor], Tensor] | None = None,
    composite: Composite | None = None,
    residual: Residual | None = None,
    gain_limit: float | None = None,
    uncovered: Uncovered | None = None,
    show_progress: bool = False,
) -> dict[int | str, list[Crop]]:
    r"""Crops reference examples to receptive fields and computes their joint heat maps.

    The heat map of a channel is :math:`\mu(\text{pixel} \cap \text{channel})` for the explained target. The mask
    selects the pixels at which the smoothed heat map is at least 0.2 times its maximum. If the total relevance within
    the crop is negative, the sign of the heat map is reversed first.

    Args:
        model: The network that was explained.
        data: Indexable dataset of images of shape ``(C, H, W)``, or of pairs ``(image, label)``.
        references: The references to crop, either of one layer or of events.
        groups: Groups to show. Defaults to all groups.
        k: Number of crops per group. Defaults to all references.
        events: Events keyed by name; required for references of events.
        layer: Layer of the channels, if it differs from the name of the references.
        against: As in the search for the references.
        whole: Whether to return whole images. This skips the computation of receptive fields, which takes most of the
            time for large networks: about thirty forward passes in double precision per distinct position.
        to_image: Function that converts a model input to an image with values in [0, 1], such as the inverse
            normalization.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.
        show_progress: Whether to show a progress bar.

    Returns:
        Crops keyed by group, in decreasing order of value.

    Raises:
        ReferencesError: If a group has no references or if an event is missing.
        InputError: If the samples are not images.

    Examples:
        >>> from nrm_plugin.dataset.example_search import find_references
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> data = torch.utils.data.TensorDataset(torch.rand(20, 1, 8, 8), torch.randint(2, (20,)))
        >>> references = find_references(net, data, ["0"], k=3)
        >>> crops(net, data, references.of("0"), [2])[2][0].image.shape
        torch.Size([1, 3, 3])

    Source: after the reference samples of Achtibat et al. (2023); the receptive field and the mask are new in this
    package.
    """
    rules = normalize(composite, residual, gain_limit, uncovered)
    layer = layer or references.layer or references.name
    fields = _ReceptiveFields(model, layer, whole or events is not None)
    result: dict[int | str, list[Crop]] = {}
    for group in tqdm(references.groups if groups is None else groups, disable=not show_progress, unit="group"):
        row, samples = references.row(group), references.of(group)[:k]
        result[group] = []
        if not samples:
            continue
        event = _event(group, events, layer)
        images = torch.stack([_image(data, sample) for sample in samples]).to(device_of(model))
        targets = references.targets[row, : len(samples)]
        target = targets.tolist() if bool((targets >= 0).all()) else None
        mu = RelevanceMeasure(model, images, target, composite=rules, against=against)
        heat = mu.marginal("input", joint=event).sum(1)
        heat = (by_sample(mu.sign, heat) * heat).cpu()
        positions = references.positions[row, : len(samples)]
        if bool((positions < 0).any()) and not fields.whole and isinstance(group, int):
            positions = _peaks(mu, layer, group)
        boxes = fields.of(mu, images, positions)
        shown = images.cpu() if to_image is None else torch.stack([to_image(image) for image in images.cpu()])
        columns = zip(samples, references.values[row].tolist(), targets.tolist(), boxes, shown, heat, strict=False)
        result[group] = [_crop(*column) for column in columns]
    return result


def _event(group: int | str, events: Mapping[str, Event] | None, layer: str) -> Event:
    if events is None and isinstance(group, int):
        return at(layer).channel(group)
    if events is None or group not in events:
        raise ReferencesError(f"{group!r} is not a channel: pass the event with this name, events={{{group!r}: …}}.")
    return events[str(group)]


def _image(data: IndexableDataset, index: int) -> Tensor:
    sample = data[index]
    image = sample[0] if isinstance(sample, (tuple, list)) else sample
    if not isinstance(image, Tensor) or image.ndim != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"sample {index} must be an image (C, H, W) or (image, label), got {got}.")
    return image


def _peaks(mu: RelevanceMeasure, layer: str, group: int) -> Tensor:
    """Returns the position of a channel's largest relevance in each sample, as a tensor of shape ``(N,)``."""
    values = mu.marginal(layer).movedim(mu.channel_dim(layer), 1)[:, group].reshape(mu.batch, -1)
    return (by_sample(mu.sign, values) * values).argmax(1).cpu()


def _crop(sample: int, value: float, target: int, box: Box, image: Tensor, heat: Tensor) -> Crop:
    top, left, bottom, right = box
    part = heat[top:bottom, left:right]
    mask = relevance_mask(heat if float(part.sum()) >= 0 else -heat, MASK_THRESHOLD)[top:bottom, left:right]
    return Crop(sample, value, target, box, image[:, top:bottom, left:right], part, mask)


def relevance_mask(heat: Tensor, share: float) -> Tensor:
    """Returns a mask of the pixels at which the smoothed heat map reaches the fraction ``share`` of its maximum."""
    sigma = max(heat.shape) * SMOOTHING
    size = 2 * math.ceil(2 * sigma) + 1
    size = min(size, 2 * min(heat.shape) - 1)
    smooth = heat.clamp(min=0)
    if sigma >= 0.5 and size > 1:
        smooth = gaussian_blur(smooth[None], [size, size], [sigma, sigma])[0]
    largest = smooth.max()
    return smooth >= share * largest if bool(largest > 0) else torch.ones_like(heat, dtype=torch.bool)


class _ReceptiveFields:
    """Cache of the receptive fields of positions in a layer."""

    def __init__(self, model: nn.Module, layer: str, whole: bool) -> None:
        self.model, self.layer, self.whole = model, layer, whole
        self._known: dict[int, Box] = {}

    def of(self, mu: RelevanceMeasure, images: Tensor, positions: Tensor) -> list[Box]:
        height, width = images.shape[-2:]
        if self.whole:
            return [(0, 0, height, width)] * len(images)
        unknown = [int(position) for position in torch.unique(positions) if int(position) not in self._known]
        for start in range(0, len(unknown), PROBE_BATCH):
            part = unknown[start : start + PROBE_BATCH]
            shape, dim = mu.shape(self.layer), mu.channel_dim(self.layer)
            inner = [size for number, size in enumerate(shape) if number not in (0, dim)]
            mask = torch.zeros(len(part), math.prod(inner), dtype=torch.bool)
            mask[torch.arange(len(part)), torch.tensor(part)] = True
            mask = mask.view(len(part), *inner).unsqueeze(dim)
            boxes = receptive_fields(self.model, images[:1].expand(len(part), -1, -1, -1), self.layer, mask)
            for position, box in zip(part, boxes, strict=True):
                self._known[position] = box if box[2] > box[0] and box[3] > box[1] else (0, 0, height, width)
        return [self._known[int(position)] for position in positions]


__all__ = ["Crop", "crops"]
