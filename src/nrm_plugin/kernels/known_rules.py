"""Classification of rules: whether a rule is defined by Zennit's modifiers, and whether it is known to be linear."""

from __future__ import annotations

from typing import TypeGuard

from zennit.core import BasicHook, Hook
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus

LINEAR_RULES = (AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus)
"""Zennit rules linear in the relevance."""


def is_by_modifiers(hook: Hook) -> TypeGuard[BasicHook]:
    """Returns whether a rule is defined entirely by the modifiers of Zennit's ``BasicHook``."""
    return isinstance(hook, BasicHook) and not overrides(hook, "backward", BasicHook)


def is_known_linear(hook: Hook) -> bool:
    """Returns whether a rule is among the linear rules of Zennit or this package."""
    return type(hook) in LINEAR_RULES or type(hook).__module__ == "nrm_plugin.rules"


def own_copy(hook: Hook) -> Hook:
    """Returns the rule to use for one call: a known rule itself, or a copy of any other (possibly stateful) rule."""
    return hook if is_known_linear(hook) else hook.copy()


def overrides(hook: Hook, method: str, base: type = Hook) -> bool:
    """Returns whether a rule overrides a method of a base class."""
    return getattr(type(hook), method) is not getattr(base, method)
