"""MIB's metrics of ranked edges, and correlation with exact patching.

Source: MIB, arXiv 2504.13151, for CPR and CMD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.circuits.circuit import Edges, Task, by_step, flat

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares ``k`` of the edges in the circuits."""


def strongest(scores: Tensor, share: float) -> Tensor:
    """Returns 1 for the given share of edges with the largest scores in each sample, and 0 for others, ``(N, E)``."""
    if not bool(scores.isfinite().all()):
        raise ValueError("the score of an edge is not finite and has no rank.")
    kept = scores.argsort(dim=1, descending=True, stable=True)[:, : int(share * scores.shape[1] + 1e-9)]
    return torch.zeros_like(scores).scatter(1, kept, 1.0)


def curve(scores: Tensor, faithfulness: Callable[[Tensor], Tensor], shares: Sequence[float] = SHARES) -> Tensor:
    """Returns ``f`` of the circuits of these shares, ``(K, N)``."""
    return torch.stack([faithfulness(strongest(scores, share)) for share in shares])


def cpr(f: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """Returns the circuit performance ratio ``∫ f dk``, higher is better, by trapezoids linear in ``k``; ``(N,)``."""
    return torch.trapezoid(f, f.new_tensor(shares), dim=0)


def cmd(f: Tensor, shares: Sequence[float] = SHARES) -> Tensor:
    """Returns the circuit-model distance ``∫ |1 − f| dk``, lower is better; ``(N,)``."""
    return cpr((1 - f).abs(), shares)


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """Returns the Pearson correlation of each row, ``(N,)``; 0 where a row is constant."""
    a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-30)


# -- exact patching -------------------------------------------------------------------------------------------------


def edge_effects(task: Task, sample: Tensor) -> Tensor:
    """Returns the decrease of ``m`` when each of the given edges alone takes its corrupted value, ``(N, K)``."""
    whole = task.edges(1.0)
    effects = []
    for edge in sample:
        mask = flat(whole)
        mask[:, edge] = 0
        effects.append(task.whole - task.run(by_step(mask, whole)))
    return torch.stack(effects, 1)


def nodes(task: Task) -> dict[str, list[tuple[str, int]]]:
    """Returns each node, with the step and the column of all steps that read it."""
    places: dict[str, list[tuple[str, int]]] = {}
    for step, names in task.net.nodes.items():
        for column, name in enumerate(names):
            places.setdefault(name, []).append((step, column))
    return places


def node_effects(task: Task) -> Tensor:
    """Returns the decrease of ``m`` when all edges from a node take their corrupted values, ``(N, nodes)``."""
    effects = []
    for places in nodes(task).values():
        circuit = task.edges(1.0)
        for step, column in places:
            circuit[step][:, :, column] = 0
        effects.append(task.whole - task.run(circuit))
    return torch.stack(effects, 1)


def node_scores(task: Task, scores: Edges) -> Tensor:
    """Returns the sum of the scores of all edges from a node, ``(N, nodes)``."""
    return torch.stack(
        [
            torch.stack([scores[step][:, :, column].sum(1) for step, column in places]).sum(0)
            for places in nodes(task).values()
        ],
        1,
    )
