"""Events as JSON and back, for files that tell what was asked. Nothing is evaluated.

- ``{"at": "features.28", "index": [3, 7], "channel": true}``, with ``side``, ``call`` and ``item`` where they are said
- ``{"attention": "blocks.3.attn", "heads": 2, "queries": 5, "keys": 0}``, of which any may be left out
- ``{"all": […]}``, ``{"any": […]}``, ``{"not": …}`` and ``{"absorbed": true}``
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import EventError
from .event import ABSORBED, SIDES, Absorbed, All, Any_, Atom, Attended, Event, Not, at


def event_to_json(event: Event) -> dict[str, Any]:
    """An event as JSON; :func:`event_from_json` gives an equal one back.

    Args:
        event: The event; its layers are named.

    Raises:
        EventError: A layer is a module, which has a name in its model only.

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
        said: dict[str, Any] = {key: _index_to_json(index.value) for key, index in chosen.items() if index is not None}
        return {"attention": atom.pop("at"), **atom, **said}
    if not isinstance(event, Atom):
        raise EventError(f"expected an event such as at('layer')[3], got {type(event).__name__}: {event!r}.")
    if not isinstance(event.layer, str):
        raise EventError(f"{event} names its layer by a module, which cannot be written down. Use its name: at('…').")
    said = {"at": event.layer}
    said |= {} if event.side == "output" else {"side": event.side}
    said |= {} if event.call is None else {"call": event.call}
    said |= {} if event.item is None else {"item": event.item}
    said |= {} if event.index is None else {"index": _index_to_json(event.index.value)}
    return said | ({"channel": True} if event.along_channel else {})


def event_from_json(said: Any) -> Event:
    """The event that :func:`event_to_json` wrote down.

    Args:
        said: What was read.

    Raises:
        EventError: It is no event.

    Examples:
        >>> event_from_json({"any": [{"at": "conv", "index": 3}, {"absorbed": True}]})
        at('conv')[3] | ABSORBED
    """
    if isinstance(said, Mapping) and len(said) == 1:
        ((word, inner),) = said.items()
        if word == "absorbed":
            return ABSORBED
        if word == "not":
            return Not(event_from_json(inner))
        if word in ("all", "any") and isinstance(inner, list) and inner:
            return (All if word == "all" else Any_)(tuple(event_from_json(part) for part in inner))
    if isinstance(said, Mapping) and "attention" in said:
        return _attended_from_json(said)
    keys = {"at", "side", "call", "item", "index", "channel"}
    if not isinstance(said, Mapping) or "at" not in said or not said.keys() <= keys:
        raise EventError(f"this is no event: {said!r}. Events are {{'at': layer, …}}, 'all', 'any', 'not', 'absorbed'.")
    if said.get("side", "output") not in SIDES:
        raise EventError(f"this is no event: {said!r}, there is no side {said['side']!r}.")
    atom = at(said["at"], said.get("side", "output"), said.get("call"), said.get("item"))
    if "index" not in said:
        return atom
    index = _index_from_json(said["index"])
    return atom.channel(index) if said.get("channel") else atom[index]


def _attended_from_json(said: Mapping[str, Any]) -> Attended:
    if not said.keys() <= {"attention", "call", "heads", "queries", "keys"} or (
        "keys" in said and "queries" not in said
    ):
        raise EventError(
            f"this is no event: {said!r}. The attention of a layer has heads, queries, and keys of queries."
        )
    event = Attended(at(said["attention"], call=said.get("call")))
    if "heads" in said:
        event = event.head(_index_from_json(said["heads"]))
    if "keys" in said:
        return event.pair(_index_from_json(said["queries"]), _index_from_json(said["keys"]))
    return event.token(_index_from_json(said["queries"])) if "queries" in said else event


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


def _index_from_json(said: Any) -> Any:
    if said == "...":
        return ...
    if isinstance(said, list):
        return torch.tensor(said, dtype=torch.int64)
    if not isinstance(said, Mapping):
        return said
    if "tuple" in said:
        return tuple(_index_from_json(part) for part in said["tuple"])
    if "slice" in said:
        return slice(*said["slice"])
    if "mask" in said:
        mask = torch.zeros(said["mask"], dtype=torch.bool)
        mask.view(-1)[said["true"]] = True
        return mask
    if "empty" in said:
        return torch.empty(said["empty"], dtype=torch.int64)
    if "numbers" in said and said.get("dtype") in ("int8", "int16", "int32"):
        return torch.tensor(said["numbers"], dtype=getattr(torch, said["dtype"]))
    raise EventError(f"this is no index of neurons: {said!r}.")


__all__ = ["event_from_json", "event_to_json"]
