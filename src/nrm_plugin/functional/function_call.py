"""Function calls whose inputs receive relevance and the construction of their kernels."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from zennit.core import Hook

from ..errors import UnsupportedRuleError
from ..kernels.base import Kernel
from ..kernels.forward_state import Saved
from ..kernels.known_rules import is_by_modifiers
from ..kernels.layer_step import Fuse
from ..kernels.normalization import Normalization
from ..kernels.rule_reader import read_rule_at
from ..model.affine_layers import Applied, Weightless
from ..model.trace_guards import audit, holds
from .function_kernels import BroadcastKernel, RouteKernel, SingleInputKernel, SplitKernel, total_of
from .rule_lookup import NoRules, RuleLookup


@dataclass(frozen=True)
class Settings:
    """Settings for the propagation through function calls, shared by all forward passes of a model.

    Attributes:
        rules: Lookup of the composite's rules by module or weight.
        normalization: Treatment of a kernel's residual.
        sums: How sums distribute relevance: ``"absolute"`` or ``"signed"``.
        fuse: Callback that receives each new layer step and its input and may fuse the step with adjacent ones.
        attention: ``"value"`` if attention weights receive no relevance, or ``"halves"`` if they receive half of it.
    """

    rules: RuleLookup = field(default_factory=NoRules)
    normalization: Normalization = field(default_factory=lambda: Normalization("sink"))
    sums: str = "absolute"
    fuse: Fuse | None = None
    attention: str = "value"


@dataclass(frozen=True)
class Slot:
    """Placeholder for an argument that receives relevance. ``number`` is its index among these arguments."""

    number: int


def fill(value: Any, tensors: Sequence[Tensor]) -> Any:
    """Replaces the slots in an argument, which may be nested, with tensors."""
    if isinstance(value, Slot):
        return tensors[value.number]
    if type(value) in (list, tuple):
        return type(value)(fill(item, tensors) for item in value)
    return value


@dataclass(frozen=True)
class CallInput:
    """Argument of a function call, if it is a tensor that receives relevance.

    Attributes:
        saved: The tensor, saved for the backward pass.
        is_gate: Whether the tensor is a gate: a factor that weights a signal and receives no relevance in a product.
        producer: Autograd node that computed the tensor.
    """

    saved: Saved
    is_gate: bool = False
    producer: Any = None


@dataclass(frozen=True)
class FunctionCall:
    """Function call. Its *inputs* are the tensor arguments that receive relevance.

    Attributes:
        name: Name shared by all variants of the function, such as ``"add"``.
        function: Torch function that was called.
        path: Path of the module that called the function.
        args: Positional arguments, with a :class:`Slot` in place of each input.
        kwargs: Keyword arguments, with a :class:`Slot` in place of each input.
        inputs: The inputs, in order.
        settings: Settings of all function steps.
    """

    name: str
    function: Callable[..., Any]
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: tuple[CallInput, ...]
    settings: Settings = field(default_factory=Settings)

    @property
    def values(self) -> list[Tensor]:
        """Detached values of the inputs at the time of the call, of shape ``(N, …)`` each."""
        return [item.saved.tensor for item in self.inputs]

    @property
    def shapes(self) -> list[torch.Size]:
        """Shape of each input."""
        return [value.shape for value in self.values]

    @property
    def gates(self) -> tuple[bool, ...]:
        """Whether each input is a gate."""
        return tuple(item.is_gate for item in self.inputs)

    def run(self, *values: Tensor) -> Any:
        """Runs the function on other inputs, with the same constants and options."""
        keywords = {key: fill(value, values) for key, value in self.kwargs.items()}
        return self.function(*(fill(value, values) for value in self.args), **keywords)

    def argument(self, position: int, keyword: str, default: Any = None) -> Any:
        """Returns an argument by position or keyword. An input is returned as a :class:`Slot`."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(keyword, default)

    # -- kernels for most functions ----------------------------------------------------------------------------------

    def identity(self, to: int = 0) -> Kernel:
        """Returns the kernel that passes all relevance elementwise to one of the inputs.

        Args:
            to: Index of the input. If it was broadcast, relevance is summed over the broadcast dimensions.
        """
        return BroadcastKernel(self.shapes, to)

    def split(self, shares: Sequence[Tensor | float]) -> Kernel:
        r"""Returns the kernel that splits relevance elementwise among the inputs, :math:`R_k = q_k R`.

        Args:
            shares: ``q_k`` for each input, as numbers or as tensors that broadcast to the output. The residual, one
                minus their sum, is redistributed or absorbed, depending on the composite.

        Raises:
            ValueError: If the number of shares differs from the number of inputs.
        """
        if len(shares) != len(self.inputs):
            raise ValueError(
                f"call.split got {len(shares)} shares, but {self.name!r} has {len(self.inputs)} inputs that carry "
                "relevance. Give one share for each of call.values."
            )
        tensors = [torch.as_tensor(q, dtype=v.dtype, device=v.device) for q, v in zip(shares, self.values, strict=True)]
        total = total_of(tensors)
        tolerance = 16 * torch.finfo(total.dtype).eps
        is_stochastic = holds("shares that sum to one", lambda: ((total - 1).abs() <= tolerance).all())
        return SplitKernel(tensors, self.shapes, None, is_stochastic)

    def route(self) -> Kernel:
        """Returns the kernel of a function that only copies elements, such as a gather.

        Relevance passes to the copied elements. Output elements that are not copied from an input leave a residual.
        """
        with torch.enable_grad():
            leaves = [value.detach().requires_grad_() for value in self.values]
            output = self.run(*leaves)

        def gradient(relevance: Tensor) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                output, leaves, relevance, True, torch.is_grad_enabled(), allow_unused=True, materialize_grads=True
            )

        return RouteKernel(gradient)

    def by_rule(
        self, rule: Hook, to: int = 0, run: Callable[[Tensor], Tensor] | None = None, *, is_linear: bool = True
    ) -> Kernel:
        """Returns the kernel of a Zennit rule for a function of one input.

        The rule treats the function as a layer without weights.

        Args:
            rule: The rule, such as ``zennit.rules.Norm()``.
            to: Index of the input that receives relevance. The other inputs are treated as constants.
            run: The function to apply the rule to, as a function of this input alone. Defaults to the intercepted
                function.
            is_linear: Whether the function is linear in this input, without a constant. The column sums of a linear
                function follow from its output, those of any other function from the derivative of the rule.

        Raises:
            UnsupportedRuleError: If the function is not linear, but ``is_linear`` is True.
        """
        if is_linear and is_by_modifiers(rule) and not _is_linear(run or self._varied(to), self.values[to]):
            raise UnsupportedRuleError(
                f"a kernel calls call.by_rule({type(rule).__name__}()) for {self.name!r}, but this function is not "
                "linear in its input: f(x - 2y) is not f(x) - 2 f(y). Its column sums, and with them all totals, would "
                "be wrong. Use call.by_rule(rule, is_linear=False)."
            )
        return self._by_rule(rule, to, run, is_linear)

    def _by_rule(
        self, rule: Hook, to: int = 0, run: Callable[[Tensor], Tensor] | None = None, is_linear: bool = True
    ) -> Kernel:
        """Returns the kernel of :meth:`by_rule` without checking that the function is linear."""
        values = self.values
        module = (Weightless if is_linear else Applied)(run or self._varied(to))
        kernel = read_rule_at(rule, module, values[to], self.path)
        return kernel if len(values) == 1 else SingleInputKernel(kernel, to, self.shapes)

    def _varied(self, to: int) -> Callable[[Tensor], Tensor]:
        """Returns the function of one input, with all other inputs as constants."""
        values = self.values

        def varied(source: Tensor) -> Tensor:
            return self.run(*[source if number == to else value for number, value in enumerate(values)])  # type: ignore[no-any-return]

        return varied


def _is_linear(function: Callable[[Tensor], Tensor], value: Tensor) -> bool:
    """Returns True if a function is linear, tested at a value ``x`` and at noise ``y`` of its size.

    A linear function satisfies :math:`f(x - 2y) = f(x) - 2 f(y)`.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), audit():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype).to(value.device)
        noise *= value.abs().max() if bool(value.any()) else 1
        first, second, combined = function(value), 2 * function(noise), function(value - 2 * noise)
        tolerance = math.sqrt(torch.finfo(value.dtype).eps)
        if not first.numel():
            return True
        least = tolerance * (first.abs() + second.abs()).max()
        return bool(least.isfinite() & ((combined - (first - second)).abs() <= least).all())


__all__ = ["CallInput", "FunctionCall", "Settings", "Slot", "fill"]
