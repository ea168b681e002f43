"""Measures of a plan: they answer queries by running programs, compiled lists of tensor operations."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..errors import StaleMeasureError
from ..events.event import Atom
from ..measure.layer_loops import KeptAnswers
from ..measure.measure import RelevanceMeasure
from ..measure.memory_budget import DEFAULT
from ..measure.start import every_one, start_of
from ..model.inputs_and_outputs import Call, Output
from ..model.trace_guards import ACTIVE, uncollected, without_shortcuts
from ..recording.propagation import Cost
from ..recording.recording import Recording, Reference
from .keys import frozen
from .model_state import ModelState
from .program import ChangedValueError, Program
from .program_cache import Key, Programs, QueryProgram, TracedQueries
from .tracer import Tracer


@dataclass(frozen=True)
class Settings:
    """Settings shared by all measures of a plan.

    Attributes:
        model: As in :class:`~nrm_plugin.RelevanceMeasure`.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        batched: As in :class:`~nrm_plugin.RelevanceMeasure`.
        max_memory: As in :class:`~nrm_plugin.RelevanceMeasure`.
        references: Number of references per sample, or None if the measure explains outputs without a reference.
        state: Versions of all weights and Python attributes of the model, to detect changes.
    """

    model: nn.Module
    composite: Normalized
    output: Output | Atom | None
    batched: bool
    references: int | None
    max_memory: int | None
    state: ModelState


LONGEST = 5
"""Maximum length of a trace with queries, relative to its length after the recording."""


class PlannedOutputs:
    """Outputs of the model, from which the initial relevance is computed as if they came from a recording.

    Args:
        values: The outputs of shape ``(N, …)``, the outputs as returned by the model, and, if there is a reference,
            the differences from the outputs at the reference.
        is_batched: Whether the inputs have a batch dimension.
        references: Number of references per sample.

    Attributes:
        start: The initial relevance of the outputs, of shape ``(N, …)``, and, with ``against``, the weights of the
            outputs.
    """

    def __init__(self, values: Sequence[Tensor], is_batched: bool, references: int) -> None:
        self._values, self.is_batched, self.references = values, is_batched, references
        self.has_reference = len(values) > 2
        self.start: list[Tensor] = []

    def unfolded(self) -> Tensor:
        return self._values[0]

    def outputs(self) -> Tensor:
        return self._values[1].clone()

    def differences(self) -> Tensor:
        return self._values[2]

    def started(self, relevance: Tensor, contrast: Tensor | None = None) -> Tensor:
        self.start = [relevance] if contrast is None else [relevance, contrast]
        return relevance


class TracedRecording:
    """Recorded forward pass of a model, with a trace (list) of its tensor operations that a plan can replay.

    Args:
        settings: The settings of the plan.
        make_call: Function that returns the arguments of the model call and, if a difference is explained, the
            reference.
        tensors: The tensors among these arguments.
        disabled_shortcuts: Optimizations to disable because they are valid only for some input values, or None for a
            recording without a trace.

    Attributes:
        tracer: The object that writes the trace, or None if the recording is not traced.
        recording: The recording of the forward pass.
        outputs: The outputs with samples in the first dimension, the outputs as returned by the model, and, with a
            reference, the differences from the outputs at the reference.
        reason_not_replayable: Reason why the trace cannot be replayed for other inputs, or an empty string.
        inputs: Indices of the inputs in the trace.
        start: Initial relevance, with the shape of the outputs; set by :meth:`begin`.
        queries: The traced queries; set by :meth:`begin`.
    """

    def __init__(
        self,
        settings: Settings,
        make_call: Callable[[], tuple[Call, Reference | None]],
        tensors: list[Tensor],
        disabled_shortcuts: frozenset[str] | None,
    ) -> None:
        self.tracer = None if disabled_shortcuts is None else Tracer()
        self._disabled = disabled_shortcuts or frozenset()
        self.inputs = [] if self.tracer is None else [self.tracer.placeholder(tensor) for tensor in tensors]
        drawn = _random_states()
        with self.traced():
            call, reference = make_call()
            self.recording = Recording(
                settings.model, call, settings.composite, settings.output, reference, settings.max_memory
            )
            self.outputs = [self.recording.unfolded(), self.recording.outputs()]
            if reference is not None:
                self.outputs.append(self.recording.differences())
        self.reason_not_replayable = (
            "" if _random_states() == drawn else "the model draws random numbers of Python or NumPy"
        )
        if self.recording.parts is not None:
            self.tracer, self.reason_not_replayable = (
                None,
                "the recording exceeds max_memory, so it is recomputed in parts",
            )
        self._length = 0
        self.start: Tensor | None = None
        self.queries: TracedQueries | None = None

    @property
    def is_traceable(self) -> bool:
        """True if the trace is short enough to be compiled to a program."""
        return self.tracer is not None and len(self.tracer.trace.operations) <= LONGEST * max(self._length, 1000)

    def traced(self) -> AbstractContextManager[Any]:
        """Context manager in which operations are appended to the trace."""
        return nullcontext() if self.tracer is None else _Traced(self.tracer, self._disabled)

    def begin(self, start: Sequence[Tensor]) -> None:
        """Sets the initial relevance of the outputs and, for a contrast, their weights, each of shape ``(N, …)``."""
        if self.tracer is not None:
            outputs = [self.tracer.number(tensor) for tensor in self.outputs]
            numbers = [self.tracer.placeholder(tensor) for tensor in start]
            self.queries = TracedQueries(self.tracer, self.inputs, outputs, numbers)
        with self.traced():
            self.start = self.recording.started(*start)
        if self.tracer is not None:
            self._length = len(self.tracer.trace.operations)
        if self.tracer is not None and self.tracer.trace.reasons_not_replayable:
            self.reason_not_replayable = self.tracer.trace.reasons_not_replayable[0]


def _random_states() -> tuple[Any, ...]:
    """Returns the states of the random number generators of Python and NumPy. Their use is not traced."""
    kind, keys, *rest = np.random.get_state()
    return random.getstate(), kind, bytes(keys), *rest  # type: ignore[arg-type]


class _Traced:
    """Context manager in which operations are appended to a trace, with some shortcuts disabled."""

    def __init__(self, tracer: Tracer, disabled_shortcuts: frozenset[str]) -> None:
        self._tracer, self._guard = tracer, without_shortcuts(disabled_shortcuts)

    def __enter__(self) -> None:
        self._guard.__enter__()
        self._tracer.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._tracer.__exit__(*error)
        self._guard.__exit__(*error)


class PlannedMeasure(RelevanceMeasure):
    """Measure that answers queries by running the programs of a plan and records the model for all other queries.

    Args:
        settings: The settings of the plan.
        programs: The compiled programs for model calls with these shapes and settings.
        make_call: Function that returns the arguments of the model call and, if a difference is explained, the
            reference.
        tensors: The tensors among these arguments.
        target: As in :class:`~nrm_plugin.RelevanceMeasure`.
        start: As in :class:`~nrm_plugin.RelevanceMeasure`.
        against: As in :class:`~nrm_plugin.RelevanceMeasure`.
        recorded: An existing recording of this call, or None.
    """

    def __init__(
        self,
        settings: Settings,
        programs: Programs,
        make_call: Callable[[], tuple[Call, Reference | None]],
        tensors: list[Tensor],
        target: Any,
        start: Any,
        against: Any = None,
        recorded: TracedRecording | None = None,
    ) -> None:
        self._settings, self._programs, self._make_call, self._tensors = settings, programs, make_call, tensors
        self._versions = [tensor._version for tensor in tensors]
        self._max_memory = settings.max_memory
        self.composite = settings.composite
        self.cost = Cost()
        self._recorded = recorded
        self._is_answering = self._has_run = False
        self._lock = threading.RLock()
        self._state: tuple[Program, list[Any]] | None = None
        self._planned = PlannedOutputs(self._forward(), settings.batched, settings.references or 1)
        _, self._output = start_of(self._planned, target, start, against)
        self._is_difference = against is not None or settings.references is not None
        self._loops, self._kept = programs.loops, KeptAnswers()

    # -- the forward pass -----------------------------------------------------------------------------------------

    def _forward(self) -> Sequence[Tensor]:
        """Computes the outputs in the form of the argument ``values`` of :class:`PlannedOutputs`."""
        latest = self._programs.latest
        if self._recorded is None and latest is not None:
            try:
                outputs, state = latest.forward(self._tensors)
            except ChangedValueError as error:
                self._make_call()  # raises an error if the inputs are invalid, in which case the program is kept
                self._programs.reject(error)
            else:
                self._state = (latest, state)
                return outputs
        if self._recorded is None:
            self._recorded = self._record()
        if self._recorded.recording.parts is not None:
            self._programs.reason_not_replayable = self._recorded.reason_not_replayable
        return self._recorded.outputs

    def _record(self, is_traced: bool = True) -> TracedRecording:
        programs = self._programs
        programs.recordings += 1
        self._totals_once = None  # from another recording, and therefore a constant in the trace of this one
        disabled = programs.disabled_shortcuts if is_traced and not programs.reason_not_replayable else None
        with torch.enable_grad(), uncollected():
            return TracedRecording(self._settings, self._make_call, self._tensors, disabled)

    @property
    def outputs(self) -> Tensor:
        return every_one(self._planned.outputs(), self._planned.references)

    # -- queries --------------------------------------------------------------------------------------------------

    def _answer(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with self._lock:  # threads share the state of the first stage and the trace
            return method(self, *args, **kwargs) if self._is_answering else super()._answer(method, args, kwargs)

    def _has_program(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        try:
            return self._programs.find((method.__name__, frozen(args), frozen(kwargs)), is_used=False) is not None
        except TypeError:
            return False

    def _computed_answer(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            key: Key = (method.__name__, frozen(args), frozen(kwargs))
        except TypeError:
            return self._computed(method, args, kwargs)
        program = self._programs.find(key)
        if program is not None:
            try:
                return self._run(program)
            except ChangedValueError as error:
                self._programs.reject(error)
                self._recorded = None  # its trace may use the same shortcuts
        if self._programs.is_worth(key, not _names_events(key)):
            with uncollected():
                return self._traced(key, method, args, kwargs)
        return self._computed(method, args, kwargs)

    @contextmanager
    def _sharing(self, layers: Any) -> Iterator[None]:
        """Does nothing. Programs do not share passes."""
        yield

    def _run(self, query: QueryProgram) -> Any:
        self._check_inputs()
        program, programs = query.program, self._programs
        known, self._state = self._state, None
        if known is not None and known[0] is program:
            state = known[1]
        else:
            programs.asks_again = programs.asks_again or self._has_run
            _, state = program.forward(self._tensors)
        known, self._has_run = None, True
        is_kept = programs.asks_again and program.is_shareable and program.size <= (self._max_memory or DEFAULT)
        if is_kept:
            self._state = program, list(state)
        results = program.relevance(state, self._planned.start, query.number, is_kept)
        self.cost = query.cost
        self._programs.recordings = 0
        return query.answer(results)

    def _traced(self, key: Key, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Computes a query on a traced recording and compiles a program that repeats it."""
        self._check_inputs()
        if self._recorded is None or not self._recorded.is_traceable:
            self._recorded = self._record()
        recorded = self._recorded
        if recorded.start is None:
            recorded.begin(self._planned.start)
        if recorded.reason_not_replayable:
            self._programs.reason_not_replayable = recorded.reason_not_replayable
            return self._computed(method, args, kwargs)
        before = 0 if recorded.tracer is None else len(recorded.tracer.trace.reasons_not_replayable)
        if recorded.queries is not None:
            recorded.queries.tracer.query = len(recorded.queries.results) + 1
        answer = self._computed(method, args, kwargs)
        if recorded.tracer is not None and recorded.queries is not None:
            self._programs.add(key, recorded.queries, answer, self.cost)
            del recorded.tracer.trace.reasons_not_replayable[before:]
        _ = self._layer_sizes  # known from now on, so that no later measure is recorded for them
        return answer

    def _computed(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Computes a query on the recording. It is traced if possible, because later queries reuse its kernels."""
        self._is_answering = True
        try:
            with nullcontext() if self._recorded is None else self._recorded.traced():
                return method(self, *args, **kwargs)
        finally:
            self._is_answering = False

    def _known(self, name: str, *args: Any) -> Any:
        """Returns a value-independent property, computed once for all calls of this form."""
        key = (name, frozen(args))
        if key not in self._programs.answers:
            plain = super()
            traced = nullcontext() if self._recorded is None else self._recorded.traced()
            with self._lock, traced:
                attribute = getattr(plain, name)
                self._programs.answers[key] = attribute(*args) if callable(attribute) else attribute
        return self._programs.answers[key]

    @property
    def layers(self) -> list[str]:
        return list(self._known("layers"))

    @property
    def _layer_sizes(self) -> dict[str, int]:
        return dict(self._known("_layer_sizes"))

    def _own_names(self, layer: Any) -> list[str]:
        return list(self._known("_own_names", layer))

    @property
    def parts(self) -> int:
        return int(self._known("parts"))

    @property
    def batch(self) -> int:
        return int(self._known("batch"))

    @property
    def _is_batched(self) -> bool:
        return self._settings.batched

    def shape(self, layer: Any) -> torch.Size:
        return torch.Size(self._known("shape", layer))

    def _device(self, layer: Any) -> torch.device:
        return torch.device(self._known("_device", layer))

    def channel_dim(self, layer: Any) -> int:
        return int(self._known("channel_dim", layer))

    def taps_of(self, layer: Any, side: Any = "output") -> list[Atom]:
        return list(self._known("taps_of", layer, side))

    def __repr__(self) -> str:
        return str(self._known("__repr__"))

    # -- the recording, for other queries -------------------------------------------------------------------------

    @property
    def _recording(self) -> Recording:  # type: ignore[override]
        if self._recorded is None:
            self._check_inputs()
            self._recorded = self._record(is_traced=False)
        if self._recorded.start is None:
            self._recorded.begin(self._planned.start)
        if self._recorded.tracer is not ACTIVE.tracer:
            self._recorded.tracer = None  # a trace would treat kernels that are constructed outside of it as constants
        return self._recorded.recording

    @property
    def _start(self) -> Tensor:  # type: ignore[override]
        recorded = self._recorded
        return self._planned.start[0] if recorded is None or recorded.start is None else recorded.start

    def _check_inputs(self) -> None:
        """Raises :class:`StaleMeasureError` if inputs that a query still needs have been overwritten."""
        if [tensor._version for tensor in self._tensors] != self._versions:
            raise StaleMeasureError(
                "the inputs were overwritten since the measure was constructed, and this query needs them. Construct "
                "the measure again, or pass a copy of the inputs."
            )

    def _check_fresh(self) -> None:
        changed = self._settings.state.changed()
        if changed:
            raise StaleMeasureError(
                f"{changed} changed since the measure was constructed, and the measure shares its memory. Construct "
                "the measure again."
            )


def _names_events(key: Any) -> bool:
    """Returns True if a query contains events, which usually refer to other neurons for other inputs."""
    if isinstance(key, Atom):
        return key.index is not None
    if isinstance(key, tuple):
        return any(_names_events(item) for item in key)
    return type(key).__module__.endswith("events.event")
