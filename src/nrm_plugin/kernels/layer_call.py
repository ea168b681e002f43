"""One call of a layer: what the hook saw, and what the reader of its rule needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from zennit.core import Hook
from zennit.rules import Epsilon, Gamma

from ..model.autocast import current
from ..rules import Absolute, ConservingEpsilon, Relative
from .forward_state import Saved
from .known_rules import LINEAR_RULES

Run = Callable[[nn.Module, Tensor], Tensor]
"""Runs a module on another first input, its other arguments as they were."""


@dataclass(frozen=True)
class Image:
    """What a layer returned without its bias.

    Attributes:
        saved: The output without bias, ``(N, *out)``.
        weight: The weight that the layer multiplied with.
    """

    saved: Saved
    weight: Tensor


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that has a rule.

    Attributes:
        rule: The rule.
        module: A shell of the layer, which may be written to.
        run: Runs the layer on its first input.
        saved_input: That input, ``(N, *in)``.
        like: A tensor without memory in the shape of the output, ``(N, *out)``.
        name: Layer name, for messages.
        saved_output: The output, if the rule reads it and fusion did not change the layer; else None.
        image: The output without bias, where the hook saw it.
        precision: The format in which the layer multiplies by its weight, if it is shorter than that of the input.
    """

    rule: Hook
    module: nn.Module
    run: Run
    saved_input: Saved
    like: Tensor
    name: str
    saved_output: Saved | None = None
    image: Image | None = None
    precision: torch.dtype | None = field(default_factory=current)

    @classmethod
    def of(
        cls,
        rule: Hook,
        module: nn.Module,
        run: Run,
        saved_input: Saved,
        output: Tensor,
        name: str,
        image: Image | None = None,
    ) -> LayerCall:
        """The call that returned this output; only what the rule reads is saved."""
        saved_output = Saved(output) if _reads_output(rule) else None
        # Not the output itself: linked to a step, it would keep the step alive, and the step the output.
        return cls(rule, module, run, saved_input, shape_like(output), name, saved_output, image)

    @property
    def input(self) -> Tensor:
        """The first input, ``(N, *in)``."""
        return self.saved_input.tensor

    @property
    def output(self) -> Tensor:
        """The output, ``(N, *out)``; only its shape, dtype and device if :attr:`is_output_known` is false."""
        return self.like if self.saved_output is None else self.saved_output.tensor

    @property
    def is_output_known(self) -> bool:
        """Whether the values of the output are known."""
        return self.saved_output is not None


def reads_image(rule: Hook) -> bool:
    """Whether a rule runs the unmodified layer on its unmodified input, so that the hook already has the image."""
    return type(rule) in (Epsilon, ConservingEpsilon)


def _reads_output(rule: Hook) -> bool:
    """Whether a rule may read the values of the unmodified output, not only those of its own modified layers."""
    return type(rule) not in (*LINEAR_RULES, Absolute, ConservingEpsilon, Relative) or type(rule) is Gamma


def forward(module: nn.Module, source: Tensor) -> Tensor:
    """Runs a module that has one input."""
    result: Tensor = module.forward(source)
    return result


def shape_like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that needs no memory."""
    return tensor.detach().new_empty(()).expand(tensor.shape)
