r"""Factors of Zennit's own rules: :math:`m_k(1)` from the outputs of the branches, in few operations.

A rule is read by handing ones to its mapper, which works for any rule. The mappers of Zennit's own compute each
denominator once for every branch and compare floats to find signs, which takes longer than the layer's arithmetic.
Here is the same in closed form; the stabilizer is the one of the rule.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor
from zennit.core import BasicHook, Stabilizer
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, WSquare, ZBox, ZPlus

from .rules import ConservingEpsilon

Mapper = Callable[[list[Tensor], tuple[int, ...]], dict[int, Tensor]]
"""Outputs of all branches, and the numbers of those whose factors are wanted; one that is shared is one tensor."""

_ONE = (Epsilon, Norm, WSquare, Flat)


def mapper_of(hook: BasicHook) -> Mapper | None:
    """Factors of a rule of Zennit; None for any other rule."""
    if type(hook) not in (*_ONE, ZPlus, AlphaBeta, Gamma, ZBox, ConservingEpsilon):
        return None
    known = inspect.getclosurevars(hook.gradient_mapper).nonlocals
    inverse = _inverse(known.get("stabilizer_fn", known.get("stabilize")))
    if inverse is None:
        return None
    if isinstance(hook, ConservingEpsilon):
        return _conserving(float(known["epsilon"]), inverse)

    def mapper(outputs: list[Tensor], wanted: tuple[int, ...]) -> dict[int, Tensor]:
        if isinstance(hook, ZBox):
            return dict.fromkeys(wanted, inverse(outputs[0] - outputs[1] - outputs[2]))
        found: dict[int, Tensor] = {}
        for pair in ((0,),) if isinstance(hook, _ONE) else ((0, 1), (2, 3)):
            chosen = [number for number in pair if number in wanted]
            if not chosen:
                continue
            factor = inverse(outputs[pair[0]] if len(pair) == 1 else outputs[pair[0]] + outputs[pair[1]])
            if isinstance(hook, Gamma):
                sign = outputs[4].sign()
                factor = factor.mul_(sign.clamp_(min=0) if pair[0] == 0 else sign.clamp_(max=0).neg_())
            found |= dict.fromkeys(chosen, factor)
        return found

    return mapper


def _conserving(epsilon: float, inverse: Callable[[Tensor], Tensor]) -> Mapper:
    def mapper(outputs: list[Tensor], wanted: tuple[int, ...]) -> dict[int, Tensor]:
        z, m = outputs
        size = z.abs()
        total = torch.maximum(size, m * epsilon)
        taken = total - size
        scaled = inverse(total)
        found = {0: z.sign().mul_(scaled), 1: taken.mul_(scaled).mul_(inverse(m))}
        return {number: found[number] for number in wanted}

    return mapper


def _inverse(stabilizer: object) -> Callable[[Tensor], Tensor] | None:
    """``1 / stabilizer(z)``; None without a stabilizer."""
    if not callable(stabilizer):
        return None
    if not isinstance(stabilizer, Stabilizer) or stabilizer.clip or stabilizer.norm_scale or stabilizer.epsilon < 0:
        return lambda z: stabilizer(z).reciprocal()
    epsilon = float(stabilizer.epsilon)

    def inverse(z: Tensor) -> Tensor:
        raised = z + 0.0  # a zero of negative sign counts as positive, as in Zennit
        return raised.add_(torch.copysign(z.new_tensor(epsilon), raised)).reciprocal_()

    return inverse
