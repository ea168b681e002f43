r"""Batch-norm fusion: the layer next to a batch normalization takes it over, in the shells that kernels are read from.

With :math:`g = \gamma / \sqrt{\sigma^2 + \epsilon}` and :math:`h = \beta - g \mu`, so that ``BN(x) = g x + h``:

- layer → BN: :math:`W' = g W`, :math:`b' = g b + h`;
- BN → layer: :math:`W' = W g`, :math:`b' = b + W * h`, where a zero padding makes the bias depend on the position;
- BN → ReLU → layer: :math:`\mathrm{ReLU}(g x + h) = g\,(\mathrm{clip}(x) - t)` with :math:`t = -h / g`, the clip from
  below at ``t`` where ``g > 0`` and from above where ``g < 0``; :math:`W' = W g`, :math:`b' = b - W * (g t)`.

The batch normalization itself then hands relevance through. Neighbours are found in the executed graph. Nothing of
the model is written to, so its outputs cannot change.

Source: arXiv 2002.11018 for fusion; the border and the clipped form are textbook algebra.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zennit.rules import Pass

from ..model.affine import Weighted, is_affine
from ..model.routing import source_of
from .forward_state import Saved
from .step import LayerCall, Step

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fuse(step: Step, source: Tensor) -> None:
    """Prepares the fusion of a new step with the steps that made its input, where one of the three forms fits.

    It is done when the kernel of the layer is made: only then it is known who reads what the layer returned. A batch
    normalization goes into the layer below it if nobody else reads that layer, else into the layer above.

    Args:
        step: The step.
        source: Its input, in the autograd graph.
    """
    below = _producer(source.grad_fn)
    if below is None:
        return
    if _affine(step) is not None:
        if _fits_output(step, below):
            step.origin.layer = below
            below.origin.norms.append(weakref.proxy(step))
            below.origin.folds.append(_later(_fold_output, step, below))
            below.forget()
    elif _is_weighted(step):
        lower = _producer(_input_node(source_of(source.grad_fn))) if _is_relu(below) else below
        if lower is not None and _affine(lower) is not None:
            step.origin.folds.append(_later(functools.partial(_fold_input, clipped=lower is not below), step, lower))


def _later(fold: Callable[[Step, Step], None], first: Step, second: Step) -> Callable[[], None]:
    """A fold to be done when a kernel is made. It keeps no step alive, for a step keeps its folds."""
    some, others = weakref.ref(first), weakref.ref(second)

    def run() -> None:
        one, other = some(), others()
        if one is not None and other is not None:
            fold(one, other)

    return run


def _producer(node: Any) -> Step | None:
    """The step that made a tensor, looking through views (flattening is one) and writes in place."""
    step = getattr(source_of(node), "step", None)
    return step if isinstance(step, Step) else None


def _input_node(node: Any) -> Any:
    return node.next_functions[0][0] if node is not None and node.next_functions else None


def _affine(step: Step) -> tuple[Tensor, Tensor] | None:
    """``(g, h)`` of a batch normalization in evaluation mode that hands relevance through; None for anything else."""
    origin = step.origin
    if not isinstance(origin, LayerCall) or type(origin.rule) is not Pass:
        return None
    norm = origin.module
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None or norm.running_var is None:
        return None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.affine:
        scale = scale * norm.weight.detach()
    shift = -norm.running_mean * scale
    return scale, shift if not norm.affine else shift + norm.bias.detach()


def _is_weighted(step: Step) -> bool:
    origin = step.origin
    if not isinstance(origin, LayerCall) or not is_affine(origin.module):
        return False
    return isinstance(origin.module, (nn.Linear, Weighted, *_CONVOLUTIONS))


def _is_relu(step: Step) -> bool:
    origin = step.origin
    return step.rule == "relu" or (
        isinstance(origin, LayerCall) and type(origin.module) is nn.ReLU and type(origin.rule) is Pass
    )


def _geometry(module: nn.Module) -> tuple[int, bool, bool]:
    """``(groups, is transposed, is dense)``."""
    if isinstance(module, Weighted):
        return module.groups, module.is_transposed, module.bias_dim == -1
    return int(getattr(module, "groups", 1)), isinstance(module, _CONVOLUTIONS[3:]), isinstance(module, nn.Linear)


def _fits_output(norm: Step, layer: Step) -> bool:
    """Whether a batch normalization has one entry for each channel that a layer returns."""
    affine = _affine(norm)
    if affine is None or not _is_weighted(layer) or len(layer.shape) < 2:
        return False
    _, _, dense = _geometry(layer.origin.module)
    return layer.shape[1] == len(affine[0]) and not (dense and len(layer.shape) != 2)


def _fold_output(norm: Step, layer: Step) -> None:
    """Layer → BN."""
    affine = _affine(norm)
    if affine is None or not norm.origin.is_identity:
        return
    scale, shift = affine
    origin: LayerCall = layer.origin
    groups, transposed, dense = _geometry(origin.module)
    weight = _parameter(origin.module, "weight")
    assert weight is not None
    bias = _parameter(origin.module, "bias")
    changed = _scaled(weight, scale, groups, along_input=False, transposed=transposed)
    view = (-1, *(1,) * (len(layer.shape) - 2))
    flat = bias is None or bias.ndim == 1
    if bias is not None:
        bias = bias * (scale if flat else scale.reshape(view))
    moved = shift if flat else shift.reshape(view)
    origin.change(changed, moved if bias is None else bias + moved, scale.reshape(view))
    origin.holds_dense_norm |= dense


def _fold_input(layer: Step, norm: Step, clipped: bool) -> None:
    """BN → layer, or BN → ReLU → layer; the layer reads the input of the batch normalization."""
    affine = _affine(norm)
    if affine is None or norm.origin.is_identity:
        return
    scale, shift = affine
    origin: LayerCall = layer.origin
    groups, transposed, dense = _geometry(origin.module)
    raw, seen = norm.origin.source.tensor, origin.source.tensor
    if getattr(origin.module, "padding_mode", "zeros") != "zeros" or (dense and seen.ndim != 2):
        return
    view = (1, -1, *(1,) * (raw.ndim - 2))
    full_scale = scale.reshape(view).expand_as(raw)
    full_shift = shift.reshape(view).expand_as(raw)
    if clipped:
        # max(g x + h, 0) = g (clip(x) - t): where g = 0 the channel is the constant max(h, 0), and clip(x) is set to t.
        dead = full_scale == 0
        threshold = -full_shift / torch.where(dead, torch.ones_like(full_scale), full_scale)
        clip = torch.where(full_scale > 0, torch.maximum(raw, threshold), torch.minimum(raw, threshold))
        raw = torch.where(dead, torch.zeros_like(raw), clip)
        full_shift = torch.where(dead, full_shift.clamp(min=0), full_shift)
    if raw.shape != seen.shape:  # flattened on the way to a dense layer
        if raw.numel() != seen.numel() or len(raw) != len(seen):
            return
        raw, full_scale, full_shift = (part.reshape(seen.shape) for part in (raw, full_scale, full_shift))
    weight, bias = _parameter(origin.module, "weight"), _parameter(origin.module, "bias")
    assert weight is not None
    constant = _without_bias(origin, full_shift[:1])
    per_input = full_scale[0] if dense else scale
    changed = _scaled(weight, per_input, groups, along_input=True, transposed=transposed)
    if bias is not None:
        constant = constant + (bias if dense else bias.reshape(1, -1, *(1,) * (constant.ndim - 2)))
    origin.change(changed, constant[0] if dense else constant)
    origin.source = Saved(raw, values=False)  # the model has run, so nothing is written any more
    origin.holds_dense_norm |= dense


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    found = module._parameters.get(name)
    return None if found is None else found.detach()


def _without_bias(origin: LayerCall, source: Tensor) -> Tensor:
    kept = origin.module._parameters["bias"]
    origin.module._parameters["bias"] = None
    try:
        with torch.no_grad():
            return origin.call(origin.module, source)
    finally:
        origin.module._parameters["bias"] = kept


def _scaled(weight: Tensor, scale: Tensor, groups: int, along_input: bool, transposed: bool) -> Tensor:
    """The weight with one factor for each input or output channel.

    A convolution has ``(out, in / groups, …)``, a transposed one ``(in, out / groups, …)``.
    """
    rest = (1,) * (weight.ndim - 2)
    if along_input == transposed:
        return weight * scale.reshape(-1, 1, *rest)
    grouped = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return (grouped * scale.reshape(groups, 1, -1, *rest)).reshape(weight.shape)
