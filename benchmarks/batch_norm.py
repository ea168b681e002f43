"""Effect of batch-norm fusion on heat map, sink and variation, after convolutions and after linear layers.

``python -m benchmarks.batch_norm`` trains four small nets, measures them, and writes the results as JSON, the tables of
``docs/batch-norm.md`` and its figure; a minute on one core. Training needs the digits of scikit-learn.
"""

import argparse
import json
import platform
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from zennit.composites import EpsilonPlusFlat, LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.rules import Epsilon
from zennit.types import Linear

from benchmarks.default_composite import Net as Samples
from benchmarks.default_composite import draw_shapes, flip, rounded
from benchmarks.default_composite_page import markdown
from benchmarks.train_demo import reproducible, shift, split_digits
from nrm_plugin import FuseBatchNorm, NRMDefault, RelevanceMeasure
from nrm_plugin.demo.model import enlarge
from nrm_plugin.errors import BatchNormWarning
from nrm_plugin.plots.heatmaps import draw_heat_map, draw_image

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/batch_norm.json"
PAGE = ROOT / "docs/batch-norm.md"
FIGURE = ROOT / "docs/images/batch_norm.png"

COMPOSITES: dict[str, Callable[[list[Any]], Composite]] = {
    "LRP-ε": lambda canonizers: LayerMapComposite([*layer_map_base(), (Linear, Epsilon(1e-6))], canonizers=canonizers),
    "EpsilonPlusFlat": lambda canonizers: EpsilonPlusFlat(canonizers=canonizers),
    "NRMDefault": lambda canonizers: NRMDefault(canonizers=canonizers),
}
DATA = {"digits": (1, 10), "shapes": (3, 5)}  # channels of the images, classes
STEPS, BATCH, SAMPLES = 500, 64, 256
SHOWN = 0  # the sample of the figure
DENSE = "dense"

Row = tuple[Tensor, list[Tensor]]
"""An image ``(C, H, W)`` and heat maps ``(H, W)``."""


def net(channels: int, classes: int, dense_norm: bool) -> nn.Sequential:
    """Returns two convolutions with batch norm and two linear layers, for images ``(N, channels, 16, 16)``."""
    parts: dict[str, nn.Module] = {
        **{"conv1": nn.Conv2d(channels, 12, 3, padding=1), "norm1": nn.BatchNorm2d(12), "relu1": nn.ReLU()},
        **{"pool1": nn.MaxPool2d(2), "conv2": nn.Conv2d(12, 24, 3, padding=1), "norm2": nn.BatchNorm2d(24)},
        **{"relu2": nn.ReLU(), "pool2": nn.MaxPool2d(2), "flat": nn.Flatten(), DENSE: nn.Linear(24 * 16, 48)},
        **({"norm3": nn.BatchNorm1d(48)} if dense_norm else {}),
        **{"relu3": nn.ReLU(), "head": nn.Linear(48, classes)},
    }
    return nn.Sequential(OrderedDict(parts))


def trained(data: str, dense_norm: bool) -> Samples:
    """Returns a net and held-out samples of a dataset."""
    training, held_out = split_digits(0)
    digits, labels = enlarge(training.images), training.labels.long()

    def batch() -> tuple[Tensor, Tensor]:
        if data == "shapes":
            return draw_shapes(BATCH)
        chosen = torch.randint(len(labels), (BATCH,))
        return shift(digits[chosen]), labels[chosen]

    with reproducible(0):
        model = net(*DATA[data], dense_norm)
        optimizer = torch.optim.Adam(model.parameters(), weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=STEPS)
        for _ in tqdm(range(STEPS), desc=data, unit="step", leave=False):
            optimizer.zero_grad()
            images, wanted = batch()
            torch.autograd.backward(nn.functional.cross_entropy(model(images), wanted))
            optimizer.step()
            schedule.step()
        if data == "shapes":
            images, wanted = draw_shapes(SAMPLES)
        else:
            images, wanted = enlarge(held_out.images[:SAMPLES]), held_out.labels[:SAMPLES].long()
    model.eval()
    with torch.no_grad():
        accuracy = float((model(images).argmax(1) == wanted).double().mean())
    fill = torch.zeros(1, 1, 1, 1) if data == "digits" else images.mean((0, 2, 3), keepdim=True)
    return Samples(data, model, images, torch.arange(len(images)), fill, accuracy)


def measure(samples: Samples, composite: Composite) -> tuple[dict[str, Any], Tensor]:
    """Measures sink, variation and faithfulness of a composite with ``residual="sink"``; also returns a heat map."""
    none = torch.zeros(len(samples.images))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mu = RelevanceMeasure(samples.model, samples.images, samples.target, composite=composite, residual="sink")
        heat = mu.marginal("input").sum(1, keepdim=True)
    sinks = mu.sinks()
    most, least = flip(samples, heat, most_first=True), flip(samples, heat, most_first=False)
    metrics = {
        "sink": rounded(mu.sink("input").median()),
        "dense": rounded((sinks.get(DENSE, none) / (1 - sinks.get("head", none))).median()),
        "variation": rounded(torch.stack([mu.variation(name) for name in mu.layers]).amax(0).median()),
        "walk": rounded(mu.walk_variation().median()),
        "flip": rounded(most.mean()),
        "span": rounded((least - most).mean()),
        "warns": any(issubclass(item.category, BatchNormWarning) for item in caught),
    }
    shown = {"sink": float(mu.sink("input")[SHOWN]), "variation": float(mu.variation("input")[SHOWN])}
    return metrics | {"shown": shown}, heat[SHOWN, 0]


@torch.no_grad()
def lost_columns(model: nn.Sequential, images: Tensor) -> float:
    """Returns the share of neurons of the first linear layer that propagate less than half, over all samples."""
    below = model[: list(model._modules).index(DENSE)](images)
    dense = model.get_submodule(DENSE)
    output = dense(below)
    image = output - dense.bias
    if "norm3" in model._modules:
        norm = model.get_submodule("norm3")
        output = norm(output)
        image = image * norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return float((image / output < 0.5).double().mean())


def run() -> tuple[dict[str, Any], list[Row]]:
    """Measures all composites on all nets, with and without fusion; also returns the contents of the figure."""
    started = time.perf_counter()
    nets, panels = [], []
    for data in DATA:
        for dense_norm in (False, True):
            samples = trained(data, dense_norm)
            rows, maps = [], []
            for name, composite in COMPOSITES.items():
                for fused in (False, True):
                    metrics, heat = measure(samples, composite([FuseBatchNorm()] if fused else []))
                    rows.append({"composite": name, "fused": fused, **metrics})
                    maps.append(heat)
            nets.append(
                {
                    "data": data,
                    "dense_norm": dense_norm,
                    "accuracy": round(samples.accuracy, 4),
                    "lost_columns": round(lost_columns(samples.model, samples.images), 4),
                    "rows": rows,
                }
            )
            panels.append((samples.images[SHOWN], maps))
    environment = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "zennit")}}
    settings = {"steps": STEPS, "batch": BATCH, "samples": SAMPLES, "shown": SHOWN}
    seconds = round(time.perf_counter() - started)
    return {"environment": environment, "settings": settings, "nets": nets, "seconds": seconds}, panels


# -- page and figure ------------------------------------------------------------------------------------------------


def titles(results: dict[str, Any]) -> list[str]:
    """Returns one title for each net."""
    return [f"{net['data']}, BN after conv{' and linear' if net['dense_norm'] else ''}" for net in results["nets"]]


def write_page(results: dict[str, Any]) -> None:
    """Writes the tables between the markers of the page."""
    keys = ("sink", "variation", "walk", "flip", "span")
    lines, dense = [], []
    for title, net in zip(titles(results), results["nets"], strict=True):
        pairs = {row["composite"]: (row, fused) for row, fused in zip(net["rows"][::2], net["rows"][1::2], strict=True)}
        for name, (plain, fused) in pairs.items():
            lines.append([title, name, *(f"{show(plain[key])} → {show(fused[key])}" for key in keys)])
        plain, fused = pairs["LRP-ε"]
        dense.append(
            [
                title,
                f"{100 * net['accuracy']:.1f}%",
                *(f"{100 * row['dense']:.1f}%" for row in (plain, fused)),
                f"{100 * net['lost_columns']:.0f}%",
                "yes" if any(row["warns"] for row in net["rows"]) else "no",
            ]
        )
    header = ["net", "composite", "sink", "tap variation, max", "walk variation", "flip ↓", "span ↑"]
    tables = {
        "fusion": markdown(header, lines),
        "dense": markdown(["net", "accuracy", "absorbed, unfused", "fused", "neurons", "warns"], dense),
    }
    text = PAGE.read_text(encoding="utf-8")
    for name, table in tables.items():
        start, end = f"<!-- {name} -->\n", f"<!-- end {name} -->"
        before, rest = text.split(start)
        text = before + start + "\n" + table + "\n" + end + rest.split(end)[1]
    PAGE.write_text(text, encoding="utf-8")


def show(value: float) -> str:
    """Formats a number with two decimals, or fewer if it is large."""
    return f"{round(value, 2) + 0:.2f}" if abs(value) < 10 else f"{value:.0f}"


def draw(results: dict[str, Any], panels: list[Row]) -> None:
    """Draws the figure: rows are nets, and pairs of columns are composites without and with fusion."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, grid = pyplot.subplots(len(panels), 1 + 2 * len(COMPOSITES), figsize=(12, 7.7), layout="constrained")
    for axes, (image, maps), net, title in zip(grid, panels, results["nets"], titles(results), strict=True):
        draw_image(axes[0], image)
        axes[0].set_ylabel(title.replace(", ", "\n").replace(" and", "\nand"), fontsize=10)
        for axis, heat, row in zip(axes[1:], maps, net["rows"], strict=True):
            draw_heat_map(axis, heat, image)
            axis.set_xlabel(f"sink {show(row['shown']['sink'])}, V {show(row['shown']['variation'])}", fontsize=9.5)
    for column, row in enumerate(results["nets"][0]["rows"], start=1):
        grid[0][column].set_title(f"{row['composite']}\n{'fused' if row['fused'] else 'unfused'}", fontsize=11)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(FIGURE, dpi=80)
    pyplot.close(figure)


def main() -> None:
    """Measures, and writes JSON, tables and figure."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results, panels = run()
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    write_page(results)
    draw(results, panels)


if __name__ == "__main__":
    main()
