"""Kernels of operations that are no module, and how they are found in a forward pass."""

from ..kernels import Kernel
from . import reductions  # noqa: F401  (registers its kernels)
from .interception import Interception
from .registry import FunctionCall, register_kernel
from .table import BroadcastKernel, SplitKernel

__all__ = ["BroadcastKernel", "FunctionCall", "Interception", "Kernel", "SplitKernel", "register_kernel"]
