"""A small convolutional net, its measure and its flow graph, for the tests of flows."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn
from zennit.composites import EpsilonAlpha2Beta1

from nrm_plugin import FlowGraph, RelevanceMeasure


def net(*, inputs: int = 3, width: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 16, 4),
    )  # fmt: skip
    return made.double().eval()


X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@cache
def measure() -> RelevanceMeasure:
    """The measure of two samples under a rule with negative relevance that absorbs relevance."""
    return RelevanceMeasure(net(), X, 2, residual="sink", composite=EpsilonAlpha2Beta1())


@cache
def full_graph() -> FlowGraph:
    """The flow of the second sample, with all channels."""
    return measure().flow(["output", "2", "0", "input"], top=None, sample=1)


def edges_by_key(graph: FlowGraph) -> dict[tuple[str, str], float]:
    return {(edge.upper.key, edge.lower.key): edge.mass for edge in graph.edges}


def drawn(graph: FlowGraph) -> list[float]:
    """Joint relevance of the ribbons that are drawn, between nodes that are drawn."""
    return [edge.mass for edge in graph.edges if abs(edge.mass) > 1e-6
            and all(node.kind == "group" or abs(node.mass) > 1e-6 for node in (edge.upper, edge.lower))]  # fmt: skip
