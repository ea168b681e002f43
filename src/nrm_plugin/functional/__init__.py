"""Kernels of functions and operators (``a + b``, attention, ``F.linear``), and the mode that intercepts them.

Imports: errors, model, rules, kernels.
"""

from ..kernels.base import Kernel
from . import reductions  # noqa: F401  (registers its kernels)
from .canonizer import Interception
from .elementwise import BroadcastKernel, SplitKernel
from .registry import FunctionCall, register_kernel

__all__ = ["BroadcastKernel", "FunctionCall", "Interception", "Kernel", "SplitKernel", "register_kernel"]
