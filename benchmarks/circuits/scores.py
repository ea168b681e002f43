"""Scores of edges: ``⟨multiplier of z_r, W_rs ∗ change of a_s⟩``, in plain PyTorch, and joint relevance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

from benchmarks.circuits.circuit import Edges, Task, Trace, masked, metric, trace
from benchmarks.circuits.nets import TANGENTS
from benchmarks.circuits.slopes import RelP, Secants, Tangents
from nrm_plugin import Normalized, Plan, RelevanceMeasure

STEPS = 8
Multipliers = dict[str, Tensor]


def products(task: Task, multipliers: Multipliers, change: dict[str, Tensor]) -> Edges:
    """Computes the score of every edge from the multipliers of step outputs and the change of step inputs."""
    scores = {}
    for name, step in task.steps:
        edges = torch.ones(len(change[name]), *step.weight.shape[:2], dtype=change[name].dtype, requires_grad=True)
        total = (masked(step, change[name].detach(), edges) * multipliers[name]).sum()
        (scores[name],) = torch.autograd.grad(total, edges)
    return scores


def gradients(task: Task, h: Tensor, slopes: Tangents = TANGENTS) -> tuple[Trace, Multipliers]:
    """Runs one forward and one backward pass of the pairs' metric from the input node ``h``."""
    run = trace(task.net, h.detach().requires_grad_(), slopes)
    multipliers = torch.autograd.grad(
        metric(run.outputs[: len(task.whole)], task.pairs).sum(), list(run.written.values())
    )
    return run, dict(zip(run.written, multipliers, strict=True))


def difference(one: Trace, other: Trace) -> dict[str, Tensor]:
    return {name: a.detach() - other.read[name].detach() for name, a in one.read.items()}


def embedded(task: Task) -> tuple[Tensor, Tensor]:
    clean, corrupted = task.pairs[:2]
    return task.net.embed(clean), task.net.embed(corrupted)


@dataclass(frozen=True)
class Slopes:
    """Results of the passes of a score: multipliers of the outputs of the steps, and changes of their inputs."""

    multipliers: Multipliers
    change: dict[str, Tensor]

    def edges(self, task: Task) -> Edges:
        return products(task, self.multipliers, self.change)


def attribution_patching(task: Task, slopes: Tangents = TANGENTS) -> Slopes:
    """Computes EAP, with derivatives at the clean input, or RelP, with the slopes of RelP."""
    clean, corrupted = embedded(task)
    run, multipliers = gradients(task, clean, slopes)
    with torch.no_grad():
        return Slopes(multipliers, difference(run, trace(task.net, corrupted)))


def integrated_gradients(task: Task, offset: float = 1.0) -> Slopes:
    """Computes EAP-IG: mean derivatives at ``STEPS`` inputs on the line from clean to corrupted.

    Source: arXiv 2403.17806; its code has steps 1 … m of m, ``offset=1``; ``offset=0.5`` is the midpoint rule.
    """
    clean, corrupted = embedded(task)
    with torch.no_grad():
        change = difference(trace(task.net, clean), trace(task.net, corrupted))
    total: Multipliers = {}
    for step in range(STEPS):
        _, multipliers = gradients(task, clean + (step + offset) / STEPS * (corrupted - clean))
        total = {name: total.get(name, 0) + one / STEPS for name, one in multipliers.items()}
    return Slopes(total, change)


def secants(task: Task) -> Slopes:
    """Computes the measure against a reference in plain PyTorch, by one backward pass with secants."""
    run, multipliers = gradients(task, torch.cat(embedded(task)), Secants())
    halves = {name: a.detach().chunk(2) for name, a in run.read.items()}
    first = {name: one.chunk(2)[0] for name, one in multipliers.items()}
    return Slopes(first, {name: x - x0 for name, (x, x0) in halves.items()})


def gradient_times_activation(task: Task) -> Slopes:
    """Returns the derivatives and activations at the clean input."""
    run, multipliers = gradients(task, embedded(task)[0])
    return Slopes(multipliers, run.read)


@dataclass(frozen=True)
class Chance:
    """Normal noise."""

    def edges(self, task: Task) -> Edges:
        draw = torch.Generator().manual_seed(0)
        return {name: torch.randn(one.shape, generator=draw, dtype=one.dtype) for name, one in task.edges(0.0).items()}


# -- joint relevance of this package --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joints:
    """A measure with the marginals of all taps, and the scalar that it explains."""

    mu: RelevanceMeasure
    explained: Tensor

    def edges(self, task: Task) -> Edges:
        scale = self.explained[:, None, None]
        return {name: scale * self.mu.joint(f"steps.{name}", f"read.{name}") for name, _ in task.steps}


def joints(mu: RelevanceMeasure, explained: Tensor) -> Joints:
    """Computes the marginals of all taps, by the backward pass that is counted for a score."""
    mu.marginal(mu.layers)
    return Joints(mu, explained)


def contrast(task: Task) -> Tensor:
    """Returns 1 for the clean answer, -1 for the corrupted one, and 0 for others, ``(N, outputs)``."""
    _, _, t, u = task.pairs
    vector = torch.zeros_like(task.corrupted.outputs)
    return vector.scatter(1, t[:, None], 1.0).scatter(1, u[:, None], -1.0)


def reference_measure(task: Task, slopes: Literal["secant", "tangent"] = "secant") -> Joints:
    """Returns the measure against the corrupted input."""
    clean, corrupted = task.pairs[:2]
    mu = RelevanceMeasure(task.net, clean, start=contrast(task), reference=corrupted, slopes=slopes)
    return joints(mu, task.whole - task.empty)


class PlannedMeasure:
    """The measure against the corrupted input by a plan, which is kept for further pairs of the same net and number."""

    def __init__(self) -> None:
        self.plans: dict[tuple[nn.Module, torch.Size], Plan] = {}

    def __call__(self, task: Task) -> Joints:
        clean, corrupted = task.pairs[:2]
        key = task.net, clean.shape
        if key not in self.plans:
            self.plans = {key: Plan(task.net, clean, reference=corrupted)}
        mu = self.plans[key](clean, start=contrast(task), reference=corrupted)
        return joints(mu, task.whole - task.empty)


def lrp_0(task: Task) -> Joints:
    """Computes LRP-0 at the clean input; relevance starts at the value of each of the two logits."""
    rules = LayerMapComposite([(Activation, Pass()), (AvgPool, Norm()), (Linear, Epsilon(1e-9))])
    signs = contrast(task)
    mu = RelevanceMeasure(
        task.net, task.pairs[0], start=lambda outputs: signs * outputs, composite=Normalized(rules, residual="sink")
    )
    return joints(mu, task.whole)


class Passed(Protocol):
    """The result of the passes, from which the scores of all edges are computed."""

    def edges(self, task: Task) -> Edges: ...


@dataclass(frozen=True)
class Score:
    """A score with the forward and backward passes that it takes for each pair."""

    passes: Callable[[Task], Passed]
    forward: int
    backward: int

    def of(self, task: Task) -> Edges:
        return self.passes(task).edges(task)


REFERENCE, PLANNED, PLAIN = "reference measure", "reference measure, planned", "reference measure, plain code"
SCORES = {
    REFERENCE: Score(reference_measure, 2, 1),
    PLANNED: Score(PlannedMeasure(), 2, 1),
    PLAIN: Score(secants, 2, 1),
    "EAP": Score(attribution_patching, 2, 1),
    "EAP-IG, 8 steps": Score(integrated_gradients, 2 + STEPS, STEPS),
    "EAP-IG, 8 midpoints": Score(lambda task: integrated_gradients(task, 0.5), 2 + STEPS, STEPS),
    "RelP": Score(lambda task: attribution_patching(task, RelP()), 2, 1),
    "RelP, AH-rule": Score(lambda task: attribution_patching(task, RelP(is_frozen=True)), 2, 1),
    "gradient × activation": Score(gradient_times_activation, 1, 1),
    "LRP-0": Score(lrp_0, 1, 1),
    "random": Score(lambda task: Chance(), 0, 0),
}
