"""Joint relevance of the most relevant channels of a few layers, and its picture."""

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
from ..plots.heatmaps import joint
from ..plots.ribbons import Column, Ribbon, percent

CHUNK = 12
"""Events that are carried at once: on VGG16 each takes as much memory as one backward pass."""


@dataclass(frozen=True)
class JointRelevance:
    r"""What the most relevant channels of some layers carry together.

    .. math:: J_{ab\dots} = \mu(n_{l_1} \in a, n_{l_2} \in b, \dots)

    Attributes:
        layers: Names, the one nearest to the output first.
        channels: The channels of each layer that were asked for, the most relevant first.
        marginals: Their marginals, ``(K,)`` for each layer.
        sizes: Number of all channels of each layer.
        values: Joint relevance of one channel in each layer, ``(K, …, K)``, dimensionless.
    """

    layers: tuple[str, ...]
    channels: tuple[tuple[int, ...], ...]
    marginals: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    values: Tensor

    def strongest(self, count: int) -> list[tuple[int, ...]]:
        """Places in ``values`` of the largest absolute values, the largest first."""
        order = self.values.abs().flatten().argsort(descending=True, stable=True)[:count]
        return [tuple(map(int, torch.unravel_index(place, self.values.shape))) for place in order]

    def event(self, place: Sequence[int]) -> Event:
        """The walks whose joint relevance is ``values[place]``; of the upper layers only for a shorter place."""
        first, *rest = (
            at(layer).channel(channels[index])
            for layer, channels, index in zip(self.layers, self.channels, place, strict=False)
        )
        event: Event = first
        for atom in rest:
            event = event & atom
        return event


def joint_relevance(mu: RelevanceMeasure, layers: Sequence[str], count: int) -> JointRelevance:
    """Joint relevance of the ``count`` most relevant channels, by absolute value, of each of several layers.

    Args:
        mu: A measure of one sample.
        layers: At least two taps, each above or below the others, in any order.
        count: Channels of each layer; all, where a layer has fewer.

    Raises:
        ValueError: Fewer than two layers, one of them twice, or a measure of several samples.
        UnknownLayerError: No tap of that name.
    """
    if len(layers) < 2 or len(set(layers)) < len(layers):
        raise ValueError(f"joint relevance needs two or more different layers, got {', '.join(layers) or 'none'}.")
    if mu.batch != 1:
        raise ValueError(f"every sample has other relevant channels: take a measure of one sample, not of {mu.batch}.")
    masses = {layer: mass[0] for layer, mass in mu.marginal(list(layers), over="channel").items()}
    order = sorted(layers, key=mu.layers.index, reverse=True)
    tops = [masses[layer].abs().argsort(descending=True, stable=True)[:count] for layer in order]
    found = JointRelevance(
        tuple(order),
        tuple(tuple(top.tolist()) for top in tops),
        tuple(masses[layer][top] for layer, top in zip(order, tops, strict=True)),
        tuple(len(masses[layer]) for layer in order),
        torch.empty([len(top) for top in tops]),
    )
    # The lowest layer comes as a map, so that one vector for each combination above it answers all of its channels.
    above = [found.event(place) for place in itertools.product(*(range(len(top)) for top in tops[:-1]))]
    rows = [mu.marginal(order[-1], over="channel", joint=part)[:, 0, tops[-1]] for part in _chunks(above)]
    found.values.copy_(torch.cat(rows).view_as(found.values))
    return found


def joint_heat_maps(mu: RelevanceMeasure, events: Sequence[Event]) -> Tensor:
    """``μ(pixel and event)``, summed over colours, ``(E, H, W)``; of a measure of one sample."""
    return torch.cat([mu.marginal("input", joint=part)[:, 0].sum(1) for part in _chunks(events)])


def joint_figure(
    mu: RelevanceMeasure, image: Tensor, pixels: Tensor, found: JointRelevance, marks: int = 4, heading: str = ""
) -> Figure:
    """The image, the flow between channels, and the joint heat maps of the strongest combinations.

    Args:
        mu: The measure that ``found`` is of.
        image: ``(C, H, W)`` with values in [0, 1].
        pixels: Relevance of the pixels, ``(H, W)``.
        found: Joint relevance.
        marks: Combinations that are marked and get a heat map.
        heading: Above the figure.
    """
    strongest = found.strongest(marks)
    names = {place: chr(ord("A") + number) for number, place in enumerate(strongest)}
    ribbons = [
        # Drawn with the input on the left, as networks are; the layers come from the output down.
        Ribbon(place[::-1], float(found.values[place]), names.get(place, ""))
        for place in itertools.product(*map(range, found.values.shape))
    ]
    titles = [
        f"{names[place]}:  {percent(float(found.values[place]))}\n{' & '.join(_labels(found, place)[::-1])}"
        for place in strongest
    ]
    maps = joint_heat_maps(mu, [found.event(place) for place in strongest])
    return joint(image, pixels, _columns(found)[::-1], ribbons, list(maps), titles, heading)


def _columns(found: JointRelevance) -> list[Column]:
    return [
        Column(
            layer,
            f"{len(channels)} of {size} channels: {percent(float(marginals.sum()))}",
            [str(channel) for channel in channels],
            marginals.tolist(),
        )
        for layer, channels, marginals, size in zip(
            found.layers, found.channels, found.marginals, found.sizes, strict=True
        )
    ]


def _labels(found: JointRelevance, place: Sequence[int]) -> list[str]:
    return [str(channels[index]) for channels, index in zip(found.channels, place, strict=True)]


def _chunks(events: Sequence[Event]) -> tqdm[list[Event]]:
    parts = [list(events[start : start + CHUNK]) for start in range(0, len(events), CHUNK)]
    return tqdm(parts, desc="joint relevance", unit="pass", delay=2, disable=None, leave=False)
