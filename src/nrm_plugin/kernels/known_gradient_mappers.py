r"""Closed forms of known gradient mappers: the factors :math:`m_k(1)` as functions of the branch outputs.

The factors of any rule can be computed by applying its mapper to ones. However, the mappers of Zennit's rules compute
each denominator once per branch and determine signs by comparisons, which takes longer than the layer itself. The
closed forms avoid both.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from zennit.core import BasicHook, Stabilizer
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus

from ..rules import Absolute, ConservingEpsilon
from .mapper_factors import Factors, Mapper, mapped

_LEADERS: dict[type, tuple[int, ...]] = {
    Epsilon: (0,),
    Norm: (0,),
    WSquare: (0,),
    Flat: (0,),
    ZPlus: (0, 0),
    ZBox: (0, 0, 0),
    AlphaBeta: (0, 0, 2, 2),
    Gamma: (0, 0, 2, 2),
    ConservingEpsilon: (0, 1),
    Absolute: (0,),
}

_KNOWN: MutableMapping[Callable[..., Any], Mapper | None] = WeakKeyDictionary()
"""Closed forms, keyed by gradient mapper (shared by all copies of a rule), or None if there is no closed form."""


def closed_mapper(rule: BasicHook) -> Mapper | None:
    """Returns the gradient mapper of a known rule in closed form, or None for other rules.

    Each closed form is verified once against the mapper of the rule.
    """
    if type(rule) not in _LEADERS:
        return None
    own = rule.gradient_mapper
    if own not in _KNOWN:
        factors = _factors(rule)
        mapper = None if factors is None else Mapper(_LEADERS[type(rule)], factors)
        _KNOWN[own] = mapper if mapper is not None and _agrees(mapper, rule) else None
    return _KNOWN[own]


def _agrees(mapper: Mapper, rule: BasicHook) -> bool:
    """Returns True if the closed form gives the same factors as the rule's mapper, including for zero outputs."""
    count = len(rule.input_modifiers)
    numbers = torch.sin(torch.arange(1.0, 1 + 24 * count, dtype=torch.float64) ** 2).reshape(count, 2, 3, 4)
    numbers[:, 0, 0] = 0
    numbers[0, 0, 0, 0] = -0.0
    outputs = list(numbers)
    expected = mapped(rule, torch.ones_like(outputs[0]), outputs)
    factors = mapper.factors([output.clone() for output in outputs], tuple(dict.fromkeys(mapper.leaders)))
    pairs = ((factors[leader], expected[number]) for number, leader in enumerate(mapper.leaders))
    return all(torch.allclose(one, other, rtol=1e-12, atol=0, equal_nan=True) for one, other in pairs)


def stabilizer_of(rule: BasicHook) -> float | None:
    """Returns the stabilizer ε in the denominators of a known rule, or None if it is not a constant."""
    stabilizer = _nonlocals(rule).get("stabilizer_fn", _nonlocals(rule).get("stabilize"))
    if not isinstance(stabilizer, Stabilizer) or stabilizer.clip or stabilizer.norm_scale or stabilizer.epsilon < 0:
        return None
    return float(stabilizer.epsilon)


def conserved_share(rule: ConservingEpsilon) -> float:
    """Returns the parameter ε of a :class:`~nrm_plugin.rules.ConservingEpsilon` rule."""
    return float(_nonlocals(rule)["epsilon"])


def _nonlocals(rule: BasicHook) -> dict[str, Any]:
    return dict(inspect.getclosurevars(rule.gradient_mapper).nonlocals)


def _factors(rule: BasicHook) -> Factors | None:
    epsilon = stabilizer_of(rule)
    if epsilon is None:
        return None
    inverse = inverse_by(epsilon)
    if isinstance(rule, ConservingEpsilon):
        return _conserving(conserved_share(rule), inverse)
    kind = type(rule)

    def factors(outputs: list[Tensor], wanted: tuple[int, ...]) -> dict[int, Tensor]:
        return {leader: one(outputs, leader) for leader in wanted}

    def one(outputs: list[Tensor], leader: int) -> Tensor:
        if kind is ZBox:
            return inverse(outputs[0] - outputs[1] - outputs[2])
        if len(_LEADERS[kind]) == 1:
            return inverse(outputs[0])
        factor = inverse(outputs[leader] + outputs[leader + 1])
        if kind is Gamma:  # selected by the sign of the unmodified output
            sign = outputs[4].sign()
            factor.mul_(sign.clamp_(min=0) if leader == 0 else sign.clamp_(max=0).neg_())
        return factor

    return factors


def _conserving(epsilon: float, inverse: Callable[[Tensor], Tensor]) -> Factors:
    def factors(outputs: list[Tensor], wanted: tuple[int, ...]) -> dict[int, Tensor]:
        z, m = outputs
        size = z.abs()
        total = torch.maximum(size, m * epsilon)
        taken = total - size
        scaled = inverse(total)
        both = {0: z.sign().mul_(scaled), 1: taken.mul_(scaled).mul_(inverse(m))}
        return {leader: both[leader] for leader in wanted}

    return factors


def inverse_by(epsilon: float) -> Callable[[Tensor], Tensor]:
    """Returns the stabilized reciprocal ``z → 1 / (z + sign(z) epsilon)`` as a function."""

    def inverse(z: Tensor) -> Tensor:
        raised = z + 0.0  # negative zero is treated as positive, as in Zennit
        return raised.add_(torch.copysign(z.new_tensor(epsilon), raised)).reciprocal_()

    return inverse
