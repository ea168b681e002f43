"""Hook that turns each call of a module into a step of the computation graph.

The module runs on a detached input, and the kernel of the rule links its output to the original input. The backward
function of the module is never called, and each call of a reused module has its own kernel.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from zennit.core import Hook, RemovableHandle, RemovableHandleList
from zennit.rules import Pass

from ..errors import InputError, UnsupportedRuleError, autocast_outside, warn
from ..model.autocast import asked_for
from ..model.custom_layers import WeightRecorder, is_own_layer
from ..model.quantized import is_quantized
from ..model.renormalization import check_unused
from ..model.shallow_copies import shared_copy
from ..model.shapes_without_values import data_address
from .form import Form
from .forward_state import (
    RUNNING,
    RunningModule,
    Saved,
    before_writing,
    is_foreign,
    is_inside_step,
    is_saved,
    is_transformed,
    leave_mode,
    listener,
    not_recorded,
    without_torch_function,
    write,
)
from .known_rules import is_known_linear, own_copy
from .layer_call import LayerCall, Run, forward
from .layer_step import Fuse, LayerStep
from .normalization import Normalization
from .rule_reader import check_linear
from .step import link, link_in_place
from .torch_function_modes import Mode, OutOfPlace, is_torch_activation, mode_for, seen_image, writes_in_place

Arguments = dict[int | str, Tensor]
"""Tensors among the arguments of a module, keyed by position or keyword."""


@dataclass(frozen=True)
class OpenCall:
    """Call of a module that has not yet returned.

    Attributes:
        source: The input, attached to the autograd graph.
        passed: The detached tensor that the module received instead.
        version: The version counter of ``passed`` before the call.
        saved_input: The input, protected from later writes.
        run: Function that runs the module on a given first input.
        run_again: Function that runs the module again on its original arguments.
        mode: The torch function mode in which the module runs.
        in_place: Whether the module is allowed to overwrite its input.
    """

    source: Tensor
    passed: Tensor
    version: int
    saved_input: Saved | Form
    run: Run
    run_again: Callable[[], Any]
    mode: Mode | None = None
    in_place: bool = False

    @property
    def wrote(self) -> bool:
        """True if the module operates in place and would have overwritten its input if it had not received a copy."""
        return isinstance(self.mode, OutOfPlace) or self.passed._version != self.version


class StepHook(Hook):
    """Zennit hook that turns each call of a module into a step, applying the rule of another hook.

    Args:
        rule: The hook that the composite assigns to the module.
        normalization: The normalization of the columns.
        name: Layer name, for error messages.
        checked: Rules that were found to be linear, shared by all copies of the hook.
        fuse: Callback that receives each new step and its input and schedules fusion with adjacent steps.
    """

    def __init__(
        self,
        rule: Hook,
        normalization: Normalization,
        name: str = "",
        checked: weakref.WeakSet[Hook] | None = None,
        fuse: Fuse | None = None,
    ) -> None:
        super().__init__()
        self.rule = rule
        self.normalization = normalization
        self.name = name
        self.fuse = fuse
        self._checked: weakref.WeakSet[Hook] = weakref.WeakSet() if checked is None else checked

    def copy(self) -> StepHook:
        """Returns a hook with the same rule for another module."""
        return StepHook(self.rule, self.normalization, self.name, self._checked, self.fuse)

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Registers the hook on a module. Returns the handles that remove it."""
        return RemovableHandleList(
            [
                RemovableHandle(self),
                module.register_forward_pre_hook(self.enter, with_kwargs=True),
                # Called even if the module raised an error, since later calls would otherwise seem to be inside the
                # module. Called before other hooks, since those that mask or store relevance, as in zennit-crp, need
                # the linked output.
                module.register_forward_hook(self.leave, with_kwargs=True, always_call=True, prepend=True),
            ]
        )

    def remove(self) -> None:
        """Removes the hook and discards unfinished calls.

        After a keyboard interrupt, torch does not run forward hooks, and calls remain unfinished.
        """
        super().remove()
        for running in RUNNING.modules:
            if running.hook is self and running.call is not None and running.call.mode is not None:
                leave_mode(running.call.mode)
        RUNNING.modules[:] = [running for running in RUNNING.modules if running.hook is not self]

    @without_torch_function
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Detaches the arguments of the module. Registered as a forward pre-hook."""
        if is_transformed():
            RUNNING.modules.append(RunningModule(self, module, None))
            return None
        floating = _floating(args, kwargs)
        computed = {key: tensor for key, tensor in floating.items() if tensor.requires_grad and not is_foreign(tensor)}
        if len(computed) > 1:
            computed = {key: tensor for key, tensor in computed.items() if not is_foreign(tensor, is_exact=True)}
        if self.active and not computed and not is_inside_step() and _has_ids():
            return None  # the functions inside compute constants or look up rows by integer inputs
        if not self.active or not computed or is_inside_step():
            RUNNING.modules.append(RunningModule(self, module, None))
            return None
        device = next(iter(computed.values())).device
        if asked_for(device) is not None and listener() is None:  # a measure has its relevance in float32
            raise InputError(autocast_outside(self.name, type(module).__name__))
        if len(computed) > 1 and is_own_layer(module):
            return None  # the functions inside are steps with the rule of the module, each with its own input
        if len(computed) > 1:
            warn(
                f"layer {self.name!r} ({type(module).__name__}) has a rule and {len(computed)} inputs that depend on "
                "the model's input. As in Zennit, its rule propagates all relevance to the first of them.",
                UserWarning,
            )
        if RUNNING.renormalized:
            check_unused(RUNNING.renormalized, module._parameters.values())
        passed = {key: _detached(module, tensor) for key, tensor in computed.items()}
        if _has_backward_hooks(module):  # the input keeps its history, so that the hooks receive its relevance
            passed = {key: tensor if key == 0 else passed[key] for key, tensor in computed.items()}
        replaced = _replaced(args, kwargs, passed)
        call = self._open_call(module, args, kwargs, computed, passed)
        RUNNING.modules.append(RunningModule(self, module, call))
        if call.mode is not None:
            call.mode.__enter__()  # type: ignore[no-untyped-call]
        return replaced

    def _open_call(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        computed: Arguments,
        passed: Arguments,
    ) -> OpenCall:
        key, source = next(iter(computed.items()))
        others = _replaced(args, kwargs, passed)

        def run(shell: nn.Module, first: Tensor) -> Tensor:
            own = first.clone() if writes_in_place(shell) else first
            positional, keywords = _replaced(*others, {key: own})
            result: Tensor = shell.forward(*positional, **keywords)
            return result

        needs_values = type(self.rule) is not Pass or not is_torch_activation(module)
        in_place = not needs_values and module.__dict__.get("inplace") is True and _is_free(source)
        in_place = in_place and passed[key] is not source
        return OpenCall(
            source,
            passed[key],
            passed[key]._version,
            Saved(source) if needs_values else Form(source),
            run,
            functools.partial(module.forward, *args, **kwargs),
            None if in_place else mode_for(module, self.rule),
            in_place,
        )

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Links the output of the module to its input. Registered as a forward hook that also runs after an error."""
        call = self._last_call(module)
        if call is not None and call.mode is not None:
            call.mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if call is None or output is None:
            return None
        if call.passed is call.source:
            call = replace(call, source=args[0])  # torch has inserted the node that calls the hooks
        if not isinstance(output, Tensor) and is_own_layer(module):
            return call.run_again()  # run on the original arguments: the functions inside are steps with its rule
        if not isinstance(output, Tensor):
            inside = "give rules to the modules inside it" if module._modules else "wrap it to return one tensor"
            raise UnsupportedRuleError(
                f"layer {self.name!r} ({type(module).__name__}) has the rule {type(self.rule).__name__}, but returns "
                f"{type(output).__name__}. A rule requires a single tensor; {inside} instead."
            )
        if not output.is_floating_point():
            return None
        step = self._step(call, *_shell(module, call), output)
        self._check_rule(step)
        self._fuse(step, call.source)
        if (observer := listener()) is not None:
            observer.on_step(module, step, output)
        return self._linked(call, step, output)

    def _last_call(self, module: nn.Module) -> OpenCall | None:
        """Removes and returns the last call of the module, discarding unfinished calls inside it."""
        modules = RUNNING.modules
        for number in range(len(modules) - 1, -1, -1):
            if modules[number].hook is self and modules[number].module is module:
                call: OpenCall | None = modules[number].call
                del modules[number:]
                return call
        return None

    @without_torch_function
    def _step(self, call: OpenCall, shell: nn.Module, run: Run, output: Tensor) -> LayerStep:
        image = seen_image(call.mode, self.rule)
        layer_call = LayerCall.of(own_copy(self.rule), shell, run, call.saved_input, output, self.name, image)
        return LayerStep(layer_call, output, self.normalization)

    @without_torch_function
    def _fuse(self, step: LayerStep, source: Tensor) -> None:
        if self.fuse is not None:
            with not_recorded():
                self.fuse(step, source)

    def _check_rule(self, step: LayerStep) -> None:
        """Raises an error if the rule is not linear. Rules unknown to this package are tested at their first call."""
        if self.rule not in self._checked and not is_known_linear(self.rule):
            with torch.inference_mode(False), not_recorded():
                check_linear(step.kernel, step.layer_call)
            step.forget_kernel()  # fusion may still change the layer
        self._checked.add(self.rule)

    @without_torch_function
    def _linked(self, call: OpenCall, step: LayerStep, output: Tensor) -> Tensor:
        output, source = output.detach(), call.source
        if call.in_place and data_address(output) == data_address(source) and output.shape == source.shape:
            return link_in_place(step, source)
        linked = link(step, output, (source,))
        return _written_back(call, linked) if call.wrote else linked


def _has_ids() -> bool:
    """Returns True if the model has integer inputs. Any module may use them for a lookup."""
    listening = listener()
    return listening is not None and bool(listening.indices)


def _shell(module: nn.Module, call: OpenCall) -> tuple[nn.Module, Run]:
    """Returns a copy of the module, or of a custom layer with its computed weight, and a function that runs it."""
    if is_quantized(module):
        return module, call.run  # never modified: rules act on another layer with its dequantized weight
    shell = shared_copy(module)
    if isinstance(call.mode, WeightRecorder):
        with not_recorded():
            layer = call.mode.layer(shell, call.run, call.source.detach())
        if layer is not None:
            return layer, forward
    return shell, call.run


def _has_backward_hooks(module: nn.Module) -> bool:
    """Returns True if the module has full backward hooks that receive relevance.

    Hooks receive relevance in the context of a composite, but not in a measure.
    """
    if listener() is not None:
        return False
    every = nn.modules.module
    hooks = module._backward_hooks or module._backward_pre_hooks
    every_hooks = every._global_backward_hooks or every._global_backward_pre_hooks
    keeps_input = is_torch_activation(module) or type(module).forward.__module__.startswith("torch.nn.")
    return bool(hooks or every_hooks) and keeps_input


def _is_free(tensor: Tensor) -> bool:
    """Returns True if a tensor may be overwritten: it is neither a view nor a leaf, and no step has saved it."""
    return tensor._base is None and not tensor.is_leaf and not is_saved(tensor)


def _written_back(call: OpenCall, linked: Tensor) -> Tensor:
    """Repeats an in-place write of the module on its original input. A skip connection may still read this input."""
    source, passed = call.source, call.passed
    is_result = isinstance(call.mode, OutOfPlace) or data_address(passed) == data_address(linked)
    with not_recorded():
        if is_result and passed.shape == linked.shape:
            return write(source, linked)
        before_writing(source)
        source.data.copy_(passed)  # an intermediate value, whose relevance is unknown
    return linked


def _floating(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """Returns the floating-point tensors among the arguments of a module, keyed by position or keyword."""
    items: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    return {key: value for key, value in items if isinstance(value, Tensor) and value.is_floating_point()}


def _replaced(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Arguments
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a module with some tensors replaced."""
    positional = tuple(tensors.get(position, value) for position, value in enumerate(args))
    return positional, {key: tensors.get(key, value) for key, value in kwargs.items()}


def _detached(module: nn.Module, tensor: Tensor) -> Tensor:
    clones = writes_in_place(module) and not is_torch_activation(module)
    return tensor.detach().clone() if clones else tensor.detach()
