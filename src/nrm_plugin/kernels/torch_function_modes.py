"""Torch function modes in which modules with a rule run, to avoid copies or record the output without bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zennit.core import Hook

from ..model.affine_layers import WEIGHTED, broadcast, is_affine
from ..model.autocast import asked_for, current
from ..model.custom_layers import WeightRecorder, is_own_layer
from ..model.quantized import is_quantized
from .forward_state import Saved, without_torch_function
from .known_rules import is_by_modifiers
from .layer_call import Image, reads_image


class SeparateBias(TorchFunctionMode):
    """Torch function mode that stores the output of a layer for the kernel before the bias is added.

    Args:
        layer: One of torch's linear or convolutional layers.

    Attributes:
        image: The output without bias and the weight, or None until the layer has run.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        self.layer = layer
        self.image: tuple[Tensor, Tensor] | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) < 3 or args[1] is not self.weight or args[2] is not self.bias or self.weight is None:
            return func(*args, **kwargs)
        return self._separated(func, args[0], self.weight, args[3:], kwargs)

    @without_torch_function
    def _separated(
        self, func: Callable[..., Any], source: Tensor, weight: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        with torch.no_grad():
            image = self._run(func, source, weight, rest, kwargs)
            self.image = (image, weight)
            return image if self.bias is None else image + broadcast(self.bias, self.layer, image.ndim)

    def _run(
        self, func: Callable[..., Any], source: Tensor, weight: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        short = current(weight.device)
        if short is None or source.dtype != torch.float32:
            return func(source, weight, None, *rest, **kwargs)  # type: ignore[no-any-return]
        return func(source.to(short), weight.to(short), None, *rest, **kwargs).to(source.dtype)  # type: ignore[no-any-return]


class OutOfPlace(TorchFunctionMode):
    """Torch function mode that runs an in-place activation out of place. Its input then need not be copied."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "inplace": False} if kwargs.get("inplace") is True else kwargs)


Mode = SeparateBias | OutOfPlace | WeightRecorder


def mode_for(module: nn.Module, rule: Hook) -> Mode | None:
    """Returns the torch function mode in which a module with the given rule runs, or None."""
    if is_quantized(module):
        return None
    if is_affine(module) and _is_rounded(module):  # the output is rounded, so no exact output without bias exists
        return None
    if is_affine(module) and (reads_image(rule) or (isinstance(module, WEIGHTED) and _is_shortened(module))):
        return SeparateBias(module)
    if is_own_layer(module) and is_by_modifiers(rule):
        return WeightRecorder()
    return OutOfPlace() if is_torch_activation(module) and getattr(module, "inplace", False) else None


def _is_shortened(layer: nn.Module) -> bool:
    """Returns True if a layer runs in the dtype of an autocast around the measure."""
    weight = layer._parameters.get("weight")
    return weight is not None and current(weight.device) is not None


def _is_rounded(layer: nn.Module) -> bool:
    """Returns True if the model itself enables autocast for a layer."""
    weight = layer._parameters.get("weight")
    return weight is not None and asked_for(weight.device) is not None


def seen_image(mode: Mode | None, rule: Hook) -> Image | None:
    """Returns the output without bias recorded by a mode, or None if there is none or the rule does not read it."""
    if not isinstance(mode, SeparateBias) or mode.image is None or not reads_image(rule):
        return None
    image, weight = mode.image
    return Image(Saved(image), weight)  # protected: without a bias, it is the output, which may be modified


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish)


def is_torch_activation(module: nn.Module) -> bool:
    """Returns True if a module is an activation of torch whose ``forward`` is not overridden."""
    if not isinstance(module, _ACTIVATIONS) or "forward" in module.__dict__:
        return False
    return any(type(module).forward is kind.forward for kind in _ACTIVATIONS)


def writes_in_place(module: nn.Module) -> bool:
    """Returns True if a module may modify its input in place.

    Modules with ``inplace=False`` never do, and neither do torch's own modules without submodules and this option.
    """
    # getattr on the module would format an error message for every module without the attribute.
    inplace = module.__dict__.get("inplace", getattr(type(module), "inplace", None))
    return not _is_of_torch(module) if inplace is None else inplace is not False


def _is_of_torch(module: nn.Module) -> bool:
    """Returns True if a module without submodules runs the ``forward`` of one of torch's own modules."""
    own = "forward" in module.__dict__ or bool(module._modules)
    return not own and type(module).forward.__module__.startswith("torch.nn.modules.")
