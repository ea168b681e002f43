r"""Factors of known rules: :math:`m_k(1)` from the outputs of the branches, in few operations.

A rule is read by handing ones to its mapper, which works for any rule. The mappers of Zennit's own compute each
denominator once for every branch and compare floats to find signs, which takes longer than the layer's arithmetic.
Here is the same in closed form; the stabilizer is the one of the rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from zennit.core import BasicHook, Stabilizer
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus

from ..rules import ConservingEpsilon

Factors = Callable[[list[Tensor], tuple[int, ...]], dict[int, Tensor]]


@dataclass(frozen=True)
class Mapper:
    """The mapper of a rule in closed form; each entry depends on no other.

    Attributes:
        leaders: For each branch the first one with the same factor.
        factors: Outputs of all branches, and the leaders whose factors are wanted, to these factors.
    """

    leaders: tuple[int, ...]
    factors: Factors


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
}

_KNOWN: MutableMapping[Callable[..., Any], Mapper | None] = WeakKeyDictionary()
"""By the mapper that a rule hands to all its copies."""


def mapper_of(hook: BasicHook) -> Mapper | None:
    """The closed form of a known rule, after it was seen to give what the rule gives; None for any other rule."""
    if type(hook) not in _LEADERS:
        return None
    own = hook.gradient_mapper
    if own not in _KNOWN:
        factors = _factors(hook)
        mapper = None if factors is None else Mapper(_LEADERS[type(hook)], factors)
        _KNOWN[own] = mapper if mapper is not None and _agrees(mapper, hook) else None
    return _KNOWN[own]


def _agrees(mapper: Mapper, hook: BasicHook) -> bool:
    """Whether both map some numbers alike, zeros and negative ones among them."""
    count = len(hook.input_modifiers)
    numbers = torch.sin(torch.arange(1.0, 1 + 24 * count, dtype=torch.float64) ** 2).reshape(count, 2, 3, 4)
    numbers[:, 0, 0] = 0
    numbers[0, 0, 0, 0] = -0.0
    outputs = list(numbers)
    mapped = hook.gradient_mapper(torch.ones_like(outputs[0]), outputs)
    expected = [mapped] if isinstance(mapped, Tensor) else list(mapped)
    found = mapper.factors([output.clone() for output in outputs], tuple(dict.fromkeys(mapper.leaders)))
    pairs = ((found[leader], expected[number]) for number, leader in enumerate(mapper.leaders))
    return all(torch.allclose(one, other, rtol=1e-12, atol=0, equal_nan=True) for one, other in pairs)


def _factors(hook: BasicHook) -> Factors | None:
    known = inspect.getclosurevars(hook.gradient_mapper).nonlocals
    inverse = _inverse(known.get("stabilizer_fn", known.get("stabilize")))
    if inverse is None:
        return None
    if isinstance(hook, ConservingEpsilon):
        return _conserving(float(known["epsilon"]), inverse)
    kind = type(hook)

    def factors(outputs: list[Tensor], wanted: tuple[int, ...]) -> dict[int, Tensor]:
        return {leader: one(outputs, leader) for leader in wanted}

    def one(outputs: list[Tensor], leader: int) -> Tensor:
        if kind is ZBox:
            return inverse(outputs[0] - outputs[1] - outputs[2])
        if len(_LEADERS[kind]) == 1:
            return inverse(outputs[0])
        factor = inverse(outputs[leader] + outputs[leader + 1])
        if kind is Gamma:  # by the sign of the unmodified output
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
        found = {0: z.sign().mul_(scaled), 1: taken.mul_(scaled).mul_(inverse(m))}
        return {number: found[number] for number in wanted}

    return factors


def _inverse(stabilizer: object) -> Callable[[Tensor], Tensor] | None:
    """``1 / stabilizer(z)``; None for a stabilizer that is not plainly added."""
    if not isinstance(stabilizer, Stabilizer) or stabilizer.clip or stabilizer.norm_scale or stabilizer.epsilon < 0:
        return None
    epsilon = float(stabilizer.epsilon)

    def inverse(z: Tensor) -> Tensor:
        raised = z + 0.0  # a zero of negative sign counts as positive, as in Zennit
        return raised.add_(torch.copysign(z.new_tensor(epsilon), raised)).reciprocal_()

    return inverse
