"""Scores of edges compared with the edges that a compiled transformer has by construction; docs/known-circuit.md.

``python -m benchmarks.circuits.known`` compiles a network that increments numbers of five bits, and takes about five
minutes of processor time; ``--quick`` measures few pairs of four bits. ``--render`` rewrites the page.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor

from benchmarks import outputs
from benchmarks.circuits import compiled, increment, increment_flow, metrics
from benchmarks.circuits.circuit import Edges, Task, by_step, flat
from benchmarks.circuits.scores import REFERENCE, SCORES, Score, reference_measure
from benchmarks.default_composite import interval, resamples
from benchmarks.speed import environment

TANGENTS = "reference measure, tangents"
COMPARED = {
    REFERENCE: SCORES[REFERENCE],
    TANGENTS: Score(lambda task: reference_measure(task, "tangent"), 2, 1),
    **{name: SCORES[name] for name in ("EAP", "EAP-IG, 8 steps", "RelP", "gradient × activation", "random")},
}
BITS, PAIRS, BATCH = 5, 100, 20
"""Number of bits, number of pairs of inputs, and number of pairs that are measured together."""


def auroc(scores: Tensor, known: Tensor) -> Tensor:
    """Computes the area under the ROC curve of every row, ``(B, E)`` to ``(B,)``; ties count half."""
    rank = torch.as_tensor(rankdata(scores.numpy(), axis=1))
    known = known.expand_as(rank).double()
    positive = known.sum(1)
    negative = known.shape[1] - positive
    return ((rank * known).sum(1) - positive * (positive + 1) / 2) / (positive * negative)


def shared(scores: Tensor, known: Tensor, weights: Tensor) -> list[float]:
    """Returns the AUROC of the mean score of all pairs, with the interval of bootstrap resamples of the pairs."""
    draws = torch.cat([auroc((part.double() @ scores.double()), known) for part in weights.split(50)])
    mean = auroc(scores.double().mean(0, keepdim=True), known)
    low, high = np.quantile(draws.numpy(), [0.025, 0.975])
    return [round(float(x), 4) for x in (mean[0], low, high)]


def measure_net(bits: int, pairs: int) -> dict[str, Any]:
    """Returns all scores on the network that increments numbers of ``bits`` bits."""
    net = compiled.loaded(increment.compiled(bits), 2 * bits + 1)
    known, meeting = compiled.known(net, bits), compiled.meeting(net)
    drawn = compiled.pairs(bits, pairs, torch.Generator().manual_seed(0))
    parts: dict[str, list[dict[str, Tensor]]] = {name: [] for name in COMPARED}
    is_active, right, seconds = [], [], dict.fromkeys(COMPARED, 0.0)
    for start in range(0, pairs, BATCH):
        task = Task.of(net, tuple(one[start : start + BATCH] for one in drawn))
        right.append(compiled.answered(task))
        is_active.append(compiled.active(task, known.edges))
        for name, score in COMPARED.items():
            began = time.process_time()
            edges = score.of(task)
            seconds[name] += time.process_time() - began
            values = flat(edges)
            f = metrics.curve(values.abs(), lambda mask, task=task, edges=edges: faithful(task, mask, edges))
            nodes = metrics.node_scores(task, edges).abs()
            parts[name].append({"edges": values.abs().float(), "nodes": nodes.float(), "CMD": metrics.cmd(f)})
        print(f"{bits} bits, {start + BATCH} of {pairs} pairs", flush=True)
    truth = Truth.of(known, meeting, list(metrics.nodes(task)), torch.cat(is_active))
    weights = resamples(torch.arange(pairs))[:1000]
    rows = {name: summary({k: torch.cat([p[k] for p in one]) for k in one[0]}, truth, weights)
            for name, one in parts.items()}  # fmt: skip
    return {
        "layers": len(net.kept),
        "heads": sum(len(heads) for heads, _ in net.kept),
        "neurons": sum(len(neurons) for _, neurons in net.kept),
        "edges": len(truth.edges),
        "known edges": int(truth.edges.sum()),
        "edges that share a column": int(truth.meeting.sum()),
        "active edges": round(float(truth.active.sum(1).double().mean()), 1),
        "nodes": len(truth.nodes),
        "known nodes": int(truth.nodes.sum()),
        "pairs": pairs,
        "answered": sum(right) / len(right),
        "scores": rows,
        "processor seconds": {name: round(spent, 1) for name, spent in seconds.items()},
    }


def faithful(task: Task, mask: Tensor, like: Edges) -> Tensor:
    return task.faithfulness(by_step(mask, like))


def described(bits: int) -> list[list[str]]:
    """Returns the name, place and inputs of every operation that computes a value."""
    rows = []
    contents: dict[int, str] = dict.fromkeys(range(1, 1 + compiled.EMBEDDED), "token")
    computing = [one for one in increment.operations(bits) if one.name not in ("erase", "constant")]
    for _, branch in groupby(computing, lambda one: (one.layer, bool(one.heads))):
        written: dict[int, str] = {}  # the operations of a branch run in parallel
        for one in branch:
            parts = one.heads or one.neurons
            kind = ("head" if one.heads else "neuron") + "s" * (len(parts) > 1)
            numbers = " and ".join(map(str, parts)) if len(parts) < 3 else f"{parts[0]} to {parts[-1]}"
            read = dict.fromkeys(contents[column] for column in one.reads)
            rows.append([one.name, f"block {one.layer}, {kind} {numbers}", ", ".join(read)])
            written |= dict.fromkeys(one.writes, one.name)
        contents |= written
    return rows


class Truth:
    """Known edges and nodes as flat masks, and the edges that are active for each pair."""

    def __init__(self, edges: Tensor, meeting: Tensor, nodes: Tensor, active: Tensor) -> None:
        self.edges, self.meeting, self.nodes, self.active = edges, meeting, nodes, active

    @classmethod
    def of(cls, known: compiled.Known, meeting: Edges, nodes: list[str], active: Tensor) -> Truth:
        edges, meets = (torch.cat([one.flatten() for one in e.values()]).bool() for e in (known.edges, meeting))
        is_known = torch.tensor([name in known.values for name in nodes])
        return cls(edges, meets, is_known, active)


def summary(scores: dict[str, Tensor], truth: Truth, weights: Tensor) -> dict[str, list[float]]:
    """Returns the AUROC of one score for known edges, known nodes and active edges."""
    edges, some = scores["edges"], truth.meeting
    return {
        "edges": shared(edges, truth.edges, weights),
        "edges that share a column": shared(edges[:, some], truth.edges[some], weights),
        "nodes": shared(scores["nodes"], truth.nodes, weights),
        "active edges": interval(auroc(edges.double(), truth.active).float(), weights),
        "active edges that share a column": interval(
            auroc(edges[:, some].double(), truth.active[:, some]).float(), weights
        ),
        "CMD": interval(scores["CMD"].float(), weights),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20 pairs of four bits")
    parser.add_argument("--render", action="store_true", help="rewrite the tables only")
    outputs.add_option(parser)
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    files = outputs.chosen(options)
    if not options.render:
        results: dict[str, Any] = {"environment": {**environment(), "dtype": "float64"}}
        results["passes"] = {name: [score.forward, score.backward] for name, score in COMPARED.items()}
        bits, pairs = (4, BATCH) if options.quick else (BITS, PAIRS)
        results |= measure_net(bits, pairs)
        results |= {"flow": increment_flow.results(files.images), "operations": described(BITS)}
        (files.results / "known_circuit.json").write_text(json.dumps(results, indent=1) + "\n")
    files.render("known_circuit")


if __name__ == "__main__":
    main()
