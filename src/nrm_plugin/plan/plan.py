"""Plans of a model: measures of many inputs of the same shape, at the cost of one or two gradients each."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Normalized, Uncovered
from ..errors import InputError, StorageError
from ..events.event import Atom
from ..kernels.normalization import Residual
from ..measure.layer_taps import Layer
from ..measure.measure import RelevanceMeasure
from ..measure.memory_budget import check_memory
from ..measure.references import Slopes, composite_of, reference_of
from ..model.checks import check_module
from ..model.inputs_and_outputs import Call, Inputs, Output
from ..model.trace_guards import uncollected
from ..recording.recording import Reference
from .export import explained_model, save
from .keys import call_key, shapes_of
from .model_state import ModelState, hooked, settings
from .planned_measure import PlannedMeasure, Settings, TracedRecording
from .program_cache import Programs, memory_of

MOST = 8
"""Maximum number of call forms for which programs are stored."""
IDLE = 8
"""Number of consecutive recordings after which a plan is no longer used for calls of the same form."""


class Plan:
    """Plan that computes measures of a model by replaying tensor operations, without hooks or autograd.

    Everything that does not depend on the values of the inputs is computed only once: names, the graph, rules, modified
    and fused weights, and checks. The first time a query is made, it is recorded and traced. For further inputs of the
    same shapes, the trace is replayed as a flat list of tensor operations.

    Args:
        model: The network, in evaluation mode.
        inputs: Example inputs with the shapes of later inputs, of shape ``(N, …)``.
        composite: As in :class:`~nrm_plugin.RelevanceMeasure`.
        residual: As in :class:`~nrm_plugin.RelevanceMeasure`.
        gain_limit: As in :class:`~nrm_plugin.RelevanceMeasure`.
        additional_forward_args: As in :class:`~nrm_plugin.RelevanceMeasure`.
        additional_forward_kwargs: As in :class:`~nrm_plugin.RelevanceMeasure`.
        output: As in :class:`~nrm_plugin.RelevanceMeasure`.
        batched: As in :class:`~nrm_plugin.RelevanceMeasure`.
        uncovered: As in :class:`~nrm_plugin.RelevanceMeasure`.
        reference: As in :class:`~nrm_plugin.RelevanceMeasure`.
        slopes: As in :class:`~nrm_plugin.RelevanceMeasure`.
        max_memory: As in :class:`~nrm_plugin.RelevanceMeasure`. If a recording exceeds it, every call is recorded in
            parts, and nothing is replayed.

    Raises:
        InputError, ModelStateError, UnsupportedOperationError: As in :class:`~nrm_plugin.RelevanceMeasure`.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> plan = Plan(net, torch.randn(5, 3))
        >>> for x in torch.randn(2, 5, 3):
        ...     relevance = plan(x, 1).marginal("input")
        >>> relevance.shape
        torch.Size([5, 3])

    Source: new in this package.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        *,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        additional_forward_args: Any = None,
        additional_forward_kwargs: Mapping[str, Any] | None = None,
        output: Output | Atom | None = None,
        batched: bool = True,
        uncovered: Uncovered | None = None,
        reference: Any = None,
        slopes: Slopes = "secant",
        max_memory: float | None = None,
    ) -> None:
        check_module(model)
        self.model = model
        self._rules: _Rules = (composite, residual, gain_limit, uncovered)
        self._output, self._batched, self._max_memory = output, batched, check_memory(max_memory)
        self._slopes: Slopes = slopes
        self._composites: dict[bool, Normalized] = {}
        self._first: tuple[Hashable, list[tuple[int, int]], TracedRecording] | None = None
        self._renew()
        form = self._form(inputs, additional_forward_args, additional_forward_kwargs, reference)
        disabled_shortcuts: frozenset[str] | None = frozenset() if form.tensors else None
        with uncollected():
            recorded = TracedRecording(form.settings, form.make_call, form.tensors, disabled_shortcuts)
        if recorded.recording.draws is None:  # otherwise, the first measure has its own draw, like all others
            self._first = (form.key, _identities(form.tensors), recorded)

    def __call__(
        self,
        inputs: Inputs,
        target: Any = None,
        *,
        start: Any = None,
        against: Any = None,
        reference: Any = None,
        additional_forward_args: Any = None,
        additional_forward_kwargs: Mapping[str, Any] | None = None,
    ) -> RelevanceMeasure:
        """Returns the relevance measure of the model for the given inputs.

        Inputs of a new shape are first recorded, and so are any inputs after the model has changed.

        Args:
            inputs: As in :class:`~nrm_plugin.RelevanceMeasure`.
            target: As in :class:`~nrm_plugin.RelevanceMeasure`.
            start: As in :class:`~nrm_plugin.RelevanceMeasure`.
            against: As in :class:`~nrm_plugin.RelevanceMeasure`.
            reference: As in :class:`~nrm_plugin.RelevanceMeasure`.
            additional_forward_args: As in :class:`~nrm_plugin.RelevanceMeasure`.
            additional_forward_kwargs: As in :class:`~nrm_plugin.RelevanceMeasure`.

        Returns:
            A measure that supports all queries.

        Raises:
            InputError, ModelStateError, TargetError, UnsupportedOperationError: As in
                :class:`~nrm_plugin.RelevanceMeasure`.
        """
        if self._has_changed():
            self._renew()
        arguments = (additional_forward_args, additional_forward_kwargs)
        return self._measured(inputs, target, start, against, reference, *arguments)

    def _measured(
        self, inputs: Inputs, target: Any, start: Any, against: Any, reference: Any, args: Any, kwargs: Any
    ) -> RelevanceMeasure:
        """Returns the measure for the given inputs, assuming that the model has not changed."""
        form = self._form(inputs, args, kwargs, reference)
        recorded, self._first = self._first, None
        if recorded is not None and recorded[:2] != (form.key, _identities(form.tensors)):
            recorded = None
        first = None if recorded is None else recorded[2]
        # A contrast without a reference adds a tap above the outputs, so its programs are different.
        programs = self._programs(form, against is not None and reference is None)
        return PlannedMeasure(form.settings, programs, form.make_call, form.tensors, target, start, against, first)

    def explain(self) -> str:
        """Describes which queries are replayed and why others are recorded every time.

        Returns:
            A text that lists the tensor shapes for each form of calls. For each query, it lists the number of
            operations, the memory of constants that are not tensors of the model, and the values that are verified in
            each run.

        Examples:
            >>> plan = Plan(nn.Linear(3, 2), torch.randn(5, 3))
            >>> plan.explain()
            'nothing is planned yet'
        """
        own, lines = self._state.memories(), []
        for (form, _), programs in self._forms.items():
            lines.append(f"inputs {shapes_of(form)}:")
            lines += [f"  {line}" for line in programs.lines(own)]
        return "\n".join(lines) or "nothing is planned yet"

    def export(
        self,
        path: str | Path,
        inputs: Inputs,
        layers: Sequence[Layer] = ("input",),
        *,
        additional_forward_args: Any = None,
        additional_forward_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        """Exports a program that returns outputs and their relevance and depends only on PyTorch.

        The program can be loaded with ``torch.export.load(path).module()``. Its arguments are the tensors of a call, in
        the order and with the shapes of ``inputs``, and an int64 tensor of targets of shape ``(N,)``, in which -1
        selects the class with the largest output. It returns a dictionary:

        - ``"outputs"``: the outputs of the model;
        - ``"target"``: the explained class of each sample, of shape ``(N,)``;
        - ``"relevance"``: the marginal of each layer, of shape ``(N, *shape)``, keyed by layer name;
        - ``"is_valid"``: a boolean tensor of shape ``(N,)``, False if the target is not a class, the relevance is not
          finite, or a value on which the model branches differs from its value at ``inputs``. The relevance of such a
          sample must not be used.

        Args:
            path: Path of the file, by convention with the extension ``.pt2``. If it ends in ``.onnx``, PyTorch's ONNX
                exporter is used, which requires the packages onnx and onnxscript.
            inputs: Example inputs with the shapes of later inputs.
            layers: Names of the layers whose relevance is returned, or ``at(…)``.
            additional_forward_args: As in :class:`~nrm_plugin.RelevanceMeasure`.
            additional_forward_kwargs: As in :class:`~nrm_plugin.RelevanceMeasure`.

        Raises:
            InputError: If the outputs do not have shape ``(N, K)`` or ``(N,)``.
            UnknownLayerError: If no tap has one of the given names.
            UnsupportedOperationError: If shapes in the model depend on input values, or if the model draws random
                numbers.
            MissingExtraError: If onnx or onnxscript is required but not installed.

        Examples:
            >>> import os, tempfile
            >>> x, path = torch.randn(5, 3), os.path.join(tempfile.mkdtemp(), "relevance.pt2")
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> Plan(net, x).export(path, x, ["input"])
            >>> program = torch.export.load(path).module()
            >>> program(x, torch.full((5,), 1))["relevance"]["input"].shape
            torch.Size([5, 3])
        """
        if self._has_changed():
            self._renew()
        form = self._form(inputs, additional_forward_args, additional_forward_kwargs, None)
        if not form.tensors:
            raise InputError("an argument of the model cannot be compared, so no program can be exported for it.")
        save(*explained_model(form.settings, form.make_call, form.tensors, layers), Path(path))

    def _has_changed(self) -> bool:
        """Returns True if the model or the composite has changed. All programs are then invalid."""
        return self._state.is_outdated() or settings(self._rules[0]) != self._rules_state

    def _is_useful(self, form: Hashable) -> bool:
        """Returns True if calls of this form can be replayed and have repeated their queries so far."""
        known = [programs for (key, _), programs in self._forms.items() if key == form]
        return not any(programs.reason_not_replayable or programs.recordings > IDLE for programs in known)

    @property
    def _count(self) -> int:
        """Number of compiled programs."""
        return sum(map(len, self._forms.values()))

    @property
    def memory(self) -> int:
        """Memory in bytes of the constants of all programs, excluding tensors of the model.

        Examples:
            >>> plan = Plan(nn.Linear(3, 2), torch.randn(5, 3))
            >>> plan.memory
            0
        """
        held = [constant for programs in self._forms.values() for constant in programs.constants()]
        return memory_of(held, self._state.memories())

    def _renew(self) -> None:
        self._state = ModelState(self.model, self._rules[0])
        self._rules_state = settings(self._rules[0])
        self._composites.clear()
        self._forms: dict[tuple[Hashable, bool], Programs] = {}
        self._first = None

    def _form(self, inputs: Any, args: Any, kwargs: Any, reference: Any) -> _Form:
        def call() -> tuple[Call, Reference | None]:
            return reference_of(Call(inputs, args, kwargs, self._batched), reference, self._slopes)

        try:
            key, tensors = call_key((inputs, args, None if kwargs is None else dict(kwargs), reference))
        except (TypeError, ValueError, RuntimeError):  # the last for nested tensors, which have no shape
            key, tensors = object(), []
        return _Form(key, tensors, call, self._settings_for(reference))

    def _settings_for(self, reference: Any) -> Settings:
        has_reference = reference is not None
        if has_reference not in self._composites:
            self._composites[has_reference] = composite_of(*self._rules, reference)
        references = len(reference) if isinstance(reference, list) else 1 if has_reference else None
        composite = self._composites[has_reference]
        return Settings(self.model, composite, self._output, self._batched, references, self._max_memory, self._state)

    def _programs(self, form: _Form, is_contrast: bool) -> Programs:
        """Returns the programs for calls of the given form."""
        key = (form.key, is_contrast)
        if key not in self._forms:
            self._forms[key] = Programs()
            self._forms[key].reason_not_replayable = hooked(self.model)
            if not form.tensors:
                self._forms[key].reason_not_replayable = "an argument of the model cannot be compared"
            while len(self._forms) > MOST:
                self._forms.pop(next(iter(self._forms)))
        return self._forms[key]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises an error if the plan is copied, pickled or sent to another process.

        Raises:
            StorageError: Always.
        """
        raise StorageError("a plan cannot be copied or stored: it belongs to one model in the memory of this process.")


_Rules = tuple[Composite | None, Residual | None, float | None, Uncovered | None]


@dataclass(frozen=True)
class _Form:
    """Arguments of a model call, and a key that is equal for calls to which the same programs apply.

    Attributes:
        key: Structure of the arguments, shapes and types of the tensors, and all other values.
        tensors: The tensors among the arguments.
        make_call: Function that returns the arguments of the model call and, if a difference is explained, the
            reference.
        settings: The settings of the measure.
    """

    key: Hashable
    tensors: list[Tensor]
    make_call: Callable[[], tuple[Call, Reference | None]]
    settings: Settings


def _identities(tensors: list[Tensor]) -> list[tuple[int, int]]:
    return [(id(tensor), tensor._version) for tensor in tensors]


__all__ = ["Plan"]
