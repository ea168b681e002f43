"""Evaluates explanations of the networks; heat maps and curves are stored in the cache, so that runs can be resumed."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.default_composite import interval, resamples

from . import metrics, photos
from .methods import FIRST, METHODS, Method, Question, heat_map
from .networks import NETWORKS, Network
from .scenes import Pairs, Scenes, pairs, single
from .stored import stored, update

Values = dict[str, Tensor]
"""Values by metric, ``(N,)``."""
EXPENSIVE, FEW, FEW_OF_PAIRS = 10, 24, 8
"""Number of gradients above which a method counts as expensive, and numbers of images of both kinds for it."""
CHUNK = 8
"""Images whose results are stored together."""
BASELINES = 64
"""Largest number of images that are baselines of expected gradients."""
BETTER = {
    "SRG, plain": 1, "SRG, blur": 1, "SRG, noise": 1, "SRG, neighbours": 1, "insertion": 1, "deletion": -1,
    "inside": 1, "pointing": 1, "own": 1, "wins": 1, "other class": -1, "random parameters": -1, "noise": 1,
}  # fmt: skip
"""+1 for metrics that should be large, -1 for those that should be small."""


@dataclass(frozen=True)
class Size:
    """Extent of the measurements on a network.

    Args:
        photos: Number of images of one object.
        pairs: Number of images of two objects.
        fills: Fills of removed patches.
        few: Whether expensive methods explain only a few of the images.
    """

    photos: int
    pairs: int
    fills: tuple[str, ...] = ("plain",)
    few: bool = True


QUICK = Size(8, 8)
SIZES = {
    "EfficientNet-Lite0": Size(1000, 50),
    "EfficientNet-Lite1": Size(1000, 50),
    "EfficientNet-Lite2": Size(1000, 50),
    "VGG16": Size(32, 16),
    "Fashion-MNIST, VGG": Size(200, 50, few=False),
    "Fashion-MNIST, residual": Size(200, 50, few=False),
}
"""1,000 photographs are all of them: the networks recognize about 100."""


DRAWN = "reference blur, last two resolutions, against the rest", "default, against the rest"
"""The two heat maps that ``nrm-plugin explain`` draws of photographs; others are compared with the first one."""
SIGNED = "GradCAM, signed, against the rest"
METHODS_OF = {
    "EfficientNet-Lite0": (DRAWN[0], "GradCAM", SIGNED),
    "EfficientNet-Lite1": (
        *DRAWN, "GradCAM", SIGNED, "reference blur, against the rest", "DeepLift", "IntegratedGradients, 20 steps",
        "IntegratedGradients, 200 steps", "expected gradients",
    ),
    "EfficientNet-Lite2": (DRAWN[0], "GradCAM", SIGNED),
    "VGG16": (DRAWN[0], "GradCAM"),
}  # fmt: skip
"""Methods of the comparison on networks for photographs. One of them, which is held out, has the expensive ones."""
FASHION = (
    FIRST, "DeepLift", SIGNED, "GradCAM", "reference gray", "IntegratedGradients, 20 steps", DRAWN[0],
    "reference gray, against the rest", "reference gray, last two resolutions, against the rest", DRAWN[1],
    "reference blur, against the rest", "expected gradients",
)  # fmt: skip
"""Methods of the comparison on networks for Fashion-MNIST, whose images have a plain background."""


class Task:
    """A network with its images.

    Args:
        net: The network.
        size: Extent of the measurements.
    """

    def __init__(self, net: Network, size: Size) -> None:
        self.net, self.size = net, size
        colour = torch.zeros_like(net.mean) if net.classes == photos.FASHION else torch.full_like(net.mean, photos.GREY)
        self.plain = net.normalized(colour)
        self.single: Scenes = single(net, size.photos)
        self.pairs: Pairs = pairs(net, size.pairs)

    def maps(self, name: str, kind: str, scenes: Scenes) -> tuple[Tensor, float]:
        """Returns heat maps of a method, ``(N, H, W)``, and processor seconds for each image."""
        method = METHODS[name]
        if method.gradients > EXPENSIVE and self.size.few:
            scenes = scenes.first(FEW if kind == "single" else FEW_OF_PAIRS)
        parts = [self._maps(method, f"{self.net.name} {kind} {name}", part) for part in scenes.parts(CHUNK)]
        heat, seconds = zip(*parts, strict=True)
        return torch.cat(heat), float(np.median(seconds))

    def _maps(self, method: Method, name: str, scenes: Scenes) -> tuple[Tensor, float]:
        def compute() -> dict[str, np.ndarray]:
            maps, seconds = [], []
            for place in range(len(scenes)):
                before = time.process_time()
                maps.append(heat_map(method, self._question(method, scenes, slice(place, place + 1))))
                seconds.append(time.process_time() - before)
            return {"heat": torch.cat(maps).numpy(), "seconds": np.float64(np.median(seconds))}

        found = stored(name, scenes.digest, compute)
        return torch.from_numpy(found["heat"]), float(found["seconds"])

    def _question(self, method: Method, scenes: Scenes, rows: slice) -> Question:
        inputs = scenes.inputs[rows]
        return Question(self.net, inputs, scenes.targets[rows], self.plain, self.others(inputs), method.against)

    def others(self, inputs: Tensor) -> Tensor:
        """Returns the baselines of expected gradients: images of one object that differ from the explained one."""
        images = self.single.inputs[:BASELINES]
        if images.shape[2:] != inputs.shape[2:]:  # two objects side by side make a wider image
            images = self.pairs.scenes.inputs[: 2 * BASELINES : 2]
        return images[(images != inputs).flatten(1).any(1)]

    def removed(self, name: str, heat: Tensor, fill: str) -> Values:
        """Returns the areas of the curves of one fill."""
        parts, start = [], 0
        for scenes in self.single.first(len(heat)).parts(CHUNK):
            parts.append(self._removed(name, scenes, heat[start : start + len(scenes)], fill))
            start += len(scenes)
        return metrics.areas({key: torch.cat([part[key] for part in parts], 1) for key in parts[0]}, fill)

    def _removed(self, name: str, scenes: Scenes, heat: Tensor, fill: str) -> dict[str, Tensor]:
        def compute() -> dict[str, np.ndarray]:
            fills = metrics.fills(self.plain)
            curves = metrics.removal(self.net.logits, scenes.inputs, scenes.targets, heat, fills[fill])
            return {key: value.numpy() for key, value in curves.items()}

        digest = hashlib.sha256(heat.numpy().tobytes()).hexdigest()
        found = stored(f"{self.net.name} curves {fill} {name}", digest, compute)
        return {key: torch.from_numpy(value) for key, value in found.items()}

    def values(self, name: str) -> Values:
        """Returns all metrics of a method."""
        heat, seconds = self.maps(name, "single", self.single)
        heat = heat.float()
        both, _ = self.maps(name, "pairs", self.pairs.scenes)
        scenes, count = self.pairs.scenes, len(both)
        found = metrics.inside(heat, self.single.masks[: len(heat)])
        found |= metrics.own(both, scenes.masks[:count], self.pairs.others[:count])
        even = count // 2 * 2
        found["other class"] = metrics.correlation(both[0:even:2], both[1:even:2])
        for fill in self.size.fills:
            found |= self.removed(name, heat, fill)
        found["seconds"] = torch.tensor([seconds])
        return found


def measured(net: str, size: Size, names: Iterable[str]) -> Iterator[tuple[str, Values | str]]:
    """Yields the name and metrics of each method, or the error message if it does not run on this network."""
    task = Task(NETWORKS[net](), size)
    for name in names:
        try:
            yield name, task.values(name)
        except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
            yield name, f"{type(error).__name__}: {error}".splitlines()[0][:200]


def summary(by_method: dict[str, Values]) -> dict[str, Any]:
    """Returns means with bootstrap intervals, and paired differences from the first method, by method and metric."""
    rows: dict[str, Any] = {}
    first = next(iter(by_method))
    for name, values in by_method.items():
        rows[name] = {"seconds": round(float(values["seconds"]), 3)}
        for key in BETTER:
            if key in values:
                weights = resamples(groups(key, len(values[key])))
                ours = by_method[first][key][: len(values[key])]
                ahead = BETTER[key] * (ours - values[key]).float()
                rows[name][key] = {
                    "mean": interval(values[key].float(), weights), "behind": interval(ahead, weights),
                    "samples": len(values[key]),
                }  # fmt: skip
    return rows


def groups(key: str, count: int) -> Tensor:
    """Returns samples that are resampled together: the two explanations of one image of a pair."""
    return torch.arange(count) // 2 if key in ("own", "wins") else torch.arange(count)


def methods_of(net: str) -> tuple[str, ...]:
    """Returns the methods that are measured on a network."""
    return METHODS_OF.get(net, FASHION)


def run(nets: Iterable[str], out: Path, quick: bool, only: Iterable[str] | None = None) -> dict[str, Any]:
    """Measures networks one after another, and saves after each method.

    Args:
        nets: The networks.
        out: The file of the results; other sections and networks in it are kept.
        quick: Whether to measure few images.
        only: The methods; all others are compared with the first.
    """
    results: dict[str, Any] = {}
    for net in nets:
        size = QUICK if quick else SIZES[net]
        by_method: dict[str, Values] = {}
        failed: dict[str, str] = {}
        for name, values in measured(net, size, only or methods_of(net)):
            if isinstance(values, str):
                failed[name] = values
                print(f"{net}: {name} does not run: {values}", file=sys.stderr, flush=True)
            else:
                by_method[name] = values
                shown = ", ".join(f"{k} {float(v.mean()):.3f}" for k, v in values.items())
                print(f"{net}: {name}: {shown}", file=sys.stderr, flush=True)
            if by_method:
                found = {
                    "methods": summary(by_method), "failed": failed,
                    "photos": max(len(values["inside"]) for values in by_method.values()),
                    "explanations of pairs": max(len(values["own"]) for values in by_method.values()),
                }  # fmt: skip
                results = update(out, net, found, SIZES)
    return results
