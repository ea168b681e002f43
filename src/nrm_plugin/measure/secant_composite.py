"""Composites for measures with a reference.

Source: docs/differences.md.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from zennit.canonizers import Canonizer
from zennit.core import Composite

from ..composites import Normalized
from ..functional import Interception
from ..kernels.module_hook import StepHook


class OnDifferences(Normalized):
    """Composite that applies rules to differences from a reference.

    The functions inside modules become steps and use the rules of their modules.

    Args:
        composite: The composite that provides the rules, or None to propagate along the secant slopes of all
            operations.
    """

    def __init__(self, composite: Normalized | None = None) -> None:
        self.has_rules = composite is not None
        given = composite or Normalized(Composite(module_map=_no_rule), residual="sink")
        settings = given.normalization
        super().__init__(given.composite, settings.residual, settings.gain_limit, given.uncovered, given.sums, "halves")
        # Batch normalization is not fused, since its scale is a slope like any other.
        kept = [canonizer for canonizer in given.canonizers if not isinstance(canonizer, Interception)]
        functions = Interception(given.composite, settings, given.sums, attention="halves", audited=True)
        self.canonizers: list[Canonizer] = [*kept, functions]
        self._fuse = None

    def mapping(self, ctx: dict[Any, Any], name: str, module: nn.Module) -> StepHook | None:
        """Returns None: steps are created for the functions a module calls, not for the module itself."""
        return None


def _no_rule(ctx: dict[Any, Any], name: str, module: nn.Module) -> None:
    return None


__all__ = ["OnDifferences"]
