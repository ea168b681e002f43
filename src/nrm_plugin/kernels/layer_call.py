"""Record of one call of a layer, from which the kernel of its rule is constructed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from zennit.core import Hook
from zennit.rules import Epsilon, Gamma

from ..model.autocast import current, working_dtype
from ..model.shapes_without_values import PLAIN
from ..model.trace_guards import untraced
from ..rules import Absolute, ConservingEpsilon, Relative
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
        saved_input: The first input, of shape ``(N, *in)``.
        like: An expanded scalar of the same shape as the output, ``(N, *out)``.
        name: Layer name, for error messages.
        saved_output: The output, or None if the rule does not read it or fusion has changed the layer.
        image: The linear part of the output (without bias), if the hook recorded it.
        precision: The dtype in which the layer multiplies by its weight if less precise than the input, or None.
    """

    rule: Hook
    module: nn.Module
    run: Run
    saved_input: Saved
    like: Tensor
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
        saved_input: Saved,
        output: Tensor,
        name: str,
        image: Image | None = None,
    ) -> LayerCall:
        """Creates the record of a call, saving only the tensors that the rule reads."""
        saved_output = Saved(output) if _reads_output(rule) else None
        # The output itself is linked to a step, so storing it would create a reference cycle.
        like = shape_like(output)
        return cls(rule, module, run, saved_input, like, name, saved_output, image, current(output.device))

    @property
    def input(self) -> Tensor:
        """The first input, of shape ``(N, *in)``."""
        return self.saved_input.tensor

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
    return replace(call, saved_input=Saved(shape_like(call.input), values=False), saved_output=None, run=forward)


def shape_like(tensor: Tensor) -> Tensor:
    """Returns an expanded scalar with the shape and device of ``tensor`` and the dtype of its relevance."""
    if type(tensor) in PLAIN:
        return _entry(working_dtype(tensor.dtype), tensor.device).expand(tensor.shape)
    return tensor.new_empty((), dtype=working_dtype(tensor.dtype)).expand(tensor.shape)


@functools.cache
def _entry(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), untraced():
        return torch.zeros((), dtype=dtype, device=device)
