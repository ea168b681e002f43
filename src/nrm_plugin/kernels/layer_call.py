"""One call of a layer, as recorded by the hook, from which its rule is read as a kernel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from zennit.core import Hook
from zennit.rules import Epsilon, Gamma

from ..model.autocast import current, working_dtype
from ..model.value_reads import untraced
from ..rules import Absolute, ConservingEpsilon, Relative
from .forward_state import Saved
from .known_rules import LINEAR_RULES

Run = Callable[[nn.Module, Tensor], Tensor]
"""Function that runs a module on a different first input, with its other arguments unchanged."""


@dataclass(frozen=True)
class Image:
    """The output of a layer without its bias.

    Attributes:
        saved: The output without bias, ``(N, *out)``.
        weight: The weight by which the layer multiplied.
    """

    saved: Saved
    weight: Tensor


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer that has a rule.

    Attributes:
        rule: The rule.
        module: A copy of the layer that may be modified.
        run: Function that runs a module, given its first input.
        saved_input: The first input, ``(N, *in)``.
        like: A tensor without storage that has the shape of the output, ``(N, *out)``.
        name: Layer name, for messages.
        saved_output: The output, if the rule reads it and fusion did not change the layer, or None otherwise.
        image: The output without bias, if the hook recorded it.
        precision: The dtype in which the layer multiplies by its weight, if it is less precise than the input.
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
        """Creates the record of a call from its output, and saves only the tensors that the rule reads."""
        saved_output = Saved(output) if _reads_output(rule) else None
        # Not the output itself, since it is linked to a step: the output and the step would keep each other alive.
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
    """Returns whether a rule needs the output without bias of the unmodified layer, which the hook has recorded."""
    return type(rule) in (Epsilon, ConservingEpsilon)


def _reads_output(rule: Hook) -> bool:
    """Returns whether a rule may read the output of the unmodified layer as well as those of its modified layers."""
    return type(rule) not in (*LINEAR_RULES, Absolute, ConservingEpsilon, Relative) or type(rule) is Gamma


def forward(module: nn.Module, source: Tensor) -> Tensor:
    """Runs a module that has one input."""
    result: Tensor = module.forward(source)
    return result


def without_values(call: LayerCall) -> LayerCall:
    """Returns the record of a call without the values of its tensors, for a kernel that does not read them."""
    return replace(call, saved_input=Saved(shape_like(call.input), values=False), saved_output=None, run=forward)


def shape_like(tensor: Tensor) -> Tensor:
    """Returns a tensor without memory, with the same shape and device and the dtype of relevance at this tensor."""
    if type(tensor) is Tensor:
        return _entry(working_dtype(tensor.dtype), tensor.device).expand(tensor.shape)
    return tensor.new_empty((), dtype=working_dtype(tensor.dtype)).expand(tensor.shape)


@functools.cache
def _entry(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), untraced():
        return torch.zeros((), dtype=dtype, device=device)
