"""Targets, start vectors, and their normalization to a signed measure on the output neurons.

Source: docs/measure.md.
"""

from __future__ import annotations

import functools
import operator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import TargetError, brief, samples
from .autocast import working_dtype
from .devices import by_sample

MIN_TOTAL = 1e-6
"""Smallest |Σ s|, relative to Σ|s|, for which a start vector can be normalized."""


def sample_sums(tensor: Tensor) -> Tensor:
    """Sums a tensor over all dimensions but the first. Unlike ``flatten(1)``, accepts the shape ``(N,)``."""
    return tensor.clone() if tensor.ndim == 1 else tensor.sum(tuple(range(1, tensor.ndim)))


def one_row(tensor: Tensor) -> Tensor:
    """Returns a tensor that belongs to a single sample with a first dimension of size one."""
    return tensor if tensor.ndim > 1 and tensor.shape[0] == 1 else tensor.unsqueeze(0)


def sample_norms(tensor: Tensor) -> Tensor:
    """Computes the L1 norm of each sample of a tensor of shape ``(N, …)``. Returns shape ``(N,)``."""
    if tensor.device.type != "cpu":
        return sample_sums(tensor.abs())
    if 0 < tensor.numel() <= 1 << 16 and tensor.ndim > 1:
        return tensor.abs().sum(tuple(range(1, tensor.ndim)))
    flat = tensor.reshape(len(tensor), -1)
    # Each part fits into the CPU cache.
    parts = [part.abs().sum(1) for part in torch.split(flat, max(1, (1 << 16) // len(flat)), 1)]
    return functools.reduce(torch.add, parts) if parts else flat.new_zeros(len(flat))


def chosen_target(target: Any, outputs: Tensor, batched: bool = True) -> Any:
    """Evaluates a target that is given as a function. Returns other targets unchanged.

    Args:
        target: A target as accepted by :func:`start_vector`, or a function that computes it from the outputs.
        outputs: The model's outputs.
        batched: Whether the first dimension of the outputs is the batch. If it is not, and the output is a single row
            of scores of shape ``(1, C)``, as in graph classification, the target may be a single class index.

    Raises:
        TargetError: If the function does not return a target.
    """
    if callable(target):
        target = target(outputs)
        is_target = target is None or isinstance(target, (int, tuple, list)) or hasattr(target, "__array__")
        if not is_target:
            raise TargetError(
                f"target= is a function of the outputs and returned {type(target).__name__}: {brief(target)}. It must "
                "return a target: an int, a tuple of ints, or a list or tensor of one for each sample."
            )
    if batched or outputs.ndim != 2 or len(outputs) != 1:
        return target
    is_number = isinstance(target, int) or (isinstance(target, (list, Tensor)) and torch.as_tensor(target).numel() == 1)
    return (0, int(torch.as_tensor(target))) if is_number else target


def start_vector(output: Tensor, target: Any = None, start: Any = None) -> Tensor:
    """Computes the unnormalized start vector ``s``, with the shape of the output and a dtype of at least float32.

    Args:
        output: The model's output, of shape ``(N, …)``.
        target: As in Captum: None if there is one output per sample, an int or a tuple for all samples, or a list or
            tensor with one index per sample.
        start: Signed weights of the outputs, with or without the batch dimension, or a function that computes them from
            the outputs; used in place of a target.

    Raises:
        TargetError: If both target and start are given, or if one of them does not match the output.
    """
    output = output.to(working_dtype(output.dtype))
    if start is not None:
        if target is not None:
            raise TargetError("give target= or start=, not both: a target is the start vector of one output.")
        return _signed(output, start(output) if callable(start) else start)
    return _one_hot(output, target)


def normalized(start: Tensor) -> Tensor:
    r"""Normalizes a start vector per sample, :math:`\mu(n_L = k) = s_k / \sum s`.

    Raises:
        TargetError: If the weights of a sample cancel or are all zero.
    """
    total, absolute = sample_sums(start), sample_sums(start.abs())
    bad = total.abs() <= MIN_TOTAL * absolute
    if bool(bad.any()):
        raise TargetError(
            f"the start vector sums to 0 ({samples(bad.tolist())}), so it cannot be normalized. To explain a "
            "difference of outputs, pass the other output as against=: RelevanceMeasure(model, inputs, target, "
            "against=other)."
        )
    return start / by_sample(total, start)


class Neurons:
    """Function of a layer's output that returns the initial relevance of the neurons chosen by ``neuron_selector``.

    Args:
        selector: As Captum's ``neuron_selector``: an int, a tuple of ints and slices, or a function of the output of
            the layer.

    Attributes:
        activation: Sum of the selected activations, of shape ``(N,)``; set when the start vector is computed.
    """

    def __init__(self, selector: Any) -> None:
        self.selector = selector
        self.activation = torch.empty(0)

    def __call__(self, values: Tensor) -> Tensor:
        """Returns the start vector for a layer output of shape ``(N, …)``."""
        slope = self.slope(values)
        self.activation = (slope * values).flatten(1).sum(1)
        if bool((slope != 0).flatten(1).sum(1).le(1).all()):
            return slope  # a single neuron receives all the mass, even if it is not active
        start = slope * values
        silent = (start == 0).flatten(1).all(1).reshape(-1, *(1,) * (values.ndim - 1))
        return torch.where(silent, slope, start)

    def slope(self, values: Tensor) -> Tensor:
        """Returns the gradient of the summed selected activations, as a tensor of shape ``(N, …)``."""
        if callable(self.selector):
            with torch.enable_grad():
                leaf = values.detach().requires_grad_()
                chosen = self.selector(leaf)
                if not isinstance(chosen, Tensor) or chosen.grad_fn is None:
                    raise TargetError("the neuron selector returned nothing that depends on the output of the layer.")
                return torch.autograd.grad(chosen.sum(), leaf)[0]
        index = self.selector if isinstance(self.selector, tuple) else (self.selector,)
        shape = tuple(values.shape)
        if len(index) != values.ndim - 1 or not all(_is_index(entry) for entry in index):
            raise TargetError(
                f"neuron_selector={brief(self.selector)} does not select neurons of a layer of shape {shape}: give "
                f"{values.ndim - 1} ints or slices, or a function of the layer's output."
            )
        slope = torch.zeros_like(values)
        try:
            slope[(slice(None), *index)] = 1
        except IndexError as error:
            raise TargetError(
                f"neuron_selector={brief(self.selector)} is out of range for a layer of shape {shape}."
            ) from error
        return slope


def _is_index(entry: Any) -> bool:
    if isinstance(entry, slice):
        return all(end is None or _is_whole(end) for end in (entry.start, entry.stop, entry.step))
    return _is_whole(entry)


def _is_whole(entry: Any) -> bool:
    """Returns True if a value is an integer, excluding booleans and arrays, which also implement ``__index__``."""
    return isinstance(entry, (int, np.integer)) and not isinstance(entry, bool)


def _signed(output: Tensor, start: Any) -> Tensor:
    vector = _real(start)
    if vector.shape == output.shape[1:]:
        vector = vector.expand(output.shape)
    if vector.shape != output.shape:
        raise TargetError(
            f"the start vector has shape {tuple(vector.shape)}, the output {tuple(output.shape)}; give one entry for "
            "each output, with or without the batch."
        )
    if not bool(torch.isfinite(vector).all()):
        raise TargetError(
            "the start vector has nan or inf entries; give finite numbers, 0 for outputs that are not explained."
        )
    return vector.to(output).clone()


def _real(start: Any) -> Tensor:
    try:
        vector = start.detach() if isinstance(start, Tensor) else torch.as_tensor(start)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TargetError(
            f"start is {type(start).__name__}, which cannot be converted to a vector ({error}). Give a tensor or "
            "list with one number for each output."
        ) from error
    if vector.is_complex() or vector.device.type == "meta":
        what = f"dtype {vector.dtype}" if vector.is_complex() else "device meta, where tensors hold no values"
        raise TargetError(f"the start vector has {what}; give real numbers, one for each output.")
    return vector


def _one_hot(output: Tensor, target: Any) -> Tensor:
    shape = output.shape[1:]
    if target is None:
        if shape.numel() != 1:
            raise TargetError(
                f"the output has shape {tuple(output.shape)}, so target= must select which of its {shape.numel()} "
                "entries to explain for each sample; `model(inputs).argmax(1)` explains the predicted class."
            )
        return torch.ones_like(output).detach()
    indices = _indices(target, len(output))
    start = torch.zeros_like(output).detach()
    for sample, index in enumerate(indices):
        shown = index[0] if len(index) == 1 else index
        if len(index) != len(shape):
            raise TargetError(
                f"target {shown} has {len(index)} {'index' if len(index) == 1 else 'indices'}, but an output of shape "
                f"{tuple(output.shape)} has {len(shape)} dimensions after the batch. {_NEEDED[min(len(shape), 2)]}"
            )
        if any(not -size <= entry < size for entry, size in zip(index, shape, strict=True)):
            bounds = ", ".join(f"0 to {size - 1}" for size in shape)
            raise TargetError(
                f"target {shown} of sample {sample} is out of range: the output has shape {tuple(output.shape)}, so "
                f"indices go from {bounds}."
            )
        start[(sample, *index)] = 1
    return start


_NEEDED = (
    "Each sample has one output: omit target=.",
    "Give one int for all samples, or a list or tensor of one int for each.",
    "Give a tuple of that many ints for all samples, or a list of such tuples, one for each.",
)
_FORMS = "Give an int, a tuple of ints for an output of several dimensions, or a list or tensor of one for each sample."


def _indices(target: Any, batch: int) -> list[tuple[int, ...]]:
    if hasattr(target, "__array__"):  # a tensor, or the result of numpy's argmax
        target = _integers(target)
    if isinstance(target, bool) or not isinstance(target, (int, tuple, list)):
        raise TargetError(f"target is {type(target).__name__}. {_FORMS}")
    if isinstance(target, int):
        return [(target,)] * batch
    if isinstance(target, tuple):
        return [_tuple(target)] * batch
    if len(target) == 1 and batch != 1:
        target = target * batch
    if len(target) != batch:
        raise TargetError(f"target has {len(target)} entries for {batch} samples; give one for all or one for each.")
    return [_tuple(entry) if isinstance(entry, (tuple, list)) else _tuple((entry,)) for entry in target]


def _integers(target: Any) -> Any:
    """Converts integer tensors and arrays to Python numbers."""
    try:
        tensor = torch.as_tensor(target)
    except TypeError as error:
        raise TargetError(f"target has dtype {target.dtype}. {_FORMS}") from error
    if tensor.device.type == "meta":
        raise TargetError(f"target is on device meta, where tensors hold no values. {_FORMS}")
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TargetError(f"target has dtype {target.dtype}, but is an index into the output. {_FORMS}")
    return tensor.tolist()


def _tuple(entry: Any) -> tuple[int, ...]:
    try:
        if any(isinstance(number, bool) for number in entry):
            raise TypeError
        return tuple(operator.index(number) for number in entry)
    except TypeError:
        shown = entry[0] if len(entry) == 1 else entry
        raise TargetError(f"target {brief(shown)} does not consist of integers. {_FORMS}") from None
