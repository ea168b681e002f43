"""Evaluation of circuits: edges outside a circuit take their corrupted values, and all others are recomputed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.circuits.nets import TANGENTS, CircuitNet, Pairs
from benchmarks.circuits.slopes import Tangents

Edges = dict[str, Tensor]
"""A value for every edge, by step, ``(N, readers, nodes)``."""


@dataclass(frozen=True)
class Trace:
    """The inputs and outputs of the steps of one run, and the outputs of the net."""

    read: dict[str, Tensor]
    written: dict[str, Tensor]
    outputs: Tensor


def trace(net: CircuitNet, h: Tensor, slopes: Tangents = TANGENTS) -> Trace:
    """Runs the net from its input node ``h``."""
    read, written = {}, {}

    def wire(name: str, a: Tensor) -> Tensor:
        read[name], written[name] = a, net.steps[name](a)
        return written[name]

    return Trace(read, written, net.body(h, wire, slopes))


def masked(step: nn.Module, a: Tensor, edges: Tensor) -> Tensor:
    """Returns ``Σ_s edges_rs W_rs ∗ a_s``, without bias; the edges differ between samples."""
    weight = step.weight
    if weight.ndim == 2:
        return torch.einsum("nrs,rs,ns->nr", edges, weight, a)
    if weight.shape[2:] == (1, 1):
        return torch.einsum("nrs,rs,nstd->nrtd", edges, weight[:, :, 0, 0], a)
    count = len(a)
    weights = (edges[..., None, None] * weight).flatten(0, 1)
    z = functional.conv2d(a.flatten(0, 1)[None], weights, None, step.stride, step.padding, groups=count)
    return z[0].unflatten(0, (count, -1))


@dataclass(frozen=True)
class Task:
    """A net with pairs of inputs, and the runs that do not depend on a circuit.

    The metric ``m`` is the logit of the clean answer minus that of the corrupted one.
    """

    net: CircuitNet
    pairs: Pairs
    corrupted: Trace
    whole: Tensor
    empty: Tensor

    @classmethod
    def of(cls, net: CircuitNet, pairs: Pairs) -> Task:
        with torch.no_grad():
            corrupted = trace(net, net.embed(pairs[1]))
            return cls(net, pairs, corrupted, metric(net(pairs[0]), pairs), metric(corrupted.outputs, pairs))

    @property
    def steps(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(self.net.steps.items())  # type: ignore[return-value]

    def edges(self, value: float) -> Edges:
        count = len(self.pairs[0])
        return {name: self.whole.new_full((count, *step.weight.shape[:2]), value) for name, step in self.steps}

    @torch.no_grad()
    def run(self, circuit: Edges) -> Tensor:
        """Returns ``m`` of a circuit, ``(N,)``; edges are 1 inside of the circuit and 0 outside."""

        def wire(name: str, a: Tensor) -> Tensor:
            change = masked(self.net.steps[name], a - self.corrupted.read[name], circuit[name])
            return self.corrupted.written[name] + change

        return metric(self.net.body(self.net.embed(self.pairs[0]), wire, TANGENTS), self.pairs)

    def faithfulness(self, circuit: Edges) -> Tensor:
        """Returns ``f(C) = (m(C) − m(∅)) / (m(N) − m(∅))``, ``(N,)``."""
        return (self.run(circuit) - self.empty) / (self.whole - self.empty)


def metric(outputs: Tensor, pairs: Pairs) -> Tensor:
    _, _, t, u = pairs
    return outputs.gather(1, torch.stack([t, u], 1)) @ outputs.new_tensor([1.0, -1.0])


def flat(edges: Edges) -> Tensor:
    """Returns all edges of all steps, ``(N, E)``."""
    return torch.cat([values.flatten(1) for values in edges.values()], 1)


def by_step(values: Tensor, like: Edges) -> Edges:
    """Returns the inverse of :func:`flat`."""
    parts = values.split([one[0].numel() for one in like.values()], 1)
    return {name: part.reshape(one.shape) for (name, one), part in zip(like.items(), parts, strict=True)}
