"""Canonizer that intercepts function calls and turns them into steps."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from zennit.canonizers import Canonizer
from zennit.core import Composite

from ..errors import ModelStateError, brief
from ..kernels.forward_state import RUNNING, leave_mode, listener, next_node
from ..kernels.layer_step import Fuse
from ..kernels.normalization import Normalization
from ..kernels.rule_reader import PlainGradient
from ..model.checks import check_untransformed
from .attention import ATTENTIONS
from .autograd_functions import attach_steps, tensors_of
from .function_call import Settings
from .interception_mode import InterceptionMode
from .recurrent import packs_in
from .rule_lookup import CompositeRules, NoRules
from .unsupported import raise_on_arrival


class Interception(Canonizer):
    """Canonizer that intercepts the function calls of a model and applies the registered kernels to them.

    :class:`~nrm_plugin.Normalized` applies it automatically. It can also be added to a Zennit composite, as in
    ``EpsilonPlusFlat(canonizers=[Interception()])``.

    Args:
        composite: Composite that provides the rules of functions with an equivalent module, or None for the default
            kernels.
        normalization: Treatment of a kernel's residual. By default, the sink absorbs it.
        sums: How sums distribute relevance: ``"absolute"`` (alias ``"ratio"``, as in arXiv 2407.09115) or ``"signed"``.
        uncovered: ``"error"``, or ``"gradient"`` to propagate relevance by the gradient in layers without a rule.
        fuse: Callback that receives each new layer step and its input and may fuse the step with adjacent ones.
        attention: ``"value"``, or ``"halves"`` as in AttnLRP.
        audited: Whether all layers are steps as well. Relevance that reaches any other operation then raises an error.

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
        audited: bool = False,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={brief(attention)} is unknown; choose 'value' or 'halves'.")
        if sums not in ("absolute", "ratio", "signed"):
            raise ValueError(f"sums={brief(sums)} is unknown; choose 'absolute', 'ratio' or 'signed'.")
        self.composite = composite
        self.normalization = normalization or Normalization("sink")
        self.sums = "absolute" if sums == "ratio" else sums
        self.uncovered = uncovered
        self.fuse = fuse
        self.attention = attention
        self.audited = audited
        self._first_node = 0
        self.active = True
        self._handles: list[RemovableHandle] = []
        self._modes: list[InterceptionMode] = []
        self._weights: list[list[nn.Parameter]] = []

    def copy(self) -> Interception:
        """Returns a copy with the same settings."""
        settings = (self.composite, self.normalization, self.sums, self.uncovered, self.fuse, self.attention)
        return Interception(*settings, self.audited)

    def apply(self, root_module: nn.Module) -> list[Interception]:
        """Registers a copy of the canonizer on a module."""
        instance = self.copy()
        instance.register(root_module)
        return [instance]

    def register(self, root_module: nn.Module) -> None:
        """Registers hooks that start and stop the interception and track the running module."""
        paths = {module: name for name, module in root_module.named_modules()}
        enter, leave = self._enter_hook(paths), self._leave_hook()
        start = self._start_hook(root_module)
        self._handles.append(root_module.register_forward_pre_hook(start, prepend=True, with_kwargs=True))
        for module in paths:
            self._handles.append(module.register_forward_pre_hook(enter))
            self._handles.append(module.register_forward_hook(leave, with_kwargs=True))
        self._handles.append(root_module.register_forward_hook(self._stop_hook(), always_call=True))

    def remove(self) -> None:
        """Removes the hooks and ends any interrupted forward pass."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._modes:  # torch runs no hook after a KeyboardInterrupt
            self._stop()

    # Hooks are closures instead of methods, so that a deep copy of the model does not copy the interception.

    def _start_hook(self, root_module: nn.Module) -> Callable[..., None]:
        settings = self._settings_on(root_module)

        def start(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if module is not root_module:
                raise ModelStateError(
                    f"this {type(module).__name__} is a copy that was made in the context of a composite, with its "
                    "hooks. Copy the model outside of the context."
                )
            if self.active:
                given = list(tensors_of((*args, *kwargs.values())))
                check_untransformed(given)
                RUNNING.given = frozenset(id(tensor) for tensor in given if isinstance(tensor, nn.Parameter))
                if not self._modes:
                    self._notice(given)
                self._start(root_module, settings)

        return start

    def _enter_hook(self, paths: dict[nn.Module, str]) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any) -> None:
            if self._modes:
                forward_pass = self._modes[-1].forward_pass
                forward_pass.module_paths.append(paths[module])
                forward_pass.packs += packs_in(args)

        return enter

    def _leave_hook(self) -> Callable[..., Any]:
        def leave(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            if not self._modes or not self._modes[-1].forward_pass.module_paths:
                return None
            forward_pass = self._modes[-1].forward_pass
            step = None if module._modules else forward_pass.activation_step(module, args, kwargs, output)
            forward_pass.module_paths.pop()
            return step

        return leave

    def _stop_hook(self) -> Callable[..., None]:
        def stop(module: nn.Module, args: Any, output: Any) -> None:
            if self._modes and output is not None:  # without an output, the module raised an error
                attach_steps(output, self._modes[-1].forward_pass.custom_calls)
                if self.audited and listener() is None and len(self._modes) == 1:
                    raise_on_arrival(tensors_of(output), self._first_node)
            self._stop()

        return stop

    # -- the mode of one forward pass -------------------------------------------------------------------------------

    def _settings_on(self, root_module: nn.Module) -> Settings:
        fallback = PlainGradient() if self.uncovered == "gradient" else None
        rules = NoRules() if self.composite is None else CompositeRules(self.composite, root_module, fallback)
        return Settings(rules, self.normalization, self.sums, self.fuse, self.attention)

    def _notice(self, given: Iterable[Tensor]) -> None:
        """Records where relevance can end: at inputs that require a gradient or, if there are none, at any leaf."""
        if listener() is not None:
            return
        self._first_node = next_node()
        RUNNING.made = {} if any(tensor.requires_grad for tensor in given) else None

    def _start(self, root_module: nn.Module, settings: Settings) -> None:
        # Weights are constants; with requires_grad, they would be treated as tensors that receive relevance.
        weights = [weight for weight in root_module.parameters() if weight.requires_grad and weight.is_leaf]
        for weight in weights:
            weight.requires_grad_(False)
        self._weights.append(weights)
        RUNNING.weights = tuple(weights)
        mode = InterceptionMode(settings)
        self._modes.append(mode)
        mode.__enter__()  # type: ignore[no-untyped-call]

    def _stop(self) -> None:
        """Stops the interception of the innermost forward pass."""
        if not self._modes:
            return
        mode = self._modes.pop()
        for weight in self._weights.pop():
            weight.requires_grad_(True)
        RUNNING.weights = tuple(self._weights[-1]) if self._weights else ()
        if not self._modes:
            RUNNING.made = None
        leave_mode(mode)


__all__ = ["Interception"]
