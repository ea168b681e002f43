"""The images that are explained: one object in front of a landscape, or two objects side by side."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from nrm_plugin.demo import photo_network

from . import photos
from .networks import Network

CERTAIN = 0.5
"""Softmax by which a network says the class of a photograph on grey; less certain photographs are left out."""
MARGIN = 2.0
"""How much more a class depends on its own object than on the other one of a pair."""


@dataclass(frozen=True)
class Scenes:
    """Images of one object.

    Args:
        inputs: Inputs of the model, ``(N, C, H, W)``.
        masks: Pixels of the object, boolean ``(N, H, W)``.
        targets: The class that the network says for the object alone on grey, ``(N,)``.
        names: The photographs.
    """

    inputs: Tensor
    masks: Tensor
    targets: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def where(self, is_kept: Tensor) -> Scenes:
        """The scenes where a boolean tensor ``(N,)`` is true."""
        names = tuple(name for name, kept in zip(self.names, is_kept.tolist(), strict=True) if kept)
        return Scenes(self.inputs[is_kept], self.masks[is_kept], self.targets[is_kept], names)

    def first(self, count: int) -> Scenes:
        """The first scenes."""
        return self.where(torch.arange(len(self)) < count)


@dataclass(frozen=True)
class Pairs:
    """Images of two objects, each object explained once: scenes ``2 k`` and ``2 k + 1`` are one image.

    Args:
        scenes: The images, with the mask and class of the explained object.
        others: Pixels of the other object, boolean ``(2 K, H, W)``.
    """

    scenes: Scenes
    others: Tensor


@dataclass(frozen=True)
class _Thing:
    """An object that a network recognizes: a way to draw it, and its class."""

    name: str
    stamp: photos.Stamp | None
    picture: Tensor | None
    target: int

    def cut_out(self, height: int, width: int) -> Tensor:
        if self.stamp is not None:
            return self.stamp.cut_out(height, width)
        assert self.picture is not None
        return torch.cat([self.picture.expand(3, -1, -1), self.picture > 0])


def single(net: Network, count: int) -> Scenes:
    """Objects in front of the two landscapes alternately, those whose class the network says there too.

    Fashion-MNIST is taken as it is, on black.

    Args:
        net: The network that says the classes.
        count: Number of objects that are tried.
    """
    grounds = itertools.cycle(("flower", "china"))
    rows = [(*_drawn(net, thing, *net.size, next(grounds)), thing) for thing in recognized(net, count)]
    scenes = _scenes(net, rows)
    return scenes.where(net.logits(scenes.inputs).argmax(1) == scenes.targets)


def pairs(net: Network, count: int, seed: int = 0) -> Pairs:
    """Two objects of different classes side by side on a plain ground, where each class depends on its own object.

    It does if covering the object lowers the logit of its class by at least :data:`MARGIN` times of what covering the
    other one changes. Only then is there a right answer to which of the two is explained.

    Args:
        net: The network.
        count: Number of images; two explanations each.
        seed: Of the drawing of pairs.
    """
    things = recognized(net, 2 * count if _is_fashion(net) else 1000)
    draw = torch.Generator().manual_seed(seed)
    height, width = net.size[0], net.size[1] * 2 if _is_fashion(net) else net.size[1]
    rows: list[tuple[Tensor, Tensor, _Thing]] = []
    others: list[Tensor] = []
    for _ in range(50 * count):
        one, other = (things[k] for k in torch.randperm(len(things), generator=draw)[:2].tolist())
        if one.target == other.target:
            continue
        drawn = [_drawn(net, thing, height, width // 2, "grey") for thing in (one, other)]
        covers = [image[:, :1, :1].expand_as(image) for image, _ in drawn]  # the corner shows the ground
        (left, right), (no_left, no_right) = (drawn[0][0], drawn[1][0]), covers
        image = torch.cat([left, right], 2)
        covered = torch.cat([no_left, right], 2), torch.cat([left, no_right], 2)
        logits = net.logits(net.normalized(torch.stack([image, *covered])))
        if all(_depends(logits, thing.target, side) for side, thing in enumerate((one, other))):
            masks = _halves(drawn[0][1], drawn[1][1])
            rows += [(image, masks[0], one), (image, masks[1], other)]
            others += [masks[1], masks[0]]
        if len(rows) == 2 * count:
            break
    return Pairs(_scenes(net, rows), torch.stack(others))


def _depends(logits: Tensor, target: int, side: int) -> bool:
    """Whether a class depends on the object of its side: logits of the image, and with each of the objects covered."""
    drop = logits[0, target] - logits[1:, target]
    return bool(drop[side] > MARGIN * drop[1 - side].abs())


def recognized(net: Network, count: int) -> list[_Thing]:
    """Objects whose class the network says with certainty on a plain background."""
    if _is_fashion(net):
        images, labels = photos.fashion("t10k")
        shares = net.logits(net.normalized(images[: 3 * count])).softmax(1)
        certain = [k for k in range(len(shares)) if shares[k, labels[k]] > CERTAIN][:count]
        return [_Thing(f"{k}", None, images[k], int(labels[k])) for k in certain]
    found: list[_Thing] = []
    stamps = list(photos.stamps())
    order = torch.randperm(len(stamps), generator=torch.Generator().manual_seed(0)).tolist()
    for stamp in (stamps[k] for k in order):
        if len(found) == count:
            break
        if net.classes[0] in ("animals/birds",) and stamp.label not in net.classes:
            continue
        image = photos.placed(stamp.cut_out(*net.size), photos.background("grey", *net.size))[0]
        share, target = net.logits(net.normalized(image)[None]).softmax(1)[0].max(0)
        is_right = stamp.label == net.classes[int(target)] or len(net.classes) == len(photo_network.imagenet_names())
        if float(share) > CERTAIN and is_right and not stamp.folder.startswith("symbols"):
            found.append(_Thing(stamp.name, stamp, None, int(target)))
    return found


def _is_fashion(net: Network) -> bool:
    return net.classes == photos.FASHION


def _drawn(net: Network, thing: _Thing, height: int, width: int, ground: photos.Background) -> tuple[Tensor, Tensor]:
    """Image ``(C, H, W)`` in [0, 1] and mask."""
    if _is_fashion(net):
        assert thing.picture is not None
        return thing.picture, thing.picture[0] > 0
    return photos.placed(thing.cut_out(height, width), photos.background(ground, height, width))


def _halves(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of both objects in the whole image."""
    return torch.cat([left, torch.zeros_like(right)], 1), torch.cat([torch.zeros_like(left), right], 1)


def _scenes(net: Network, rows: list[tuple[Tensor, Tensor, _Thing]]) -> Scenes:
    images, masks, things = zip(*rows, strict=True)
    targets = torch.tensor([thing.target for thing in things])
    names = tuple(thing.name for thing in things)
    return Scenes(net.normalized(torch.stack(images)), torch.stack(masks), targets, names)
