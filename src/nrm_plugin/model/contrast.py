r"""Contrasts: signed weights of the outputs, for example one class against all others, with :math:`g = \sum_k s_k f_k`.

Source: docs/differences.md.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import TargetError, brief, samples
from .targets import chosen_target, sample_norms, sample_sums, start_vector

REST = "rest"
"""Value of ``against`` that stands for all other classes, weighted by their softmax."""
MIN_CONTRAST = 1e-6
r"""Smallest :math:`|g|` that can be explained, relative to :math:`\sum |s f|`."""


def contrast_vector(outputs: Tensor, target: Any, against: Any, batched: bool = True) -> Tensor:
    r"""Computes the weights ``s`` of the outputs, of the same shape ``(N, …)``.

    Args:
        outputs: The outputs of shape ``(N, …)``; a single sample without a batch dimension is passed as ``(1, …)``.
        target: A target as accepted by :func:`~nrm_plugin.model.targets.start_vector`, or a function that returns one.
        against: ``"rest"`` for :math:`s = e_c - \sum_{k \neq c} p_k e_k`, where ``p`` is the softmax over the other
            classes, treated as a constant; a target, for the difference between two outputs; or a function of the
            outputs that returns one of these. The function may also return the complete weights ``s`` as floating-point
            numbers; ``target`` must then be None.
        batched: Whether the first dimension of the model's outputs is the batch.

    Raises:
        TargetError: If an argument does not match the outputs, or both targets are the same output.
    """
    own = outputs if batched else outputs.squeeze(0)
    if callable(against):
        against = against(own.clone())
        if _is_vector(against):
            return _whole(outputs, target, against)
    positive = start_vector(outputs, chosen_target(target, own.clone(), batched))
    if isinstance(against, str):
        if against != REST:
            raise TargetError(f'against={brief(against)} is not "{REST}", nor a target: {_FORMS}')
        return positive - _rest(outputs, positive, batched)
    if against is None:
        raise TargetError(f"against= is a function of the outputs and returned None. It must return a target: {_FORMS}")
    negative = start_vector(outputs, chosen_target(against, own.clone(), batched))
    same = (positive == negative).flatten(1).all(1)
    if bool(same.any()):
        raise TargetError(
            f"target= and against= are the same output ({samples(same.tolist())}), so their difference is 0. Give "
            f'another output, or against="{REST}" for all others.'
        )
    return positive - negative


def explained_number(outputs: Tensor, vector: Tensor) -> Tensor:
    r"""Computes the contrast :math:`g = \sum_k s_k f_k` of each sample, as a tensor of shape ``(N,)``.

    Args:
        outputs: The outputs of shape ``(N, …)``.
        vector: The weights ``s``, of shape ``(N, …)``.

    Raises:
        TargetError: If the weighted outputs of a sample cancel. Relevance then cannot be normalized.
    """
    parts = vector * outputs
    total, size = sample_sums(parts), sample_norms(parts)
    bad = total.abs() <= MIN_CONTRAST * size
    if bool(bad.any()):
        raise TargetError(
            f"the contrast is 0 up to rounding ({samples(bad.tolist())}): the compared outputs are equal, so there is "
            "nothing to normalize. Give another against=, or omit it to explain the output itself."
        )
    return total


def _is_vector(value: Any) -> bool:
    """Returns True if a value is an array of floating-point weights rather than of indices."""
    kind = getattr(value, "dtype", None)
    if isinstance(value, Tensor):
        return value.is_floating_point()
    return kind is not None and getattr(kind, "kind", "") == "f"


def _whole(outputs: Tensor, target: Any, vector: Any) -> Tensor:
    if target is not None:
        raise TargetError(
            "against= is a function that returned floating-point numbers, the weights of all outputs including the "
            "explained one. Omit target=, or return the index of the output to compare with."
        )
    return start_vector(outputs, start=vector)


def _rest(outputs: Tensor, positive: Tensor, batched: bool) -> Tensor:
    """Returns the softmax over the other classes in the rows that contain the target and zeros in all other rows."""
    has_classes = sum(size > 1 for size in outputs.shape[1:]) == 1
    if not has_classes and (batched or outputs.ndim != 3 or outputs.shape[-1] < 2):
        raise TargetError(
            f'against="{REST}" compares a class with the others, so outputs must be scores of classes, (N, C), '
            f"but their shape is {tuple(outputs.shape)}. Give the output to compare with, or a function of the outputs "
            "that returns the weights of all outputs."
        )
    form = (len(outputs), -1) if has_classes else outputs.shape
    is_target = positive.reshape(form) != 0
    others = outputs.to(positive.dtype).reshape(form).masked_fill(is_target, -torch.inf)
    return (torch.softmax(others, -1) * is_target.any(-1, keepdim=True)).reshape(positive.shape)


_FORMS = "an int, a tuple of ints for an output of several dimensions, or a list or tensor of one for each sample."

__all__ = ["MIN_CONTRAST", "REST", "contrast_vector", "explained_number"]
