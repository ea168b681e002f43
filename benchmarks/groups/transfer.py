"""Transfer of groups from some photographs to others: ``python -m benchmarks.groups --transfer``.

The groups are found on halves of different sizes, of all photographs or of one folder. Only joint relevance and
activations are computed and stored for each photograph, without ablations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from nrm_plugin import RelevanceMeasure, find_groups
from nrm_plugin.measure.dependence import dependence
from nrm_plugin.measure.mean_joints import MeanJoints

from .joints import COMPOSITES, Arrays, _activation, stored
from .nets import CASES, Case, chosen_photos
from .partitions import K, Labels, kappas, other_partitions

COUNTS = {"VGG16": 193, "EfficientNet-Lite0": 96}
"""Photographs of each network; 193 are all of them."""
SIZES = (12, 24, 48, 96)
"""Photographs of a half, which are drawn from all photographs."""
SPLITS = 5
LEAST = 12
"""Least number of photographs of a half of one folder."""


def of_photo(case: Case, number: int, composite: str, file: Path) -> Arrays:
    """Returns the joints and activations of one photograph, and its target; read from a file if it exists."""
    return stored(file, Path.exists, lambda: _measured(case, number, composite), np.savez)


def _measured(case: Case, number: int, composite: str) -> Arrays:
    x = case.inputs[number : number + 1]
    with torch.no_grad():
        target = int(case.model(x).argmax())
    mu = RelevanceMeasure(case.model, x, target, composite=COMPOSITES[composite]())
    joints = mu.joints(list(case.layers))
    arrays = {f"joint {pair}": joint[0].float().numpy() for pair, joint in enumerate(joints)}
    for place, layer in enumerate(case.layers):
        arrays[f"activation {place}"] = _activation(case, layer, x)[0].flatten(1).half().numpy()
    return arrays | {"target": np.array(target)}


def mean_of(parts: Sequence[Arrays], layers: Sequence[str]) -> MeanJoints:
    """Returns the mean joint relevance; the mass of a channel is the sum of its joint relevance with the next layer."""
    pairs = tuple(np.mean([part[f"joint {n}"] for part in parts], 0, dtype=float) for n in range(len(layers) - 1))
    masses = (pairs[0].sum(1), *(pair.sum(0) for pair in pairs))
    return MeanJoints(
        tuple(layers), ("channel",) * len(layers), pairs, tuple(mass[None] for mass in masses), len(parts)
    )


def mean_kappa(means: MeanJoints, labels: Labels) -> float:
    """Returns κ of the mean joint relevance, averaged over the pairs of layers."""
    return float(np.mean(kappas([dependence(joint) for joint in means.joints], labels)))


def coordinates(parts: Sequence[Arrays], place: int) -> np.ndarray:
    """Returns the channels of a layer, ``(channels, channels)``, with the distances of their activations."""
    activations = np.concatenate([part[f"activation {place}"] for part in parts], 1, dtype=np.float32)
    return np.linalg.qr(activations.T, mode="r").T


def halves_of(parts: Sequence[Arrays], size: int, seed: int) -> list[list[Arrays]]:
    """Draws two disjoint halves of a size."""
    order = np.random.default_rng(seed).permutation(len(parts))[: 2 * size]
    return [[parts[number] for number in side] for side in np.array_split(order, 2)]


def both_directions(
    sides: Sequence[Sequence[Arrays]], layers: Sequence[str], seed: int | None = None
) -> dict[str, list[float]]:
    """Returns κ on each of two halves: of its own groups, of the other half's groups and, with a seed, of others."""
    means = [mean_of(side, layers) for side in sides]
    groups = [[labels.numpy() for labels in find_groups(mean, list(layers), K).labels] for mean in means]
    found: dict[str, list[float]] = {"own": [], "other": []}
    for here, there in ((0, 1), (1, 0)):
        found["own"].append(mean_kappa(means[here], groups[here]))
        found["other"].append(mean_kappa(means[here], groups[there]))
        if seed is not None:
            masses = [mass[0] for mass in means[there].masses]
            activations = [coordinates(sides[there], place) for place, _ in enumerate(layers)]
            for name, labels in other_partitions(masses, activations, seed).items():
                found.setdefault(name, []).append(mean_kappa(means[here], labels))
    return found


def summary(splits: Sequence[dict[str, list[float]]], inputs: int) -> dict[str, Any]:
    """Returns means over both directions of all splits, and the least and the largest ratio of one direction."""
    joined = {name: [value for split in splits for value in split.get(name, [])] for name in splits[0]}
    ratios = np.array(joined["other"]) / np.array(joined["own"])
    means = {name: float(np.mean(values)) for name, values in joined.items()}
    kept_ratio = means["other"] / means["own"]
    return {"inputs": inputs, **means, "kept": kept_ratio, "least": float(ratios.min()), "most": float(ratios.max())}


def of_sizes(parts: Sequence[Arrays], layers: Sequence[str], sizes: Sequence[int] = SIZES) -> list[dict[str, Any]]:
    """Returns the transfer between two disjoint halves of each size, drawn from all photographs."""
    rows = []
    sizes = [size for size in sizes if 2 * size <= len(parts)]
    for size in tqdm(sizes, desc="sizes"):
        splits = []
        for seed in range(SPLITS):
            with_others = size == max(sizes) and not seed
            splits.append(both_directions(halves_of(parts, size, seed), layers, seed if with_others else None))
        rows.append(summary(splits, size))
    return rows


def of_folders(parts: Sequence[Arrays], layers: Sequence[str], folders: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Returns the transfer between two halves of the photographs of one folder, for folders with enough of them."""
    found = {}
    for folder in tqdm(sorted(set(folders)), desc="folders"):
        own = [part for part, label in zip(parts, folders, strict=True) if label == folder]
        size = len(own) // 2
        if size < LEAST:
            continue
        splits = [both_directions(halves_of(own, size, seed), layers) for seed in range(SPLITS)]
        found[folder] = summary(splits, size)
    return found


def measure(
    nets: Sequence[str], composites: Sequence[str], store: Path, write: Callable[[str, str, dict[str, Any]], None]
) -> None:
    """Measures the transfer for some networks and composites, and passes each result to ``write``."""
    for name in nets:
        folders = [stamp.label for stamp in chosen_photos(COUNTS[name])]
        case = CASES[name](len(folders))
        for composite in composites:
            parts = [
                of_photo(case, number, composite, store / "transfer" / name / composite / f"{number}.npz")
                for number in tqdm(range(len(folders)), desc=f"{name}, {composite}")
            ]
            sizes, own = of_sizes(parts, case.layers), of_folders(parts, case.layers, folders)
            write(name, composite, {"sizes": sizes, "folders": own})
            print(name, composite, [round(row["kept"], 2) for row in sizes])
