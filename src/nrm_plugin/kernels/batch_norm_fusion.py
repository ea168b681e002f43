r"""Batch-norm fusion: one kernel (map of relevance) for a layer and an adjacent batch normalization.

Kernels are read from copies of the layers, so the model is not changed. Let :math:`g = \gamma / \sqrt{\sigma^2 +
\epsilon}` and :math:`h = \beta - g \mu`, so that ``BN(x) = g x + h``. There are three forms:

- layer → BN: :math:`W' = g W`, :math:`b' = g b + h`;
- BN → layer: :math:`W' = W g`, :math:`b' = b + W * h`, which depends on the position if the layer pads with zeros;
- BN → ReLU → layer: :math:`\mathrm{ReLU}(g x + h) = g\,(\mathrm{clip}(x) - t)` with :math:`t = -h / g`, clipped from
  below at ``t`` where ``g > 0`` and from above where ``g < 0``; :math:`W' = W g`, :math:`b' = b - W * (g t)`.

In each case, the batch normalization itself passes relevance through unchanged. Adjacent layers are identified in the
autograd graph.

Source: arXiv 2002.11018 for the fusion; the treatment of padding and the form with clipping are new in this package.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zennit.rules import Pass

from ..model.affine_layers import Weighted, is_affine, is_torch_class
from ..model.zero_one_routes import source_of
from .layer_call import LayerCall
from .layer_step import LayerStep
from .modified_layers import rerun_without_bias
from .step import Step, step_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fuse(step: LayerStep, source: Tensor) -> None:
    """Schedules the fusion of a new step with the steps that compute its input, if one of the three forms applies.

    Fusion is deferred until the kernel of the layer is built, because only then are all consumers of the layer known. A
    batch normalization is fused into the layer below it if that layer has no other consumer, and otherwise into the
    layer above it.

    Args:
        step: The new step.
        source: The input of the step, attached to the autograd graph.
    """
    below = _producer(source.grad_fn)
    if below is None:
        return
    if _norm(step) is not None:
        if isinstance(below, LayerStep) and _fits_output(step, below):
            step.layer_below = below
            step.joined = (below,)
            below.norms.append(weakref.proxy(step))
            below.folds.append(_later(_fold_output, step, below))
            below.forget_kernel()
    elif _is_weighted(step):
        lower = _producer(_input_node(source_of(source.grad_fn))) if _is_relu(below) else below
        if isinstance(lower, LayerStep) and _norm(lower) is not None:
            lower.feeds_fold = True
            step.joined = (lower,)
            step.folds.append(_later(functools.partial(_fold_input, clipped=lower is not below), step, lower))


def _later(fold: Callable[[LayerStep, LayerStep], None], first: LayerStep, second: LayerStep) -> Callable[[], None]:
    """Returns a function that performs a fusion when the kernel is constructed.

    It holds weak references to the steps. The steps store it, so strong references would form cycles.
    """
    references = weakref.ref(first), weakref.ref(second)

    def run() -> None:
        one, other = (reference() for reference in references)
        if one is not None and other is not None:
            fold(one, other)

    return run


def _producer(node: Any) -> Step | None:
    """Returns the step that computed a tensor, skipping views such as flattening, and in-place writes."""
    return step_of(source_of(node))


def _input_node(node: Any) -> Any:
    return node.next_functions[0][0] if node is not None and node.next_functions else None


def _norm(step: LayerStep) -> nn.modules.batchnorm._BatchNorm | None:
    """Returns the batch-norm module of a step with the rule Pass and running statistics, or None for other steps."""
    norm = step.layer_call.module
    if type(step.layer_call.rule) is not Pass or not isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return None
    return None if norm.running_mean is None or norm.running_var is None else norm


def _affine(step: LayerStep) -> tuple[Tensor, Tensor] | None:
    """Returns the scale ``g`` and shift ``h`` of a step's batch normalization, or None as in :func:`_norm`."""
    norm = _norm(step)
    if norm is None or norm.running_mean is None or norm.running_var is None:
        return None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if not norm.affine:
        return scale, -norm.running_mean * scale
    scale = scale * norm.weight.detach()
    return scale, torch.addcmul(norm.bias.detach(), norm.running_mean, scale, value=-1)


def _is_weighted(step: LayerStep) -> bool:
    module = step.layer_call.module
    return is_affine(module) and isinstance(module, (nn.Linear, Weighted, *_CONVOLUTIONS))


def _is_relu(step: Step) -> bool:
    if not isinstance(step, LayerStep):
        return step.rule == "relu"
    return is_torch_class(step.layer_call.module, nn.ReLU) and type(step.layer_call.rule) is Pass


def _geometry(module: nn.Module) -> tuple[int, bool, bool]:
    """Returns the number of groups of a layer, whether it is transposed, and whether it is fully connected."""
    if isinstance(module, Weighted):
        return module.groups, module.is_transposed, module.bias_dim == -1
    return int(getattr(module, "groups", 1)), isinstance(module, _CONVOLUTIONS[3:]), isinstance(module, nn.Linear)


def _fits_output(norm: LayerStep, layer: LayerStep) -> bool:
    """Returns True if a batch normalization acts on the output channels of a layer."""
    module = _norm(norm)
    if module is None or module.running_mean is None or not _is_weighted(layer) or len(layer.shape) < 2:
        return False
    _, _, dense = _geometry(layer.layer_call.module)
    return layer.shape[1] == len(module.running_mean) and not (dense and len(layer.shape) != 2)


def _fold_output(norm: LayerStep, layer: LayerStep) -> None:
    """Folds a batch normalization into the layer below it."""
    affine = _affine(norm) if norm.is_identity else None
    if affine is None:
        return
    scale, shift = affine
    module = layer.layer_call.module
    groups, transposed, dense = _geometry(module)
    weight, bias = _weight(module), _bias(module)
    changed = _scaled(weight, scale, groups, along_input=False, transposed=transposed)
    view = (-1, *(1,) * (len(layer.shape) - 2))
    flat = bias is None or bias.ndim == 1
    if bias is not None:
        bias = bias * (scale if flat else scale.reshape(view))
    moved = shift if flat else shift.reshape(view)
    layer.set_parameters(changed, moved if bias is None else bias + moved, scale.reshape(view))
    layer.has_dense_norm |= dense


def _fold_input(layer: LayerStep, norm: LayerStep, clipped: bool) -> None:
    """Folds a batch normalization into the layer above it, possibly across a ReLU.

    The layer then reads the input of the batch normalization, clipped if there is a ReLU.
    """
    affine = None if norm.is_identity else _affine(norm)
    if affine is None:
        return
    scale = affine[0]
    call = layer.layer_call
    groups, transposed, dense = _geometry(call.module)
    raw, given = norm.layer_call.input, call.input
    if getattr(call.module, "padding_mode", "zeros") != "zeros" or (dense and given.ndim != 2):
        return
    full_scale, full_shift = (part.reshape(1, -1, *(1,) * (raw.ndim - 2)).expand_as(raw) for part in affine)
    if clipped:
        raw, full_shift = _clipped(raw, full_scale, full_shift)
    if raw.shape != given.shape:  # flattened before a dense layer
        if raw.numel() != given.numel() or len(raw) != len(given):
            return
        raw, full_scale, full_shift = (part.reshape(given.shape) for part in (raw, full_scale, full_shift))
    weight, bias = _weight(call.module), _bias(call.module)
    constant = _without_bias(call, full_shift[:1])
    changed = _scaled(weight, full_scale[0] if dense else scale, groups, along_input=True, transposed=transposed)
    if bias is not None:
        constant = constant + (bias if dense else bias.reshape(1, -1, *(1,) * (constant.ndim - 2)))
    layer.set_parameters(changed, constant[0] if dense else constant)
    layer.set_input(raw)
    layer.has_dense_norm |= dense


def _clipped(raw: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``clip(x)`` and ``-g t`` such that ``ReLU(g x + h) = g (clip(x) - t)``.

    Channels with ``g = 0`` have the constant output ``max(h, 0)``; their ``clip(x)`` is set to zero.
    """
    dead = scale == 0
    threshold = -shift / torch.where(dead, torch.ones_like(scale), scale)
    clip = torch.where(scale > 0, torch.maximum(raw, threshold), torch.minimum(raw, threshold))
    return torch.where(dead, torch.zeros_like(raw), clip), torch.where(dead, shift.clamp(min=0), shift)


def _weight(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    return weight.detach()


def _bias(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


def _without_bias(call: LayerCall, source: Tensor) -> Tensor:
    """Returns the output of a layer without bias at the given input."""
    with torch.no_grad():
        return rerun_without_bias(call.module, call.run)(source, _weight(call.module))


def _scaled(weight: Tensor, scale: Tensor, groups: int, along_input: bool, transposed: bool) -> Tensor:
    """Multiplies a weight by one factor per input or output channel.

    The weight has shape ``(out, in / groups, …)`` in a convolution and ``(in, out / groups, …)`` in a transposed
    convolution.
    """
    rest = (1,) * (weight.ndim - 2)
    if along_input == transposed:
        return weight * scale.reshape(-1, 1, *rest)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * scale.reshape(groups, 1, -1, *rest)).reshape(weight.shape)
