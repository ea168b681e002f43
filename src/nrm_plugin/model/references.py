"""Calls of the model on a reference instead of the inputs.

Source: docs/differences.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import DifferenceError, brief, samples
from .inputs_and_outputs import Call, is_finite, is_index


def repeated(call: Call, count: int) -> Call:
    """Returns the call with every sample repeated ``count`` times, including in its additional arguments."""
    if not call.batched:
        raise DifferenceError("several references require samples, but batched=False treats all inputs as one sample.")
    size = call.batch

    def repeat(value: Tensor) -> Tensor:
        return value.repeat_interleave(count, 0) if value.ndim and len(value) == size else value

    return call.changed(repeat, repeat)


def several_calls(call: Call, references: Sequence[Any]) -> Call:
    """Returns a single call on several references per sample, in the order of :func:`repeated`."""
    calls = [reference_call(call, reference) for reference in references]
    first = repeated(calls[0], len(calls))
    together = [*first.tensors, *first.indices.values()]
    rows = zip(*([*one.tensors, *one.indices.values()] for one in calls), strict=True)
    joined = {id(old): torch.stack(new, 1).flatten(0, 1) for old, new in zip(together, rows, strict=True)}
    return first.changed(lambda tensor: joined[id(tensor)])


def reference_call(call: Call, reference: Any) -> Call:
    """Returns the call with the inputs replaced by a reference.

    Args:
        call: The call with the inputs.
        reference: The reference in the form of the inputs: a tensor, a tuple of tensors, or a mapping. Each tensor has
            the shape of the input or of a single sample, with or without the batch dimension; a single sample serves
            as the reference of all samples. A mapping may omit inputs that receive no relevance, such as masks.

    Raises:
        DifferenceError: If the reference does not match the inputs, or is identical to them.
    """
    inputs = dict(zip(call.items, call.tensors, strict=True)) | call.indices
    if isinstance(reference, Mapping):
        reference = _of_inputs(call, reference, inputs)
    given = _by_item(reference, inputs)
    fitted = {item: _fitted(given[item], tensor, item, call.batched) for item, tensor in inputs.items()}
    _check_apart(inputs, fitted, call.batched)
    by_identity = {id(tensor): fitted[item] for item, tensor in inputs.items()}
    return call.changed(lambda tensor: by_identity[id(tensor)])


def _of_inputs(call: Call, reference: Mapping[Any, Any], inputs: Mapping[Any, Tensor]) -> dict[Any, Any]:
    """Returns the reference for the inputs that receive relevance. All other arguments must be unchanged."""
    for key, value in reference.items():
        if key in inputs:
            continue
        if key not in call.others:
            raise DifferenceError(
                f"the reference has a value for {key!r}, which is not among the inputs {[*inputs, *call.others]}. "
                f"{_FORM}"
            )
        if not _is_same(value, call.others[key], call.batched):
            raise DifferenceError(
                f"the reference has a different value for {key!r} than the inputs, but {key!r} receives no relevance, "
                "so the difference of the outputs would not be explained completely. Choose a reference with the same "
                "value, such as the same padding mask."
            )
    same = call.indices if call.tensors else {}
    return {**same, **{key: value for key, value in reference.items() if key in inputs}}


def _is_same(value: Any, own: Any, batched: bool) -> bool:
    """Returns True if an argument of the reference, possibly given for one sample, equals the one of the inputs."""
    if value is own or not (isinstance(value, Tensor) and isinstance(own, Tensor)):
        return value is own or (type(value) is type(own) and bool(np.array_equal(value, own)))
    kinds = [(tensor.dtype, tensor.device, tensor.layout) for tensor in (value, own)]
    if kinds[0] != kinds[1] or value.layout != torch.strided:
        return False
    is_one = batched and value.shape in (own.shape[1:], (1, *own.shape[1:]))
    return torch.equal(value.expand(own.shape) if is_one else value, own)


def _by_item(reference: Any, inputs: Mapping[Any, Tensor]) -> dict[Any, Any]:
    """Returns the reference for each input, keyed by its keyword or position."""
    if isinstance(reference, Mapping):
        given = dict(reference)
    elif isinstance(reference, (tuple, list)):
        given = dict(enumerate(reference) if len(inputs) > 1 else zip([*inputs, 1], reference, strict=False))
    else:
        given = {next(iter(inputs)): reference}
    missing = [item for item in inputs if item not in given]
    if missing:
        name = "the input" if missing[0] is None else f"the input {missing[0]!r}"
        raise DifferenceError(f"the reference is {brief(reference)} and has no value for {name}. {_FORM}")
    if len(given) > len(inputs):
        raise DifferenceError(
            f"the reference is {brief(reference)}, which has more entries than the {len(inputs)} inputs. {_FORM} A "
            "mixture over several references is a list."
        )
    return given


_FORM = "Give it in the form of the inputs: a tensor, a tuple of tensors, or a mapping with the same keys."


def _fitted(value: Any, tensor: Tensor, item: Any, batched: bool) -> Tensor:
    """Validates the reference for one input and expands it to the shape of the input."""
    what = "the reference" if item is None else f"the reference of the input {item!r}"
    if not isinstance(value, Tensor):
        raise DifferenceError(f"{what} is {brief(value)}, expected a tensor of shape {tuple(tensor.shape)}.")
    if value.is_nested or value.layout != torch.strided or value.device.type == "meta":
        kind = "nested" if value.is_nested else "on device meta" if value.device.type == "meta" else "sparse"
        raise DifferenceError(f"{what} is {kind}, expected a dense tensor with values, of shape {tuple(tensor.shape)}.")
    if is_index(tensor) != is_index(value):
        raise DifferenceError(
            f"{what} has dtype {value.dtype}, the input {tensor.dtype}: the reference of ids must be ids, and that of "
            "embeddings must be embeddings. Convert one of them with the model's embedding."
        )
    if value.dtype != tensor.dtype or value.device != tensor.device:
        raise DifferenceError(
            f"{what} has dtype {value.dtype} on {value.device}, the input {tensor.dtype} on {tensor.device}. Convert "
            "it: `reference.to(inputs)`."
        )
    if batched and value.shape in (tensor.shape[1:], (1, *tensor.shape[1:])):
        value = value.expand(tensor.shape)
    if value.shape != tensor.shape:
        one = f", or {tuple(tensor.shape[1:])} for one reference of all samples" if batched else ""
        raise DifferenceError(f"{what} has shape {tuple(value.shape)}, expected {tuple(tensor.shape)}{one}.")
    if not is_finite(value):
        raise DifferenceError(f"{what} has nan or inf entries, so a difference from it is not a number.")
    fitted: Tensor = value.detach().clone()
    return fitted


def _check_apart(inputs: Mapping[Any, Tensor], references: Mapping[Any, Tensor], batched: bool) -> None:
    """Raises :class:`DifferenceError` if a sample equals its reference."""
    count = len(next(iter(inputs.values()))) if batched else 1
    same = torch.ones(count, dtype=torch.bool)
    for item, tensor in inputs.items():
        same &= (tensor == references[item]).reshape(count, -1).all(1).cpu()
    if bool(same.any()):
        raise DifferenceError(
            f"the reference equals the input ({samples(same.tolist())}), so there is no difference to explain. Choose "
            "a reference that lacks what is to be explained, or remove these samples."
        )


__all__ = ["reference_call", "repeated", "several_calls"]
