"""Where a measure starts: targets and start vectors as signed laws over the output neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import TargetError

MIN_TOTAL = 1e-6
"""Smallest |Σ s| in units of Σ|s| for which a start vector has a measure."""


def start_vector(output: Tensor, target: Any = None, start: Any = None) -> Tensor:
    """The unnormalized start ``s``, shape of the output ``(N, …)``.

    Args:
        output: The model's output.
        target: As in Captum: None for one output a sample, an int or a tuple for all samples, or a list or tensor of
            them with one for each sample.
        start: A signed vector over the outputs instead, ``(N, …)`` or without the batch.

    Raises:
        TargetError: Neither or both fit.
    """
    if start is not None:
        if target is not None:
            raise TargetError("give target= or start=, not both: a target is the start vector of one output.")
        return _signed(output, start)
    return _one_hot(output, target)


def normalized(start: Tensor) -> Tensor:
    r""":math:`\mu(n_L = k) = s_k / \sum s` for every sample.

    Raises:
        TargetError: A sample whose entries cancel or are all zero.
    """
    total = start.flatten(1).sum(1)
    absolute = start.flatten(1).abs().sum(1)
    bad = total.abs() <= MIN_TOTAL * absolute
    if bool(bad.any()):
        raise TargetError(
            f"the start vector sums to 0 in samples {bad.nonzero().flatten().tolist()}, so it cannot be normalized. "
            "A difference of outputs has no measure: take the measure of each output and subtract the queries."
        )
    return start / total.reshape(-1, *(1,) * (start.ndim - 1))


def _signed(output: Tensor, start: Any) -> Tensor:
    vector = torch.as_tensor(start, dtype=output.dtype, device=output.device)
    if vector.shape == output.shape[1:]:
        vector = vector.expand(output.shape)
    if vector.shape != output.shape:
        raise TargetError(
            f"the start vector has shape {tuple(vector.shape)}, the output {tuple(output.shape)}; give one entry for "
            "each output, with or without the batch."
        )
    if not bool(torch.isfinite(vector).all()):
        raise TargetError("the start vector has nan or inf entries.")
    return vector.detach().clone()


def _one_hot(output: Tensor, target: Any) -> Tensor:
    shape = output.shape[1:]
    if target is None:
        if shape.numel() != 1:
            raise TargetError(
                f"the output has shape {tuple(output.shape)}, so target= must say which of its {shape.numel()} entries "
                "a sample is explained for; `model(inputs).argmax(1)` explains the predicted class."
            )
        return torch.ones_like(output).detach()
    indices = _indices(target, len(output))
    start = torch.zeros_like(output).detach()
    for sample, index in enumerate(indices):
        if len(index) != len(shape):
            raise TargetError(
                f"target {index if len(index) != 1 else index[0]} has {len(index)} indices, an output of shape "
                f"{tuple(output.shape)} needs {len(shape)} for each sample."
            )
        if any(not -size <= entry < size for entry, size in zip(index, shape, strict=True)):
            raise TargetError(
                f"target {index} of sample {sample} is out of range for an output of shape {tuple(output.shape)}."
            )
        start[(sample, *index)] = 1
    return start


def _indices(target: Any, batch: int) -> list[tuple[int, ...]]:
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.dtype == torch.bool:
            raise TargetError(f"target has dtype {target.dtype}; a target is an index, so use integers.")
        target = target.tolist()
    if isinstance(target, bool) or not isinstance(target, (int, tuple, list)):
        raise TargetError(f"target is {type(target).__name__}; give an int, a tuple, or a list or tensor of them.")
    if isinstance(target, int):
        return [(target,)] * batch
    if isinstance(target, tuple):
        return [_tuple(target)] * batch
    if len(target) == 1 and batch != 1:
        target = target * batch
    if len(target) != batch:
        raise TargetError(f"target has {len(target)} entries for {batch} samples; give one for all or one for each.")
    return [_tuple(entry) if isinstance(entry, (tuple, list)) else _tuple((entry,)) for entry in target]


def _tuple(entry: Any) -> tuple[int, ...]:
    if any(isinstance(number, bool) or not isinstance(number, int) for number in entry):
        raise TargetError(f"target {entry!r} is not made of integers.")
    return tuple(entry)
