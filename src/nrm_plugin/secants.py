"""The composite of the measure against a reference, in which every operation has its secant slopes.

Source: docs/differences.md.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from zennit.core import Composite

from .composites import Normalized
from .kernels.hook import StepHook


class Secants(Normalized):
    """The composite of the measure against a reference: no module has a rule, and each function inside is a step."""

    def __init__(self) -> None:
        super().__init__(Composite(module_map=_no_rule), residual="sink", attention="halves")

    def mapping(self, ctx: dict[Any, Any], name: str, module: nn.Module) -> StepHook | None:
        """Returns None: the functions inside a module are steps."""
        return None


def _no_rule(ctx: dict[Any, Any], name: str, module: nn.Module) -> None:
    return None


__all__ = ["Secants"]
