"""Compares edge scores as circuits on four nets that are trained here, and renders docs/circuits.md.

``python -m benchmarks.circuits`` takes about a quarter of an hour on one thread; ``--quick`` measures one seed with few
pairs, and only prints. ``--cost`` measures only the cost of the passes on large networks, and leaves the other results
unchanged. ``--render`` rewrites the tables and the figure from the committed results.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import tables
from benchmarks.circuits import figure, metrics
from benchmarks.circuits.circuit import Edges, Task, by_step, flat, metric
from benchmarks.circuits.cost import cost
from benchmarks.circuits.nets import NETS, TANGENTS, trained
from benchmarks.circuits.scores import REFERENCE, SCORES
from benchmarks.default_composite import interval, resamples
from benchmarks.speed import environment

RESULTS = Path(__file__).parents[1] / "results/circuits.json"
SEEDS, PAIRS, EDGES = 3, 80, 200
"""Number of nets of each kind, of pairs of each net, and of edges of each net that are patched alone."""
TIMED, REPETITIONS = 10, 5
"""Copies of the pairs in one batch for the timing, and its repetitions."""


def evaluated(task: Task, scores: Edges, edges: Tensor, effects: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Returns all metrics of one score, ``(N,)``, and its curves ``(K, N)``."""
    values = flat(scores)

    def faithfulness(mask: Tensor) -> Tensor:
        return task.faithfulness(by_step(mask, scores))

    signed, absolute = metrics.curve(values, faithfulness), metrics.curve(values.abs(), faithfulness)
    shared = values.mean(0, keepdim=True).expand_as(values)
    return {
        "CPR": metrics.cpr(signed),
        "CMD": metrics.cmd(absolute),
        "CPR, one circuit": metrics.cpr(metrics.curve(shared, faithfulness)),
        "CMD, one circuit": metrics.cmd(metrics.curve(shared.abs(), faithfulness)),
        "single edges": metrics.correlation(values[:, edges], effects[0]),
        "single nodes": metrics.correlation(metrics.node_scores(task, scores), effects[1]),
        "f, signed": signed,
        "f, absolute": absolute,
    }


def measure_net(name: str, seeds: int, pairs: int, repetitions: int) -> dict[str, Any]:
    """Returns all scores of the nets of one kind, whose pairs are pooled."""
    parts: dict[str, list[dict[str, Tensor]]] = {}
    accuracy, errors = [], []
    for seed in range(seeds):
        net, drawn, correct = trained(name, seed, pairs)
        task = Task.of(net, drawn)
        errors.append(identities(task))
        accuracy.append(round(correct, 4))
        count = flat(task.edges(1.0)).shape[1]
        edges = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:EDGES]
        effects = metrics.edge_effects(task, edges), metrics.node_effects(task)
        for score, one in SCORES.items():
            parts.setdefault(score, []).append(evaluated(task, one.of(task), edges, effects))
    return {
        "edges": count,
        "nodes": effects[1].shape[1],
        "pairs": seeds * pairs,
        "accuracy": accuracy,
        "largest error of the whole and of the empty circuit": max(errors),
        "scores": summary(parts),
        "time": timed(task, repetitions),
    }


def identities(task: Task) -> float:
    """Returns the largest deviation from ``f = 1`` for the full circuit, and from ``f = 0`` for the empty one."""
    whole, empty = task.faithfulness(task.edges(1.0)), task.faithfulness(task.edges(0.0))
    return float(torch.maximum((whole - 1).abs().max(), empty.abs().max()))


def summary(parts: dict[str, list[dict[str, Tensor]]]) -> dict[str, Any]:
    """Returns the means with intervals over pairs, and differences from the reference measure, which are paired."""
    pooled = {
        score: {key: torch.cat([seed[key] for seed in seeds], -1).float() for key in seeds[0]}
        for score, seeds in parts.items()
    }
    draw = resamples(torch.arange(pooled[REFERENCE]["CMD"].shape[0]))
    rows: dict[str, Any] = {}
    for score, values in pooled.items():
        row: dict[str, Any] = {key: interval(one, draw) for key, one in values.items() if one.ndim == 1}
        for key in ("CMD", "CPR"):
            row[f"{key} of each net"] = [round(float(seed[key].mean()), 4) for seed in parts[score]]
            row[f"{key} minus that of the reference measure"] = interval(values[key] - pooled[REFERENCE][key], draw)
        row |= {key: [round(float(f), 4) for f in one.mean(1)] for key, one in values.items() if one.ndim == 2}
        rows[score] = row
    return rows


def timed(task: Task, repetitions: int) -> dict[str, list[float]]:
    """Returns the processor time of each score, for its passes and all edges, in units of a plain gradient."""
    clean, corrupted, t, u = (torch.cat([part] * TIMED) for part in task.pairs)
    large = Task.of(task.net, (clean, corrupted, t, u))

    def gradient() -> None:
        h = large.net.embed(clean).requires_grad_()
        torch.autograd.grad(metric(large.net.body(h, large.net.plain, TANGENTS), large.pairs).sum(), h)

    passes: dict[str, list[float]] = {name: [] for name in SCORES}
    edges: dict[str, list[float]] = {name: [] for name in SCORES}
    plain = []
    for _ in range(repetitions):
        plain.append(min(seconds(gradient)[0] for _ in range(3)))
        for name, score in SCORES.items():
            spent, passed = seconds(lambda score=score: score.passes(large))  # type: ignore[misc]
            passes[name].append(spent)
            edges[name].append(seconds(lambda passed=passed: passed.edges(large))[0])  # type: ignore[misc]
    unit = min(plain)
    return {name: [round(min(passes[name]) / unit, 2), round(min(edges[name]) / unit, 2)] for name in SCORES}


def seconds(job: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the processor time of a call, and its result."""
    began = time.process_time()
    result = job()
    return time.process_time() - began, result


def measure(nets: Sequence[str], seeds: int, pairs: int, repetitions: int = REPETITIONS) -> dict[str, Any]:
    began = time.process_time()
    results: dict[str, Any] = {
        "environment": {**environment(), "threads": torch.get_num_threads(), "dtype": "float64"},
        "shares": list(metrics.SHARES),
        "passes": {name: [score.forward, score.backward] for name, score in SCORES.items()},
        "nets": {},
    }
    for name in nets:
        results["nets"][name] = measure_net(name, seeds, pairs, repetitions)
        print(f"\n{name}\n\n{tables.circuits(results)[name]}", flush=True)
    results["processor seconds"] = round(time.process_time() - began)
    return results


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed with 20 pairs; nothing is written")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS), help="with --quick")
    parser.add_argument("--cost", action="store_true", help="only the cost of the passes on large networks")
    parser.add_argument("--render", action="store_true", help="rewrite page and figure only")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.quick:
        measure(options.nets, 1, 20, 3)
        return
    if not options.render:
        results = json.loads(RESULTS.read_text()) if options.cost else measure(list(NETS), SEEDS, PAIRS)
        RESULTS.write_text(json.dumps({**results, "cost": cost()}, indent=1) + "\n")
    tables.write("circuits")
    figure.draw(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
