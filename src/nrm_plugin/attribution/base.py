"""What the Captum classes share: Captum's forms of inputs, units, and convergence deltas.

Captum's private helpers are imported here only, since they move between its versions.
"""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from captum._utils.common import _format_output, _format_tensor_into_tuples
from captum.log import log_usage
from torch import Tensor, nn
from zennit.core import Composite

from ..errors import InputError, UnknownLayerError
from ..events.event import Atom, Event, at
from ..measure.measure import RelevanceMeasure
from ..model.inputs_and_outputs import is_index
from ..model.targets import sample_sums

Unit = Literal["output", "measure"]
Layer = nn.Module | str | Atom


def as_tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], bool]:
    """Inputs as a tuple, and whether they were one."""
    return _format_tensor_into_tuples(inputs), isinstance(inputs, tuple)


def as_given(values: tuple[Tensor, ...], was_tuple: bool) -> Any:
    """A tuple for a tuple, a tensor for a tensor."""
    return _format_output(was_tuple, values)


@dataclass(frozen=True)
class Request:
    """What ``attribute`` returns for the inputs; the fields are its arguments of the same meaning."""

    given: Event | None
    joint: Event | None
    unit: Unit
    delta: bool
    sink: bool


def check_device_ids(device_ids: Any) -> None:
    """Raises :class:`TypeError` for a composite in the place of ``device_ids``."""
    if isinstance(device_ids, Composite):
        raise TypeError(
            "the third argument is device_ids, as in Captum's layer and neuron methods; name the composite: "
            f"composite={type(device_ids).__name__}(…)."
        )


def check_floating(inputs: tuple[Tensor, ...]) -> None:
    """Raises :class:`InputError` for indices, such as tokens: only the embeddings that they select have relevance."""
    if any(is_index(value) for value in inputs):
        raise InputError(
            "an input has an integer dtype, and integers have no relevance. Attribute to its embedding, "
            "LayerNRM(model, model.embedding).attribute(tokens, …), or pass it by additional_forward_args."
        )


def in_unit(value: Tensor, output: Tensor, unit: Unit) -> Tensor:
    """Relevance ``(N, …)`` in units of the explained output ``(N,)``, or of the measure.

    Raises:
        ValueError: An unknown unit.
    """
    if unit not in ("output", "measure"):
        raise ValueError(f"unit={unit!r} is unknown; choose 'output' or 'measure'.")
    return value if unit == "measure" else value * output.reshape(-1, *(1,) * (value.ndim - 1))


def input_taps(measure: RelevanceMeasure) -> list[Atom]:
    """The taps of the inputs that the explained output depends on."""
    try:
        return measure.taps_of("input")
    except UnknownLayerError:
        return []


def input_relevance(
    measure: RelevanceMeasure, inputs: tuple[Tensor, ...], given: Event | None, joint: Event | None
) -> list[Tensor]:
    """Marginals of all inputs; zeros for those that the explained output does not depend on.

    Raises:
        InputError: It depends on none of them but by rows that the model looks up.
    """
    taps = [at("input")] if len(inputs) == 1 else [at("input", item=item) for item in range(len(inputs))]
    recorded = set(input_taps(measure))
    known = [tap for tap in taps if tap in recorded]
    if not known:
        raise InputError(
            "the inputs have no relevance: the model converts them to integers, and looks up rows by these. Attribute "
            f"to the rows that are looked up, LayerNRM(model, {measure.layers[0]!r}).attribute(…)."
        )
    marginals = measure.marginal(known, given=given, joint=joint)
    return [marginals[tap] if tap in marginals else torch.zeros_like(x) for tap, x in zip(taps, inputs, strict=True)]


def convergence_delta(measure: RelevanceMeasure, taps: list[Atom]) -> Tensor:
    """One minus mass, sink and bypass of the tensors of one layer, ``(N,)``."""
    if len(taps) == 1:
        (tap,) = taps
        return 1 - sample_sums(measure.marginal(tap)) - measure.sink(tap) - measure.bypass(tap)
    # No walk crosses two tensors of one tuple, so the walks that cross none are the complement of the union.
    union = functools.reduce(operator.or_, taps)
    return 1 - sum(measure(tap) for tap in taps) - measure(~union)


def with_optional(attributions: Any, delta: Any | None, sink: Any | None) -> Any:
    """Attributions alone, or a tuple of them with the delta and the sink that are not None."""
    parts = [attributions, *(part for part in (delta, sink) if part is not None)]
    return parts[0] if len(parts) == 1 else tuple(parts)


__all__ = ["log_usage"]
