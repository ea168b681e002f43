r"""Kernels of what graph networks do to nodes and edges: gather, sum into nodes, segments, sparse products.

Messages that are summed into a node share its relevance as the entries of a mean do, by the composite's rule of average
pooling; in this package's composites

.. math:: T_{en} = \frac{|m_e|}{\sum_{e' \to n} |m_{e'}|}.

A largest one takes all. A sparse matrix is an adjacency, so its product is such a sum, and not a layer.

Source: MEASURE.md, section 5 (ours).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.rule_reader import read_rule_at
from ..kernels.vjp_kernel import VjpKernel
from ..model.affine import Weightless
from ..rules import Absolute
from .registry import BY_FUNCTION, FunctionCall, rewrite

# -- sums into nodes --------------------------------------------------------------------------------------------------


def _own(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    """A function of this module that an interception sees like one of torch, under that name."""

    def decorate(body: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(body)
        def public(source: Tensor, *args: Any) -> Tensor:
            if has_torch_function((source,)):
                handed: Tensor = handle_torch_function(public, (source,), source, *args)
                return handed
            return body(source, *args)

        public.__name__ = name
        return public

    return decorate


@_own("index_add")
def added_into(source: Tensor, dim: int, index: Tensor, size: int) -> Tensor:
    """``y[index[e]] = Σ source[e]`` along a dimension."""
    shape = list(source.shape)
    shape[dim] = size
    return source.new_zeros(shape).index_add(dim, index, source)


@_own("scatter_add")
def scattered_into(source: Tensor, dim: int, index: Tensor, shape: torch.Size) -> Tensor:
    """The same with an index for every entry."""
    return source.new_zeros(shape).scatter_add(dim, index, source)


@_own("scatter_reduce")
def largest_into(source: Tensor, dim: int, index: Tensor, shape: torch.Size, reduce: str) -> Tensor:
    """The largest (smallest) of the entries instead of their sum; where there is none, zero."""
    return source.new_zeros(shape).scatter_reduce(dim, index, source, reduce, include_self=False)


def _summed(call: FunctionCall) -> Kernel:
    """By the rule of average pooling, which is that of sums and means."""
    return by_pooling_rule(call, call.run)


def by_pooling_rule(call: FunctionCall, run: Callable[[Tensor], Tensor]) -> Kernel:
    """A function of one input, linear with coefficients of at least zero, as a module without weights."""
    rule = call.rules.of_module(nn.AvgPool2d(1)) or Absolute()
    return read_rule_at(rule, Weightless(run), call.values[0], call.path)


class Choice(VjpKernel):
    """Hands each output to the inputs that it was chosen from, equal ones alike, as autograd does."""

    is_stochastic = True

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return self.pull(relevance)


def _chosen(call: FunctionCall) -> Kernel:
    """All to the largest of a group."""
    with torch.enable_grad():
        leaf = call.values[0].detach().requires_grad_()
        image = call.run(leaf)
    return Choice(lambda relevance: torch.autograd.grad(image, leaf, relevance, True, torch.is_grad_enabled()))


BY_FUNCTION[added_into] = BY_FUNCTION[scattered_into] = _summed
BY_FUNCTION[largest_into] = _chosen


def _total(first: Tensor, added: Tensor, counted: Tensor) -> Tensor:
    """A sum; where nothing is added to a constant, that constant is what is left."""
    if first.requires_grad:
        return first + added
    total = first + added if bool(first.any()) else added
    return total if bool((counted > 0).all()) else torch.where(counted > 0, total, first)


@rewrite("index_add")
def _index_add(input: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    if not source.requires_grad:
        return input + torch.zeros_like(input).index_add(dim, index, source, alpha=alpha)
    source = source if alpha == 1 else source * alpha
    if input.ndim == 0:
        return input + source.sum()
    counted = torch.bincount(index.reshape(-1), minlength=input.shape[dim])
    view = [1] * input.ndim
    view[dim] = -1
    return _total(input, added_into(source, dim, index, input.shape[dim]), counted.view(view))


@rewrite("scatter_add")
def _scatter_add(input: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    if not src.requires_grad:
        return input + torch.zeros_like(input).scatter_add(dim, index, src)
    return _total(input, scattered_into(_read(src, index), dim, index, input.shape), _counts(input, dim, index))


def _counts(like: Tensor, dim: int, index: Tensor) -> Tensor:
    """How many entries an index puts at each place."""
    ones = torch.ones(index.shape, dtype=like.dtype, device=like.device)
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device).scatter_add(dim, index, ones)


def _read(src: Tensor, index: Tensor) -> Tensor:
    """The entries of a source that an index of fewer entries reads."""
    return src if src.shape == index.shape else src[tuple(slice(size) for size in index.shape)]


@rewrite("scatter_reduce")
def _scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    reduce = {"add": "sum", "multiply": "prod"}.get(reduce, reduce)
    if reduce not in ("sum", "mean", "amax", "amin"):
        raise UnsupportedOperationError(_PRODUCTS.format(name="scatter_reduce", reduce=reduce))
    counted = _counts(input, dim, index)
    if not src.requires_grad:
        src = _joined(src, input)
    source = _read(src, index)
    if reduce in ("sum", "mean"):
        total = scattered_into(source, dim, index, input.shape)
        if not include_self:
            mean = total if reduce == "sum" else total / counted.clamp(min=1)
            return torch.where(counted > 0, mean, input)
        total = _total(input, total, counted)
        return total if reduce == "sum" else total / (counted + 1)
    chosen = largest_into(source, dim, index, input.shape, reduce)
    values = input.detach()
    beats = (chosen.detach() > values) if reduce == "amax" else (chosen.detach() < values)
    return torch.where(((counted > 0) & beats) if include_self else counted > 0, chosen, input)


def _joined(constant: Tensor, signal: Tensor) -> Tensor:
    """A constant that competes with a signal: relevance that it wins ends there."""
    return torch.where(torch.zeros((), dtype=torch.bool, device=signal.device), signal.flatten()[:1].sum(), constant)


_PRODUCTS = (
    "relevance would pass {name!r} with reduce={reduce!r}, a product, whose factors share in no way that "
    "is not arbitrary. Use a sum, mean, minimum or maximum, or decorate a function with nrm_plugin.register_kernel."
)


@rewrite("index_reduce")
def _index_reduce(
    input: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    view = [1] * source.ndim
    view[dim] = -1
    return _scatter_reduce(input, dim, index.view(view).expand_as(source), source, reduce, include_self=include_self)


@rewrite("segment_reduce")
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
            "relevance would pass 'segment_reduce' with indices=, initial= or segments of several dimensions, "
            "which has no kernel. Give lengths= or offsets= of one dimension, or use index_add."
        )
    number = torch.repeat_interleave(torch.arange(len(lengths), device=data.device), lengths)
    shape = list(data.shape)
    shape[axis] = len(lengths)
    reduce = {"max": "amax", "min": "amin"}.get(reduce, reduce)
    return _index_reduce(data.detach().new_zeros(shape), axis, number, data, reduce, include_self=False)


# -- written into -----------------------------------------------------------------------------------------------------


def _copied(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """A function that only copies as a look-up: run on the numbers of entries, it tells where each came from."""
    computed = [value for value in (*args, *kwargs.values()) if _carries(value)]
    numbers = _numbered(computed)
    with torch.no_grad():
        values = function(*args, **kwargs)
        named = {key: _number(value, numbers) for key, value in kwargs.items()}
        origin = function(*(_number(value, numbers) for value in args), **named).long()
    entries = torch.cat([value.reshape(-1) for value in computed])
    if entries.numel() == 0:  # a group without members
        return values
    picked = entries[(origin - 1).clamp(min=0)]
    return picked if bool((origin > 0).all()) else torch.where(origin > 0, picked, values)


def _carries(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and value.is_floating_point()


def _numbered(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """The entries of several tensors counted from one, by identity of the tensor."""
    numbers, start = {}, 1
    for tensor in tensors:
        count = torch.arange(start, start + tensor.numel(), dtype=torch.float64, device=tensor.device)
        numbers[id(tensor)] = count.reshape(tensor.shape)
        start += tensor.numel()
    return numbers


def _number(value: Any, numbers: dict[int, Tensor]) -> Any:
    """The number of a computed entry; zero for what is written from elsewhere."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return numbers.get(id(value), torch.zeros_like(value, dtype=torch.float64))
    return 0.0 if isinstance(value, float) else value


@rewrite("scatter")
def _scatter(input: Tensor, dim: int, index: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    reduce = args[1] if len(args) > 1 else kwargs.get("reduce")
    if reduce not in (None, "add"):
        raise UnsupportedOperationError(_REDUCED)
    source = args[0] if args else kwargs.get("src", kwargs.get("value", 0.0))
    source = source if isinstance(source, Tensor) else float(source)
    if reduce == "add":
        places = torch.zeros_like(index, dtype=input.dtype) + source if isinstance(source, float) else source
        return input.scatter_add(dim, index, places)
    return _copied(torch.scatter, input, dim, index, source)


@rewrite("index_copy")
def _index_copy(input: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _copied(torch.index_copy, input, dim, index, source)


@rewrite("masked_scatter")
def _masked_scatter(input: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return _copied(torch.masked_scatter, input, mask, source)


@rewrite("select_scatter")
def _select_scatter(input: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    return _copied(torch.select_scatter, input, src, dim, index)


@rewrite("slice_scatter")
def _slice_scatter(input: Tensor, src: Tensor, dim: int = 0, *args: Any, **kwargs: Any) -> Tensor:
    return _copied(torch.slice_scatter, input, src, dim, *args, **kwargs)


@rewrite("put")
def _put(input: Tensor, index: Tensor, source: Tensor, accumulate: bool = False) -> Tensor:
    if accumulate:
        return _added_at(input, index.reshape(-1), source)
    return _copied(torch.put, input, index, source)


def put_at(target: Tensor, index: Any, value: Any, accumulate: bool = False) -> Tensor:
    """``target[index] = value``, out of place; or ``+=``, where places that come twice are added to twice."""
    if accumulate:
        places = torch.arange(target.numel(), device=target.device).reshape(target.shape)[index]
        return _added_at(target, places.reshape(-1), value.expand(places.shape))
    if isinstance(value, Tensor):
        return _copied(_set_at, target, index, value)
    return _copied(_set_at, target, index, float(value))


def _added_at(target: Tensor, places: Tensor, value: Tensor) -> Tensor:
    """Adds to entries by their number."""
    return _index_add(target.reshape(-1), 0, places, value.reshape(-1)).reshape(target.shape)


def _set_at(target: Tensor, index: Any, value: Any) -> Tensor:
    result = target.clone()
    result[index] = value
    return result


def is_by_tensor(index: Any) -> bool:
    """Whether places are given by tensors or lists, and not by slices and numbers alone."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    return any(isinstance(part, list) or (isinstance(part, Tensor) and part.ndim > 0) for part in parts)


_REDUCED = (
    "relevance would pass 'scatter' that multiplies what it writes over, which has no kernel. Use scatter_add where a "
    "sum is meant."
)


# -- sparse products --------------------------------------------------------------------------------------------------


def is_sparse_product(args: Sequence[Any]) -> bool:
    """Whether one of two factors is a sparse matrix."""
    return any(isinstance(value, Tensor) and value.layout != torch.strided for value in args[:2])


@rewrite("_sparse_mm", "spmm", "smm", "hspmm")
def in_messages(input: Tensor, mat2: Tensor, reduce: str = "sum") -> Tensor:
    """``A x``, or ``x A``, of a sparse constant: messages along its entries that are summed into nodes.

    Takes the memory of all messages, and works with any layout of ``A``.
    """
    matrix, source = (input, mat2) if is_sparse_product([input]) else (mat2, input)
    if matrix.requires_grad or is_sparse_product([source]) or not is_sparse_product([matrix]):
        raise UnsupportedOperationError(_COMPUTED)
    listed = (matrix if matrix.layout == torch.sparse_coo else matrix.to_sparse(layout=torch.sparse_coo)).coalesce()
    rows, columns = listed.indices()
    is_left = matrix is input
    into, out_of, size = (rows, columns, matrix.shape[0]) if is_left else (columns, rows, matrix.shape[1])
    by_node = source if is_left else source.transpose(-1, -2)
    messages = by_node.index_select(0, out_of) * listed.values().reshape(-1, *(1,) * (by_node.ndim - 1))
    blank = source.detach().new_zeros((size, *by_node.shape[1:]))
    kind = {"sum": "sum", "add": "sum", "mean": "mean", "max": "amax", "amax": "amax", "min": "amin", "amin": "amin"}
    if kind.get(reduce) == "sum":
        summed: Tensor = _index_add(blank, 0, into, messages)
    else:
        summed = _index_reduce(blank, 0, into, messages, kind.get(reduce, reduce), include_self=False)
    return summed if is_left else summed.transpose(-1, -2)


_COMPUTED = (
    "relevance would pass a product with a sparse matrix whose entries the model computed, or of two sparse ones, "
    "which has no kernel. Multiply the messages, gathered by index_select, and sum them with index_add."
)


@rewrite("sparse_addmm", "_sparse_addmm")
def _addmm(input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    multiplied = in_messages(mat1, mat2)
    multiplied = multiplied if alpha == 1 else multiplied * alpha
    return multiplied + (input if beta == 1 else input * beta)


__all__ = [
    "Choice",
    "added_into",
    "in_messages",
    "is_by_tensor",
    "is_sparse_product",
    "largest_into",
    "put_at",
    "scattered_into",
]
