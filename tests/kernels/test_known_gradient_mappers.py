"""Mappers in closed form compared with the mappers of the rules themselves.

Covers: nrm_plugin.kernels.mapper_factors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from zennit.core import BasicHook, Stabilizer
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus

from nrm_plugin import Absolute, ConservingEpsilon
from nrm_plugin.kernels.cache_blocks import Block
from nrm_plugin.kernels.known_gradient_mappers import closed_mapper
from nrm_plugin.kernels.mapper_factors import applied_mapper
from nrm_plugin.rules import Relative

RULES = [
    Epsilon(),
    Norm(),
    WSquare(),
    Flat(),
    ZPlus(),
    ZBox(-1, 1),
    AlphaBeta(),
    Gamma(),
    ConservingEpsilon(),
    Absolute(),
]


def outputs_of(rule: BasicHook) -> list[Tensor]:
    """Outputs of all branches, ``(2, 3, 4)`` each, some of them zero."""
    draw = torch.Generator().manual_seed(0)
    outputs = torch.randn((len(rule.input_modifiers), 2, 3, 4), generator=draw, dtype=torch.float64)
    outputs[:, 0, 0, :2] = 0
    return list(outputs)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
def test_a_known_rule_has_a_closed_form_with_the_same_factors(rule: BasicHook) -> None:
    outputs = outputs_of(rule)

    def at(block: Block) -> list[Tensor]:
        return [output[block] for output in outputs]

    closed, applied = closed_mapper(rule), applied_mapper(rule, at, outputs[0])
    assert closed is not None
    assert applied is not None
    assert applied.is_local
    for number, leader in enumerate(closed.leaders):
        expected = applied.factors(outputs, (number,))[number]
        factor = closed.factors([output.clone() for output in outputs], (leader,))[leader]
        torch.testing.assert_close(factor, expected, rtol=1e-12, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "rule",
    [Epsilon(Stabilizer(0.1, clip=True)), ZPlus(lambda z: z + 1), Relative()],
    ids=lambda rule: type(rule).__name__,
)
def test_other_rules_and_stabilizers_have_none(rule: BasicHook) -> None:
    assert closed_mapper(rule) is None


def test_a_stabilizer_scaled_by_the_layer_is_not_local() -> None:
    rule = Epsilon(Stabilizer(0.1, norm_scale=True))
    outputs = outputs_of(rule)
    outputs[0] = torch.cat([outputs[0], 9 * outputs[0]], 1).repeat(1, 1, 3)
    mapper = applied_mapper(rule, lambda block: [output[block] for output in outputs], outputs[0])
    assert mapper is not None
    assert not mapper.is_local
    assert closed_mapper(rule) is None


def test_a_mapper_that_does_not_multiply_entry_by_entry_has_no_factors() -> None:
    rule = BasicHook(gradient_mapper=lambda relevance, outputs: relevance.flip(-1) * outputs[0])
    outputs = [torch.arange(1.0, 25).reshape(2, 3, 4)]
    assert applied_mapper(rule, lambda block: [output[block] for output in outputs], outputs[0]) is None
