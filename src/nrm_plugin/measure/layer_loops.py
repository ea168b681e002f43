"""Loops over layers: a query asked of one layer after another is answered for all layers at once.

One pass computes the answers for all layers at about the cost of one. Answers that have not been asked for yet are kept
within a memory budget, and each is released when it is returned.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ..errors import NRMError
from ..events.event import Event
from ..model.trace_guards import is_traced
from ..recording.propagation import Cost

SEVERAL = 3
"""Number of different layers after which a query is answered for all layers."""
MOST = 64
"""Maximum number of queries whose layers are counted."""

Method = Callable[..., Any]
Answers = dict[str, Tensor]


class Measure(Protocol):
    """Protocol for the attributes of a measure that loops over layers use."""

    cost: Cost
    _loops: Loops
    _kept: KeptAnswers

    @property
    def _vector_memory(self) -> int: ...
    @property
    def _layer_sizes(self) -> Mapping[str, int]: ...
    def _own_names(self, layer: Any) -> Sequence[str]: ...
    def _computed_answer(self, method: Method, args: Any, kwargs: Any) -> Any: ...
    def _has_program(self, method: Method, args: Any, kwargs: Any) -> bool: ...
    def _check_inputs(self) -> None: ...


class Question(NamedTuple):
    """Query of one layer.

    Attributes:
        method: Method of the query.
        layer: The layer as the caller names it.
        others: All other arguments, by name.
        key: Hashable equivalent of the method and of these arguments. It is equal for all queries of a loop.
    """

    method: Method
    layer: Any
    others: dict[str, Any]
    key: Hashable


def question_of(method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Question | None:
    """Returns the query of one layer that a call makes, or None if it makes another kind of query."""
    if method.__name__ not in _ALL:
        return None
    try:
        others = _signature(method).bind(None, *args, **kwargs).arguments
        layer = others.pop("layer", None)
        del others["self"]
        key = (method.__name__, tuple(sorted((name, _key(value)) for name, value in others.items())))
        hash((key, layer))
    except (TypeError, KeyError):  # arguments that are invalid or cannot be compared
        return None
    return None if layer is None else Question(method, layer, others, key)


@functools.cache
def _signature(method: Method) -> inspect.Signature:
    return inspect.signature(method)


def _key(value: Any) -> Hashable:
    """Returns an argument in a form that is compared by value.

    Raises:
        TypeError: If it has none, as a tensor, whose values may change.
    """
    if value is None or isinstance(value, (bool, int, float, str, Event)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    raise TypeError(f"{type(value).__name__} cannot be compared")


class Loops:
    """Counts the layers of which each query has been asked, to detect loops over layers."""

    def __init__(self) -> None:
        self._layers: OrderedDict[Hashable, set[Any]] = OrderedDict()
        self._rejected: set[Hashable] = set()

    def is_loop(self, question: Question) -> bool:
        """Counts a query. Returns True if it has been asked of several layers."""
        layers = self._layers.setdefault(question.key, set())
        if len(layers) < SEVERAL:
            layers.add(question.layer)
        while len(self._layers) > MOST:
            self._layers.popitem(last=False)
        return len(layers) >= SEVERAL and question.key not in self._rejected

    def reject(self, question: Question) -> None:
        """Notes that a query cannot be answered for all layers at once."""
        if len(self._rejected) < MOST:
            self._rejected.add(question.key)
        self._layers.pop(question.key, None)


class KeptAnswers:
    """Answers to queries for layers that have not been asked for yet. Each is released when it is returned."""

    def __init__(self) -> None:
        self._answers: dict[Hashable, tuple[Answers, int]] = {}

    def __contains__(self, question: Question) -> bool:
        return question.key in self._answers

    def take(self, question: Question, names: Sequence[str]) -> Tensor | None:
        """Returns and releases the answer for a layer with the given names, or returns None if it is not kept."""
        answers, _ = self._answers.get(question.key, ({}, 0))
        answer = next((answers.pop(name) for name in names if name in answers), None)
        if not answers:
            self._answers.pop(question.key, None)
        return answer

    def keep(self, question: Question, answers: Answers, size: int, budget: int) -> None:
        """Keeps answers, in place of all earlier ones if they exceed the memory budget together."""
        self._answers.pop(question.key, None)
        if size + sum(size for _, size in list(self._answers.values())) > budget:
            self._answers = {}
        self._answers[question.key] = answers, size


def answer(mu: Measure, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answers a query, in a loop over layers for several layers at once.

    Args:
        mu: The measure.
        method: Method of the query.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    question = None if is_traced() else question_of(method, args, kwargs)  # a trace must not depend on other queries
    if question is not None:
        is_kept = question in mu._kept
        if is_kept or (not mu._has_program(method, args, kwargs) and mu._loops.is_loop(question)):
            kept = _kept_answer(mu, question, is_kept)
            if kept is not None:
                return kept
    return mu._computed_answer(method, args, kwargs)


def _kept_answer(mu: Measure, question: Question, is_kept: bool) -> Tensor | None:
    """Returns the answer of a query that is kept, or that is computed with those for other layers; otherwise None."""
    try:
        names = mu._own_names(question.layer)
    except NRMError:  # the query itself raises it
        return None
    if not names:
        return None
    if is_kept:
        known = mu._kept.take(question, names)
        if known is not None:
            mu._check_inputs()
            mu.cost = Cost()
            return known
        if not mu._loops.is_loop(question):
            return None
    _answer_all(mu, question, names[0])
    return mu._kept.take(question, names)


def _answer_all(mu: Measure, question: Question, name: str) -> None:
    """Keeps the answers for a layer and as many other layers as fit into the memory budget."""
    try:
        layers = _part(mu, question, name)
        if len(layers) > 1:
            answers = mu._computed_answer(_of_layers(question.method), (layers,), question.others)
            size = sum(one.numel() * one.element_size() for one in answers.values())
            mu._kept.keep(question, answers, size, mu._vector_memory)
    except Exception:  # raised at another layer, or raised again by the query itself
        mu._loops.reject(question)


def _part(mu: Measure, question: Question, own: str) -> tuple[str, ...]:
    """Returns the layers whose answers are computed with that of one layer, or none if its map exceeds the budget.

    The list of layers is divided into parts that fit into the memory budget. The division depends only on the model
    and the query, so that a plan needs one program per part.
    """
    budget = mu._vector_memory
    part: list[str] = []
    total = 0
    for name, size in mu._layer_sizes.items():
        size *= _maps_of(question)
        if total + size > budget:
            if own in part:
                break
            part, total = [], 0
        if size <= budget:
            part.append(name)
            total += size
    return tuple(part) if own in part else ()


def _maps_of(question: Question) -> int:
    """Returns the number of maps in the answer for one layer, or 0 if it has one value per sample."""
    if question.method.__name__ in _SUMS:
        return 0
    events = [value for value in question.others.values() if isinstance(value, (list, tuple))]
    return len(events[0]) if events else 1


@functools.cache
def _of_layers(method: Method) -> Method:
    """Returns a function that answers a query for several layers. Plans name its programs by its name."""
    together = _ALL[method.__name__]

    def run(mu: Any, layers: tuple[str, ...], **others: Any) -> Answers:
        return together(mu, method, layers, others)

    run.__name__ = f"{method.__name__} of several layers"
    return run


def _marginals(mu: Any, method: Method, layers: Sequence[str], others: dict[str, Any]) -> Answers:
    maps: Answers = method(mu, list(layers), **others)
    return maps


def _conditionals(mu: Any, method: Method, layers: Sequence[str], others: dict[str, Any]) -> Answers:
    maps: Answers = mu._conditionals(others["event"], None, layers)
    return maps


def _sums(mu: Any, method: Method, layers: Sequence[str], others: dict[str, Any]) -> Answers:
    answers = {}
    for layer in layers:
        try:
            answers[layer] = method(mu, layer, **others)
        except NRMError:  # samples cannot be distinguished in this layer; its own query raises the error
            continue
    return answers


_SUMS = ("sink", "bypass", "variation")
_ALL: dict[str, Callable[..., Answers]] = {
    "marginal": _marginals,
    "conditional": _conditionals,
    **dict.fromkeys(_SUMS, _sums),
}
"""Function that answers a query for several layers, keyed by the name of its method."""

__all__ = ["KeptAnswers", "Loops", "answer"]
