"""Forward pass under interception, in which each function call becomes a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.forward_state import (
    RUNNING,
    Saved,
    is_in_module_step,
    is_inside_step,
    listener,
    not_recorded,
    protect_weights,
    protected,
    without_torch_function,
    write,
)
from ..kernels.layer_call import LayerCall
from ..kernels.layer_step import LayerStep
from ..kernels.reference_pass import ReferencePass
from ..kernels.step import FunctionStep, Step, link, step_of
from ..model.affine_layers import LAYERS, layer_like
from ..model.checks import check_function
from ..model.shapes_without_values import data_address
from ..model.trace_guards import without_modes
from ..model.zero_one_routes import source_of
from .attention import layout
from .autograd_functions import CustomCalls
from .complex_kernels import complex_kernel
from .complex_tensors import ComplexTensors, Expression, map_items
from .differences import DifferenceCall, SecantFactory
from .function_call import CallInput, FunctionCall, Settings, Slot
from .function_kernels import BroadcastKernel
from .gates import Gates
from .integer_inputs import Ids
from .observed_call import ObservedCall, source_line
from .registry import KERNELS, KernelFactory
from .rowwise_functions import keeps_rows
from .rules_on_differences import has_any_rule
from .secant_kernels import polynomial
from .secants import elementwise
from .unsupported import UnknownKernel, consists_of_routes, is_elementwise, uncovered_layer_error
from .weighted_functions import channel_dim, layer_call

_SILENT = frozenset("view reshape flatten permute transpose squeeze unsqueeze contiguous expand clone get".split())
"""Routes whose outputs are not recorded as taps (hook points)."""


class InterceptedPass:
    """State of a forward pass under interception.

    Args:
        settings: Settings of all function steps.
        intercepting: Context manager in which function calls of this package are intercepted.

    Attributes:
        gates: The gates found in this pass.
        complex_tensors: Complex tensors, as expressions of real tensors.
        custom_calls: Calls of ``autograd.Function`` classes.
        module_paths: Paths of the running modules, outermost first.
        packs: Batch sizes and sample order of each packed sequence passed to a module.
        decomposing: Functions that are currently replaced by their Python bodies.
    """

    def __init__(self, settings: Settings, intercepting: AbstractContextManager[Any]) -> None:
        self.settings, self.intercepting = settings, intercepting
        self.gates = Gates()
        self.complex_tensors = ComplexTensors()
        self.custom_calls = CustomCalls()
        self.module_paths: list[str] = []
        self.packs: list[tuple[Tensor, Tensor]] = []
        self.decomposing: list[Callable[..., Any]] = []
        self._call_counts: dict[str, int] = {}
        listening = listener()
        self._ids = None if listening is None else Ids(listening.indices, listening.inputs)
        if listening is not None:
            listening.gates = self.gates

    @property
    def path(self) -> str:
        """Path of the running module."""
        return self.module_paths[-1] if self.module_paths else ""

    # -- functions with a kernel ------------------------------------------------------------------------------------

    def step(self, observed: ObservedCall, factory: KernelFactory) -> Any:
        """Runs a function with a kernel as a step and returns its output."""
        self._check_covered(observed)
        if listener() is not None:  # a context may run in training mode, a measure may not
            check_function(observed.name.base, observed.args, observed.kwargs, self.path)
        with without_modes():
            call = self.function_call(observed)
        output = call.run(*call.values)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return self.complex_step(observed)
        with without_modes():
            return self._linked_step(call, output.detach(), observed, factory)

    def _linked_step(self, call: FunctionCall, output: Tensor, observed: ObservedCall, factory: KernelFactory) -> Any:
        """Records a call as a step and returns the linked output."""
        if any(data_address(output) == data_address(value) for value in call.values):
            output = output.clone()  # an operation may return its input, a step may not
        layer = layer_call(call, output) if factory is KERNELS.get(call.name) else None
        rule = "sum" if call.name in ("add", "sub", "rsub") and len(call.inputs) > 1 else call.name
        rows = str(factory.__module__).startswith(f"{__package__}.") and keeps_rows(call, output)
        linked = self.linked(call, output, lambda: factory(call), rule, observed.inputs, layer, rows)
        self.gates.tag_result(call.name, observed.inputs, linked, observed.has_constants)
        return written(observed, linked)

    def function_call(self, observed: ObservedCall) -> FunctionCall:
        """Converts an observed call to a :class:`FunctionCall`, whose inputs are saved."""
        function, keyword_slots = observed.out_of_place()
        name = observed.name.base
        knows_gates = RUNNING.reference is None or name in ("matmul", "einsum")  # events may refer to their heads
        inputs = tuple(
            CallInput(Saved(tensor), knows_gates and self.gates.holds(tensor), source_of(tensor.grad_fn))
            for tensor in observed.inputs
        )
        slots, keywords = protected(observed.slots), {key: protected(value) for key, value in keyword_slots.items()}
        return FunctionCall(name, function, self.path, slots, keywords, inputs, self.settings)

    def _check_covered(self, observed: ObservedCall) -> None:
        """Raises :class:`UncoveredLayerError` if the composite has no rule for a functional layer."""
        if observed.name.base not in LAYERS:
            return
        weight = observed.argument(1, "weight")
        if not isinstance(weight, Tensor) or weight.requires_grad:
            return
        like = layer_like(observed.name.base)
        if self.settings.rules.of_weight(weight, like, self.path) is None:
            raise uncovered_layer_error(self.path, like, observed.name.base)

    def linked(
        self,
        call: FunctionCall,
        output: Tensor,
        build: Callable[[], Kernel],
        rule: str,
        inputs: Sequence[Tensor],
        layer: LayerCall | None = None,
        rows: bool = False,
    ) -> Tensor:
        """Creates the step of a call, links it to the output, and notifies the listener."""
        path, number = self._numbered(call.name)
        normalization = self.settings.normalization
        step: Step
        if layer is None:
            step = FunctionStep(path, output, build, normalization, rule)
        else:
            protect_weights(layer.module)
            step = LayerStep(layer, output, normalization, path, rule)
        step.call, step.attention, step.keeps_rows = number, layout(call, output), rows
        if rule == "sum":  # sums of sums share their magnitudes
            below = [step_of(item.producer) for item in call.inputs]
            step.joined = tuple(other for other in below if other is not None and other.rule == "sum")
        if isinstance(step, LayerStep) and self.settings.fuse is not None:
            with not_recorded():
                self.settings.fuse(step, inputs[0])
        listening = listener()
        if listening is not None:
            listening.on_step(None, step, output)
        linked = link(step, output, tuple(inputs))
        if listening is not None:
            listening.on_function(path, number, linked, channel_dim(call))
        return linked

    def linked_difference(
        self,
        reference: ReferencePass,
        call: FunctionCall,
        output: Tensor,
        factory: SecantFactory,
        inputs: Sequence[Tensor],
    ) -> Tensor:
        """Creates and links the step of a call that propagates the difference from a reference."""
        others = reference.meet(call.name, call.path, [*call.values, output])
        has_rules = has_any_rule(self.settings.rules)
        both = DifferenceCall(call, Saved(output), others, reference, has_rules)
        rows = str(factory.__module__).startswith(f"{__package__}.") and keeps_rows(call, output)
        return self.linked(call, output, lambda: factory(both), call.name, inputs, None, rows)

    def _numbered(self, name: str) -> tuple[str, int]:
        """Returns the path of a function called in the running module and the index of the call."""
        path = f"{self.path}.{name}" if self.path else name
        self._call_counts[path] = self._call_counts.get(path, -1) + 1
        return path, self._call_counts[path]

    # -- functions without a kernel ---------------------------------------------------------------------------------

    def route_or_unknown(self, observed: ObservedCall) -> Any:
        """Runs a function that has no kernel.

        Raises an error if relevance later reaches the function's output, unless the function is a route.
        """
        output = observed.run()
        tensors = [
            item for item in (output if isinstance(output, (list, tuple)) else [output]) if isinstance(item, Tensor)
        ]
        if any(tensor.is_complex() for tensor in tensors):
            return self.complex_step(observed)
        if all(consists_of_routes(tensor, observed.inputs, with_steps=False) for tensor in tensors):
            self.gates.tag_route(observed.inputs, output)
            self._announce_route(observed.name.base, output)
            return output
        inputs = tuple(CallInput(Saved(tensor)) for tensor in observed.inputs)
        call = FunctionCall(
            observed.name.base, observed.function, self.path, observed.slots, observed.keyword_slots, inputs
        )
        return map_items(output, lambda item: self._unknown_step(call, item, observed.inputs))

    def complex_step(self, observed: ObservedCall) -> Any:
        """Runs an observed call that takes or returns complex tensors.

        A real output is recorded as a single step whose inputs are the real tensors from which the complex arguments
        were computed.
        """
        expression = self.complex_tensors.expression(observed)
        output = observed.run()
        if expression.writes and isinstance(observed.overwritten, Tensor):
            self.complex_tensors.remember(observed.overwritten, expression)
        if not isinstance(output, (list, tuple)):
            return output if expression.writes else self._of_complex(output, expression)
        items = [replace(expression, item=number) for number in range(len(output))]
        return type(output)([self._of_complex(item, one) for item, one in zip(output, items, strict=True)])

    def _of_complex(self, output: Any, expression: Expression) -> Any:
        """Records an output of a function with complex arguments as an expression if complex or a step if real."""
        if not isinstance(output, Tensor) or not output.requires_grad:
            return output
        if output.is_complex():
            return self.complex_tensors.remember(output, expression)
        if any(source.is_overwritten for source in expression.sources):
            raise UnsupportedOperationError(
                f"{expression.name!r} in {self.path or 'the model'!r} reads a tensor that is overwritten in place "
                "before its complex numbers are converted back to real ones, which has no kernel. Write to a copy, x "
                "= x + y instead of x += y."
            )
        inputs = tuple(CallInput(source.saved) for source in expression.sources)
        slots = tuple(Slot(number) for number in range(len(inputs)))
        function = _on_values(expression)
        call = FunctionCall(expression.name, function, self.path, slots, {}, inputs, self.settings)
        tensors = [source.tensor for source in expression.sources]
        if RUNNING.reference is not None:
            return self.linked_difference(RUNNING.reference, call, output.detach().clone(), polynomial, tensors)
        return self.linked(call, output.detach().clone(), lambda: complex_kernel(call), call.name, tensors)

    def _unknown_step(self, call: FunctionCall, output: Any, inputs: Sequence[Tensor]) -> Any:
        """Links the output of a function without a kernel to a step that raises an error if relevance arrives."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.requires_grad:
            return output
        where = f"{call.name!r} in {call.path or 'the model'!r} ({source_line()})"
        if output.layout != torch.strided:
            raise UnsupportedOperationError(
                f"{where} creates a sparse tensor of computed values, which has no kernel. Keep them dense: gather "
                "messages with index_select, and sum them with index_add."
            )
        error = UnsupportedOperationError(f"relevance arrived at {where}, which has no kernel. {_advice(call)}")
        shapes = [tensor.shape for tensor in inputs]
        linked = self.linked(call, output.detach(), lambda: UnknownKernel(error, shapes), call.name, inputs)
        linked.grad_fn.step.unsupported_call = call  # type: ignore[union-attr]  # a Link
        return linked

    def _announce_route(self, name: str, output: Any) -> None:
        listening = listener()
        if listening is None or name in _SILENT or not isinstance(output, Tensor) or output.grad_fn is None:
            return
        path, number = self._numbered(name)
        listening.on_function(path, number, output, None)

    # -- ids among the inputs ---------------------------------------------------------------------------------------

    @property
    def follows_ids(self) -> bool:
        """True if functions of constants are also observed. Their results may depend on ids."""
        return self._ids is not None and self._ids.are_known

    def with_ids(self, call: ObservedCall, result: Any) -> Any:
        """Returns the result of a call, with rows looked up by ids replaced by additional inputs."""
        if self._ids is None:
            return result
        return self._ids.follow(call, result, None if is_in_module_step() else partial(self._looked_up, call))

    def _looked_up(self, call: ObservedCall, rows: Tensor) -> Tensor:
        path, number = self._numbered(call.name.base)
        listening = listener()
        assert listening is not None, "only a listener has ids"
        with torch.enable_grad():
            return written(call, listening.on_lookup(path, number, rows))  # type: ignore[no-any-return]

    # -- modules ----------------------------------------------------------------------------------------------------

    @without_torch_function
    def activation_step(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """Records the output of an elementwise module as a step if the functions inside it cannot be observed.

        Examples are activations in TorchScript or with a custom ``autograd.Function``. Returns None for all other
        modules.
        """
        if is_inside_step() or not isinstance(output, Tensor):
            return None
        if output.grad_fn is None or step_of(output.grad_fn) is not None:
            return None
        observed = ObservedCall.of(module.forward, args, kwargs, self.path)
        if len(observed.inputs) != 1:
            return None
        source = observed.inputs[0]
        if output.shape != source.shape or data_address(output) == data_address(source):
            return None
        if consists_of_routes(output, observed.inputs):
            return None
        inputs = (CallInput(Saved(source, values=RUNNING.reference is not None)),)
        name = type(module).__name__
        call = FunctionCall(name, module.forward, self.path, observed.slots, observed.keyword_slots, inputs)
        with not_recorded(), torch.no_grad():
            if not is_elementwise(call.run, source.detach(), output.detach()):
                return None
        shapes = [output.shape]
        if RUNNING.reference is not None:
            return self.linked_difference(RUNNING.reference, call, output.detach().clone(), elementwise, (source,))
        return self.linked(call, output.detach().clone(), lambda: BroadcastKernel(shapes), "elementwise", (source,))


def written(observed: ObservedCall, result: Any) -> Any:
    """Returns a result. If the call is in place or has ``out=``, the result is first written to its target."""
    return result if observed.target is None else write(observed.target, result)


def _on_values(expression: Expression) -> Callable[..., Tensor]:
    return lambda *values: expression.on(values)


def _advice(call: FunctionCall) -> str:
    module = getattr(call.function, "__module__", None) or "torch"
    function = f"{module}.{getattr(call.function, '__name__', call.name)}"
    return (
        f"Register a kernel by decorating a function with nrm_plugin.register_kernel({function}), or use an operation "
        "that has a kernel."
    )


__all__ = ["InterceptedPass", "written"]
