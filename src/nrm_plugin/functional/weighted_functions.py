"""Functional layers with weights, which use the rule of the module that owns the weight.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from zennit.rules import Pass

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.known_rules import own_copy
from ..kernels.layer_call import LayerCall, forward
from ..model.affine_layers import LAYERS, Weighted, layer_like
from ..model.shallow_copies import shared_copy
from .function_call import FunctionCall, Slot, fill
from .products import constants_of, contraction, kernel_of_layer, matrix_of
from .registry import kernel_of
from .unsupported import UnknownKernel

kernel_of(*LAYERS)(contraction)  # for computed weights; with a constant weight, layer_call creates the kernel


def layer_call(call: FunctionCall, output: Tensor) -> LayerCall | None:
    """Converts a functional layer or batch normalization to the call of a module. Returns None for other functions."""
    if len(call.inputs) != 1 or not isinstance(call.argument(0, "input"), Slot):
        return None
    if call.name == "batch_norm":
        return _batch_norm_call(call, output)
    return _weighted_call(call, output) if call.name in LAYERS else None


def _weighted_call(call: FunctionCall, output: Tensor) -> LayerCall:
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    rest = call.args[3:]
    options = {key: value for key, value in call.kwargs.items() if key not in ("input", "weight", "bias")}

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = call.function(source, weight, bias, *rest, **options)
        return result

    like = layer_like(call.name)
    rule = call.settings.rules.of_weight(weight, like, call.path)
    assert rule is not None, "checked when the function ran"
    dim, groups = (-1, 1) if call.name == "linear" else (1, int(call.argument(6, "groups", 1)))
    shell = Weighted(
        run,
        weight.detach(),
        None if bias is None else bias.detach(),
        dim,
        groups,
        call.name.startswith("conv_transpose"),
        twin=twin_of_call(call, like),
    )
    return LayerCall.of(own_copy(rule), shell, forward, call.inputs[0].saved, output, call.path)


def twin_of_call(call: FunctionCall, like: nn.Module) -> nn.Module:
    """Returns a layer configured with the options of a functional call."""
    if isinstance(like, nn.modules.conv._ConvNd):
        dims = len(like.kernel_size)
        options = {
            "stride": call.argument(3, "stride", 1),
            "padding": call.argument(4, "padding", 0),
            "output_padding": call.argument(5, "output_padding", 0) if like.transposed else 0,
            "dilation": call.argument(7 if like.transposed else 5, "dilation", 1),
        }
        for option, value in options.items():
            setattr(like, option, value if isinstance(value, str) else _repeated(value, dims))
        like.groups = int(call.argument(6, "groups", 1))
        like.kernel_size = tuple(call.argument(1, "weight").shape[2:])
    return like


def _repeated(value: int | Sequence[int], dims: int) -> tuple[int, ...]:
    """Expands a convolution option to one value per spatial dimension."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


_NORM = nn.BatchNorm2d(1, device="meta").eval()
"""Template for functional batch normalization. Copying it is faster than constructing a module."""


def _batch_norm_call(call: FunctionCall, output: Tensor) -> LayerCall | None:
    """Converts ``F.batch_norm`` to a call of ``nn.BatchNorm2d``. Returns None if it uses batch statistics."""
    # torch.batch_norm takes nine arguments in another order, F.batch_norm at most eight.
    swapped = len(call.args) + len(call.kwargs) > 8
    weight_at, mean_at = (1, 3) if swapped else (3, 1)
    mean, var = call.argument(mean_at, "running_mean"), call.argument(mean_at + 1, "running_var")
    if mean is None or var is None or call.argument(5, "training", False):
        return None
    weight, bias = call.argument(weight_at, "weight"), call.argument(weight_at + 1, "bias")
    twin = shared_copy(_NORM)
    assert isinstance(twin, nn.BatchNorm2d)
    twin.num_features, twin.eps = len(mean), call.argument(7, "eps", 1e-5)
    twin._buffers.update(running_mean=mean.detach(), running_var=var.detach())
    ones = torch.ones_like(mean)
    twin._parameters["weight"] = nn.Parameter(ones if weight is None else weight.detach(), requires_grad=False)
    twin._parameters["bias"] = nn.Parameter(torch.zeros_like(ones) if bias is None else bias.detach(), False)
    rule = call.settings.rules.of_module(twin)
    own = Pass() if rule is None else own_copy(rule)
    return LayerCall.of(own, twin, _batch_norm, call.inputs[0].saved, output, call.path)


def _batch_norm(module: nn.Module, source: Tensor) -> Tensor:
    """Applies ``nn.BatchNorm2d`` to an input of any rank."""
    assert isinstance(module, nn.BatchNorm2d)
    return nn.functional.batch_norm(
        source, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
    )


@kernel_of("deform_conv2d")
def deformable_convolution(call: FunctionCall) -> Kernel:
    """Returns the kernel of a convolution with computed offsets, by the rule of the module that owns the weight."""
    weight, bias, fixed = call.args[1], call.args[4], tuple(call.values[1:])
    if not isinstance(call.args[0], Slot) or isinstance(weight, Slot):
        return UnknownKernel(UnsupportedOperationError(_COMPUTED_WEIGHT), call.shapes)

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        filled = fill(call.args, (source, *fixed))
        none = weight.new_zeros(len(weight))
        result: Tensor = call.function(source, weight, *filled[2:4], none if bias is None else bias, *filled[5:])
        return result

    # If two points lie between the same pixels, an input contributes to an output through two weights.
    return kernel_of_layer(call, run, weight, bias, layer_like("conv2d"), 1, "computed")


_COMPUTED_WEIGHT = (
    "relevance arrived at 'deform_conv2d' whose weight is computed by the model, which has no kernel. Register a "
    "kernel by decorating a function with nrm_plugin.register_kernel(torch.ops.torchvision.deform_conv2d)."
)


def channel_dim(call: FunctionCall) -> int | None:
    """Returns the channel dimension of the output: -1 for features, 1 for images, or None if it has no channels."""
    if call.name in LAYERS:
        return -1 if call.name == "linear" else 1
    if call.name in ("matmul", "einsum", "tensordot") and len(call.inputs) == 1:
        constants = constants_of(call)
        return -1 if constants and matrix_of(call, constants[0]).is_layer else None
    return -1 if call.name == "scaled_dot_product_attention" else None


__all__ = ["channel_dim", "layer_call", "twin_of_call"]
