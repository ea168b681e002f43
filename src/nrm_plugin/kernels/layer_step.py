"""Steps of layers, whose recorded call batch-norm fusion can modify before the kernel is constructed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from zennit.rules import Pass

from ..errors import BatchNormWarning, warn
from ..model.autocast import is_short_format
from ..model.quantized import dequantized, is_quantized
from .base import IdentityKernel, Kernel
from .forward_state import Saved
from .layer_call import Image, LayerCall, forward, without_values
from .normalization import Normalization, Scaling
from .rule_reader import read_rule
from .step import Step


class LayerStep(Step):
    """One call of a layer with a rule, as a node of the computation graph (step).

    Args:
        layer_call: The record of the call.
        output: The output of the call, of shape ``(N, *out)``.
        normalization: The normalization of the columns.
        name: Name of the step; by default, the name of the layer.
        rule: Name of the operation; by default, the name of the rule.

    Attributes:
        layer_call: The record of the call, including the parameters and the input set by fusion.
        folds: Fusions with batch normalizations, applied just before the kernel is constructed.
        norms: The batch-norm layers that read the output of the layer.
        layer_below: For a batch normalization, the layer step whose output it reads.
        feeds_fold: Whether the layer above may be fused with this one and would then read the input of this one.
        has_dense_norm: Whether a linear layer and a batch normalization were fused in this step.
    """

    def __init__(
        self,
        layer_call: LayerCall,
        output: Tensor,
        normalization: Normalization,
        name: str | None = None,
        rule: str | None = None,
    ) -> None:
        super().__init__(name or layer_call.name, output, normalization, rule or type(layer_call.rule).__name__)
        self.layer_call = layer_call
        self.is_short = self.is_short or is_short_format(layer_call.saved_input.dtype)
        self.folds: list[Callable[[], None]] = []
        self.norms: list[LayerStep] = []
        self.layer_below: LayerStep | None = None
        self.feeds_fold = False
        self.has_dense_norm = False

    def empty(self) -> None:
        """Frees all tensors of the step, keeping only its structure."""
        super().empty()
        self.layer_call = without_values(self.layer_call)

    def fold(self) -> None:
        """Applies all deferred batch-norm fusions. The recorded call is final afterwards."""
        self.fill()
        self._dequantize()
        while self.folds:
            self.folds.pop(0)()

    def _build(self) -> Kernel:
        self.fold()
        call = self.layer_call
        if call.image is not None:
            self.layer_call = replace(call, image=None)  # the image is used only once
        # The column sums of a linear layer fused with batch normalization are checked, so the kernel must provide them.
        kernel = read_rule(call, None if self.has_dense_norm else self.normalization)
        if isinstance(kernel, IdentityKernel) and (self.is_identity or not self.feeds_fold):
            self.layer_call = without_values(self.layer_call)
        return kernel

    def _dequantize(self) -> None:
        """Replaces a quantized layer by a dequantized copy."""
        call = self.layer_call
        if type(call.rule) is not Pass and is_quantized(call.module):
            self.layer_call = replace(
                call, module=dequantized(call.module, call.run, call.input, call.name), run=forward
            )

    @property
    def is_identity(self) -> bool:
        """True if this is a batch normalization fused into the layer below, whose output has no other consumer."""
        return self.layer_below is not None and self.layer_below.uses <= 1 and len(self.layer_below.norms) == 1

    def set_parameters(self, weight: Tensor, bias: Tensor, factor: Tensor | None = None) -> None:
        """Sets the weight and bias of the copied layer. The layer in the model remains unchanged.

        Args:
            weight: Weight to set.
            bias: Bias to set.
            factor: The multiplier of the output without bias, if known.
        """
        call = self.layer_call
        call.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        call.module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        image = None
        if call.image is not None and factor is not None:
            with torch.no_grad():
                scaled = call.image.saved.tensor * factor
            image = Image(Saved(scaled, values=False), weight)  # no further writes can occur, since the model has run
        self.layer_call = replace(call, saved_output=None, image=image)

    def set_input(self, source: Tensor) -> None:
        """Sets the input of the recorded call."""
        self.layer_call = replace(self.layer_call, saved_input=Saved(source, values=False))

    def _scaling_of(self, column_sum: Tensor) -> Scaling:
        if self.has_dense_norm and bool((column_sum < 0.5).double().mean() > 0.5):
            warn(
                f"batch normalization was fused with the linear layer {self.name!r}, and its bias absorbs most of the "
                "relevance of most of its neurons. Heat maps through such a pair say little about the inputs (arXiv "
                "2002.11018). Check sink(layer), or remove FuseBatchNorm from the canonizers.",
                BatchNormWarning,
            )
        return super()._scaling_of(column_sum)


Fuse = Callable[[LayerStep, Tensor], None]
"""Function that schedules the fusion of a new step, given the step and its input."""
