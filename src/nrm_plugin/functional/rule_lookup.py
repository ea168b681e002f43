"""Lookup of the rule for a function, assigned to an equivalent module or to the module that owns the weight."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn
from zennit.core import Composite, Hook

from ..model.model_protection import memory_address
from ..model.quantized import plain_tensors
from ..rules import Absolute

_Owner = tuple[nn.Module, Hook | None]
_LOOPS = (nn.RNNBase, nn.RNNCellBase)
"""Recurrent modules, whose rule applies to the linear maps inside them."""


class RuleLookup(Protocol):
    """Interface for finding the rule of a function call."""

    def of_module(self, module: nn.Module) -> Hook | None:
        """Returns the rule registered for the type of ``module``, or None if there is none."""

    def of_weight(self, weight: Tensor, like: nn.Module, path: str) -> Hook | None:
        """Returns the rule of the module that owns a weight or, if there is none, the rule for the type of ``like``.

        Args:
            weight: Weight whose owner is looked up.
            like: A layer equivalent to the function.
            path: Path of the module that calls the function.
        """


class NoRules:
    """Rule lookup for the default kernels, without a composite."""

    def of_module(self, module: nn.Module) -> Hook | None:
        """Returns None, which selects the default kernel of the function."""
        return None

    def of_weight(self, weight: Tensor, like: nn.Module, path: str) -> Hook | None:
        """Returns :class:`~nrm_plugin.rules.Absolute`, the default rule for functions with a weight."""
        return Absolute()


class CompositeRules:
    """Rule lookup in a composite, for one model.

    Args:
        composite: The composite that assigns the rules.
        model: The model whose modules own the weights.
        uncovered: Rule of layers to which the composite assigns none.
    """

    def __init__(self, composite: Composite, model: nn.Module, uncovered: Hook | None = None) -> None:
        self._composite = composite
        self._uncovered = uncovered
        self._ctx: dict[Any, Any] = {}
        self._by_path: dict[str, _Owner] = {}
        self._by_weight: dict[int, _Owner] = {}
        self._by_memory: dict[int, _Owner] = {}
        self._by_kind: dict[type[nn.Module], Hook | None] = {}
        for name, module in model.named_modules():
            # Rules are looked up for all modules in order, so that the first layer gets the rule for first layers.
            rule = composite.module_map(self._ctx, name, module)
            if isinstance(module, nn.MultiheadAttention):  # an activation in Zennit, but its weights are linear layers
                rule = None
            self._by_path[name] = (module, rule)
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._by_weight[id(parameter)] = (module, rule)
                    for part in plain_tensors(parameter):
                        self._by_memory.setdefault(memory_address(part), (module, rule))

    def of_module(self, module: nn.Module) -> Hook | None:
        """Returns the rule for the type of ``module``, as if it were the last module of the model, or None."""
        kind = type(module)
        if kind not in self._by_kind:
            self._by_kind[kind] = self._composite.module_map(self._ctx, "", module)
        return self._by_kind[kind]

    def of_weight(self, weight: Tensor, like: nn.Module, path: str) -> Hook | None:
        """Returns the rule of the module that owns a weight or its memory (for slices), or else the rule of ``like``.

        The layer that calls the function has precedence if it owns the weight, even if other layers share it. It also
        has precedence if no module owns the weight because a parametrization, a norm, a mask or ``functional_call``
        computes it.
        """
        memory = _memory(weight)
        owner, rule = self._by_weight.get(id(weight)) or self._by_memory.get(memory) or (None, None)
        caller = self._by_path.get(path)
        if caller is not None:
            layers = (type(like), *_LOOPS)
            is_computed = rule is None and not isinstance(owner, layers)
            if _owns(caller[0], memory) or (is_computed and isinstance(caller[0], layers)):
                owner, rule = caller
        if rule is None and not isinstance(owner, type(like)):
            rule = self.of_module(like)
        return self._uncovered if rule is None else rule


def _owns(module: nn.Module, memory: int) -> bool:
    """Returns True if a module has a parameter at this memory address."""
    return any(parameter is not None and _memory(parameter) == memory for parameter in module._parameters.values())


def _memory(weight: Tensor) -> int:
    """Returns the memory address of a weight."""
    return memory_address(next(plain_tensors(weight)))
