"""Validation of the events in a query and division by the mass of a condition."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from ..errors import CancellationError, EventError, NullEventError, brief, samples
from ..events.event import Event
from ..model.devices import by_sample

MIN_RATIO = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Smallest accepted divisor ``|μ(B)|``, relative to the variation of ``B``, keyed by dtype."""


class Condition(TypedDict, total=False):
    """Keyword arguments of a marginal; see :meth:`~nrm_plugin.RelevanceMeasure.marginal`."""

    given: Event | Sequence[Event] | None
    joint: Event | Sequence[Event] | None
    min_ratio: float | None


def check_event(event: object, remedy: str = "") -> None:
    """Raises :class:`EventError` if the argument is not an event. The message ends with ``remedy``."""
    if not isinstance(event, Event):
        raise EventError(
            f"expected an event such as at('layer')[3], got {type(event).__name__}: {brief(event)}. {remedy}".rstrip()
        )


def event_list(event: Event | Sequence[Event]) -> tuple[list[Event], bool]:
    """Converts one or several events to a list. The second value is True if a single event was given.

    Raises:
        EventError: If the argument is neither an event nor a sequence of events.
    """
    if isinstance(event, Event):
        return [event], True
    if not isinstance(event, Iterable) or isinstance(event, (str, Tensor)):
        raise EventError(f"expected an event such as at('layer')[3], or a list of them, got {type(event).__name__}.")
    events = list(event)
    for item in events:
        check_event(item)
    return events, False


def check_condition(event: Event, mass: Tensor, variation: Tensor, min_ratio: float | None, least: float = 0.0) -> None:
    """Raises an error if ``μ(· | event)`` is undefined or numerically unstable.

    Args:
        event: The event to condition on.
        mass: Mass of the event, of shape ``(N,)``.
        variation: Variation of the event, of shape ``(N,)``.
        min_ratio: Smallest accepted ratio of ``|mass|`` to the variation, or None for the default of the dtype.
        least: Largest variation that is treated as zero.

    Raises:
        NullEventError: If the variation of a sample is zero.
        CancellationError: If the mass of a sample is too small.
        ValueError: If ``min_ratio`` is not a number of at least 0.
    """
    ratio = MIN_RATIO[mass.dtype] if min_ratio is None else min_ratio
    if not isinstance(ratio, numbers.Real) or not float(ratio) >= 0:
        raise ValueError(f"min_ratio={brief(min_ratio)} is invalid; give a number of at least 0, or None.")
    null = variation <= least
    if bool(null.any()):
        is_null = null.tolist()
        raise NullEventError(
            f"cannot condition on {event}: no walk with nonzero mass satisfies it ({samples(is_null)}), so μ(· | "
            f"{event}) is 0/0. Condition on an event with nonzero mass; mu(event) returns the mass."
        )
    weak = mass.abs() <= ratio * variation
    if bool(weak.any()):
        is_weak = weak.tolist()
        first = is_weak.index(True)
        anyway = ", or pass min_ratio=0 to divide anyway" if ratio > 0 else ""
        raise CancellationError(
            f"cannot condition on {event}: its mass is {float(mass[first]):.2g} but its variation is "
            f"{float(variation[first]):.2g}. Positive and negative walks cancel, so dividing by the mass is unstable "
            f"({samples(is_weak)}). Condition on a smaller event{anyway}."
        )


def divided(values: Tensor, mass: Tensor) -> Tensor:
    """Divides relevance of shape ``(N, *shape)`` at a tap by one mass per sample, given in shape ``(N,)``."""
    return values / by_sample(mass, values)
