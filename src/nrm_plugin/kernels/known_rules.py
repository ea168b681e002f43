"""Rules of Zennit with a known form: written with modifiers alone, or known to be linear in the relevance."""

from __future__ import annotations

from typing import TypeGuard

from zennit.core import BasicHook, Hook
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus

LINEAR_RULES = (AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus)
"""The rules of Zennit that are linear in the relevance."""


def is_by_modifiers(hook: Hook) -> TypeGuard[BasicHook]:
    """Whether a rule is written with the modifiers of Zennit's ``BasicHook`` alone."""
    return isinstance(hook, BasicHook) and not overrides(hook, "backward", BasicHook)


def is_known_linear(hook: Hook) -> bool:
    """Whether this rule of Zennit, or of this package, is known to be linear in the relevance."""
    return type(hook) in LINEAR_RULES or type(hook).__module__ == "nrm_plugin.rules"


def own_copy(hook: Hook) -> Hook:
    """Returns a rule for one call: a copy, since a rule may keep state, but known rules are written without any."""
    return hook if is_known_linear(hook) else hook.copy()


def overrides(hook: Hook, method: str, base: type = Hook) -> bool:
    """Whether a rule overrides a method."""
    return getattr(type(hook), method) is not getattr(base, method)
