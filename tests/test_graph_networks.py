"""Graph networks: layers against matrices that are written out here, batches of graphs, events on nodes."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus

from nrm_plugin import NRMAbsolute, RelevanceMeasure, at
from nrm_plugin.errors import InputError, TargetError
from tests.conftest import untouched
from tests.functional.kernel_matrices import Apply
from tests.functional.node_matrices import SUM_FLOOR, rows
from tests.graph_nets import LAYERS, GraphNet, looped, random_graph


def shares_of_layer(weight: Tensor, a: Tensor) -> Tensor:
    part = (weight * a).abs()
    return part / part.sum(1, keepdim=True)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``T[(n, o), (n, i)]``."""
    return torch.block_diag(*(shares_of_layer(layer.weight.detach(), a) for a in x))


def into_nodes(messages: Tensor, edges: Tensor, nodes: int) -> Tensor:
    """``T[(n, f), (m, f)]`` of messages ``(E, F)`` along edges, summed, to the nodes ``m`` that sent them."""
    size, features = messages.abs(), messages.shape[1]
    matrix = torch.zeros(nodes, features, nodes, features).double()
    for f in range(features):
        for n in range(nodes):
            arriving = [e for e in range(edges.shape[1]) if edges[1, e] == n]
            total = sum(size[e, f] for e in arriving)
            for e in arriving:
                matrix[n, f, edges[0, e], f] += size[e, f] / total
    return matrix.reshape(nodes * features, -1)


def gcn(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    edges, h = looped(edges, len(x)), x @ net.lin.weight.T
    degree = torch.zeros(len(x)).double()
    for n in edges[1]:
        degree[n] += 1
    messages = h[edges[0]] / (degree[edges[0]] * degree[edges[1]]).sqrt().unsqueeze(1)
    return into_nodes(messages, edges, len(x)) @ linear(net.lin, x)


def gin(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for a, b in edges.T:
        total[b] += x[a]
    own = (1.1 * x).abs() / ((1.1 * x).abs() + total.abs())
    summed = 1.1 * x + total
    first = net.nn[0]
    hidden = (summed @ first.weight.T + first.bias).relu()
    shares = torch.diag(own.reshape(-1)) + (1 - own).reshape(-1, 1) * into_nodes(x[edges[0]], edges, len(x))
    return linear(net.nn[2], hidden) @ linear(first, summed) @ shares


def gat(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    edges, h = looped(edges, len(x)), (x @ net.lin.weight.T).reshape(len(x), *net.shape)
    raw = torch.zeros(edges.shape[1], net.shape[0]).double()
    for e, (a, b) in enumerate(edges.T):
        raw[e] = nn.functional.leaky_relu((h[a] * net.of_node).sum(1) + (h[b] * net.to_node).sum(1), 0.2).exp()
    weight = torch.zeros_like(raw)
    for n in range(len(x)):
        arriving = edges[1] == n
        weight[arriving] = raw[arriving] / raw[arriving].sum(0)
    messages = (weight.unsqueeze(-1) * h[edges[0]]).flatten(1)
    return into_nodes(messages, edges, len(x)) @ linear(net.lin, x)


def sage(net: Any, x: Tensor, edges: Tensor) -> Tensor:
    mean = torch.stack([x[edges[0, edges[1] == n]].mean(0) for n in range(len(x))])
    left, right = mean @ net.l.weight.T + net.l.bias, x @ net.r.weight.T
    share = (left.abs() / (left.abs() + right.abs())).reshape(-1, 1)
    to_mean = linear(net.l, mean) @ into_nodes(x[edges[0]], edges, len(x))
    return share * to_mean + (1 - share) * linear(net.r, x)


MATRICES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {"GCN": gcn, "GIN": gin, "GAT": gat, "SAGE": sage}


@pytest.mark.medium
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_matrix_written_out_here(name):
    torch.manual_seed(0)
    x, edges = random_graph(5, 11)
    net = LAYERS[name](3, 4).double().eval()
    with torch.no_grad():
        expected = MATRICES[name](net, x, edges)
    ((actual,), constants) = rows(net, (x,), edges)
    torch.testing.assert_close(actual, expected, rtol=0, atol=10 * SUM_FLOOR)
    assert not constants.any()


@pytest.mark.medium
@pytest.mark.parametrize("is_pooled", [False, True], ids=["node", "graph"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_network_conserves_relevance(name, is_pooled):
    torch.manual_seed(1)
    net = GraphNet(LAYERS[name], is_pooled=is_pooled).eval()
    x, edges = random_graph(12, 30)
    x = x.float()
    with untouched(net, x):
        mu = RelevanceMeasure(net, x, 1 if is_pooled else (3, 1), additional_forward_args=(edges,), batched=False)
    torch.testing.assert_close(mu.output, net(x, edges)[0 if is_pooled else 3, 1:].detach())
    for tap in mu.layers:
        total = mu.marginal(tap).flatten(1).sum(1) + mu.sink(tap) + mu.bypass(tap)
        assert float((total - 1).abs()) <= 1e-4 * max(1.0, float(mu.variation(tap)))
    assert float(mu.sink("input", "residual").abs()) <= 0.05
    assert float(mu.sink("input", "constants").abs()) <= 1e-6
    assert mu.shape("conv1") == (1, 12, 4)


def graph_measure(net: nn.Module, x: Tensor, target: Any, *more: Any, composite: Any = None) -> RelevanceMeasure:
    rules = composite or NRMAbsolute()
    return RelevanceMeasure(net, x, target, composite=rules, additional_forward_args=more, batched=False)


@pytest.mark.medium
@pytest.mark.parametrize("composite", [NRMAbsolute, EpsilonPlus], ids=["absolute", "plus"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_in_a_batch_of_graphs_has_the_measure_of_the_single_graph(name, composite):
    torch.manual_seed(2)
    net = GraphNet(LAYERS[name], is_pooled=True).double().eval()
    (x, edges), (y, other) = random_graph(6, 14), random_graph(5, 12, seed=1)
    joined = torch.cat([edges, other + 6], 1)
    graph = torch.tensor([0] * 6 + [1] * 5)
    mu = graph_measure(net, torch.cat([x, y]), (1, 0), joined, graph, composite=composite())
    nu = graph_measure(net, y, 0, other, composite=composite())
    assert not mu.marginal("input")[0, :6].any()
    bound = 1e-9 * float(nu.variation("input"))
    torch.testing.assert_close(mu.marginal("input")[:, 6:], nu.marginal("input"), rtol=0, atol=bound)
    torch.testing.assert_close(mu.output, nu.output)


def test_events_and_marginals_index_nodes_before_features():
    torch.manual_seed(3)
    x, edges = random_graph(6, 14)
    net = GraphNet(LAYERS["GCN"]).double().eval()
    mu = graph_measure(net, x, (2, 1), edges)
    nodes = mu.marginal("conv1").sum(2)[0]
    close = torch.testing.assert_close
    close(mu(at("conv1")[4]), nodes[4:5])
    close(mu(at("conv1")[[1, 4]]), nodes[[1, 4]].sum(0, keepdim=True))
    close(mu(at("conv1")[4, 2]), mu.marginal("conv1")[:, 4, 2])
    close(mu(at("conv1").channel(2)), mu.marginal("conv1")[:, :, 2].sum(1))
    close(mu.marginal("conv1", "channel"), mu.marginal("conv1").sum(1))
    close(mu.marginal("conv1", "position"), mu.marginal("conv1").sum(2))
    mask = torch.zeros(6, 4, dtype=torch.bool)
    mask[[1, 4]] = True
    close(mu(at("conv1")[mask]), mu(at("conv1")[[1, 4]]))
    a, b = at("conv1")[4], at("input")[0]
    close(mu.marginal("input", joint=a)[:, 0].sum(1), mu(a & b))
    close(mu.marginal("conv1", joint=b)[:, 4].sum(1), mu(a & b))
    close(mu.marginal("input", given=a)[:, 0].sum(1), mu(b, given=a))
    close((mu.conditional(b, "conv1") * mu.marginal("conv1"))[:, 4].sum(1), mu(a & b))
    pairs = mu.joint("conv1", "input", "position")
    assert pairs.shape == (1, 6, 6)
    close(pairs[:, 4, 0], mu(a & b))
    close(mu.joint("conv1", "input").sum(1), mu.marginal("input", "channel"))
    labels = torch.tensor([0, 0, 0, 1, 1, 1]).unsqueeze(1)
    close(mu.joint("conv1", "input", (labels, "position")).sum(1), mu.marginal("input", "position"))
    close(mu.walk_variation(), torch.ones(1).double())


def test_nodes_and_edges_may_both_carry_relevance():
    def weighed(x: Tensor, e: Tensor) -> Tensor:
        return torch.zeros(6, 3).double().index_add(0, edges[1], x[edges[0]] + e)

    x, edges = random_graph(6, 14)
    e = torch.randn(14, 3, generator=torch.Generator().manual_seed(0)).double()
    net = Apply(weighed)
    with pytest.raises(InputError, match="batched=False"):
        RelevanceMeasure(net, (x, e), (2, 1))
    mu = RelevanceMeasure(net, (x, e), (2, 1), batched=False)
    total = mu.marginal("input[0]").sum() + mu.marginal("input[1]").sum()
    assert float(total) == pytest.approx(1, abs=1e-9)
    assert mu.marginal("input[1]").shape == (1, 14, 3)
    assert set(mu.marginal("input[1]").sum(2)[0].nonzero().flatten().tolist()) == set(
        (edges[1] == 2).nonzero().flatten().tolist()
    )


def test_a_target_without_a_node_raises():
    x, edges = random_graph(6, 14)
    net = GraphNet(LAYERS["GCN"]).double().eval()
    with pytest.raises(TargetError, match=r"\(1, 6, 2\) has 2 dimensions"):
        graph_measure(net, x, 1, edges)


class Spelled(nn.Module):
    """Two layers ``A relu(A X V) W``, with the adjacency in one of its forms."""

    def __init__(self, spelling: str, x: Tensor, edges: Tensor) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.v, self.w = nn.Linear(3, 4).double(), nn.Linear(4, 2).double()
        self.spelling, self.edges, self.nodes = spelling, edges, len(x)
        weight = torch.rand(edges.shape[1], generator=torch.Generator().manual_seed(4)).double()
        self.weight = weight
        coo = torch.sparse_coo_tensor(edges.flip(0), weight, (len(x), len(x)), check_invariants=True).coalesce()
        if spelling in ("coo", "csr", "dense"):
            self.register_buffer(
                "adjacency", {"coo": coo, "csr": coo.to_sparse_csr(), "dense": coo.to_dense()}[spelling]
            )

    def spread(self, h: Tensor) -> Tensor:
        if self.spelling == "csr":
            return self.adjacency @ h
        if self.spelling == "coo":
            return torch.sparse.mm(self.adjacency, h)
        if self.spelling == "dense":
            return self.adjacency @ h
        row, col = self.edges
        messages = h[row] * self.weight.unsqueeze(1)
        if self.spelling == "scatter":
            return torch.zeros_like(h).scatter_add_(0, col.unsqueeze(1).expand_as(messages), messages)
        if self.spelling == "segments":
            order = col.argsort(stable=True)
            lengths = torch.bincount(col, minlength=self.nodes)
            return torch.segment_reduce(messages[order], "sum", lengths=lengths)
        return torch.zeros_like(h).index_add(0, col, messages)

    def forward(self, x: Tensor) -> Tensor:
        return self.spread(self.w(self.spread(self.v(x)).relu()))


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("composite", [None, NRMAbsolute(), EpsilonPlus()], ids=["default", "absolute", "plus"])
@pytest.mark.parametrize("spelling", ["coo", "csr", "scatter", "segments", "dense"])
def test_spellings_of_one_graph_agree(spelling, composite):
    x, edges = random_graph(7, 18)
    net = Spelled(spelling, x, edges)
    if spelling == "dense" and not isinstance(composite, NRMAbsolute):
        pytest.skip("a dense constant matrix is a layer, with the rule of layers")
    with untouched(net, x) if spelling not in ("coo", "csr") else warnings.catch_warnings():
        mu = RelevanceMeasure(net, x, (3, 1), composite=composite, batched=False)
    nu = RelevanceMeasure(Spelled("index", x, edges), x, (3, 1), composite=composite, batched=False)
    torch.testing.assert_close(mu.output, nu.output)
    bound = 1e-5 * float(nu.variation("input")) if spelling == "dense" else 1e-9 * float(nu.variation("input"))
    torch.testing.assert_close(mu.marginal("input"), nu.marginal("input"), rtol=0, atol=bound)
    torch.testing.assert_close(mu.sink("input"), nu.sink("input"), rtol=0, atol=bound)
