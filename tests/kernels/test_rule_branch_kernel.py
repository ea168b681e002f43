"""Branches that are read when relevance arrives where they act."""

from __future__ import annotations

import pytest
import torch
import zennit.rules
from torch import nn
from zennit.composites import NameMapComposite

from nrm_plugin import RelevanceMeasure
from nrm_plugin.kernels.base import Kernel
from nrm_plugin.kernels.normalization import ColumnSums, Deficit
from nrm_plugin.kernels.rule_branch_kernel import BranchKernel


def gamma_kernel() -> Kernel:
    """γ at outputs 3 and -3, before relevance arrived."""
    module = nn.Linear(2, 2, bias=False).double()
    module.weight.data.copy_(torch.tensor([[2.0, 0.5], [-2.0, -0.5]]))
    net = nn.Sequential(module)
    composite = NameMapComposite([(["0"], zennit.rules.Gamma(0.25))])
    mu = RelevanceMeasure(net, torch.tensor([[1.0, 2.0]], dtype=torch.float64), 0, composite=composite)
    return mu._recording.graph.vertices[0].step.kernel


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-30])
def test_branches_are_read_when_relevance_arrives_where_they_act(value: float) -> None:
    kernel = gamma_kernel()
    at_each = value * torch.eye(2, dtype=torch.float64)[:, None, None]  # as K = N = 1
    assert not kernel.complete_for(at_each[0])
    assert not kernel.complete_for(torch.zeros_like(at_each[0]))
    assert kernel.complete_for(at_each[1])
    assert not kernel.complete_for(at_each[1])
    assert not kernel.complete_for(None)
    assert gamma_kernel().complete_for(None)
    changed: list[bool] = []
    hidden = gamma_kernel()
    torch.vmap(lambda relevance: [changed.append(hidden.complete_for(relevance)), relevance][1])(at_each)
    assert changed == [True], "tensors inside of torch.vmap have no values, so all branches may be needed"


@pytest.mark.parametrize("kind", [ColumnSums, Deficit])
def test_columns_are_joined_when_further_branches_are_read(kind: type[ColumnSums] | type[Deficit]) -> None:
    first, second = (kind(torch.tensor([sums])) for sums in ([0.3, 0.0], [0.0, -0.5]))
    like = torch.zeros(1, 2)
    kernel = BranchKernel(([], first), torch.zeros(1, 3), read_others=lambda: ([], second))
    assert torch.equal(kernel.column_sum(like), first.sums(like))
    assert kernel.complete_for(None)
    assert torch.equal(kernel.column_sum(like), first.joined(second).sums(like))
