"""Sums into nodes, writes by index and sparse products against matrices that are written out here."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nrm_plugin import NRMAbsolute, RelevanceMeasure
from tests.functional.kernel_matrices import Apply, alone, draw
from tests.functional.node_matrices import SUM_FLOOR, rows


def test_a_constant_competes_in_a_scattered_maximum():
    """Relevance of the outputs that it wins is absorbed."""
    x, rivals = draw(2, 4), draw(2, 4, seed=5)
    place = torch.tensor([[3, 2, 1, 0]]).expand(2, 4)
    actual = alone(lambda x: x.scatter_reduce(2, place[None], rivals[None], "amax"), x)
    wins = x > rivals.flip(1)
    assert 0 < int(wins.sum()) < 8
    torch.testing.assert_close(actual, torch.diag(wins.double().flatten()))


M = torch.randn((5, 2), generator=torch.Generator().manual_seed(1), dtype=torch.float64)  # messages
X = torch.randn((4, 2), generator=torch.Generator().manual_seed(2), dtype=torch.float64)  # nodes
INTO = torch.tensor([0, 2, 0, 3, 0])  # the node of each message; node 1 gets none
WIDE = INTO.unsqueeze(1).expand(5, 2)
ZEROS = torch.zeros(4, 2, dtype=torch.float64)


def sum_shares(scale: Tensor | None = None) -> Tensor:
    """Absolute shares of messages in nodes, ``T[(n, f), (e, f)]``."""
    matrix = torch.zeros(4, 2, 5, 2).double()
    size = M.abs() if scale is None else (M * scale).abs()
    for n in range(4):
        for f in range(2):
            members = [e for e in range(5) if INTO[e] == n]
            for e in members:
                matrix[n, f, e, f] = size[e, f] / sum(size[k, f] for k in members)
    return matrix.reshape(8, 10)


def extremum_shares(best: Callable[[list[float]], float], rivals: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The extremum of each node, among its messages and, if they compete, the values of the nodes."""
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


def shares_with_nodes(of_messages: Tensor, weight: float = 1.0) -> tuple[Tensor, Tensor]:
    """Shares of messages and of the values of the nodes that they are added to."""
    total = torch.zeros(4, 2).double()
    for e in range(5):
        total[INTO[e]] += weight * M[e]
    own = X.abs() / (X.abs() + total.abs())
    return (1 - own).reshape(8, 1) * of_messages, torch.diag(own.reshape(-1))


EMPTY = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0]).double()  # outputs of node 1
SIGNED = torch.tensor([1.0, -2.0, 0.5, 1.0, -1.0]).double()
COO = torch.sparse_coo_tensor(torch.stack([INTO, torch.arange(5)]), SIGNED, (4, 5), check_invariants=True).coalesce()
ONTO_ZEROS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "index_add": (lambda m: ZEROS.index_add(0, INTO, m), sum_shares()),
    "index_add_": (lambda m: m.new_zeros(4, 2).index_add_(0, INTO, m, alpha=-3), sum_shares()),
    "index_add along features": (lambda m: ZEROS.T.index_add(1, INTO, m.T).T, sum_shares()),
    "torch.scatter_add": (lambda m: torch.scatter_add(ZEROS, 0, WIDE, m), sum_shares()),
    "scatter_add_, a part of the messages": (
        lambda m: ZEROS.clone().scatter_add_(0, WIDE, torch.cat([m, m[:2]])),
        sum_shares(),
    ),
    "scatter_reduce sum": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "sum"), sum_shares()),
    "scatter_reduce mean": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "mean", include_self=False), sum_shares()),
    "scatter_reduce_ mean with zeros": (lambda m: m.new_zeros(4, 2).scatter_reduce_(0, WIDE, m, "mean"), sum_shares()),
    "index_reduce mean": (lambda m: ZEROS.index_reduce(0, INTO, m, "mean", include_self=False), sum_shares()),
    "segment_reduce": (
        lambda m: torch.segment_reduce(m[[0, 2, 4, 1, 3]], "mean", lengths=torch.tensor([3, 0, 1, 1])).nan_to_num(),
        sum_shares(),
    ),
    "segment_reduce by offsets": (
        lambda m: torch.segment_reduce(m[[0, 2, 4, 1, 3]], "sum", offsets=torch.tensor([0, 3, 3, 4, 5])),
        sum_shares(),
    ),
    "sparse @": (lambda m: COO @ m, sum_shares(SIGNED.unsqueeze(1))),
    "torch.sparse.mm": (lambda m: torch.sparse.mm(COO, m), sum_shares(SIGNED.unsqueeze(1))),
    "torch.mm of CSR": (lambda m: torch.mm(COO.to_sparse_csr(), m), sum_shares(SIGNED.unsqueeze(1))),
    "torch.sparse.mm mean": (
        lambda m: torch.sparse.mm(COO.to_sparse_csr(), m, "mean"),
        sum_shares(SIGNED.unsqueeze(1)),
    ),
    "torch.spmm": (lambda m: torch.spmm(COO, m), sum_shares(SIGNED.unsqueeze(1))),
    "torch.sparse.addmm": (
        lambda m: torch.sparse.addmm(torch.ones(4, 2).double(), COO, m, alpha=2),
        sum_shares(SIGNED.unsqueeze(1)),
    ),
    "vector": (lambda m: torch.stack([COO @ m[:, 0], COO.matmul(m[:, 1])], 1), sum_shares(SIGNED.unsqueeze(1))),
    "dense times sparse": (lambda m: (m.T @ COO.T.to_sparse_csr()).T, sum_shares(SIGNED.unsqueeze(1))),
    "amax": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "amax", include_self=False), extremum_shares(max)[0]),
    "amin": (lambda m: ZEROS.index_reduce(0, INTO, m, "amin", include_self=False), extremum_shares(min)[0]),
    "amax above zero": (lambda m: ZEROS.scatter_reduce(0, WIDE, m, "amax"), extremum_shares(max, ZEROS)[0]),
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:index_reduce")
@pytest.mark.parametrize("name", ONTO_ZEROS)
def test_sums_of_messages_split_by_size_and_nodes_without_messages_are_constants(name):
    op, expected = ONTO_ZEROS[name]
    ((actual,), constants) = rows(Apply(op), (M,))
    torch.testing.assert_close(actual, expected, rtol=0, atol=SUM_FLOOR)
    torch.testing.assert_close(constants, 1 - expected.sum(1), rtol=0, atol=SUM_FLOOR)
    assert "amax" in name or torch.equal((expected.sum(1) == 0).double(), EMPTY)


ONTO_NODES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]] = {
    "index_add": (lambda m, x: x.index_add(0, INTO, m), shares_with_nodes(sum_shares())),
    "in place, times two": (lambda m, x: (x * 1).index_add_(0, INTO, m, alpha=2), shares_with_nodes(sum_shares(), 2.0)),
    "scatter_add": (lambda m, x: x.scatter_add(0, WIDE, m), shares_with_nodes(sum_shares())),
    "mean with self": (lambda m, x: x.scatter_reduce(0, WIDE, m, "mean"), shares_with_nodes(sum_shares())),
    "amax with self": (lambda m, x: x.scatter_reduce(0, WIDE, m, "amax"), extremum_shares(max, X)),
    "amin without self": (lambda m, x: x.scatter_reduce(0, WIDE, m, "amin", include_self=False), extremum_shares(min)),
}


@pytest.mark.parametrize("name", ONTO_NODES)
def test_values_of_nodes_and_messages_split_the_relevance_of_their_sum(name):
    op, expected = ONTO_NODES[name]
    actual, constants = rows(Apply(op), (M, X))
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=SUM_FLOOR)
    assert not constants.any()


TIED = torch.tensor([[0.0, 2.0], [1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [0.0, 1.0]]).double()
RIVALS = torch.tensor([[0.0, 2.0], [3.0, 3.0], [1.0, -1.0], [-1.0, 0.0]]).double()


def shares_of_ties(best: Callable[[list[float]], float], own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Equal shares of the messages, and of the values of the nodes where they compete, that attain the extremum."""
    messages, nodes = torch.zeros(4, 2, 5, 2).double(), torch.zeros(4, 2).double()
    for n in range(4):
        for f in range(2):
            members = [e for e in range(5) if INTO[e] == n]
            values = [float(TIED[e, f]) for e in members] + ([] if own is None else [float(own[n, f])])
            if not values:
                nodes[n, f] = 1
                continue
            share = 1 / values.count(best(values))
            nodes[n, f] = share if own is not None and float(own[n, f]) == best(values) else 0
            for e in members:
                messages[n, f, e, f] = share if float(TIED[e, f]) == best(values) else 0
    return messages.reshape(8, 10), nodes.reshape(8)


SORTED = [0, 2, 4, 1, 3]  # messages by node
TIES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[Tensor, Tensor]]] = {
    "scatter_reduce amax": (
        lambda m, x: m.new_zeros(4, 2).scatter_reduce(0, WIDE, m, "amax", include_self=False),
        shares_of_ties(max, None),
    ),
    "scatter_reduce_ amin": (
        lambda m, x: m.new_zeros(4, 2).scatter_reduce_(-2, WIDE, m, "amin", include_self=False),
        shares_of_ties(min, None),
    ),
    "index_reduce amax": (
        lambda m, x: ZEROS.index_reduce(0, INTO, m, "amax", include_self=False),
        shares_of_ties(max, None),
    ),
    "index_reduce_ amin with rivals": (
        lambda m, x: RIVALS.clone().index_reduce_(0, INTO, m, "amin"),
        shares_of_ties(min, RIVALS),
    ),
    "segment_reduce max": (
        lambda m, x: torch.segment_reduce(m[SORTED], "max", lengths=torch.tensor([3, 0, 1, 1])).clamp(min=-9),
        shares_of_ties(max, None),
    ),
    "torch.sparse.mm amin": (
        lambda m, x: torch.sparse.mm(COO.bool().double().to_sparse_csr(), m, "amin"),
        shares_of_ties(min, None),
    ),
    "along features": (
        lambda m, x: m.new_zeros(2, 4).scatter_reduce(1, WIDE.T, m.T, "amax", include_self=False).T,
        shares_of_ties(max, None),
    ),
    "amax with rivals": (lambda m, x: RIVALS.scatter_reduce(0, WIDE, m, "amax"), shares_of_ties(max, RIVALS)),
    "amin with zeros": (lambda m, x: m.new_zeros(4, 2).scatter_reduce(0, WIDE, m, "amin"), shares_of_ties(min, ZEROS)),
    "amax with nodes": (lambda m, x: x.scatter_reduce(0, WIDE, m, "amax"), shares_of_ties(max, RIVALS)),
    "amin with nodes": (lambda m, x: (1 * x).index_reduce_(0, INTO, m, "amin"), shares_of_ties(min, RIVALS)),
    "amax without nodes": (
        lambda m, x: x.scatter_reduce(0, WIDE, m, "amax", include_self=False),
        shares_of_ties(max, None),
    ),
}


@pytest.mark.filterwarnings("ignore:Sparse", "ignore:index_reduce")
@pytest.mark.parametrize("name", TIES)
def test_messages_that_attain_an_extremum_have_equal_parts_and_values_left_out_have_none(name: str) -> None:
    op, (messages, nodes) = TIES[name]
    (of_messages, of_nodes), constants = rows(Apply(op), (TIED, RIVALS))
    torch.testing.assert_close(of_messages, messages, rtol=0, atol=1e-12)
    torch.testing.assert_close(of_nodes.sum(1) + constants, nodes, rtol=0, atol=1e-12)
    assert bool(of_nodes.any()) == name.endswith("nodes")


def test_a_segment_without_members_is_what_torch_returns_for_it():
    lengths = torch.tensor([2, 0, 3])
    for how in ("max", "min", "mean", "sum"):
        mu = RelevanceMeasure(
            Apply(lambda m, how=how: torch.segment_reduce(m, how, lengths=lengths).nan_to_num(7, 8, 9)),
            M,
            (0, 1),
            batched=False,
        )
        expected = torch.segment_reduce(M, how, lengths=lengths).nan_to_num(7, 8, 9)
        torch.testing.assert_close(mu.outputs, expected)


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


def write_by_index(m: Tensor, x: Tensor) -> Tensor:
    x = x.clone()
    x[PLACES] = m[2:4]
    x[X > 1] = 0.5
    return x


def dense_batch(m: Tensor, x: Tensor) -> Tensor:
    out = m.new_full((6, 2), -9.0)
    out[torch.tensor([5, 0, 3, 2, 1])] = m
    return out


@pytest.mark.parametrize("name", [*COPIES, "written by index", "dense batch"])
def test_indexed_writes_and_reads_pass_relevance_to_the_source(name):
    op = COPIES.get(name) or {"written by index": write_by_index, "dense batch": dense_batch}[name]
    output = op(M, X)
    actual, constants = rows(Apply(op), (M, X))
    for part, source in zip(actual, (M, X), strict=True):
        assert torch.equal(part, (output.reshape(-1, 1) == source.reshape(1, -1)).double())
    assert torch.equal(constants, 1 - actual[0].sum(1) - actual[1].sum(1))


TWICE = torch.tensor([1, 3, 1, 0, 1])
ADDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "index_put": lambda x, y: x.index_put((TWICE,), y, accumulate=True),
    "index_put_": lambda x, y: x.clone().index_put_((TWICE,), y, accumulate=True),
    "positional": lambda x, y: torch.index_put(x, (TWICE,), y, True),
    "by two indices": lambda x, y: x.index_put((TWICE[:, None], torch.arange(3)), y, accumulate=True),
    "put": lambda x, y: x.put(3 * TWICE[:, None] + torch.arange(3), y, accumulate=True),
    "scatter": lambda x, y: x.scatter(0, TWICE[:, None].expand(-1, 3), y, reduce="add"),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", ADDED)
def test_accumulating_writes_are_sums_into_nodes(name):
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
            actual = nu.marginal(tap) if tap in nu.layers else torch.zeros_like(expected)
            torch.testing.assert_close(actual, expected.to(actual), rtol=0, atol=1e-5)


def test_an_empty_group_writes_nothing():
    """As in a layer with weights for each degree, without a node of some degree."""

    def by_degree(x: Tensor) -> Tensor:
        result = x.detach().new_zeros(x.shape)
        for members in (torch.tensor([0, 2]), torch.tensor([], dtype=torch.long), torch.tensor([1, 3])):
            result.index_copy_(0, members, 2 * x[members])
        return result

    x = torch.randn(4, 3).double()
    mu = RelevanceMeasure(Apply(by_degree).eval(), x, (1, 2), composite=NRMAbsolute(), batched=False)
    assert float(mu.marginal("input")[0, 1, 2]) == pytest.approx(1)
