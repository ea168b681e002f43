"""Events: sets of walks, defined by Boolean formulas over the neurons that a walk crosses.

Events do not depend on a model. Their atoms, such as ``at("conv1")[3]``, refer to recorded tensors by layer name. The
names are resolved when a measure evaluates the event.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NoReturn

from torch import Tensor, nn

from ..errors import EventError, brief
from .neuron_index import Index, checked_index, key_of, show, shown_in_call

Side = Literal["input", "output", "sink"]
SIDES: tuple[Side, ...] = ("input", "output", "sink")


class Event:
    """Set of walks. Events are combined with ``&``, ``|``, ``~`` and ``-``.

    For events ``a`` and ``b`` and a measure ``mu``, ``mu(a | b) + mu(a & b) == mu(a) + mu(b)`` and ``mu(a) + mu(~a) ==
    1``. The difference ``a - b`` is ``a & ~b``.

    Examples:
        >>> either = at("conv")[3] | at("conv")[5]
        >>> either & ~at("skip")
        (at('conv')[3] | at('conv')[5]) & ~at('skip')
    """

    def __and__(self, other: object) -> Event:
        return _combine(All, self, other, "&")

    def __or__(self, other: object) -> Event:
        return _combine(Any_, self, other, "|")

    def __invert__(self) -> Event:
        return Not(self)

    def __sub__(self, other: object) -> Event:
        return self & ~_checked_operand(self, other, "-")

    # Called only if the left operand is not an event; raises the same error.
    def __rand__(self, other: object) -> NoReturn:
        _reject_operand(self, other, "&")

    def __ror__(self, other: object) -> NoReturn:
        _reject_operand(self, other, "|")

    def __rsub__(self, other: object) -> NoReturn:
        _reject_operand(self, other, "-")

    def __iter__(self) -> NoReturn:
        # Without this, Python would iterate over an atom endlessly, since it accepts any index.
        raise TypeError(
            f"{self} is an event, a set of walks, and cannot be iterated over, unpacked or searched with `in`. For one "
            "event per channel write `[at(layer)[k] for k in channels]`."
        )

    def __bool__(self) -> NoReturn:
        raise TypeError(
            "an event has no truth value: `a and b`, `a or b`, `not a` and `if a` would silently ignore a part of "
            "it. Write `a & b`, `a | b`, `~a`."
        )

    def atoms(self) -> Iterator[Atom | Absorbed | Attended]:
        """Yields the atoms of the formula from left to right, including duplicates.

        Examples:
            >>> list((at("conv")[3] & ~at("fc")).atoms())
            [at('conv')[3], at('fc')]
        """
        raise NotImplementedError

    def mapped(self, replace: Callable[[Event], Event]) -> Event:
        """Returns the event in which every atom is replaced by ``replace(atom)``.

        Examples:
            >>> (at("conv")[3] & ~at("fc")).mapped(lambda atom: atom | at("skip"))
            (at('conv')[3] | at('skip')) & ~(at('fc') | at('skip'))
        """
        return replace(self)

    def __str__(self) -> str:
        raise NotImplementedError

    def __repr__(self) -> str:
        return str(self)


def _combine(kind: type[All] | type[Any_], left: Event, right: object, sign: str) -> Event:
    parts: list[Event] = []
    for part in (left, _checked_operand(left, right, sign)):
        parts.extend(part.parts if isinstance(part, kind) else (part,))
    return kind(tuple(dict.fromkeys(parts)))


def _checked_operand(event: Event, other: object, sign: str) -> Event:
    return other if isinstance(other, Event) else _reject_operand(event, other, sign)


def _reject_operand(event: Event, other: object, sign: str) -> NoReturn:
    raise TypeError(
        f"`{sign}` combines two events, got {event} and {type(other).__name__}. Name the layer of the other operand: "
        "`at(layer)` for a layer, `at(layer)[mask]` for a mask or index."
    )


@dataclass(frozen=True, repr=False)
class All(Event):
    """Intersection of events (``&``)."""

    parts: tuple[Event, ...]

    def atoms(self) -> Iterator[Atom | Absorbed | Attended]:
        for part in self.parts:
            yield from part.atoms()

    def mapped(self, replace: Callable[[Event], Event]) -> Event:
        return All(tuple(part.mapped(replace) for part in self.parts))

    def __str__(self) -> str:
        return " & ".join(_bracket(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Any_(Event):  # noqa: N801  (`Any` is taken by typing)
    """Union of events (``|``)."""

    parts: tuple[Event, ...]

    def atoms(self) -> Iterator[Atom | Absorbed | Attended]:
        for part in self.parts:
            yield from part.atoms()

    def mapped(self, replace: Callable[[Event], Event]) -> Event:
        return Any_(tuple(part.mapped(replace) for part in self.parts))

    def __str__(self) -> str:
        return " | ".join(_bracket(part) for part in self.parts)


@dataclass(frozen=True, repr=False)
class Not(Event):
    """Complement of an event (``~``), including walks that bypass the taps of the event or are absorbed above them."""

    part: Event

    def __invert__(self) -> Event:
        return self.part

    def atoms(self) -> Iterator[Atom | Absorbed | Attended]:
        return self.part.atoms()

    def mapped(self, replace: Callable[[Event], Event]) -> Event:
        return Not(self.part.mapped(replace))

    def __str__(self) -> str:
        return f"~{_bracket(self.part)}"


@dataclass(frozen=True, repr=False)
class Absorbed(Event):
    """Walks that are absorbed in any step, in the residual of its rule or in constants."""

    def atoms(self) -> Iterator[Atom | Absorbed | Attended]:
        yield self

    def __str__(self) -> str:
        return "ABSORBED"


ABSORBED = Absorbed()


def _bracket(event: Event) -> str:
    return f"({event})" if isinstance(event, (All, Any_)) else str(event)


def _name(layer: str | nn.Module) -> str:
    return repr(layer) if isinstance(layer, str) else f"<{type(layer).__name__}>"


@dataclass(frozen=True, repr=False)
class Atom(Event):
    """Walks that cross a tap (hook point) at one of the indexed neurons, or at any neuron if no index is given.

    Atoms are created by :func:`at`. With ``side="output"``, the tap is the tensor returned by the module. With
    ``side="input"``, it is the input of the module, and only walks that enter this module are selected, not walks
    through other consumers of the same tensor. ``side="sink"`` selects the walks that are absorbed by the module at the
    indexed output neurons.
    """

    layer: str | nn.Module
    side: Side = "output"
    call: int | Literal["any"] | None = None
    item: int | str | None = None
    index: Index | None = None
    along_channel: bool = False

    def __getitem__(self, index: Any) -> Atom:
        if self.index is not None:
            raise EventError(f"{self} is already indexed. Combine two atoms of the same tap with & or | instead.")
        value = checked_index(self, index)
        return Atom(self.layer, self.side, self.call, self.item, Index(key_of(value), value))

    def channel(self, index: Any) -> Atom:
        """Selects channels, along dimension 1 for shape ``(N, C, …)`` or the last dimension for token sequences."""
        atom = self[index]
        return Atom(atom.layer, atom.side, atom.call, atom.item, atom.index, along_channel=True)

    def head(self, index: Any) -> Attended:
        """Returns the event that a walk passes through any of the given attention heads of this layer."""
        return Attended(self).head(index)

    def token(self, index: Any) -> Attended:
        """Returns the event that a walk crosses the attention output of this layer at any of the given tokens."""
        return Attended(self).token(index)

    def pair(self, query: Any, key: Any) -> Attended:
        """Returns the event that a walk passes through the attention from a query token to a key token."""
        return Attended(self).pair(query, key)

    def atoms(self) -> Iterator[Atom | Absorbed | Attended]:
        yield self

    def __str__(self) -> str:
        extras = [] if self.side == "output" else [f"side={brief(self.side)}"]
        extras += [] if self.call is None else [f"call={brief(self.call)}"]
        extras += [] if self.item is None else [f"item={self.item!r}"]
        text = f"at({', '.join([_name(self.layer), *extras])})"
        if self.index is None:
            return text
        shown = show(self.index.value)
        return f"{text}.channel({shown})" if self.along_channel else f"{text}[{shown}]"


@dataclass(frozen=True, repr=False)
class Attended(Event):
    """Walks that pass through the attention of a layer, restricted to given heads, query tokens and key tokens.

    These events are created by ``at(layer).head(…)``, ``.token(…)`` and ``.pair(…)``, which can be chained. The layer
    is a module that computes attention exactly once, by a fused function or by matrix products and a softmax, or the
    tap of this operation. For heads, queries and keys, None stands for all of them.
    """

    atom: Atom
    heads: Index | None = None
    queries: Index | None = None
    keys: Index | None = None

    def __post_init__(self) -> None:
        if self.atom.side != "output" or self.atom.item is not None or self.atom.index is not None:
            raise EventError(
                f"{self.atom} refers to neurons of one tap. Heads, tokens and pairs belong to the attention of a "
                f"layer: at({_name(self.atom.layer)}).head(…)."
            )

    def head(self, index: Any) -> Attended:
        """Restricts the event to attention heads, given as an int, slice, list or boolean mask."""
        return replace(self, heads=self._chosen("head", self.heads, index))

    def token(self, index: Any) -> Attended:
        """Restricts the event to the given query tokens."""
        return replace(self, queries=self._chosen("token", self.queries, index))

    def pair(self, query: Any, key: Any) -> Attended:
        """Restricts the event to attention from the given query tokens to the given key tokens."""
        return replace(self.token(query), keys=self._chosen("pair", self.keys, key))

    def _chosen(self, what: str, known: Index | None, value: Any) -> Index:
        if known is not None:
            raise EventError(f"{self} is already restricted. Combine two events of the same layer with & or | instead.")
        checked = checked_index(self.atom, value)
        if isinstance(checked, tuple) or checked is Ellipsis or (isinstance(checked, Tensor) and checked.ndim > 1):
            raise EventError(f"{self}.{what}({show(checked)}): give an int, a slice, a list or one mask.")
        return Index(key_of(checked), checked)

    def atoms(self) -> Iterator[Atom | Absorbed | Attended]:
        yield self

    def __str__(self) -> str:
        text = str(self.atom)
        if self.heads is not None:
            text += f".head({shown_in_call(self.heads.value)})"
        if self.keys is not None and self.queries is not None:
            return f"{text}.pair({shown_in_call(self.queries.value)}, {shown_in_call(self.keys.value)})"
        return text if self.queries is None else f"{text}.token({shown_in_call(self.queries.value)})"


def at(
    layer: str | nn.Module,
    side: Side = "output",
    call: int | Literal["any"] | None = None,
    item: int | str | None = None,
) -> Atom:
    """Returns the event that a walk crosses a tap: ``at("features.28")[3]`` selects channel 3 of this layer.

    Args:
        layer: A module, or its name as in ``model.named_modules()``. ``"input"`` and ``"output"`` refer to the input
            and the output of the model; child modules with these names are ``".input"`` and ``".output"``.
        side: ``"output"``, ``"input"`` or ``"sink"``.
        call: Index of the call if the module is called several times, or ``"any"`` for the walks that cross at least
            one of the calls.
        item: Index, key or field of a tensor if the layer returns a tuple, mapping or dataclass. If these are nested,
            join the parts with dots, as in ``"features.0"``.

    Returns:
        The event that a walk crosses the tap in any neuron. Index it to select neurons, by ints, slices, lists, tuples,
        or a boolean mask over the dimensions after the batch dimension (or over all dimensions, for one mask per
        sample).

    Raises:
        EventError: If an argument is invalid.

    Examples:
        >>> at("features.28")[3]
        at('features.28')[3]
        >>> at("layer1", side="input").channel([0, 2])
        at('layer1', side='input').channel([0, 2])
        >>> at("blocks.3.attn").head(2).pair(query=5, key=0)
        at('blocks.3.attn').head(2).pair(5, 0)
    """
    if side not in SIDES:
        raise EventError(f"side={brief(side)} is unknown; choose one of {', '.join(map(repr, SIDES))}.")
    if not isinstance(layer, (str, nn.Module)):
        hint = f" Quote the name of a part of an nn.Sequential: {str(layer)!r}." if isinstance(layer, int) else ""
        raise EventError(
            f"a layer is a name such as 'features.28' or a module, got {type(layer).__name__}: {brief(layer)}.{hint}"
        )
    if not (call is None or call == "any" or (isinstance(call, int) and not isinstance(call, bool))):
        raise EventError(f"call={brief(call)} is unknown; give the index of the call, from 0, or 'any'.")
    if not (item is None or (isinstance(item, (int, str)) and not isinstance(item, bool))):
        raise EventError(f"item={brief(item)} is unknown; give the index or key of one of the tensors of a layer.")
    return Atom(layer, side, call, item)
