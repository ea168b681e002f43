"""The memory budget of a pass, and what happens when memory runs out."""

from __future__ import annotations

import pytest
import torch

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import InputError, MemoryBudgetWarning
from nrm_plugin.measure import event_masses
from tests.flows import X, net


@pytest.mark.medium
def test_queries_that_do_not_fit_into_memory_run_in_parts(monkeypatch):
    whole = RelevanceMeasure(net(), X, 1)
    mu = RelevanceMeasure(net(), X, 1, max_memory=1)
    events = [at("2").channel(k) for k in range(4)]
    torch.testing.assert_close(mu.marginal("input", given=events), whole.marginal("input", given=events))
    torch.testing.assert_close(mu(events, given=at("1")[0]), whole(events, given=at("1")[0]))
    torch.testing.assert_close(mu.joint("2", "input"), whole.joint("2", "input"))
    widths = []
    pull = event_masses.pull

    def small(graph, start, visitor, absolute=False):
        widths.append(len(visitor.diagram.roots))
        if len(visitor.diagram.roots) > 1:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return pull(graph, start, visitor, absolute)

    monkeypatch.setattr(event_masses, "pull", small)
    with pytest.warns(MemoryBudgetWarning, match="out of memory with . at once; retrying with"):
        torch.testing.assert_close(whole.marginal("input", given=events), mu.marginal("input", given=events))
    assert widths[:4] == [4, 2, 1, 1]


@pytest.mark.parametrize("budget", [0, -1, float("nan"), "1 GB", True, float("inf")])
def test_a_budget_that_is_not_a_positive_number_raises(budget):
    with pytest.raises(InputError, match=r"max_memory=.*positive number of bytes"):
        RelevanceMeasure(net(), X, 1, max_memory=budget)
