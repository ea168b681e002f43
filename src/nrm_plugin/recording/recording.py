"""Recording of one run of a model under a composite. No other module runs a model for a measure."""

from __future__ import annotations

import functools
import threading
from collections.abc import Hashable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..errors import NRMError
from ..events.event import Atom
from ..kernels.forward_state import before_writing, forward_pass
from ..kernels.reference_pass import LEAST, ReferencePass, difference
from ..model.autocast import Formats, asked, exact, layers_in, precise_layers, working_dtype
from ..model.checks import check_drawn, check_model, check_module, warn_of_draws
from ..model.inputs_and_outputs import Call, Change, Output, chosen_output, explained_output
from ..model.model_protection import Fingerprint, named_tensors, note_restored, preserved
from ..model.renormalization import TablesUnwritten
from ..model.trace_guards import audit, untraced, unwatched, without_modes
from .contrast_step import contrast_node
from .forward_observer import Observer
from .graph import Graph
from .module_names import OUTPUT
from .parts import FirstRun, PartRecorded, Parts, Repeat, Watcher
from .sample_independence import find_samples
from .sample_layout import Layout
from .sample_positions import Samples
from .structure import Structure
from .taps import Label, Taps

_RECORDING = threading.RLock()
LARGEST_BUFFER = 1 << 16
"""Maximum number of elements of a buffer that is restored after the run."""


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class Recording:
    """Recording of one forward pass of a model under a composite.

    Args:
        model: The model to record.
        call: The arguments of the model call.
        composite: Composite that assigns normalized rules.
        output: The output to explain if the model returns several tensors, or a tap inside the model.
        reference: The reference (baseline input) if the measure explains a difference, or None.
        max_memory: Memory limit in bytes, or None for no limit. If the tensors of the recording exceed it, they are
            freed and recomputed in parts.

    Attributes:
        parts: The parts of a recording that exceeds ``max_memory``, or None.
        structure: The value-independent part of the recording: graph, taps (hook points) and samples.
        output: The explained output, attached to the autograd graph.
        fingerprint: Fingerprint of the weights during the forward pass.
        draws: Functions that drew random numbers in evaluation mode, or None if the model draws none.
        references: Number of references per sample. Each of them is a separate sample of the recording.

    Raises:
        InputError: If the output is not a valid starting point for a measure.
        ModelStateError: If the model is in training mode or has hooks of another composite.
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
        max_memory: int | None = None,
    ) -> None:
        check_module(model)
        first = None if max_memory is None else FirstRun(max_memory)
        if first is not None:
            call, reference = call.changed(torch.clone, torch.clone), None if reference is None else reference.cloned()
        self._rerun = Rerun(model, call, composite, output, reference, max_memory, asked())
        self._other: Tensor | None = None
        self.references = 1 if reference is None else reference.count
        followed = None
        if reference is not None:
            followed = ReferencePass(reference.is_tangent)
            if max_memory is not None:
                followed, first = _limited(followed.is_tangent, max_memory)
            with _noted("The model raised this error at the reference."):
                other, _ = _run(model, reference.call, composite, output, followed, first)
            self._other = other.detach()
            followed.replay()
            if max_memory is not None:
                first = FirstRun(max_memory, followed.drop, first)
        self.output, observer = _run(model, call, composite, output, followed, first)
        self.draws = observer.draws if observer.has_drawn else None
        self.parts = None if first is None else self._divided(first)
        with unwatched():
            self.fingerprint = Fingerprint(model)
        two = self._rerun.shapes_of_two
        has_rows = not isinstance(output, Atom)
        self._restructured = functools.partial(
            Structure, observer, self.output, call.batch, call.batched, two, has_rows
        )
        with without_modes():
            self.structure = self._restructured()

    def _divided(self, first: FirstRun) -> Parts | None:
        """Returns the parts of the recording, or None if the first run did not exceed the memory limit."""
        if not first.is_over:
            first.keep()
            return None
        parts = Parts(first, self._rerun.watched)
        parts.forget = self._forget_routes
        return parts

    def _forget_routes(self) -> None:
        for vertex in self.graph.vertices:
            vertex.forget()

    def started(self, relevance: Tensor, contrast: Tensor | None = None) -> Tensor:
        r"""Prepares the recording for queries and converts the initial relevance to the layout of the output.

        Samples are located in each tensor, unless there is only one or the rows of all tensors are known to be samples.

        Args:
            relevance: The initial relevance of the outputs, of shape ``(N, …)``.
            contrast: The weights ``s`` of the outputs, of shape ``(N, …)``, if the measure starts at the weighted sum
                :math:`\sum_k s_k f_k`. In this case, ``relevance`` serves only to locate samples.

        Returns:
            The initial relevance of the output, or of the contrast.

        Raises:
            FoldingError: If a sample, or the kernel of a layer for a sample, depends on other samples.
        """
        warn_of_draws(self.draws)
        start = self._layout.fold(relevance)
        with exact():  # kernels that are constructed here are used by all queries
            if self.samples.count > 1 and not self.samples.is_plain:
                with audit():
                    find_samples(self, start, self._rerun)
            if contrast is not None:
                start = self._contrasted(contrast)
        del self._rerun, self._restructured
        return start

    def _contrasted(self, contrast: Tensor) -> Tensor:
        """Makes a contrast between the outputs the root of the graph and returns its relevance."""
        node = contrast_node(self.graph, self.samples, self.output, contrast)
        names = self.taps.output_names()
        self.structure = self._restructured(node)
        self.taps.fused = names - self.taps.output_names()
        start = torch.ones(node.shape, dtype=node.dtype, device=node.device)
        if self.samples.count > 1 and not self.samples.is_plain:
            with torch.inference_mode(False), torch.no_grad(), audit():
                self.samples.find(start)
        return start

    @functools.cached_property
    def _layout(self) -> Layout:
        """Layout of the output."""
        return self.samples.layout(self.graph.output)

    def unfolded(self) -> Tensor:
        """Returns the detached output in shape ``(N, …)``."""
        return self._layout.unfold(self.output.detach())

    def outputs(self) -> Tensor:
        """Returns a copy of the output in shape ``(N, …)``, or as returned by the model with ``batched=False``."""
        return (self.unfolded() if self.samples.batched else self.output.detach()).clone()

    @property
    def has_reference(self) -> bool:
        """True if the measure explains a difference from a reference."""
        return self._other is not None

    @property
    def least(self) -> float:
        """The largest mass treated as zero.

        With a reference, it is positive: neurons with the same value as at the reference are assigned a tiny
        difference.
        """
        return 0.0 if self._other is None else 1e6 * LEAST[working_dtype(self.output.dtype)]

    def differences(self) -> Tensor:
        """Returns the change of the output from the reference in shape ``(N, …)``, with tiny numbers for zeros."""
        assert self._other is not None
        return self.samples.layout(self.graph.output).unfold(difference(self.output.detach(), self._other).delta)

    @property
    def is_batched(self) -> bool:
        """True if the inputs have a batch dimension."""
        return self.samples.batched

    @property
    def graph(self) -> Graph:
        """Graph of steps and routes."""
        return self.structure.graph

    @property
    def taps(self) -> Taps:
        """Taps, for lookup by name or place."""
        return self.structure.taps

    @property
    def samples(self) -> Samples:
        """The sample layout of each tensor."""
        return self.structure.samples


def _run(
    model: nn.Module,
    call: Call,
    composite: Normalized,
    output: Output | Atom | None,
    reference: ReferencePass | None,
    watcher: Watcher | None = None,
) -> tuple[Tensor, Observer]:
    """Runs the model under the hooks of the composite. Returns the explained output and the observer of the run."""
    inner = output if isinstance(output, Atom) else None
    observer = Observer(list(call.indices.values()), inner, watcher)
    with ExitStack() as around:
        around.enter_context(_RECORDING)  # another thread may be recording the same model
        with unwatched():
            check_model(model, call.tensors)
        for block in (
            preserved(model),
            forward_pass(observer, reference),
            _buffers_kept(model),
            torch.enable_grad(),
            precise_layers(),
            check_drawn(model, observer.on_drawn),
        ):
            around.enter_context(block)
        with unwatched():
            for _, tensor in named_tensors(model):
                if tensor.is_leaf:  # a computed buffer is recognized as a constant by its grad_fn
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
    what = "the model's output" if reference is None or reference.is_replayed else "the model's output at the reference"
    explained: Tensor = explained_output(returned, output, call.batch, call.batched and inner is None, what)
    observer.see(Label(OUTPUT, "output", 0, None), explained)
    return explained, observer


@dataclass(frozen=True)
class Reference:
    """Reference (baseline) input of a measure that explains the difference between two outputs.

    Attributes:
        call: The call to the model with the reference as inputs.
        is_tangent: Whether slopes are derivatives at the input instead of secants.
        count: Number of references per sample. All references of a sample are consecutive rows of the call.
    """

    call: Call
    is_tangent: bool = False
    count: int = 1

    def cloned(self) -> Reference:
        """Returns the reference with a copy of its inputs."""
        return replace(self, call=self.call.changed(torch.clone, torch.clone))


def _limited(is_tangent: bool, limit: int) -> tuple[ReferencePass, FirstRun]:
    """Returns the forward pass on a reference and its watcher, which frees tensors beyond a memory limit."""
    first = FirstRun(limit, lambda: followed.drop())
    followed = ReferencePass(is_tangent, lambda: not first.is_over)
    return followed, first


@dataclass(frozen=True)
class Rerun:
    """Arguments of a recorded model call, with methods that run the model again.

    Attributes:
        formats: The autocast dtypes of layers at the time of the recording.
        calls_hooks: Whether the user's hooks are called.
    """

    model: nn.Module
    call: Call
    composite: Normalized
    output: Output | Atom | None
    reference: Reference | None = None
    max_memory: int | None = None
    formats: Formats = field(default_factory=dict)
    calls_hooks: bool = False

    @property
    def has_hooks(self) -> bool:
        """True if the user has registered hooks on the model, which may change its output."""
        return any(module._forward_hooks or module._forward_pre_hooks for module in self.model.modules())

    def with_hooks(self) -> Rerun:
        """Returns a copy that calls the hooks of the user in each run."""
        return replace(self, calls_hooks=True)

    def watched(self, run: Repeat, at_reference: Repeat | None) -> None:
        """Repeats the pass on the reference, if any, and the recorded forward pass, each under a watcher."""
        followed = None
        with untraced(), torch.inference_mode(False), torch.enable_grad(), layers_in(self.formats):
            if self.reference is not None and at_reference is not None:
                followed = ReferencePass(self.reference.is_tangent, at_reference.is_wanted)
                with suppress(PartRecorded):
                    _run(self.model, self.reference.call, self.composite, self.output, followed, at_reference)
                followed.replay()
            try:
                _run(self.model, self.call, self.composite, self.output, followed, run)
            finally:
                if followed is not None:
                    followed.close()

    def recording(self, change: Change, others: Change = _unchanged) -> Recording:
        """Runs the model on modified inputs and returns the recording."""
        modes = untraced(), torch.inference_mode(False), torch.enable_grad(), layers_in(self.formats)
        with ExitStack() as around:
            for block in (*modes, self._hooks()):
                around.enter_context(block)
            call = self.call.changed(change, others)
            reference = self._changed_reference(change, others)
            return Recording(self.model, call, self.composite, self.output, reference, self.max_memory)

    def outputs(self, change: Change, others: Change = _unchanged) -> Tensor:
        """Runs the model on modified inputs without recording and returns the output."""
        if isinstance(self.output, Atom):
            return self.recording(change, others).output.detach()
        call = self.call.changed(change, others)
        with ExitStack() as around:
            around.enter_context(_RECORDING)
            for block in (
                untraced(),
                layers_in(self.formats),
                self._hooks(),
                forward_pass(None),
                _buffers_kept(self.model),
                torch.no_grad(),
                precise_layers(),
                TablesUnwritten(),
            ):
                around.enter_context(block)
            output: Tensor = chosen_output(call.run(self.model, call.tensors), self.output)
            return output

    def _changed_reference(self, change: Change, others: Change) -> Reference | None:
        """Applies a change of the inputs to the reference as well. Their shapes then agree."""
        if self.reference is None:
            return None
        return replace(self.reference, call=self.reference.call.changed(change, others))

    def _hooks(self) -> AbstractContextManager[None]:
        return preserved(self.model) if self.calls_hooks else _without_hooks(self.model)

    def shapes_of_two(self) -> dict[Hashable, torch.Size]:
        """Returns the shapes of labeled tensors for two copies of the sample, or none if the model rejects them."""

        def twice(tensor: Tensor) -> Tensor:
            return torch.cat([tensor, tensor])

        def twice_if_one(tensor: Tensor) -> Tensor:
            return twice(tensor) if tensor.shape[:1] == (1,) else tensor

        for others in (_unchanged, twice_if_one):
            with suppress(Exception):  # a model written for a single sample may raise any error
                return self.recording(twice, others).taps.tensor_shapes()
        return {}


@contextmanager
def _noted(note: str) -> Iterator[None]:
    """Context manager that adds a note to errors of the model, except for errors of this package."""
    try:
        yield
    except NRMError:
        raise
    except Exception as error:
        error.add_note(note)
        raise


@contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """Context manager that removes all hooks of the model. Hooks of the user expect the original inputs."""
    with preserved(model):
        for module in model.modules():
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        yield


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Context manager that restores small buffers that the model modifies in place, such as running averages."""
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
                # Writes through ``.data`` do not change the version. Values are compared only on a CPU, since this
                # would synchronize other devices.
                is_written = buffer._version != version or (buffer.is_cpu and not torch.equal(buffer, values))
                if is_written and buffer.shape == values.shape:
                    before_writing(buffer)
                    buffer.copy_(values)
                    note_restored(buffer, version)


def _is_norm(module: nn.Module) -> bool:
    """Returns True if a module is a torch normalization layer in evaluation mode, whose statistics are constant."""
    return isinstance(module, nn.modules.batchnorm._NormBase) and not module.training


__all__ = ["Recording"]
