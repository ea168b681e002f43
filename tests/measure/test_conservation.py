"""Sinks of both signs."""

from __future__ import annotations

import pytest
import torch
import zennit.rules
from torch import nn
from zennit.composites import LayerMapComposite

from nrm_plugin import ABSORBED, Normalized, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import NullEventError


def test_sinks_of_both_signs_are_summed_with_their_signs() -> None:
    """Inputs 1 and 1, weights 1: of outputs 3/2 and 5/2 the biases are -1/2 and 1/2."""
    net = nn.Linear(2, 2).double().eval()
    nn.init.ones_(net.weight)
    net.bias.data.copy_(torch.tensor([-0.5, 0.5]))
    rules = LayerMapComposite([(nn.Linear, zennit.rules.Epsilon(epsilon=0.0))])
    x = torch.ones((1, 2), dtype=torch.float64)
    mu = RelevanceMeasure(net, x, start=torch.ones_like(x), composite=rules, residual="sink")
    expected = torch.tensor([-1 / 3 / 2 + 1 / 5 / 2], dtype=torch.float64)
    for absorbed in (mu.sink("input"), mu.sink_above([at("input")]), sum(mu.sinks().values()), mu(ABSORBED)):
        torch.testing.assert_close(absorbed, expected)


def test_the_walk_variation_conditioned_on_survival_needs_surviving_relevance() -> None:
    """For an input of zero, all relevance of the output is absorbed by the bias."""
    net = nn.Linear(2, 1).double().eval()
    rules = LayerMapComposite([(nn.Linear, zennit.rules.Epsilon())])
    mu = RelevanceMeasure(net, torch.tensor([[1.0, 2.0], [0.0, 0.0]]).double(), 0, composite=rules)
    assert bool((mu.walk_variation() >= 1 - 1e-9).all())
    with pytest.raises(NullEventError, match=r"no relevance reaches an input \(sample 1\)"):
        mu.walk_variation(surviving=True)


def test_sinks_have_the_precision_of_the_outputs_although_a_layer_computes_in_a_lower_one() -> None:
    class LowPrecision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.below, self.above = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            weights: torch.Tensor = self.below(x)
            return self.above(weights.softmax(-1, dtype=torch.float32).to(x.dtype))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    rules = Normalized(NRMDefault(), attention="halves")
    mu = RelevanceMeasure(LowPrecision().double().eval(), torch.randn(2, 4).double(), 1, composite=rules)
    low = [mass for mass in mu.sinks().values() if mass.dtype == torch.float32]
    assert mu.sink("input").dtype == mu.marginal("input").dtype == torch.float64
    assert low
