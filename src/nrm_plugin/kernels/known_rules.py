"""Classification of rules: rules defined by Zennit's modifiers and rules known to be linear."""

from __future__ import annotations

from typing import TypeGuard

from zennit.core import BasicHook, Hook
from zennit.rules import AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus

LINEAR_RULES = (AlphaBeta, Epsilon, Flat, Gamma, Norm, Pass, WSquare, ZBox, ZPlus)
"""Rules of Zennit that are linear in the relevance."""


def is_by_modifiers(hook: Hook) -> TypeGuard[BasicHook]:
    """Returns True if a rule is defined entirely by the modifiers of Zennit's ``BasicHook``."""
    return isinstance(hook, BasicHook) and type(hook).backward is BasicHook.backward


def is_known_linear(hook: Hook) -> bool:
    """Returns True if a rule is one of the linear rules of Zennit or of this package."""
    return type(hook) in LINEAR_RULES or type(hook).__module__ == "nrm_plugin.rules"


def own_copy(hook: Hook) -> Hook:
    """Returns the rule itself if it is known to be stateless, and otherwise a copy of it for one call."""
    return hook if is_known_linear(hook) else hook.copy()
