"""Observation of one forward pass: inputs and outputs of modules, and the tensors at which walks start and end."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..errors import EventError, UnknownLayerError, unknown_layer
from ..events.event import Atom
from ..kernels.forward_state import is_foreign, not_recorded, without_torch_function
from ..kernels.module_hook import StepHook
from ..kernels.step import Step
from ..model.zero_one_routes import written
from .audit import check_covered
from .module_names import INPUT, OUTPUT, first_name, module_names, name_of
from .module_outputs import tensors_of
from .parts import Watcher
from .taps import Item, Label, Observed


class Observer:
    """Observer that registers hooks around the composite's hooks and collects tensors during one forward pass.

    Args:
        indices: Integer inputs. Relevance ends at the rows that they look up.
        wanted: The tensor (tap) inside the model at which the measure starts, or None for the output of the model.
        watcher: The object that is notified of steps and modules, or None if memory is not limited.

    Attributes:
        modules: Name of each module; set by :meth:`watch`.
        containers: Names of modules with children and a rule of their own.
        observed: All labeled tensors that depend on the inputs.
        leaves: The leaf tensors at which relevance ends.
        indices: The integer inputs.
        inputs: The leaf tensors of the floating-point inputs.
        gates: The gates of the forward pass.
        has_lookups: Whether the model has looked up rows by integer inputs.
        has_untracked: Whether autograd does not track how some values depend on the inputs.
        draws: Functions that drew random numbers in evaluation mode, each with the path of the calling module.
        has_drawn: Whether torch's random state has changed during the forward pass.
        read: Location at which the model first converted integer inputs to Python or NumPy numbers, or None.
    """

    def __init__(self, indices: list[Tensor], wanted: Atom | None, watcher: Watcher | None = None) -> None:
        self._watcher = watcher
        self.gates: Any = None
        self.modules: Mapping[nn.Module, str] = {}
        self.containers: list[str] = []
        self.observed: list[Observed] = []
        self.leaves: list[Tensor] = []
        self._leaves: set[int] = set()
        self.has_lookups = self.has_untracked = self.has_drawn = False
        self.draws: list[str] = []
        self.read: str | None = None
        self.indices, self.inputs = indices, list[Tensor]()
        self._wanted = wanted
        self._calls: dict[nn.Module, int] = {}
        self._started: Tensor | None = None

    def watch(self, model: nn.Module, stack: ExitStack) -> None:
        """Registers hooks that observe inputs before steps detach them and outputs after steps have linked them.

        Args:
            model: The model, including modules added by canonizers.
            stack: The exit stack that removes the hooks.
        """
        self.modules = module_names(model)
        handles: list[RemovableHandle] = []
        stack.callback(_remove, handles)
        for module, name in self.modules.items():
            if module._modules and _step_hook(module) is not None:
                self.containers.append(name)
            handles.append(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(self._leave))
            if self._watcher is not None:
                self._watcher.watch(module, name)

    def input(self, tensor: Tensor, item: Item | None) -> Tensor:
        """Creates a leaf tensor from an input and returns the tensor to pass to the model in its place."""
        passed = self._end(tensor)
        self.inputs.append(self.leaves[-1])
        self.see(Label(INPUT, "output", 0, item), passed)
        return passed

    def _end(self, tensor: Tensor) -> Tensor:
        """Returns a copy of a tensor that depends on a new leaf tensor, at which walks end."""
        leaf = tensor.detach().requires_grad_()
        self.leaves.append(leaf)
        self._leaves.add(id(leaf))
        return leaf.clone()

    def on_draw(self, name: str, where: str) -> None:
        """Records a call of a function that draws random numbers."""
        self.draws.append(f"{name!r} in {where or 'the model'!r}")

    def on_drawn(self) -> None:
        """Records that the model drew random numbers. Called after the forward pass."""
        self.has_drawn = True

    def see(self, label: Label, tensor: Tensor, channel_dim: int | None = None) -> None:
        """Records a labeled tensor if it depends on the inputs."""
        self._keep_start(label, tensor)
        if label.name and tensor.grad_fn is not None and tensor.is_floating_point():
            node, number = written(tensor.grad_fn, tensor.output_nr)
            self.observed.append(Observed(label, node, number, tensor.shape, channel_dim))

    def inner_output(self, output: Atom) -> Tensor:
        """Returns the tensor inside the model at which the measure starts.

        Raises:
            EventError: If ``output`` selects only part of a tap.
            UnknownLayerError: If no tap of the forward pass has this name.
        """
        if output.index is not None or output.side == "sink" or output.call == "any":
            raise EventError(
                f"output={output} is not a tap at which a measure can start. Pass at(layer), and select its neurons "
                "by start=."
            )
        if self._started is None:
            known = [seen.label.name for seen in self.observed if seen.label.side == output.side]
            raise UnknownLayerError(unknown_layer(name_of(output.layer, self.modules), dict.fromkeys(known)))
        return self._started

    def _end_within(self, tensor: Tensor) -> Tensor:
        """Variant of :meth:`_end` for use while the model is running."""
        with torch._C.DisableTorchFunction(), torch.enable_grad(), not_recorded():
            return self._end(tensor)

    # -- called while the model runs --------------------------------------------------------------------------

    def is_leaf(self, tensor: Tensor | None) -> bool:
        """Returns True if a tensor is one of the leaf tensors at which relevance ends."""
        return id(tensor) in self._leaves

    def on_step(self, module: nn.Module | None, step: Step, output: Tensor) -> None:
        """Assigns its name and call index to the step of a module. Steps of functions already have both."""
        if module is not None:
            step.name, step.call = self.modules.get(module, step.name), self._calls[module] - 1
        if self._watcher is not None:
            with not_recorded():
                self._watcher.on_step(step, output)

    @without_torch_function
    def on_function(self, name: str, call: int, output: Tensor, channel_dim: int | None) -> None:
        """Records the output of a function."""
        self.see(Label(name, "output", call, None), output, channel_dim)

    def on_untracked(self) -> None:
        """Records that autograd does not track some values. They may depend on several samples."""
        self.has_untracked = True

    def on_read(self, where: str) -> None:
        """Records the location at which the model converted integer inputs to Python or NumPy numbers."""
        self.read = self.read or where

    @without_torch_function
    def on_lookup(self, name: str, call: int, rows: Tensor) -> Tensor:
        """Replaces rows looked up by integer inputs with a leaf tensor, at which relevance ends."""
        self.has_lookups = True
        passed = self._end_within(rows)
        self.see(Label(name, "output", call, None), passed, -1)
        return passed

    @without_torch_function
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = self._calls[module] = self._calls.get(module, 0) + 1
        name = self.modules[module]
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        if _step_hook(module) is not None:
            if tensors:
                self._keep_start(Label(name, "input", call - 1, None), tensors[0])
            return None
        with not_recorded():
            args = tuple(_own_view(value) for value in args)
            kwargs = {key: _own_view(value) for key, value in kwargs.items()}
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for item, tensor in enumerate(tensors):
            self.see(Label(name, "input", call - 1, None if len(tensors) == 1 else item), tensor)
        if self._watcher is not None:
            self._watcher.enter(module, name, call - 1, args, kwargs, self._end_within)
        return args, kwargs

    @without_torch_function
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        name, call = self.modules[module], self._calls[module] - 1
        dim = _channel_dim(module)
        if self._watcher is not None and _step_hook(module) is None:
            with not_recorded():
                self._watcher.leave(module, output, self.gates)
        if isinstance(output, Tensor):
            self.see(Label(name, "output", call, None), output, dim)
            if not module._modules and _step_hook(module) is None:
                check_covered(module, name, args, output)
            return
        for item, value in tensors_of(output).items():
            self.see(Label(name, "output", call, item), value, dim)

    def _keep_start(self, label: Label, tensor: Tensor) -> None:
        """Stores the tensor at which the measure starts, as a copy unaffected by later in-place operations."""
        wanted = self._wanted
        if wanted is None or wanted.side != label.side:
            return
        name = name_of(wanted.layer, self.modules)
        if (label.name or OUTPUT) not in (name, first_name(name, self.modules)):
            return
        if (wanted.call or 0) == label.call and wanted.item in (None, label.item) and self._started is None:
            with not_recorded():
                self._started = tensor.clone()


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()


def _own_view(value: Any) -> Any:
    """Returns a new view of a tensor. The tap of a call is then crossed only by walks through this call."""
    if not isinstance(value, Tensor) or not value.requires_grad:
        return value
    return value.detach() if is_foreign(value) else value.view_as(value)


def _step_hook(module: nn.Module) -> StepHook | None:
    """Returns the :class:`StepHook` that a composite has registered on a module, or None."""
    for hook in module._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepHook):
            return owner
    return None


_OVER_FEATURES = (
    nn.Linear,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.Embedding,
    nn.RNNBase,
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
    nn.TransformerDecoderLayer,
)
"""Layers whose output has its channels in the last dimension."""


def _channel_dim(module: nn.Module) -> int | None:
    """Returns the channel dimension of a layer's output, or None if it is unknown.

    It is -1 for channels-last layers and 1 for convolutions, normalization layers and max pooling.
    """
    own: int | None = getattr(type(module), "nrm_channel_dim", None)
    if own is not None:
        return own
    if isinstance(module, _OVER_FEATURES):
        return -1
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._MaxPoolNd)
    return 1 if isinstance(module, kinds) else None


__all__ = ["Observer"]
