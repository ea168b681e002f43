"""Queries of a sweep: named, immutable objects that can be stored as JSON."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ..events.event import Atom, Event, at
from ..events.serialization import event_from_json, event_to_json
from ..measure.groups import KINDS
from .sweep_layout import QueryInfo, SweepError

LayerSpec = str | Atom
Reduce = Literal["max", "mean", "sum"]
MIN_RATIO = 1e-3
MAX_LABEL_BYTES = 1 << 28
"""Maximum size in bytes of labels read from a file. The widest layers of VGG16 require 13 million bytes."""


@dataclass(frozen=True)
class Labels:
    """Integer labels of neurons in a hashable, serializable form.

    Attributes:
        shape: Shape of the labels.
        data: The labels as int32 bytes.
    """

    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, labels: Tensor) -> Labels:
        """Creates labels from an integer tensor."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise SweepError(f"over= takes integer labels, got {labels.dtype}. Use labels.long().")
        return cls(tuple(labels.shape), labels.detach().cpu().int().numpy().tobytes())

    @property
    def tensor(self) -> Tensor:
        """The labels as an int64 tensor."""
        return torch.from_numpy(np.frombuffer(self.data, np.int32).copy()).long().reshape(self.shape)


Over = str | Labels


@dataclass(frozen=True)
class Query:
    """Base class for quantities computed by a sweep for each sample.

    Attributes:
        name: Name of the query in the rows. Defaults to a name derived from the arguments.
    """

    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("layer", "upper", "lower"):
                _check_layer(self, value)
            if item.name in ("event", "given", "joint") and value is not None:
                event_to_json(value)  # raises if the event cannot be stored
            if item.name == "over":
                object.__setattr__(self, "over", _validated_over(self, value))
        if getattr(self, "given", None) is not None and getattr(self, "joint", None) is not None:
            raise SweepError(f"{type(self).__name__}: give given= or joint=, not both.")
        if not isinstance(self.name, str) or "\n" in self.name:
            raise SweepError(f"the name of a query is one line of text, got {self.name!r}.")
        if not self.name:
            object.__setattr__(self, "name", self._default_name())

    def _default_name(self) -> str:
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            is_plain = item.name in ("layer", "upper", "lower", "event")
            if is_plain or (item.name != "name" and value != item.default):
                parts.append(_text(value) if is_plain else f"{item.name}={_text(value)}")
        return f"{type(self).__name__.lower()}({', '.join(parts)})"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, the upper one first."""
        names = [item.name for item in fields(self) if item.name in ("layer", "upper", "lower")]
        return tuple(_text(getattr(self, name)) for name in names)

    def to_json(self) -> dict[str, Any]:
        """Converts the query to JSON. :func:`from_json` restores it."""
        return {"kind": type(self).__name__} | {item.name: _to_json(getattr(self, item.name)) for item in fields(self)}

    def info(self, groups: Sequence[int] | None = None) -> QueryInfo:
        """Returns the manifest entry of the query."""
        shape = None if groups is None else tuple(groups)
        return QueryInfo(self.name, type(self).__name__, self.layers, shape, self.to_json())


@dataclass(frozen=True)
class Marginal(Query):
    """``μ(group)``, ``μ(group & joint)`` or ``μ(group | given)`` for each group of a layer.

    Args:
        layer: Name of a tap, or ``at(…)``.
        over: ``"channel"``, ``"position"``, ``"neuron"``, or integer labels for all neurons.
        joint: Event for joint relevance.
        given: Event to condition on. Values are null if ``|μ(given)| ≤ min_ratio``.
        min_ratio: Threshold on ``|μ(given)|``, as a fraction of the total relevance, which is 1.
    """

    layer: LayerSpec
    over: Any = "channel"
    joint: Event | None = None
    given: Event | None = None
    min_ratio: float = MIN_RATIO


@dataclass(frozen=True)
class Joint(Query):
    """``μ(upper group & lower group)`` for all pairs of groups in two layers.

    Args:
        upper: Tap nearer to the output.
        lower: Tap below ``upper``.
        over: As in :class:`Marginal`, or a pair with one value per layer.
    """

    upper: LayerSpec
    lower: LayerSpec
    over: Any = "channel"


@dataclass(frozen=True)
class EventMass(Query):
    """``μ(event)`` or ``μ(event | given)``, as one value per sample.

    Args:
        event: The event whose mass is computed.
        given: Event to condition on. The value is null if ``|μ(given)| ≤ min_ratio``.
        min_ratio: Threshold on ``|μ(given)|``, as a fraction of the total relevance, which is 1.
    """

    event: Event
    given: Event | None = None
    min_ratio: float = MIN_RATIO


@dataclass(frozen=True)
class Conditional(Query):
    """``μ(event | group)`` for each group of a layer: the fraction of the group's relevance that belongs to the event.

    Args:
        event: Event whose fraction of the relevance of each group is computed.
        layer: Name of a tap, or ``at(…)``.
        over: As in :class:`Marginal`.
        min_ratio: Values are null if ``|μ(group)|`` is at most this fraction of the absolute mass of its neurons.
    """

    event: Event
    layer: LayerSpec
    over: Any = "channel"
    min_ratio: float = MIN_RATIO


@dataclass(frozen=True)
class Sink(Query):
    """Mass absorbed above a layer, as one value per sample."""

    layer: LayerSpec


@dataclass(frozen=True)
class Bypass(Query):
    """Mass of the walks that bypass a layer, as one value per sample."""

    layer: LayerSpec


@dataclass(frozen=True)
class Variation(Query):
    """Sum of absolute relevance over a layer, its sink and its bypass (tap variation), as one value per sample."""

    layer: LayerSpec


@dataclass(frozen=True)
class Activation(Query):
    """Activation of each channel of a layer, reduced over positions.

    Args:
        layer: Name of a module, ``"input"`` or ``"output"``.
        reduce: ``"max"``, ``"mean"`` or ``"sum"`` over the positions of a channel.
    """

    layer: LayerSpec
    reduce: Reduce = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in ("max", "mean", "sum"):
            raise SweepError(f"reduce={self.reduce!r} is unknown; choose 'max', 'mean' or 'sum'.")


@dataclass(frozen=True)
class Peak(Query):
    """Position of the largest relevance or activation of each channel, as a flat (row-major) index.

    Args:
        layer: Name of a tap, or of a module for activations.
        of: ``"relevance"`` or ``"activation"``.
    """

    layer: LayerSpec
    of: Literal["relevance", "activation"] = "relevance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("relevance", "activation"):
            raise SweepError(f"of={self.of!r} is unknown; choose 'relevance' or 'activation'.")


@dataclass(frozen=True)
class Maps(Query):
    """``μ(neuron)`` for each neuron of a layer, as one tensor per sample, such as a heat map.

    Args:
        layer: Name of a tap.
        joint: As in :class:`Marginal`.
        given: As in :class:`Marginal`, but undefined maps contain NaN.
        over: None or ``"neuron"`` for all neurons, or one of the groupings of :class:`Marginal`, such as ``"position"``
            for the sum over channels.
        min_ratio: As in :class:`Marginal`.
    """

    layer: LayerSpec = "input"
    joint: Event | None = None
    given: Event | None = None
    over: Any = None
    min_ratio: float = MIN_RATIO


QUERIES: dict[str, type[Query]] = {
    kind.__name__: kind
    for kind in (Marginal, Joint, EventMass, Conditional, Sink, Bypass, Variation, Activation, Peak, Maps)
}


def from_json(data: Any) -> Query:
    """Restores a query from the output of :meth:`Query.to_json`.

    Raises:
        SweepError: If the data do not represent a query.
    """
    if not isinstance(data, Mapping) or data.get("kind") not in QUERIES:
        raise SweepError(f"this is not a query: {data!r}. Kinds are {', '.join(QUERIES)}.")
    try:
        return QUERIES[data["kind"]](**{key: _from_json(value) for key, value in data.items() if key != "kind"})
    except SweepError:
        raise
    except (TypeError, ValueError, KeyError, zlib.error, RecursionError) as error:
        raise SweepError(f"this is not a query: {data!r} ({error}).") from error


def check_queries(queries: Any) -> tuple[Query, ...]:
    """Validates the queries of a sweep and returns them as a tuple.

    Raises:
        SweepError: If there are no queries, an object is not a query, or a name is repeated or reserved.
    """
    checked = tuple(queries) if isinstance(queries, (list, tuple)) else (queries,)
    for query in checked:
        if not isinstance(query, Query):
            raise SweepError(f"expected queries such as Marginal('layer'), got {type(query).__name__}: {query!r}.")
    names = [query.name for query in checked]
    repeated = [name for name in names if names.count(name) > 1]
    if repeated:
        raise SweepError(f"two queries have the name {repeated[0]!r}. Give one of them another name: name='…'.")
    reserved = {"sample", "target", "prediction", "__metadata__"}.intersection(names)
    if reserved:
        raise SweepError(f"a query cannot have the name {min(reserved)!r}, which is the name of a column.")
    if not checked:
        raise SweepError("no query was given; pass queries such as Marginal('layer').")
    return checked


# -- internal -------------------------------------------------------------------------------------------------------


def _check_layer(query: Query, layer: Any) -> None:
    kind = type(query).__name__
    if isinstance(layer, Atom):
        event_to_json(layer)
        if layer.index is not None or layer.side == "sink" or layer.call == "any":
            raise SweepError(f"{kind} takes a layer, got the event {layer}. Use at(layer) without an index.")
    elif not isinstance(layer, str):
        raise SweepError(f"{kind} takes the name of a layer or at(…), got {type(layer).__name__}: {layer!r}.")


def _validated_over(query: Query, over: Any) -> Any:
    if isinstance(query, Joint) and isinstance(over, (tuple, list)) and len(over) == 2:
        return tuple(_validated_over(query, one) for one in over)
    if isinstance(over, Tensor):
        return Labels.of(over)
    allowed = (None, *KINDS) if isinstance(query, Maps) else KINDS
    if isinstance(over, Labels) and not isinstance(query, Maps):
        return over
    if isinstance(over, Labels) or over not in allowed:
        raise SweepError(f"{type(query).__name__}: over={over!r} is unknown; choose {', '.join(map(repr, allowed))}.")
    return over


def _text(value: Any) -> str:
    if isinstance(value, Atom) and value == at(value.layer):
        return str(value.layer)
    if isinstance(value, tuple):
        return "×".join(map(_text, value))
    if isinstance(value, Labels):
        return f"labels {zlib.crc32(value.data):08x}"
    return str(value)


def _to_json(value: Any) -> Any:
    if isinstance(value, Event):
        return event_to_json(value)
    if isinstance(value, Labels):
        return {"labels": base64.b64encode(zlib.compress(value.data, 9)).decode(), "shape": list(value.shape)}
    if isinstance(value, tuple):
        return [_to_json(part) for part in value]
    return value


def _unpacked(text: str) -> bytes:
    reader = zlib.decompressobj()
    data = reader.decompress(base64.b64decode(text), MAX_LABEL_BYTES)
    if not reader.eof:
        raise ValueError(f"its labels are truncated, or more than the limit of {MAX_LABEL_BYTES // 4}")
    return data


def _from_json(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_from_json(part) for part in value)
    if isinstance(value, Mapping) and "labels" in value:
        return Labels(tuple(value["shape"]), _unpacked(value["labels"]))
    return event_from_json(value) if isinstance(value, Mapping) else value


__all__ = [
    "Activation",
    "Bypass",
    "Conditional",
    "EventMass",
    "Joint",
    "Labels",
    "Maps",
    "Marginal",
    "Peak",
    "Query",
    "Sink",
    "Variation",
    "check_queries",
    "from_json",
]
