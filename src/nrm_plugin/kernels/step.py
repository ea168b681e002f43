"""Steps: one call of one module or function, linked into the autograd graph as its normalized kernel.

The gradient that then flows through ``torch.autograd`` is relevance.
"""

from __future__ import annotations

import functools
import numbers
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Hook

from ..errors import BatchNormWarning
from ..model.autocast import current, exact, layers_in
from .base import RESIDUALS, BranchKernel, Kernel, Residual, Scale, scale_of, scales
from .forward_state import Saved, unseen
from .rule_reader import read_rule, reads_output


@dataclass(frozen=True)
class Normalization:
    """What happens to the relevance that a rule does not hand down.

    Attributes:
        residual: ``"redistribute"`` raises columns by the gain before the rest is absorbed, ``"sink"`` leaves the
            rule as it is and absorbs what it leaks.
        gain_limit: Largest gain ``G``, at least 1.
    """

    residual: Residual = "redistribute"
    gain_limit: float = 2.0

    def __post_init__(self) -> None:
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual!r} is unknown; choose one of {RESIDUALS}.")
        is_number = isinstance(self.gain_limit, numbers.Real) and not isinstance(self.gain_limit, bool)
        if not is_number or not self.gain_limit >= 1:
            raise ValueError(f"gain_limit={self.gain_limit!r} must be a number of at least 1 (math.inf is allowed).")

    @property
    def scale(self) -> Scale:
        """What it does to columns."""
        return scale_of(self.residual, float(self.gain_limit))


def shape_like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that needs no memory."""
    return tensor.detach().new_empty(()).expand(tensor.shape)


@dataclass
class LayerCall:
    """What the step of a layer is made of; batch-norm fusion changes it before the kernel is built.

    Attributes:
        rule: The rule.
        module: A shell of the layer.
        call: Runs it on its first input.
        source: That input.
        where: Layer name, for messages.
        image: What it returned without its bias, and with which weight, where that was seen.
        output: What it returned, where the rule reads that; None where it has to be computed.
        folds: What fusion does to it before the kernel is made.
        norms: The batch normalizations that read what it returned.
        layer: For a batch normalization, the layer that it reads.
        holds_dense_norm: Whether a dense layer and a batch norm were fused in here.
        precision: The format in which it multiplies by its weight, where it is shorter than that of its input.
    """

    rule: Hook
    module: nn.Module
    call: Callable[[nn.Module, Tensor], Tensor]
    source: Saved
    where: str
    image: tuple[Saved, Tensor] | None = None
    output: Saved | None = None
    folds: list[Callable[[], None]] = field(default_factory=list)
    norms: list[Step] = field(default_factory=list)
    layer: Step | None = None
    holds_dense_norm: bool = False
    precision: torch.dtype | None = field(default_factory=current)

    def __post_init__(self) -> None:
        if not reads_output(self.rule):
            self.output = None

    def kernel(self, like: Tensor, scale: Scale | None = None) -> Kernel:
        """The kernel of the rule at this call.

        Args:
            like: Has the shape of the output.
            scale: The normalization, which the kernel may take in.
        """
        while self.folds:
            self.folds.pop(0)()
        image, self.image = self.image, None  # needed once; a step keeps what the kernel makes of it
        seen = None if image is None else (image[0].tensor, image[1])
        known = self.output is not None
        output = self.output.tensor if self.output is not None else like
        own = None if self.holds_dense_norm else scale  # of that one the column sums are looked at
        source = self.source.tensor
        with layers_in(self.precision):
            return read_rule(self.rule, self.module, self.call, source, output, self.where, seen, known, own)

    @property
    def is_identity(self) -> bool:
        """Whether this is a batch normalization that the layer below takes over: nothing else reads that layer."""
        return self.layer is not None and self.layer.uses <= 1 and len(self.layer.origin.norms) == 1

    def change(self, weight: Tensor, bias: Tensor, factor: Tensor | None = None) -> None:
        """Gives the layer other parameters, with which it returns something else than the model saw.

        Args:
            weight: The weight.
            bias: The bias.
            factor: By what the image without bias is multiplied thereby, where it is known.
        """
        self.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self.module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        seen, self.output, self.image = self.image, None, None
        if seen is not None and factor is not None:
            with torch.no_grad():  # the model has run, so nothing is written any more
                self.image = (Saved(seen[0].tensor * factor, values=False), weight)


class Step:
    r"""Normalized kernel of one call: :math:`\tilde T_{ij} = g(c_j) T_{ij}`, sink :math:`R_j (1 - g(c_j) c_j)`.

    Args:
        name: Layer name.
        output: What the call returned, ``(N, *out)``.
        build: Makes the kernel; called when relevance first arrives.
        normalization: What happens to the residual.
        rule: Name of the rule or operation.

    Attributes:
        call: Which call of the module or function this is.
        uses: How often its output is read, as far as that is known.
        origin: The :class:`LayerCall` or function call that it is made of.
        attention: Where heads and tokens are, if it multiplies attention weights and values.
    """

    def __init__(
        self, name: str, output: Tensor, build: Callable[[], Kernel], normalization: Normalization, rule: str = ""
    ) -> None:
        self.name = name
        self.call = 0
        self.rule = rule
        self.uses = 1
        self.origin: Any = None
        self.attention: Any = None
        self.shape = output.shape
        self._like = shape_like(output)
        self._build = build
        self._normalization = normalization
        self._lock = threading.RLock()

    @functools.cached_property
    def kernel(self) -> Kernel:
        """The kernel of the rule, before normalization."""
        with self._lock, torch.inference_mode(False), unseen():
            return self.__dict__["kernel"] if "kernel" in self.__dict__ else self._build()

    def _scaled(self, relevance: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gain and deficit wherever this relevance is not zero; None stands for any relevance."""
        kernel = self.kernel
        with self._lock, unseen(), torch.inference_mode(False), torch.no_grad():
            if kernel.reach(relevance):
                self.__dict__.pop("_scales", None)
            return self._scales

    @functools.cached_property
    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and deficit; None for a gain of one and for a deficit of zero."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.kernel.is_stochastic:
                return None, None
            if isinstance(self.kernel, BranchKernel) and self.kernel.is_normalized:
                return None, self.kernel.deficit
            column = self.kernel.column_sum(self._like).detach()
            if getattr(self.origin, "holds_dense_norm", False) and float((column < 0.5).double().mean()) > 0.5:
                warnings.warn(
                    f"batch normalization was fused with the dense layer {self.name!r}, and its bias takes most of the "
                    "relevance of most of its neurons. Heat maps through such a pair say little about the inputs "
                    "(arXiv 2002.11018); look at sink(layer), or do without fusion.",
                    BatchNormWarning,
                    stacklevel=2,
                )
            return scales(column, self._normalization.scale)

    def forget(self) -> None:
        """Drops the kernel, for its origin has changed."""
        self.__dict__.pop("kernel", None)
        self.__dict__.pop("_scales", None)

    def gain_for(self, relevance: Tensor) -> Tensor | None:
        """``g(c)`` wherever relevance ``(K, N, *out)`` arrives; None for one everywhere."""
        return self._scaled(relevance)[0]

    def pull(self, relevance: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Relevance ``(K, N, *out)`` to ``(K, N, *in)`` at each input, and the share that is absorbed, ``(N, *out)``.

        The share is None where nothing is absorbed; where no relevance arrives it may be any number.
        """
        factor, rest = self._scaled(relevance)
        return self.kernel.pull(relevance if factor is None else relevance * factor), rest

    def pull_absolute(self, mass: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The same for walk masses without sign."""
        factor, rest = self._scaled(mass)
        parts = self.kernel.pull_absolute(mass if factor is None else mass * factor)
        return parts, None if rest is None else rest.abs()

    def push(self, values: tuple[Tensor | None, ...], absorbed: Tensor | None) -> Tensor | None:
        """Transpose: values ``(K, N, *in)`` at the inputs and at the sink ``(K, N, *out)`` to ``(K, N, *out)``."""
        factor, rest = self._scaled(None)
        result = None
        if any(value is not None for value in values):
            result = self.kernel.push(values, self.shape).detach()
            result = result if factor is None else result * factor
        if absorbed is not None and rest is not None:
            result = absorbed * rest if result is None else result + absorbed * rest
        return result

    def push_bound(self, values: tuple[Tensor | None, ...]) -> Tensor:
        """At least the transpose of :meth:`pull_absolute`, nothing at the sink."""
        factor, _ = self._scaled(None)  # also makes the branches that only some relevance needs
        found = self.kernel.push_bound(values, self.shape).detach()
        return found if factor is None else found * factor.abs()


Fuse = Callable[[Step, Tensor], None]


class Link(torch.autograd.Function):
    """Joins the output of a step to its inputs; the gradient is relevance."""

    @staticmethod
    def forward(ctx: Any, step: Step, holder: list[Tensor], *inputs: Tensor) -> Tensor:
        # The output comes in a list: as an argument it would be a view, and later in-place operations illegal.
        ctx.step = step
        return holder.pop()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        with exact(relevance.device):
            parts, _ = ctx.step.pull(relevance.unsqueeze(0))
        return None, None, *(part.squeeze(0) for part in parts)


def link(step: Step, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output, now with the step as its history."""
    result: Tensor = Link.apply(step, [output], *inputs)  # type: ignore[no-untyped-call, unused-ignore]
    return result


class LinkInPlace(torch.autograd.Function):
    """Joins a tensor that was written over to what it was; the gradient is relevance."""

    @staticmethod
    def forward(ctx: Any, step: Step, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        ctx.step = step
        return tensor

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        with exact(relevance.device):
            ((part,), _) = ctx.step.pull(relevance.unsqueeze(0))
        return None, part.squeeze(0)
