"""Steps: one call of one module or function, linked into the autograd graph as its normalized kernel.

A step runs the module on a detached input and links its output straight to that input, so that the module's own
backward never runs and every call of a reused module has a kernel of its own. The gradient that then flows through
``torch.autograd`` is relevance.
"""

from __future__ import annotations

import functools
import numbers
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from zennit.core import Hook, RemovableHandle, RemovableHandleList
from zennit.rules import Pass

from .errors import BatchNormWarning, InputError, UnsupportedRuleError, shortened_outside
from .kernels import RESIDUALS, BranchKernel, Kernel, Residual, Scale, scale_of, scales
from .layers import WEIGHTED, Image, broadcast, is_affine, is_by_modifiers, is_known_linear
from .precision import asked_for, current, exact, layers_in
from .reading import check_linear, read_rule, reads_output, wants_image
from .shells import shell_of
from .subclasses import WeightSeen, is_own_layer


@dataclass(frozen=True)
class Normalization:
    """What happens to the relevance that a rule does not hand down.

    Attributes:
        residual: ``"redistribute"`` raises columns by the gain before the rest is absorbed, ``"sink"`` leaves the
            rule as it is and absorbs what it leaks.
        gain_limit: Largest gain ``G``, at least 1.
    """

    residual: Residual = "redistribute"
    gain_limit: float = 2.0

    def __post_init__(self) -> None:
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual!r} is unknown; choose one of {RESIDUALS}.")
        is_number = isinstance(self.gain_limit, numbers.Real) and not isinstance(self.gain_limit, bool)
        if not is_number or not self.gain_limit >= 1:
            raise ValueError(f"gain_limit={self.gain_limit!r} must be a number of at least 1 (math.inf is allowed).")

    @property
    def scale(self) -> Scale:
        """What it does to columns."""
        return scale_of(self.residual, float(self.gain_limit))


def shape_like(tensor: Tensor) -> Tensor:
    """A tensor of the same shape, dtype and device that needs no memory."""
    return tensor.detach().new_empty(()).expand(tensor.shape)


@dataclass
class LayerCall:
    """What the step of a layer is made of; batch-norm fusion changes it before the kernel is built.

    Attributes:
        rule: The rule.
        module: A shell of the layer.
        call: Runs it on its first input.
        source: That input.
        where: Layer name, for messages.
        image: What it returned without its bias, and with which weight, where that was seen.
        output: What it returned, where the rule reads that; None where it has to be computed.
        folds: What fusion does to it before the kernel is made.
        norms: The batch normalizations that read what it returned.
        layer: For a batch normalization, the layer that it reads.
        holds_dense_norm: Whether a dense layer and a batch norm were fused in here.
        precision: The format in which it multiplies by its weight, where it is shorter than that of its input.
    """

    rule: Hook
    module: nn.Module
    call: Callable[[nn.Module, Tensor], Tensor]
    source: Saved
    where: str
    image: tuple[Saved, Tensor] | None = None
    output: Saved | None = None
    folds: list[Callable[[], None]] = field(default_factory=list)
    norms: list[Step] = field(default_factory=list)
    layer: Step | None = None
    holds_dense_norm: bool = False
    precision: torch.dtype | None = field(default_factory=current)

    def __post_init__(self) -> None:
        if not reads_output(self.rule):
            self.output = None

    def kernel(self, like: Tensor, scale: Scale | None = None) -> Kernel:
        """The kernel of the rule at this call.

        Args:
            like: Has the shape of the output.
            scale: The normalization, which the kernel may take in.
        """
        while self.folds:
            self.folds.pop(0)()
        image, self.image = self.image, None  # needed once; a step keeps what the kernel makes of it
        seen = None if image is None else (image[0].tensor, image[1])
        known = self.output is not None
        output = self.output.tensor if self.output is not None else like
        own = None if self.holds_dense_norm else scale  # of that one the column sums are looked at
        source = self.source.tensor
        with layers_in(self.precision):
            return read_rule(self.rule, self.module, self.call, source, output, self.where, seen, known, own)

    @property
    def is_identity(self) -> bool:
        """Whether this is a batch normalization that the layer below takes over: nothing else reads that layer."""
        return self.layer is not None and self.layer.uses <= 1 and len(self.layer.origin.norms) == 1

    def change(self, weight: Tensor, bias: Tensor, factor: Tensor | None = None) -> None:
        """Gives the layer other parameters, with which it returns something else than the model saw.

        Args:
            weight: The weight.
            bias: The bias.
            factor: By what the image without bias is multiplied thereby, where it is known.
        """
        self.module._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        self.module._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        seen, self.output, self.image = self.image, None, None
        if seen is not None and factor is not None:
            with torch.no_grad():  # the model has run, so nothing is written any more
                self.image = (Saved(seen[0].tensor * factor, values=False), weight)


class Step:
    r"""Normalized kernel of one call: :math:`\tilde T_{ij} = g(c_j) T_{ij}`, sink :math:`R_j (1 - g(c_j) c_j)`.

    Args:
        name: Layer name.
        output: What the call returned, ``(N, *out)``.
        build: Makes the kernel; called when relevance first arrives.
        normalization: What happens to the residual.
        rule: Name of the rule or operation.

    Attributes:
        call: Which call of the module or function this is.
        uses: How often its output is read, as far as that is known.
        origin: The :class:`LayerCall` or function call that it is made of.
        attention: Where heads and tokens are, if it multiplies attention weights and values.
    """

    def __init__(
        self, name: str, output: Tensor, build: Callable[[], Kernel], normalization: Normalization, rule: str = ""
    ) -> None:
        self.name = name
        self.call = 0
        self.rule = rule
        self.uses = 1
        self.origin: Any = None
        self.attention: Any = None
        self.shape = output.shape
        self._like = shape_like(output)
        self._build = build
        self._normalization = normalization
        self._lock = threading.RLock()

    @functools.cached_property
    def kernel(self) -> Kernel:
        """The kernel of the rule, before normalization."""
        with self._lock, torch.inference_mode(False), unseen():
            return self.__dict__["kernel"] if "kernel" in self.__dict__ else self._build()

    def _scaled(self, relevance: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gain and deficit wherever this relevance is not zero; None stands for any relevance."""
        kernel = self.kernel
        with self._lock, unseen(), torch.inference_mode(False), torch.no_grad():
            if kernel.reach(relevance):
                self.__dict__.pop("_scales", None)
            return self._scales

    @functools.cached_property
    def _scales(self) -> tuple[Tensor | None, Tensor | None]:
        """Gain and deficit; None for a gain of one and for a deficit of zero."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self.kernel.is_stochastic:
                return None, None
            if isinstance(self.kernel, BranchKernel) and self.kernel.is_normalized:
                return None, self.kernel.deficit
            column = self.kernel.column_sum(self._like).detach()
            if getattr(self.origin, "holds_dense_norm", False) and float((column < 0.5).double().mean()) > 0.5:
                warnings.warn(
                    f"batch normalization was fused with the dense layer {self.name!r}, and its bias takes most of the "
                    "relevance of most of its neurons. Heat maps through such a pair say little about the inputs "
                    "(arXiv 2002.11018); look at sink(layer), or do without fusion.",
                    BatchNormWarning,
                    stacklevel=2,
                )
            return scales(column, self._normalization.scale)

    def forget(self) -> None:
        """Drops the kernel, for its origin has changed."""
        self.__dict__.pop("kernel", None)
        self.__dict__.pop("_scales", None)

    def gain_for(self, relevance: Tensor) -> Tensor | None:
        """``g(c)`` wherever relevance ``(K, N, *out)`` arrives; None for one everywhere."""
        return self._scaled(relevance)[0]

    def pull(self, relevance: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """Relevance ``(K, N, *out)`` to ``(K, N, *in)`` at each input, and the share that is absorbed, ``(N, *out)``.

        The share is None where nothing is absorbed; where no relevance arrives it may be any number.
        """
        factor, rest = self._scaled(relevance)
        return self.kernel.pull(relevance if factor is None else relevance * factor), rest

    def pull_absolute(self, mass: Tensor) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The same for walk masses without sign."""
        factor, rest = self._scaled(mass)
        parts = self.kernel.pull_absolute(mass if factor is None else mass * factor)
        return parts, None if rest is None else rest.abs()

    def push(self, values: tuple[Tensor | None, ...], absorbed: Tensor | None) -> Tensor | None:
        """Transpose: values ``(K, N, *in)`` at the inputs and at the sink ``(K, N, *out)`` to ``(K, N, *out)``."""
        factor, rest = self._scaled(None)
        result = None
        if any(value is not None for value in values):
            result = self.kernel.push(values, self.shape).detach()
            result = result if factor is None else result * factor
        if absorbed is not None and rest is not None:
            result = absorbed * rest if result is None else result + absorbed * rest
        return result

    def push_bound(self, values: tuple[Tensor | None, ...]) -> Tensor:
        """At least the transpose of :meth:`pull_absolute`, nothing at the sink."""
        factor, _ = self._scaled(None)  # also makes the branches that only some relevance needs
        found = self.kernel.push_bound(values, self.shape).detach()
        return found if factor is None else found * factor.abs()


Fuse = Callable[[Step, Tensor], None]


class Link(torch.autograd.Function):
    """Joins the output of a step to its inputs; the gradient is relevance."""

    @staticmethod
    def forward(ctx: Any, step: Step, holder: list[Tensor], *inputs: Tensor) -> Tensor:
        # The output comes in a list: as an argument it would be a view, and later in-place operations illegal.
        ctx.step = step
        return holder.pop()

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        with exact(relevance.device):
            parts, _ = ctx.step.pull(relevance.unsqueeze(0))
        return None, None, *(part.squeeze(0) for part in parts)


def link(step: Step, output: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
    """The output, now with the step as its history."""
    result: Tensor = Link.apply(step, [output], *inputs)  # type: ignore[no-untyped-call, unused-ignore]
    return result


class LinkInPlace(torch.autograd.Function):
    """Joins a tensor that was written over to what it was; the gradient is relevance."""

    @staticmethod
    def forward(ctx: Any, step: Step, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        ctx.step = step
        return tensor

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        with exact(relevance.device):
            ((part,), _) = ctx.step.pull(relevance.unsqueeze(0))
        return None, part.squeeze(0)


class Saved:
    """A tensor that a step will need when relevance arrives; it survives later writes into its memory.

    Args:
        tensor: The tensor.
        values: Whether its values are needed; else only its shape, and no copy is made.
    """

    def __init__(self, tensor: Tensor, values: bool = True) -> None:
        self.tensor = tensor.detach()
        if values:
            self._register(tensor)

    def _register(self, tensor: Tensor) -> None:
        _RUNNING.saved.setdefault(tensor.untyped_storage().data_ptr(), []).append(weakref.ref(self))


def is_saved(tensor: Tensor) -> bool:
    """Whether a step needs what is in this memory."""
    return any(saved() is not None for saved in _RUNNING.saved.get(tensor.untyped_storage().data_ptr(), ()))


def before_writing(tensor: Tensor) -> None:
    """Gives every step that saved this memory a copy of its own; to be called before an in-place operation."""
    for reference in _RUNNING.saved.pop(tensor.untyped_storage().data_ptr(), ()):
        saved = reference()
        if saved is not None:
            saved.tensor = saved.tensor.clone()


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
    apart: BiasApart | OutOfPlace | WeightSeen | None = None
    in_place: bool = False


class _Running(threading.local):
    """State of the forward pass of this thread.

    Attributes:
        entered: The modules with a rule that are running, outermost first: inside them nothing is a step of its own.
        unseen: How many blocks of :func:`unseen` are open.
        saved: What steps saved, by memory.
        listener: Is told of every step and tap.
    """

    def __init__(self) -> None:
        self.entered: list[tuple[StepHook, nn.Module, Entered | None]] = []
        self.unseen = 0
        self.saved: dict[int, list[weakref.ref[Saved]]] = {}
        self.listener: Listener | None = None


class Listener(Protocol):
    """Is told what happens in a forward pass."""

    def on_step(self, module: nn.Module | None, step: Step) -> None:
        """A step of a module, or of a function."""

    def on_function(self, name: str, call: int, output: Tensor, channel_dim: int | None) -> None:
        """A function returned a tensor that carries relevance."""


_RUNNING = _Running()


def is_inside_step() -> bool:
    """Whether a module with a rule is running right now."""
    return _RUNNING.unseen > 0 or bool(_RUNNING.entered)


@contextmanager
def unseen() -> Iterator[None]:
    """What is done in here is no part of the model."""
    _RUNNING.unseen += 1
    try:
        yield
    finally:
        _RUNNING.unseen -= 1


R = TypeVar("R")
P = ParamSpec("P")


def among_ourselves(hook: Callable[P, R]) -> Callable[P, R]:
    """A hook whose own operations are handed to no mode, which takes longer than most of them.

    Tensors of subclasses need the hand-over.
    """

    @functools.wraps(hook)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if any(_is_subclass(value) for value in args):
            return hook(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            return hook(*args, **kwargs)

    return run


def _is_subclass(value: object) -> bool:
    if isinstance(value, Tensor):
        return type(value) is not Tensor and type(value) is not nn.Parameter
    items = value if type(value) in (list, tuple) else value.values() if type(value) is dict else ()
    return any(_is_subclass(item) for item in items)  # type: ignore[attr-defined]


def listener() -> Listener | None:
    """Who listens to the forward pass of this thread."""
    return _RUNNING.listener


@contextmanager
def forward_pass(listener: Listener | None) -> Iterator[None]:
    """A fresh state for one forward pass, so that a pass that raised leaves nothing behind."""
    kept = dict(_RUNNING.__dict__)
    _RUNNING.__dict__.update(entered=[], unseen=0, saved={}, listener=listener)
    try:
        yield
    finally:
        _RUNNING.__dict__.update(kept)


def leave_mode(mode: TorchFunctionMode) -> None:
    """Leaves a mode of this thread, and first those entered after it that an interrupt kept from being left."""
    while mode in (stack := _get_current_function_mode_stack()):  # type: ignore[no-untyped-call]
        stack[-1].__exit__(None, None, None)


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
        for hook, _, entered in _RUNNING.entered:
            if hook is self and entered is not None and entered.apart is not None:
                leave_mode(entered.apart)
        _RUNNING.entered[:] = [entry for entry in _RUNNING.entered if entry[0] is not self]

    @among_ourselves
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Detaches what the module is handed."""
        places = [place for place in _places(args, kwargs) if place[2].requires_grad]
        if not self.active or not places or is_inside_step():
            _RUNNING.entered.append((self, module, None))
            return None
        if asked_for(places[0][2].device) is not None:
            raise InputError(shortened_outside(self.name, type(module).__name__))
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
        _RUNNING.entered.append((self, module, entered))
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
        if isinstance(entered.apart, WeightSeen):
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
        running = _RUNNING.entered
        for place in range(len(running) - 1, -1, -1):
            if running[place][0] is self and running[place][1] is module:
                entered = running[place][2]
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


def write(target: Tensor, result: Tensor) -> Tensor:
    """Writes a result over a tensor; returns the tensor that has the result as its history."""
    before_writing(target)
    try:
        return target.copy_(result)
    except RuntimeError:
        # Autograd refuses leaves and what chunk, split and unbind return, so no such model was ever trained that
        # way. The values are right for all who read them, the history only for those who read what is returned.
        target.data.copy_(result.detach())
        return result


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


def _around(module: nn.Module, rule: Hook) -> BiasApart | OutOfPlace | WeightSeen | None:
    """How to run a layer of torch with less work to the same effect, or to see with which weight it works."""
    if is_affine(module) and (wants_image(rule) or (current() is not None and isinstance(module, WEIGHTED))):
        return BiasApart(module)
    if is_own_layer(module) and is_by_modifiers(rule):
        return WeightSeen()
    return OutOfPlace() if _is_own_activation(module) and getattr(module, "inplace", False) else None


def _is_own_activation(module: nn.Module) -> bool:
    return any(type(module).forward is kind.forward for kind in _ACTIVATIONS) and "forward" not in module.__dict__


def _writes_in_place(module: nn.Module) -> bool:
    """Whether the module may write to its input: anything but torch's own affine layers, unless it says no."""
    return not is_affine(module) and getattr(module, "inplace", True) is not False


def _own(module: nn.Module, tensor: Tensor) -> Tensor:
    clones = _writes_in_place(module) and not _is_own_activation(module)
    return tensor.detach().clone() if clones else tensor.detach()
