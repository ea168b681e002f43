"""Torch function mode that observes the function calls of a forward pass.

A ``TorchFunctionMode`` observes functions, methods and operators before autograd does. A module with a rule is a step
of its own, and functions inside it are not observed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..errors import UnsupportedOperationError, derivative_inside
from ..kernels.forward_state import (
    RUNNING,
    before_writing,
    constants_detached,
    is_foreign,
    is_inside_step,
    is_transformed,
    known_leaves,
    note_leaves,
    note_untracked,
)
from ..model.renormalization import Tables
from ..model.saved_tensor_hooks import saved_in_place
from ..model.trace_guards import without_modes
from .call_handlers import handle
from .function_call import Settings
from .intercepted_pass import InterceptedPass
from .observed_call import ObservedCall
from .registry import name_of

DRAWING = frozenset(
    """
    rand rand_like randn randn_like randint randint_like randperm normal bernoulli multinomial poisson binomial uniform
    exponential geometric cauchy log_normal random gumbel_softmax fractional_max_pool2d fractional_max_pool3d
    """.split()
)
"""Names, without in-place suffixes, of functions that draw random numbers even in evaluation mode."""


class InterceptionMode(TorchFunctionMode):
    """Torch function mode that intercepts the function calls of a forward pass.

    Args:
        settings: Settings of all function steps.
    """

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.forward_pass = InterceptedPass(settings, self)
        RUNNING.renormalized = {}
        self._tables = Tables(RUNNING.renormalized)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        args, kwargs = self._tables.passed(func, args, kwargs or {})
        if getattr(func, "__name__", "").rstrip("_") in DRAWING and RUNNING.listener is not None:
            RUNNING.listener.on_draw(func.__name__, self.forward_pass.path)
        known = None if RUNNING.made is None else known_leaves(args)
        with saved_in_place():
            result = self._result(func, args, kwargs)
        if known is not None:
            note_leaves((result, *args[:1]), known)
        self._tables.check(args, kwargs, result)
        return result

    def _result(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        forward_pass = self.forward_pass
        if is_transformed():
            return func(*args, **kwargs)
        is_inside = is_inside_step()
        if func in _DERIVATIVES and not is_inside:
            raise UnsupportedOperationError(derivative_inside(forward_pass.path))
        if is_inside or not torch.is_grad_enabled():
            if not is_inside:
                self._before_untracked(func, args)
            result = func(*args, **kwargs)
            if not forward_pass.follows_ids:
                return result
            return forward_pass.with_ids(ObservedCall.of(func, args, kwargs, forward_pass.path), result)
        if _reads_no_values(func):
            return func(*args, **kwargs)
        with without_modes():
            call = self._observed(func, args, kwargs)
        return forward_pass.with_ids(call, handle(call, forward_pass))

    def _observed(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> ObservedCall:
        """Returns the observed call, in which tensors that receive no relevance are detached."""
        path = self.forward_pass.path
        if getattr(func, "__name__", "") != "__get__":  # attributes are read from the original tensor
            args = constants_detached(args)
            kwargs = {key: constants_detached(value) for key, value in kwargs.items()}
        call = ObservedCall.of(func, args, kwargs, path)
        if len(call.inputs) > 1 and any(is_foreign(tensor, is_exact=True) for tensor in call.inputs):
            args = constants_detached(args, is_exact=True)
            kwargs = {key: constants_detached(value, is_exact=True) for key, value in kwargs.items()}
            call = ObservedCall.of(func, args, kwargs, path)
        return call

    def _before_untracked(self, func: Callable[..., Any], args: tuple[Any, ...]) -> None:
        """Records a function that runs without gradients, such as those inside ``Function.forward``."""
        note_untracked()
        self.forward_pass.custom_calls.observe(func, args)
        name = name_of(func)
        if args and isinstance(args[0], Tensor) and (name.in_place or name.base == "setitem"):
            before_writing(args[0])


_FORMS = frozenset("dim size stride numel nelement element_size is_floating_point is_complex".split())
"""Tensor methods that read only the shape or dtype."""
_ATTRIBUTES = frozenset("shape ndim dtype device layout requires_grad is_leaf".split())
"""Tensor attributes that do not depend on values."""


_DERIVATIVES = frozenset([torch.autograd.grad, torch.autograd.backward, Tensor.backward])
"""Functions that differentiate. During interception, they would return relevance instead of gradients."""


def _reads_no_values(func: Callable[..., Any]) -> bool:
    """Returns True if a function reads no values of a tensor and need not be observed."""
    name = getattr(func, "__name__", "")
    owner = getattr(func, "__self__" if name == "__get__" else "__objclass__", None)
    if name == "__get__":
        return getattr(owner, "__name__", "") in _ATTRIBUTES
    return name in _FORMS and owner is torch._C.TensorBase


__all__ = ["InterceptionMode"]
