"""Measures whose queries are answered by programs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..errors import StaleMeasureError
from ..events.event import Atom
from ..measure.measure import RelevanceMeasure
from ..model.inputs_and_outputs import Call, Output
from ..model.targets import chosen_target, normalized, sample_sums, start_vector
from ..model.value_reads import avoiding
from ..recording.passes import Cost
from ..recording.recording import Recording
from .keys import frozen
from .model_state import ModelState
from .program import ChangedValueError
from .programs import Key, Programs, QueryProgram
from .trace import Tracer


@dataclass(frozen=True)
class Settings:
    """The settings of all measures of a plan.

    Attributes:
        model, composite, output, batched, max_memory: As in :class:`~nrm_plugin.RelevanceMeasure`.
        state: The state of the model.
    """

    model: nn.Module
    composite: Normalized
    output: Output | Atom | None
    batched: bool
    max_memory: int | None
    state: ModelState


class TracedRecording:
    """A recording whose operations are traced.

    Args:
        settings: The settings.
        call: Function that makes the call of the model.
        tensors: The tensors of the call.
        avoided: The shortcuts that must not be taken; None for a recording without trace.

    Attributes:
        tracer: The trace; None without one.
        recording: The recording.
        outputs: Its outputs in the form ``(N, …)``, and as the model returned them.
        start: Relevance of the outputs in their own layout, once the recording has started.
        numbers: The numbers of inputs, outputs and start in the trace.
    """

    def __init__(
        self, settings: Settings, call: Callable[[], Call], tensors: list[Tensor], avoided: frozenset[str] | None
    ) -> None:
        self.tracer = None if avoided is None else Tracer()
        self._avoided = avoided or frozenset()
        self.inputs = [] if self.tracer is None else [self.tracer.placeholder(tensor) for tensor in tensors]
        with self.traced():
            self.recording = Recording(settings.model, call(), settings.composite, settings.output)
            self.outputs = (self.recording.unfolded(), self.recording.outputs())
        self.obstacle = ""
        self.start: Tensor | None = None
        self.start_number = -1

    def traced(self) -> AbstractContextManager[Any]:
        """Context in which operations are appended to the trace."""
        return nullcontext() if self.tracer is None else _Traced(self.tracer, self._avoided)

    def begin(self, start: Tensor) -> None:
        """Starts the measure with relevance of the outputs, ``(N, …)``."""
        if self.tracer is not None:
            self.start_number = self.tracer.placeholder(start)
        with self.traced():
            self.start = self.recording.started(start)
        if self.tracer is not None and self.tracer.trace.obstacles:
            self.obstacle = self.tracer.trace.obstacles[0]


class _Traced:
    def __init__(self, tracer: Tracer, avoided: frozenset[str]) -> None:
        self._tracer, self._avoiding = tracer, avoiding(avoided)

    def __enter__(self) -> None:
        self._avoiding.__enter__()
        self._tracer.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._tracer.__exit__(*error)
        self._avoiding.__exit__(*error)


class PlannedMeasure(RelevanceMeasure):
    """A measure that answers queries by the programs of a plan, and records the model for other queries.

    Args:
        settings: The settings of the plan.
        programs: The programs for calls of this form.
        call: Function that makes the call of the model.
        tensors: The tensors of the call.
        target, start: As in :class:`~nrm_plugin.RelevanceMeasure`.
        recorded: A recording of this call, if there is one.
    """

    def __init__(
        self,
        settings: Settings,
        programs: Programs,
        call: Callable[[], Call],
        tensors: list[Tensor],
        target: Any,
        start: Any,
        recorded: TracedRecording | None = None,
    ) -> None:
        self._settings, self._programs, self._call, self._tensors = settings, programs, call, tensors
        self._versions = [tensor._version for tensor in tensors]
        self._max_memory = settings.max_memory
        self.composite = settings.composite
        self.cost = Cost()
        self._recorded = recorded
        self._is_answering = False
        self._state: tuple[QueryProgram, list[Any]] | None = None
        outputs, self._returned = self._forward()
        vector = start_vector(outputs, chosen_target(target, self.outputs, settings.batched), start)
        self._unfolded_start = normalized(vector)
        self._output = sample_sums(vector * outputs) / sample_sums(vector)

    # -- the forward pass -----------------------------------------------------------------------------------------

    def _forward(self) -> tuple[Tensor, Tensor]:
        """Returns the outputs in the form ``(N, …)`` and as the model returned them."""
        latest = self._programs.latest
        if self._recorded is None and latest is not None:
            try:
                outputs, state = latest.program.forward(self._tensors)
            except ChangedValueError as error:
                self._programs.reject(error)
            else:
                self._state = (latest, state)
                return outputs[0], outputs[1]
        if self._recorded is None:
            self._recorded = self._record()
        return self._recorded.outputs

    def _record(self, is_traced: bool = True) -> TracedRecording:
        programs = self._programs
        programs.recordings += 1
        avoided = programs.avoided if is_traced and not programs.obstacle else None
        with torch.enable_grad():
            return TracedRecording(self._settings, self._call, self._tensors, avoided)

    @property
    def outputs(self) -> Tensor:
        return self._returned.clone()

    # -- queries --------------------------------------------------------------------------------------------------

    def _answer(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._is_answering:
            return method(self, *args, **kwargs)
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
                self._recorded = None  # its trace may have taken the same shortcuts
        is_certain = not any(isinstance(value, (list, tuple)) and _names_events(value) for value in _values(key))
        if self._programs.is_worth(key, is_certain and not _names_events(key)):
            return self._traced(key, method, args, kwargs)
        return self._computed(method, args, kwargs)

    def _run(self, query: QueryProgram) -> Any:
        state = None
        if self._state is not None and self._state[0] is query and self._state[1]:
            state = self._state[1]
        if state is None:
            self._check_inputs()
            _, state = query.program.forward(self._tensors)
        results = query.program.relevance(state, self._unfolded_start)
        self.cost = query.cost
        self._programs.recordings = 0
        return query.answer(results)

    def _traced(self, key: Key, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Answers a query from a traced recording, and makes its program."""
        self._check_inputs()
        if self._recorded is None:
            self._recorded = self._record()
        recorded = self._recorded
        if recorded.start is None:
            recorded.begin(self._unfolded_start)
        if recorded.obstacle:
            self._programs.obstacle = recorded.obstacle
            return self._computed(method, args, kwargs)
        before = 0 if recorded.tracer is None else len(recorded.tracer.trace.obstacles)
        with recorded.traced():
            answer = self._computed(method, args, kwargs)
        if recorded.tracer is not None:
            outputs = [recorded.tracer.number(tensor) for tensor in recorded.outputs]
            self._programs.add(key, recorded.tracer, recorded.inputs, outputs, recorded.start_number, answer, self.cost)
            del recorded.tracer.trace.obstacles[before:]
        return answer

    def _computed(self, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._is_answering = True
        try:
            return method(self, *args, **kwargs)
        finally:
            self._is_answering = False

    def _known(self, name: str, *args: Any) -> Any:
        """Returns an answer that does not depend on values, from the recording of any call of this form."""
        key = (name, frozen(args))
        if key not in self._programs.answers:
            plain = super()
            found = getattr(plain, name)
            self._programs.answers[key] = found(*args) if callable(found) else found
        return self._programs.answers[key]

    @property
    def layers(self) -> list[str]:
        return list(self._known("layers"))

    @property
    def batch(self) -> int:
        return int(self._known("batch"))

    @property
    def _is_batched(self) -> bool:
        return self._settings.batched

    def shape(self, layer: Any) -> torch.Size:
        return torch.Size(self._known("shape", layer))

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
            self._recorded.begin(self._unfolded_start)
        return self._recorded.recording

    @property
    def _start(self) -> Tensor:  # type: ignore[override]
        recorded = self._recorded
        return self._unfolded_start if recorded is None or recorded.start is None else recorded.start

    def _check_inputs(self) -> None:
        """Raises :class:`StaleMeasureError` if the inputs were overwritten, which the program needs once more."""
        if [tensor._version for tensor in self._tensors] != self._versions:
            raise StaleMeasureError(
                "the inputs were overwritten since the measure was taken, and this query needs them. Take the measure "
                "again, or pass a copy of the inputs."
            )

    def _check_fresh(self) -> None:
        changed = self._settings.state.changed()
        if changed:
            raise StaleMeasureError(
                f"{changed} changed since the measure was taken, and the measure shares its memory. Take the measure "
                "again."
            )


def _values(key: Any) -> Any:
    return key if isinstance(key, tuple) else ()


def _names_events(key: Any) -> bool:
    """Whether a query names neurons, which usually differ from input to input."""
    if isinstance(key, Atom):
        return key.index is not None
    if isinstance(key, tuple):
        return any(_names_events(item) for item in key)
    return type(key).__module__.endswith("events.event")
