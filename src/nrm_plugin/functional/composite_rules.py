"""Which rule a composite gives to a function: that of the module of the same kind, or of the owner of its weight."""

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
        """The rule of the module that owns a weight, else of a module like this one."""


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
        model: The model, whose modules own the weights.
        uncovered: The rule of a layer to which the composite gives none.
    """

    def __init__(self, composite: Composite, model: nn.Module, uncovered: Hook | None = None) -> None:
        self._composite = composite
        self._uncovered = uncovered
        self._ctx: dict[Any, Any] = {}
        self._by_weight: dict[int, tuple[nn.Module, Hook | None]] = {}
        self._by_memory: dict[int, tuple[nn.Module, Hook | None]] = {}
        self._by_kind: dict[type[nn.Module], Hook | None] = {}
        for name, module in model.named_modules():
            # Looked up for every module in order, so that the rule of the first layer goes to the first layer.
            rule = composite.module_map(self._ctx, name, module)
            if isinstance(module, nn.MultiheadAttention):  # an activation for Zennit; its weights are linear layers
                rule = None
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._by_weight[id(parameter)] = (module, rule)
                    self._by_memory.setdefault(parameter.untyped_storage().data_ptr(), (module, rule))

    def of_module(self, module: nn.Module) -> Hook | None:
        """The rule of a module of this kind that comes after all modules of the model."""
        kind = type(module)
        if kind not in self._by_kind:
            self._by_kind[kind] = self._composite.module_map(self._ctx, "", module)
        return self._by_kind[kind]

    def of_weight(self, weight: Tensor, like: nn.Module) -> Hook | None:
        """By identity, then by memory (a slice of a weight), then by kind (a computed weight)."""
        memory = weight.untyped_storage().data_ptr()
        owner, rule = self._by_weight.get(id(weight)) or self._by_memory.get(memory) or (None, None)
        if rule is None and not isinstance(owner, type(like)):
            rule = self.of_module(like)
        return self._uncovered if rule is None else rule
