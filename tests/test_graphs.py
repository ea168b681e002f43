"""Graph networks: kernels against matrices, layers against matrices, GNN-LRP against its formula, and a zoo."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus, LayerMapComposite
from zennit.rules import Gamma, Norm, Pass
from zennit.types import Activation, AvgPool, Linear

from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure, at
from nrm_plugin.errors import InputError, TargetError, UnknownLayerError, UnsupportedOperationError
from tests.conftest import untouched
from tests.graph_nets import LAYERS, GraphNet, looped, random_graph

FLOOR = 1e-5  # what the rule of a sum hands to entries of zero


class Apply(nn.Module):
    """A function as a model."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.op = op

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.op(*inputs)


def rows(net: nn.Module, inputs: tuple[Tensor, ...], *more: Any) -> tuple[list[Tensor], Tensor]:
    """``T[j, i]`` for each input, and what of each output ``j`` ends at constants; the rest must be nothing."""
    shape = net(*inputs, *more).shape
    parts: list[list[Tensor]] = [[] for _ in inputs]
    constants = []
    for j in range(shape.numel()):
        start = torch.zeros(shape).double()
        start.view(-1)[j] = 1.0
        rules = Normalized(NRMAbsolute(), residual="sink")
        mu = RelevanceMeasure(net, inputs, start=start, composite=rules, additional_forward_args=more, batched=False)
        for number, value in enumerate(inputs):
            try:
                found = mu.marginal(at("input", item=number)).reshape(-1)
            except UnknownLayerError:  # nothing of it is read
                found = torch.zeros(value.numel()).double()
            parts[number].append(found)
        constants.append(sum(mu.sinks("constants").values(), start=torch.zeros(1).double())[0])
        whole = sum(part[-1].sum() for part in parts) + sum(float(v) for v in mu.sinks().values())
        assert abs(float(whole) - 1) <= 1e-10
    return [torch.stack(part) for part in parts], torch.stack(constants)


# -- kernels ----------------------------------------------------------------------------------------------------------

M = torch.randn((5, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # messages
X = torch.randn((4, 2), generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # nodes
INTO = torch.tensor([0, 2, 0, 3, 0])  # the node of each message; node 1 gets none
WIDE = INTO.unsqueeze(1).expand(5, 2)
ZEROS = torch.zeros(4, 2, dtype=torch.float64)


def summed(scale: Tensor | None = None) -> Tensor:
    """Absolute shares of messages in nodes, ``T[(n, f), (e, f)]``."""
    matrix = torch.zeros(4, 2, 5, 2).double()
    size = M.abs() if scale is None else (M * scale).abs()
    for n in range(4):
        for f in range(2):
            members = [e for e in range(5) if INTO[e] == n]
            for e in members:
                matrix[n, f, e, f] = size[e, f] / sum(size[k, f] for k in members)
    return matrix.reshape(8, 10)


def chosen(best: Callable[[list[float]], float], rivals: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The entry that is best in each node: among messages, and the nodes' own values where they compete."""
    messages, own = torch.zeros(4, 2, 5, 2).double(), torch.zeros(4, 2, 4, 2).double()
    for n in range(4):
        for f in range(2):
            values = {("m", e): float(M[e, f]) for e in range(5) if INTO[e] == n}
            if rivals is not None or not values:
                values["x", n] = float((X if rivals is None else rivals)[n, f])
            top = best(list(values.values()))
            ((kind, place),) = [key for key, value in values.items() if value == top]
            (messages if kind == "m" else own)[n, f, place, f] = 1.0
    return messages.reshape(8, 10), own.reshape(8, 8)


def both(of_messages: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Shares of the nodes' own values beside what was summed into them."""
    total = torch.zeros(4, 2).double()
    for e in range(5):
        total[INTO[e]] += weight * M[e]
    own = X.abs() / (X.abs() + total.abs())
    return (1 - own).reshape(8, 1) * of_messages, torch.diag(own.reshape(-1))


EMPTY = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]).double()  # outputs of node 1
SIGNED = torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0]).double()
COO = torch.sparse_coo_tensor(torch.stack([INTO, torch.arange(5)]), SIGNED, (4, 5), check_invariants=True).coalesce()
ONTO_ZEROS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "index_add": (lambda m: ZEROS.index_add(0, INTO, m), summed()),
    "index_add_": (lambda m: m.new_zeros(4, 2).index_add_(0, INTO, m, alpha=-3), summed()),
    "index_add along features": (lambda m: ZEROS.T.index_add(1, INTO, m.T).T, summed()),
    "torch.scatter_add": (lambda m: torch.scatter_add(ZEROS, 0, WIDE, m), summed()),
    "scatter_add_, a part of the messages": (
        lambda m: ZEROS.clone().scatter_add_(0, WIDE, torch.cat([m, m[:2]])),
        summed(),
    ),
    "scatter_reduce sum": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "sum"), summed()),
    "scatter_reduce mean": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "mean", include_self=False), summed()),
    "scatter_reduce_ mean with zeros": (lambda m: m.new_zeros(4, 2).scatter_reduce_(0, WIDE, m, "mean"), summed()),
    "index_reduce mean": (lambda m: ZEROS.index_reduce(0, INTO, m, "mean", include_self=False), summed()),
    "segment_reduce": (
        lambda m: torch.segment_reduce(m[[0, 2, 4, 1, 3]], "mean", lengths=torch.tensor([3, 0, 1, 1])),
        summed(),
    ),
    "segment_reduce by offsets": (
        lambda m: torch.segment_reduce(m[[0, 2, 4, 1, 3]], "sum", offsets=torch.tensor([0, 3, 3, 4, 5])),
        summed(),
    ),
    "sparse @": (lambda m: COO @ m, summed(SIGNED.unsqueeze(1))),
    "torch.sparse.mm": (lambda m: torch.sparse.mm(COO, m), summed(SIGNED.unsqueeze(1))),
    "torch.mm of CSR": (lambda m: torch.mm(COO.to_sparse_csr(), m), summed(SIGNED.unsqueeze(1))),
    "torch.sparse.mm mean": (
        lambda m: torch.sparse.mm(COO.to_sparse_csr(), m, "mean"),
        summed(SIGNED.unsqueeze(1)),
    ),
    "torch.spmm": (lambda m: torch.spmm(COO, m), summed(SIGNED.unsqueeze(1))),
    "torch.sparse.addmm": (
        lambda m: torch.sparse.addmm(torch.ones(4, 2).double(), COO, m, alpha=2),
        summed(SIGNED.unsqueeze(1)),
    ),
    "vector": (lambda m: torch.stack([COO @ m[:, 0], COO.matmul(m[:, 1])], 1), summed(SIGNED.unsqueeze(1))),
    "dense times sparse": (lambda m: (m.T @ COO.T.to_sparse_csr()).T, summed(SIGNED.unsqueeze(1))),
    "amax": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "amax", include_self=False), chosen(max)[0]),
    "amin": (lambda m: ZEROS.index_reduce(0, INTO, m, "amin", include_self=False), chosen(min)[0]),
    "amax above zero": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "amax"), chosen(max, ZEROS)[0]),
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:index_reduce")
@pytest.mark.parametrize("name", ONTO_ZEROS)
def test_messages_that_are_summed_share_by_size_and_a_node_without_any_ends_at_a_constant(name):
    op, expected = ONTO_ZEROS[name]
    ((actual,), constants) = rows(Apply(op), (M,))
    torch.testing.assert_close(actual, expected, rtol=0, atol=FLOOR)
    torch.testing.assert_close(constants, 1 - expected.sum(1), rtol=0, atol=FLOOR)
    assert "amax" in name or torch.equal((expected.sum(1) == 0).double(), EMPTY)


ONTO_NODES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]] = {
    "index_add": (lambda m, x: x.index_add(0, INTO, m), both(summed())),
    "in place, times two": (lambda m, x: (x * 1).index_add_(0, INTO, m, alpha=2), both(summed(), 2.0)),
    "scatter_add": (lambda m, x: x.scatter_add(0, WIDE, m), both(summed())),
    "mean with self": (lambda m, x: x.scatter_reduce(0, WIDE, m, "mean"), both(summed())),
    "amax with self": (lambda m, x: x.scatter_reduce(0, WIDE, m, "amax"), chosen(max, X)),
    "amin without self": (lambda m, x: x.scatter_reduce(0, WIDE, m, "amin", include_self=False), chosen(min)),
}


@pytest.mark.parametrize("name", ONTO_NODES)
def test_what_nodes_hold_shares_with_what_is_added(name):
    op, expected = ONTO_NODES[name]
    found, constants = rows(Apply(op), (M, X))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=FLOOR)
    assert not constants.any()


PLACES = torch.tensor([3, 0])
COPIES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "scatter": lambda m, x: x.scatter(0, torch.tensor([[1, 3], [0, 2]]), m),
    "scatter a number": lambda m, x: x.scatter(0, torch.tensor([[1, 3]]), 7.0),
    "index_copy": lambda m, x: x.index_copy(0, PLACES, m[:2]),
    "masked_scatter": lambda m, x: x.masked_scatter(X > 0, m),
    "select_scatter": lambda m, x: x.select_scatter(m[1], 0, 2),
    "index_put": lambda m, x: x.index_put((PLACES,), m[2:4]),
    "gather": lambda m, x: m.gather(0, torch.tensor([[1, 3], [0, 2]])),
    "index_select": lambda m, x: m.index_select(0, PLACES),
    "take_along_dim": lambda m, x: m.take_along_dim(torch.tensor([[1, 3]]), 0),
    "repeat_interleave": lambda m, x: m.repeat_interleave(torch.tensor([1, 0, 2, 1, 1]), 0),
}


def put_at(m: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    x[PLACES] = m[2:4]
    x[X > 1] = 0.5
    return x


def dense_batch(m: Tensor, x: Tensor) -> Tensor:
    out = m.new_full((6, 2), -9.0)
    out[torch.tensor([5, 0, 3, 2, 1])] = m
    return out


@pytest.mark.parametrize("name", [*COPIES, "written by index", "dense batch"])
def test_what_is_written_or_read_by_index_is_handed_to_where_it_came_from(name):
    op = COPIES.get(name) or {"written by index": put_at, "dense batch": dense_batch}[name]
    output = op(M, X)
    found, constants = rows(Apply(op), (M, X))
    for part, source in zip(found, (M, X), strict=True):
        assert torch.equal(part, (output.reshape(-1, 1) == source.reshape(1, -1)).double())
    assert torch.equal(constants, 1 - found[0].sum(1) - found[1].sum(1))


# -- layers -----------------------------------------------------------------------------------------------------------


def by_size(weight: Tensor, a: Tensor) -> Tensor:
    part = (weight * a).abs()
    return part / part.sum(1, keepdim=True)


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """``T[(n, o), (n, i)]``."""
    return torch.block_diag(*(by_size(layer.weight.detach(), a) for a in x))


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


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_the_matrix_written_out_here(name):
    torch.manual_seed(0)
    x, edges = random_graph(5, 11)
    net = LAYERS[name](3, 4).double().eval()
    with torch.no_grad():
        expected = MATRICES[name](net, x, edges)
    ((actual,), constants) = rows(net, (x,), edges)
    torch.testing.assert_close(actual, expected, rtol=0, atol=10 * FLOOR)
    assert not constants.any()


@pytest.mark.parametrize("is_pooled", [False, True], ids=["node", "graph"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_books_of_a_graph_network_balance(name, is_pooled):
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


# -- one graph is one sample ------------------------------------------------------------------------------------------


def graph_measure(net: nn.Module, x: Tensor, target: Any, *more: Any, composite: Any = None) -> RelevanceMeasure:
    rules = composite or NRMAbsolute()
    return RelevanceMeasure(net, x, target, composite=rules, additional_forward_args=more, batched=False)


@pytest.mark.parametrize("composite", [NRMAbsolute, EpsilonPlus], ids=["absolute", "plus"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_in_a_batch_of_graphs_has_the_measure_of_its_own(name, composite):
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


def test_events_and_maps_name_nodes_before_features():
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


def test_a_target_that_names_no_node_says_what_is_missing():
    x, edges = random_graph(6, 14)
    net = GraphNet(LAYERS["GCN"]).double().eval()
    with pytest.raises(TargetError, match=r"\(1, 6, 2\) has 2 dimensions"):
        graph_measure(net, x, 1, edges)


# -- the same graph, spelled otherwise --------------------------------------------------------------------------------


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


# -- GNN-LRP ----------------------------------------------------------------------------------------------------------


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


def restricted(net: Published, x: Tensor, target: int, sets: list[list[int]]) -> float:
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
            for e in range(net.edges.shape[1]) if len(h) < 100 else _into(net, set(arrived)):
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


def _into(net: Published, nodes: set[int]) -> list[int]:
    mask = torch.zeros(net.nodes, dtype=torch.bool)
    mask[list(nodes)] = True
    return mask[net.edges[1]].nonzero().flatten().tolist()


def test_gnn_lrp_is_the_joint_over_one_group_for_each_layer():
    x, edges = random_graph(6, 26, seed=3)
    x = 100 * x.abs()
    net = Published(edges, 6, width=8)
    mu = RelevanceMeasure(net, x, 0, composite=published_composite(), batched=False)
    taps = ["input", "blocks.0", "blocks.1", "blocks.2"]
    total, seen = 0.0, 0
    for first in range(6):
        for walk in [(first, b, c, d) for b in range(6) for c in (0, 3) for d in (1, 3)]:
            expected = restricted(net, x, 0, [[node] for node in walk])
            event = at(taps[0])[walk[0]]
            for tap, node in zip(taps[1:], walk[1:], strict=True):
                event = event & at(tap)[node]
            assert float(mu(event) * mu.output) == pytest.approx(expected, abs=1e-8)
            total, seen = total + abs(expected), seen + (expected != 0)
    assert total > 0.01
    assert 10 < seen < 140
    everything = restricted(net, x, 0, [list(range(6))] * 4)
    assert float(mu.marginal("input").sum() * mu.output) == pytest.approx(everything, abs=1e-8)


def test_sgnn_lrp_is_the_joint_over_one_set_in_all_layers():
    x, edges = random_graph(8, 20)
    x = x.abs()
    net = Published(edges, 8)
    mu = RelevanceMeasure(net, x, 1, composite=published_composite(), batched=False)
    for nodes in ([0, 1, 2], [3, 5], list(range(7))):
        subgraph = at("input")[nodes] & at("blocks.0")[nodes] & at("blocks.1")[nodes] & at("blocks.2")[nodes]
        walks = restricted(net, x, 1, [nodes] * 4)
        assert float(mu(subgraph) * mu.output) == pytest.approx(walks, abs=1e-8)
        assert abs(walks) > 1e-6


def test_a_subgraph_of_ten_thousand_nodes_is_asked_in_one_pass():
    x, edges = random_graph(10_000, 40_000)
    x = x.abs()
    net = Published(edges, 10_000)
    mu = RelevanceMeasure(net, x, 0, composite=published_composite(), batched=False)
    nodes = sorted({0, *_reached(net, [0], 3)})[:400]
    event = at("input")[nodes] & at("blocks.0")[nodes] & at("blocks.1")[nodes] & at("blocks.2")[nodes]
    found = mu(event)
    asked = mu.cost
    mu.sinks()
    mu.marginal("input")
    assert asked.steps <= mu.cost.steps
    assert asked.vectors <= mu.cost.vectors
    expected = restricted(net, x, 0, [nodes] * 4)
    assert abs(expected / float(mu.output)) > 1e-6
    assert float(found * mu.output) == pytest.approx(expected, rel=1e-6)


def _reached(net: Published, nodes: list[int], hops: int) -> set[int]:
    reached = set(nodes)
    for _ in range(hops):
        reached |= {int(net.edges[0, e]) for e in _into(net, reached)}
    return reached


# -- a zoo ------------------------------------------------------------------------------------------------------------

EDGES = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 0, 1, 2]])
SQUARE = torch.randn((4, 4), generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def _accumulated(x: Tensor) -> Tensor:
    return x.index_put((torch.tensor([0, 0]),), x[:2], accumulate=True)


def _edge_softmax(x: Tensor) -> Tensor:
    score = x.sum(1)[EDGES[0]].exp()
    return torch.zeros(4).double().index_add(0, EDGES[1], score)[EDGES[1]].reciprocal().unsqueeze(1) * x[EDGES[0]]


ZOO: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse of computed values": lambda x: torch.sparse_coo_tensor(EDGES, x.sum(1)[EDGES[0]], (4, 4)) @ SQUARE,
    "sparse computed from dense": lambda x: torch.sparse.mm((x @ x.T).to_sparse(), SQUARE),
    "sparse softmax": lambda x: torch.sparse.softmax(x.to_sparse(), 1).to_dense(),
    "scatter_reduce prod": lambda x: x.scatter_reduce(0, torch.zeros(4, 4).long(), x, "prod"),
    "segment_reduce prod": lambda x: torch.segment_reduce(x, "prod", lengths=torch.tensor([2, 2])),
    "segment_reduce initial": lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([2, 2]), initial=1.0),
    "index_put accumulate": _accumulated,
    "put accumulate": lambda x: x.put(torch.tensor([0, 0]), x[0, :2], accumulate=True),
    "scatter reduce": lambda x: x.scatter(0, torch.zeros(1, 4).long(), x, reduce="add"),
    "scatter multiply": lambda x: x.scatter(0, torch.zeros(1, 4).long(), x, reduce="multiply"),
    "edge softmax": _edge_softmax,
    "embedding bag": lambda x: nn.functional.embedding_bag(EDGES.T, x),
    "cdist": lambda x: torch.cdist(x, x + 1),
    "pdist": lambda x: nn.functional.pdist(x).reshape(3, 2),
    "cosine": lambda x: nn.functional.cosine_similarity(x.unsqueeze(0), x.unsqueeze(1), dim=2),
    "inverse": torch.linalg.inv,
    "determinant": lambda x: torch.linalg.det(x).reshape(1, 1),
    "solve": lambda x: torch.linalg.solve(SQUARE, x),
    "svd": lambda x: torch.linalg.svd(x)[1].reshape(1, 4),
    "qr": lambda x: torch.linalg.qr(x)[1],
    "matrix exp": torch.linalg.matrix_exp,
    "eigenvalues": lambda x: torch.linalg.eigvalsh(x @ x.T).reshape(1, 4),
    "fft": lambda x: torch.fft.rfft(x).abs(),
    "complex": lambda x: torch.view_as_real(torch.complex(x, x)).flatten(1),
    "prod": lambda x: x.prod(1, keepdim=True),
    "cumprod": lambda x: x.cumprod(1),
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "logsumexp": lambda x: x.logsumexp(1, keepdim=True),
    "norm": lambda x: x.norm(dim=1, keepdim=True),
    "renorm": lambda x: x.renorm(2, 0, 1.0),
    "kron": lambda x: torch.kron(x, x),
    "outer": lambda x: torch.outer(x[0], x[1]),
    "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 1:]),
    "trace": lambda x: x.trace().reshape(1, 1),
    "digamma": lambda x: x.abs().digamma(),
    "bessel": lambda x: torch.special.i0(x),
    "heaviside": lambda x: torch.heaviside(x, x),
    "atan2": lambda x: torch.atan2(x, x + 1),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "median": lambda x: x.median(1, keepdim=True)[0],
    "quantile": lambda x: x.quantile(0.3, dim=1, keepdim=True),
    "sort": lambda x: x.sort(1)[0],
    "unique": lambda x: torch.unique(x, dim=0),
    "histogram": lambda x: torch.histc(x, 4).reshape(1, 4) + x[:1] * 0,
    "bucketize": lambda x: torch.bucketize(x, torch.linspace(-1, 1, 5).double()) * x,
    "combinations": lambda x: torch.combinations(x[0]),
    "vander": lambda x: torch.vander(x[0], 3),
    "trapezoid": lambda x: torch.trapezoid(x, dim=1).unsqueeze(1),
    "gradient": lambda x: torch.gradient(x, dim=1)[0],
    "searched": lambda x: x.gather(1, x.argsort(1)),
    "lstm": lambda x: nn.functional.linear(x, SQUARE).tanh(),
    "rfft norm": lambda x: torch.fft.fft(x).real,
    "triangular solve": lambda x: torch.linalg.solve_triangular(SQUARE.triu(), x, upper=True),
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.T + 4 * torch.eye(4).double()),
    "lu": lambda x: torch.linalg.lu_factor(x)[0],
    "multi dot": lambda x: torch.linalg.multi_dot([x, SQUARE, SQUARE]),
    "block diag": lambda x: torch.block_diag(x, x),
    "vmap": lambda x: torch.vmap(lambda row: row.sum() * row)(x),
    "detached": lambda x: x.detach() * 2 + x,
    "data": lambda x: torch.tensor(x.tolist()).double() + x,
}
REFUSED = {
    "sparse of computed values",
    "sparse computed from dense",
    "scatter_reduce prod",
    "segment_reduce prod",
    "segment_reduce initial",
    "scatter multiply",
    "cdist",
    "inverse",
    "determinant",
    "prod",
    "cumprod",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_an_operation_hands_down_all_or_raises(name):
    """Never fewer, and never zeros: what is missing below must be in a sink, or the question is refused."""
    x = torch.randn((4, 4), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    first = nn.Linear(4, 4).double()
    net = nn.Sequential(first, Apply(ZOO[name])).eval()
    start = torch.ones(net(x).shape).double()
    try:
        mu = RelevanceMeasure(net, x, start=start, composite=NRMAbsolute(), batched=False)
        total = mu.marginal("input").sum() + sum(float(value) for value in mu.sinks().values())
    except UnsupportedOperationError:
        return
    assert name not in REFUSED
    assert float(total) == pytest.approx(1, abs=1e-6)
    assert bool(mu.marginal("input").any()), name


TWICE = torch.tensor([1, 3, 1, 0, 1])
ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_put": lambda x, y: x.index_put((TWICE,), y, accumulate=True),
    "index_put_": lambda x, y: x.clone().index_put_((TWICE,), y, accumulate=True),
    "positional": lambda x, y: torch.index_put(x, (TWICE,), y, True),
    "by two indices": lambda x, y: x.index_put((TWICE[:, None], torch.arange(3)), y, accumulate=True),
    "put": lambda x, y: x.put(3 * TWICE[:, None] + torch.arange(3), y, accumulate=True),
    "scatter": lambda x, y: x.scatter(0, TWICE[:, None].expand(-1, 3), y, reduce="add"),
}


@pytest.mark.parametrize("name", ADDED)
def test_writes_that_add_are_sums_into_nodes(name):
    x, y = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    plain, written = (Apply(op).eval() for op in (lambda x, y: x.index_add(0, TWICE, y), ADDED[name]))
    for start in torch.eye(12).double().reshape(-1, 4, 3):
        mu, nu = (
            RelevanceMeasure(net, (x, y), start=start, composite=NRMAbsolute(), batched=False)
            for net in (plain, written)
        )
        torch.testing.assert_close(nu.output, mu.output)
        for tap in ("input[0]", "input[1]"):
            expected = mu.marginal(tap) if tap in mu.layers else torch.zeros(1, *(x if tap == "input[0]" else y).shape)
            found = nu.marginal(tap) if tap in nu.layers else torch.zeros_like(expected)
            torch.testing.assert_close(found, expected.to(found), rtol=0, atol=1e-5)


def test_a_group_without_members_is_written_nowhere():
    """What a layer with weights for each degree does where no node has one."""

    def by_degree(x: Tensor) -> Tensor:
        result = x.detach().new_zeros(x.shape)
        for members in (torch.tensor([0, 2]), torch.tensor([], dtype=torch.long), torch.tensor([1, 3])):
            result.index_copy_(0, members, 2 * x[members])
        return result

    x = torch.randn(4, 3).double()
    mu = RelevanceMeasure(Apply(by_degree).eval(), x, (1, 2), composite=NRMAbsolute(), batched=False)
    assert float(mu.marginal("input")[0, 1, 2]) == pytest.approx(1)
