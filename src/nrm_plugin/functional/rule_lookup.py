"""Which rule a composite gives to a function: that of the module whose twin it is, or whose weight it reads."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from zennit.core import Composite, Hook

from ..rules import Absolute


class RuleLookup(Protocol):
    """Looks up rules."""

    def of_module(self, module: nn.Module) -> Hook | None:
        """The rule of a module of this kind."""

    def of_weight(self, weight: Tensor, like: nn.Module) -> Hook | None:
        """The rule of the module that owns a weight; of a module of this kind where none does."""


class NoRules:
    """Without a composite: every function has its default kernel."""

    def of_module(self, module: nn.Module) -> Hook | None:
        """None."""
        return None

    def of_weight(self, weight: Tensor, like: nn.Module) -> Hook | None:
        """Absolute shares."""
        return Absolute()


class CompositeRules:
    """The rules of a composite on a model.

    Args:
        composite: The composite.
        model: The model, to know the owners of its weights.
        uncovered: The rule of a layer to which the composite gives none.
    """

    def __init__(self, composite: Composite, model: nn.Module, uncovered: Hook | None = None) -> None:
        self._composite = composite
        self._uncovered = uncovered
        self._ctx: dict[Any, Any] = {}
        self._owners: dict[int, tuple[nn.Module, Hook | None]] = {}
        self._memory: dict[int, tuple[nn.Module, Hook | None]] = {}
        self._probes: dict[type[nn.Module], Hook | None] = {}
        for name, module in model.named_modules():
            # Asked for every module in order, so that rules of the first layer go to the first layer.
            rule = composite.module_map(self._ctx, name, module)
            if isinstance(module, nn.MultiheadAttention):  # an activation for Zennit; its weights are linear layers
                rule = None
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._owners[id(parameter)] = (module, rule)
                    self._memory.setdefault(parameter.untyped_storage().data_ptr(), (module, rule))

    def of_module(self, module: nn.Module) -> Hook | None:
        """The rule of a module of this kind that comes after all modules of the model."""
        kind = type(module)
        if kind not in self._probes:
            self._probes[kind] = self._composite.module_map(self._ctx, "", module)
        return self._probes[kind]

    def of_weight(self, weight: Tensor, like: nn.Module) -> Hook | None:
        """By identity, then by memory (a slice of a weight), then by kind (a weight that was computed)."""
        found = self._owners.get(id(weight)) or self._memory.get(weight.untyped_storage().data_ptr())
        rule = found[1] if found is not None else None
        if rule is None and (found is None or not isinstance(found[0], type(like))):
            rule = self.of_module(like)
        return self._uncovered if rule is None else rule
