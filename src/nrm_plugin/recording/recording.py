"""Runs a model once under a composite. No other module runs a model for a measure."""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..events.event import Atom
from ..kernels.forward_state import before_writing, forward_pass
from ..kernels.reference_pass import LEAST, ReferencePass, difference
from ..model.autocast import asked_for, exact, layers_in, working_dtype
from ..model.checks import check_drawn, check_model, check_module
from ..model.guard import Fingerprint, named_tensors, note_restored, preserved
from ..model.inputs_and_outputs import Call, Change, Output, chosen_output, explained_output
from ..model.renormalization import TablesUnwritten
from ..model.value_reads import audit, untraced, unwatched, without_modes
from .contrast_step import contrast_top
from .graph import Graph
from .independence import find_samples
from .layout import Layout
from .observer import Observer
from .samples import Samples
from .structure import Structure
from .taps import OUTPUT, Label, Taps

_RECORDING = threading.RLock()
LARGEST_BUFFER = 1 << 16
"""Number of entries of the largest buffer that is restored after a run that wrote to the buffer."""


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class Recording:
    """One forward pass of a model under a composite.

    Args:
        model: Any module.
        call: The call of the model.
        composite: Rules and normalization.
        output: The output at which the measure starts, if there are several; or a tap inside the model.
        reference: The reference, for a measure of the difference of outputs.

    Attributes:
        structure: Graph, taps and samples, which do not depend on values.
        output: The output, with its history.
        fingerprint: State of the weights during the forward pass.
        references: Number of references of each sample, each of which is a sample of the recording.

    Raises:
        InputError: If a measure cannot start at this output.
        ModelStateError: If the model is in training mode, or has hooks of a different composite.
        GradModeError: If gradients are disabled.
        UncoveredLayerError: If a layer has no rule.
        UnsupportedOperationError: If an operation has no kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        composite: Normalized,
        output: Output | Atom | None = None,
        reference: Reference | None = None,
    ) -> None:
        check_module(model)
        self._rerun = Rerun(model, call, composite, output, reference)
        self._other: Tensor | None = None
        self.references = 1 if reference is None else reference.count
        followed = None
        if reference is not None:
            followed = ReferencePass(reference.is_tangent)
            other, _ = _run(model, reference.call, composite, output, followed)
            self._other = other.detach()
            followed.replay()
        self.output, observer = _run(model, call, composite, output, followed)
        with unwatched():
            self.fingerprint = Fingerprint(model)
        two = self._rerun.shapes_of_two
        has_rows = not isinstance(output, Atom)
        self._restructured = functools.partial(
            Structure, observer, self.output, call.batch, call.batched, two, has_rows
        )
        with without_modes():
            self.structure = self._restructured()

    def started(self, relevance: Tensor, contrast: Tensor | None = None) -> Tensor:
        r"""Converts relevance of the outputs from the form ``(N, …)`` to the layout of the output.

        The method also locates the samples in each tensor, unless they are known to be its rows or there is only one.

        Args:
            relevance: The relevance, ``(N, …)``.
            contrast: The weights ``s`` of the outputs, ``(N, …)``, if the measure starts at one number on top of the
                outputs, :math:`\sum_k s_k f_k`. The relevance is then that of the outputs of interest.

        Raises:
            FoldingError: If a sample, or the kernel of a layer at a sample, depends on other samples.
        """
        start = self._layout.fold(relevance)
        if self.samples.count > 1 and not self.samples.is_plain:
            with audit():
                find_samples(self, start, self._rerun)
        if contrast is not None:
            start = self._contrasted(contrast)
        del self._rerun, self._restructured
        return start

    def _contrasted(self, contrast: Tensor) -> Tensor:
        """Puts one number on top of the outputs, and returns its relevance."""
        top = contrast_top(self.graph, self.samples, self.output, contrast)
        names = self.taps.output_names()
        self.structure = self._restructured(top)
        self.taps.fused = names - self.taps.output_names()
        start = torch.ones(top.shape, dtype=top.dtype, device=top.device)
        if self.samples.count > 1 and not self.samples.is_plain:
            with torch.inference_mode(False), torch.no_grad(), audit():
                self.samples.find(start)
        return start

    @functools.cached_property
    def _layout(self) -> Layout:
        """The layout of the output."""
        return self.samples.layout(self.graph.output)

    def unfolded(self) -> Tensor:
        """Returns the output in the form ``(N, …)``, detached."""
        return self._layout.unfold(self.output.detach())

    def outputs(self) -> Tensor:
        """Returns a copy of the output in the form ``(N, …)``; with ``batched=False``, in the model's own shape."""
        return (self.unfolded() if self.samples.batched else self.output.detach()).clone()

    @property
    def has_reference(self) -> bool:
        """Whether the measure is of differences."""
        return self._other is not None

    @property
    def least(self) -> float:
        """The largest mass that counts as zero: that of neurons without a difference to the reference."""
        return 0.0 if self._other is None else 1e6 * LEAST[working_dtype(self.output.dtype)]

    def differences(self) -> Tensor:
        """The difference of the output to that of the reference, nowhere zero, in the form ``(N, …)``."""
        assert self._other is not None
        return self.samples.layout(self.graph.output).unfold(difference(self.output.detach(), self._other).delta)

    @property
    def is_batched(self) -> bool:
        """Whether the inputs have a sample dimension."""
        return self.samples.batched

    @property
    def graph(self) -> Graph:
        """The graph of steps and routes."""
        return self.structure.graph

    @property
    def taps(self) -> Taps:
        """The taps, by name and by place."""
        return self.structure.taps

    @property
    def samples(self) -> Samples:
        """The samples of each tensor."""
        return self.structure.samples


def _run(
    model: nn.Module,
    call: Call,
    composite: Normalized,
    output: Output | Atom | None,
    reference: ReferencePass | None,
) -> tuple[Tensor, Observer]:
    """Runs the model under the hooks of the composite; returns the explained output and what was observed."""
    indices = list(call.indices.values())
    inner = output if isinstance(output, Atom) else None
    observer = Observer(indices, inner)
    with ExitStack() as around:
        around.enter_context(_RECORDING)  # another thread may be recording this model, which then has its hooks
        with unwatched():
            check_model(model, call.tensors)
        device = (*call.tensors, *indices)[0].device
        for block in (
            preserved(model),
            forward_pass(observer, reference),
            _buffers_kept(model),
            torch.enable_grad(),
            _precision(device),
            check_drawn(model, device),
        ):
            around.enter_context(block)
        with unwatched():
            for _, tensor in named_tensors(model):
                if tensor.is_leaf:  # a computed buffer is a constant by its history
                    tensor.requires_grad_(False)
        with ExitStack() as stack:
            stack.enter_context(composite.context(model))
            observer.watch(model, stack)
            passed = [observer.input(tensor, item) for item, tensor in zip(call.items, call.tensors, strict=True)]
            with call.checked_ids(lambda: observer.has_lookups, lambda: observer.read):
                returned = call.run(model, passed)
        if reference is not None:
            reference.finish()
    if isinstance(output, Atom):
        returned, output = observer.inner_output(output), None
    explained: Tensor = explained_output(returned, output, call.batch, call.batched and inner is None)
    observer.see(Label(OUTPUT, "output", 0, None), explained)
    return explained, observer


@dataclass(frozen=True)
class Reference:
    """The reference of a measure of differences.

    Attributes:
        call: The call of the model with the reference as inputs.
        is_tangent: Whether slopes are derivatives at the input instead of secants.
        count: Number of references of each sample; the call has this many rows in a row for each.
    """

    call: Call
    is_tangent: bool = False
    count: int = 1


@dataclass(frozen=True)
class Rerun:
    """Runs the model of a recording again, to test how the model treats samples.

    Attributes:
        model, call, composite, output, reference: As in :class:`Recording`.
        calls_hooks: Whether the user's hooks are called.
    """

    model: nn.Module
    call: Call
    composite: Normalized
    output: Output | Atom | None
    reference: Reference | None = None
    calls_hooks: bool = False

    @property
    def has_hooks(self) -> bool:
        """Whether the model has hooks of the user that may change its output."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules())

    def with_hooks(self) -> Rerun:
        """Returns the same runs with the user's hooks."""
        return replace(self, calls_hooks=True)

    def recording(self, change: Change, others: Change = _unchanged) -> Recording:
        """Returns a recording on changed inputs."""
        with untraced(), self._hooks(), torch.inference_mode(False), torch.enable_grad():
            call = self.call.changed(change, others)
            return Recording(self.model, call, self.composite, self.output, self._changed_reference(change, others))

    def outputs(self, change: Change, others: Change = _unchanged) -> Tensor:
        """Returns the output on changed inputs."""
        if isinstance(self.output, Atom):
            return self.recording(change, others).output.detach()
        call = self.call.changed(change, others)
        with ExitStack() as around:
            around.enter_context(_RECORDING)
            device = (*call.tensors, *call.indices.values())[0].device
            for block in (
                untraced(),
                self._hooks(),
                forward_pass(None),
                _buffers_kept(self.model),
                torch.no_grad(),
                _precision(device),
                TablesUnwritten(),
            ):
                around.enter_context(block)
            output: Tensor = chosen_output(call.run(self.model, call.tensors), self.output)
            return output

    def _changed_reference(self, change: Change, others: Change) -> Reference | None:
        """Returns the reference with the same change, so that it has the shape of the changed inputs."""
        if self.reference is None:
            return None
        return replace(self.reference, call=self.reference.call.changed(change, others))

    def _hooks(self) -> AbstractContextManager[None]:
        return preserved(self.model) if self.calls_hooks else _without_hooks(self.model)

    def shapes_of_two(self) -> dict[Hashable, torch.Size]:
        """Returns the shapes of labelled tensors for two copies of the sample; empty if the model rejects two."""

        def twice(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor])

        def twice_if_one(tensor: Tensor) -> Tensor:
            return twice(tensor) if tensor.shape[:1] == (1,) else tensor

        for others in (_unchanged, twice_if_one):
            with suppress(Exception):  # a model that is written for one sample may raise any
                return self.recording(twice, others).taps.tensor_shapes()
        return {}


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Context in which the model has no hooks, since the user's hooks expect values of the user's inputs."""
    with preserved(model):
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Context that restores buffers that the model writes in place, such as running averages; large ones are caches."""
    with unwatched():
        buffers = [buffer for module in model.modules() if not _is_norm(module) for buffer in module._buffers.values()]
        small = {id(b): b for b in buffers if b is not None and b.numel() <= LARGEST_BUFFER}
        dense = [buffer for buffer in small.values() if buffer.layout == torch.strided]
        kept = [(buffer, buffer._version, buffer.detach().clone()) for buffer in dense]
    try:
        yield
    finally:
        with unwatched(), torch.no_grad():
            for buffer, version, values in kept:
                # A write through ``.data`` changes no version; on other devices a comparison would wait for the device.
                is_written = buffer._version != version or (buffer.is_cpu and not torch.equal(buffer, values))
                if is_written and buffer.shape == values.shape:
                    before_writing(buffer)
                    buffer.copy_(values)
                    note_restored(buffer, version)


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization layer of torch, which does not write its statistics in evaluation mode."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and not module.training


@contextmanager
def _precision(device: torch.device) -> Iterator[None]:
    """Runs layers in the reduced precision of autocast, and all other operations in float32 or float64."""
    with layers_in(asked_for(device)), exact(device):
        yield


__all__ = ["Recording"]
