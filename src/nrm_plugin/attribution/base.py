"""Shared helpers for the Captum classes: input formats, units and convergence deltas.

Captum's private helpers are imported only here because their location depends on the version of Captum.
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

from ..composites import Normalized
from ..errors import InputError, UnknownLayerError, brief
from ..events.event import Atom, Event, at
from ..measure.measure import RelevanceMeasure
from ..model.devices import by_sample, on_device_of
from ..model.inputs_and_outputs import is_index
from ..model.targets import sample_sums

Unit = Literal["output", "measure"]
Layer = nn.Module | str | Atom
WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)
"""Wrappers removed from a model to run it on a single device."""


def unwrapped(model: nn.Module) -> nn.Module:
    """Returns the model inside a wrapper. Other models are returned unchanged."""
    inner: nn.Module = model.module if isinstance(model, WRAPPERS) else model
    return inner


def as_tuple(inputs: Tensor | tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], bool]:
    """Returns the inputs as a tuple, and True if they were passed as a tuple."""
    given = tuple(inputs) if isinstance(inputs, list) else inputs
    if not isinstance(given, (Tensor, tuple)):
        raise InputError(f"inputs is {brief(given)}, expected a tensor of shape (N, …), or a tuple of such tensors.")
    return _format_tensor_into_tuples(given), isinstance(given, tuple)


def as_given(values: tuple[Tensor, ...], was_tuple: bool) -> Any:
    """Returns ``values`` as a tuple if the inputs were passed as one, and otherwise its only element."""
    return _format_output(was_tuple, values)


@dataclass(frozen=True)
class Request:
    """Arguments of ``attribute`` that determine the format of its return value."""

    given: Event | None
    joint: Event | None
    unit: Unit
    delta: bool
    sink: bool


def check_device_ids(device_ids: Any) -> None:
    """Raises :class:`TypeError` if a composite was passed as ``device_ids``."""
    if isinstance(device_ids, Composite):
        raise TypeError(
            "the third argument is device_ids, as in Captum's layer and neuron methods; name the composite: "
            f"composite={type(device_ids).__name__}(…)."
        )


def check_floating(inputs: tuple[Tensor, ...]) -> None:
    """Raises :class:`InputError` for integer inputs such as token ids, which receive no relevance."""
    if any(is_index(value) for value in inputs):
        raise InputError(
            "an input has an integer dtype, and integers receive no relevance. Attribute to its embedding, "
            "LayerNRM(model, model.embedding).attribute(tokens, …), or pass it in additional_forward_args."
        )


def reference_of(baselines: Any, inputs: tuple[Tensor, ...]) -> Any:
    """Converts Captum's baselines (tensors or numbers) to the ``reference`` of a measure. Returns None for None."""
    if baselines is None:
        return None
    given = tuple(baselines) if isinstance(baselines, (tuple, list)) else (baselines,)
    if len(given) != len(inputs):
        raise InputError(f"baselines= has {len(given)} entries for {len(inputs)} inputs; give one per input.")
    return tuple(_baseline(value, tensor) for value, tensor in zip(given, inputs, strict=True))


def _baseline(value: Any, tensor: Tensor) -> Tensor:
    """Converts the baseline of one input to a tensor."""
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, (int, float)):
        raise InputError(f"baselines= is {brief(value)}, expected a tensor or a number for each input.")
    if is_index(tensor) and not float(value).is_integer():
        raise InputError(f"baselines= is {value}, but the input contains ids, of dtype {tensor.dtype}; give an id.")
    return torch.full_like(tensor, value)


def rules_for(baselines: Any, composite: Normalized, has_rules: bool) -> Normalized | None:
    """Returns the normalized composite, or None (for secant slopes) if only baselines were passed."""
    return composite if baselines is None or has_rules else None


def in_unit(value: Tensor, output: Tensor, unit: Unit) -> Tensor:
    """Scales relevance of shape ``(N, …)`` by the explained output of shape ``(N,)`` if ``unit`` is ``"output"``.

    Raises:
        ValueError: If the unit is unknown.
    """
    if unit not in ("output", "measure"):
        raise ValueError(f"unit={brief(unit)} is unknown; choose 'output' or 'measure'.")
    return value if unit == "measure" else value * by_sample(output, value)


def as_tensor(measure: RelevanceMeasure, values: Tensor) -> Tensor:
    """Removes the batch dimension of relevance of shape ``(N, …)`` if the inputs have no batch dimension."""
    return values if measure._is_batched else values.squeeze(0)


def input_taps(measure: RelevanceMeasure) -> list[Atom]:
    """Returns the taps of the inputs that affect the explained output."""
    try:
        return measure.taps_of("input")
    except UnknownLayerError:
        return []


def input_relevance(
    measure: RelevanceMeasure, inputs: tuple[Tensor, ...], given: Event | None, joint: Event | None
) -> list[Tensor]:
    """Computes the marginal of each input, with the shape of the input.

    The marginal is zero if the input does not affect the output.

    Raises:
        InputError: If the inputs affect the output only as lookup indices.
    """
    taps = [at("input")] if len(inputs) == 1 else [at("input", item=item) for item in range(len(inputs))]
    recorded = set(input_taps(measure))
    known = [tap for tap in taps if tap in recorded]
    if not known:
        raise InputError(
            "the inputs have no relevance: the model converts them to integers and uses these for lookups. Attribute "
            f"to the rows that it looks up, LayerNRM(model, {measure.layers[0]!r}).attribute(…)."
        )
    marginals = measure.marginal(known, given=given, joint=joint)
    pairs = zip(taps, inputs, strict=True)
    return [as_tensor(measure, marginals[tap]) if tap in marginals else torch.zeros_like(x) for tap, x in pairs]


def convergence_delta(measure: RelevanceMeasure, taps: list[Atom]) -> Tensor:
    """Returns the convergence delta of each sample: one minus the sum of the layer's mass, sink and bypass."""
    if len(taps) == 1:
        (tap,) = taps
        sink = sink_above(measure, taps)
        return 1 - on_device_of(sample_sums(measure.marginal(tap)), sink) - sink - measure.bypass(tap)
    # No walk crosses two tensors of a tuple, so the walks that cross none of them form the complement of the union.
    union = functools.reduce(operator.or_, taps)
    return 1 - sum(measure(tap) for tap in taps) - measure(~union)


def sink_above(measure: RelevanceMeasure, taps: list[Atom]) -> Tensor:
    """Returns the relevance absorbed above any of the taps of a layer, of shape ``(N,)``."""
    return measure.sink(taps[0]) if len(taps) == 1 else measure.sink_above(taps)


def with_optional(attributions: Any, delta: Any | None, sink: Any | None) -> Any:
    """Returns the attributions together with ``delta`` and ``sink`` unless they are None."""
    parts = [attributions, *(part for part in (delta, sink) if part is not None)]
    return parts[0] if len(parts) == 1 else tuple(parts)


__all__ = ["log_usage"]
