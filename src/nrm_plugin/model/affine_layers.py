"""Affine layers: those of torch, and functions as modules with or without weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from zennit.layer import Sum


class Weightless(nn.Module):
    """A function of one tensor as a module without weights; it must be linear in that tensor.

    Args:
        function: ``(N, *in)`` to ``(N, *out)``.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, source: Tensor) -> Tensor:
        """The function."""
        return self.function(source)


class Weighted(nn.Module):
    """A function of a tensor, a weight and a bias as a module that has them.

    Args:
        function: ``(source, weight, bias or None)`` to the output; linear in source and in weight, bias added.
        weight: The weight.
        bias: The bias, if there is one.
        bias_dim: The dimension of the output along which the bias lies.
        groups: Groups of a convolution.
        is_transposed: Whether the first dimension of the weight is that of the input channels.
        padding_mode: How a convolution pads its input, as in torch.
        twin: The layer of torch that computes the same function, its parameters aside; None if torch has none.
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
        """The function with the current weight and bias."""
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


def twin_of(module: nn.Module) -> nn.Module:
    """The layer of torch that computes the same as a functional layer, its parameters aside; else the module itself."""
    return module.__dict__.get("twin") or module


def is_affine(module: nn.Module) -> bool:
    """Whether the module is an affine layer of torch whose forward neither a subclass nor a canonizer overrides."""
    if "forward" in module.__dict__ or module._modules:
        return False
    kinds = [kind for kind in (*WEIGHTED, *WEIGHTLESS) if isinstance(module, kind)]
    return any(type(module).forward is kind.forward for kind in kinds) and (
        not isinstance(module, WEIGHTED) or module._parameters.get("weight") is not None
    )


def broadcast(bias: Tensor, module: nn.Module, image: Tensor) -> Tensor:
    """A bias in a shape that broadcasts over the output of its layer."""
    last = isinstance(module, nn.Linear) or getattr(module, "bias_dim", 1) == -1
    if last or bias.ndim > 1:  # a bias that depends on the position comes in the shape of the output
        return bias
    # From the dimensions of the layer, not of the output, which may lack the batch.
    spatial = len(module.kernel_size) if isinstance(module, nn.modules.conv._ConvNd) else image.ndim - 2
    return bias.reshape(-1, *(1,) * spatial)
