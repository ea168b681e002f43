"""Events: sets of walks, written as a formula over the neurons that a walk crosses.

An event knows no model. Its atoms name taps, and a measure looks them up when the event is asked for.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from .errors import EventError

Side = Literal["input", "output", "sink"]
SIDES: tuple[Side, ...] = ("input", "output", "sink")


class Event:
    """A set of walks; ``&``, ``|``, ``~`` and ``-`` make new ones.

    Laws (checked by the tests): ``mu(a | b) + mu(a & b) == mu(a) + mu(b)``, ``mu(a) + mu(~a) == 1``,
    ``a - b == a & ~b``.
    """

    def __and__(self, other: object) -> Event:
        return _combine(All, self, other)

    def __or__(self, other: object) -> Event:
        return _combine(Any_, self, other)

    def __invert__(self) -> Event:
        return Not(self)

    def __sub__(self, other: object) -> Event:
        if not isinstance(other, Event):
            return NotImplemented
        return self & ~other

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "an event has no truth value: `a and b`, `a or b`, `not a` and `if a` would silently drop a part of it. "
            "Write `a & b`, `a | b`, `~a`."
        )

    def atoms(self) -> Iterator[Atom | Absorbed]:
        """The atoms of the formula, from left to right, with repetitions."""
        raise NotImplementedError


def _combine(kind: type[All] | type[Any_], left: Event, right: object) -> Event:
    if not isinstance(right, Event):
        return NotImplemented  # type: ignore[no-any-return]
    parts: list[Event] = []
    for part in (left, right):
        parts.extend(part.parts if isinstance(part, kind) else (part,))
    return kind(tuple(dict.fromkeys(parts)))


@dataclass(frozen=True)
class All(Event):
    """The walks that are in every part."""

    parts: tuple[Event, ...]

    def atoms(self) -> Iterator[Atom | Absorbed]:
        for part in self.parts:
            yield from part.atoms()

    def __str__(self) -> str:
        return " & ".join(_bracket(part) for part in self.parts)


@dataclass(frozen=True)
class Any_(Event):  # noqa: N801  (`Any` is taken by typing)
    """The walks that are in at least one part."""

    parts: tuple[Event, ...]

    def atoms(self) -> Iterator[Atom | Absorbed]:
        for part in self.parts:
            yield from part.atoms()

    def __str__(self) -> str:
        return " | ".join(_bracket(part) for part in self.parts)


@dataclass(frozen=True)
class Not(Event):
    """The walks that are not in the part: those that bypass it or were absorbed before count as well."""

    part: Event

    def __invert__(self) -> Event:
        return self.part

    def atoms(self) -> Iterator[Atom | Absorbed]:
        return self.part.atoms()

    def __str__(self) -> str:
        return f"~{_bracket(self.part)}"


@dataclass(frozen=True)
class Absorbed(Event):
    """The walks that end in the sink of any step, whether residual or constant."""

    def atoms(self) -> Iterator[Atom | Absorbed]:
        yield self

    def __str__(self) -> str:
        return "ABSORBED"


ABSORBED = Absorbed()


def _bracket(event: Event) -> str:
    return f"({event})" if isinstance(event, (All, Any_)) else str(event)


@dataclass(frozen=True)
class Index:
    """What stands in the brackets of ``at(layer)[…]``; equal when it selects by the same numbers."""

    key: Hashable
    value: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Index) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _key(value: Any) -> Hashable:
    if isinstance(value, Tensor):
        flat = value.detach().cpu()
        return ("tensor", str(flat.dtype), tuple(flat.shape), flat.contiguous().numpy().tobytes())
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, tuple(_key(item) for item in value))
    if hasattr(value, "tobytes") and hasattr(value, "shape"):
        return ("array", str(value.dtype), tuple(value.shape), value.tobytes())
    return value  # type: ignore[no-any-return]


def _name(layer: str | nn.Module) -> str:
    return repr(layer) if isinstance(layer, str) else f"<{type(layer).__name__}>"


@dataclass(frozen=True)
class Atom(Event):
    """The walk crosses one tap in one of the indexed neurons (in any neuron where nothing is indexed).

    Made by :func:`at`. ``side="output"`` is the tensor that the module returned, ``side="input"`` the tensor
    that it was handed (only walks that go through this call, not those that leave the same tensor to another
    reader), ``side="sink"`` the walks absorbed in this step at these neurons of its output.
    """

    layer: str | nn.Module
    side: Side = "output"
    call: int | Literal["any"] | None = None
    item: int | None = None
    index: Index | None = None
    along_channel: bool = False

    def __getitem__(self, index: Any) -> Atom:
        if self.index is not None:
            raise EventError(f"{self} is indexed already. Combine two atoms of one tap with & or | instead.")
        return Atom(self.layer, self.side, self.call, self.item, Index(_key(index), index))

    def channel(self, index: Any) -> Atom:
        """The neurons of one or several channels: dimension 1 of ``(N, C, …)``, the last one of token layouts."""
        atom = self[index]
        return Atom(atom.layer, atom.side, atom.call, atom.item, atom.index, along_channel=True)

    def atoms(self) -> Iterator[Atom | Absorbed]:
        yield self

    def __str__(self) -> str:
        extras = [] if self.side == "output" else [f"side={self.side!r}"]
        extras += [] if self.call is None else [f"call={self.call!r}"]
        extras += [] if self.item is None else [f"item={self.item}"]
        text = f"at({', '.join([_name(self.layer), *extras])})"
        if self.index is None:
            return text
        shown = _show(self.index.value)
        return f"{text}.channel({shown})" if self.along_channel else f"{text}[{shown}]"


def _show(value: Any) -> str:
    if isinstance(value, tuple):
        return ", ".join(_show(item) for item in value)
    if isinstance(value, slice):
        bounds = ["" if bound is None else str(bound) for bound in (value.start, value.stop)]
        return ":".join(bounds + ([str(value.step)] if value.step is not None else []))
    if value is Ellipsis:
        return "..."
    if isinstance(value, Tensor) and value.dtype == torch.bool:
        return f"mask of {int(value.sum())} in {tuple(value.shape)}"
    if isinstance(value, Tensor):
        return str(value.tolist())
    return repr(value)


def at(
    layer: str | nn.Module,
    side: Side = "output",
    call: int | Literal["any"] | None = None,
    item: int | None = None,
) -> Atom:
    """Neurons of one tap, to be indexed: ``at("features.28")[3]`` is the event that a walk crosses channel 3.

    Args:
        layer: Name as in ``model.named_modules()``, or ``"input"`` or ``"output"``, or the module itself.
        side: ``"output"``, ``"input"`` or ``"sink"``.
        call: Which call of a module that is called more than once; ``"any"`` for one of them.
        item: Which tensor of a tuple or list output.

    Returns:
        The event that a walk crosses the tap at all; index it with ints, slices, lists, tuples or a boolean mask
        over the dimensions after the batch (or over all, one mask for each sample).

    Raises:
        EventError: ``side`` or ``layer`` is none of these.
    """
    if side not in SIDES:
        raise EventError(f"side={side!r} is unknown; choose one of {', '.join(map(repr, SIDES))}.")
    if not isinstance(layer, (str, nn.Module)):
        raise EventError(f"a layer is a name or a module, got {type(layer).__name__}.")
    if not (call is None or call == "any" or (isinstance(call, int) and not isinstance(call, bool))):
        raise EventError(f"call={call!r}: give the number of the call, or 'any'.")
    return Atom(layer, side, call, item)
