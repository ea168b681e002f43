"""The hook that makes each call of a module a step.

A module runs on a detached input, and its output is linked straight to that input: the module's own backward never
runs, and every call of a reused module has a kernel of its own.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from zennit.core import Hook, RemovableHandle, RemovableHandleList
from zennit.rules import Pass

from ..errors import InputError, UnsupportedRuleError, autocast_outside
from ..model.affine import WEIGHTED, Image, broadcast, is_affine, is_by_modifiers, is_known_linear
from ..model.autocast import asked_for, current
from ..model.copies import shell_of
from ..model.custom_layers import WeightRecorder, is_own_layer
from .forward_state import (
    RUNNING,
    Saved,
    among_ourselves,
    before_writing,
    is_inside_step,
    is_saved,
    leave_mode,
    listener,
    unseen,
    write,
)
from .rule_reader import check_linear, wants_image
from .step import Fuse, LayerCall, LinkInPlace, Normalization, Step, link, shape_like


@dataclass
class Entered:
    """What a step keeps of a call while it runs.

    Attributes:
        source: The input.
        handed: What the module got in its place.
        version: How often that had been written to.
        kept: The input, safe from later writes.
        call: Runs the module again on another first input.
        again: Runs it again on what it was called with.
        apart: Changes how the layer is run, to the same effect.
        in_place: Whether the module may write over its input.
    """

    source: Tensor
    handed: Tensor
    version: int
    kept: Saved
    call: Callable[[nn.Module, Tensor], Tensor]
    again: Callable[[], Any]
    apart: BiasApart | OutOfPlace | WeightRecorder | None = None
    in_place: bool = False


class BiasApart(TorchFunctionMode):
    """Lets a layer run without its bias and adds it afterwards, since the kernel needs both: output minus bias cancels.

    Args:
        layer: A linear or convolutional layer of torch.

    Attributes:
        image: What the layer returned without bias, and with which weight; None until it ran.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        self.layer = layer
        self.image: Image | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if len(args) < 3 or args[1] is not self.weight or args[2] is not self.bias or self.weight is None:
            return func(*args, **kwargs)
        image = self._run(func, args[0].detach(), args[3:], kwargs)
        self.image = (image, self.weight.detach())
        return image if self.bias is None else image + broadcast(self.bias.detach(), self.layer, image)

    def _run(self, func: Callable[..., Any], source: Tensor, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        assert self.weight is not None
        weight, short = self.weight.detach(), current()
        if short is None or source.dtype != torch.float32:
            return func(source, weight, None, *rest, **kwargs).detach()  # type: ignore[no-any-return]
        return func(source.to(short), weight.to(short), None, *rest, **kwargs).to(source.dtype)  # type: ignore[no-any-return]


class StepHook(Hook):
    """A Zennit hook that turns each call of a module into a step with the rule of another hook.

    Args:
        rule: The hook that the composite maps the module to.
        normalization: What happens to the residual.
        name: Layer name, for messages.
        checked: Rules that were found linear already, shared by all copies.
        fuse: Is shown every new step and its input, to fuse it with its neighbours.
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
        """A hook for another module with the same rule."""
        return StepHook(self.rule, self.normalization, self.name, self._checked, self.fuse)

    def register(self, module: nn.Module) -> RemovableHandleList:
        """Installs the hook; the handles take it off again."""
        return RemovableHandleList(
            [
                RemovableHandle(self),
                module.register_forward_pre_hook(self.enter, with_kwargs=True),
                # Also where the module raised: what comes after it would be taken for a part of it. Before other hooks:
                # those that mask or keep relevance at the output, as zennit-crp does, need the linked one.
                module.register_forward_hook(self.leave, with_kwargs=True, always_call=True, prepend=True),
            ]
        )

    def remove(self) -> None:
        """Forgets the calls that never returned: torch runs no hook after an interrupt from the keyboard."""
        super().remove()
        for hook, _, entered in RUNNING.entered:
            if hook is self and entered is not None and entered.apart is not None:
                leave_mode(entered.apart)
        RUNNING.entered[:] = [entry for entry in RUNNING.entered if entry[0] is not self]

    @among_ourselves
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Detaches what the module is handed."""
        places = [place for place in _places(args, kwargs) if place[2].requires_grad]
        if not self.active or not places or is_inside_step():
            RUNNING.entered.append((self, module, None))
            return None
        if asked_for(places[0][2].device) is not None:
            raise InputError(autocast_outside(self.name, type(module).__name__))
        if len(places) > 1 and is_own_layer(module):
            return None  # the functions inside are steps with its rule, each of its own input
        if len(places) > 1:
            warnings.warn(
                f"layer {self.name!r} ({type(module).__name__}) has a rule and {len(places)} inputs that depend on the "
                "model's input. As in Zennit, its rule hands all relevance to the first of them.",
                stacklevel=2,
            )
        handed = [(at, key, _own(module, tensor)) for at, key, tensor in places]
        again = functools.partial(module.forward, *args, **kwargs)
        args, kwargs = _replaced(args, kwargs, handed)
        at, key, source = places[0]

        def call(shell: nn.Module, first: Tensor) -> Tensor:
            own = first.clone() if _writes_in_place(shell) else first
            again, keywords = _replaced(args, kwargs, [(at, key, own)])
            result: Tensor = shell.forward(*again, **keywords)
            return result

        needed = type(self.rule) is not Pass or not _is_own_activation(module)
        in_place = not needed and module.__dict__.get("inplace") is True and _is_free(source)
        apart = None if in_place else _around(module, self.rule)
        kept = Saved(source, values=needed)
        first = handed[0][2]
        entered = Entered(source, first, first._version, kept, call, again, apart, in_place)
        RUNNING.entered.append((self, module, entered))
        if apart is not None:
            apart.__enter__()  # type: ignore[no-untyped-call]
        return args, kwargs

    def leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Links what the module returned; without an output where it raised."""
        entered = self._last_entered(module)
        if entered is not None and entered.apart is not None:
            entered.apart.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        if entered is None or output is None:
            return None
        if not isinstance(output, Tensor) and is_own_layer(module):
            return entered.again()  # on what it really was handed: the functions inside are steps with its rule
        if not isinstance(output, Tensor):
            inside = "give rules to the modules inside it" if module._modules else "wrap it to return one tensor"
            raise UnsupportedRuleError(
                f"layer {self.name!r} ({type(module).__name__}) has the rule {type(self.rule).__name__}, but returns "
                f"{type(output).__name__}. A rule needs one tensor; {inside} instead."
            )
        if not output.is_floating_point():
            return None
        step = self._made(module, entered, output)
        if isinstance(entered.apart, WeightRecorder):
            with unseen():
                layer = entered.apart.layer(step.origin.module, entered.call, entered.source.detach())
            if layer is not None:
                step.origin.module, step.origin.call = layer, lambda layer, first: layer.forward(first)
        if self.rule not in self._checked and not is_known_linear(self.rule):
            with torch.inference_mode(False), unseen():
                check_linear(step.kernel, self.rule, output.detach(), self.name)
            step.forget()  # fusion may change it yet
        self._checked.add(self.rule)
        if self.fuse is not None:
            with unseen():
                self.fuse(step, entered.source)
        if (hearing := listener()) is not None:
            hearing.on_step(module, step)
        return self._linked(entered, step, output)

    @among_ourselves
    def _made(self, module: nn.Module, entered: Entered, output: Tensor) -> Step:
        output = output.detach()
        seen = entered.apart.image if isinstance(entered.apart, BiasApart) and wants_image(self.rule) else None
        image = None if seen is None else (Saved(seen[0]), seen[1])  # without a bias it is the output itself
        origin = LayerCall(
            self.rule.copy(), shell_of(module), entered.call, entered.kept, self.name, image, Saved(output)
        )
        # Not the output itself: linked, it holds the step, and the two would keep each other alive.
        build = functools.partial(origin.kernel, shape_like(output), self.normalization.scale)
        step = Step(self.name, output, build, self.normalization, type(self.rule).__name__)
        step.origin = origin
        return step

    @among_ourselves
    def _linked(self, entered: Entered, step: Step, output: Tensor) -> Tensor:
        output, source = output.detach(), entered.source
        if entered.in_place and output.data_ptr() == source.data_ptr() and output.shape == source.shape:
            written: Tensor = LinkInPlace.apply(step, source)  # type: ignore[no-untyped-call]
            return written
        linked = link(step, output, (source,))
        return _written_back(entered, linked) if _wrote(entered) else linked

    def _last_entered(self, module: nn.Module) -> Entered | None:
        """What was kept of this call; the calls inside it that never returned go with it."""
        running = RUNNING.entered
        for place in range(len(running) - 1, -1, -1):
            if running[place][0] is self and running[place][1] is module:
                entered: Entered | None = running[place][2]
                del running[place:]
                return entered
        return None


def _is_free(tensor: Tensor) -> bool:
    """Whether a tensor can be written over: not a part of another one, no leaf, and nobody needs what is in it."""
    return tensor._base is None and not tensor.is_leaf and not is_saved(tensor)


def _wrote(entered: Entered) -> bool:
    """Whether the module would have written to its input, had it not been handed a copy or kept from it."""
    return isinstance(entered.apart, OutOfPlace) or entered.handed._version != entered.version


def _written_back(entered: Entered, linked: Tensor) -> Tensor:
    """Writes to the input what the module wrote: whoever reads it later, such as a skip connection, gets that."""
    source, handed = entered.source, entered.handed
    is_result = isinstance(entered.apart, OutOfPlace) or handed.data_ptr() == linked.data_ptr()
    with unseen():
        if is_result and handed.shape == linked.shape:
            return write(source, linked)
        before_writing(source)
        source.data.copy_(handed)  # written on the way to something else: whose relevance it gets is not known
    return linked


def _places(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[tuple[bool, Any, Tensor]]:
    """``(is keyword, key, tensor)`` of every floating tensor that a module is handed."""
    found: list[tuple[bool, Any, Tensor]] = [
        (False, index, value) for index, value in enumerate(args) if isinstance(value, Tensor)
    ]
    found += [(True, key, value) for key, value in kwargs.items() if isinstance(value, Tensor)]
    return [place for place in found if place[2].is_floating_point()]


def _replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], places: list[tuple[bool, Any, Tensor]]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with other tensors at some places."""
    listed, keywords = list(args), dict(kwargs)
    for keyword, key, tensor in places:
        if keyword:
            keywords[key] = tensor
        else:
            listed[key] = tensor
    return tuple(listed), keywords


class OutOfPlace(TorchFunctionMode):
    """Runs an activation out of place, which saves the copy of an input that it would write to."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        return func(*args, **{**kwargs, "inplace": False} if kwargs.get("inplace") is True else kwargs)


_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Mish)


def _around(module: nn.Module, rule: Hook) -> BiasApart | OutOfPlace | WeightRecorder | None:
    """How to run a layer of torch with less work to the same effect, or to see with which weight it works."""
    if is_affine(module) and (wants_image(rule) or (current() is not None and isinstance(module, WEIGHTED))):
        return BiasApart(module)
    if is_own_layer(module) and is_by_modifiers(rule):
        return WeightRecorder()
    return OutOfPlace() if _is_own_activation(module) and getattr(module, "inplace", False) else None


def _is_own_activation(module: nn.Module) -> bool:
    return any(type(module).forward is kind.forward for kind in _ACTIVATIONS) and "forward" not in module.__dict__


def _writes_in_place(module: nn.Module) -> bool:
    """Whether the module may write to its input: anything but torch's own affine layers, unless it says no."""
    return not is_affine(module) and getattr(module, "inplace", True) is not False


def _own(module: nn.Module, tensor: Tensor) -> Tensor:
    clones = _writes_in_place(module) and not _is_own_activation(module)
    return tensor.detach().clone() if clones else tensor.detach()
