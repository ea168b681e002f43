"""Kernels of functions and operators such as ``a + b``, ``F.linear`` and attention, and interception of their calls.

A kernel is the linear map by which a call propagates relevance. An intercepted call with its kernel is a *step* of the
computation graph.

Imports: errors, model, rules, kernels.
"""

from ..kernels.base import Kernel
from . import (  # noqa: F401  (imported to register kernels)
    averaging,
    decompositions,
    distance_decompositions,
    elementwise,
    linear_algebra,
    quantiles_and_integrals,
    reductions,
    scatter,
)
from .canonizer import Interception
from .function_call import FunctionCall
from .function_kernels import BroadcastKernel, SplitKernel
from .registry import register_kernel

__all__ = ["BroadcastKernel", "FunctionCall", "Interception", "Kernel", "SplitKernel", "register_kernel"]
