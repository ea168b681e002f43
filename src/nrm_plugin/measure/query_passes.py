"""Execution of queries as passes that propagate relevance over the recorded graph of a measure."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..errors import DifferenceError, EventError, StaleMeasureError, StorageError, brief
from ..events.event import Event
from ..model.autocast import exact
from ..model.trace_guards import is_traced
from ..recording.places import Buffer, Edge, Place, Sink
from ..recording.propagation import Cost
from ..recording.recording import Recording
from ..recording.taps import Tap
from .conditionals import Conditionals, are_below, check_below
from .conditions import check_condition, check_event, event_list
from .decision_diagram import DecisionDiagram
from .event_masses import EventResult, event_results
from .finite_results import check_finite
from .groups import Over, pair_of, summed
from .joints import joint_matrices
from .layer_loops import KeptAnswers, Loops, answer
from .layer_taps import Layer, is_below, tap_of
from .marginals import event_maps, separate_maps
from .memory_budget import budget_of
from .totals import Totals, pass_totals

P = ParamSpec("P")
T = TypeVar("T")


def query(method: Callable[P, T]) -> Callable[P, T]:
    """Decorator that makes a query independent of the gradient mode and checks the model and the results."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        args[0]._check_fresh()  # type: ignore[attr-defined]
        one = args[0]._one_query  # type: ignore[attr-defined]
        with one, torch.inference_mode(False), torch.no_grad(), exact():
            result = args[0]._answer(method, args[1:], kwargs)  # type: ignore[attr-defined]
            if not is_traced():  # otherwise, the query that is traced checks its own results
                check_finite(args[0], result)
            return result  # type: ignore[no-any-return]

    return wrapped


class QueryPasses:
    """Base class of :class:`RelevanceMeasure` that stores the recording and runs passes over it.

    Attributes:
        cost: Cost of the last query: the number of evaluated kernels and of propagated relevance vectors.
    """

    cost: Cost
    _recording: Recording
    _start: Tensor
    _max_memory: int | None
    _one_query: AbstractContextManager[Any] = nullcontext()
    _totals_once: Totals | None = None
    _has_sums = True
    _shared: tuple[Totals | None, frozenset[Place]] | None = None
    _loops: Loops
    _kept: KeptAnswers

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Raises an error if the measure is copied, pickled, saved with ``torch.save``, or sent to another process.

        Raises:
            StorageError: Always.
        """
        raise StorageError(
            "a measure cannot be copied or stored: it refers to one run of the model in the memory of this process. "
            "Store its results, as in torch.save(measure.marginal(measure.layers), path), or construct it again from "
            "the inputs. For a dataset, nrm_plugin.dataset.sweep stores the results."
        )

    @property
    def _is_batched(self) -> bool:
        """True if the first dimension of the inputs indexes samples."""
        return self._recording.samples.batched

    def _answer(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Answers a query. In a loop over layers, it is answered for several layers at once."""
        if self._shared is not None or not self._has_sums:  # such queries share a pass already
            return self._computed_answer(method, args, kwargs)
        return answer(self, method, args, kwargs)

    def _computed_answer(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the method of a query. Subclasses may override this."""
        return method(self, *args, **kwargs)

    def _has_program(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Returns True if the query has a compiled program, as it may in a plan."""
        return False

    def _check_inputs(self) -> None:
        """Raises an error if a query needs inputs that have been overwritten. A recording needs none."""

    @property
    def _vector_memory(self) -> int:
        """Memory budget of relevance vectors in bytes."""
        return budget_of(self._start.device, self._max_memory)

    @functools.cached_property
    def _layer_sizes(self) -> dict[str, int]:
        """Size of the marginal of each layer in bytes, keyed by its name, in execution order."""
        taps = {name: self._tap(name) for name in self._recording.taps.layers}
        return {name: math.prod(tap.shape) * self._start.element_size() for name, tap in taps.items()}

    @functools.cached_property
    def _names_of_places(self) -> dict[Place, list[str]]:
        names: dict[Place, list[str]] = {}
        for name in self._layer_sizes:
            names.setdefault(self._tap(name).place, []).append(name)
        return names

    def _own_names(self, layer: Layer) -> list[str]:
        """Returns the names of the tap that a query names as a layer, or none if it is not in the list of layers."""
        if isinstance(layer, str) and layer in self._layer_sizes:
            return [layer]
        return self._names_of_places.get(self._tap(layer).place, [])

    def _tap(self, layer: Layer) -> Tap:
        return tap_of(self._recording, layer)

    def _in_form(self, layer: Layer, values: Tensor) -> Tensor:
        """Converts values from the tensor layout of the model to shape ``(N, …)``."""
        return values if self._recording.samples.is_plain else self._tap(layer).layout.unfold(values)

    def _is_below(self, place: Buffer | Edge | Sink, tap: Tap) -> bool:
        return is_below(self._recording, place, tap)

    def _pass(self, stored: Sequence[Tap] = (), sums: bool = True) -> Totals:
        """Runs a pass that stores the relevance of the given taps. Caches its totals for later queries."""
        places = frozenset(tap.place for tap in stored)
        if self._shared is not None:
            known, wanted = self._shared
            if known is not None and places <= known.stored:
                return known
            places, sums = places | wanted, True
        totals = pass_totals(self._recording, self._start, places, sums=sums)
        if self._shared is not None:
            self._shared = (totals, places)
        if sums:
            self._totals_once = self._totals_once or replace(totals, maps={})
        self.cost = totals.cost
        return totals

    @contextmanager
    def _sharing(self, layers: Sequence[Layer]) -> Iterator[None]:
        """Context manager in which queries share one pass that stores the relevance of the given layers."""
        self._shared = (None, frozenset(self._tap(layer).place for layer in layers))
        try:
            yield
        finally:
            self._shared = None

    @contextmanager
    def _without_sums(self) -> Iterator[None]:
        """Context manager in which passes stop at the lowest tap and do not sum masses for later queries."""
        self._has_sums = False
        try:
            yield
        finally:
            self._has_sums = True

    @property
    def _totals(self) -> Totals:
        return self._totals_once or self._pass()

    def _maps(
        self, taps: list[Tap], over: Over | None, given: Any, joint: Any, min_ratio: float | None
    ) -> list[Tensor]:
        """Returns the relevance of each tap: marginal, joint with events, or conditional on events."""
        if given is not None and joint is not None:
            raise TypeError("give given= or joint=, not both: μ(i & B | A) is marginal(layer, joint=A & B) / μ(A).")
        if given is None and joint is None:
            has_sums = self._has_sums and not is_traced()  # a traced query must not depend on others
            totals = self._pass(taps, sums=has_sums)
            maps = [self._mixed(values) for values in separate_maps(totals, taps)]
        else:
            maps = self._event_maps(taps, joint if given is None else given, given is not None, min_ratio)
        return maps if over is None else [summed(values, tap, over) for values, tap in zip(maps, taps, strict=True)]

    def _event_maps(self, taps: list[Tap], event: Any, is_given: bool, min_ratio: float | None) -> list[Tensor]:
        events, is_single = event_list(event)
        results = self._results(events, taps)
        if is_given:
            for one, result in zip(events, results, strict=True):
                check_condition(one, result.mass, result.variation, min_ratio, self._recording.least)
        maps = event_maps(self._recording, results, taps, is_given)
        return [values[0] for values in maps] if is_single else maps

    def _results(self, events: Sequence[Event], taps: Sequence[Tap] = ()) -> list[EventResult]:
        places = [tap.place for tap in taps]
        results, self.cost = event_results(self._recording, self._start, events, places, self._max_memory)
        if self._recording.references == 1:
            return results
        mixed = self._mixed
        return [EventResult(mixed(one.mass), mixed(one.variation), [mixed(m) for m in one.maps]) for one in results]

    def _mixed(self, values: Tensor) -> Tensor:
        """Sums values of shape ``(N · references, …)`` over the references of each sample. Returns shape ``(N, …)``."""
        count = self._recording.references
        return values if count == 1 else values.reshape(-1, count, *values.shape[1:]).sum(1)

    def _masses(self, events: Sequence[Event], given: Event | None, min_ratio: float | None) -> Tensor:
        """Returns the masses of the events, as a tensor of shape ``(E, N)``."""
        if not events:
            return self._start.new_zeros((0, self._recording.samples.count // self._recording.references))
        if given is not None:
            check_event(given, "given= takes one event; for several conditions, use one query each. ")
            events = [*(item & given for item in events), given]
        results = self._results(events)
        mass = torch.stack([result.mass for result in results])
        if given is None:
            return mass
        check_condition(given, mass[-1], results[-1].variation, min_ratio, self._recording.least)
        return mass[:-1] / mass[-1]

    def _conditionals(self, event: Event, layer: Layer | None, among: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Returns ``μ(event given j)`` for one layer, with the key ``""``, or for all layers above the event.

        With ``among``, only for those of the given layers that are above the event.
        """
        every = self._recording.taps.layers if among is None else among
        names = {name: name for name in every} if layer is None else {"": layer}
        taps = {name: self._tap(one) for name, one in names.items()}
        check_event(event)
        if self._recording.references > 1:
            raise DifferenceError(
                "conditional(event, layer) is not defined for several references, since their mixture has no kernels "
                "of its own. Use mu(event, given=at(layer)[…]), or one measure per reference."
            )
        diagram = DecisionDiagram(self._recording, [event])
        if layer is not None:
            check_below(diagram, taps[""], event, layer)
        taps = {name: tap for name, tap in taps.items() if are_below(diagram, tap)}
        below = Conditionals(diagram, [tap.place for tap in taps.values()], diagram.roots, self._start)
        self.cost = below.cost
        values = {name: below.value(tap.place, diagram.roots[0]).clone() for name, tap in taps.items()}
        return {name: taps[name].layout.unfold(value) for name, value in values.items()}

    def _joints(self, layers: Sequence[Layer], overs: Sequence[Any], remedy: str) -> list[Tensor]:
        """Computes the joint relevance of each pair of consecutive layers, in shape ``(N, K_upper, K_lower)``."""
        groups = [pair_of(over) for over in overs]
        pairs = self._pairs(layers, remedy)
        totals = self._pass([above for above, _ in pairs])
        matrices, self.cost = joint_matrices(totals, pairs, groups, self._max_memory)
        return [self._mixed(matrix) for matrix in matrices]

    def _pairs(self, layers: Sequence[Layer], remedy: str) -> list[tuple[Tap, Tap]]:
        """Returns the taps of each pair of consecutive layers. Checks that the second is below the first."""
        pairs = list(pairwise([self._tap(layer) for layer in layers]))
        for (above, below), (upper, lower) in zip(pairs, pairwise(layers), strict=True):
            if not self._is_below(below.place, above):
                raise EventError(self._not_below(upper, lower, remedy))
        return pairs

    def _not_below(self, upper: Layer, lower: Layer, remedy: str) -> str:
        """Returns the error message for layers in the wrong order, with the right order if there is one."""
        first, second = (
            repr(self._recording.taps.name_of(one)) if isinstance(one, nn.Module) else brief(one)
            for one in (upper, lower)
        )
        above, below = self._tap(upper), self._tap(lower)
        if above.place == below.place:
            reason = "They are the same tensor."
        elif self._is_below(above.place, below):
            reason = f"From the output to the input, {second} comes before {first}."
        else:
            reason = "No walk crosses both."
        return f"{second} is not below {first}; {remedy}. {reason}"

    def _check_fresh(self) -> None:
        changed = self._recording.fingerprint.changed()
        if changed:
            raise StaleMeasureError(
                f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''} changed in place since the measure "
                "was constructed, and the measure shares its memory. Construct the measure again."
            )
