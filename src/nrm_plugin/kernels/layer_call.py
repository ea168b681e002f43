"""Record of one call of a layer, from which the kernel of its rule is constructed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from zennit.core import Hook
from zennit.rules import Epsilon, Gamma

from ..model.autocast import current
from ..rules import Absolute, ConservingEpsilon, Relative
from .form import Form
from .forward_state import Saved
from .known_rules import LINEAR_RULES

Run = Callable[[nn.Module, Tensor], Tensor]
"""Function that runs a module on a given first input, with the remaining arguments of the recorded call."""


@dataclass(frozen=True)
class Image:
    """Linear part of the output of a layer, without its bias.

    Attributes:
        saved: The output without bias, of shape ``(N, *out)``.
        weight: The weight of the layer.
    """

    saved: Saved
    weight: Tensor


@dataclass(frozen=True)
class LayerCall:
    """Record of one call of a layer that has a rule.

    Attributes:
        rule: The rule applied to the layer.
        module: A copy of the layer, which may be modified.
        run: Function that runs a module on a given first input.
        saved_input: The first input, of shape ``(N, *in)``, or its form if the rule reads no values.
        form: The form of the output, ``(N, *out)``.
        name: Layer name, for error messages.
        saved_output: The output, or None if the rule does not read it or fusion has changed the layer.
        image: The linear part of the output (without bias), if the hook recorded it.
        precision: The dtype in which the layer multiplies by its weight if less precise than the input, or None.
    """

    rule: Hook
    module: nn.Module
    run: Run
    saved_input: Saved | Form
    form: Form
    name: str
    saved_output: Saved | None = None
    image: Image | None = None
    precision: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        rule: Hook,
        module: nn.Module,
        run: Run,
        saved_input: Saved | Form,
        output: Tensor,
        name: str,
        image: Image | None = None,
    ) -> LayerCall:
        """Creates the record of a call, saving only the tensors that the rule reads."""
        saved_output = Saved(output) if _reads_output(rule) else None
        # The output itself is linked to a step, so storing it would create a reference cycle.
        form = Form(output)
        return cls(rule, module, run, saved_input, form, name, saved_output, image, current(output.device))

    @property
    def input(self) -> Tensor:
        """The first input, of shape ``(N, *in)``."""
        return self.saved_input.tensor

    @property
    def like(self) -> Tensor:
        """An expanded scalar of the same shape as the output, ``(N, *out)``."""
        return self.form.tensor

    @functools.cached_property
    def weight(self) -> Tensor | None:
        """The weight of the layer, or None for a module without weights."""
        weight = self.module._parameters.get("weight")
        return None if weight is None else weight.detach()

    @property
    def output(self) -> Tensor:
        """The output, of shape ``(N, *out)``. Its values are valid only if :attr:`is_output_known`."""
        return self.like if self.saved_output is None else self.saved_output.tensor

    @property
    def is_output_known(self) -> bool:
        """True if the values of the output were saved."""
        return self.saved_output is not None


def reads_image(rule: Hook) -> bool:
    """Returns True if a rule uses the bias-free output of the unmodified layer. The hook must then record it."""
    return type(rule) in (Epsilon, ConservingEpsilon)


def _reads_output(rule: Hook) -> bool:
    """Returns True if a rule may use the output of the unmodified layer."""
    return type(rule) not in (*LINEAR_RULES, Absolute, ConservingEpsilon, Relative) or type(rule) is Gamma


def forward(module: nn.Module, source: Tensor) -> Tensor:
    """Runs a module with a single input."""
    result: Tensor = module.forward(source)
    return result


def without_values(call: LayerCall) -> LayerCall:
    """Returns a copy of the record that keeps only the shapes of its tensors."""
    saved = call.saved_input
    form = saved if isinstance(saved, Form) else Form(saved.tensor)
    return replace(call, saved_input=form, saved_output=None, image=None, run=forward)
