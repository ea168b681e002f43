"""What is shown of reference examples: the part of a picture that a channel sees, and what carries the relevance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from zennit.core import Composite

from ..composites import Uncovered, normalize
from ..errors import InputError
from ..events.event import Event, at
from ..kernels.normalization import Residual
from ..measure.measure import RelevanceMeasure
from ..measure.reconstruction import Box, receptive_fields
from .examples import References, ReferencesError

VISIBLE = 0.2
"""Share of the largest value of the smoothed heat map from which on a pixel counts as relevant."""
SMOOTH = 1 / 60
"""Standard deviation of the smoothing, as a share of the longer side of the picture."""
PROBED = 8
"""Positions whose receptive fields are sought at once: each takes four runs."""


class Pictures(Protocol):
    """A data set whose samples can be read by number."""

    def __getitem__(self, index: int, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class Crop:
    """One reference example.

    Attributes:
        sample: Its number in the data set.
        value: What it was ranked by.
        target: What is explained of it.
        box: Receptive field of the strongest position, ``(top, left, bottom, right)``, the last two exclusive.
        image: The picture within the box, ``(C, h, w)``.
        heat: Joint relevance of pixel and group, ``(h, w)``, summed over colours.
        mask: Which pixels carry the relevance, ``(h, w)``.
    """

    sample: int
    value: float
    target: int
    box: Box
    image: Tensor
    heat: Tensor
    mask: Tensor


def crops(
    model: nn.Module,
    data: Pictures,
    found: References,
    groups: Sequence[int | str] | None = None,
    k: int | None = None,
    *,
    events: Mapping[str, Event] | None = None,
    layer: str | None = None,
    whole: bool = False,
    picture: Callable[[Tensor], Tensor] | None = None,
    composite: Composite | None = None,
    residual: Residual | None = None,
    gain_limit: float | None = None,
    uncovered: Uncovered | None = None,
) -> dict[int | str, list[Crop]]:
    r"""Crops of reference examples, with their conditional heat maps.

    The heat map of a channel is :math:`\mu(\text{pixel} \cap \text{channel})`, of the target that was explained. The
    mask holds where it, smoothed, is above 0.2 of its largest value; for a channel that speaks against the target, of
    its most negative one.

    Args:
        model: The network.
        data: The samples by number, as pictures ``(C, H, W)`` or pairs of these and labels.
        found: The references.
        groups: Which of its groups; all by default.
        k: How many of each; all by default.
        events: The events, for references of events.
        layer: The layer whose channels they are, where the references are called otherwise.
        whole: Show whole pictures, and spare the search for receptive fields. Those of a large net take longer than
            all else: each distinct position is sought by about thirty runs of the net in double precision.
        picture: What makes the picture that is shown, in [0, 1], of the one that the model gets, such as the inverse
            of its normalization.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As there.
        gain_limit: As there.
        uncovered: As there.

    Returns:
        Crops of each group, the best first.

    Raises:
        ReferencesError: A group that there are no references of, or an event that is not given.
        InputError: Samples that are no pictures.

    Examples:
        >>> from nrm_plugin.dataset.maximization import find_references
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
        >>> data = torch.utils.data.TensorDataset(torch.rand(20, 1, 8, 8), torch.randint(2, (20,)))
        >>> found = find_references(net, data, ["0"], k=3)
        >>> crops(net, data, found.of("0"), [2])[2][0].image.shape
        torch.Size([1, 3, 3])

    Source: after the reference samples of Achtibat et al. (2023); the receptive field and the mask are ours.
    """
    rules = normalize(composite, residual, gain_limit, uncovered)
    asked = list(found.groups if groups is None else groups)
    place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    layer = layer or found.layer or found.name
    boxes = _Boxes(model, layer, whole or events is not None)
    result: dict[int | str, list[Crop]] = {}
    for group in asked:
        row = found.row(group)
        samples = found.of(group)[:k]
        if not samples:
            result[group] = []
            continue
        event = _event(group, events, layer)
        images = torch.stack([_picture(data, sample) for sample in samples]).to(place)
        targets = found.targets[row, : len(samples)]
        mu = RelevanceMeasure(model, images, targets.tolist() if bool((targets >= 0).all()) else None, composite=rules)
        heat = mu.marginal("input", joint=event).sum(1).cpu()
        positions = found.positions[row, : len(samples)]
        if bool((positions < 0).any()) and not boxes.whole and isinstance(group, int):
            positions = _strongest(mu, layer, group)
        fields = boxes.of(mu, images, positions)
        shown = images.cpu() if picture is None else torch.stack([picture(image) for image in images.cpu()])
        values = found.values[row].tolist()
        result[group] = [
            _crop(samples[at], values[at], int(targets[at]), fields[at], shown[at], heat[at])
            for at in range(len(samples))
        ]
    return result


def _event(group: int | str, events: Mapping[str, Event] | None, layer: str) -> Event:
    if events is None and isinstance(group, int):
        return at(layer).channel(group)
    if events is None or group not in events:
        raise ReferencesError(f"{group!r} is no channel: give the event of this name, events={{{group!r}: …}}.")
    return events[str(group)]


def _picture(data: Pictures, sample: int) -> Tensor:
    found = data[sample]
    image = found[0] if isinstance(found, (tuple, list)) else found
    if not isinstance(image, Tensor) or image.ndim != 3:
        got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"sample {sample} must be a picture (C, H, W), or a pair of it and a label; got {got}.")
    return image


def _strongest(mu: RelevanceMeasure, layer: str, group: int) -> Tensor:
    """Where the channel has its largest relevance, ``(N,)``."""
    values = mu.marginal(layer).movedim(mu.channel_dim(layer), 1)[:, group]
    return values.reshape(len(values), -1).argmax(1).cpu()


def _crop(sample: int, value: float, target: int, box: Box, image: Tensor, heat: Tensor) -> Crop:
    top, left, bottom, right = box
    part = heat[top:bottom, left:right]
    mask = relevant(heat if float(part.sum()) >= 0 else -heat, VISIBLE)[top:bottom, left:right]
    return Crop(sample, value, target, box, image[:, top:bottom, left:right], part, mask)


def relevant(heat: Tensor, share: float) -> Tensor:
    """Where a smoothed heat map ``(H, W)`` is above a share of its largest value; all where nothing is positive."""
    sigma = max(heat.shape) * SMOOTH
    size = 2 * math.ceil(2 * sigma) + 1
    size = min(size, 2 * min(heat.shape) - 1)
    smooth = heat.clamp(min=0)
    if sigma >= 0.5 and size > 1:
        smooth = gaussian_blur(smooth[None], [size, size], [sigma, sigma])[0]
    largest = smooth.max()
    return smooth >= share * largest if bool(largest > 0) else torch.ones_like(heat, dtype=torch.bool)


class _Boxes:
    """Receptive fields of positions of a layer, each sought once."""

    def __init__(self, model: nn.Module, layer: str, whole: bool) -> None:
        self.model, self.layer, self.whole = model, layer, whole
        self._known: dict[int, Box] = {}

    def of(self, mu: RelevanceMeasure, images: Tensor, positions: Tensor) -> list[Box]:
        height, width = images.shape[-2:]
        if self.whole:
            return [(0, 0, height, width)] * len(images)
        wanted = [int(position) for position in torch.unique(positions) if int(position) not in self._known]
        for start in range(0, len(wanted), PROBED):
            part = wanted[start : start + PROBED]
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
