"""The mode that observes every function that a model calls in one forward pass.

A ``TorchFunctionMode`` sees functions, methods and operators before autograd does. Modules with a rule are steps of
their own; functions inside them are not observed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..kernels.forward_state import before_writing, constants_detached, is_inside_step
from .function_call import Settings
from .handlers import handle
from .intercepted_pass import InterceptedPass
from .observed_call import ObservedCall
from .registry import name_of


class InterceptionMode(TorchFunctionMode):
    """One forward pass under interception.

    Args:
        settings: What all steps of functions depend on.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.forward_pass = InterceptedPass(settings, self)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_inside_step():
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            return self._inside_custom_function(func, args, kwargs)
        if getattr(func, "__name__", "") != "__get__":  # attributes are read from the tensor itself
            args = constants_detached(args)
            kwargs = {key: constants_detached(value) for key, value in kwargs.items()}
        return handle(ObservedCall.of(func, args, kwargs, self.forward_pass.path), self.forward_pass)

    def _inside_custom_function(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs a function without gradients, as in the forward of an ``autograd.Function``."""
        self.forward_pass.custom_calls.observe(func, args)
        name = name_of(func)
        if args and isinstance(args[0], Tensor) and (name.in_place or name.base == "setitem"):
            before_writing(args[0])
        return func(*args, **kwargs)


__all__ = ["InterceptionMode"]
