"""Kernels of averages, sums and interpolation, by the composite's rule for average pooling.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from zennit.core import Hook

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.rule_reader import PlainGradient
from ..rules import Absolute
from .function_call import FunctionCall
from .registry import kernel_of
from .unsupported import UnknownKernel

POOLS = (
    "mean sum avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d "
    "lp_pool2d interpolate upsample upsample_bilinear grid_sample cumsum roi_align fold col2im"
).split()

_BICUBIC_GRID = (
    "relevance arrived at 'grid_sample' with mode='bicubic', whose weights may be negative; it has no kernel. Use "
    "mode='bilinear', or register a kernel: decorate a function with "
    "nrm_plugin.register_kernel(torch.nn.functional.grid_sample)."
)


@kernel_of(*POOLS)
def pooling(call: FunctionCall) -> Kernel:
    """Returns a kernel that applies the composite's rule for average pooling to the tensor that is averaged.

    The other inputs receive no relevance, such as the grid of ``grid_sample`` or the boxes of ``roi_align``.
    """
    mode = str(call.argument(3, "mode", "nearest")) if call.name in ("interpolate", "upsample") else ""
    if mode.startswith("nearest"):
        return call._by_rule(PlainGradient())  # copies values without averaging
    if call.name == "grid_sample" and call.argument(2, "mode", "bilinear") == "bicubic":
        return UnknownKernel(UnsupportedOperationError(_BICUBIC_GRID), call.shapes)
    rule = Absolute() if _is_sum_of_stack(call) else rule_of_averages(call)
    if mode == "bicubic" and isinstance(rule, Absolute):
        return _absolute_bicubic(call, rule)
    if call.name == "lp_pool2d":
        return call._by_rule(rule, run=_power_average(call), is_linear=False)
    return call._by_rule(rule)


def _power_average(call: FunctionCall) -> Callable[[Tensor], Tensor] | None:
    r"""Returns power-average pooling :math:`(\sum_i x_i^p)^{1/p}` with a gradient of zero where the sum is zero.

    There, the gradient of torch is NaN. Returns None if the power is infinite, for which torch takes maxima.
    """
    power, size = call.argument(1, "norm_type"), call.argument(2, "kernel_size")
    stride, ceil_mode = call.argument(3, "stride"), call.argument(4, "ceil_mode", False)
    if math.isinf(power):
        return None
    count = size * size if isinstance(size, int) else math.prod(size)

    def run(source: Tensor) -> Tensor:
        means = nn.functional.avg_pool2d(source.pow(power), size, stride, ceil_mode=ceil_mode)
        sums = count * means
        is_zero = sums == 0
        return torch.where(is_zero, 1, sums).pow(1 / power).masked_fill(is_zero, 0)

    return run


def rule_of_averages(call: FunctionCall) -> Hook:
    """Returns the composite's rule for average pooling, or :class:`~nrm_plugin.rules.Absolute` if it has none."""
    return call.settings.rules.of_module(nn.AvgPool2d(1)) or Absolute()


def _absolute_bicubic(call: FunctionCall, rule: Absolute) -> Kernel:
    r"""Returns the kernel of bicubic interpolation :math:`A X B^\top`, with the weights :math:`|A|` and :math:`|B|`."""
    value = call.values[0]
    height, width = value.shape[-2:]

    def weights(unit: Tensor) -> Tensor:
        # Each channel is a unit vector along one dimension and constant along the other, where weights sum to one.
        return call.run(unit.expand(len(unit), height, width).unsqueeze(0))[0].abs()  # type: ignore[no-any-return]

    with torch.no_grad():
        rows = weights(torch.eye(height, dtype=value.dtype, device=value.device).unsqueeze(2))[:, :, 0]
        columns = weights(torch.eye(width, dtype=value.dtype, device=value.device).unsqueeze(1))[:, 0, :]
    return call._by_rule(rule, run=lambda source: rows.T @ source @ columns)


def _is_sum_of_stack(call: FunctionCall) -> bool:
    """Returns True if a call is ``torch.stack([a, b]).sum(dim)``, equivalent to ``a + b``."""
    return call.name == "sum" and "Stack" in str(getattr(call.inputs[0].producer, "name", lambda: "")())
