"""Detection of rules that are not linear in the relevance."""

from __future__ import annotations

import pytest
import torch

from nrm_plugin.kernels.rule_reader import is_linear_in_relevance
from nrm_plugin.kernels.vjp_kernel import VjpKernel


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_whether_a_rule_is_linear_does_not_depend_on_its_size(size: float) -> None:
    like = torch.ones((2, 5), dtype=torch.float64)
    assert is_linear_in_relevance(VjpKernel(lambda relevance: (size * relevance, 0 * relevance)), like)
    assert not is_linear_in_relevance(VjpKernel(lambda relevance: (size * relevance, size * relevance.relu())), like)
