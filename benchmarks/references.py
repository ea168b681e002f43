"""Time of the search for reference examples, compared with zennit-crp's feature visualization.

``python -m benchmarks.references`` compares the references of both, then times both alternately in one process, with
the same data, model, composite, layers and batch size. Times are processor seconds on one thread, which excludes
other processes. Every round runs each once, and the factor is the median over rounds. Both find the best 40 samples
of each channel, by relevance and by activation, over all samples and for each class, and the position of the largest
value in the channel. It needs zennit-crp, which ``make test-hosts`` installs.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import io
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zennit.composites import EpsilonPlusFlat

from benchmarks.markdown import with_part
from benchmarks.speed import environment
from nrm_plugin.dataset.example_search import find_references
from nrm_plugin.dataset.examples import FoundReferences
from nrm_plugin.demo import load_digits, load_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/references.json"
PAGE = ROOT / "docs/references.md"
STORED = 40
"""Samples of each channel that zennit-crp stores; fixed in zennit-crp."""
TIE = 1e-4
"""Relative difference of values up to which the order of two samples is not determined, in single precision."""


def digits() -> tuple[nn.Module, TensorDataset, list[str], int]:
    """Returns the embedded net with its held-out digits, and all convolutions and linear layers except the last."""
    layers = [*(f"features.{number}" for number in (0, 2, 5, 7, 10, 12)), "classifier.0"]
    return load_model(), TensorDataset(*load_digits()), layers, 32


def vgg16(samples: int = 8, size: int = 224) -> tuple[nn.Module, TensorDataset, list[str], int]:
    """Returns VGG16 with random weights, noise for images of 4 classes, and all convolutions."""
    torch.manual_seed(0)
    net = torchvision.models.vgg16(weights=None).eval()
    data = TensorDataset(torch.randn(samples, 3, size, size), torch.arange(samples) % 4)
    return net, data, [f"features.{number}" for number in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)], 4


def ours(net: nn.Module, data: TensorDataset, layers: list[str], batch: int) -> FoundReferences:
    """Runs the search of this package, with zennit-crp's settings."""
    return find_references(
        net, data, layers, STORED, unit="layer", composite=EpsilonPlusFlat(), residual="sink", batch_size=batch
    )


def theirs(net: nn.Module, data: TensorDataset, layers: list[str], batch: int, folder: str) -> Any:
    """Runs the unmodified feature visualization of zennit-crp."""
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept
    from crp.visualization import FeatureVisualization

    concepts = {layer: ChannelConcept() for layer in layers}
    visualization = FeatureVisualization(CondAttribution(net), data, concepts, path=folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        visualization.run(EpsilonPlusFlat(), 0, len(data), batch_size=batch)
    return visualization


def compared(references: FoundReferences, other: Any, layers: list[str], classes: int) -> dict[str, float]:
    """Returns the largest difference over all layers, criteria and classes; samples without ties must be equal.

    Raises:
        AssertionError: The references differ.
    """
    from crp.helper import load_maximization, load_statistics

    worst, equal, places = 0.0, 0, 0
    for layer in layers:
        for by, most, stats in (
            ("relevance", other.RelMax, other.RelStats),
            ("activation", other.ActMax, other.ActStats),
        ):
            for target in (None, *range(classes)):
                path = most.PATH if target is None else stats.PATH
                listed = load_maximization(path, layer) if target is None else load_statistics(path, layer, target)
                samples, values = (torch.as_tensor(part.copy()).T for part in listed[:2])
                mine = references.of(layer, by, target)  # type: ignore[arg-type]
                size = values.abs().max()
                worst = max(worst, float((mine.values[:, : values.shape[1]] - values).abs().max() / size))
                alone = _alone(values, TIE * size)
                same = mine.samples[:, : values.shape[1]] == samples
                equal, places = equal + int((same & alone).sum()), places + int(alone.sum())
    assert worst < 1e-3, f"values differ by {worst:.1e}"
    assert equal == places, f"{places - equal} of {places} references differ"
    return {"largest relative difference of values": worst, "references compared": places}


def _alone(values: Tensor, tie: Tensor) -> Tensor:
    """Returns a mask of the ranks that are not tied with a neighbor or, possibly, with a sample below the list."""
    gap = values.diff(dim=1).abs() > tie
    yes = torch.ones_like(gap[:, :1])
    last = yes if values.shape[1] < STORED else torch.zeros_like(yes)
    return torch.cat([yes, gap], 1) & torch.cat([gap, last], 1)


def run(name: str, make: Callable[[], Any], rounds: int) -> dict[str, Any]:
    """Compares both, then times them alternately."""
    net, data, layers, batch = make()
    classes = int(data.tensors[1].max()) + 1
    seconds: dict[str, list[float]] = {"nrm-plugin": [], "zennit-crp": []}
    with tempfile.TemporaryDirectory() as folder:
        agreement = compared(ours(net, data, layers, batch), theirs(net, data, layers, batch, folder), layers, classes)
    for _ in range(rounds):
        for who, times in seconds.items():
            gc.collect()
            with tempfile.TemporaryDirectory() as folder:
                started = time.process_time()
                if who == "nrm-plugin":
                    ours(net, data, layers, batch)
                else:
                    theirs(net, data, layers, batch, folder)
                times.append(time.process_time() - started)
    channels = sum(len(net.get_submodule(layer).weight) for layer in layers)  # type: ignore[arg-type]
    about = {"net": name, "samples": len(data), "batch": batch, "layers": len(layers), "channels": channels}
    factors = [other / mine for mine, other in zip(*seconds.values(), strict=True)]
    return {**about, "classes": classes, "seconds": seconds, "factor": statistics.median(factors), **agreement}


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="only the digits net")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="only write the table of docs/references.md")
    args = parser.parse_args()
    if args.render:
        render(json.loads(RESULTS.read_text()))
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    problems: dict[str, Callable[[], Any]] = {"digits": digits} | ({} if args.quick else {"vgg16": vgg16})
    runs = []
    for name, make in problems.items():
        runs.append(run(name, make, args.rounds))
        mine, other = (min(times) for times in runs[-1]["seconds"].values())
        print(f"{name}: {runs[-1]['references compared']} references compared, all identical")
        print(
            f"  nrm-plugin {mine:.2f} s, zennit-crp {other:.2f} s fastest; factor {runs[-1]['factor']:.2f}", flush=True
        )
    args.out.parent.mkdir(exist_ok=True)
    results = {"environment": environment(), "threads": 1, "runs": runs}
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.out == RESULTS:
        render(results)


def render(results: dict[str, Any]) -> None:
    """Writes the table of the page."""
    lines = ["", "| net | data | identical references | fastest run in s: ours, zennit-crp | median speed-up |"]
    lines.append("|---|---|---|---|---|")
    for one in results["runs"]:
        net = f"{one['net']}, {one['channels']} channels of {one['layers']} layers"
        data = f"{one['samples']} samples of {one['classes']} classes, batches of {one['batch']}"
        seconds = " / ".join(f"{min(times):.2f}" for times in one["seconds"].values())
        same = "{0:,} of {0:,} (ties excluded)".format(one["references compared"])  # ``compared`` raises otherwise
        lines.append(f"| {net} | {data} | {same} | {seconds} | {one['factor']:.1f} |")
    place = results["environment"]
    lines += ["", f"torch {place['torch']}, zennit {place['zennit']}, float32, one core of {place['processor']}."]
    PAGE.write_text(with_part(PAGE.read_text(), "measured", "\n".join(lines)))


if __name__ == "__main__":
    main()
