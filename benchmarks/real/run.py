"""Runs the questions on the networks; every heat map and every curve is stored in the cache, so that runs resume."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.default_composite import interval, resamples

from . import metrics, packages, photos
from .methods import BATCH, METHODS, Method, Question, heat_map
from .networks import NETWORKS, Network
from .scenes import Pairs, Scenes, pairs, single

Values = dict[str, Tensor]
"""Values by metric, ``(N,)``."""
EXPENSIVE = 20
"""Methods with more gradients than this explain a quarter of the images."""
BETTER = {
    "SRG, plain": 1, "SRG, blur": 1, "SRG, noise": 1, "SRG, neighbours": 1, "insertion": 1, "deletion": -1,
    "inside": 1, "pointing": 1, "own": 1, "wins": 1, "other class": -1, "random parameters": -1, "noise": 1,
}  # fmt: skip
"""+1 for metrics that should be large, -1 for those that should be small."""


@dataclass(frozen=True)
class Size:
    """How much is measured for a network.

    Args:
        photos: Images of one object.
        pairs: Images of two objects.
        fills: Fills of removed patches.
    """

    photos: int
    pairs: int
    fills: tuple[str, ...]


QUICK = Size(12, 15, ("plain",))
SIZES = {
    "EfficientNet-Lite0": Size(24, 30, ("plain", "blur")),
    "EfficientNet-Lite1": Size(24, 30, ("plain", "blur")),
    "VGG16": Size(8, 10, ("plain",)),
    "Fashion-MNIST, VGG": Size(200, 200, ("plain", "blur", "noise", "neighbours")),
    "Fashion-MNIST, residual": Size(200, 200, ("plain", "blur", "noise", "neighbours")),
}


AVERAGED = (
    "EpsilonPlusFlat, last two resolutions, against the rest", "default, last two resolutions, against the rest",
    "EpsilonPlusFlat, against the rest", "default, against the rest", "GradCAM", "GradCAM, against the rest",
    "GradCAM, signed, against the rest",
)  # fmt: skip
"""Methods of the comparison of averages over layers with GradCAM."""


class Task:
    """A network with its images.

    Args:
        net: The network.
        size: How much is measured.
    """

    def __init__(self, net: Network, size: Size) -> None:
        self.net, self.size = net, size
        colour = torch.zeros_like(net.mean) if net.classes == photos.FASHION else torch.full_like(net.mean, photos.GREY)
        self.plain = net.normalized(colour)
        self.single: Scenes = single(net, size.photos)
        self.pairs: Pairs = pairs(net, size.pairs)

    def maps(self, name: str, kind: str, scenes: Scenes) -> tuple[Tensor, float]:
        """Heat maps of a method, ``(N, H, W)``, and processor seconds for each image."""
        method = METHODS[name]
        if method.gradients > EXPENSIVE:
            scenes = scenes.first(-(-len(scenes) // 4))

        def compute() -> dict[str, np.ndarray]:
            parts, seconds = [], []
            for start in range(0, len(scenes), BATCH):
                rows = slice(start, start + BATCH)
                before = time.process_time()
                parts.append(heat_map(method, self._question(method, scenes, rows)))
                seconds.append((time.process_time() - before) / len(parts[-1]))
            return {"heat": torch.cat(parts).numpy(), "seconds": np.float64(np.median(seconds))}

        stored = _cached(f"{self.net.name} {kind} {name}", _digest(scenes), compute)
        return torch.from_numpy(stored["heat"]), float(stored["seconds"])

    def _question(self, method: Method, scenes: Scenes, rows: slice) -> Question:
        others = self.single.inputs[: min(8, len(self.single))]
        if others.shape[2:] != scenes.inputs.shape[2:]:
            others = scenes.inputs[:8]
        return Question(self.net, scenes.inputs[rows], scenes.targets[rows], self.plain, others, method.against)

    def removed(self, name: str, heat: Tensor, fill: str) -> Values:
        """Areas of the curves of one fill."""
        scenes = self.single.first(len(heat))

        def compute() -> dict[str, np.ndarray]:
            with torch.no_grad():
                curves = metrics.removal(
                    self.net.logits, scenes.inputs, scenes.targets, heat, metrics.fills(self.plain)[fill]
                )
            return {key: value.numpy() for key, value in curves.items()}

        digest = hashlib.sha256(heat.numpy().tobytes()).hexdigest()
        stored = _cached(f"{self.net.name} curves {fill} {name}", digest, compute)
        return metrics.areas({key: torch.from_numpy(value) for key, value in stored.items()}, fill)

    def values(self, name: str) -> Values:
        """All metrics of a method."""
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


def _digest(scenes: Scenes) -> str:
    parts = [scenes.inputs.numpy().tobytes(), scenes.targets.numpy().tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _cached(name: str, digest: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from the cache; computed and stored there the first time."""
    folder = packages.cache() / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name.replace('/', '-').replace(' ', '_')}-{digest[:12]}.npz"
    if not file.exists():
        partial = file.with_suffix(".part.npz")
        np.savez(partial, **compute())  # type: ignore[arg-type]
        partial.replace(file)
    with np.load(file) as arrays:
        return dict(arrays)


def measured(net: str, size: Size, names: Iterable[str]) -> Iterator[tuple[str, Values | str]]:
    """Name and metrics of each method; the message of a method that does not run on this network."""
    task = Task(NETWORKS[net](), size)
    for name in names:
        try:
            yield name, task.values(name)
        except (TypeError, RuntimeError, ValueError, AssertionError, KeyError) as error:
            yield name, f"{type(error).__name__}: {error}".splitlines()[0][:200]


def summary(by_method: dict[str, Values]) -> dict[str, Any]:
    """Means with bootstrap intervals, and paired differences from the first method, by method and metric."""
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
    """Samples that are resampled together: the two explanations of one image of a pair."""
    return torch.arange(count) // 2 if key in ("own", "wins") else torch.arange(count)


def run(
    nets: Iterable[str],
    out: Path,
    quick: bool,
    only: Iterable[str] | None = None,
    section: str = "nets",
    fills: tuple[str, ...] | None = None,
) -> dict[str, Any]:
    """Measures networks one after another, and saves after each method.

    Args:
        nets: The networks.
        out: The file of the results; other sections in it are kept.
        quick: Whether to measure few images.
        only: The methods; the first is the one that the others are compared with.
        section: Where the results are stored in the file.
        fills: Fills of removed patches; by default those of the network.
    """
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    stored = results.setdefault(section, {})
    for net in nets:
        size = QUICK if quick else SIZES[net]
        size = size if fills is None else replace(size, fills=fills)
        by_method: dict[str, Values] = {}
        failed: dict[str, str] = {}
        for name, values in measured(net, size, only or METHODS):
            if isinstance(values, str):
                failed[name] = values
                print(f"{net}: {name} does not run: {values}", file=sys.stderr, flush=True)
            else:
                by_method[name] = values
                shown = ", ".join(f"{k} {float(v.mean()):.3f}" for k, v in values.items())
                print(f"{net}: {name}: {shown}", file=sys.stderr, flush=True)
            if by_method:
                stored[net] = {
                    "methods": summary(by_method), "failed": failed,
                    "photos": size.photos, "pairs": size.pairs,
                }  # fmt: skip
                out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    return results
