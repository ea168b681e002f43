"""Compares joint relevance with exact path patching, and renders the tables and the figure of the docs.

``python -m benchmarks.path_patching`` takes about half an hour on one thread; ``--quick`` measures a few samples.
``--nets`` measures only these nets and leaves the results of the others unchanged. ``--render`` rewrites tables and
figure from the committed results. zennit-crp is measured if it is installed (``make test-hosts``).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import outputs
from benchmarks.circuits.metrics import correlation
from benchmarks.default_composite import interval, resamples, rounded
from benchmarks.path_patching import figure
from benchmarks.path_patching.chains import KINDS, Kind
from benchmarks.path_patching.channels import ranked
from benchmarks.path_patching.nets import NETS, Case
from benchmarks.path_patching.pages import path_patching
from benchmarks.path_patching.scores import EXACT, REFERENCES, Chains, predictions
from benchmarks.real.stored import stored, update
from benchmarks.speed import environment

RESULTS = "path_patching.json"
SAMPLES = 210
"""Samples of each kind of net."""
PHOTOGRAPHS = {"VGG16": 18, "EfficientNet-Lite0": 13, "EfficientNet-Lite1": 18}
"""Samples of the nets for photographs, whose results are stored in the cache after each photograph."""
ORDER = "residual CNN", "digits", "transformer", "VGG16", "EfficientNet-Lite0", "EfficientNet-Lite1"
"""The nets in the order of the tables."""
FEW = 12, 2
"""Samples of a quick run: of each small net, and of each net for photographs."""
Values = dict[str, dict[str, Tensor]]
"""For each score and sample: correlation with path patching, and sums of absolute errors and of exact effects."""


def chains_of(case: Case, kinds: Sequence[Kind]) -> dict[str, Chains]:
    seen, _ = case.run(case.inputs(case.x), {})
    shapes = [tuple(seen[site].shape[1:]) for site in case.sites]
    found = {}
    for kind in kinds:
        lower, upper = kind.sets(shapes)
        found[kind.name] = Chains(tuple(case.sites[place] for place in kind.places), lower, upper)
    return found


def compared(case: Case, chains: dict[str, Chains], crp: bool) -> dict[tuple[str, str], Values]:
    """Returns the agreement of each score with path patching, by kind of sets and reference."""
    results: dict[tuple[str, str], Values] = {}
    for kind, start, score, values in predictions(case, chains, crp):
        predicted = values.detach().flatten(1)
        if score == EXACT:
            exact = predicted
        results.setdefault((kind, start), {})[score] = {
            "correlation": correlation(predicted.double(), exact.double()).float(),
            "error": (predicted - exact).abs().sum(1).float(),
            "size": exact.abs().sum(1).float(),
        }
    return results


def compared_once(net: str, case: Case, chains: dict[str, Chains]) -> dict[tuple[str, str], Values]:
    """Returns the same, without zennit-crp, from the cache of :mod:`benchmarks.real` if it has been computed."""
    settings = [(kind.name, kind.places, kind.draw.__name__, kind.lower, kind.upper) for kind in KINDS[net]]
    digest = hashlib.sha256(case.x.numpy().tobytes() + repr(settings).encode()).hexdigest()

    def compute() -> dict[str, np.ndarray]:
        found = compared(case, chains, crp=False)
        return {
            json.dumps([*place, score, key]): values.numpy()
            for place, scores in found.items()
            for score, one in scores.items()
            for key, values in one.items()
        }

    results: dict[tuple[str, str], Values] = {}
    for name, array in stored(f"path patching {net}", digest, compute).items():
        kind, start, score, key = json.loads(name)
        results.setdefault((kind, start), {}).setdefault(score, {})[key] = torch.from_numpy(array)
    return results


def measure_net(name: str, samples: int) -> dict[str, Any]:
    """Returns all kinds of sets in the nets of one kind, whose samples are pooled."""
    cases = NETS[name](samples)
    chains = chains_of(cases[0], KINDS[name])
    if name in PHOTOGRAPHS:
        parts = [compared_once(name, case, chains) for case in tqdm(cases, desc=name, unit="photograph")]
    else:
        parts = [compared(case, chains, crp=find_spec("crp") is not None) for case in cases]
    kinds = {
        kind: {
            "sites": list(one.sites),
            "chains": len(one.lower) * len(one.upper),
            "references": {
                start: summary([part[kind, start] for part in parts])
                for start in REFERENCES
                if (kind, start) in parts[0]
            },
        }
        for kind, one in chains.items()
    }
    found = {"samples": sum(len(case.x) for case in cases), "kinds": kinds}
    return {**found, "channels": ranking(cases)} if cases[0].layers else found


def ranking(cases: list[Case]) -> dict[str, Any]:
    """Returns the channels of all layers in one ranking, by fill and score."""
    parts = [ranked(case) for case in cases]
    draw = resamples(torch.arange(sum(len(case.x) for case in cases)))

    def pooled(fill: str, score: str, key: str) -> list[float]:
        return interval(torch.cat([part[fill][score][key] for part in parts]), draw)

    return {
        fill: {score: {key: pooled(fill, score, key) for key in keys} for score, keys in scores.items()}
        for fill, scores in parts[0].items()
    }


def summary(parts: list[Values]) -> dict[str, Any]:
    """Returns means with intervals over samples, and paired differences of each joint score from the best product."""
    pooled = {
        score: {key: torch.cat([part[score][key] for part in parts]) for key in values}
        for score, values in parts[0].items()
        if score != EXACT
    }
    found = {score: values["correlation"] for score, values in pooled.items()}
    draw = resamples(torch.arange(len(next(iter(found.values())))))
    errors = {score: ratios(values["error"], values["size"], draw) for score, values in pooled.items()}
    products = [score for score in found if score.startswith("product")]
    best = max(products, key=lambda score: float(found[score].mean()))
    closest = min(products, key=lambda score: float(errors[score][0]))
    rows: dict[str, Any] = {}
    for score in pooled:
        rows[score] = {"correlation": interval(found[score], draw), "error": round(float(errors[score][0]), 4)}
        if not score.startswith("product"):
            rows[score]["minus best product"] = interval(found[score] - found[best], draw)
            rows[score]["error minus best product"] = bounds(errors[score] - errors[closest])
    change = interval(found["joint, secants"] - found["joint, tangents"], draw)
    return {"best product": best, "closest product": closest, "secants minus tangents": change, "scores": rows}


def ratios(numerator: Tensor, denominator: Tensor, draw: Tensor) -> Tensor:
    """Returns the ratio of the sums over all samples, and then over those of every resample, ``(1 + B,)``."""
    weights = torch.cat([torch.full_like(draw[:1], 1 / draw.shape[1]), draw])
    return (weights @ numerator) / (weights @ denominator)


def bounds(values: Tensor) -> list[float]:
    """Returns the first value, and the bounds of the 95% interval of the others."""
    low, high = torch.quantile(values[1:], torch.tensor([0.025, 0.975]))
    return [rounded(values[0]), rounded(low), rounded(high)]


def measure(nets: Sequence[str], samples: dict[str, int], files: outputs.Outputs) -> None:
    """Measures these nets; stores the results after each of them, so that a run can be continued.

    Args:
        nets: The nets.
        samples: Number of samples of each net.
        files: The files to write; results of other nets in them are kept.
    """
    for name in nets:
        began = time.process_time()
        net = measure_net(name, samples[name])
        net["processor seconds"] = round(time.process_time() - began)
        used = {**environment(), "threads": torch.get_num_threads()}
        results = update(files.results / RESULTS, name, net, ORDER, environment=used)
        print(f"\n{name}\n\n{path_patching(results)[name]}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="12 samples of each net, two photographs")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="measure only these")
    parser.add_argument("--render", action="store_true", help="rewrite page and figure only")
    outputs.add_option(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    files = outputs.chosen(options)
    if not options.render:
        samples = {name: PHOTOGRAPHS.get(name, SAMPLES) for name in options.nets}
        few = {name: FEW[name in PHOTOGRAPHS] for name in options.nets}
        measure(options.nets, few if options.quick else samples, files)
    files.render("path_patching")
    figure.draw(json.loads((files.results / RESULTS).read_text()), files.images)


if __name__ == "__main__":
    main()
