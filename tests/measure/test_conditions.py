"""Conditions whose mass is zero or cancels raise."""

from __future__ import annotations

import pytest
import torch
import zennit.rules
from torch import nn
from zennit.composites import LayerMapComposite

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import CancellationError, NullEventError
from tests.nets import tiny_net, zennit_composite
from tests.oracles import Epsilon


def test_conditions_without_mass_and_cancelling_conditions_raise() -> None:
    case = tiny_net("chain_mlp", seed=0, batch=2)
    rules = {node.tap: Epsilon() for node in case.spec if node.kind == "linear"}
    mu = RelevanceMeasure(case.net, case.x, start=case.start, composite=zennit_composite(case.spec, rules))
    empty = at("relu1")[torch.zeros(4, dtype=torch.bool)]
    assert torch.equal(mu(empty), torch.zeros(2, dtype=torch.float64))
    with pytest.raises(NullEventError, match="samples 0, 1"):
        mu(at("input")[0], given=empty)
    with pytest.raises(CancellationError, match="min_ratio=0"):
        mu(at("input")[0], given=at("relu1"), min_ratio=2.0)


@pytest.mark.parametrize(
    ("dtype", "gap", "divides"),
    [
        (torch.float32, 1e-3, False),
        (torch.float32, 1e-2, True),
        (torch.float64, 1e-8, False),
        (torch.float64, 1e-5, True),
    ],
)
def test_the_default_min_ratio_depends_on_the_dtype(dtype: torch.dtype, gap: float, divides: bool) -> None:
    """Two inputs of mass 1 and gap - 1 times the same: their variation is 2 / gap of their mass."""
    net = nn.Linear(3, 1, bias=False).to(dtype).eval()
    nn.init.ones_(net.weight)
    x = torch.tensor([[1.0, gap - 1, 1.0]], dtype=dtype)
    mu = RelevanceMeasure(net, x, composite=LayerMapComposite([(nn.Linear, zennit.rules.Epsilon(epsilon=1e-14))]))
    both = at("input")[[0, 1]]
    if divides:
        assert float(mu(at("input")[0], given=both)) == pytest.approx(1 / gap, rel=1e-3)
    else:
        with pytest.raises(CancellationError):
            mu(at("input")[0], given=both)
