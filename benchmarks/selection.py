"""Predictions after ablation of all channels that a selection excludes.

    OMP_NUM_THREADS=1 python -m benchmarks.selection

For correctly classified held-out digits, each method ranks the channels of several convolutions, after their ReLU.
Every digit has its own ranking, and the same number of channels is retained over all layers. All other channels are
set to zero, to their mean over other digits, or to the values of another digit. Reported are the share of digits with
an unchanged prediction and the mean probability of the class, with 95% bootstrap intervals over digits, and paired
differences of probability to `select_neurons (ε, z⁺)`.

Methods: `select_neurons` (joint relevance), marginal relevance of the same measure, plain LRP (Zennit, EpsilonPlus),
Captum's LayerConductance, activation, chance. Methods without a common scale of layers are compared across
layers after division by the layer's sum of absolute values. Writes benchmarks/results/selection.json and
docs/images/selection.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import matplotlib
import torch
from captum.attr import LayerConductance
from safetensors.torch import load_model as load_weights
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from benchmarks import tables
from benchmarks.train_demo import NETS
from benchmarks.train_demo import main as train
from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure, ablation, activations, select_neurons
from nrm_plugin.demo import DigitsCNN, load_digits, load_model

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "selection.json"
FIGURE = ROOT / "docs" / "images" / "selection.png"
LAYERS = {
    "digits_vgg": ["features.3", "features.6", "features.8", "features.11", "features.13"],
    "digits_cnn": ["features.1", "features.4", "features.7"],
}
SHARES = [0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75]
FILLS = ["zero", "mean", "resample"]
DRAWS = 2000


def shared(parts: list[Tensor]) -> Tensor:
    """Returns the concatenated scores of several layers, each divided by its sum of absolute values."""
    return torch.cat([p.abs() / p.abs().sum(1, keepdim=True).clamp(min=1e-30) for p in parts], 1)


def ranked(scores: Tensor, counts: list[int]) -> Tensor:
    """Returns the rank of each channel, ``(N, channels)``; the best channel of each layer is always retained."""
    scores = scores.clone()
    for part in torch.split(scores, counts, 1):
        part.scatter_(1, part.argmax(1, keepdim=True), torch.inf)
    order = scores.argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(order).scatter(1, order, torch.arange(order.shape[1]).expand_as(order))


def rankings(model: nn.Module, images: Tensor, labels: Tensor, layers: list[str]) -> dict[str, tuple[Tensor, float]]:
    """Returns the ranking by every method, and its time in seconds."""
    values = activations(model, images, layers)
    counts = [values[layer].shape[1] for layer in layers]
    by_method: dict[str, tuple[Tensor, float]] = {}

    def note(name: str, begin: float, order: Tensor) -> None:
        by_method[name] = (order, time.perf_counter() - begin)

    rules = {"absolute": NRMAbsolute, "ε, z⁺": lambda: Normalized(EpsilonPlus())}
    for rule, make in rules.items():
        begin = time.perf_counter()
        mu = RelevanceMeasure(model, images, labels, composite=make())
        selection = select_neurons(mu, layers, budget=len(layers), rounds=20)
        note(f"select_neurons ({rule})", begin, selection.order)
        begin = time.perf_counter()
        mu = RelevanceMeasure(model, images, labels, composite=make())
        marginals = mu.marginal(layers, over="channel")
        note(f"marginal ({rule})", begin, ranked(shared([marginals[layer] for layer in layers]), counts))
    begin = time.perf_counter()
    recorded: dict[str, Tensor] = {}
    with EpsilonPlus().context(model):
        handles = [
            model.get_submodule(layer).register_forward_hook(
                lambda module, args, output, layer=layer: recorded.__setitem__(layer, output.requires_grad_())
            )
            for layer in layers
        ]
        output = model(images.clone().requires_grad_())
        start = torch.zeros_like(output).scatter(1, labels[:, None], output.detach().gather(1, labels[:, None]))
        grads = torch.autograd.grad(output, [recorded[layer] for layer in layers], start)
        for handle in handles:
            handle.remove()
    note("plain LRP", begin, ranked(shared([g.flatten(2).sum(2) for g in grads]), counts))
    begin = time.perf_counter()
    parts = []
    for layer in layers:
        conductance = LayerConductance(model, model.get_submodule(layer))
        parts.append(conductance.attribute(images, target=labels, n_steps=20).detach().flatten(2).sum(2))
    note("LayerConductance", begin, ranked(shared(parts), counts))
    begin = time.perf_counter()
    note("activation", begin, ranked(shared([values[layer].flatten(2).sum(2) for layer in layers]), counts))
    note("chance", begin, ranked(torch.rand(len(images), sum(counts)) + 1e-6, counts))
    return by_method


def interval(values: Tensor, draw: torch.Generator) -> list[float]:
    """Returns the mean and its 95% bootstrap interval."""
    picks = torch.randint(len(values), (DRAWS, len(values)), generator=draw)
    means = values[picks].mean(1)
    return [round(float(v), 4) for v in (values.mean(), means.quantile(0.025), means.quantile(0.975))]


def evaluate(name: str, model: nn.Module, count: int) -> dict[str, object]:
    """Evaluates all methods on one net."""
    torch.manual_seed(0)
    layers = LAYERS[name]
    images, labels = load_digits()
    with torch.no_grad():
        right = (model(images).argmax(1) == labels).nonzero().flatten()
    chosen, others = right[:count], right[count:]
    images, labels, reference = images[chosen], labels[chosen], images[others]
    by_method = rankings(model, images, labels, layers)
    around = activations(model, reference, layers)
    counts = [around[layer].shape[1] for layer in layers]
    draw = torch.Generator().manual_seed(0)
    rows, raw = [], {}
    for method, (order, seconds) in by_method.items():
        for fill in FILLS:
            for share in SHARES:
                keep = max(len(layers), round(share * sum(counts)))
                masks = dict(zip(layers, torch.split(order < keep, counts, 1), strict=True))
                with torch.no_grad(), ablation(model, masks, fill, around):
                    output = model(images).softmax(1)
                same = (output.argmax(1) == labels).float()
                probability = output.gather(1, labels[:, None])[:, 0]
                raw[method, fill, keep] = (same, probability)
                rows.append(
                    {
                        "method": method,
                        "fill": fill,
                        "kept": keep,
                        "same": interval(same, draw),
                        "probability": interval(probability, draw),
                        "seconds": round(seconds, 2),
                    }
                )
    for row in rows:
        best = raw["select_neurons (ε, z⁺)", row["fill"], row["kept"]]
        mine = raw[row["method"], row["fill"], row["kept"]]
        row["behind_select_neurons"] = interval(best[1] - mine[1], draw)
    return {"net": name, "samples": len(images), "layers": layers, "channels": counts, "rows": rows}


def draw(results: list[dict]) -> None:  # type: ignore[type-arg]
    """Draws curves with bands, with one column for each fill and one row for each net."""
    figure, axes = plt.subplots(len(results), 3, figsize=(11, 3.2 * len(results)), sharey=True, squeeze=False)
    for line, result in zip(axes, results, strict=True):
        for axis, fill in zip(line, FILLS, strict=True):
            for method in dict.fromkeys(row["method"] for row in result["rows"]):
                rows = [row for row in result["rows"] if row["method"] == method and row["fill"] == fill]
                x = [row["kept"] for row in rows]
                mean, low, high = zip(*(row["probability"] for row in rows), strict=True)
                (curve,) = axis.plot(x, mean, label=method, lw=2.2 if "select" in method else 1.2)
                axis.fill_between(x, low, high, color=curve.get_color(), alpha=0.15, lw=0)
            axis.set_title(f"{result['net']}, others: {fill}", fontsize=9)
            axis.set_xlabel(f"channels retained of {sum(result['channels'])}")
        line[0].set_ylabel("probability of the class")
    axes[0, -1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    """Evaluates all methods on both nets, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--cnn", type=Path, help="weights of DigitsCNN (default: train it, benchmarks.train_demo)")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    nets: dict[str, nn.Module] = {"digits_vgg": load_model(), "digits_cnn": DigitsCNN().eval()}
    with tempfile.TemporaryDirectory() as folder:
        if arguments.cnn is None:
            train(["--net", "cnn5", "--out", folder])
        load_weights(nets["digits_cnn"], arguments.cnn or Path(folder) / NETS["cnn5"][1])
    results = [evaluate(name, model, arguments.count) for name, model in nets.items()]
    environment = {name: version(name) for name in ("torch", "zennit", "captum")}
    environment["python"] = platform.python_version()
    RESULTS.write_text(json.dumps({"environment": environment, "nets": results}, indent=1) + "\n")
    draw(results)
    tables.write("selection")
    for result in results:
        for row in result["rows"]:
            print(result["net"], row["fill"], row["kept"], row["method"], row["same"], row["probability"])


if __name__ == "__main__":
    main()
