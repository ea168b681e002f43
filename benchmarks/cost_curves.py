"""Growth of the cost of a measure with batch size, conditions, image size, depth and number of queried taps.

``python -m benchmarks.cost_curves`` writes times as JSON and draws ``docs/images/cost_curves.png``; ``--render`` only
draws. Every point is the fastest of several rounds on one thread, next to a plain gradient of the same net and inputs.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from torch import nn
from tqdm import tqdm
from zennit.composites import EpsilonPlusFlat

from nrm_plugin import RelevanceMeasure, at

from .speed import ROOT, TARGET, build, environment, plain_gradient

RESULTS = ROOT / "benchmarks/results/cost_curves.json"
FIGURE = ROOT / "docs/images/cost_curves.png"
PLAIN, MARGINALS = "plain gradient", "all marginals"
CURVES = {
    "batch": "samples (VGG16, 112 px)",
    "size": "height and width of the image (VGG16)",
    "depth": "convolutions (64 channels, 56 px)",
    "conditions": "conditions at features.26, map at features.19",
    "taps": "queried taps, recording reused (VGG16, 224 px)",
}


def chain(depth: int) -> nn.Module:
    """Returns a series of convolutions and ReLUs with a linear layer on top."""
    torch.manual_seed(0)
    layers = [layer for _ in range(depth) for layer in (nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(inplace=True))]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(nn.Conv2d(3, 64, 3, padding=1), *layers[2:], *head).eval().requires_grad_(False)


def marginals(net: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """Returns all marginals and sinks, recording included."""

    def run() -> object:
        mu = RelevanceMeasure(net, x, TARGET, composite=EpsilonPlusFlat())
        return mu.marginal(mu.layers), mu.sinks()

    return run


def points(curve: str) -> list[tuple[int, dict[str, Callable[[], object]]]]:
    """Returns the computations that are timed at every point of a curve."""
    if curve == "depth":
        x = torch.randn(1, 3, 56, 56)
        nets = [(depth, chain(depth)) for depth in (2, 4, 8, 16, 32, 64)]
        return [(n, {PLAIN: lambda net=net: plain_gradient(net, x), MARGINALS: marginals(net, x)}) for n, net in nets]
    net = build("vgg16")
    if curve in ("batch", "size"):
        shapes = [(n, (n, 112)) for n in (1, 2, 4, 8, 16, 32)]
        if curve == "size":
            shapes = [(size, (1, size)) for size in (64, 96, 128, 224, 320, 448)]
        inputs = [(value, torch.randn(n, 3, size, size)) for value, (n, size) in shapes]
        return [(v, {PLAIN: lambda x=x: plain_gradient(net, x), MARGINALS: marginals(net, x)}) for v, x in inputs]
    x = torch.randn(1, 3, 224, 224)
    mu = RelevanceMeasure(net, x, TARGET, composite=EpsilonPlusFlat())
    layers = mu.marginal(mu.layers) and mu.layers
    if curve == "taps":
        counts = (1, 2, 4, 8, 16, len(layers))
        return [
            (n, {PLAIN: lambda: plain_gradient(net, x), MARGINALS: lambda n=n: mu.marginal(["input", *layers[1:n]])})
            for n in counts
        ]
    events = [at("features.26")[k] for k in range(256)]
    return [
        (
            k,
            {
                PLAIN: lambda: plain_gradient(net, x),
                "conditions": lambda k=k: mu.marginal("features.19", joint=events[:k]),
            },
        )
        for k in (1, 2, 4, 8, 16, 32, 64, 128, 256)
    ]


def timed(run: Callable[[], object], rounds: int) -> float:
    """Returns the seconds of the fastest round."""
    best = float("inf")
    for _ in range(rounds):
        gc.collect()
        started = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - started)
        if best > 5:
            break
    return best


def measure(rounds: int) -> dict[str, Any]:
    """Measures all curves."""
    torch.set_num_threads(1)
    curves: dict[str, Any] = {}
    for curve in tqdm(CURVES):
        rows = [
            {"value": value, **{name: timed(run, rounds) for name, run in work.items()}}
            for value, work in points(curve)
        ]
        curves[curve] = rows
    return curves


def draw(curves: dict[str, Any], path: Path) -> None:
    """Draws times over each quantity on logarithmic axes, with a line of proportional growth."""
    figure, grid = plt.subplots(2, 3, figsize=(11, 6.2), layout="constrained")
    axes = list(grid.flat)
    for axis in axes[len(curves) :]:
        axis.remove()
    for axis, (curve, rows) in zip(axes[: len(curves)], curves.items(), strict=True):
        values = [row["value"] for row in rows]
        for name in rows[0]:
            if name != "value":
                axis.plot(values, [row[name] for row in rows], marker="o", label=name)
        last = list(rows[0])[-1]
        power = 2 if curve == "size" else 0 if curve == "taps" else 1
        line = [rows[-1][last] * (value / values[-1]) ** power for value in values]
        axis.plot(values, line, color="0.6", linestyle=":", label=("constant", "linear", "proportional to area")[power])
        axis.set(xscale="log", yscale="log", xlabel=CURVES[curve], ylabel="seconds", xticks=values)
        axis.set_xticklabels([str(value) for value in values])
        axis.minorticks_off()
        low, high = axis.get_ylim()
        if high < 10 * low:  # noise of constant curves would look like growth
            axis.set_ylim(low / 3, high * 3)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--render", action="store_true", help="only draw the stored measurements")
    args = parser.parse_args()
    if not args.render:
        results = {"environment": environment(), "threads": 1, "curves": measure(args.rounds)}
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    draw(json.loads(RESULTS.read_text())["curves"], FIGURE)


if __name__ == "__main__":
    main()
