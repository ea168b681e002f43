"""Sinks of both signs."""

from __future__ import annotations

import torch
import zennit.rules
from torch import nn
from zennit.composites import LayerMapComposite

from nrm_plugin import ABSORBED, RelevanceMeasure, at


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
