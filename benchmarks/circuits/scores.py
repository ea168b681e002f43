"""Scores of edges: ``⟨multiplier of z_r, W_rs ∗ change of a_s⟩``, in plain PyTorch, and joint relevance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

from benchmarks.circuits.circuit import Edges, Task, Trace, masked, metric, trace
from benchmarks.circuits.nets import TANGENTS
from benchmarks.circuits.slopes import RelP, Secants, Tangents
from nrm_plugin import Normalized, RelevanceMeasure

STEPS = 8
Multipliers = dict[str, Tensor]


def products(task: Task, multipliers: Multipliers, change: dict[str, Tensor]) -> Edges:
    """Score of every edge, from the multipliers of what the steps write and a change of what they read."""
    scores = {}
    for name, step in task.steps:
        edges = torch.ones(len(change[name]), *step.weight.shape[:2], dtype=change[name].dtype, requires_grad=True)
        total = (masked(step, change[name].detach(), edges) * multipliers[name]).sum()
        (scores[name],) = torch.autograd.grad(total, edges)
    return scores


def gradients(task: Task, h: Tensor, slopes: Tangents = TANGENTS) -> tuple[Trace, Multipliers]:
    """One forward and one backward pass of the pairs' metric from the input node ``h``."""
    run = trace(task.net, h.detach().requires_grad_(), slopes)
    multipliers = torch.autograd.grad(metric(run.outputs[: len(task.whole)], task.pairs).sum(), list(run.written.values()))
    return run, dict(zip(run.written, multipliers, strict=True))


def difference(one: Trace, other: Trace) -> dict[str, Tensor]:
    return {name: a.detach() - other.read[name].detach() for name, a in one.read.items()}


def embedded(task: Task) -> tuple[Tensor, Tensor]:
    clean, corrupted = task.pairs[:2]
    return task.net.embed(clean), task.net.embed(corrupted)


def attribution_patching(task: Task, slopes: Tangents = TANGENTS) -> Edges:
    """EAP: derivatives at the clean input; with the slopes of RelP, RelP."""
    clean, corrupted = embedded(task)
    run, multipliers = gradients(task, clean, slopes)
    with torch.no_grad():
        other = trace(task.net, corrupted)
    return products(task, multipliers, difference(run, other))


def integrated_gradients(task: Task, offset: float = 1.0) -> Edges:
    """EAP-IG: mean derivatives at ``STEPS`` inputs on the line from clean to corrupted.

    Source: arXiv 2403.17806; its code has steps 1 … m of m, ``offset=1``; ``offset=0.5`` is the midpoint rule.
    """
    clean, corrupted = embedded(task)
    with torch.no_grad():
        change = difference(trace(task.net, clean), trace(task.net, corrupted))
    total: Multipliers = {}
    for step in range(STEPS):
        _, multipliers = gradients(task, clean + (step + offset) / STEPS * (corrupted - clean))
        total = {name: total.get(name, 0) + one / STEPS for name, one in multipliers.items()}
    return products(task, total, change)


def secants(task: Task) -> Edges:
    """The reference measure, by plain code: one backward pass with secants."""
    run, multipliers = gradients(task, torch.cat(embedded(task)), Secants())
    halves = {name: a.detach().chunk(2) for name, a in run.read.items()}
    first = {name: one.chunk(2)[0] for name, one in multipliers.items()}
    return products(task, first, {name: x - x0 for name, (x, x0) in halves.items()})


def gradient_times_activation(task: Task) -> Edges:
    """Derivatives and activations at the clean input."""
    run, multipliers = gradients(task, embedded(task)[0])
    return products(task, multipliers, run.read)


def chance(task: Task) -> Edges:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(one.shape, generator=draw, dtype=one.dtype) for name, one in task.edges(0.0).items()}


# -- joint relevance of this package --------------------------------------------------------------------------------


def joints(task: Task, mu: RelevanceMeasure, scale: Tensor) -> Edges:
    return {name: mu.joint(f"steps.{name}", f"read.{name}") * scale[:, None, None] for name, _ in task.steps}


def contrast(task: Task) -> Tensor:
    """1 for the clean answer, -1 for the corrupted one, ``(N, outputs)``."""
    _, _, t, u = task.pairs
    vector = torch.zeros_like(task.corrupted.outputs)
    return vector.scatter(1, t[:, None], 1.0).scatter(1, u[:, None], -1.0)


def reference_measure(task: Task) -> Edges:
    """The measure against the corrupted input."""
    clean, corrupted = task.pairs[:2]
    mu = RelevanceMeasure(task.net, clean, start=contrast(task), reference=corrupted)
    return joints(task, mu, task.whole - task.empty)


def lrp_0(task: Task) -> Edges:
    """LRP-0 at the clean input; the difference of two logits starts with the value of each."""
    rules = LayerMapComposite([(Activation, Pass()), (AvgPool, Norm()), (Linear, Epsilon(1e-9))])
    signs = contrast(task)
    mu = RelevanceMeasure(
        task.net, task.pairs[0], start=lambda outputs: signs * outputs, composite=Normalized(rules, residual="sink")
    )
    return joints(task, mu, task.whole)


@dataclass(frozen=True)
class Score:
    """A score with the forward and backward passes that it takes for each pair."""

    of: Callable[[Task], Edges]
    forward: int
    backward: int


REFERENCE, PLAIN = "reference measure", "the same, plain code"
SCORES = {
    REFERENCE: Score(reference_measure, 2, 1),
    PLAIN: Score(secants, 2, 1),
    "EAP": Score(attribution_patching, 2, 1),
    "EAP-IG, 8 steps": Score(integrated_gradients, 2 + STEPS, STEPS),
    "EAP-IG, 8 midpoints": Score(lambda task: integrated_gradients(task, 0.5), 2 + STEPS, STEPS),
    "RelP": Score(lambda task: attribution_patching(task, RelP()), 2, 1),
    "RelP, AH-rule": Score(lambda task: attribution_patching(task, RelP(is_frozen=True)), 2, 1),
    "gradient × activation": Score(gradient_times_activation, 1, 1),
    "LRP-0": Score(lrp_0, 1, 1),
    "random": Score(chance, 0, 0),
}
