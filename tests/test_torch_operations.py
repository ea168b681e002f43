"""Operations of all kinds: all relevance is accounted for, or the query raises."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import NRMAbsolute, RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import Apply

EDGES = torch.tensor([[0, 1, 2, 3, 3], [1, 2, 0, 1, 2]])
SQUARE = torch.randn((4, 4), generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def _accumulated(x: Tensor) -> Tensor:
    return x.index_put((torch.tensor([0, 0]),), x[:2], accumulate=True)


def _edge_softmax(x: Tensor) -> Tensor:
    score = x.sum(1)[EDGES[0]].exp()
    return torch.zeros(4).double().index_add(0, EDGES[1], score)[EDGES[1]].reciprocal().unsqueeze(1) * x[EDGES[0]]


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
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


UNSUPPORTED = {
    "sparse of computed values",
    "sparse computed from dense",
    "scatter_reduce prod",
    "segment_reduce prod",
    "segment_reduce initial",
    "scatter multiply",
    "inverse",
    "determinant",
    "prod",
    "cumprod",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_conserves_relevance_or_raises(name):
    """What does not arrive at the input is in a sink, or the query raises."""
    x = torch.randn((4, 4), generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    first = nn.Linear(4, 4).double()
    net = nn.Sequential(first, Apply(OPERATIONS[name])).eval()
    start = torch.ones(net(x).shape).double()
    try:
        mu = RelevanceMeasure(net, x, start=start, composite=NRMAbsolute(), batched=False)
        total = mu.marginal("input").sum() + sum(float(value) for value in mu.sinks().values())
    except UnsupportedOperationError:
        return
    assert name not in UNSUPPORTED
    assert float(total) == pytest.approx(1, abs=1e-6)
    assert bool(mu.marginal("input").any()), name
