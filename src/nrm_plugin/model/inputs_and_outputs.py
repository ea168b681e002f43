"""A call of the model with its inputs and the output to explain."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors

from ..errors import GradModeError, InputError, NRMError, brief, samples
from .autocast import SHORT
from .checks import check_untransformed
from .shapes_without_values import is_valueless
from .trace_guards import holds

Inputs = Tensor | Sequence[Tensor] | Mapping[str, Any]
Output = str | int | Callable[[Any], Tensor]
"""Selector of an output: a key or attribute, an index, or a function of the model's return value."""

Change = Callable[[Tensor], Tensor]
"""Function that maps a tensor to its replacement."""
FORMATS = (torch.float32, torch.float64, *SHORT)
"""Supported dtypes of inputs and outputs. Relevance is computed in float32 or float64."""

SUMMED_TOGETHER = 1 << 12
"""Maximum number of elements of tensors that are concatenated to be summed together, in less time."""
EXPLAINED = ("logits", "out")
"""Keys under which the transformers library and torchvision return their main output."""


NOT_JOINED = (
    "the output does not depend on the inputs: no operation connects them in the autograd graph. "
    "The model may detach, round, or run under torch.no_grad inside its forward."
)


class Call:
    """Arguments with which the model is called: the tensors that receive relevance, and all others.

    Args:
        inputs: A tensor, a tuple of tensors, or a mapping whose items are passed as keyword arguments. In a mapping,
            only floating-point tensors receive relevance; masks and numbers are passed unchanged. For integer inputs
            (ids), the embeddings that they look up receive relevance; in a mapping, only if there are no
            floating-point tensors and the keyword does not contain "mask".
        args: Additional positional arguments, as a tuple or a single argument.
        kwargs: Additional keyword arguments.
        batched: Whether the first dimension of the inputs is the batch; otherwise, all inputs together form one sample.

    Attributes:
        tensors: The tensors that receive relevance, of shape ``(N, …)`` each, or ``(…)`` if not ``batched``.
        items: Keyword or position of each tensor, or None for a single positional tensor.
        indices: Copies of the integer inputs, keyed by keyword or position (None for a single positional input). The
            model is called with these copies because it may overwrite them.

    Raises:
        InputError: If the inputs cannot be explained.
    """

    def __init__(
        self, inputs: Inputs, args: Any = None, kwargs: Mapping[str, Any] | None = None, batched: bool = True
    ) -> None:
        check_batched(batched)
        self.batched = batched
        self._args = args if isinstance(args, tuple) else () if args is None else (args,)
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise InputError(f"additional_forward_kwargs is {brief(kwargs)}, expected a mapping of keyword arguments.")
        self._kwargs = dict(kwargs or {})
        self._keywords: list[str] | None = None
        self._positional: tuple[Any, ...] = ()
        self.indices: dict[Any, Tensor]
        self.items: list[str] | list[int] | list[None]
        self._others: list[str] = []
        if isinstance(inputs, Mapping):
            given = {key: value for key, value in inputs.items() if _is_explained(value)}
            # Next to floating-point inputs, integers may be graph edges, for example; they are ids only if looked up.
            count = len(next(iter(given.values()))) if given and batched else None
            are_ids = {key: value for key, value in inputs.items() if _is_id(key, value)}
            fit = {key: value for key, value in are_ids.items() if count is None or value.shape[:1] == (count,)}
            self.indices = {key: value.clone() for key, value in fit.items()}
            if not given and not self.indices:
                raise InputError(_none_floating(inputs))
            doubled = inputs.keys() & self._kwargs.keys()
            if doubled:
                raise InputError(f"{sorted(doubled)} are given both in inputs and in additional_forward_kwargs.")
            self._others = [key for key in inputs if key not in given and key not in fit]
            self._kwargs.update({key: inputs[key] for key in self._others} | self.indices)
            self.items = self._keywords = list(given)
            self.tensors = tuple(given.values())
            check_inputs([*self.tensors, *self.indices.values()], [*given, *self.indices], batched)
        else:
            self._positional = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
            names: list[Any] = [None] if len(self._positional) == 1 else list(range(len(self._positional)))
            check_inputs(self._positional, names, batched)
            named = list(zip(names, self._positional, strict=True))
            self.items = [name for name, tensor in named if not is_index(tensor)]
            self.indices = {name: tensor.clone() for name, tensor in named if is_index(tensor)}
            self.tensors = tuple(tensor for tensor in self._positional if not is_index(tensor))

    @property
    def batch(self) -> int:
        """Number of samples."""
        return len(next(iter((*self.tensors, *self.indices.values())))) if self.batched else 1

    @property
    def others(self) -> dict[str, Any]:
        """Items of a mapping that do not receive relevance, such as masks, keyed by keyword."""
        return {key: self._kwargs[key] for key in self._others}

    def changed(self, change: Change, others: Change = lambda tensor: tensor) -> Call:
        """Returns a copy of the call with its tensors replaced.

        Args:
            change: Function that maps an input tensor, including integer inputs, to its replacement.
            others: Function that maps a tensor among the other arguments to its replacement.
        """
        call = copy.copy(self)
        new = {id(tensor): change(tensor) for tensor in (*self.tensors, *self.indices.values())}

        def replaced(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            return new[id(value)] if id(value) in new else others(value)

        call.tensors = tuple(replaced(tensor) for tensor in self.tensors)
        call.indices = {key: replaced(value) for key, value in self.indices.items()}
        call._positional = tuple(replaced(value) for value in self._positional)
        call._args = tuple(replaced(value) for value in self._args)
        call._kwargs = {key: replaced(value) for key, value in self._kwargs.items()}
        return call

    @contextmanager
    def checked_ids(self, are_looked_up: Callable[[], bool], read: Callable[[], str | None]) -> Iterator[None]:
        """Context manager that runs the model and raises :class:`InputError` if its integer inputs are not looked up.

        Args:
            are_looked_up: Function that returns True, after the run, if any integer input was used in a lookup.
            read: Function that returns the place at which the model converted integers to Python or NumPy numbers, or
                None if it did not.
        """
        try:
            yield
        except RuntimeError as error:  # raised by a layer that multiplies by integers
            if self._needs_lookup and not isinstance(error, NRMError) and not are_looked_up():
                raise self._not_looked_up(read()) from error
            raise
        if self._needs_lookup and not are_looked_up():
            raise self._not_looked_up(read())

    @property
    def _needs_lookup(self) -> bool:
        """True if the model must look up at least one of its integer inputs."""
        return bool(self.indices) and not (self._keywords is not None and self.tensors)

    def _not_looked_up(self, read: str | None) -> InputError:
        if read is not None:
            return InputError(
                f"the model reads integer inputs as Python or NumPy numbers, by {read}, so the rows that they select "
                "are not known. Look up the tensor itself: `embedding(ids)`, `weight[ids]`."
            )
        if self._keywords is not None:
            return InputError(_none_floating(self.indices))
        item, tensor = next(iter(self.indices.items()))
        return InputError(f"{'the input' if item is None else f'input {item!r}'} {_not_floating(tensor)}")

    def run(self, model: nn.Module, tensors: Sequence[Tensor]) -> Any:
        """Runs the model on the given values of :attr:`tensors` and returns its output."""
        if self._keywords is None:
            explained, indices = iter(tensors), iter(self.indices.values())
            values = [next(indices if is_index(tensor) else explained) for tensor in self._positional]
            return model(*values, *self._args, **self._kwargs)
        return model(*self._args, **dict(zip(self._keywords, tensors, strict=True)), **self._kwargs)


def explained_output(
    returned: Any, output: Output | None, batch: int, batched: bool = True, what: str = "the model's output"
) -> Tensor:
    """Validates and returns the output tensor to explain, whose shape is ``(N, …)``.

    Args:
        returned: The model's return value.
        output: Selector of the tensor, or None if the model returns only one.
        batch: Number of samples.
        batched: Whether the first dimension is the batch.
        what: Name of the output, for error messages.

    Raises:
        InputError: If the selected tensor does not exist or cannot be explained, or if the model returns several
            tensors and none is selected.
    """
    tensor = chosen_output(returned, output)
    if not isinstance(tensor, Tensor):
        raise InputError(
            f"output={brief(output)} is {type(tensor).__name__}, but a measure starts at one tensor (N, …)."
        )
    if batched and tensor.ndim == 0:
        raise InputError(
            f"the model returned one number for {batch} samples; its output must have the shape (N,) or (N, …), here "
            f"({batch}, …), since every sample has its own measure. Keep the sample dimension in the output: "
            "`output.sum(1)` instead of `output.sum()`, `output.reshape(len(x))`. A loss over a batch has no measure."
        )
    if batched and len(tensor) != batch:
        raise InputError(
            f"the model maps {batch} inputs to an output of shape {tuple(tensor.shape)}; its first "
            "dimension must be the batch, since every sample has its own measure. A single sample needs a batch "
            "of one, `inputs.unsqueeze(0)`, or batched=False, which takes a whole graph or sequence as one sample."
        )
    if tensor.numel() == 0 or tensor.dtype not in FORMATS:
        raise InputError(
            f"the explained output has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; a measure starts at real "
            f"numbers in float32, float64, bfloat16 or float16. {_remedy_for_output(tensor)}"
        )
    if tensor.grad_fn is None:
        raise InputError(NOT_JOINED)
    if not is_finite(tensor):
        raise InputError(
            f"{what} has nan or inf entries ({_infinite(tensor)}). Inputs and parameters are finite, so "
            "look for a division by zero, a logarithm or an overflow in the model."
        )
    return tensor


def _remedy_for_output(tensor: Tensor) -> str:
    if tensor.numel() == 0:
        return "It has no entries."
    if tensor.is_complex():
        return "Make the model return a real part or a magnitude."
    if tensor.is_floating_point():
        return "Its precision is too low for sums over walks: use `model.float()`, and no `.half()` in its forward."
    return "Make the model return its scores, not indices of classes or decisions."


def chosen_output(returned: Any, output: Output | None) -> Any:
    """Returns the output selected by ``output``, without validating it."""
    choices = _choices(returned)
    if output is None:
        tensors = [value for value in choices.values() if isinstance(value, Tensor)]
        keys = [key for key in EXPLAINED if isinstance(choices.get(key), Tensor)]
        if isinstance(returned, Tensor):
            return returned
        if keys:
            return choices[keys[0]]
        if len(tensors) == 1:
            return tensors[0]
        raise InputError(
            f"the model returned {type(returned).__name__}{_items(choices)}, a measure starts at one tensor of shape "
            "(N, …). Select one by output=: a key, an index, or a function of the model's return value."
        )
    if callable(output):
        return output(returned)
    if output in choices:
        return choices[output]
    if type(output) is int and isinstance(returned, (tuple, list)) and -len(returned) <= output < 0:
        return returned[output]
    if isinstance(output, str) and hasattr(returned, output):
        return getattr(returned, output)
    raise InputError(
        f"output={brief(output)} is not in the model's return value, a {type(returned).__name__}{_items(choices)}."
    )


def _choices(returned: Any) -> dict[Any, Any]:
    if isinstance(returned, Mapping):
        return dict(returned)
    return dict(enumerate(returned)) if isinstance(returned, (tuple, list)) else {}


def _items(choices: dict[Any, Any]) -> str:
    return f" of {', '.join(f'{brief(key)} ({_kind(value)})' for key, value in choices.items())}" if choices else ""


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return type(value).__name__


def _is_explained(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def check_batched(batched: Any) -> None:
    """Raises :class:`InputError` if ``batched`` is neither True nor False."""
    if not isinstance(batched, (bool, np.bool_)):
        raise InputError(
            f"batched={brief(batched)} is neither True nor False: True if the first dimension of the inputs is the "
            "batch, False if all inputs together are one sample."
        )


def check_inputs(tensors: Sequence[Any], items: Sequence[str | int | None], batched: bool = True) -> None:
    """Raises an error if the inputs cannot be explained.

    Raises:
        GradModeError: If gradients are disabled.
        InputError: If an input has an unsupported type, dtype, layout or shape, or elements that are not finite.
    """
    if torch.is_inference_mode_enabled() or not torch.is_grad_enabled():
        mode = "torch.inference_mode()" if torch.is_inference_mode_enabled() else "torch.no_grad()"
        raise GradModeError(
            f"constructing a measure requires gradients to be enabled, but {mode} is active. Construct the measure "
            "outside of this context; queries are allowed anywhere."
        )
    if not tensors:
        raise InputError("no input was given: inputs is empty. Pass a tensor, or a tuple of tensors.")
    check_untransformed(tensors)
    for item, tensor in zip(items, tensors, strict=True):
        what = "the input" if item is None else f"input {item!r}"
        if not isinstance(tensor, Tensor):
            raise InputError(f"{what} is {type(tensor).__name__}, expected a tensor of shape (N, …).")
        if tensor.is_complex() or not (tensor.is_floating_point() or is_index(tensor)):
            raise InputError(f"{what} {_not_floating(tensor)}")
        if tensor.is_floating_point() and tensor.dtype not in FORMATS:
            raise InputError(
                f"{what} has dtype {tensor.dtype}, in which sums over walks lose precision. "
                "Use float32 or float64 (`model.float()`, `inputs.float()`)."
            )
        if tensor.is_nested or tensor.layout != torch.strided or tensor.device.type == "meta":
            kind = "nested" if tensor.is_nested else "on device meta" if tensor.device.type == "meta" else "sparse"
            raise InputError(f"{what} is {kind}; a measure requires a dense tensor with values, of shape (N, …).")
        if tensor.is_inference():
            raise InputError(f"{what} was created under torch.inference_mode; pass a `.clone()` created outside of it.")
        if (batched and tensor.ndim == 0) or tensor.numel() == 0:
            raise InputError(f"{what} has shape {tuple(tensor.shape)}, which contains no sample to explain.")
        if batched and len(tensor) != len(tensors[0]):
            raise InputError(
                f"{what} has {len(tensor)} samples, but the first one has {len(tensors[0])}. If the first dimension "
                "is not the batch, as for nodes and edges of a graph, pass batched=False."
            )
        if not is_finite(tensor):
            raise InputError(
                f"{what} has nan or inf entries ({_infinite(tensor)}) and cannot be explained. Remove these samples, "
                "or replace the entries: `inputs.nan_to_num()`."
            )


def is_finite(tensor: Tensor) -> bool:
    """Returns True if all elements of a tensor are finite."""
    if is_valueless() or not tensor.is_floating_point():
        return True
    # The sum is nan or infinite if an entry is, and takes less time; it may also overflow.
    has_sum = tensor.numel() == 0 or holds("a finite sum", lambda: tensor.sum().abs() < torch.inf)
    return has_sum or bool(torch.isfinite(tensor).all())


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Returns True if all elements of several tensors are finite. A single number is read for all of them."""
    groups: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and not is_valueless():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return all(map(_are_finite, groups.values()))


def _are_finite(tensors: list[Tensor]) -> bool:
    """Returns True if all elements of tensors of one device and dtype are finite."""
    if len(tensors) == 1:
        return is_finite(tensors[0])

    # A sum is nan or infinite if an entry is; it may also overflow.
    def have_finite_sums() -> Tensor:
        small = [tensor for tensor in tensors if tensor.numel() <= SUMMED_TOGETHER]
        large = [tensor for tensor in tensors if tensor.numel() > SUMMED_TOGETHER]
        joined = [_flatten_dense_tensors(small)] if small else []  # type: ignore[no-untyped-call, unused-ignore]
        return torch.stack([tensor.sum() for tensor in (*joined, *large)]).isfinite().all()

    return holds("finite sums", have_finite_sums) or all(map(is_finite, tensors))


def is_index(value: Any) -> bool:
    """Returns True if a value is an int32 or int64 tensor, as used for embedding lookups."""
    return isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64)


def _is_id(key: str, value: Any) -> bool:
    """Returns True if a keyword input contains ids. Integer masks, as in transformers, are excluded by name."""
    return is_index(value) and "mask" not in key


def _none_floating(inputs: Mapping[Any, Any]) -> str:
    listed = ", ".join(f"{brief(key)} ({_kind(value)})" for key, value in inputs.items())
    return (
        "none of the inputs is a floating-point tensor that could receive relevance; got "
        f"{listed or 'an empty mapping'}. Convert with `.float()`, or pass embeddings."
    )


def _not_floating(tensor: Tensor) -> str:
    return (
        f"has dtype {tensor.dtype}; relevance requires real floating-point inputs, or integers that an nn.Embedding, "
        "an index or F.one_hot looks up. Convert with `.float()` (ids with `.long()`), or pass the output of the "
        "embedding. Pass masks, lengths and graphs as additional_forward_args."
    )


def _infinite(tensor: Tensor) -> str:
    """Lists the samples that contain NaN or infinity, for error messages."""
    return samples((~torch.isfinite(tensor)).reshape(len(tensor), -1).any(1).tolist())


__all__ = [
    "EXPLAINED",
    "Call",
    "Change",
    "Inputs",
    "Output",
    "are_finite",
    "check_inputs",
    "chosen_output",
    "explained_output",
    "is_finite",
    "is_index",
]
