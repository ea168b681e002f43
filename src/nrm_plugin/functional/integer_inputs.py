"""Tracking of integer inputs (ids), by object identity, until the model uses them as indices.

Integers receive no relevance, but the rows that they look up do: walks end at these rows, as at any other input. Rows
looked up by other integers, such as positions, are constants, even if these have the same values as ids.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..kernels.forward_state import listener, note_untracked
from ..kernels.step import FunctionStep
from ..model.nested_tensors import tensors_in
from ..model.zero_one_routes import is_route_node
from .observed_call import ObservedCall, source_line


class Kind(enum.IntEnum):
    """How a tensor without relevance depends on integer inputs. A result has the largest kind of its arguments."""

    STRUCTURE = 1
    """Constants such as masks and degrees: comparisons, positions or counts of ids."""
    IDS = 2
    """Ids, or integers computed from them one by one, for example by a shift or hash."""
    ONE_HOT = 3
    """One-hot encodings of ids, which select rows by a product. Walks end at their floating-point form."""


LOOKUPS = frozenset("embedding embedding_bag getitem index index_select gather take take_along_dim".split())
_ELEMENTS = frozenset("gather take take_along_dim embedding embedding_bag".split())
"""Functions that look up single elements, or rows of a matrix."""
_STRUCTURAL = frozenset(
    "argmax argmin argsort nonzero argwhere count_nonzero bincount histc scatter_add scatter_reduce index_add "
    "index_put index_fill index_reduce".split()
)
"""Functions that return positions or counts of integers."""
_JOINING = frozenset(
    "max min amax amin aminmax sum mean prod any all median nanmedian mode std var norm unique unique_consecutive "
    "bincount histc count_nonzero nonzero argmax argmin argsort sort topk kthvalue cumsum cumprod cummax cummin diff "
    "quantile scatter_add index_add scatter_reduce".split()
)
"""Functions that may combine ids of different samples."""
_PLACE_OF_DIM = {"topk": 2, "kthvalue": 2, "quantile": 2, "norm": 2}
_OF_FIRST = frozenset("expand_as view_as reshape_as type_as to resize_as".split())
"""Functions that use only the shape or dtype of all arguments but the first."""
_CONVERSIONS = frozenset("long int short to type".split())
_ELEMENTWISE = frozenset("round floor ceil trunc clamp add sub rsub mul div neg abs relu".split())


class Ids:
    """Tensors of a forward pass that depend on ids (integer inputs), each with its kind of dependence.

    Args:
        given: The integer inputs, as the objects that are passed to the model.
        inputs: Leaf tensors of the floating-point inputs, which the model may convert to ids.
    """

    def __init__(self, given: Iterable[Tensor], inputs: Iterable[Tensor]) -> None:
        # The tensor is stored as well, since the id of a freed tensor may be reused.
        self._marked: dict[int, tuple[Tensor, Kind]] = {}
        given, inputs = list(given), list(inputs)
        self._inputs = {id(leaf) for leaf in inputs}
        self._count = next((tensor.shape[0] for tensor in (*given, *inputs) if tensor.ndim), None)
        for tensor in given:
            self._mark(tensor, Kind.IDS)

    @property
    def are_known(self) -> bool:
        """True if there are ids to track."""
        return bool(self._marked)

    def kind(self, tensor: Tensor) -> Kind | None:
        """Returns the kind of a tensor, or None if it receives relevance or does not depend on ids."""
        known = self._marked.get(id(tensor))
        return None if known is None else known[1]

    def follow(self, call: ObservedCall, result: Any, looked_up: Callable[[Tensor], Tensor] | None) -> Any:
        """Tracks ids through a call. Returns its result, in which tensors at which walks end replace looked-up rows.

        Args:
            call: Observed function call.
            result: Result of the call.
            looked_up: Function that converts rows to such a tensor, or None where walks cannot end, for example inside
                a step.
        """
        if call.inputs and call.name.base in _CONVERSIONS and self._is_converted(call, result):
            self._mark(result, Kind.IDS)
            return result
        if not self._marked:
            return result
        kind = self._kind_of_arguments(call)
        if kind is None:
            return result
        if self._may_join(call, result):
            note_untracked()
        listening = listener()
        if kind is Kind.IDS and call.leaves(result) and listening is not None:
            listening.on_read(f"{call.name.base!r} in {call.path or 'the model'!r} ({source_line()})")
        if call.name.base == "setitem":
            value = call.args[2]
            kind = self.kind(value) if isinstance(value, Tensor) else None
            self._mark_written(call.args[0], kind or Kind.STRUCTURE)
            return result
        if isinstance(result, (tuple, list)):
            indices = getattr(result, "indices", None)
            items = [item if item is indices else self._followed(call, kind, item, looked_up) for item in result]
            is_same = all(new is old for new, old in zip(items, result, strict=True))
            return result if is_same else type(result)(items)
        return self._followed(call, kind, result, looked_up)

    def _may_join(self, call: ObservedCall, result: Any) -> bool:
        """Returns True if a function of ids returns Python objects or may combine ids of different samples."""
        if call.leaves(result):
            return True
        if call.name.base not in _JOINING:
            return False
        first, output = call.args[0] if call.args else None, next(tensors_in(result), None)
        dim = call.argument(_PLACE_OF_DIM.get(call.name.base, 1), "dim")
        if dim is None and call.name.base in ("sort", "argsort", "topk"):
            dim = -1
        if not isinstance(first, Tensor) or not first.ndim or output is None or not isinstance(dim, int):
            return True
        return dim % first.ndim == 0 or first.shape[0] != self._count or self._count in first.shape[1:]

    def _followed(self, call: ObservedCall, kind: Kind, item: Any, looked_up: Callable[[Tensor], Tensor] | None) -> Any:
        if not isinstance(item, Tensor) or item.is_complex() or item.requires_grad:
            return item
        is_one_hot = self._is_one_hot(call)
        is_constant = item.is_floating_point() and not call.inputs
        if is_constant and looked_up and (kind is Kind.ONE_HOT or is_one_hot or self._is_lookup(call)):
            return looked_up(item)
        kind = _kind_of_result(call, Kind.ONE_HOT if is_one_hot else kind, item)
        is_written = bool(call.args) and item is call.args[0]
        (self._mark_written if is_written else self._mark)(item, kind)
        return item

    def _kind_of_arguments(self, call: ObservedCall) -> Kind | None:
        name = call.name.base
        if name.endswith("_like") or name.startswith("new_"):
            return None
        arguments = call.args[:1] if name in _OF_FIRST else (*call.args, *call.kwargs.values())
        kinds = (self.kind(tensor) for tensor in tensors_in(arguments))
        return max((kind for kind in kinds if kind is not None), default=None)

    def _is_lookup(self, call: ObservedCall) -> bool:
        """Returns True if ids select elements or rows of a constant table. A table of matrices counts as a weight."""
        name, arguments = call.name.base, list(tensors_in((*call.args, *call.kwargs.values())))
        tables = [tensor for tensor in arguments if tensor.is_floating_point()]
        are_selected = any(self.kind(tensor) is Kind.IDS for tensor in arguments if not tensor.is_floating_point())
        if name not in LOOKUPS or not are_selected or not tables or self.kind(tables[0]) is not None:
            return False
        return name in _ELEMENTS or tables[0].ndim - _selected_dims(call) <= 1

    def _is_one_hot(self, call: ObservedCall) -> bool:
        """Returns True if a function writes at positions given by ids, except along the samples or graph nodes."""
        index = call.argument(2, "index") if call.name.base == "scatter" else call.argument(0, "input")
        if call.name.base not in ("one_hot", "scatter") or not isinstance(index, Tensor):
            return False
        along = call.argument(1, "dim") if call.name.base == "scatter" else None
        return self.kind(index) is Kind.IDS and (along is None or along % index.ndim > 0)

    def _is_converted(self, call: ObservedCall, result: Any) -> bool:
        """Returns True if a function converts elements of an input to integers, possibly after shifting or rounding."""
        if not isinstance(result, Tensor) or result.is_floating_point() or result.is_complex():
            return False
        return _is_elementwise_of(call.inputs[0], self._inputs)

    def _mark(self, tensor: Tensor, kind: Kind) -> None:
        if not tensor.requires_grad:
            self._marked[id(tensor)] = tensor, kind

    def _mark_written(self, tensor: Tensor, kind: Kind) -> None:
        """Marks a tensor to which ids were written and, if it is a view, its base."""
        for item in (tensor, tensor._base):
            if item is not None:
                self._mark(item, max(kind, self.kind(item) or kind))


def _kind_of_result(call: ObservedCall, kind: Kind, result: Tensor) -> Kind:
    return Kind.STRUCTURE if result.dtype is torch.bool or call.name.base in _STRUCTURAL else kind


def _selected_dims(call: ObservedCall) -> int:
    """Returns the number of dimensions of the table that are indexed."""
    if call.name.base == "index_select":
        return 1
    index = call.args[1] if len(call.args) > 1 else None
    entries = index if isinstance(index, (list, tuple)) else [index]
    dims = (entry.ndim if isinstance(entry, Tensor) and entry.dtype is torch.bool else 1 for entry in entries)
    return sum(dim for dim, entry in zip(dims, entries, strict=True) if isinstance(entry, (int, Tensor)))


def _is_elementwise_of(tensor: Tensor, leaves: set[int]) -> bool:
    """Returns True if a tensor is computed only from the given leaf tensors, by routes and elementwise functions."""
    stack: list[Any] = [tensor.grad_fn]
    visited: set[Any] = set()
    while stack:
        node = stack.pop()
        if node is None or node in visited:
            continue
        visited.add(node)
        step, leaf = getattr(node, "step", None), getattr(node, "variable", None)
        is_elementwise = isinstance(step, FunctionStep) and step.name.rpartition(".")[2] in _ELEMENTWISE
        if not (is_route_node(node) or is_elementwise) or (leaf is not None and id(leaf) not in leaves):
            return False
        stack += [below for below, _ in node.next_functions]
    return bool(visited)


__all__ = ["Ids", "Kind"]
