r"""Functions used by graph networks: scatter and segment reductions, indexed writes and sparse products.

The relevance of a node is split among its messages by the composite's rule for average pooling, as in a mean. With the
composites of this package,

.. math:: T_{en} = \frac{|m_e|}{\sum_{e' \to n} |m_{e'}|}.

A maximum passes all relevance to the largest message, split equally among ties. A sparse matrix is treated as an
adjacency matrix, so a product with it is a sum of messages rather than a layer.

Source: docs/measure.md (operations without a module).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.forward_state import not_recorded
from .averaging import rule_of_averages
from .function_call import FunctionCall
from .registry import KERNELS_BY_FUNCTION, decomposition_of

# -- sums into nodes --------------------------------------------------------------------------------------------------


def _intercepted_as(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """Returns a decorator that makes a function interceptable under the name of a torch function."""

    def decorate(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(body)
        def public(source: Tensor, *args: Any) -> Tensor:
            if has_torch_function((source,)):
                intercepted: Tensor = handle_torch_function(public, (source,), source, *args)
                return intercepted
            return body(source, *args)

        public.__name__ = name
        return public

    return decorate


@_intercepted_as("index_add")
def index_add_to_zeros(source: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """Computes ``y[index[e]] += source[e]`` along a dimension, where ``y`` is initially zero."""
    shape = list(source.shape)
    shape[dim] = size
    return source.new_zeros(shape).index_add(dim, index, source)


@_intercepted_as("scatter_add")
def scatter_add_to_zeros(source: Tensor, dim: int, index: Tensor, shape: torch.Size) -> Tensor:
    """Computes ``scatter_add`` into a tensor of zeros, with an index of the same shape as ``source``."""
    return source.new_zeros(shape).scatter_add(dim, index, source)


@_intercepted_as("scatter_reduce")
def scatter_extremum(
    source: Tensor, own: Tensor | None, dim: int, index: Tensor, shape: torch.Size, how: str
) -> Tensor:
    """Computes the maximum or minimum of each group, or zero for an empty group.

    Args:
        source: The elements of all groups.
        own: The entry of ``self`` in each group, or None if excluded.
        dim: Dimension along which ``index`` selects a group.
        index: Assigns each element to a group, as in ``scatter_reduce``.
        shape: Shape of the result.
        how: ``"amax"`` or ``"amin"``.
    """
    target = source.new_zeros(shape) if own is None else own
    return target.scatter_reduce(dim, index, source, how, include_self=own is not None)


class ExtremumKernel(Kernel):
    """Kernel that splits the relevance of each extremum equally among the elements that attain it.

    Unlike autograd, it does not count values excluded by ``include_self=False``.

    Args:
        dim: Dimension along which ``index`` selects a group.
        index: Assigns each element to a group, as in ``scatter_reduce``.
        share: Fraction of the group's relevance passed to each element.
        own: Fraction passed to the entry of ``self`` in each group, or None if excluded.
    """

    is_stochastic = True  # groups without members are replaced by constants afterward

    def __init__(self, dim: int, index: Tensor, share: Tensor, own: Tensor | None) -> None:
        self.dim, self.index, self.share, self.own = dim % max(1, index.ndim), index, share, own

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        index = self.index.expand(len(relevance), *self.index.shape)
        part = relevance.gather(self.dim + 1, index) * self.share
        return (part,) if self.own is None else (part, relevance * self.own)

    pull_absolute = pull


def _extremum_kernel(call: FunctionCall) -> Kernel:
    source, *others = call.values
    _, _, dim, index, shape, _ = call.args
    extremum = call.run(*call.values)
    hits = (source == extremum.gather(dim, index)).to(source.dtype)
    own = (others[0] == extremum).to(source.dtype) if others else source.new_zeros(shape)
    count = own.scatter_add(dim, index, hits).clamp(min=1)
    return ExtremumKernel(dim, index, hits / count.gather(dim, index), own / count if others else None)


def _sum_kernel(call: FunctionCall) -> Kernel:
    return call._by_rule(rule_of_averages(call))


KERNELS_BY_FUNCTION[index_add_to_zeros] = KERNELS_BY_FUNCTION[scatter_add_to_zeros] = _sum_kernel
KERNELS_BY_FUNCTION[scatter_extremum] = _extremum_kernel


def _sum_with_constant(first: Tensor, added: Tensor, counts: Tensor) -> Tensor:
    """Adds scattered sums to a constant. Positions without summands keep the value of the constant."""
    if first.requires_grad:
        return first + added
    total = first + added if bool(first.any()) else added
    return total if bool((counts > 0).all()) else torch.where(counts > 0, total, first)


@decomposition_of("index_add")
def _index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    if not source.requires_grad:
        return input + torch.zeros_like(input).index_add(dim, index, source, alpha=alpha)
    source = source if alpha == 1 else source * alpha
    if input.ndim == 0:
        return input + source.sum()
    counts = torch.bincount(index.reshape(-1), minlength=input.shape[dim])
    view = [1] * input.ndim
    view[dim] = -1
    return _sum_with_constant(input, index_add_to_zeros(source, dim, index, input.shape[dim]), counts.view(view))


@decomposition_of("scatter_add")
def _scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    if not src.requires_grad:
        return input + torch.zeros_like(input).scatter_add(dim, index, src)
    return _sum_with_constant(
        input, scatter_add_to_zeros(_cropped(src, index), dim, index, input.shape), _counts(input, dim, index)
    )


def _counts(like: Tensor, dim: int, index: Tensor) -> Tensor:
    """Returns the number of summands at each position."""
    ones = torch.ones(index.shape, dtype=like.dtype, device=like.device)
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device).scatter_add(dim, index, ones)


def _cropped(src: Tensor, index: Tensor) -> Tensor:
    """Crops the source to the shape of the index, as ``scatter`` does."""
    return src if src.shape == index.shape else src[tuple(slice(size) for size in index.shape)]


@decomposition_of("scatter_reduce")
def _scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    reduce = {"add": "sum", "multiply": "prod"}.get(reduce, reduce)
    if reduce not in ("sum", "mean", "amax", "amin"):
        raise UnsupportedOperationError(_PRODUCTS.format(name="scatter_reduce", reduce=reduce))
    counts = _counts(input, dim, index)
    if not src.requires_grad:
        src = _attach_constant(src, input)
    source = _cropped(src, index)
    if reduce in ("sum", "mean"):
        total = scatter_add_to_zeros(source, dim, index, input.shape)
        if not include_self:
            mean = total if reduce == "sum" else total / counts.clamp(min=1)
            return torch.where(counts > 0, mean, input)
        total = _sum_with_constant(input, total, counts)
        return total if reduce == "sum" else total / (counts + 1)
    if include_self:
        if not source.numel():
            return input
        own = input if input.requires_grad else _attach_constant(input, source)
        return scatter_extremum(source, own, dim, index, input.shape, reduce)
    return torch.where(counts > 0, scatter_extremum(source, None, dim, index, input.shape, reduce), input)


def _attach_constant(constant: Tensor, signal: Tensor) -> Tensor:
    """Attaches a constant to the autograd graph of ``signal``.

    The constant can then absorb relevance. In a maximum, it absorbs the relevance of the groups in which it is the
    largest element.
    """
    if not signal.numel():
        return constant
    with not_recorded():  # autograd records these routes
        return torch.where(torch.zeros((), dtype=torch.bool, device=signal.device), signal.flatten()[0], constant)


_PRODUCTS = (
    "relevance would pass through {name!r} with reduce={reduce!r}, a product, for which any split among the factors "
    "is arbitrary. Use a sum, mean, minimum or maximum, or decorate a function with nrm_plugin.register_kernel."
)


@decomposition_of("index_reduce")
def _index_reduce(
    input: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    view = [1] * source.ndim
    view[dim] = -1
    return _scatter_reduce(input, dim, index.view(view).expand_as(source), source, reduce, include_self=include_self)


@decomposition_of("segment_reduce")
def _segment_reduce(
    data: Tensor,
    reduce: str,
    *,
    lengths: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    axis: int = 0,
    unsafe: bool = False,
    initial: float | None = None,
) -> Tensor:
    if lengths is None and offsets is not None:
        lengths = offsets.diff()
    if lengths is None or lengths.ndim != 1 or initial is not None:
        raise UnsupportedOperationError(
            "relevance would pass through 'segment_reduce' with indices=, initial= or segments of several dimensions, "
            "which has no kernel. Give lengths= or offsets= of one dimension, or use index_add."
        )
    number = torch.repeat_interleave(torch.arange(len(lengths), device=data.device), lengths)
    shape = list(data.shape)
    shape[axis] = len(lengths)
    empty = data.detach().new_full(shape, _EMPTY.get(reduce, 0.0))
    reduce = {"max": "amax", "min": "amin"}.get(reduce, reduce)
    return _index_reduce(empty, axis, number, data, reduce, include_self=False)


_EMPTY = {"max": -math.inf, "min": math.inf, "mean": math.nan}
"""Value of ``segment_reduce`` for an empty segment."""


# -- writes by index --------------------------------------------------------------------------------------------------


def _lookup(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """Runs a function that only copies elements and returns its result as a gather.

    The function also runs on element indices, to find where each output element comes from.
    """
    computed = [value for value in (*args, *kwargs.values()) if _carries(value)]
    numbers = _numbers_of(computed)
    with torch.no_grad():
        values = function(*args, **kwargs)
        number_args = [_number(value, numbers) for value in args]
        number_kwargs = {key: _number(value, numbers) for key, value in kwargs.items()}
        origin = function(*number_args, **number_kwargs).long()
    entries = torch.cat([value.reshape(-1) for value in computed])
    if entries.numel() == 0:  # a group without members
        return values
    selected = entries[(origin - 1).clamp(min=0)]
    return selected if bool((origin > 0).all()) else torch.where(origin > 0, selected, values)


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def _numbers_of(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Numbers the elements of several tensors consecutively from one. Returns the numbers, keyed by ``id(tensor)``."""
    numbers, start = {}, 1
    for tensor in tensors:
        count = torch.arange(start, start + tensor.numel(), dtype=torch.float64, device=tensor.device)
        numbers[id(tensor)] = count.reshape(tensor.shape)
        start += tensor.numel()
    return numbers


def _number(value: Any, numbers: dict[int, Tensor]) -> Any:
    """Replaces a computed tensor with the numbers of its elements and a constant with zeros."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return numbers.get(id(value), torch.zeros_like(value, dtype=torch.float64))
    return 0.0 if isinstance(value, float) else value


@decomposition_of("scatter")
def _scatter(input: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    reduce = args[1] if len(args) > 1 else kwargs.get("reduce")
    if reduce not in (None, "add"):
        raise UnsupportedOperationError(_REDUCED)
    source = args[0] if args else kwargs.get("src", kwargs.get("value", 0.0))
    source = source if isinstance(source, Tensor) else float(source)
    if reduce == "add":
        positions = torch.zeros_like(index, dtype=input.dtype) + source if isinstance(source, float) else source
        return input.scatter_add(dim, index, positions)
    return _lookup(torch.scatter, input, dim, index, source)


@decomposition_of("index_copy")
def _index_copy(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _lookup(torch.index_copy, input, dim, index, source)


@decomposition_of("masked_scatter")
def _masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return _lookup(torch.masked_scatter, input, mask, source)


@decomposition_of("select_scatter")
def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    return _lookup(torch.select_scatter, input, src, dim, index)


@decomposition_of("slice_scatter")
def _slice_scatter(input: Tensor, src: Tensor, dim: int = 0, *args: Any, **kwargs: Any) -> Tensor:
    return _lookup(torch.slice_scatter, input, src, dim, *args, **kwargs)


@decomposition_of("put")
def _put(input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    if accumulate:
        return _add_at(input, index.reshape(-1), source)
    return _lookup(torch.put, input, index, source)


def write_at(target: Tensor, index: Any, value: Any, accumulate: bool = False) -> Tensor:
    """Computes ``target[index] = value`` out of place, or ``target[index] += value`` if ``accumulate`` is True."""
    if accumulate:
        positions = torch.arange(target.numel(), device=target.device).reshape(target.shape)[index]
        return _add_at(target, positions.reshape(-1), value.expand(positions.shape))
    if isinstance(value, Tensor):
        return _lookup(_set_at, target, index, value)
    return _lookup(_set_at, target, index, float(value))


def _add_at(target: Tensor, positions: Tensor, value: Tensor) -> Tensor:
    """Adds values at the given positions of a flattened tensor, out of place."""
    return _index_add(target.reshape(-1), 0, positions, value.reshape(-1)).reshape(target.shape)


def _set_at(target: Tensor, index: Any, value: Any) -> Tensor:
    result = target.clone()
    result[index] = value
    return result


def is_advanced_index(index: Any) -> bool:
    """Returns True if an index contains lists or non-scalar tensors, besides slices and integers."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return any(isinstance(part, list) or (isinstance(part, Tensor) and part.ndim > 0) for part in parts)


_REDUCED = (
    "relevance would pass through 'scatter' with reduce='multiply', which has no kernel. Use scatter_add if a sum is "
    "intended, or decorate a function with nrm_plugin.register_kernel(torch.scatter)."
)


# -- sparse products --------------------------------------------------------------------------------------------------


def is_sparse_product(args: Sequence[Any]) -> bool:
    """Returns True if either factor of a product is sparse."""
    return any(isinstance(value, Tensor) and value.layout != torch.strided for value in args[:2])


@decomposition_of("_sparse_mm", "spmm", "smm", "hspmm")
def sum_of_messages(input: Tensor, mat2: Tensor, reduce: str = "sum") -> Tensor:
    """Computes ``A x`` or ``x A`` for a constant sparse matrix ``A`` of any layout, as messages summed at nodes.

    Each nonzero of ``A`` is a message. All messages are held in memory at once.
    """
    matrix, source = (input, mat2) if is_sparse_product([input]) else (mat2, input)
    if matrix.requires_grad or is_sparse_product([source]) or not is_sparse_product([matrix]):
        raise UnsupportedOperationError(_COMPUTED)
    entries = (matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse(layout=torch.sparse_coo)).coalesce()
    rows, columns = entries.indices()
    is_left = matrix is input
    targets, sources, size = (rows, columns, matrix.shape[0]) if is_left else (columns, rows, matrix.shape[1])
    by_node = source if is_left else source.transpose(-1, -2)
    messages = by_node.index_select(0, sources) * entries.values().reshape(-1, *(1,) * (by_node.ndim - 1))
    zeros = source.detach().new_zeros((size, *by_node.shape[1:]))
    kind = {"sum": "sum", "add": "sum", "mean": "mean", "max": "amax", "amax": "amax", "min": "amin", "amin": "amin"}
    if kind.get(reduce) == "sum":
        summed: Tensor = _index_add(zeros, 0, targets, messages)
    else:
        summed = _index_reduce(zeros, 0, targets, messages, kind.get(reduce, reduce), include_self=False)
    return summed if is_left else summed.transpose(-1, -2)


_COMPUTED = (
    "relevance would pass through a product with a sparse matrix that the model computed, or of two sparse ones, "
    "which has no kernel. Multiply the messages, gathered by index_select, and sum them with index_add."
)


@decomposition_of("sparse_addmm", "_sparse_addmm")
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    multiplied = sum_of_messages(mat1, mat2)
    multiplied = multiplied if alpha == 1 else multiplied * alpha
    return multiplied + (input if beta == 1 else input * beta)


__all__ = [
    "index_add_to_zeros",
    "is_advanced_index",
    "is_sparse_product",
    "scatter_add_to_zeros",
    "scatter_extremum",
    "sum_of_messages",
    "write_at",
]
