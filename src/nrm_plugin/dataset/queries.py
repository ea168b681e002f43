"""What is asked of every sample: small frozen objects with a name, which are also JSON."""

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

Layer = str | Atom
Reduce = Literal["max", "mean", "sum"]
MIN_RATIO = 1e-3
MOST = 1 << 28
"""Bytes of labels that are read from a file; those of the widest layers of VGG16 take 13 million."""


@dataclass(frozen=True)
class Labels:
    """Integer labels of neurons, as an object that can be compared and written down.

    Attributes:
        shape: Of the labels.
        data: Their bytes, as int32.
    """

    shape: tuple[int, ...]
    data: bytes = field(repr=False)

    @classmethod
    def of(cls, labels: Tensor) -> Labels:
        """From a tensor of integers."""
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise SweepError(f"over= takes integer labels, got {labels.dtype}. Use labels.long().")
        return cls(tuple(labels.shape), labels.detach().cpu().int().numpy().tobytes())

    @property
    def tensor(self) -> Tensor:
        """The labels."""
        return torch.from_numpy(np.frombuffer(self.data, np.int32).copy()).long().reshape(self.shape)


Over = str | Labels


@dataclass(frozen=True)
class Query:
    """One question with numbers for each sample.

    Attributes:
        name: What its rows are called; made of what is asked where none is given.
    """

    name: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if item.name in ("layer", "upper", "lower"):
                _check_layer(self, value)
            if item.name in ("event", "given", "joint") and value is not None:
                event_to_json(value)  # refuses what could not be written down
            if item.name == "over":
                object.__setattr__(self, "over", _checked_over(self, value))
        if getattr(self, "given", None) is not None and getattr(self, "joint", None) is not None:
            raise SweepError(f"{type(self).__name__}: give given= or joint=, not both.")
        if not isinstance(self.name, str) or "\n" in self.name:
            raise SweepError(f"the name of a query is one line of text, got {self.name!r}.")
        if not self.name:
            object.__setattr__(self, "name", self._made_name())

    def _made_name(self) -> str:
        parts = []
        for item in fields(self):
            value = getattr(self, item.name)
            is_plain = item.name in ("layer", "upper", "lower", "event")
            if is_plain or (item.name != "name" and value != item.default):
                parts.append(_word(value) if is_plain else f"{item.name}={_word(value)}")
        return f"{type(self).__name__.lower()}({', '.join(parts)})"

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of its layers, the upper one first."""
        found = [getattr(self, item.name) for item in fields(self) if item.name in ("layer", "upper", "lower")]
        return tuple(_word(layer) for layer in found)

    def to_json(self) -> dict[str, Any]:
        """The query as JSON; :func:`from_json` gives an equal one back."""
        return {"kind": type(self).__name__} | {item.name: _to_json(getattr(self, item.name)) for item in fields(self)}

    def info(self, groups: Sequence[int] | None = None) -> QueryInfo:
        """What a manifest tells of it."""
        shape = None if groups is None else tuple(groups)
        return QueryInfo(self.name, type(self).__name__, self.layers, shape, self.to_json())


@dataclass(frozen=True)
class Marginal(Query):
    """``μ(group)``, ``μ(group and joint)``, or ``μ(group | given)`` for each group of a layer.

    Args:
        layer: Name of a tap, or ``at(…)``.
        over: ``"channel"``, ``"position"``, ``"neuron"``, or integer labels of all neurons.
        joint: An event that walks satisfy as well.
        given: An event whose mass divides. Where ``|μ(given)| ≤ min_ratio`` there is no value.
        min_ratio: Of all relevance, which is 1.
    """

    layer: Layer
    over: Any = "channel"
    joint: Event | None = None
    given: Event | None = None
    min_ratio: float = MIN_RATIO


@dataclass(frozen=True)
class Joint(Query):
    """``μ(group of the upper layer and group of the lower one)``.

    Args:
        upper: The tap that walks cross first.
        lower: A tap below it.
        over: As in :class:`Marginal`, or a pair for the two layers.
    """

    upper: Layer
    lower: Layer
    over: Any = "channel"


@dataclass(frozen=True)
class EventMass(Query):
    """``μ(event)``, or ``μ(event | given)``, one number.

    Args:
        event: The event.
        given: An event whose mass divides. Where ``|μ(given)| ≤ min_ratio`` there is no value.
        min_ratio: Of all relevance, which is 1.
    """

    event: Event
    given: Event | None = None
    min_ratio: float = MIN_RATIO


@dataclass(frozen=True)
class Conditional(Query):
    """``μ(event | group)`` for each group of a layer: which share of what crosses the group satisfies the event.

    Args:
        event: The event.
        layer: Name of a tap, or ``at(…)``.
        over: As in :class:`Marginal`.
        min_ratio: There is no value where ``|μ(group)|`` is at most this share of the absolute mass of its neurons.
    """

    event: Event
    layer: Layer
    over: Any = "channel"
    min_ratio: float = MIN_RATIO


@dataclass(frozen=True)
class Sink(Query):
    """Mass absorbed above a layer, one number."""

    layer: Layer


@dataclass(frozen=True)
class Bypass(Query):
    """Mass of the walks around a layer, one number."""

    layer: Layer


@dataclass(frozen=True)
class Variation(Query):
    """Tap variation of a layer, one number."""

    layer: Layer


@dataclass(frozen=True)
class Activation(Query):
    """What the model computes at a layer, reduced to one number for each channel; no relevance.

    Args:
        layer: Name of a module, ``"input"`` or ``"output"``.
        reduce: ``"max"``, ``"mean"`` or ``"sum"`` over the positions of a channel.
    """

    layer: Layer
    reduce: Reduce = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in ("max", "mean", "sum"):
            raise SweepError(f"reduce={self.reduce!r} is unknown; choose 'max', 'mean' or 'sum'.")


@dataclass(frozen=True)
class Peak(Query):
    """Where a channel has its largest relevance, or activation: the number of the position, row by row.

    Args:
        layer: Name of a tap; of a module for activation.
        of: ``"relevance"`` or ``"activation"``.
    """

    layer: Layer
    of: Literal["relevance", "activation"] = "relevance"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.of not in ("relevance", "activation"):
            raise SweepError(f"of={self.of!r} is unknown; choose 'relevance' or 'activation'.")


@dataclass(frozen=True)
class Maps(Query):
    """``μ(neuron)`` of a layer as a tensor for each sample, for heat maps; also joint with or given an event.

    Args:
        layer: Name of a tap.
        joint: As in :class:`Marginal`.
        given: As there; a map without values holds NaN.
        over: None for every neuron, ``"position"`` for the sum over channels.
        min_ratio: As in :class:`Marginal`.
    """

    layer: Layer = "input"
    joint: Event | None = None
    given: Event | None = None
    over: Any = None
    min_ratio: float = MIN_RATIO


QUERIES: dict[str, type[Query]] = {
    kind.__name__: kind
    for kind in (Marginal, Joint, EventMass, Conditional, Sink, Bypass, Variation, Activation, Peak, Maps)
}


def from_json(said: Any) -> Query:
    """The query that :meth:`Query.to_json` wrote down.

    Raises:
        SweepError: It is none.
    """
    if not isinstance(said, Mapping) or said.get("kind") not in QUERIES:
        raise SweepError(f"this is no query: {said!r}. Kinds are {', '.join(QUERIES)}.")
    try:
        return QUERIES[said["kind"]](**{key: _from_json(value) for key, value in said.items() if key != "kind"})
    except SweepError:
        raise
    except (TypeError, ValueError, KeyError, zlib.error, RecursionError) as error:
        raise SweepError(f"this is no query: {said!r} ({error}).") from error


def check_queries(queries: Any) -> tuple[Query, ...]:
    """The queries of a sweep.

    Raises:
        SweepError: None, something else, or two of one name.
    """
    found = tuple(queries) if isinstance(queries, (list, tuple)) else (queries,)
    for query in found:
        if not isinstance(query, Query):
            raise SweepError(f"expected queries such as Marginal('layer'), got {type(query).__name__}: {query!r}.")
    names = [query.name for query in found]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise SweepError(f"two queries are called {twice[0]!r}. Name one of them: name='…'.")
    taken = {"sample", "target", "prediction", "__metadata__"}.intersection(names)
    if taken:
        raise SweepError(f"a query cannot be called {min(taken)!r}, which is the name of a column.")
    if not found:
        raise SweepError("there is no query; ask for something such as Marginal('layer').")
    return found


# -- inside ---------------------------------------------------------------------------------------------------------


def _check_layer(query: Query, layer: Any) -> None:
    kind = type(query).__name__
    if isinstance(layer, Atom):
        event_to_json(layer)
        if layer.index is not None or layer.side == "sink" or layer.call == "any":
            raise SweepError(f"{kind} takes a layer, got the event {layer}. Use at(layer) without an index.")
    elif not isinstance(layer, str):
        raise SweepError(f"{kind} takes the name of a layer or at(…), got {type(layer).__name__}: {layer!r}.")


def _checked_over(query: Query, over: Any) -> Any:
    if isinstance(query, Joint) and isinstance(over, (tuple, list)) and len(over) == 2:
        return tuple(_checked_over(query, one) for one in over)
    if isinstance(over, Tensor):
        return Labels.of(over)
    allowed = (None, *KINDS) if isinstance(query, Maps) else KINDS
    if isinstance(over, Labels) and not isinstance(query, Maps):
        return over
    if isinstance(over, Labels) or over not in allowed:
        raise SweepError(f"{type(query).__name__}: over={over!r} is unknown; choose {', '.join(map(repr, allowed))}.")
    return over


def _word(value: Any) -> str:
    if isinstance(value, Atom) and value == at(value.layer):
        return str(value.layer)
    if isinstance(value, tuple):
        return "×".join(map(_word, value))
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
    data = reader.decompress(base64.b64decode(text), MOST)
    if not reader.eof:
        raise ValueError(f"its labels are cut off, or more than the {MOST // 4} that are read")
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
