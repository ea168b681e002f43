"""GNN-LRP and sGNN-LRP against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import LayerMapComposite
from zennit.rules import Gamma, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

from nrm_plugin import Normalized, RelevanceMeasure, at
from tests.graph_nets import looped, random_graph


class Published(nn.Module):
    """The network of GNN-LRP: ``H' = relu(Λ H W)`` without biases, and a sum over nodes."""

    def __init__(self, edges: Tensor, nodes: int, layers: int = 3, width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.edges, self.nodes = looped(edges, nodes), nodes
        degree = torch.bincount(self.edges[1], minlength=nodes).double()
        self.scale = (degree[self.edges[0]] * degree[self.edges[1]]).rsqrt()
        self.layers = nn.ModuleList(nn.Linear(3 if not k else width, width, bias=False) for k in range(layers))
        self.blocks = nn.ModuleList(nn.ReLU() for _ in range(layers))
        self.head = nn.Linear(width, 2, bias=False)
        self.double().eval()

    def spread(self, h: Tensor) -> Tensor:
        messages = h.index_select(0, self.edges[0]) * self.scale.unsqueeze(1)
        return torch.zeros_like(h).index_add(0, self.edges[1], messages)

    def forward(self, x: Tensor) -> Tensor:
        for layer, block in zip(self.layers, self.blocks, strict=True):
            x = block(layer(self.spread(x)))
        return self.head(x.sum(0, keepdim=True))


GAMMA, TINY = 0.25, 1e-12


def published_composite() -> Normalized:
    """γ in the layers; sums in proportion, which is what the formula does to the entries of Λ."""
    layers = [(Activation, Pass()), (AvgPool, Norm(stabilizer=TINY)), (Linear, Gamma(GAMMA, stabilizer=TINY))]
    return Normalized(LayerMapComposite(layers), residual="sink")


def walks_in_sets(net: Published, x: Tensor, target: int, sets: list[list[int]]) -> float:
    r"""Σ of GNN-LRP over the walks whose nodes are in one set for each layer, input first.

    .. math:: R_{jK…} = \sum_k \frac{λ_{JK} h_j^J w^γ_{jk}}{\sum_{J} \sum_j λ_{JK} h_j^J w^γ_{jk}} R_{k…}

    Source: Schnake et al., GNN-LRP (arXiv 2006.03589), for non-negative features.
    """
    with torch.no_grad():
        states = [x]
        for layer in net.layers:
            states.append(layer(net.spread(states[-1])).relu())
        head = net.head.weight[target] + GAMMA * net.head.weight[target].clamp(min=0)
        score = float(net(x)[0, target])
        # γ has the sign of the output: negative scores take negative weights.
        if score < 0:
            head = net.head.weight[target] + GAMMA * net.head.weight[target].clamp(max=0)
        part = states[-1] * head
        arrived = {n: score * part[n] / part.sum() for n in sets[-1]}
        for layer, h, nodes in zip(reversed(net.layers), reversed(states[:-1]), reversed(sets[:-1]), strict=True):
            weight = layer.weight + GAMMA * layer.weight.clamp(min=0)
            incoming: dict[int, list[int]] = {}
            for e in range(net.edges.shape[1]) if len(h) < 100 else _edges_into(net, set(arrived)):
                incoming.setdefault(int(net.edges[1, e]), []).append(e)
            kept, below = set(nodes), {}
            for n, relevance in arrived.items():
                messages = {e: net.scale[e] * h[net.edges[0, e]] for e in incoming[n]}
                z = sum(weight @ m for m in messages.values())
                shared = torch.where(z == 0, 0.0, relevance / torch.where(z == 0, 1.0, z))
                for e, m in messages.items():
                    source = int(net.edges[0, e])
                    if source in kept:
                        below[source] = below.get(source, 0) + m * (weight.T @ shared)
            arrived = below
        return float(sum(value.sum() for value in arrived.values()))


def _edges_into(net: Published, nodes: set[int]) -> list[int]:
    mask = torch.zeros(net.nodes, dtype=torch.bool)
    mask[list(nodes)] = True
    return mask[net.edges[1]].nonzero().flatten().tolist()


@pytest.mark.medium
def test_gnn_lrp_is_the_joint_over_one_group_for_each_layer():
    x, edges = random_graph(6, 26, seed=3)
    x = 100 * x.abs()
    net = Published(edges, 6, width=8)
    mu = RelevanceMeasure(net, x, 0, composite=published_composite(), batched=False)
    taps = ["input", "blocks.0", "blocks.1", "blocks.2"]
    total, seen = 0.0, 0
    for first in range(6):
        for walk in [(first, b, c, d) for b in range(6) for c in (0, 3) for d in (1, 3)]:
            expected = walks_in_sets(net, x, 0, [[node] for node in walk])
            event = at(taps[0])[walk[0]]
            for tap, node in zip(taps[1:], walk[1:], strict=True):
                event = event & at(tap)[node]
            assert float(mu(event) * mu.output) == pytest.approx(expected, abs=1e-8)
            total, seen = total + abs(expected), seen + (expected != 0)
    assert total > 0.01
    assert 10 < seen < 140
    everything = walks_in_sets(net, x, 0, [list(range(6))] * 4)
    assert float(mu.marginal("input").sum() * mu.output) == pytest.approx(everything, abs=1e-8)


def test_sgnn_lrp_is_the_joint_over_one_set_in_all_layers():
    x, edges = random_graph(8, 20)
    x = x.abs()
    net = Published(edges, 8)
    mu = RelevanceMeasure(net, x, 1, composite=published_composite(), batched=False)
    for nodes in ([0, 1, 2], [3, 5], list(range(7))):
        subgraph = at("input")[nodes] & at("blocks.0")[nodes] & at("blocks.1")[nodes] & at("blocks.2")[nodes]
        walks = walks_in_sets(net, x, 1, [nodes] * 4)
        assert float(mu(subgraph) * mu.output) == pytest.approx(walks, abs=1e-8)
        assert abs(walks) > 1e-6


def test_a_subgraph_of_ten_thousand_nodes_takes_one_pass():
    x, edges = random_graph(10_000, 40_000)
    x = x.abs()
    net = Published(edges, 10_000)
    mu = RelevanceMeasure(net, x, 0, composite=published_composite(), batched=False)
    nodes = sorted({0, *_neighbourhood(net, [0], 3)})[:400]
    event = at("input")[nodes] & at("blocks.0")[nodes] & at("blocks.1")[nodes] & at("blocks.2")[nodes]
    mass = mu(event)
    cost = mu.cost
    mu.sinks()
    mu.marginal("input")
    assert cost.steps <= mu.cost.steps
    assert cost.vectors <= mu.cost.vectors
    expected = walks_in_sets(net, x, 0, [nodes] * 4)
    assert abs(expected / float(mu.output)) > 1e-6
    assert float(mass * mu.output) == pytest.approx(expected, rel=1e-6)


def _neighbourhood(net: Published, nodes: list[int], hops: int) -> set[int]:
    reached = set(nodes)
    for _ in range(hops):
        reached |= {int(net.edges[0, e]) for e in _edges_into(net, reached)}
    return reached
