"""Subclasses of torch layers that override ``forward``, for example for "same" padding or weight standardization.

A rule modifies the weight that multiplies the input of a layer. If a subclass computes this weight from a parameter,
modifying the parameter results in a different rule: standardization, for example, turns the all-ones weights of Flat
into zeros.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .affine_layers import Weighted, is_affine

_FUNCTIONS: dict[Any, type[nn.Module]] = {
    nn.functional.linear: nn.Linear,
    nn.functional.conv1d: nn.Conv1d,
    nn.functional.conv2d: nn.Conv2d,
    nn.functional.conv3d: nn.Conv3d,
    nn.functional.conv_transpose1d: nn.ConvTranspose1d,
    nn.functional.conv_transpose2d: nn.ConvTranspose2d,
    nn.functional.conv_transpose3d: nn.ConvTranspose3d,
}
_KINDS = tuple(_FUNCTIONS.values())
_TOLERANCE = 1e-3
"""Tolerance when testing whether a module is affine, relative to its largest output."""


def is_own_layer(module: nn.Module) -> bool:
    """Returns True if a module is a subclass of a torch layer that overrides ``forward``."""
    return isinstance(module, _KINDS) and not is_affine(module)


class WeightRecorder(TorchFunctionMode):
    """Torch function mode that records the weight and bias that a layer passes to ``linear`` or a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Tensor, Tensor | None, int]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FUNCTIONS:
            weight, bias = _argument(args, kwargs, 1, "weight"), _argument(args, kwargs, 2, "bias")
            self.calls.append((func, weight, bias, int(_argument(args, kwargs, 6, "groups") or 1)))
        return func(*args, **kwargs)

    def layer(self, module: nn.Module, call: Callable[[nn.Module, Tensor], Tensor], source: Tensor) -> Weighted | None:
        """Returns an affine layer with the weight recorded in the call, or None if the module is not affine.

        Args:
            module: A copy of the module.
            call: Function that calls a copy of the module on an input.
            source: The input of the module.
        """
        if len(self.calls) != 1:
            return None
        ((function, weight, bias, groups),) = self.calls
        if bias is not None and bias.ndim != 1:
            return None

        def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            with _Substituted(function, weight, bias):
                return call(module, source)

        with torch.no_grad():
            if not _is_affine(lambda values: call(module, values), source[:1]):
                return None
            if bool(run(torch.zeros_like(source[:1]), weight, None).any()):
                return None
        kind = _FUNCTIONS[function]
        transposed = issubclass(kind, nn.modules.conv._ConvTransposeNd)
        dim, padding = -1 if kind is nn.Linear else 1, str(getattr(module, "padding_mode", "zeros"))
        added = None if bias is None else bias.detach()
        return Weighted(run, weight.detach(), added, dim, groups, transposed, padding)


class _Substituted(TorchFunctionMode):
    """Torch function mode that replaces the weight and bias passed to one function."""

    def __init__(self, function: Any, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.function, self.weight, self.bias = function, weight, bias

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not self.function:
            return func(*args, **kwargs)
        rest = {key: value for key, value in kwargs.items() if key not in ("input", "weight", "bias")}
        return func(_argument(args, kwargs, 0, "input"), self.weight, self.bias, *args[3:], **rest)


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any], position: int, keyword: str) -> Any:
    return args[position] if len(args) > position else kwargs.get(keyword)


def _is_affine(function: Callable[[Tensor], Tensor], source: Tensor) -> bool:
    """Tests ``f(-2 x) = 3 f(0) - 2 f(x)``, which fails for activations and input-dependent weights."""
    image, constant, other = function(source), function(torch.zeros_like(source)), function(-2 * source)
    size = torch.maximum(image.abs().max(), constant.abs().max())
    return bool((other - 3 * constant + 2 * image).abs().max() <= _TOLERANCE * size)
