"""Distances, similarities and norms have the kernels of the differences, products and sums that a user would write."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import Apply, Op, alone, check, columns, draw

A, B, K = draw(2, 3), draw(2, 3, seed=1), draw(3, seed=5)


def length(x: Tensor, p: float = 2.0, dim: int = -1) -> Tensor:
    """A norm with a root that passes relevance unchanged, and a sum by sizes of its own."""
    return torch.linalg.vector_norm(x, p, dim)


PAIRS: dict[str, tuple[Op, Op]] = {
    "cosine_similarity": (
        lambda a, b: F.cosine_similarity(a, b, dim=2),
        lambda a, b: (a * b).sum(2) / (length(a).clamp_min(1e-8) * length(b).clamp_min(1e-8)),
    ),
    "CosineSimilarity of the first dimension": (
        nn.CosineSimilarity(),
        lambda a, b: (a * b).sum(1) / (length(a, dim=1) * length(b, dim=1)),
    ),
    "cosine of each pair": (
        lambda a, b: F.cosine_similarity(a.unsqueeze(2), b.unsqueeze(1), dim=-1),
        lambda a, b: (a.unsqueeze(2) * b.unsqueeze(1)).sum(3) / (length(a).unsqueeze(2) * length(b).unsqueeze(1)),
    ),
    "cosine with a constant": (
        lambda a, b: torch.cosine_similarity(a + b, K, dim=-1),
        lambda a, b: ((a + b) * K).sum(2) / (length(a + b) * K.norm()),
    ),
    "pairwise_distance": (
        lambda a, b: F.pairwise_distance(a, b, p=3, keepdim=True),
        lambda a, b: length(a - b + 1e-6, 3).unsqueeze(-1),
    ),
    "PairwiseDistance": (nn.PairwiseDistance(1, eps=0), lambda a, b: length(a - b, 1)),
    "cdist": (
        lambda a, b: torch.cdist(a, b, compute_mode="use_mm_for_euclid_dist"),
        lambda a, b: length(a.unsqueeze(2) - b.unsqueeze(1)),
    ),
    "cdist of order 1": (lambda a, b: torch.cdist(a, b, 1.0), lambda a, b: length(a[:, :, None] - b[:, None], 1)),
    "linalg.norm": (lambda a, b: torch.linalg.norm(a - b, dim=2), lambda a, b: length(a - b)),
    "linalg.norm of order 1": (
        lambda a, b: torch.linalg.norm(a - b, 1, dim=(1,), keepdim=True),
        lambda a, b: length(a - b, 1, 1).unsqueeze(1),
    ),
    "Frobenius": (
        lambda a, b: torch.linalg.norm(a * b, "fro", dim=(1, 2)),
        lambda a, b: length((a * b).flatten(1)),
    ),
    "matrix_norm": (lambda a, b: torch.linalg.matrix_norm(a + b), lambda a, b: length((a + b).flatten(1))),
    "largest sum of a column": (
        lambda a, b: torch.linalg.matrix_norm(a + b, 1, keepdim=True),
        lambda a, b: (a + b).abs().sum(1, keepdim=True).amax(2, keepdim=True),
    ),
    "least sum of a row": (
        lambda a, b: torch.linalg.norm(a + b, -math.inf, dim=(2, 1)),
        lambda a, b: (a + b).abs().sum(1).amin(1),
    ),
    "largest entry": (lambda a, b: torch.norm(a + b, p=math.inf, dim=2), lambda a, b: (a + b).abs().amax(2)),
    "least entry": (
        lambda a, b: torch.linalg.vector_norm(a + b, -math.inf, dim=(1, 2)),
        lambda a, b: (a + b).abs().amin((1, 2)),
    ),
    "Tensor.norm": (lambda a, b: (a - b).norm(2, 2, True), lambda a, b: length(a - b).unsqueeze(2)),
    "mse_loss": (lambda a, b: F.mse_loss(a, b, reduction="none"), lambda a, b: (a - b) ** 2),
    "l1_loss": (lambda a, b: F.l1_loss(a, b, reduction="none"), lambda a, b: (a - b).abs()),
    "renorm": (lambda a, b: torch.renorm(a + b, 2, 0, 1e-3), lambda a, b: (a + b) * 1e-3 / length(a + b)[..., None]),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_distance_is_what_it_consists_of(name):
    op, by_hand = PAIRS[name]
    if name != "renorm":
        torch.testing.assert_close(op(A[None], B[None]), by_hand(A[None], B[None]), atol=1e-6, rtol=1e-6)
    expected = columns(by_hand, [A, B])
    assert any(bool(matrix.any()) for matrix in expected)
    check(columns(op, [A, B]), expected)


def test_a_norm_propagates_by_powers_and_the_largest_magnitude_takes_all():
    """Written out, since the distances above are compared with norms."""
    share = A.abs() ** 3 / (A.abs() ** 3).sum(1, keepdim=True)
    check(columns(lambda a: length(a, 3), [A]), [torch.block_diag(*share[:, None])])
    row = torch.tensor([[1.0, -3.0, 3.0]]).double()
    check(columns(lambda a: a.norm(math.inf, 2), [row]), [torch.tensor([[0.0, 0.5, 0.5]]).double()])
    check(columns(lambda a: torch.linalg.norm(a, -math.inf, 2), [row]), [torch.tensor([[1.0, 0.0, 0.0]]).double()])


WHOLE: dict[str, tuple[Op, Op]] = {
    "dist": (lambda x: torch.dist(x[0, 0], x[0, 1], 3)[None], lambda x: length(x[:, 0] - x[:, 1], 3)),
    "pdist": (
        lambda x: F.pdist(x[0])[None],
        lambda x: torch.stack([length(x[0, i] - x[0, k]) for i, k in ((0, 1), (0, 2), (1, 2))])[None],
    ),
    "linalg.norm of a matrix": (lambda x: torch.linalg.norm(x[0])[None], lambda x: length(x.flatten(1))),
    "linalg.norm of a matrix with an order": (
        lambda x: torch.linalg.norm(x[0], math.inf)[None],
        lambda x: x.abs().sum(2).amax(1),
    ),
    "mean of losses": (
        lambda x: F.mse_loss(x[0, 0], x[0, 1])[None],
        lambda x: ((x[:, 0] - x[:, 1]) ** 2).mean(1),
    ),
    "sum of losses": (
        lambda x: nn.L1Loss(reduction="sum")(x[0, 0], x[0, 1])[None],
        lambda x: (x[:, 0] - x[:, 1]).abs().sum(1),
    ),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_distance_of_whole_tensors_is_what_it_consists_of(name):
    x = draw(3, 4)
    op, by_hand = WHOLE[name]
    torch.testing.assert_close(alone(op, x), alone(by_hand, x), rtol=0, atol=1e-6)  # the rule of sums has a floor


def test_norms_by_singular_values_raise_where_relevance_arrives():
    for op in (lambda a: torch.linalg.matrix_norm(a, "nuc"), lambda a: torch.linalg.norm(a, 2, (1, 2))):
        with pytest.raises(UnsupportedOperationError, match="norm"):
            RelevanceMeasure(Apply(op).eval(), draw(1, 2, 3), start=torch.ones(1).double()).marginal("input")


class Siamese(nn.Module):
    """Two inputs, one branch, a similarity."""

    def __init__(self, similarity: Op) -> None:
        super().__init__()
        self.branch, self.similarity = nn.Linear(4, 6), similarity

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        result: Tensor = self.similarity(self.branch(x).relu(), self.branch(y).relu())
        return result[:, None]


@pytest.mark.parametrize("similarity", [F.cosine_similarity, F.pairwise_distance, nn.CosineSimilarity()])
def test_samples_of_a_siamese_net_are_those_of_one_sample_at_a_time(similarity):
    torch.manual_seed(3)
    net, x = Siamese(similarity).double().eval(), (draw(3, 4), draw(3, 4, seed=1))
    mu = RelevanceMeasure(net, x, 0)
    for call in (0, 1):
        alone = [
            RelevanceMeasure(net, (x[0][k : k + 1], x[1][k : k + 1]), 0)(at("branch", call=call)) for k in range(3)
        ]
        torch.testing.assert_close(mu(at("branch", call=call)), torch.cat(alone))
    for layer in mu.layers:
        error = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1
        assert float((error.abs() / mu.variation(layer)).max()) <= 1e-9
