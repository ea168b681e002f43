"""Affine layers of torch and modules that wrap affine functions."""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor, nn
from zennit.layer import Sum

from .shallow_copies import shared_copy

_KINDS: dict[str, tuple[type[nn.Module], int]] = {
    "linear": (nn.Linear, 2),
    "conv1d": (nn.Conv1d, 3),
    "conv2d": (nn.Conv2d, 3),
    "conv3d": (nn.Conv3d, 3),
    "conv_transpose1d": (nn.ConvTranspose1d, 3),
    "conv_transpose2d": (nn.ConvTranspose2d, 3),
    "conv_transpose3d": (nn.ConvTranspose3d, 3),
}
LAYERS = frozenset(_KINDS)
"""Names of the functions in ``torch.nn.functional`` that correspond to an affine layer with a weight."""


@functools.cache
def _template(function: str) -> nn.Module:
    """Creates a layer with unallocated parameters, once per function. Copying it is faster than initialization."""
    kind, arguments = _KINDS[function]
    return kind(*(1,) * arguments, device="meta")


def layer_like(function: str) -> nn.Module:
    """Returns a layer of the type that corresponds to a function such as ``conv2d``, with unallocated parameters."""
    return shared_copy(_template(function))


class Applied(nn.Module):
    """Module that applies a function, which need not be linear, to a tensor.

    Args:
        function: Function that maps tensors of shape ``(N, *in)`` to ``(N, *out)``.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, source: Tensor) -> Tensor:
        """Applies the function."""
        return self.function(source)


class Weightless(Applied):
    """Module that applies a linear function without weights to a tensor.

    Args:
        function: Linear function that maps tensors of shape ``(N, *in)`` to ``(N, *out)``.
    """


class Weighted(nn.Module):
    """Module that applies an affine function, given as a function of the input, weight and bias.

    Args:
        function: Function ``(source, weight, bias or None) -> output``. It must be linear in ``source`` and linear in
            ``weight``, and add the bias.
        weight: The weight passed to ``function``.
        bias: The bias passed to ``function``, or None.
        bias_dim: The dimension of the output along which the bias is added.
        groups: Number of convolution groups.
        is_transposed: Whether the first dimension of the weight indexes input channels.
        padding_mode: Padding mode of a convolution, as in torch.
        twin: A torch layer that computes the same function apart from its parameter values, or None if none exists.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor, Tensor | None], Tensor],
        weight: Tensor,
        bias: Tensor | None,
        bias_dim: int,
        groups: int = 1,
        is_transposed: bool = False,
        padding_mode: str = "zeros",
        twin: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["twin"] = twin  # not a submodule
        self.function = function
        self.groups, self.is_transposed = groups, is_transposed
        self.padding_mode = padding_mode
        self.bias_dim = bias_dim
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, source: Tensor) -> Tensor:
        """Applies the function with the current weight and bias."""
        bias = self._parameters["bias"]
        return self.function(source, self.weight, bias)


WEIGHTED = (
    Weighted,
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


WEIGHTLESS = (
    Weightless,
    nn.AvgPool1d,
    nn.AvgPool2d,
    nn.AvgPool3d,
    nn.AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d,
    Sum,
)


_AFFINE = (*WEIGHTED, *WEIGHTLESS)


def twin_of(module: nn.Module) -> nn.Module:
    """Returns the torch layer equivalent to a module that wraps a function. Returns any other module unchanged."""
    return module.__dict__.get("twin") or module


def is_torch_class(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Returns True if a module is an instance of one of the given classes and inherits its ``forward`` unchanged."""
    own = "forward" in module.__dict__
    return not own and any(isinstance(module, kind) and type(module).forward is kind.forward for kind in kinds)


def is_affine(module: nn.Module) -> bool:
    """Returns True if a module is an affine layer whose ``forward`` was not overridden by a subclass or a canonizer."""
    if "forward" in module.__dict__ or module._modules:
        return False
    forward = type(module).forward
    for kind in _AFFINE:
        if forward is kind.forward and isinstance(module, kind):
            return kind in WEIGHTLESS or module._parameters.get("weight") is not None
    return False


def broadcast(bias: Tensor, module: nn.Module, dims: int) -> Tensor:
    """Reshapes the bias of a layer to broadcast against the output, which has ``dims`` dimensions."""
    last = isinstance(module, nn.Linear) or getattr(module, "bias_dim", 1) == -1
    if last or bias.ndim > 1:  # a position-dependent bias has the shape of the output
        return bias
    # The layer determines the number of spatial dimensions, since the output may lack the batch dimension.
    spatial = len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else dims - 2
    return bias.reshape(-1, *(1,) * spatial)
