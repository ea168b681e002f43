"""Conversion of events to and from JSON, for files that store queries. Strings are never evaluated as code.

- ``{"at": "features.28", "index": [3, 7], "channel": true}``, with ``side``, ``call`` and ``item`` if given
- ``{"attention": "blocks.3.attn", "heads": 2, "queries": 5, "keys": 0}``, where all but the first are optional
- ``{"all": […]}``, ``{"any": […]}``, ``{"not": …}`` and ``{"absorbed": true}``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import EventError, brief
from .event import ABSORBED, SIDES, Absorbed, All, Any_, Atom, Attended, Event, Not, at


def event_to_json(event: Event) -> dict[str, Any]:
    """Converts an event to JSON. :func:`event_from_json` reconstructs an equal event.

    Args:
        event: The event. Its layers must be given by name.

    Raises:
        EventError: If a layer is given as a module. Its name cannot be determined without the model.

    Examples:
        >>> event_to_json(at("conv").channel([3, 7]) & ~at("fc"))
        {'all': [{'at': 'conv', 'index': [3, 7], 'channel': True}, {'not': {'at': 'fc'}}]}
    """
    if isinstance(event, All):
        return {"all": [event_to_json(part) for part in event.parts]}
    if isinstance(event, Any_):
        return {"any": [event_to_json(part) for part in event.parts]}
    if isinstance(event, Not):
        return {"not": event_to_json(event.part)}
    if isinstance(event, Absorbed):
        return {"absorbed": True}
    if isinstance(event, Attended):
        atom = event_to_json(event.atom)
        chosen = {"heads": event.heads, "queries": event.queries, "keys": event.keys}
        data: dict[str, Any] = {key: _index_to_json(index.value) for key, index in chosen.items() if index is not None}
        return {"attention": atom.pop("at"), **atom, **data}
    if not isinstance(event, Atom):
        raise EventError(f"expected an event such as at('layer')[3], got {type(event).__name__}: {brief(event)}.")
    if not isinstance(event.layer, str):
        raise EventError(
            f"{event} refers to its layer by a module, which cannot be written as JSON. Use its name: at('…')."
        )
    data = {"at": event.layer}
    data |= {} if event.side == "output" else {"side": event.side}
    data |= {} if event.call is None else {"call": event.call}
    data |= {} if event.item is None else {"item": event.item}
    data |= {} if event.index is None else {"index": _index_to_json(event.index.value)}
    return data | ({"channel": True} if event.along_channel else {})


def event_from_json(data: Any) -> Event:
    """Reconstructs an event from the output of :func:`event_to_json`.

    Args:
        data: The parsed JSON.

    Raises:
        EventError: If the data do not represent an event.

    Examples:
        >>> event_from_json({"any": [{"at": "conv", "index": 3}, {"absorbed": True}]})
        at('conv')[3] | ABSORBED
    """
    if isinstance(data, Mapping) and len(data) == 1:
        ((word, inner),) = data.items()
        if word == "absorbed":
            return ABSORBED
        if word == "not":
            return Not(event_from_json(inner))
        if word in ("all", "any") and isinstance(inner, list) and inner:
            return (All if word == "all" else Any_)(tuple(event_from_json(part) for part in inner))
    if isinstance(data, Mapping) and "attention" in data:
        return _attended_from_json(data)
    keys = {"at", "side", "call", "item", "index", "channel"}
    if not isinstance(data, Mapping) or "at" not in data or not data.keys() <= keys:
        raise EventError(
            f"this is not an event: {brief(data)}. Events are {{'at': layer, …}}, 'all', 'any', 'not', 'absorbed'."
        )
    if data.get("side", "output") not in SIDES:
        raise EventError(f"this is not an event: {brief(data)} has the unknown side {brief(data['side'])}.")
    atom = at(data["at"], data.get("side", "output"), data.get("call"), data.get("item"))
    if "index" not in data:
        return atom
    index = _index_from_json(data["index"])
    return atom.channel(index) if data.get("channel") else atom[index]


def _attended_from_json(data: Mapping[str, Any]) -> Attended:
    if not data.keys() <= {"attention", "call", "heads", "queries", "keys"} or (
        "keys" in data and "queries" not in data
    ):
        raise EventError(f"this is not an event: {brief(data)}. Attention takes heads, queries, and keys with queries.")
    event = Attended(at(data["attention"], call=data.get("call")))
    if "heads" in data:
        event = event.head(_index_from_json(data["heads"]))
    if "keys" in data:
        return event.pair(_index_from_json(data["queries"]), _index_from_json(data["keys"]))
    return event.token(_index_from_json(data["queries"])) if "queries" in data else event


def _index_to_json(value: Any) -> Any:
    if isinstance(value, tuple):
        return {"tuple": [_index_to_json(part) for part in value]}
    if isinstance(value, slice):
        return {"slice": [value.start, value.stop, value.step]}
    if value is Ellipsis:
        return "..."
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return {"mask": list(value.shape), "true": value.flatten().nonzero().flatten().tolist()}
    if isinstance(value, Tensor):
        if value.dtype == torch.int64:
            return value.tolist() if value.numel() or value.ndim == 1 else {"empty": list(value.shape)}
        return {"numbers": value.tolist(), "dtype": str(value.dtype).removeprefix("torch.")}
    return value


def _index_from_json(data: Any) -> Any:
    if data == "...":
        return ...
    if isinstance(data, list):
        return torch.tensor(data, dtype=torch.int64)
    if not isinstance(data, Mapping):
        return data
    if "tuple" in data:
        return tuple(_index_from_json(part) for part in data["tuple"])
    if "slice" in data:
        return slice(*data["slice"])
    if "mask" in data:
        mask = torch.zeros(data["mask"], dtype=torch.bool)
        mask.view(-1)[data["true"]] = True
        return mask
    if "empty" in data:
        return torch.empty(data["empty"], dtype=torch.int64)
    if "numbers" in data and data.get("dtype") in ("int8", "int16", "int32"):
        return torch.tensor(data["numbers"], dtype=getattr(torch, data["dtype"]))
    raise EventError(f"this is not an index of neurons: {brief(data)}.")


__all__ = ["event_from_json", "event_to_json"]
