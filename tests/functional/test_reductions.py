"""Kernels of log-sum-exp and of norms against matrices that are written out here."""

from __future__ import annotations

import math

import pytest
import torch

from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import check, columns, draw, eye, rows_of


def test_logsumexp_and_logaddexp_split_by_softmax():
    x = draw(2, 4)
    share = torch.stack([row.exp() / row.exp().sum() for row in x])
    check(columns(lambda x: x.logsumexp(-1), [x]), [rows_of(share)])
    check(
        columns(lambda x: torch.special.logsumexp(x, dim=(1, 2), keepdim=True), [x]),
        [(x.exp() / x.exp().sum()).reshape(1, -1)],
    )
    a, b = draw(3), draw(3, seed=5)
    for op, base in ((torch.logaddexp, math.e), (torch.logaddexp2, 2.0)):
        share = base**a / (base**a + base**b)
        check(columns(op, [a, b]), [torch.diag(share), torch.diag(1 - share)])
    check(columns(lambda a: torch.logaddexp(a, torch.ones_like(a)), [a]), [eye(3)])


def test_a_norm_splits_by_powers():
    x = draw(2, 4)
    for op, p in (
        (lambda x: x.norm(dim=-1), 2),
        (lambda x: torch.linalg.vector_norm(x, 3, -1), 3),
        (lambda x: torch.norm(x, 1, -1), 1),
    ):
        share = x.abs() ** p / (x.abs() ** p).sum(1, keepdim=True)
        check(columns(op, [x]), [rows_of(share)])
    check(
        columns(lambda x: torch.linalg.vector_norm(x, dim=-1), [torch.zeros(2, 4).double()]),
        [rows_of(torch.ones(2, 4) / 4)],
    )
    with pytest.raises(UnsupportedOperationError, match="norm of order 0"):
        columns(lambda x: torch.linalg.vector_norm(x, 0, -1), [x])
