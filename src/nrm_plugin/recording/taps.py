"""Taps (hook points): tensors of a recording at which relevance can be read, looked up by layer name."""

from __future__ import annotations

import bisect
import functools
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..errors import HookedContainerError, UnknownLayerError, brief, unknown_layer
from .graph import Graph, Marks, Vertex
from .module_names import first_name, name_of
from .places import Buffer, Edge, Place
from .sample_layout import Layout
from .sample_positions import Samples
from .transformer_sites import SYNONYMS, sites

Item = int | str
"""Index or key of a tensor in a tuple, list, mapping or dataclass."""


class Nested(str):
    """Key of a tensor in a nested container returned by a module, such as ``"features.0"`` or ``"1.0"``."""

    __slots__ = ()


class Label(NamedTuple):
    """Label of a tensor: layer name, side of the layer, call index, and item if the layer has several tensors there."""

    name: str
    side: str
    call: int
    item: Item | None


@dataclass(frozen=True)
class Observed:
    """Tensor of the forward pass with a layer name, identified by its autograd node and output number."""

    label: Label
    node: Any
    number: int
    shape: torch.Size
    channel_dim: int | None


@dataclass
class Tap:
    """Tap (hook point): one recorded tensor, or its use by one of its consumers, at which relevance can be read.

    Attributes:
        place: Where in the graph the tensor is.
        tensor_shape: Shape of the tensor in the model.
        samples: The position of the samples in each recorded tensor.
        names: All names of the tap.
        tensor_channel_dim: Channel dimension of the tensor in the model.
    """

    place: Place
    tensor_shape: torch.Size
    samples: Samples
    names: list[str] = field(default_factory=list)
    tensor_channel_dim: int = 1

    @property
    def layout(self) -> Layout:
        """Layout that converts the tensor to the form ``(N, …)``."""
        return self.samples.layout(self.place)

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor in the form ``(N, …)``, whichever of its dimensions indexes the samples."""
        return self.layout.shape(self.tensor_shape)

    @property
    def channel_dim(self) -> int:
        """Channel dimension in the form ``(N, …)``."""
        return self.layout.channel_dim(self.tensor_channel_dim, len(self.tensor_shape))

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by which taps are ordered as walks cross them."""
        return self.place.order


class Taps:
    """Taps (named tensors) of a recording, in the order in which walks from the output to the inputs cross them.

    Args:
        graph: Graph of the recording.
        observed: The labeled tensors, in execution order.
        modules: Name of each module.
        containers: Names of modules with children and a rule of their own. They contain no taps.
        samples: The position of the samples in each recorded tensor.

    Attributes:
        all: All taps, in walk order.
        index: Index of each tap in ``all``, keyed by its place.
        fused: Names of layers whose output is fused with a contrast.
    """

    def __init__(
        self,
        graph: Graph,
        observed: Sequence[Observed],
        modules: Mapping[nn.Module, str],
        containers: Sequence[str],
        samples: Samples,
    ) -> None:
        self.graph, self.modules, self._containers, self._samples = graph, modules, containers, samples
        self.fused: set[str] = set()
        self._labelled: dict[Label, Tap] = {}
        self.all = self._collected(observed)
        for label, tap in self._labelled.items() if not samples.is_plain else ():
            samples.labels.setdefault(samples.buffer(tap.place), []).append(label)
        self._items_of: dict[tuple[str, str], dict[int, list[Item | None]]] = {}
        for label in self._labelled:
            self._items_of.setdefault((label.name, label.side), {}).setdefault(label.call, []).append(label.item)
        self._calls = {key: sorted(items) for key, items in self._items_of.items()}
        self._names = {label.name for label in self._labelled}
        self.index: dict[Place, int] = {tap.place: number for number, tap in enumerate(self.all)}
        _infer_channels(self.all, 1 if samples.batched else -1)

    @functools.cached_property
    def marks(self) -> Marks:
        """Bit sets of the taps below each vertex and edge, in which bit ``k`` represents tap ``k``."""
        return self.graph.marks_below({place: 1 << number for place, number in self.index.items()})

    @functools.cached_property
    def sites(self) -> dict[str, Tap]:
        """Tap of each transformer site, keyed by site name, in the order of the forward pass."""
        return {name: self.at(place) for name, place in sites(self.graph).items() if place in self.index}

    @functools.cached_property
    def _labels(self) -> dict[int, Label]:
        """One label of each tap, keyed by the id of the tap."""
        return {id(tap): label for label, tap in reversed(self._labelled.items())}

    def site(self, layer: Any, side: str = "output") -> Label | None:
        """Returns a label of the tap of a transformer site, or None if no site has this name or a layer has it too.

        Hook names of TransformerLens, such as ``blocks.1.attn.hook_v``, are also accepted.
        """
        if not isinstance(layer, str) or side != "output" or "blocks." not in layer:
            return None
        if self.calls_of(layer.partition(":")[0].partition("[")[0]):
            return None
        name = layer.replace("hook_", "")
        for spelling, known in SYNONYMS.items():
            name = re.sub(spelling, known, name)
        tap = self.sites.get(name)
        return None if tap is None else self._labels[id(tap)]

    @functools.cached_property
    def _outputs(self) -> dict[tuple[int, str], list[Label]]:
        """Labels of each tap as an output of a layer, in the order of calls, keyed by tap id and layer name."""
        labelled: dict[tuple[int, str], list[Label]] = {}
        for label in sorted((one for one in self._labelled if one.side == "output"), key=lambda one: one.call):
            labelled.setdefault((id(self._labelled[label]), label.name), []).append(label)
        return labelled

    @functools.cached_property
    def _sinks(self) -> dict[tuple[str, int], int]:
        """Vertex of each step, keyed by name and call index."""
        steps = enumerate(vertex.step for vertex in self.graph.vertices)
        return {(step.name, step.call): number for number, step in steps if step is not None}

    def __iter__(self) -> Iterator[Tap]:
        return iter(self.all)

    def __len__(self) -> int:
        return len(self.all)

    def at(self, place: Place) -> Tap:
        """Returns the tap at a place."""
        return self.all[self.index[place]]

    # -- collecting -------------------------------------------------------------------------------------------

    def _collected(self, observed: Sequence[Observed]) -> list[Tap]:
        taps: dict[Place, Tap] = {}
        position = self.graph.position
        for seen in observed:
            if seen.node in position:
                place = Buffer(position[seen.node], seen.number)
                self._add(taps, place, seen.shape, seen.label, seen.channel_dim)
        for index, vertex in enumerate(self.graph.vertices):
            step = vertex.step
            for number, buffer in enumerate(vertex.edges if step is not None else ()):
                if step is not None and buffer is not None:
                    label = Label(step.name, "input", step.call, None if len(vertex.edges) == 1 else number)
                    self._add(taps, Edge(index, number), self.graph.shape(buffer), label, None)
        return sorted(taps.values(), key=lambda tap: tap.order)

    def _add(
        self, taps: dict[Place, Tap], place: Place, shape: torch.Size, label: Label, channel_dim: int | None
    ) -> None:
        tap = taps.setdefault(place, Tap(place, shape, self._samples, tensor_channel_dim=0))
        if label.side == "output" and label.name not in tap.names:
            tap.names.append(label.name)
        if channel_dim is not None:
            tap.tensor_channel_dim = channel_dim
        self._labelled.setdefault(label, tap)

    def output_names(self) -> set[str]:
        """Returns the names of all layers whose outputs are taps."""
        return {label.name for label in self._labelled if label.side == "output"}

    def tensor_shapes(self) -> dict[Hashable, torch.Size]:
        """Returns the shape that each labeled tensor has in the model."""
        return {label: tap.tensor_shape for label, tap in self._labelled.items()}

    # -- names ------------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Names of the output taps, in execution order."""
        return [name for tap in reversed(self.all) for name in self._names_of(tap)]

    @property
    def ends(self) -> list[str]:
        """Names of the output taps at which walks end, one per tap, in execution order."""
        names = [next(self._names_of(tap), "") for tap in self.end_taps]
        return list(filter(None, names))

    @property
    def end_taps(self) -> list[Tap]:
        """The output taps at which walks end, in execution order."""
        vertices = self.graph.vertices
        ends = [
            tap for tap in reversed(self.all) if any(_is_leaf(vertices, e) for e in vertices[tap.place.vertex].edges)
        ]
        return [tap for tap in ends if isinstance(tap.place, Buffer)]

    def _names_of(self, tap: Tap) -> Iterator[str]:
        for name in dict.fromkeys(tap.names):
            if any(name.startswith(f"{other.removeprefix('.')}.") for other in tap.names):
                continue  # a function inside a layer that returns the same tensor is a redundant alias
            for label in self._outputs.get((id(tap), name), ()):
                items = self._items(name, "output", label.call)
                bracket = "" if _outer(items) == [label.item] else f"[{_shown(label.item, items)}]"
                yield name + (f":{label.call}" if len(self.calls_of(name)) > 1 else "") + bracket

    def name_of(self, layer: str | nn.Module) -> str:
        """Returns the name of a layer given by name or as a module, which may be registered under several names."""
        name = name_of(layer, self.modules)
        return name if name in self._names else first_name(name, self.modules)

    def name_at(self, vertex: int) -> str:
        """Returns a name for a vertex, which is the name of its step, of its tap, or of the nearest tap above it."""
        step = self.graph.vertices[vertex].step
        if step is not None:
            several = sum(name == step.name for name, _ in self._sinks) > 1
            return f"{step.name}:{step.call}" if several else step.name
        above = reversed([tap for tap in self.all if tap.place.vertex <= vertex])
        return next((tap.names[0] for tap in above if tap.names), "constants")

    def calls_of(self, name: str, side: str = "output") -> list[int]:
        """Returns the indices of those calls of a layer that have taps."""
        return self._calls.get((name, side), [])

    def _items(self, name: str, side: str, call: int) -> list[Item | None]:
        return list(self._items_of.get((name, side), {}).get(call, ()))

    # -- looking up -------------------------------------------------------------------------------------------

    def find(
        self, layer: str | nn.Module, side: str = "output", call: Any = None, item: Item | None = None
    ) -> list[Tap]:
        """Returns the taps with the given layer name, side, call and item, of which ``call="any"`` may select several.

        Raises:
            UnknownLayerError: If no tap matches; the message lists similar names.
        """
        layer, side = self._of_model(layer, side)
        site = self.site(layer, side)
        if site is not None:
            return [self._labelled[site]]
        if isinstance(layer, str):
            layer, own = self._split_item(layer, side)
            item = own if item is None else item
        name, calls = self.called(layer, side, call)
        return [self._item(name, side, number, item) for number in calls]

    def items(self, layer: str | nn.Module, side: str, call: Any = None) -> list[Item | None]:
        """Returns the items of the inputs or outputs of a layer, without nested ones, or ``[None]`` for one tensor."""
        layer, side = self._of_model(layer, side)
        if self.site(layer, side) is not None:
            return [None]
        if isinstance(layer, str):
            layer, item = self._split_item(layer, side)
            if item is not None:
                return [item]
        name, calls = self.called(layer, side, call)
        return _outer(self._items(name, side, calls[0]))

    def _of_model(self, layer: str | nn.Module, side: str) -> tuple[str | nn.Module, str]:
        """Replaces the input of the model itself with the tap ``"input"``."""
        is_model = isinstance(layer, nn.Module) and side == "input" and self.name_of(layer) == "output"
        return ("input", "output") if is_model else (layer, side)

    def _split_item(self, name: str, side: str) -> tuple[str, Item | None]:
        """Splits a name such as ``"lstm[0]"`` into layer and item, both of which may contain brackets."""
        if not name.endswith("]") or self.calls_of(name, side):
            return name, None
        for place in (place for place, sign in enumerate(name) if sign == "["):
            stem, text = name[:place], name[place + 1 : -1]
            layer, call = self._split_call(stem, side)
            for number in self.calls_of(layer, side) if call is None else [call]:
                items = self._items(layer, side, number)
                for item in items:
                    if item is not None and _shown(item, items) == text:
                        return stem, item
        stem, _, text = name[:-1].rpartition("[")
        return (stem, int(text) if text.isdigit() else text) if stem else (name, None)

    def _split_call(self, name: str, side: str) -> tuple[str, int | None]:
        """Splits a name such as ``"relu:1"`` into layer name and call index."""
        layer, colon, number = name.rpartition(":")
        return (layer, int(number)) if colon and number.isdecimal() and not self.calls_of(name, side) else (name, None)

    def called(self, layer: str | nn.Module, side: str, call: Any) -> tuple[str, list[int]]:
        """Returns the name of a layer and the indices of the calls selected by ``call``."""
        site = self.site(layer, side)
        if site is not None:
            return site.name, [site.call]
        name = self.name_of(layer)
        if call is None:
            name, call = self._split_call(name, side)
        calls = self.calls_of(name, side)
        if not calls:
            raise self._missing(name, side)
        if call is None and len(calls) > 1:
            raise UnknownLayerError(
                f"{name!r} was called {len(calls)} times, so it has {len(calls)} taps. Choose one: at({name!r}, "
                "call=0), or call='any' for the walks through any of them."
            )
        return name, _selected(name, calls, call)

    def find_sinks(self, layer: str | nn.Module, call: Any = None) -> list[int]:
        """Returns the vertices whose sinks are selected by ``at(layer, side="sink")``.

        Raises:
            UnknownLayerError: If the layer is not a step and therefore absorbs no relevance.
        """
        name = self.name_of(layer)
        calls = sorted(number for known, number in self._sinks if known == name)
        if not calls:
            steps = dict.fromkeys(known for known, _ in self._sinks)
            if self.calls_of(name):
                raise UnknownLayerError(
                    f"{name!r} only routes relevance, so it has no sink. The steps are {', '.join(map(repr, steps))}."
                )
            raise self._missing(name, "output")
        if call is None and len(calls) > 1:
            raise UnknownLayerError(f"{name!r} was called {len(calls)} times: use call=0, …, or call='any'.")
        return [self._sinks[name, number] for number in _selected(name, calls, call)]

    def _item(self, name: str, side: str, call: int, item: Item | None) -> Tap:
        items = self._items(name, side, call)
        if item not in items:
            if item is None and len(_outer(items)) == 1:
                (item,) = _outer(items)
            elif item == 0 and items == [None]:
                item = None
            elif items == [None]:
                raise UnknownLayerError(
                    f"the {side} of {name!r} is a single tensor, so omit item=; got item={brief(item)}."
                )
            else:
                raise UnknownLayerError(
                    f"the {side} of {name!r} has {len(items)} tensors: choose one by item=, from "
                    f"{', '.join(map(repr, items))}; got {brief(item)}."
                )
        return self._labelled[Label(name, side, call, item)]

    def _missing(self, name: str, side: str) -> UnknownLayerError:
        for container in self._containers:
            if container == "" or name.startswith(f"{container}."):
                return HookedContainerError(
                    f"{name!r} lies inside {container or 'the model'!r}, to which the composite assigns a rule, so "
                    "it is a single step without taps inside. Use its input or output, or map rules to the modules "
                    "inside it."
                )
        if name in self.fused and side == "output":
            raise UnknownLayerError(
                f"the output of {name!r} is fused with the contrast of against=, whose value is the tap 'output'. Use "
                f"'output', or the input of the layer, at({name!r}, side='input')."
            )
        if name == "input" and self.ends:
            ends = " or ".join(map(repr, self.ends))
            return UnknownLayerError(
                "no tap named 'input' in this measure: the model uses its inputs only as ids (integers), which receive "
                f"no relevance. Walks end at the rows that they look up. Use {ends} instead of 'input'."
            )
        known = [label.name for label in self._labelled if label.side == side]
        return UnknownLayerError(unknown_layer(name, dict.fromkeys([*self.layers, *known])))


def _is_leaf(vertices: Sequence[Vertex], buffer: Buffer | None) -> bool:
    return buffer is not None and vertices[buffer.vertex].leaf is not None


def _selected(name: str, calls: list[int], call: Any) -> list[int]:
    selected = calls if call == "any" else [calls[0] if call is None else call]
    if not set(selected) <= set(calls):
        raise UnknownLayerError(f"{name!r} has no call {call}; its calls are {calls}.")
    return selected


def _outer(items: Sequence[Item | None]) -> list[Item | None]:
    """Returns the items to which a layer name refers: those that are not nested or, if all are nested, all items."""
    return [item for item in items if not isinstance(item, Nested)] or list(items)


def _shown(item: Item | None, items: Sequence[Item | None]) -> str:
    """Formats an item for a tap name, quoting keys that could be mistaken for a position."""
    return repr(item) if sum(str(other) == str(item) for other in items) > 1 else str(item)


def _infer_channels(taps: Sequence[Tap], default: int) -> None:
    """Infers unknown channel dimensions from the nearest tap of the same shape or, if there is none, same rank."""
    known: dict[object, list[int]] = {}
    for number, tap in enumerate(taps):
        if tap.tensor_channel_dim:
            for key in (tuple(tap.tensor_shape), len(tap.tensor_shape)):
                known.setdefault(key, []).append(number)
    inferred = {}
    for number, tap in enumerate(taps):
        if not tap.tensor_channel_dim:
            same = known.get(tuple(tap.tensor_shape), known.get(len(tap.tensor_shape), []))
            at = bisect.bisect(same, number)
            near = [(abs(other - number), taps[other].tensor_channel_dim) for other in same[max(0, at - 1) : at + 1]]
            inferred[number] = min(near, default=(0, default))[1] % max(len(tap.tensor_shape), 2)
    for number, dim in inferred.items():
        taps[number].tensor_channel_dim = dim


__all__ = ["Item", "Label", "Nested", "Observed", "Tap", "Taps"]
