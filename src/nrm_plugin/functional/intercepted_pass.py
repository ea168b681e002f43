"""One forward pass under interception: how a call of a function becomes a step of the measure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.forward_state import Saved, is_in_module_step, is_inside_step, listener, not_recorded, write
from ..kernels.layer_call import LayerCall
from ..kernels.layer_step import LayerStep
from ..kernels.step import FunctionStep, Step, link
from ..model.checks import check_function
from ..model.routing import source_of
from .attention import layout
from .complex_tensors import ComplexTensors, RealSources, map_items
from .custom_functions import CustomCalls
from .function_call import CallInput, FunctionCall, Settings
from .function_kernels import BroadcastKernel
from .gates import Gates
from .ids import Ids
from .observed_call import ObservedCall, source_line
from .registry import KERNELS, KernelFactory
from .unsupported import UnknownKernel, consists_of_routes, is_elementwise, uncovered_layer_error
from .weighted_functions import LAYERS, channel_dim, layer_call

_SILENT = frozenset("view reshape flatten permute transpose squeeze unsqueeze contiguous expand clone get".split())
"""Routes that are not taps."""
_COMPLEX_ADVICE = (
    "It makes complex numbers, which have no kernel. Where a module turns one real tensor into another, give it a rule "
    "in the composite's layer_map: zennit.rules.Epsilon() if it is linear."
)


class InterceptedPass:
    """What is known of one forward pass of a model under interception.

    Args:
        settings: What all steps of functions depend on.
        intercepting: Entered by code whose own function calls are to be intercepted.

    Attributes:
        gates: The tensors that are gates.
        complex_tensors: The real sources of complex tensors.
        custom_calls: The calls of ``autograd.Function`` classes.
        module_paths: Paths of the modules that are running, outermost first.
        packs: Orders of the packed sequences that modules received.
        decomposing: The functions written in Python that are running by their bodies.
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

    @property
    def path(self) -> str:
        """Path of the module that is running."""
        return self.module_paths[-1] if self.module_paths else ""

    # -- functions with a kernel ------------------------------------------------------------------------------------

    def step(self, observed: ObservedCall, factory: KernelFactory) -> Any:
        """Runs a function that has a kernel; its output is a step."""
        self._check_covered(observed)
        if listener() is not None:  # a context of the composite may run in any mode, a measure may not
            check_function(observed.name.base, observed.args, observed.kwargs, self.path)
        call = self._function_call(observed)
        output = call.run(*call.values)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return self.complex_tensors.remember(observed.run(), observed.inputs, call.name)
        output = output.detach()
        if any(output.data_ptr() == value.data_ptr() for value in call.values):
            output = output.clone()  # some operations return their input; a step's output has memory of its own
        layer = layer_call(call, output) if factory is KERNELS.get(call.name) else None
        rule = "sum" if call.name in ("add", "sub", "rsub") and len(call.inputs) > 1 else call.name
        linked = self._linked(call, output, lambda: factory(call), rule, observed.inputs, layer)
        self.gates.tag_result(call.name, observed.inputs, linked, observed.has_constants)
        return written(observed, linked)

    def _function_call(self, observed: ObservedCall) -> FunctionCall:
        function, keyword_slots = observed.out_of_place()
        inputs = tuple(
            CallInput(Saved(tensor), self.gates.holds(tensor), source_of(tensor.grad_fn)) for tensor in observed.inputs
        )
        name, path = observed.name.base, self.path
        return FunctionCall(name, function, path, observed.slots, keyword_slots, inputs, self.settings)

    def _check_covered(self, observed: ObservedCall) -> None:
        """Raises unless the composite has a rule for a layer that is called as a function."""
        if observed.name.base not in LAYERS:
            return
        weight = observed.argument(1, "weight")
        if not isinstance(weight, Tensor) or weight.requires_grad:
            return
        like = LAYERS[observed.name.base]()
        if self.settings.rules.of_weight(weight, like) is None:
            raise uncovered_layer_error(self.path, like, observed.name.base)

    def _linked(
        self,
        call: FunctionCall,
        output: Tensor,
        build: Callable[[], Kernel],
        rule: str,
        inputs: Sequence[Tensor],
        layer: LayerCall | None = None,
    ) -> Tensor:
        """The output of a call as that of a step, which the listener is notified of."""
        path, number = self._numbered(call.name)
        normalization = self.settings.normalization
        step: Step
        if layer is None:
            step = FunctionStep(path, output, build, normalization, rule)
        else:
            step = LayerStep(layer, output, normalization, path, rule)
        step.call, step.attention = number, layout(call, output)
        if isinstance(step, LayerStep) and self.settings.fuse is not None:
            with not_recorded():
                self.settings.fuse(step, inputs[0])
        listening = listener()
        if listening is not None:
            listening.on_step(None, step)
        linked = link(step, output, tuple(inputs))
        if listening is not None:
            listening.on_function(path, number, linked, channel_dim(call))
        return linked

    def _numbered(self, name: str) -> tuple[str, int]:
        """Path of a function in the module that is running, and the number of this call of it."""
        path = f"{self.path}.{name}" if self.path else name
        self._call_counts[path] = self._call_counts.get(path, -1) + 1
        return path, self._call_counts[path]

    # -- functions without a kernel ---------------------------------------------------------------------------------

    def route_or_unknown(self, observed: ObservedCall) -> Any:
        """Runs a function without a kernel; unless autograd recorded routes alone, its output is an unknown step."""
        output = observed.run()
        tensors = [
            item for item in (output if isinstance(output, (list, tuple)) else [output]) if isinstance(item, Tensor)
        ]
        if all(consists_of_routes(tensor, observed.inputs, with_steps=False) for tensor in tensors):
            self.gates.tag_route(observed.inputs, output)
            self._announce_route(observed.name.base, output)
            return output
        inputs = tuple(CallInput(Saved(tensor)) for tensor in observed.inputs)
        call = FunctionCall(
            observed.name.base, observed.function, self.path, observed.slots, observed.keyword_slots, inputs
        )
        return map_items(output, lambda item: self._unknown_step(call, item, observed.inputs))

    def complex_step(self, observed: ObservedCall, sources: RealSources) -> Any:
        """Runs a function of complex tensors; a real output is an unknown step from the real sources."""
        tensors = (*sources.tensors, *observed.inputs)
        inputs = tuple(CallInput(Saved(tensor, values=False)) for tensor in tensors)
        call = FunctionCall(sources.name, observed.function, self.path, (), {}, inputs)
        return map_items(observed.run(), lambda item: self._unknown_step(call, item, tensors, _COMPLEX_ADVICE))

    def _unknown_step(self, call: FunctionCall, output: Any, inputs: Sequence[Tensor], advice: str = "") -> Any:
        """One item that a function without a kernel returned, as a step that raises when relevance arrives."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.requires_grad:
            return self.complex_tensors.remember(output, inputs, call.name)
        where = f"{call.name!r} in {call.path or 'the model'!r} ({source_line()})"
        if output.layout != torch.strided:
            raise UnsupportedOperationError(
                f"{where} makes a sparse tensor of computed values, which has no kernel. Keep them dense: gather "
                "messages by index_select, sum them by index_add."
            )
        error = UnsupportedOperationError(
            f"relevance arrived at {where}, which has no kernel. {advice or _advice(call)}"
        )
        shapes = [tensor.shape for tensor in inputs]
        linked = self._linked(call, output.detach(), lambda: UnknownKernel(error, shapes), call.name, inputs)
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
        """Whether there are ids to follow in what a function of constants returns."""
        return self._ids is not None and self._ids.are_known

    def with_ids(self, call: ObservedCall, result: Any) -> Any:
        """What a function returns; rows that ids among the inputs select are inputs."""
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

    def activation_step(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Tensor | None:
        """The output of a module as a step, if it maps each element on its own by functions that no mode sees.

        Such are activations with an ``autograd.Function`` of their own, or written in TorchScript. None for any other.
        """
        if is_inside_step():
            return None
        observed = ObservedCall.of(module.forward, args, kwargs, self.path)
        if len(observed.inputs) != 1 or not isinstance(output, Tensor) or output.grad_fn is None:
            return None
        source = observed.inputs[0]
        if output.shape != source.shape or output.data_ptr() == source.data_ptr():
            return None
        if consists_of_routes(output, observed.inputs):
            return None
        inputs = (CallInput(Saved(source, values=False)),)
        name = type(module).__name__
        call = FunctionCall(name, module.forward, self.path, observed.slots, observed.keyword_slots, inputs)
        with not_recorded(), torch.no_grad():
            if not is_elementwise(call.run, source.detach(), output.detach()):
                return None
        shapes = [output.shape]
        return self._linked(call, output.detach().clone(), lambda: BroadcastKernel(shapes), "elementwise", (source,))


def written(observed: ObservedCall, result: Any) -> Any:
    """A result, written to the target of the call if it has one."""
    return result if observed.target is None else write(observed.target, result)


def _advice(call: FunctionCall) -> str:
    module = getattr(call.function, "__module__", None) or "torch"
    function = f"{module}.{getattr(call.function, '__name__', call.name)}"
    return (
        f"Define how it propagates relevance: decorate a function with nrm_plugin.register_kernel({function}), or use "
        "an operation that has a kernel."
    )


__all__ = ["InterceptedPass", "written"]
