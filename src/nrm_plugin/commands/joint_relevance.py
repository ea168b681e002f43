"""Joint relevance of the most relevant channels of several layers and its figure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from ..events.event import Event, at
from ..measure.measure import RelevanceMeasure
from ..plots.heatmaps import joint as draw_joint
from ..plots.ribbons import Column, Ribbon, percent

CHUNK = 12
"""Number of events per pass. In VGG16, each event requires as much memory as a backward pass."""


@dataclass(frozen=True)
class ChannelJoint:
    r"""Joint relevance of the most relevant channels of several layers.

    .. math:: J_{ab\dots} = \mu(n_{l_1} \in a, n_{l_2} \in b, \dots)

    Attributes:
        layers: Names of the layers, from the output to the input.
        channels: The most relevant channels of each layer, in descending order of relevance.
        marginals: Marginals of these channels for each layer, of shape ``(K,)``.
        sizes: Number of channels in each layer.
        values: Joint relevance of one channel per layer, of shape ``(K, …, K)``, dimensionless.
    """

    layers: tuple[str, ...]
    channels: tuple[tuple[int, ...], ...]
    marginals: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    values: Tensor

    def strongest(self, count: int) -> list[tuple[int, ...]]:
        """Returns the indices of the ``count`` largest absolute values, in descending order."""
        order = self.values.abs().flatten().argsort(descending=True, stable=True)[:count]
        return [tuple(map(int, torch.unravel_index(place, self.values.shape))) for place in order]

    def event(self, place: Sequence[int]) -> Event:
        """Returns the event whose mass is ``values[place]``. A shorter index omits the lower layers."""
        first, *rest = (
            at(layer).channel(channels[index])
            for layer, channels, index in zip(self.layers, self.channels, place, strict=False)
        )
        event: Event = first
        for atom in rest:
            event = event & atom
        return event


def joint_relevance(mu: RelevanceMeasure, layers: Sequence[str], count: int) -> ChannelJoint:
    """Computes the joint relevance of the ``count`` channels with the largest absolute relevance in each layer.

    Args:
        mu: A single-sample measure.
        layers: At least two taps in any order, each above or below every other.
        count: Number of channels per layer. All channels are used if a layer has fewer.

    Raises:
        ValueError: If fewer than two layers are given, a layer is repeated, or the measure contains several samples.
        UnknownLayerError: If no tap has one of the given names.
    """
    if len(layers) < 2 or len(set(layers)) < len(layers):
        raise ValueError(f"joint relevance needs two or more different layers, got {', '.join(layers) or 'none'}.")
    if mu.batch != 1:
        raise ValueError(
            f"the most relevant channels differ between samples: pass a measure of one sample, not of {mu.batch}."
        )
    masses = {layer: mass[0] for layer, mass in mu.marginal(list(layers), over="channel").items()}
    order = sorted(layers, key=mu.layers.index, reverse=True)
    tops = [masses[layer].abs().argsort(descending=True, stable=True)[:count] for layer in order]
    joint = ChannelJoint(
        tuple(order),
        tuple(tuple(top.tolist()) for top in tops),
        tuple(masses[layer][top] for layer, top in zip(order, tops, strict=True)),
        tuple(len(masses[layer]) for layer in order),
        torch.empty([len(top) for top in tops]),
    )
    # One query for each combination of channels in the upper layers returns all channels of the lowest layer.
    above = [joint.event(place) for place in itertools.product(*(range(len(top)) for top in tops[:-1]))]
    rows = [mu.marginal(order[-1], over="channel", joint=part)[:, 0, tops[-1]] for part in _chunks(above)]
    joint.values.copy_(torch.cat(rows).view_as(joint.values))
    return joint


def joint_heat_maps(mu: RelevanceMeasure, events: Sequence[Event]) -> Tensor:
    """Computes ``μ(pixel ∩ event)`` for a single-sample measure in shape ``(E, H, W)``. Sums over color channels."""
    return torch.cat([mu.marginal("input", joint=part)[:, 0].sum(1) for part in _chunks(events)])


def joint_figure(
    mu: RelevanceMeasure, image: Tensor, pixels: Tensor, joint: ChannelJoint, marks: int = 4, heading: str = ""
) -> Figure:
    """Plots the image, the flow between channels, and joint heat maps of the strongest combinations of channels.

    Args:
        mu: The measure used to compute ``joint``.
        image: Image of shape ``(C, H, W)`` with values in [0, 1].
        pixels: Relevance of the pixels, of shape ``(H, W)``.
        joint: Joint relevance of the channels.
        marks: Number of combinations to label and show as heat maps.
        heading: Title of the figure.
    """
    strongest = joint.strongest(marks)
    names = {place: chr(ord("A") + number) for number, place in enumerate(strongest)}
    ribbons = [
        # The input is drawn on the left; the layers are ordered from the output down.
        Ribbon(place[::-1], float(joint.values[place]), names.get(place, ""))
        for place in itertools.product(*map(range, joint.values.shape))
    ]
    titles = [
        f"{names[place]}:  {percent(float(joint.values[place]))}\n{' & '.join(_labels(joint, place)[::-1])}"
        for place in strongest
    ]
    maps = joint_heat_maps(mu, [joint.event(place) for place in strongest])
    return draw_joint(image, pixels, _columns(joint)[::-1], ribbons, list(maps), titles, heading)


def _columns(joint: ChannelJoint) -> list[Column]:
    return [
        Column(
            layer,
            f"{len(channels)} of {size} channels: {percent(float(marginals.sum()))}",
            [str(channel) for channel in channels],
            marginals.tolist(),
        )
        for layer, channels, marginals, size in zip(
            joint.layers, joint.channels, joint.marginals, joint.sizes, strict=True
        )
    ]


def _labels(joint: ChannelJoint, place: Sequence[int]) -> list[str]:
    return [str(channels[index]) for channels, index in zip(joint.channels, place, strict=True)]


def _chunks(events: Sequence[Event]) -> tqdm[list[Event]]:
    parts = [list(events[start : start + CHUNK]) for start in range(0, len(events), CHUNK)]
    return tqdm(parts, desc="joint relevance", unit="pass", delay=2, disable=None, leave=False)
