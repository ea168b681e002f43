"""The images that are explained: one object in front of a landscape, or two objects side by side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nrm_plugin.demo import photo_network

from . import photos
from .networks import Network
from .stored import stored

CERTAIN = 0.5
"""Smallest softmax of the predicted class of a photograph on gray; photographs below it are excluded."""
MARGIN = 2.0
"""Smallest ratio of the dependence of a class on its own object to that on the other object of a pair."""
GROUNDS: tuple[photos.Background, ...] = ("flower", "china")
"""Landscapes behind single objects."""


@dataclass(frozen=True)
class Scenes:
    """Images of one object.

    Args:
        inputs: Inputs of the model, ``(N, C, H, W)``.
        masks: Pixels of the object, boolean ``(N, H, W)``.
        targets: The class that the network predicts for the object alone on gray, ``(N,)``.
        names: The photographs.
    """

    inputs: Tensor
    masks: Tensor
    targets: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def where(self, is_kept: Tensor) -> Scenes:
        """Returns the scenes where a boolean tensor ``(N,)`` is true."""
        names = tuple(name for name, kept in zip(self.names, is_kept.tolist(), strict=True) if kept)
        return Scenes(self.inputs[is_kept], self.masks[is_kept], self.targets[is_kept], names)

    def parts(self, count: int) -> Iterator[Scenes]:
        """Yields the scenes in parts of ``count`` scenes."""
        places = torch.arange(len(self))
        for start in range(0, len(self), count):
            yield self.where((places >= start) & (places < start + count))

    @property
    def digest(self) -> str:
        """Digest of the images and their classes."""
        parts = [self.inputs.numpy().tobytes(), self.targets.numpy().tobytes()]
        return hashlib.sha256(b"".join(parts)).hexdigest()

    def first(self, count: int) -> Scenes:
        """Returns the first scenes."""
        return self.where(torch.arange(len(self)) < count)


@dataclass(frozen=True)
class Pairs:
    """Images of two objects, each of which is explained once: scenes ``2 k`` and ``2 k + 1`` are one image.

    Args:
        scenes: The images, with the mask and class of the explained object.
        others: Pixels of the other object, boolean ``(2 K, H, W)``.
    """

    scenes: Scenes
    others: Tensor


@dataclass(frozen=True)
class _Thing:
    """Object that a network recognizes, with its class and the data to render it."""

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
    """Returns objects in front of a landscape on which the network predicts the same class as on the plain background.

    Objects are placed alternately on two landscapes. If the predicted class changes, the other landscape is tried, and
    if it also changes there, the object is excluded. Images of Fashion-MNIST keep their black background.

    Args:
        net: The network that predicts the classes.
        count: Number of objects that are tried.
    """
    rows = []
    for number, thing in enumerate(recognized(net, count)):
        for ground in GROUNDS[number % 2 :] + GROUNDS[: number % 2]:
            image, mask = _drawn(net, thing, *net.size, ground)
            if int(net.logits(net.normalized(image)[None]).argmax()) == thing.target:
                rows.append((image, mask, thing))
                break
    return _scenes(net, rows)


def pairs(net: Network, count: int, seed: int = 0) -> Pairs:
    """Places two objects of different classes side by side, such that each class depends on its own object.

    A class depends on its object if covering the object lowers the logit of the class by at least :data:`MARGIN` times
    the change due to covering the other object. Only then is it clear which of the two objects is explained.

    Args:
        net: The network.
        count: Number of images, with two explanations each.
        seed: Seed for drawing the pairs.
    """
    things = recognized(net, 2 * count if _is_fashion(net) else 1000)
    settings = repr((count, seed, MARGIN, [thing.name for thing in things]))
    found = stored(
        f"{net.name} pairs", hashlib.sha256(settings.encode()).hexdigest(), lambda: _chosen(net, things, count, seed)
    )
    rows: list[tuple[Tensor, Tensor, _Thing]] = []
    others: list[Tensor] = []
    for one, other in ((things[k], things[m]) for k, m in found["pairs"].tolist()):
        (left, left_mask), (right, right_mask) = (_half(net, thing) for thing in (one, other))
        image, masks = torch.cat([left, right], 2), _halves(left_mask, right_mask)
        rows += [(image, masks[0], one), (image, masks[1], other)]
        others += [masks[1], masks[0]]
    return Pairs(_scenes(net, rows), torch.stack(others))


def _chosen(net: Network, things: list[_Thing], count: int, seed: int) -> dict[str, np.ndarray]:
    """Returns the indices of the objects of every pair, ``(K, 2)``."""
    draw = torch.Generator().manual_seed(seed)
    chosen: list[list[int]] = []
    tried: set[frozenset[int]] = set()
    for _ in range(50 * count):
        places = torch.randperm(len(things), generator=draw)[:2].tolist()
        one, other = (things[k] for k in places)
        if one.target == other.target or frozenset(places) in tried:
            continue
        tried.add(frozenset(places))
        left, right = (_half(net, thing)[0] for thing in (one, other))
        no_left, no_right = (image[:, :1, :1].expand_as(image) for image in (left, right))  # a corner shows the ground
        images = (left, right), (no_left, right), (left, no_right)
        logits = net.logits(net.normalized(torch.stack([torch.cat(parts, 2) for parts in images])))
        if all(_depends(logits, thing.target, side) for side, thing in enumerate((one, other))):
            chosen.append(places)
        if len(chosen) == count:
            break
    return {"pairs": np.array(chosen).reshape(-1, 2)}


def _half(net: Network, thing: _Thing) -> tuple[Tensor, Tensor]:
    """Returns one half of an image of two objects: the object on the plain background, and its mask."""
    height, width = net.size[0], net.size[1] * 2 if _is_fashion(net) else net.size[1]
    return _drawn(net, thing, height, width // 2, "grey")


def _depends(logits: Tensor, target: int, side: int) -> bool:
    """Returns True if a class depends on the object of its side, from logits with and without each object."""
    drop = logits[0, target] - logits[1:, target]
    return bool(drop[side] > MARGIN * drop[1 - side].abs())


def recognized(net: Network, count: int) -> list[_Thing]:
    """Returns objects whose class the network predicts with high confidence on a plain background."""
    if _is_fashion(net):
        images, labels = photos.fashion("t10k")
        shares = net.logits(net.normalized(images[: 3 * count])).softmax(1)
        certain = [k for k in range(len(shares)) if shares[k, labels[k]] > CERTAIN][:count]
        return [_Thing(f"{k}", None, images[k], int(labels[k])) for k in certain]
    stamps = list(photos.stamps())
    order = torch.randperm(len(stamps), generator=torch.Generator().manual_seed(0)).tolist()
    stamps = [stamps[k] for k in order if not stamps[k].folder.startswith("symbols")]
    digest = hashlib.sha256(repr([stamp.name for stamp in stamps]).encode()).hexdigest()
    said = stored(f"{net.name} stamps", digest, lambda: _said(net, stamps))
    found: list[_Thing] = []
    for stamp, share, target in zip(stamps, said["share"].tolist(), said["target"].tolist(), strict=True):
        is_right = len(net.classes) == len(photo_network.imagenet_names()) or stamp.label == net.classes[target]
        if share > CERTAIN and is_right:
            found.append(_Thing(stamp.name, stamp, None, target))
    return found[:count]


def _said(net: Network, stamps: list[photos.Stamp]) -> dict[str, np.ndarray]:
    """Returns the predicted class of each photograph on the plain background, and its softmax, ``(N,)`` each."""
    ground = photos.background("grey", *net.size)
    found = [
        net.logits(net.normalized(photos.placed(stamp.cut_out(*net.size), ground)[0])[None]).softmax(1)[0].max(0)
        for stamp in stamps
    ]
    share, target = zip(*found, strict=True)
    return {"share": torch.stack(share).numpy(), "target": torch.stack(target).numpy()}


def _is_fashion(net: Network) -> bool:
    return net.classes == photos.FASHION


def _drawn(net: Network, thing: _Thing, height: int, width: int, ground: photos.Background) -> tuple[Tensor, Tensor]:
    """Returns the image ``(C, H, W)`` in [0, 1] and mask."""
    if _is_fashion(net):
        assert thing.picture is not None
        return thing.picture, thing.picture[0] > 0
    return photos.placed(thing.cut_out(height, width), photos.background(ground, height, width))


def _halves(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the masks of both objects in the whole image."""
    return torch.cat([left, torch.zeros_like(right)], 1), torch.cat([torch.zeros_like(left), right], 1)


def _scenes(net: Network, rows: list[tuple[Tensor, Tensor, _Thing]]) -> Scenes:
    images, masks, things = zip(*rows, strict=True)
    targets = torch.tensor([thing.target for thing in things])
    names = tuple(thing.name for thing in things)
    return Scenes(net.normalized(torch.stack(images)), torch.stack(masks), targets, names)
