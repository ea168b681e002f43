"""Sets of neurons to patch at the sites: single channels or heads, several of these, positions, and combinations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

Shape = tuple[int, ...]
Draw = Callable[[Shape, torch.Generator], Tensor]
"""Function that draws a mask of a site, given the shape of the site for one sample."""


def along(shape: Shape, dim: int, chosen: Tensor) -> Tensor:
    mask = torch.zeros(shape, dtype=torch.bool)
    return mask.index_fill(dim, chosen, True)


def single(shape: Shape, draw: torch.Generator) -> Tensor:
    """Returns one channel, head or unit."""
    return along(shape, 0, torch.randint(shape[0], (1,), generator=draw))


def third(shape: Shape, draw: torch.Generator) -> Tensor:
    """Returns a third of the channels, heads or units."""
    return along(shape, 0, torch.randperm(shape[0], generator=draw)[: max(1, round(shape[0] / 3))])


def half(shape: Shape, draw: torch.Generator) -> Tensor:
    """Returns half of the channels, heads or units."""
    return along(shape, 0, torch.randperm(shape[0], generator=draw)[: max(1, shape[0] // 2)])


def positions(shape: Shape, draw: torch.Generator) -> Tensor:
    """Returns a square of half the width and height of a feature map, or a third of the tokens."""
    if len(shape) == 1:
        return half(shape, draw)
    mask = torch.zeros(shape, dtype=torch.bool)
    size = [max(1, length // 2) for length in shape[1:]]
    top, left = (
        int(torch.randint(length - part + 1, (), generator=draw)) for length, part in zip(shape[1:], size, strict=True)
    )
    mask[:, top : top + size[0], left : left + size[1]] = True
    return mask


def tokens(shape: Shape, draw: torch.Generator) -> Tensor:
    """Returns a third of the tokens, all heads."""
    return along(shape, 1, torch.randperm(shape[1], generator=draw)[: max(1, round(shape[1] / 3))])


def head_at_tokens(shape: Shape, draw: torch.Generator) -> Tensor:
    """Returns one head at half of the tokens."""
    drawn = along(shape, 1, torch.randperm(shape[1], generator=draw)[: shape[1] // 2])
    return single(shape, draw) & drawn


@dataclass(frozen=True)
class Kind:
    """Sets of one kind at some sites, lowest first: all chains of ``upper`` draws above and ``lower`` draws below."""

    name: str
    places: tuple[int, ...]
    draw: Draw
    upper: int = 16
    lower: int = 16

    def sets(self, shapes: list[Shape]) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Draws distinct masks of the lowest site and, for each chain above it, of the other sites."""
        draw = torch.Generator().manual_seed(0)
        lowest, *others = (shapes[place] for place in self.places)
        lower = distinct(([self.draw(lowest, draw)] for _ in range(20 * self.lower)), self.lower)
        upper = distinct(([self.draw(shape, draw) for shape in others] for _ in range(20 * self.upper)), self.upper)
        return [masks[0] for masks in lower], upper


def distinct(drawn: Iterator[list[Tensor]], count: int) -> list[list[Tensor]]:
    """Returns the first ``count`` different sets, or all if there are fewer."""
    found: list[list[Tensor]] = []
    for masks in drawn:
        if len(found) == count:
            break
        if not any(all(map(torch.equal, masks, other)) for other in found):
            found.append(masks)
    return found


CHANNELS = [
    Kind("single channels, 2 layers", (1, 2), single),
    Kind("sets of channels, 2 layers", (1, 2), third),
    Kind("positions, 2 layers", (1, 2), positions),
    Kind("single channels, 3 layers", (0, 1, 2), single),
    Kind("sets of channels, 3 layers", (0, 1, 2), half),
    Kind("sets of channels, 4 layers", (0, 1, 2, 3), half),
]
TRANSFORMER = [
    Kind("single heads, 2 layers", (0, 2), single),
    Kind("sets of heads, 2 layers", (0, 2), half),
    Kind("positions of heads, 2 layers", (0, 2), tokens),
    Kind("single heads at positions, 2 layers", (0, 2), head_at_tokens),
    Kind("single heads, 3 layers", (0, 2, 3), single),
    Kind("sets of heads, 3 layers", (0, 2, 3), half),
    Kind("positions of heads and MLP, 4 layers", (0, 1, 2, 3), tokens),
]
REAL = [
    Kind("single channels, 2 layers", (0, 2), single, upper=8),
    Kind("sets of channels, 2 layers", (0, 2), third, upper=8),
    Kind("positions, 2 layers", (0, 2), positions, upper=8),
    Kind("sets of channels, 3 layers", (0, 1, 2), half, upper=8),
]
KINDS = {
    "digits": CHANNELS,
    "residual CNN": CHANNELS,
    "transformer": TRANSFORMER,
    "VGG16": REAL,
    "EfficientNet-Lite0": REAL,
    "EfficientNet-Lite1": REAL,
}
