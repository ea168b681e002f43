"""Layers with weights that are called as functions: each gets the rule of the module that owns the weight.

Source: MEASURE, section 5 (ours).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from zennit.rules import Pass

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.layer_call import LayerCall, forward
from ..model.affine import Weighted
from .elementwise import shapes_of
from .products import as_matrix, constants_of, contraction, weighted
from .registry import FunctionCall, Slot, fill, kernel
from .unknown import Unknown

LAYERS: dict[str, Callable[[], nn.Module]] = {  # on a device without values, so that no random number is drawn
    "linear": lambda: nn.Linear(1, 1, device="meta"),
    "conv1d": lambda: nn.Conv1d(1, 1, 1, device="meta"),
    "conv2d": lambda: nn.Conv2d(1, 1, 1, device="meta"),
    "conv3d": lambda: nn.Conv3d(1, 1, 1, device="meta"),
    "conv_transpose1d": lambda: nn.ConvTranspose1d(1, 1, 1, device="meta"),
    "conv_transpose2d": lambda: nn.ConvTranspose2d(1, 1, 1, device="meta"),
    "conv_transpose3d": lambda: nn.ConvTranspose3d(1, 1, 1, device="meta"),
}


kernel(*LAYERS)(contraction)  # of those whose weight is computed; others are read as layer_call before


def layer_call(call: FunctionCall, output: Tensor) -> LayerCall | None:
    """A layer or batch normalization called as a function, as the call of a module; None for anything else."""
    if len(call.saved) != 1 or not isinstance(call.argument(0, "input"), Slot):
        return None
    if call.name == "batch_norm":
        return _norm_call(call, output)
    if call.name not in LAYERS:
        return None
    weight, bias = call.argument(1, "weight"), call.argument(2, "bias")
    rest, options = call.args[3:], {k: v for k, v in call.kwargs.items() if k not in ("input", "weight", "bias")}
    transposed = call.name.startswith("conv_transpose")
    groups = int(call.argument(6, "groups", 1)) if call.name != "linear" else 1

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        result: Tensor = call.function(source, weight, bias, *rest, **options)
        return result

    like = LAYERS[call.name]()
    rule = call.rules.of_weight(weight, like)
    assert rule is not None, "looked up when the function ran"
    dim = -1 if call.name == "linear" else 1
    added = None if bias is None else bias.detach()
    shell = Weighted(run, weight.detach(), added, dim, groups, transposed, twin=_twin(call, like))
    return LayerCall.of(rule.copy(), shell, forward, call.saved[0], output, call.path)


def _twin(call: FunctionCall, like: nn.Module) -> nn.Module:
    """A layer of torch with the options of the call."""
    if isinstance(like, nn.modules.conv._ConvNd):
        count = len(like.kernel_size)
        given = {
            "stride": call.argument(3, "stride", 1),
            "padding": call.argument(4, "padding", 0),
            "output_padding": call.argument(5, "output_padding", 0) if like.transposed else 0,
            "dilation": call.argument(7 if like.transposed else 5, "dilation", 1),
        }
        for option, value in given.items():
            setattr(like, option, value if isinstance(value, str) else _repeated(value, count))
        like.groups = int(call.argument(6, "groups", 1))
        like.kernel_size = tuple(call.argument(1, "weight").shape[2:])
    return like


def _repeated(value: int | Sequence[int], count: int) -> tuple[int, ...]:
    """An option of a convolution for each of its dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values


def _norm_call(call: FunctionCall, output: Tensor) -> LayerCall | None:
    """``F.batch_norm`` as the module that it is the twin of."""
    # torch.batch_norm takes nine arguments in another order, F.batch_norm at most eight.
    swapped = len(call.args) + len(call.kwargs) > 8
    weight_at, mean_at = (1, 3) if swapped else (3, 1)
    mean, var = call.argument(mean_at, "running_mean"), call.argument(mean_at + 1, "running_var")
    if mean is None or var is None or call.argument(5, "training", False):
        return None
    weight, bias = call.argument(weight_at, "weight"), call.argument(weight_at + 1, "bias")
    twin = nn.BatchNorm2d(len(mean), eps=call.argument(7, "eps", 1e-5)).eval()
    twin.running_mean, twin.running_var = mean.detach(), var.detach()
    ones = torch.ones_like(mean)
    twin.weight = nn.Parameter(ones if weight is None else weight.detach(), requires_grad=False)
    twin.bias = nn.Parameter(torch.zeros_like(ones) if bias is None else bias.detach(), requires_grad=False)
    rule = call.rules.of_module(twin)
    own = Pass() if rule is None else rule.copy()
    return LayerCall.of(own, twin, _normed, call.saved[0], output, call.path)


def _normed(module: nn.Module, source: Tensor) -> Tensor:
    """Batch normalization of any rank: the twin is made for images."""
    assert isinstance(module, nn.BatchNorm2d)
    return nn.functional.batch_norm(
        source, module.running_mean, module.running_var, module.weight, module.bias, False, 0.0, module.eps
    )


@kernel("deform_conv2d")
def deformable(call: FunctionCall) -> Kernel:
    """A convolution that reads where offsets say: by the rule of the module that owns the weight."""
    weight, bias, fixed = call.args[1], call.args[4], tuple(call.values[1:])
    if not isinstance(call.args[0], Slot) or isinstance(weight, Slot):
        return Unknown(UnsupportedOperationError(_DEFORMED), shapes_of(call))

    def run(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        filled = fill(call.args, (source, *fixed))
        none = weight.new_zeros(len(weight))
        result: Tensor = call.function(source, weight, *filled[2:4], none if bias is None else bias, *filled[5:])
        return result

    # Where two points lie between the same pixels, an input meets an output through two weights, as in a padding.
    return weighted(call, run, weight, bias, nn.Conv2d(1, 1, 1, device="meta"), 1, "computed")


_DEFORMED = (
    "relevance arrived at 'deform_conv2d' whose weight is computed by the model, which has no kernel. Tell how it "
    "hands relevance down: decorate a function with nrm_plugin.register_kernel(torch.ops.torchvision.deform_conv2d)."
)


def channel_dim(call: FunctionCall) -> int | None:
    """Where a function puts its channels: last where it works on features, 1 on images; None for anything else."""
    if call.name in LAYERS:
        return -1 if call.name == "linear" else 1
    if call.name in ("matmul", "einsum", "tensordot") and len(call.saved) == 1:
        constants = constants_of(call)
        return -1 if constants and as_matrix(call, constants[0])[2] else None
    return -1 if call.name == "scaled_dot_product_attention" else None
