"""Kernels of operations that are no module, and how they are found in a forward pass."""

from .interception import Interception
from .registry import FunctionCall, register_kernel

__all__ = ["FunctionCall", "Interception", "register_kernel"]
