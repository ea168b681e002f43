"""Functions of linear algebra have the kernels of the products that a user would write.

Covers: nrm_plugin.functional.einsum_notation.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import Apply, Op, alone, check, columns, draw, eye, linear_rules

S, T = draw(3, 3, seed=20) + 3 * eye(3), draw(3, 5, seed=21)
INVERSE = torch.linalg.inv(S)
A, B, V = draw(2, 3), draw(2, 3, seed=1), draw(3, seed=22)


def crossed(a: Tensor, b: Tensor) -> Tensor:
    (a0, a1, a2), (b0, b1, b2) = a.unbind(-1), b.unbind(-1)
    return torch.stack([a1 * b2 - a2 * b1, a2 * b0 - a0 * b2, a0 * b1 - a1 * b0], -1)


PAIRS: dict[str, tuple[Op, Op]] = {
    "linalg.cross": (torch.linalg.cross, crossed),
    "cross of the first dimension of size 3": (
        lambda a, b: torch.cross(a.mT, b.mT),
        lambda a, b: crossed(a, b).mT,
    ),
    "cross by dimension": (lambda a, b: torch.cross(a, b, dim=2), crossed),
    "solve": (
        lambda a, b: torch.linalg.solve(S, (a + b).mT),
        lambda a, b: INVERSE @ (a + b).mT,
    ),
    "solve for vectors": (
        lambda a, b: torch.linalg.solve(S.expand(len(a), 2, 3, 3), a + b),
        lambda a, b: (INVERSE.expand(len(a), 2, 3, 3) @ (a + b).unsqueeze(-1)).squeeze(-1),
    ),
    "solve from the right": (lambda a, b: torch.linalg.solve(S, a + b, left=False), lambda a, b: (a + b) @ INVERSE),
    "solve_triangular": (
        lambda a, b: torch.linalg.solve_triangular(S.triu(), (a + b).mT, upper=True),
        lambda a, b: torch.linalg.inv(S.triu()) @ (a + b).mT,
    ),
    "solve_triangular from the right": (
        lambda a, b: torch.linalg.solve_triangular(S.tril(), a + b, upper=False, left=False),
        lambda a, b: (a + b) @ torch.linalg.inv(S.tril()),
    ),
    "cholesky_solve": (
        lambda a, b: torch.cholesky_solve((a + b).mT, torch.linalg.cholesky(S @ S.T)),
        lambda a, b: torch.linalg.inv(S @ S.T) @ (a + b).mT,
    ),
    "lu_solve": (
        lambda a, b: torch.linalg.lu_solve(*torch.linalg.lu_factor(S), (a + b).mT),
        lambda a, b: INVERSE @ (a + b).mT,
    ),
    "lstsq": (
        lambda a, b: torch.linalg.lstsq(T.T.expand(len(a), 5, 3), F.pad((a + b).mT, (0, 0, 1, 1))).solution,
        lambda a, b: torch.linalg.pinv(T.T).expand(len(a), 3, 5) @ F.pad((a + b).mT, (0, 0, 1, 1)),
    ),
    "matrix_power": (
        lambda a, b: torch.linalg.matrix_power(a.mT @ b, 2),
        lambda a, b: (a.mT @ b) @ (a.mT @ b),
    ),
    "kron with a constant": (
        lambda a, b: torch.kron(a, V[:2][None]).flatten(1) + b.repeat(1, 1, 2).flatten(1),
        lambda a, b: (a.unsqueeze(-1) * V[:2]).flatten(1) + b.repeat(1, 1, 2).flatten(1),
    ),
    "einsum of two inputs and a constant": (
        lambda a, b: torch.einsum("nik,kl,njl->nij", a, S, b),
        lambda a, b: torch.einsum("nik,njl,kl->nij", a, b, S),
    ),
}


@pytest.mark.filterwarnings("ignore:Using torch.cross")
@pytest.mark.parametrize("composite", [None, linear_rules()])
@pytest.mark.parametrize("name", PAIRS)
def test_a_function_of_linear_algebra_is_its_products(name, composite):
    op, by_hand = PAIRS[name]
    torch.testing.assert_close(op(A[None], B[None]), by_hand(A[None], B[None]))
    expected = columns(by_hand, [A, B], composite)
    assert any(bool(matrix.any()) for matrix in expected)
    actual = columns(op, [A, B], composite)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


WHOLE: dict[str, tuple[Op, Op]] = {
    "multi_dot": (lambda x: torch.linalg.multi_dot([x[0], S, T])[None], lambda x: (x[0] @ S @ T)[None]),
    "multi_dot of vectors": (
        lambda x: torch.linalg.multi_dot([x[0, 0], S, x[0, 1]])[None],
        lambda x: (x[0, 0] @ S @ x[0, 1])[None],
    ),
    "chain_matmul": (lambda x: torch.chain_matmul(S, x[0].T)[None], lambda x: (S @ x[0].T)[None]),
    "kron": (
        lambda x: torch.kron(x[0], 2 * x[0, :, :2])[None],
        lambda x: (x[0][:, None, :, None] * (2 * x[0, None, :, None, :2])).reshape(1, 4, 6),
    ),
    "outer": (lambda x: torch.outer(x[0, 0], x[0, 1])[None], lambda x: (x[0, 0, :, None] * x[0, 1])[None]),
    "ger": (lambda x: torch.ger(x[0, 0], V)[None], lambda x: (x[0, 0, :, None] * V)[None]),
    "addr": (
        lambda x: torch.addr(x[0], x[0, :, 0], V, beta=0.5, alpha=2)[None],
        lambda x: (x[0, :, :1] * V * 2 + x[0] * 0.5)[None],
    ),
    "block_diag": (
        lambda x: torch.block_diag(x[0], x[0, 0, :2])[None],
        lambda x: torch.cat([F.pad(x[0], (0, 2)), F.pad(x[0, :1, :2], (3, 0))])[None],
    ),
    "cov": (
        lambda x: torch.cov(x[0])[None],
        lambda x: ((x[0] - x[0].mean(1, keepdim=True)) @ (x[0] - x[0].mean(1, keepdim=True)).T / 2)[None],
    ),
    "cov of one variable": (
        lambda x: torch.cov(x[0, 0], correction=0)[None],
        lambda x: ((x[0, :1] - x[0, :1].mean(1, keepdim=True)) @ (x[0, :1] - x[0, :1].mean(1, keepdim=True)).T / 3)[0],
    ),
}  # fmt: skip


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:torch.chain_matmul")
@pytest.mark.parametrize("name", WHOLE)
def test_a_function_of_whole_matrices_is_its_products(name):
    x = draw(2, 3)
    op, by_hand = WHOLE[name]
    torch.testing.assert_close(op(x[None]), by_hand(x[None]))
    torch.testing.assert_close(alone(op, x), alone(by_hand, x), rtol=0, atol=1e-9)


def test_a_correlation_is_a_covariance_divided_by_deviations():
    x = draw(2, 4)
    covariance, correlation = alone(lambda x: torch.cov(x[0])[None], x), alone(lambda x: torch.corrcoef(x[0])[None], x)
    torch.testing.assert_close(correlation, covariance)


@pytest.mark.parametrize("name", ["solve", "inv", "pinv", "solve_triangular", "lstsq"])
def test_the_inverse_of_a_computed_matrix_raises_where_relevance_arrives(name):
    ops: dict[str, Op] = {
        "solve": lambda x: torch.linalg.solve(x @ x.mT + eye(2), V[:2].expand(len(x), 2)),
        "inv": lambda x: torch.linalg.inv(x @ x.mT + eye(2)),
        "pinv": torch.linalg.pinv,
        "solve_triangular": lambda x: torch.linalg.solve_triangular(x[:, :, :2].triu(), x, upper=True),
        "lstsq": lambda x: torch.linalg.lstsq(x.mT, x.mT).solution,
    }
    x = draw(1, 2, 3)
    with pytest.raises(UnsupportedOperationError, match=r"'(solve|inv|pinv|solve_triangular|lstsq)'.*has no kernel"):
        RelevanceMeasure(Apply(ops[name]).eval(), x, start=torch.ones_like(ops[name](x))).marginal("input")


def test_several_constants_of_einsum_are_one_layer():
    """Only their product has signs that a rule may separate."""
    x = draw(3)
    by_hand = columns(lambda x: x @ (S @ T), [x], linear_rules())
    for op in (
        lambda x: torch.einsum("ni,ij,jk->nk", x, S, T),
        lambda x: torch.einsum("ij,jk,...i", S, T, x),
        lambda x: torch.einsum(S, [1, 2], x, [..., 1], T, [2, 3], [..., 3]),
    ):
        check(columns(op, [x], linear_rules()), by_hand)
        check(columns(op, [x]), columns(lambda x: x @ (S @ T), [x]))
