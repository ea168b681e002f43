"""Cost of a sweep relative to the measure alone in a loop, growth of its memory, and time to read its rows.

``python -m benchmarks.sweep`` prints measured figures and goals, and writes them as JSON with the environment.
``--read``, ``--throughput`` and ``--memory`` run one part. Throughput: every round runs the loop over batches, the
sweep and the data loader alone, so that load from other processes affects all of them. The time of the loader is
subtracted from the time of the sweep, and the ratio is taken between the fastest rounds, in wall time and in processor
time. Reading: synthetic values in the file format of a sweep.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from benchmarks import tables
from benchmarks.speed import environment
from nrm_plugin import NRMDefault, RelevanceMeasure
from nrm_plugin.dataset import Joint, Manifest, Marginal, Query, Sink, Sweep, Variation, sweep
from nrm_plugin.dataset.evaluation import BatchResults
from nrm_plugin.dataset.progress import resident
from nrm_plugin.dataset.row_index import write_index
from nrm_plugin.dataset.sample_batches import ShardPlan, data_source, load_batches
from nrm_plugin.dataset.shard_writer import ShardInfo, write_shard
from nrm_plugin.dataset.sweep_settings import digest
from nrm_plugin.demo.model import load_model

RESULTS = Path(__file__).parent / "results/sweep.json"
BATCH, SHARD = 16, 128
THROUGHPUT, GROWTH, SECONDS = 0.85, 1.02, 1.0
"""Targets: throughput relative to the measure, memory growth after the first tenth, seconds for the top nine."""
SAMPLES, CHANNELS = 20_000, 512

NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], list[str], int]] = {
    "vgg16": (lambda: torchvision.models.vgg16(weights=None), (3, 128, 128), ["features.28", "features.26"], 48),
    "demo digits": (load_model, (1, 16, 16), ["features.10", "features.5"], 1024),
}
"""Model, shape of a sample, an upper and a lower layer, and number of samples."""


def queries_of(layers: list[str]) -> list[Query]:
    """Returns queries of the channels of two layers, their joint relevance, sinks and variations."""
    return [
        *(Marginal(layer) for layer in layers),
        *(Sink(layer) for layer in layers),
        *(Variation(layer) for layer in layers),
        Joint(*layers),
    ]


def bare(net: nn.Module, batches: list[Tensor], layers: list[str]) -> list[Any]:
    """Returns the same results from the measure alone, computed in a loop and held in memory."""

    def start(outputs: Tensor) -> Tensor:
        return nn.functional.one_hot(outputs.argmax(1), outputs.shape[1]).to(outputs)

    results, rules = [], NRMDefault()
    for x in batches:
        mu = RelevanceMeasure(net, x, start=start, composite=rules)
        marginals = mu.marginal(list(layers), "channel")
        scalars = [mu.sink(layer) for layer in layers] + [mu.variation(layer) for layer in layers]
        results.append((marginals, scalars, mu.joint(*layers)))
    return results


def throughput(name: str, rounds: int) -> dict[str, Any]:
    """Returns samples per second of the loop and of the sweep, without the data loader."""
    make, shape, layers, count = NETS[name]
    torch.manual_seed(0)
    net = make().eval().requires_grad_(False)
    x = torch.randn(count, *shape)
    data, batches = TensorDataset(x), list(x.split(BATCH))
    best = {part: {"wall": float("inf"), "processor": float("inf")} for part in ("bare", "sweep", "loader")}

    def swept() -> None:
        with tempfile.TemporaryDirectory() as folder:
            options: Any = {"batch_size": BATCH, "shard": SHARD, "progress": False, "composite": NRMDefault()}
            assert sweep(net, data, queries_of(layers), folder, **options).is_complete

    def loaded() -> None:
        plan = ShardPlan(count, BATCH, SHARD)
        order = [batch for shard in range(plan.shards) for batch in plan.batches(shard)]
        assert sum(len(loaded.samples) for loaded in load_batches(data_source(data, BATCH, 0), order, 0)) == count

    work: dict[str, Callable[[], Any]] = {"bare": lambda: bare(net, batches, layers), "sweep": swept, "loader": loaded}
    for _ in range(rounds):
        for part, run in work.items():
            gc.collect()
            started, used = time.perf_counter(), time.process_time()
            run()
            spent = {"wall": time.perf_counter() - started, "processor": time.process_time() - used}
            best[part] = {clock: min(seconds, best[part][clock]) for clock, seconds in spent.items()}
    net_time = {clock: best["sweep"][clock] - best["loader"][clock] for clock in ("wall", "processor")}
    return {
        "layers": layers,
        "samples": count,
        "seconds": best,
        "samples per second": {"bare": count / best["bare"]["wall"], "sweep": count / net_time["wall"]},
        "share of the bare measure": {clock: best["bare"][clock] / net_time[clock] for clock in net_time},
    }


class Watching(Dataset[tuple[Tensor, int]]):
    """Samples generated on access; every 500th records the memory of the process."""

    def __init__(self, count: int) -> None:
        self.count, self.recorded = count, dict[int, float]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index % 500 == 0:
            gc.collect()
            self.recorded[index] = resident() / 2**20
        return torch.randn(3, 32, 32), index % 10


def memory(count: int) -> dict[str, Any]:
    """Returns the memory of the process in MiB during a sweep, and after its rows are sorted."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, 2), nn.ReLU(), nn.Conv2d(32, 64, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()  # fmt: skip
    data = Watching(count)
    with tempfile.TemporaryDirectory() as folder:
        stored = sweep(net, data, [*queries_of(["2", "0"])], folder, batch_size=BATCH, shard=SHARD, progress=False)
        rows = sum(len(shard.rows(columns=["group"])) for shard in stored.shards)
        after = resident() / 2**20
    tenth = data.recorded[count // 10 // 500 * 500]
    return {
        "samples": count,
        "rows": rows,
        "MiB at sample": data.recorded,
        "MiB after sorting": after,
        "end relative to a tenth": data.recorded[max(data.recorded)] / tenth,
    }


def synthetic(folder: Path) -> int:
    """Writes a sweep with random values; returns its number of rows."""
    queries, random = [Marginal("features.28"), Sink("features.28")], np.random.default_rng(0)
    settings = {"synthetic": True}
    for name in ("rows", "maps"):
        (folder / name).mkdir()
    infos = (queries[0].info((CHANNELS,)), queries[1].info(()))
    Manifest(settings, digest(settings), infos, samples=SAMPLES).write(folder)
    for number, first in enumerate(range(0, SAMPLES, 256)):
        sample = np.arange(first, min(first + 256, SAMPLES))
        classes = (sample % 1000).astype(np.int32)
        values = {
            queries[0].name: random.standard_normal((len(sample), CHANNELS), np.float32) / CHANNELS,
            queries[1].name: random.random(len(sample), np.float32),
        }
        part = BatchResults(sample, classes, classes, values)
        info = ShardInfo(digest(settings), int(sample[0]), int(sample[-1]), [], [], "float")
        write_shard(folder, 0, number, queries, [part], info)
    return SAMPLES * (CHANNELS + 1)


def read() -> dict[str, Any]:
    """Returns the seconds to find the nine samples with the largest value of a channel, opening the sweep each time."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        started = time.perf_counter()
        results: dict[str, Any] = {"rows": synthetic(folder), "seconds to write": time.perf_counter() - started}
        name = Sweep.open(folder).manifest.queries[0].name
        slow = _timed(lambda k: Sweep.open(folder).top(name, k, 9), (3, 255))
        started = time.perf_counter()
        write_index(Sweep.open(folder))
        results["seconds to sort"] = time.perf_counter() - started
        fast = _timed(lambda k: Sweep.open(folder).top(name, k, 9), range(0, CHANNELS, 16))
        for k in (3, 255):
            assert Sweep.open(folder).top(name, k, 9).to_pylist() == slow[1][k].to_pylist()
        by_class = _timed(lambda k: Sweep.open(folder).top(name, k, 9, target=7), range(0, CHANNELS, 64))
        size = sum(path.stat().st_size for path in folder.rglob("*.parquet")) / 2**20
    results |= {
        "MiB on disk": size,
        "seconds for the top nine, at most": max(fast[0]),
        "of one class, at most": max(by_class[0]),
        "of unsorted shards, at most": max(slow[0]),
    }
    return results


def _timed(run: Callable[[int], Any], groups: Any) -> tuple[list[float], dict[int, Any]]:
    seconds, results = [], {}
    for group in groups:
        started = time.perf_counter()
        results[group] = run(group)
        seconds.append(time.perf_counter() - started)
    return seconds, results


def main() -> None:
    """Runs the benchmark from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for part in ("throughput", "memory", "read"):
        parser.add_argument(f"--{part}", action="store_true", help="only this part (options can be combined)")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=10_000, help="for the memory part (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    every = not (args.throughput or args.memory or args.read)
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    results["environment"] = {**environment(), "threads": args.threads}
    if args.memory or every:  # before other parts allocate memory
        results["memory"] = memory(args.samples)
    if args.read or every:
        results["read"] = read()
    for name in args.nets if args.throughput or every else ():
        results.setdefault("throughput", {})[name] = throughput(name, args.rounds)
    report(results)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    if args.out == RESULTS:
        tables.write("sweep")


def report(results: dict[str, Any]) -> None:
    """Prints measured figures and the goals."""
    print(f"{'measured':>10} {'goal':>8}")
    for name, result in results.get("throughput", {}).items():
        share, of_processor = result["share of the bare measure"].values()
        rate = result["samples per second"]
        print(f"{share:10.3f} {THROUGHPUT:8.2f} {'  ' if share >= THROUGHPUT else '✗ '}throughput relative to the "
              f"measure alone, {name} ({rate['bare']:.1f} and {rate['sweep']:.1f} samples/s; in "
              f"processor time {of_processor:.3f})")  # fmt: skip
    if "memory" in results:
        result = results["memory"]
        growth, recorded = result["end relative to a tenth"], list(result["MiB at sample"].values())
        print(f"{growth:10.3f} {GROWTH:8.2f} {'  ' if growth <= GROWTH else '✗ '}memory after "
              f"{result['samples']} samples relative to that after a tenth ({recorded[-1]:.0f} MiB; "
              f"{result['MiB after sorting']:.0f} MiB after sorting {result['rows']:,} rows)")  # fmt: skip
    if "read" in results:
        result = results["read"]
        longest = result["seconds for the top nine, at most"]
        print(f"{longest:10.3f} {SECONDS:8.2f} {'  ' if longest <= SECONDS else '✗ '}seconds for the top nine of a "
              f"channel among {result['rows']:,} rows ({result['of one class, at most']:.3f} s of one class; "
              f"{result['of unsorted shards, at most']:.2f} s before sorting, which takes "
              f"{result['seconds to sort']:.1f} s)")  # fmt: skip


if __name__ == "__main__":
    main()
