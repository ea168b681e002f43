"""Bounds on kernels, pushed from inputs to outputs, against the same kernels pulled column by column.

Covers: nrm_plugin.model.linear_maps.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zennit.composites import NameMapComposite
from zennit.rules import AlphaBeta, Epsilon, Gamma, WSquare, ZBox

from nrm_plugin import Absolute, ConservingEpsilon, RelevanceMeasure

RULES = [Epsilon(), Gamma(), AlphaBeta(), ZBox(-3, 3), WSquare(), Absolute(), ConservingEpsilon(0.5)]
MODULES = [
    (nn.Conv2d(2, 3, 3, padding=1), (2, 4, 4)),
    (nn.Linear(5, 4), (5,)),
    (nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    (nn.ConvTranspose2d(2, 3, 3), (2, 4, 4)),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize(("module", "shape"), MODULES)
def test_pushed_bounds_are_no_smaller_than_absolute_columns(module, shape, rule):
    x = torch.randn(1, *shape, dtype=torch.float64)
    net = nn.Sequential(module.double(), nn.Flatten())
    composite = NameMapComposite([(["0"], rule)])
    mu = RelevanceMeasure(net, x, 0, composite=composite, residual="sink")
    step = next(vertex.step for vertex in mu._recording.graph.vertices if vertex.step is not None)
    values = torch.rand(2, *x.shape, dtype=torch.float64)
    pushed = step.push_bound((values,)).flatten(1)  # before a pull computes the branches, which are lazy
    units = torch.eye(net(x).shape[1], dtype=torch.float64).view(-1, *step.shape)
    columns = step.pull(units)[0][0].flatten(1).detach()
    exact = values.flatten(1) @ columns.abs().T
    assert bool((pushed >= exact * (1 - 1e-12)).all())
    repeats = getattr(module, "padding_mode", "zeros") == "reflect"
    if not repeats and not isinstance(rule, (ZBox, ConservingEpsilon)):  # their branches share entries
        torch.testing.assert_close(pushed, exact)
