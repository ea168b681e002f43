"""Attention sinks against pairs of tokens, one by one, and against the attention weights themselves."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, at, attention_sinks
from nrm_plugin.errors import EventError
from tests.feature_nets import Decoder


@pytest.mark.medium
def test_sinks_are_sums_over_pairs():
    net = Decoder().double().eval()
    ids = torch.randint(0, 11, (2, 5), generator=torch.Generator().manual_seed(0))
    mu = RelevanceMeasure(net, ids, 3, output=lambda y: y[:, -1])
    for layer in ("blocks.0.attn", "blocks.1.attn"):
        shares = attention_sinks(mu, layer)
        whole = mu(at(layer).token(slice(None)))
        for key in range(5):
            total = sum(mu(at(layer).pair(query, key)) for query in range(5) if query != key)
            torch.testing.assert_close(shares[:, key], total / whole, rtol=0, atol=1e-10)
        own = sum(mu(at(layer).pair(key, key)) for key in range(5)) / whole
        torch.testing.assert_close(shares.sum(1) + own, torch.ones(2).double(), rtol=0, atol=1e-10)


def test_a_layer_without_attention_raises():
    mu = RelevanceMeasure(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 4, 3), (2, 1))
    with pytest.raises(EventError, match="computes no attention"):
        attention_sinks(mu, "0")
