"""Propagation through the ``autograd.Function`` classes of a model, which are found in the autograd graph.

An elementwise function propagates relevance like an activation, through a step attached to its autograd node. It must
pass two tests: its Jacobian, computed by its ``backward`` at the values of the pass, is diagonal, and no output element
changes when another input element does. The second test requires the arguments of the call, which are read from the
frame of ``Function.apply`` while the function runs.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.forward_state import RUNNING, not_recorded
from ..kernels.normalization import Normalization
from ..kernels.step import FunctionStep
from ..model.autocast import exact
from .function_kernels import BroadcastKernel
from .registry import name_of
from .unsupported import UnknownKernel, is_elementwise

PROBES = 8
"""Number of probe vectors passed to the ``backward`` of a function."""
_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]
_HOSTS = ("torch.", "zennit.", "nrm_plugin.")
"""Packages whose functions already are steps or whose ``backward`` must not be probed, such as checkpoints."""


@dataclass(frozen=True, eq=False)
class CustomCall:
    """Call of ``Function.apply``.

    Attributes:
        function: Subclass of ``autograd.Function``.
        args: Arguments of the call.
    """

    function: type[torch.autograd.Function]
    args: tuple[Any, ...]

    def run(self, source: Tensor, number: int) -> Any:
        """Runs the function with argument ``number`` replaced by ``source``."""
        args = [source if index == number else _own(value) for index, value in enumerate(self.args)]
        return self.function.apply(*args)  # type: ignore[no-untyped-call]


def _own(value: Any) -> Any:
    """Copies a tensor, because the function may write to it. Returns any other argument unchanged."""
    return value.detach().clone() if isinstance(value, Tensor) else value


@dataclass
class CustomCalls:
    """Calls of ``Function.apply`` in a forward pass.

    Attributes:
        calls: The calls, in order.
    """

    calls: list[CustomCall] = field(default_factory=list)

    def observe(self, function: Any, args: tuple[Any, ...]) -> None:
        """Records the call of ``Function.apply`` that calls a torch function, if any.

        Args:
            function: Torch function that is called.
            args: Its positional arguments.

        Raises:
            UnsupportedOperationError: If the torch function writes to a view of a computed tensor, for which autograd
                has no separate node.
        """
        frame = _frame_of_apply(sys._getframe(1))
        if frame is None or str(frame.f_locals["cls"].__module__).startswith(_HOSTS):
            return
        args_of_apply = frame.f_locals["args"]
        if not self.calls or self.calls[-1].args is not args_of_apply:
            self.calls.append(CustomCall(frame.f_locals["cls"], args_of_apply))
        if _writes_to_part(function, args):
            name = frame.f_locals["cls"].__qualname__
            raise UnsupportedOperationError(
                f"the autograd.Function {name!r} writes in place to a part of a computed tensor, for which autograd "
                f"has no separate node. Pass a copy: {name}.apply(part.clone())."
            )

    def of(self, node: Any) -> list[CustomCall]:
        """Returns the calls that may have created an autograd node: those with the same class and inputs."""
        below = {id(edge[0]) for edge in node.next_functions if edge[0] is not None}
        same = [call for call in self.calls if call.function is type(node)._forward_cls]
        return [call for call in same if {id(item.grad_fn) for item in _tensors(call.args)} & below]


def _writes_to_part(function: Any, args: tuple[Any, ...]) -> bool:
    target = args[0] if args and name_of(function).in_place else None
    return isinstance(target, Tensor) and target._base is not None and target.requires_grad


def _frame_of_apply(frame: FrameType | None) -> FrameType | None:
    while frame is not None and frame.f_code is not _APPLY:
        frame = frame.f_back
    return frame


def _tensors(args: Iterable[Any]) -> list[Tensor]:
    return [value for value in args if isinstance(value, Tensor)]


# -- steps ------------------------------------------------------------------------------------------------------------


def attach_steps(output: Any, calls: CustomCalls) -> None:
    """Attaches a propagation step to every user-defined ``autograd.Function`` between a model's inputs and its output.

    Args:
        output: Return value of the model.
        calls: The calls recorded in the forward pass.
    """
    for node, numbers in _custom_nodes(output).items():
        with not_recorded(), torch.no_grad():
            if numbers == {0}:
                _attach(node, _kernel_of(node, calls))
            else:
                _reject(node)


def _custom_nodes(output: Any) -> dict[Any, set[int]]:
    """Returns the nodes of user-defined functions below an output, each with the indices of its used outputs."""
    nodes: dict[Any, set[int]] = {}
    edges = [(tensor.grad_fn, tensor.output_nr) for tensor in tensors_of(output)]
    visited: set[Any] = set()
    while edges:
        node, number = edges.pop()
        if isinstance(node, BackwardCFunction) and not hasattr(node, "step") and not _is_of_host(node):
            nodes.setdefault(node, set()).add(number)
        if node is not None and node not in visited:
            visited.add(node)
            edges += node.next_functions
    return nodes


def tensors_of(value: Any) -> Iterator[Tensor]:
    """Yields the tensors in nested lists, tuples, mappings and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_of(tuple(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_of(item)
    elif is_dataclass(value):
        yield from tensors_of([getattr(value, item.name) for item in fields(value)])


def _is_of_host(node: Any) -> bool:
    return str(type(node)._forward_cls.__module__).startswith(_HOSTS)


def _attach(node: Any, kernel: Kernel) -> None:
    """Attaches a step to a node. Its backward pass then returns propagated relevance instead of the gradient."""
    output = _like(node, 0)
    step = FunctionStep(type(node)._forward_cls.__name__, output, lambda: kernel, Normalization("sink"), "elementwise")
    step.unsupported_call = node.name() if isinstance(kernel, UnknownKernel) else None
    node.step = step

    def replace(below: tuple[Any, ...], above: tuple[Any, ...]) -> tuple[Any, ...]:
        with exact():
            parts, _ = step.pull(above[0].unsqueeze(0))
        return tuple(None if old is None else part[0] for old, part in zip(below, parts, strict=True))

    node.register_hook(replace)


def _reject(node: Any) -> None:
    """Registers a hook that raises an error if relevance reaches a function of several outputs."""
    error = _error(node, "returns several tensors that are used, or one other than the first")

    def check(below: tuple[Any, ...], above: tuple[Any, ...]) -> None:
        if any(part is not None and bool(part.any()) for part in above):
            raise error

    node.register_hook(check)


def _like(node: Any, number: int) -> Tensor:
    """Returns an expanded scalar with the shape, dtype and device of an output of a node."""
    seen = node._input_metadata[number]
    return torch.empty((), dtype=seen.dtype, device=seen.device).expand(seen.shape)


# -- which functions are elementwise ----------------------------------------------------------------------------------


def _kernel_of(node: Any, calls: CustomCalls) -> Kernel:
    shapes = [_shape_below(*edge) for edge in node.next_functions]
    live = [number for number, edge in enumerate(node.next_functions) if _carries(edge[0])]
    if RUNNING.reference is not None:
        return UnknownKernel(UnsupportedOperationError(_OF_DIFFERENCES.format(name=_name_of(node))), shapes)
    fault = _signature_fault(node, shapes, live) or _mixing_fault(node, live[0], calls.of(node))
    if not fault:
        return BroadcastKernel(shapes, live[0])
    return UnknownKernel(_error(node, fault), shapes)


def _error(node: Any, fault: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(_ERROR.format(name=_name_of(node), fault=fault))


def _name_of(node: Any) -> str:
    return str(type(node)._forward_cls.__qualname__)


def _shape_below(node: Any, number: int) -> torch.Size:
    if node is None:
        return torch.Size()
    return node.variable.shape if hasattr(node, "variable") else torch.Size(node._input_metadata[number].shape)


def _carries(node: Any) -> bool:
    """Returns True if the output of a node can receive relevance, unlike tensors computed before the pass."""
    if node is None or RUNNING.first_node is None:
        return node is not None
    return not hasattr(node, "variable") and node._sequence_nr() >= RUNNING.first_node


def _signature_fault(node: Any, shapes: list[torch.Size], live: list[int]) -> str:
    if len(live) != 1:
        return f"has {len(live)} inputs that carry relevance"
    given, returned = tuple(shapes[live[0]]), tuple(node._input_metadata[0].shape)
    return "" if given == returned else f"turns shape {given} into {returned}"


def _mixing_fault(node: Any, live: int, calls: list[CustomCall]) -> str:
    """Describes why a function of one tensor is not elementwise. Returns an empty string if it is."""
    try:
        slope = _slope(node, live)
    except (NotImplementedError, AssertionError) as error:  # the function has no usable backward
        fault = "" if calls else f"has a backward that raises {type(error).__name__}"
    except Exception as error:
        fault = f"has a backward that raises {type(error).__name__}: {error}"
    else:
        fault = "" if slope is not None else "mixes elements, or has a backward that is not linear"
        if slope is not None and not calls and not bool(slope.any()):
            fault = "has a derivative that is zero everywhere"
    return fault or next(filter(None, (_forward_fault(node, call) for call in calls)), "")


def _slope(node: Any, live: int) -> Tensor | None:
    """Computes the diagonal of a function's Jacobian from its ``backward``. Returns None if it is not diagonal.

    The probes are signed powers of two. Products with a diagonal matrix therefore have no rounding errors.
    """
    like = _like(node, 0)
    generator = torch.Generator().manual_seed(0)
    zeros = [torch.zeros_like(_like(node, number)) for number in range(1, len(node._input_metadata))]
    slope: Tensor | None = None
    for _ in range(PROBES):
        power = torch.randint(-1, 2, like.shape, generator=generator)
        sign = 2 * torch.randint(2, like.shape, generator=generator) - 1
        probe = (sign * 2.0**power).to(like)
        product = _at_edge(node, node.apply(probe, *zeros), live)
        if product is None or product.shape != like.shape:
            return None
        slope = product / probe if slope is None else slope
        rounding = 4 * torch.finfo(like.dtype).eps
        if not torch.allclose(product, slope * probe, rtol=rounding, atol=1e-30, equal_nan=True):
            return None
    return slope


def _at_edge(node: Any, products: Any, live: int) -> Tensor | None:
    """Selects the gradient of the input with index ``live`` from the return value of ``backward``."""
    parts = products if isinstance(products, tuple) else (products,)
    needed = [part for part, is_needed in zip(parts, node.needs_input_grad, strict=False) if is_needed]
    rank = sum(edge[0] is not None for edge in node.next_functions[:live])
    result: Tensor | None = needed[rank] if rank < len(needed) else None
    return result


def _forward_fault(node: Any, call: CustomCall) -> str:
    below = {id(edge[0]) for edge in node.next_functions if edge[0] is not None}
    flags = [isinstance(value, Tensor) and id(value.grad_fn) in below for value in call.args]
    number = flags.index(True)

    def run(values: Tensor) -> Tensor:
        result = call.run(values, number)
        first: Tensor = result[0] if isinstance(result, tuple) else result
        return first

    point = call.args[number].detach().clone()
    try:
        is_diagonal = is_elementwise(run, point, run(point.clone()))
    except Exception as error:  # for example, an unsupported number of elements
        return f"has a forward that raises {type(error).__name__} for values of its input alone"
    return "" if is_diagonal else "mixes elements: its output at one element changes with another element"


_OF_DIFFERENCES = (
    "relevance of a difference arrived at the autograd.Function {name!r}, whose values at the reference are not "
    "known. Call it in a separate module whose forward is `return {name}.apply(x)`, or explain the output without "
    "reference=."
)
_ERROR = (
    "relevance arrived at the autograd.Function {name!r}, which has no kernel: it {fault}. Call it in a separate "
    "module whose forward is `return {name}.apply(x)`, and give that module a rule in the composite's layer_map: "
    "zennit.rules.Pass() to pass relevance element by element, as through a softmax, zennit.rules.Epsilon() if the "
    "function is linear. A rule passes relevance to the first input."
)

__all__ = ["CustomCall", "CustomCalls", "attach_steps", "tensors_of"]
