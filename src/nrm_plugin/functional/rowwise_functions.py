"""Detection of calls that act on each row (index of the first dimension) separately, whatever the values."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import FUSED, subscripts_of
from .averaging import POOLS
from .elementwise import ACTIVATIONS, ELEMENTWISE
from .function_call import FunctionCall, Slot

_ALONG = {"softmax": 1, "softmin": 1, "log_softmax": 1, "mean": 1, "sum": 1, "cumsum": 1, "logsumexp": 1} | {
    "vector_norm": 2
}
"""Position of the argument ``dim`` of functions that combine elements along a dimension."""
_ELEMENTWISE = frozenset([*ACTIVATIONS, *ELEMENTWISE, "div", "add", "sub", "rsub", "mul", "hypot", "logaddexp"]) | {
    "maximum",
    "minimum",
    "logaddexp2",
    *("to", "type", "type_as", "float", "double", "half", "bfloat16"),
}
_OF_SAMPLES = {"linear": 2, "group_norm": 2, "instance_norm": 3} | {
    f"{kind}{dims}d": dims + 2
    for kind in ("conv", "conv_transpose", "max_pool", "adaptive_max_pool", "fractional_max_pool")
    for dims in (1, 2, 3)
}
"""Minimum number of input dimensions for which each function acts on every sample separately."""
_POOLS = frozenset(POOLS) - {*_ALONG, "grid_sample", "roi_align", "fold", "col2im"}


def keeps_rows(call: FunctionCall, output: Tensor) -> bool:
    """Returns True if each row of the output depends on, and propagates relevance to, the same row of each input."""
    values, name = call.values, call.name
    if not output.ndim or any(value.shape[:1] != output.shape[:1] for value in values):
        return False
    if name == "matmul":
        return _is_product_of_rows(call, output)
    if name == "einsum":
        terms = subscripts_of(call) if len(values) == 2 else None
        return terms is not None and terms[0][:1] == terms[1][:1] == terms[2][:1] != ""
    if name in _ALONG:
        return len(values) == 1 and _is_inner(call.argument(_ALONG[name], "dim"), values[0].ndim)
    if name in ("max", "min", "amax", "amin"):
        return _is_inner(call.argument(1, "dim"), values[0].ndim)
    if name in _OF_SAMPLES:
        return len(values) == 1 and isinstance(call.argument(0, "input"), Slot) and output.ndim >= _OF_SAMPLES[name]
    if any(value.ndim != output.ndim for value in values):
        return False  # broadcasting moves the rows to another dimension of the output
    if name == FUSED:
        return output.ndim > 2
    if name in ("layer_norm", "native_layer_norm", "rms_norm"):
        shape = call.argument(1, "normalized_shape")
        return isinstance(shape, (tuple, list)) and len(shape) < output.ndim
    if name == "normalize":
        return _is_inner(call.argument(2, "dim", 1), output.ndim)
    if name == "renorm":
        dim = call.argument(2, "dim")  # each slice along this dimension has its own norm
        return isinstance(dim, int) and dim % output.ndim == 0
    return name in _ELEMENTWISE or name in _POOLS


def _is_product_of_rows(call: FunctionCall, output: Tensor) -> bool:
    """Returns True if a matrix product acts on each row separately, with a constant factor or as a batched product."""
    dims = [value.ndim for value in call.values]
    first, second = call.argument(0, "input"), call.argument(1, "other")
    if isinstance(first, Slot) and isinstance(second, Tensor) and second.ndim <= 2:
        return dims[0] > 1
    return all(size == output.ndim > 2 for size in dims)


def _is_inner(dim: Any, dims: int) -> bool:
    """Returns True if ``dim`` is given and does not include the first dimension."""
    stored = dim if isinstance(dim, (tuple, list)) else [dim]
    return bool(stored) and all(isinstance(one, int) and one % dims != 0 for one in stored)


__all__ = ["keeps_rows"]
