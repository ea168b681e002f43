"""Function calls as steps of a measure that explains a difference from a reference.

Each call is paired with the same call in the forward pass on the reference, and a secant kernel is derived from both.

Source: docs/differences.md.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.forward_state import RUNNING
from ..kernels.reference_pass import ReferencePass
from ..model.checks import check_function
from ..model.zero_one_routes import operation
from . import secant_maxima, secant_products  # noqa: F401  (imported to register kernels)
from .differences import SECANTS, DifferenceCall, SecantFactory
from .function_call import Slot
from .function_kernels import BroadcastKernel
from .gates import GATE_FUNCTIONS, PRESERVING
from .intercepted_pass import InterceptedPass, written
from .observed_call import ObservedCall
from .registry import KERNELS, KERNELS_BY_FUNCTION, KernelFactory
from .rules_on_differences import has_rule, of_own, ruled
from .scatter import scatter_extremum
from .secants import CONVERSIONS, elementwise

NO_KERNEL: Final = object()
_PACKAGE = __name__.rpartition(".")[0]


def reference_pass() -> ReferencePass | None:
    """Returns the forward pass on the reference, or None if no difference is explained."""
    reference: ReferencePass | None = RUNNING.reference
    return reference


def check_constants(reference: ReferencePass, observed: ObservedCall) -> None:
    """Raises :class:`DifferenceError` unless the constants of a call equal those on the reference."""
    constants: Any = [observed.slots, observed.keyword_slots]
    if observed.name.base == "where" and len(observed.slots) == 3:
        constants = _used_by_where(*observed.slots)
    if observed.name.base in _OVERWRITERS:  # the old content of the target does not matter
        constants = [observed.slots[1:], observed.keyword_slots]
    reference.meet(observed.name.base, observed.path, (), constants)


_OVERWRITERS = frozenset(["copy", "setitem", "index_put"])


def _used_by_where(condition: Any, first: Any, second: Any) -> list[Any]:
    """Returns the arguments of ``torch.where``, with zeros in place of the elements that are not selected."""
    if not (isinstance(condition, Tensor) and condition.dtype == torch.bool):  # called as a method
        condition, first = first, condition
    kept = [condition]
    for value, is_used in ((first, True), (second, False)):
        if isinstance(value, Tensor) and isinstance(condition, Tensor):
            value = torch.where(condition if is_used else ~condition, value, torch.zeros_like(value))
        kept.append(value)
    return kept


def check_route(reference: ReferencePass, observed: ObservedCall, output: Any) -> None:
    """Raises :class:`DifferenceError` unless a route copies the same elements as on the reference.

    Constant indices are compared before the call. Here, the indices computed by the call itself, such as a sort order,
    are compared.
    """
    items = output if isinstance(output, (list, tuple)) else (output,)
    nodes: set[Any] = {item.grad_fn for item in items if isinstance(item, Tensor)}
    known: set[Any] = {tensor.grad_fn for tensor in observed.inputs}
    while nodes := nodes - known - {None}:
        known |= nodes
        for node in nodes:
            if operation(node).lower() in _BY_VALUE:
                reference.meet(observed.name.base, observed.path, (), [_indices(node, observed)])
        nodes = {below for node in nodes for below, _ in node.next_functions}


_BY_VALUE = frozenset(
    "sort topk kthvalue median nanmedian mode cummax cummin max min amax amin maximum minimum aminmax maxpool1d "
    "maxpool2dwithindices maxpool3dwithindices mkldnnmaxpool2d adaptivemaxpool2d adaptivemaxpool3d fractionalmaxpool2d "
    "fractionalmaxpool3d".split()
)
"""Routes whose indices depend on the values of their input."""


def _indices(node: Any, observed: ObservedCall) -> Tensor:
    indices = getattr(node, "_saved_indices", None)
    if not isinstance(indices, Tensor):
        raise UnsupportedOperationError(
            f"{observed.name.base!r} in {observed.path or 'the model'!r} copies elements that depend on their values, "
            "and has no kernel of differences. Use amax, max(dim), topk or sort, or explain the output without "
            "reference=."
        )
    return indices


def difference_step(observed: ObservedCall, forward_pass: InterceptedPass, reference: ReferencePass) -> Any:
    """Runs a function as a step with its kernel for differences.

    Returns:
        The result of the function, or ``NO_KERNEL``.
    """
    factory = _factory_of(observed)
    if factory is None:
        return NO_KERNEL
    check_function(observed.name.base, observed.args, observed.kwargs, observed.path)
    call = forward_pass.function_call(observed)
    factory = ruled if factory is SECANTS.get(call.name) and has_rule(call) else factory
    returned = call.run(*call.values)
    output = returned[0] if isinstance(returned, tuple) else returned
    if any(output is item.saved.tensor for item in call.inputs):
        return NO_KERNEL  # such as a conversion to the same format
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return NO_KERNEL
    if call.name in CONVERSIONS and output.dtype == call.values[0].dtype:
        return NO_KERNEL  # a move to another device
    output = output.detach()
    if any(output.data_ptr() == value.data_ptr() for value in call.values):
        output = output.clone()
    linked = forward_pass.linked_difference(reference, call, output, factory, observed.inputs)
    if call.name in GATE_FUNCTIONS or call.name in PRESERVING:  # for events of heads
        forward_pass.gates.tag_result(call.name, observed.inputs, linked, observed.has_constants)
    if isinstance(returned, tuple):
        return type(returned)((linked, *returned[1:]))
    return written(observed, linked)


def _factory_of(observed: ObservedCall) -> SecantFactory | None:
    """Returns the factory of a function's kernel for differences. Kernels registered by the user take precedence."""
    try:
        own = KERNELS_BY_FUNCTION.get(observed.function)
    except TypeError:  # not hashable
        own = None
    own = own or KERNELS.get(observed.name.base)
    if own is not None and not str(own.__module__).startswith(_PACKAGE):
        return _of_own(own)
    if observed.name.base in CONVERSIONS and not isinstance(observed.slots[0], Slot):
        return None  # a constant in the format of a computed tensor
    if observed.function is scatter_extremum:
        return secant_maxima.extremum_of_groups
    return SECANTS.get(observed.name.base)


def _of_own(own: KernelFactory) -> SecantFactory:
    def factory(both: DifferenceCall) -> Kernel:
        kernel = of_own(own, both)
        is_identity = type(kernel) is BroadcastKernel and len(both.shapes) == 1
        return elementwise(both) if is_identity else kernel

    return factory


__all__ = ["NO_KERNEL", "check_constants", "difference_step", "reference_pass"]
