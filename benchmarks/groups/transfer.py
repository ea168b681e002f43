"""How well groups of VGG16 hold on other photographs: ``python -m benchmarks.groups.transfer``.

Groups are found from the mean joint relevance of 6 to 72 photographs, and evaluated on the mean of 12 other ones, as
in the comparison of halves. It shows whether the number of photographs limits the share of dependence that they keep.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from benchmarks.conservation import RESULTS
from benchmarks.real import packages
from benchmarks.speed import environment
from nrm_plugin import RelevanceMeasure, find_groups
from nrm_plugin.measure.dependence import dependence

from .__main__ import kappas
from .joints import COMPOSITES, Arrays, K, mean_of
from .nets import CASES, Case

NUMBERS, HELD_OUT, PHOTOS, SPLITS = (6, 12, 24, 48, 72), 12, 84, 3


def joints_of(case: Case, number: int, composite: str) -> Arrays:
    """Joint relevance and masses of one photograph; read from a file if it exists."""
    file = packages.cache() / "groups-transfer" / composite / f"{number}.npz"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        x = case.inputs[number : number + 1]
        mu = RelevanceMeasure(case.model, x, int(case.model(x).argmax()), composite=COMPOSITES[composite]())
        arrays = {f"joint {pair}": joint[0].numpy() for pair, joint in enumerate(mu.joints(list(case.layers)))}
        for place, layer in enumerate(case.layers):
            arrays[f"mass {place}"] = mu.marginal(layer, over="channel")[0].numpy()
        partial = file.with_suffix(".part.npz")
        np.savez_compressed(partial, **arrays)
        partial.replace(file)
    with np.load(file) as stored:
        return dict(stored)


def results(composite: str) -> dict[str, float]:
    """Mean κ on held-out photographs of the groups of other ones, by their number, and of their own groups."""
    case = CASES["VGG16"](PHOTOS)
    parts = [joints_of(case, number, composite) for number in tqdm(range(PHOTOS), desc=composite)]
    found: dict[str, list[float]] = {}
    for seed in range(SPLITS):
        order = np.random.default_rng(seed).permutation(PHOTOS)
        held, rest = order[:HELD_OUT], order[HELD_OUT:]
        means = mean_of([parts[i] for i in held], case.layers)
        dependences = [dependence(joint) for joint in means.joints]
        sets = {"own": held, **{f"{count}": rest[:count] for count in NUMBERS}}
        for name, chosen in tqdm(sets.items(), desc=f"split {seed}"):
            groups = find_groups(mean_of([parts[i] for i in chosen], case.layers), case.layers, K)
            labels = [own.numpy() for own in groups.labels]
            found.setdefault(name, []).append(float(np.mean(kappas(dependences, labels))))
            found.setdefault(f"{name}, fitted", []).append(groups.kappa)
    return {name: float(np.mean(values)) for name, values in found.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--composites", nargs="+", default=list(COMPOSITES), choices=list(COMPOSITES))
    file = RESULTS / "groups_transfer.json"
    for composite in parser.parse_args(arguments).composites:
        stored = json.loads(file.read_text()) if file.exists() else {}
        stored |= {"environment": environment(), composite: results(composite)}
        file.write_text(json.dumps(stored, indent=1) + "\n")
        print(composite, stored[composite], flush=True)


if __name__ == "__main__":
    main()
