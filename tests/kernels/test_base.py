"""What a kernel derives from its ``pull``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nrm_plugin.kernels.base import Kernel


class Gated(Kernel):
    """Propagates a share of the relevance to the signal, or none, and constant zeros to a gate."""

    def __init__(self, share: float | Tensor | None) -> None:
        self.share = share

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        zeros = torch.zeros(relevance.shape, dtype=relevance.dtype)
        return zeros if self.share is None else self.share * relevance, zeros

    pull_absolute = pull


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (None, 0.0)])
def test_column_sums_of_a_kernel_with_constant_zeros_at_a_gate(share: float | None, expected: float) -> None:
    like = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(Gated(share).column_sum(like), torch.full_like(like, expected))


VALUES = torch.rand((2, 2, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("push", ["push", "push_bound"])
@pytest.mark.parametrize("share", [0.5, None])
def test_the_transpose_ignores_values_at_a_gate(push: str, share: float | None) -> None:
    up = getattr(Gated(None if share is None else torch.tensor(share, dtype=torch.float64)), push)
    expected = VALUES * (share or 0.0)
    assert torch.equal(up((VALUES, VALUES), VALUES.shape[1:]), expected)
    assert torch.equal(up((VALUES, None), VALUES.shape[1:]), expected)
    assert torch.equal(up((None, VALUES), VALUES.shape[1:]), torch.zeros_like(VALUES))
