"""Interception: every function that a model calls on tensors that carry relevance becomes a step or is a known route.

A ``TorchFunctionMode`` is active while the root module runs. It sees functions, methods and operators before autograd
does; modules with a rule are steps of their own, and nothing inside them is looked at.
"""

from __future__ import annotations

import traceback
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle
from zennit.canonizers import Canonizer
from zennit.core import Composite

from ..errors import ModelStateError, UnsupportedOperationError
from ..kernels.base import Kernel
from ..kernels.forward_state import Saved, before_writing, is_inside_step, leave_mode, listener, not_recorded, write
from ..kernels.layer_call import LayerCall
from ..kernels.layer_step import Fuse, LayerStep
from ..kernels.normalization import Normalization
from ..kernels.rule_reader import PlainGradient
from ..kernels.step import FunctionStep, Step, link
from ..model.checks import check_function
from ..model.routing import source_of
from .attention import ATTENTIONS, FUSED, in_parts, is_taken_apart, layout
from .complex_numbers import Complexes, each
from .decompositions import REWRITES, is_sum_with_bias, product_and_bias
from .elementwise import BroadcastKernel
from .gates import Gates
from .layers import LAYERS, channel_dim, layer_call
from .recurrent import RECURRENT, Where, packs_in
from .registry import KERNELS, FunctionCall, Handler, Name, Slot, handler_of, name_of
from .rule_lookup import CompositeRules, NoRules, RuleLookup
from .scatter import in_messages, is_by_tensor, is_sparse_product, put_at
from .unknown import Unknown, is_elementwise, is_known, uncovered

_SILENT = frozenset("view reshape flatten permute transpose squeeze unsqueeze contiguous expand clone get".split())
_WRITERS = frozenset("copy fill zero setitem masked_fill index_put index_fill set".split())
_PASSED = frozenset("requires_grad detach backward register_hook retain_grad grad_fn data is_floating_point".split())


class Interception(Canonizer):
    """Gives functions the kernels of the registry while a model runs.

    ``Normalized`` applies it by itself; a plain Zennit composite can use it alone:
    ``EpsilonPlusFlat(canonizers=[Interception()])``.

    Args:
        composite: Whose rules the functional twins of modules get; None for the defaults.
        normalization: What happens to the residual of a function's kernel.
        sums: ``"absolute"`` (also called ``"ratio"``, after arXiv 2407.09115) or ``"signed"``.
        uncovered: ``"gradient"`` for the plain gradient where the composite gives a layer no rule.
        fuse: Is shown every new step of a layer, to fuse it with its neighbours.
        attention: ``"value"``, or ``"halves"`` for AttnLRP's.

    Examples:
        >>> Interception(sums="signed").sums
        'signed'
    """

    def __init__(
        self,
        composite: Composite | None = None,
        normalization: Normalization | None = None,
        sums: str = "absolute",
        uncovered: str = "error",
        fuse: Fuse | None = None,
        attention: str = "value",
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} is unknown; choose 'value' or 'halves'.")
        if sums not in ("absolute", "ratio", "signed"):
            raise ValueError(f"sums={sums!r} is unknown; choose 'absolute', 'ratio' or 'signed'.")
        self.composite = composite
        self.normalization = normalization or Normalization("sink")
        self.sums = "absolute" if sums == "ratio" else sums
        self.uncovered = uncovered
        self.fuse = fuse
        self.attention = attention
        self.active = True
        self._handles: list[RemovableHandle] = []
        self._modes: list[_Mode] = []
        self._weights: list[list[nn.Parameter]] = []

    def copy(self) -> Interception:
        """Another interception with the same settings."""
        return Interception(self.composite, self.normalization, self.sums, self.uncovered, self.fuse, self.attention)

    def apply(self, root_module: nn.Module) -> list[Interception]:
        """Starts to intercept the forward passes of a module."""
        instance = self.copy()
        instance.register(root_module)
        return [instance]

    def register(self, root_module: nn.Module) -> None:
        """Installs hooks on the root, to switch the mode, and on every module, to know where a function is called."""
        fallback = PlainGradient() if self.uncovered == "gradient" else None
        rules = NoRules() if self.composite is None else CompositeRules(self.composite, root_module, fallback)
        names = {module: name for name, module in root_module.named_modules()}

        def start(module: nn.Module, args: Any) -> None:
            if module is not root_module:
                raise ModelStateError(
                    f"this {type(module).__name__} is a copy that was made in the context of a composite, and it took "
                    "the hooks along. Copy the model outside of the context."
                )
            if not self.active:
                return
            # Weights are constants. Where they require gradients they would be taken for tensors that carry relevance.
            weights = [weight for weight in root_module.parameters() if weight.requires_grad and weight.is_leaf]
            for weight in weights:
                weight.requires_grad_(False)
            self._weights.append(weights)
            mode = _Mode(rules, self.normalization, self.sums, self.fuse, self.attention)
            self._modes.append(mode)
            mode.__enter__()  # type: ignore[no-untyped-call]

        def stop(module: nn.Module, args: Any, output: Any) -> None:
            self._stop()

        def enter(module: nn.Module, args: Any) -> None:
            if self._modes:
                self._modes[-1].path.append(names[module])
                self._modes[-1].packs += packs_in(args)

        def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if not self._modes or not self._modes[-1].path:
                return None
            mode = self._modes[-1]
            linked = None if module._modules else mode.activation(module, args, kwargs, output)
            mode.path.pop()
            return linked

        self._handles.append(root_module.register_forward_pre_hook(start, prepend=True))
        for module in names:
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, with_kwargs=True))
        self._handles.append(root_module.register_forward_hook(stop, always_call=True))

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._modes:  # torch runs no hook after an interrupt from the keyboard
            self._stop()

    def _stop(self) -> None:
        """Ends the innermost pass."""
        if not self._modes:
            return
        mode = self._modes.pop()
        for weight in self._weights.pop():
            weight.requires_grad_(True)
        leave_mode(mode)


class _Mode(TorchFunctionMode):
    """One forward pass under interception."""

    def __init__(
        self, rules: RuleLookup, normalization: Normalization, sums: str, fuse: Fuse | None, attention: str
    ) -> None:
        super().__init__()
        self.attention = attention
        self.fuse = fuse
        self.rules, self.normalization, self.sums = rules, normalization, sums
        self.gates = Gates()
        self.complexes = Complexes()
        self.path: list[str] = []
        self.packs: list[tuple[Tensor, Tensor]] = []
        self._calls: dict[str, int] = {}
        self._inside: list[Callable[..., Any]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if is_inside_step() or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        name = _relu_or(name_of(func), args, kwargs)
        if name.base in _PASSED:
            return func(*args, **kwargs)
        computed: list[Tensor] = []
        slots = tuple(_slotted(value, computed) for value in args)
        keyword_slots = {key: _slotted(value, computed) for key, value in kwargs.items() if key != "out"}
        writes = name.in_place or name.base in _WRITERS or bool(kwargs.get("inplace")) or "out" in kwargs
        if writes:
            target = kwargs.get("out", args[0] if args else None)
            if isinstance(target, Tensor):
                before_writing(target)
        if (
            name.base in ("setitem", "index_put")
            and computed
            and is_by_tensor(args[1])
            and not kwargs.keys() - {"accumulate"}
            and len(args) in (3, 4)
        ):
            with self:
                result = put_at(*args, **kwargs)
            return write(args[0], result) if name.base == "setitem" or name.in_place else result
        behind, made_by = self.complexes.behind(args, kwargs)
        if behind:
            return self._through_complex(func, args, kwargs, [*behind, *computed], made_by)
        if not computed or name.base in _WRITERS:
            return func(*args, **kwargs)
        if name.base == FUSED and is_taken_apart(self.attention, args, kwargs):
            with self:
                return in_parts(*args, **kwargs)
        if name.base == "matmul" and is_sparse_product(args):
            with self:
                return in_messages(*args, **kwargs)
        handler = handler_of(func, name)
        if name.base in LAYERS and handler is KERNELS[name.base] and is_sum_with_bias(*args, **kwargs):
            with self:
                return product_and_bias(func, *args, **kwargs)
        if handler is None and name.base in RECURRENT:
            with self:
                return RECURRENT[name.base](Where(self._path(), self.packs), *args, **kwargs)
        if handler is None and name.base in REWRITES:
            with self:
                return self._written(name, args, kwargs, REWRITES[name.base](*args, **kwargs))
        if handler is None:
            return self._unknown(func, name, args, kwargs, slots, keyword_slots, computed)
        return self._step(handler, func, name, args, kwargs, slots, keyword_slots, computed)

    # -- steps ------------------------------------------------------------------------------------------------

    def _step(
        self,
        handler: Handler,
        func: Callable[..., Any],
        name: Name,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slots: tuple[Any, ...],
        keyword_slots: dict[str, Any],
        computed: list[Tensor],
    ) -> Any:
        self._check_covered(name, args, kwargs)
        if listener() is not None:  # a context of the composite may run in any mode, a measure may not
            check_function(name.base, args, kwargs, self._path())
        function, slots, keyword_slots = _out_of_place(func, name, slots, keyword_slots)
        call = FunctionCall(
            name.base,
            function,
            self._path(),
            slots,
            keyword_slots,
            [Saved(tensor) for tensor in computed],
            tuple(self.gates.holds(tensor) for tensor in computed),
            tuple(source_of(tensor.grad_fn) for tensor in computed),
            self.rules,
            self.sums,
            self.attention,
        )
        output = call.run(*call.values)
        if not isinstance(output, Tensor) or not output.is_floating_point():
            return self.complexes.noted(func(*args, **kwargs), computed, name.base)
        output = output.detach()
        if any(output.data_ptr() == value.data_ptr() for value in call.values):
            output = output.clone()  # some operations return their input; a step's output has memory of its own
        rule = "sum" if name.base in ("add", "sub", "rsub") and len(computed) > 1 else name.base
        layer = layer_call(call, output) if handler is KERNELS.get(name.base) else None
        linked = self._linked(call, output, lambda: handler(call), rule, computed, layer)
        with_constants = len(computed) < len(_tensors_in(args, kwargs)) or any(
            isinstance(value, (int, float)) for value in args
        )
        self.gates.follow(name.base, computed, linked, False, with_constants)
        return self._written(name, args, kwargs, linked)

    def _linked(
        self,
        call: FunctionCall,
        output: Tensor,
        build: Callable[[], Kernel],
        rule: str,
        computed: list[Tensor],
        layer: LayerCall | None = None,
    ) -> Tensor:
        path = f"{call.path}.{call.name}" if call.path else call.name
        step: Step
        if layer is None:
            step = FunctionStep(path, output, build, self.normalization, rule)
        else:
            step = LayerStep(layer, output, self.normalization, path, rule)
        step.call = self._calls[path] = self._calls.get(path, -1) + 1
        step.attention = layout(call, output)
        if isinstance(step, LayerStep) and self.fuse is not None:
            with not_recorded():
                self.fuse(step, computed[0])
        hearing = listener()
        if hearing is not None:
            hearing.on_step(None, step)
        linked = link(step, output, tuple(computed))
        if hearing is not None:
            hearing.on_function(path, step.call, linked, channel_dim(call))
        return linked

    def _written(self, name: Name, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        """Writes a result back where the operation was to be in place."""
        target = kwargs.get("out", args[0] if args and (name.in_place or kwargs.get("inplace")) else None)
        return write(target, result) if isinstance(target, Tensor) else result

    def _check_covered(self, name: Name, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name.base not in LAYERS:
            return
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if not isinstance(weight, Tensor) or weight.requires_grad:
            return
        like = LAYERS[name.base]()
        if self.rules.of_weight(weight, like) is None:
            raise uncovered(self._path(), like, name.base)

    def _path(self) -> str:
        return self.path[-1] if self.path else ""

    # -- functions without a kernel ---------------------------------------------------------------------------

    def _unknown(
        self,
        func: Callable[..., Any],
        name: Name,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        slots: tuple[Any, ...],
        keyword_slots: dict[str, Any],
        computed: list[Tensor],
    ) -> Any:
        """A route goes through, a function written in Python is looked into, anything else waits for relevance."""
        decomposed = _decomposed(func)
        # A method of torch.Tensor that calls the one of its base class is handed over under its own name again.
        if decomposed is not None and func not in self._inside:
            self._inside.append(func)
            try:
                with self:
                    return decomposed(*args, **kwargs)
            finally:
                self._inside.pop()
        if name.in_place:
            return func(*args, **kwargs)  # the audit will see what it is
        output = func(*args, **kwargs)
        if _only_routes(output, computed):
            self.gates.follow(name.base, computed, output, True, False)
            if isinstance(output, Tensor) and name.base not in _SILENT:
                self._announce(name, output)
            return output
        call = FunctionCall(
            name.base, func, self._path(), slots, keyword_slots, [Saved(t) for t in computed], (), (), self.rules
        )
        return each(output, lambda item: self._unlinked(call, item, computed))

    def _through_complex(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], behind: list[Tensor], name: str
    ) -> Any:
        """A function of complex numbers; what is real again is one step from what was real before ``name``."""
        output = func(*args, **kwargs)
        saved = [Saved(tensor, False) for tensor in behind]
        call = FunctionCall(name, func, self._path(), (), {}, saved, (), (), self.rules)
        return each(output, lambda item: self._unlinked(call, item, behind, _COMPLEX))

    def _unlinked(self, call: FunctionCall, output: Any, computed: list[Tensor], advice: str = "") -> Any:
        """What a function without a kernel returned, as a step that waits for relevance."""
        if not isinstance(output, Tensor) or not output.is_floating_point() or not output.requires_grad:
            return self.complexes.noted(output, computed, call.name)
        if output.layout != torch.strided:
            raise UnsupportedOperationError(
                f"{call.name!r} in {call.path or 'the model'!r} ({_source_line()}) makes a sparse tensor of computed "
                "values, which has no kernel. Keep them dense: gather messages by index_select, sum them by index_add."
            )
        error = UnsupportedOperationError(
            f"relevance arrived at {call.name!r} in {call.path or 'the model'!r} ({_source_line()}), which has no "
            f"kernel. {advice or _advice(call)}"
        )
        shapes = [tensor.shape for tensor in computed]
        linked = self._linked(call, output.detach(), lambda: Unknown(error, shapes), call.name, computed)
        linked.grad_fn.step.unsupported_call = call  # type: ignore[union-attr]  # a Link
        return linked

    def activation(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """A module in which autograd saw more than this mode did, if it maps each element on its own; else None.

        Such are activations with an ``autograd.Function`` of their own, or written in TorchScript.
        """
        computed: list[Tensor] = []
        slots = tuple(_slotted(value, computed) for value in args)
        keyword_slots = {key: _slotted(value, computed) for key, value in kwargs.items()}
        if is_inside_step() or len(computed) != 1 or not isinstance(output, Tensor) or output.grad_fn is None:
            return None
        if output.shape != computed[0].shape or output.data_ptr() == computed[0].data_ptr():
            return None
        if is_known(output, computed):
            return None
        name = type(module).__name__
        call = FunctionCall(
            name, module.forward, self._path(), slots, keyword_slots, [Saved(computed[0], False)], (), (), self.rules
        )
        with not_recorded(), torch.no_grad():
            if not is_elementwise(call.run, computed[0].detach(), output.detach()):
                return None
        shapes = [output.shape]
        return self._linked(call, output.detach().clone(), lambda: BroadcastKernel(shapes), "elementwise", computed)

    def _announce(self, name: Name, output: Tensor) -> None:
        hearing = listener()
        if hearing is not None and output.grad_fn is not None:
            path = f"{self._path()}.{name.base}" if self._path() else name.base
            self._calls[path] = self._calls.get(path, -1) + 1
            hearing.on_function(path, self._calls[path], output, None)


def _relu_or(name: Name, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Name:
    """``x.clamp(min=0)`` is another spelling of ReLU."""
    if name.base not in ("clamp", "clamp_min"):
        return name
    least = args[1] if len(args) > 1 else kwargs.get("min")
    most = args[2] if len(args) > 2 else kwargs.get("max")
    is_relu = most is None and isinstance(least, (int, float)) and least == 0
    return Name("relu", name.in_place) if is_relu else name


def _slotted(value: Any, computed: list[Tensor]) -> Any:
    """Arguments with slots in place of the tensors that carry relevance, which are collected."""
    if isinstance(value, Tensor):
        if value.requires_grad and value.is_floating_point():
            computed.append(value)
            return Slot(len(computed) - 1)
        return value
    if type(value) in (list, tuple):
        return type(value)(_slotted(item, computed) for item in value)
    return value


def _out_of_place(
    func: Callable[..., Any], name: Name, slots: tuple[Any, ...], keyword_slots: dict[str, Any]
) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The same function without its in-place write: on copies, or without ``inplace=True``."""
    if keyword_slots.get("inplace"):
        return func, slots, {**keyword_slots, "inplace": False}
    if not name.in_place:
        return func, slots, keyword_slots

    def on_copy(first: Any, *rest: Any, **options: Any) -> Any:
        return func(first.clone() if isinstance(first, Tensor) else first, *rest, **options)

    return on_copy, slots, keyword_slots


def _tensors_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _only_routes(output: Any, computed: list[Tensor]) -> bool:
    """Whether autograd sees nothing but routes between the inputs of an operation and what it returned."""
    outputs = [item for item in (output if isinstance(output, (list, tuple)) else [output]) if isinstance(item, Tensor)]
    return all(is_known(item, computed, with_steps=False) for item in outputs)


def _decomposed(func: Any) -> Callable[..., Any] | None:
    """A function of torch that is written in Python, as one that does not hand itself over to the mode again."""
    code = getattr(func, "__code__", None)
    if code is None or not any(word.startswith("has_torch_function") for word in code.co_names):
        return None
    blind = {word: _never for word in code.co_names if word.startswith("has_torch_function")}
    copy = types.FunctionType(code, {**func.__globals__, **blind}, func.__name__, func.__defaults__, func.__closure__)
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*args: Any) -> bool:
    return False


def _advice(call: FunctionCall) -> str:
    function = (
        f"{getattr(call.function, '__module__', None) or 'torch'}.{getattr(call.function, '__name__', call.name)}"
    )
    return (
        f"Tell how it hands relevance down: decorate a function with nrm_plugin.register_kernel({function}), or use an "
        "operation that has one."
    )


_COMPLEX = (
    "It makes complex numbers, of which no kernel is known. Where a module turns one real tensor into another, give it "
    "a rule in the composite's layer_map: zennit.rules.Epsilon() if it is linear."
)


def _source_line() -> str:
    """Where the model called the function."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and "/nrm_plugin/" not in frame.filename:
            return f"{frame.filename}:{frame.lineno}: {frame.line}"
    return "unknown line"
