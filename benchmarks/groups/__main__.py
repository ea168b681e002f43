"""Measures how much dependence groups retain on trained networks: ``python -m benchmarks.groups``. ``python -m
benchmarks.tables`` renders docs/groups.md.

Joint relevance of every input is stored under --store, so that an interrupted run resumes where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import tables
from benchmarks.real import packages
from benchmarks.speed import environment
from nrm_plugin import find_groups
from nrm_plugin.measure.dependence import dependence

from . import transfer
from .joints import COMPOSITES, Arrays, mean_of, of_input
from .nets import CASES
from .partitions import K, kappas, other_partitions

RESULTS = Path(__file__).parents[1] / "results" / "groups.json"
COUNTS = {"VGG16": 24, "EfficientNet-Lite0": 24, "residual": 96, "transformer": 96}
"""Inputs of each network."""
SPLITS = 5


def interval(values: Sequence[float]) -> dict[str, float]:
    """Returns the mean and 95% bootstrap interval over inputs."""
    known = np.array([value for value in values if not math.isnan(value)])
    draws = np.random.default_rng(0).choice(known, (2000, len(known))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"mean": float(known.mean()), "low": float(low), "high": float(high), "inputs": len(known)}


def of_case(parts: list[Arrays], layers: tuple[str, ...]) -> dict[str, Any]:
    """Returns all figures of one network and composite."""
    rows: dict[str, list[float]] = {}
    ratios = []
    for number, arrays in enumerate(tqdm(parts, desc="groups")):
        means = mean_of([arrays], layers)
        dependences = [dependence(joint) for joint in means.joints]
        own = float(np.mean(find_groups(means, layers, K).kappas))
        rows.setdefault("groups", []).append(own)
        masses, activations = ([arrays[f"{kind} {n}"] for n, _ in enumerate(layers)] for kind in ("mass", "activation"))
        others = {
            name: float(np.mean(kappas(dependences, labels)))
            for name, labels in other_partitions(masses, activations, number).items()
        }
        for name, value in others.items():
            rows.setdefault(name, []).append(value)
        ratios.append(own / max(others.values()))
    return {
        "kappa": {name: interval(values) for name, values in rows.items()},
        "times the best other": {**interval(ratios), "least": min(ratios)},
        "ablation": ablation(parts, layers),
        "halves": halves(parts, layers),
    }


def ablation(parts: list[Arrays], layers: tuple[str, ...]) -> dict[str, Any]:
    """Correlates the mass of sets with the change of the output when they are ablated; also the mean difference.

    Correlations are those of as many sets as there are groups; for several random sets of a group, their mean.
    """
    found: dict[str, Any] = {}
    for name in ("groups", "same mass", "alone", "random"):
        by_input = np.array([[_predicted(part, name, place) for place, _ in enumerate(layers)] for part in parts])
        correlations, differences = by_input.mean(1).T
        found[name] = {
            "correlation": interval(correlations.tolist()), "difference": interval(differences.tolist()),
        }  # fmt: skip
        if name == "same mass":
            groups = found["groups"]["each"]
            found["groups minus same mass"] = {
                "correlation": interval((groups[0] - correlations).tolist()),
                "difference": interval((groups[1] - differences).tolist()),
            }
        found[name]["each"] = (correlations, differences)
    for figures in found.values():
        figures.pop("each", None)
    return found


def _predicted(part: Arrays, name: str, place: int) -> tuple[float, float]:
    """Returns the correlation of mass and change over the sets of one layer, and their mean absolute difference."""
    count = len(part[f"groups {place} mass"])
    masses, changes = (part[f"{name} {place} {kind}"].reshape(-1, count) for kind in ("mass", "change"))
    each = [np.corrcoef(mass, change)[0, 1] for mass, change in zip(masses, changes, strict=True)]
    return float(np.nanmean(each)), float(np.abs(masses - changes).mean())


def halves(parts: list[Arrays], layers: tuple[str, ...]) -> dict[str, float]:
    """Returns κ on one half of the inputs, for groups found on the same half and for groups found on the other half."""
    own, other = [], []
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(len(parts))
        sides = [mean_of([parts[i] for i in side], layers) for side in np.array_split(order, 2)]
        found = [find_groups(side, layers, K) for side in sides]
        for here, there in ((0, 1), (1, 0)):
            dependences = [dependence(joint) for joint in sides[here].joints]
            for values, groups in ((own, found[here]), (other, found[there])):
                values.append(float(np.mean(kappas(dependences, [labels.numpy() for labels in groups.labels]))))
    return {"own": float(np.mean(own)), "other": float(np.mean(other)), "kept": float(np.mean(other) / np.mean(own))}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nets", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--count", type=int, help="inputs of each network (default: 24 photographs, 96 small images)")
    parser.add_argument("--store", type=Path, default=packages.cache() / "groups")
    parser.add_argument("--composites", nargs="+", default=list(COMPOSITES), choices=list(COMPOSITES))
    parser.add_argument("--transfer", action="store_true", help="measure only the transfer to other photographs")
    options = parser.parse_args(arguments)
    if not options.transfer:
        _measure(options.nets, options.composites, options.count, options.store)
    nets = [name for name in options.nets if name in transfer.COUNTS]
    transfer.measure(nets, options.composites, options.store, partial(_write, "transfer"))
    tables.write("groups")


def _measure(nets: Sequence[str], composites: Sequence[str], wanted: int | None, store: Path) -> None:
    for name in nets:
        count = wanted or COUNTS[name]
        case = CASES[name](count)
        for composite in composites:
            parts = [
                of_input(case, number, composite, store / name / composite / f"{number}.npz")
                for number in tqdm(range(count), desc=f"{name}, {composite}")
            ]
            figures = of_case(parts, case.layers) | {"layers": list(case.layers)}
            print(name, composite, json.dumps(figures["kappa"]))
            _write("nets", name, composite, figures)


def _write(part: str, net: str, composite: str, figures: dict[str, Any]) -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # another process may have written
    results["environment"] = environment()
    results.setdefault(part, {}).setdefault(net, {})[composite] = figures
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
