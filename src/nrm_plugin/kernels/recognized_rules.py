"""Recognition of common rules: a rule is compared once with its definition, instead of being probed at each call."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from zennit.core import BasicHook, ParamMod
from zennit.rules import Epsilon, ZPlus

from ..model.trace_guards import audit, untraced
from ..rules import Absolute, ConservingEpsilon, EvenMod
from .known_gradient_mappers import closed_mapper, conserved_share, stabilizer_of

COMMON = (Absolute, ConservingEpsilon, Epsilon, ZPlus)
"""Rules with cheap branches: their denominators are positive, or they do not modify the layer."""


NEGLIGIBLE = 1e-20
"""Largest stabilizer of ConservingEpsilon that is treated as negligible."""


@dataclass(frozen=True)
class RuleForm:
    """Parameters of a common rule whose mapper and modifiers are unchanged from its class.

    Attributes:
        epsilon: The positive constant that stabilizes the denominators.
        share: The parameter ε of :class:`~nrm_plugin.rules.ConservingEpsilon`, or 0 for other rules.
    """

    epsilon: float
    share: float = 0.0


_KNOWN: MutableMapping[Callable[..., Any], tuple[tuple[Any, ...], RuleForm | None]] = WeakKeyDictionary()
"""Modifiers and parameters of rules, keyed by the gradient mapper that all copies of a rule share.

Users can replace the modifiers, so they are compared at each use.
"""


def form_of(rule: BasicHook) -> RuleForm | None:
    """Returns the parameters of a common rule, or None for any other rule, including one modified by the user."""
    if type(rule) not in COMMON:
        return None
    own, modifiers = rule.gradient_mapper, _modifiers(rule)
    known = _KNOWN.get(own)
    if known is None or not _same_objects(known[0], modifiers):
        with untraced(), audit():
            known = _KNOWN[own] = modifiers, _read(rule)
    return known[1]


def _modifiers(rule: BasicHook) -> tuple[Any, ...]:
    return (*rule.input_modifiers, *rule.param_modifiers, *rule.output_modifiers, rule.reducer)


def _same_objects(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(some) == len(others) and all(one is other for one, other in zip(some, others, strict=True))


def _read(rule: BasicHook) -> RuleForm | None:
    """Returns the parameters of a rule if its mapper and modifiers agree with its class on test values."""
    epsilon = stabilizer_of(rule)
    if not epsilon or closed_mapper(rule) is None:
        return None
    # A larger epsilon also stabilizes the shares of the second branch.
    if isinstance(rule, ConservingEpsilon) and epsilon > NEGLIGIBLE:
        return None
    own = type(rule)()
    probe = torch.tensor([[-2.0, -1.0, 0.0, 1.0, 3.0]], dtype=torch.float64)
    sources = [modify(probe) for modify in own.input_modifiers]
    pairs = [(rule.reducer(sources, sources[::-1]), own.reducer(sources, sources[::-1]))]
    if type(rule) in (Epsilon, ZPlus):  # other rules have a floor, and depend only on the sign of their input
        pairs += [
            (one(probe), other(probe)) for one, other in zip(rule.input_modifiers, own.input_modifiers, strict=True)
        ]
    pairs += [(modify(probe), probe) for modify in rule.output_modifiers]
    for modify, expected in zip(rule.param_modifiers, own.param_modifiers, strict=True):
        if not _keeps_weight(modify) or type(modify) is not type(expected):
            return None
        if not isinstance(modify, EvenMod):
            pairs.append((modify.modifier(probe, "weight"), expected.modifier(probe, "weight")))
    if not all(torch.equal(one, other) for one, other in pairs):
        return None
    return RuleForm(epsilon, conserved_share(rule) if isinstance(rule, ConservingEpsilon) else 0.0)


def _keeps_weight(modify: Any) -> bool:
    is_plain = isinstance(modify, ParamMod) and modify.param_keys is None
    return is_plain and "weight" not in zeros_of(modify)


def zeros_of(modify: ParamMod) -> tuple[str, ...]:
    """Returns the names of the parameters that a modifier sets to zero."""
    zeros = modify.zero_params or ()
    return (zeros,) if isinstance(zeros, str) else tuple(zeros)


def modified_bias(modify: ParamMod, bias: Tensor | None) -> Tensor | None:
    """Returns the modified bias, or None if it is zero."""
    if bias is None or "bias" in zeros_of(modify):
        return None
    result: Tensor = modify.modifier(bias.detach(), "bias")
    return result
