"""Handlers of intercepted function calls, tried in order until one applies.

A handler returns the result of the call, or ``NOT_HANDLED``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..kernels.forward_state import before_writing, note_untracked, write
from ..model.affine_layers import LAYERS
from ..model.trace_guards import without_modes
from .attention import FUSED, decomposed_attention, is_decomposed
from .decompositions import DECOMPOSITIONS, is_computed_layer, product_and_bias, python_body
from .difference_steps import NO_KERNEL, check_constants, check_route, difference_step, reference_pass
from .intercepted_pass import InterceptedPass, written
from .observed_call import WRITERS, ObservedCall
from .recurrent import RECURRENCES, Context
from .registry import KERNELS, kernel_factory_of
from .scatter import is_advanced_index, is_sparse_product, sum_of_messages, write_at

NOT_HANDLED: Final = object()
OF_UNKNOWN_SHAPE = frozenset("unique unique_consecutive".split())
"""Functions whose results have a data-dependent shape and are not tracked by autograd."""
FILLS = frozenset("new_zeros new_ones new_empty zeros_like ones_like empty_like rand_like randn_like".split())
"""Functions that use only the shape, dtype and device of a tensor, not its values."""
METADATA = frozenset("requires_grad detach backward register_hook retain_grad is_floating_point".split())


@dataclass(frozen=True)
class Handler:
    """Handler of one type of intercepted call.

    Attributes:
        name: Type of call.
        reason: Reason why such calls are handled separately.
        run: Function that returns the result of the call, or ``NOT_HANDLED``.
    """

    name: str
    reason: str
    run: Callable[[ObservedCall, InterceptedPass], Any]


def handle(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    """Returns the result of a call from the first handler that applies. The last one applies to every call."""
    for handler in HANDLERS:
        result = handler.run(call, forward_pass)
        if result is not NOT_HANDLED:
            with without_modes():
                if call.inputs and call.name.base not in FILLS and _leaves_the_graph(call, result):
                    note_untracked()
            return result
    raise AssertionError("the last handler applies to every call")


def _leaves_the_graph(call: ObservedCall, result: Any) -> bool:
    """Returns True if autograd does not track the result of a function of computed values."""
    items = result if isinstance(result, (list, tuple)) else (result,)
    if call.name.base in OF_UNKNOWN_SHAPE:
        return True
    if not all(isinstance(item, Tensor) for item in items):
        return call.leaves(result)
    return not all(item.requires_grad for item in items)


def _metadata(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    return call.run() if call.name.base in METADATA else NOT_HANDLED


def _same_as_reference(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    reference = reference_pass()
    if reference is not None and call.inputs:
        check_constants(reference, call)
    return NOT_HANDLED


def _difference(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    reference = reference_pass()
    if reference is None:
        return NOT_HANDLED
    result = difference_step(call, forward_pass, reference)
    return NOT_HANDLED if result is NO_KERNEL else result


def _copy_before_write(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    if call.overwritten is not None:
        before_writing(call.overwritten)
    return NOT_HANDLED


def _indexed_write(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    is_write = call.name.base in ("setitem", "index_put") and bool(call.inputs) and len(call.args) in (3, 4)
    if not is_write or call.kwargs.keys() - {"accumulate"} or not is_advanced_index(call.args[1]):
        return NOT_HANDLED
    with forward_pass.intercepting:
        result = write_at(*call.args, **call.kwargs)
    return write(call.args[0], result) if call.name.base == "setitem" or call.name.in_place else result


def _complex_numbers(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    known, written = forward_pass.complex_tensors, call.overwritten
    if not known.are_among((*call.args, *call.kwargs.values())):
        if not call.inputs or written is None or not written.is_complex():
            return NOT_HANDLED
    elif call.name.base == "abs" and not call.is_in_place:
        with forward_pass.intercepting:
            return torch.hypot(call.args[0].real, call.args[0].imag)
    return forward_pass.complex_step(call)


def _constants(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    return call.run() if not call.inputs or call.name.base in WRITERS else NOT_HANDLED


def _attention(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    if call.name.base != FUSED:
        return NOT_HANDLED
    if reference_pass() is None and not is_decomposed(forward_pass.settings.attention, call.argument(2, "value")):
        return NOT_HANDLED
    with forward_pass.intercepting:
        return decomposed_attention(*call.args, **call.kwargs)


def _sparse_product(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    if call.name.base != "matmul" or not is_sparse_product(call.args):
        return NOT_HANDLED
    with forward_pass.intercepting:
        return sum_of_messages(*call.args, **call.kwargs)


def _computed_layer(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    base = call.name.base
    if base not in LAYERS or kernel_factory_of(call.function, call.name) is not KERNELS[base]:
        return NOT_HANDLED
    if not is_computed_layer(*call.args, **call.kwargs):
        return NOT_HANDLED
    with forward_pass.intercepting:
        return product_and_bias(call.function, *call.args, **call.kwargs)


def _kernel(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    factory = None if reference_pass() is not None else kernel_factory_of(call.function, call.name)
    return NOT_HANDLED if factory is None else forward_pass.step(call, factory)


def _recurrence(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    recurrence = RECURRENCES.get(call.name.base)
    if recurrence is None:
        return NOT_HANDLED
    with forward_pass.intercepting:
        return recurrence(Context(call.path, forward_pass.packs), *call.args, **call.kwargs)


def _decomposition(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    decomposition = DECOMPOSITIONS.get(call.name.base)
    if decomposition is None:
        return NOT_HANDLED
    with forward_pass.intercepting:
        result = decomposition(*call.args, **call.kwargs)
    return NOT_HANDLED if result is NotImplemented else written(call, result)


def _python_function(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    body = python_body(call.function)
    # If a method of torch.Tensor calls that of its base class, it is observed a second time under the same name.
    if body is None or call.function in forward_pass.decomposing:
        return NOT_HANDLED
    forward_pass.decomposing.append(call.function)
    try:
        with forward_pass.intercepting:
            return body(*call.args, **call.kwargs)
    finally:
        forward_pass.decomposing.pop()


def _in_place(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    return call.run() if call.name.in_place else NOT_HANDLED


def _route_or_unknown(call: ObservedCall, forward_pass: InterceptedPass) -> Any:
    result, reference = forward_pass.route_or_unknown(call), reference_pass()
    if reference is not None:
        check_route(reference, call, result)
    return result


HANDLERS: tuple[Handler, ...] = (
    Handler("metadata", "no values are computed", _metadata),
    Handler(
        "same as reference", "masks and indices of a difference are the same; the call is passed on", _same_as_reference
    ),
    Handler(
        "copy before write",
        "steps that saved this memory need its earlier values; the call is passed on",
        _copy_before_write,
    ),
    Handler("indexed write", "positions given by tensors are looked up entry by entry", _indexed_write),
    Handler(
        "complex numbers", "complex tensors are not taps: one linear step connects the real tensors", _complex_numbers
    ),
    Handler("constants", "no relevance passes through them; autograd records what writers copy", _constants),
    Handler(
        "attention", "the weights also receive relevance: decomposed into matrix products and a softmax", _attention
    ),
    Handler("sparse product", "the matrix is an adjacency matrix: messages are summed into nodes", _sparse_product),
    Handler("difference", "relevance of a difference: the call becomes a step with secant slopes", _difference),
    Handler("computed layer", "the weight or bias is computed: decomposed into a product and a sum", _computed_layer),
    Handler("kernel", "the registry has a kernel: the call becomes a step", _kernel),
    Handler("recurrence", "torch runs all time steps as one function: replaced by a loop over time", _recurrence),
    Handler("decomposition", "the function consists of functions that have kernels", _decomposition),
    Handler(
        "python function",
        "the function is written in Python: the functions that it calls are observed",
        _python_function,
    ),
    Handler(
        "in place", "the function is unknown: the audit of the recording rejects it unless it is a route", _in_place
    ),
    Handler(
        "route or unknown",
        "autograd records routes; anything else raises an error when relevance arrives",
        _route_or_unknown,
    ),
)
"""Handlers in order of precedence."""


__all__ = ["HANDLERS", "NOT_HANDLED", "Handler", "handle"]
