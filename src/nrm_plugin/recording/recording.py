"""Runs a model once under a composite and keeps its taps, steps and their graph. The one place that runs a model."""

from __future__ import annotations

import bisect
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..errors import (
    EventError,
    FoldingError,
    HookedContainerError,
    InputError,
    UncoveredLayerError,
    UnknownLayerError,
    UnsupportedOperationError,
    unknown_layer,
)
from ..events.event import Atom
from ..kernels.forward_state import forward_pass, not_recorded, without_torch_function
from ..kernels.hook import StepHook
from ..kernels.step import Step
from ..model.autocast import asked_for, exact, layers_in
from ..model.checks import check_model, check_module
from ..model.copies import Fingerprint, preserved
from ..model.inputs import NOT_JOINED, Call, Output, explained_output
from ..model.routing import is_route_node, operation, written
from .graph import Buffer, Graph, Place
from .sample_labels import Folding

_RECORDING = threading.RLock()

INPUT, OUTPUT = "input", "output"
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

Item = int | str
"""Which tensor of several: its position in a tuple, or its key."""


@dataclass
class Tap:
    """One tensor of the computation.

    Attributes:
        place: Where it is in the graph.
        shape: ``(N, …)``; ``(1, …)`` before the shape of the tensor where the inputs have no samples.
        names: All its names.
        channel_dim: The dimension of the channels.
    """

    place: Place
    shape: torch.Size
    names: list[str] = field(default_factory=list)
    channel_dim: int = 1

    @property
    def order(self) -> tuple[int, int]:
        """Sorts taps as a walk meets them."""
        return (self.place.vertex, 0) if isinstance(self.place, Buffer) else (self.place[0], 1)


@dataclass(frozen=True)
class _Seen:
    """A tensor that passed a module, by its place in the autograd graph."""

    name: str
    call: int
    side: str
    item: Item | None
    node: Any
    number: int
    shape: torch.Size
    channel_dim: int | None


class Recording:
    """One forward pass of a model under a composite.

    Args:
        model: Any module.
        call: How to call it.
        composite: Rules and normalization.
        output: Which of its outputs the measure starts at, where there is a choice; or a tap inside the model.

    Raises:
        InputError: The output is none that a measure can start at.
        ModelStateError: Training mode, or hooks of another composite.
        GradModeError: Gradients are off.
        UncoveredLayerError: A layer without a rule.
        UnsupportedOperationError: An operation without a kernel.
    """

    def __init__(
        self,
        model: nn.Module,
        call: Call,
        composite: Normalized,
        output: Output | Atom | None = None,
    ) -> None:
        check_module(model)
        tensors = call.tensors
        self.batch, self.batched = call.batch, call.batched
        self._indices = list(call.indices.values())
        self.names: Mapping[nn.Module, str] = {module: name for name, module in model.named_modules()}
        self._containers: list[str] = []
        self._seen: list[_Seen] = []
        self._calls: dict[nn.Module, int] = {}
        self._wanted = output if isinstance(output, Atom) else None
        self._started: Tensor | None = None
        with ExitStack() as around:
            around.enter_context(_RECORDING)  # another thread may be recording this model: its hooks are on it then
            call.check_looked_up(any(isinstance(module, EMBEDDINGS) for module in model.modules()))
            check_model(model, tensors)
            device = (*tensors, *self._indices)[0].device
            precision = layers_in(asked_for(device)), exact(device)
            for block in (preserved(model), forward_pass(self), torch.enable_grad(), *precision):
                around.enter_context(block)
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.requires_grad_(False)
            self.leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            started = [leaf.clone() for leaf in self.leaves]
            for item, tensor in zip(call.items, started, strict=True):
                self._see(INPUT, 0, "output", item, tensor, None)
            with ExitStack() as stack:
                stack.enter_context(composite.context(model))
                self._watch(model, stack)
                returned = call.run(model, started)
        self.fingerprint = Fingerprint(model)
        if isinstance(output, Atom):
            returned, output = self._inner_output(output), None
        self.output = explained_output(returned, output, self.batch, self.batched)
        self._see(OUTPUT, 0, "output", None, self.output, None)
        self.graph = Graph(self.output)
        self.folding = Folding(self.graph, self.batch)
        self._check_joined()
        self._audit()
        self._make_taps()

    # -- while the model runs ---------------------------------------------------------------------------------

    def _watch(self, model: nn.Module, stack: ExitStack) -> None:
        """Hooks around those of the composite: input taps before a step detaches, output taps after it links."""
        for module, name in self.names.items():
            hook = _step_hook(module)
            if hook is not None and module._modules:
                self._containers.append(name)
            stack.callback(module.register_forward_pre_hook(self._enter, prepend=True, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(self._leave).remove)

    def on_step(self, module: nn.Module | None, step: Step) -> None:
        """Numbers the step of a module; one of a function is numbered already."""
        if module is not None:
            step.call = self._calls[module] - 1

    @without_torch_function
    def on_function(self, name: str, call: int, output: Tensor, channel_dim: int | None) -> None:
        """The tap of a function."""
        self._see(name, call, "output", None, output, channel_dim)

    @without_torch_function
    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._calls[module] = self._calls.get(module, 0) + 1
        if _step_hook(module) is not None:
            first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
            if first is not None:
                self._keep(self.names[module], self._calls[module] - 1, "input", None, first)
            return None

        # An own view of the tensor, so that the tap holds the walks through this call only.
        def own(value: Any) -> Any:
            return value.view_as(value) if isinstance(value, Tensor) and value.requires_grad else value

        with not_recorded():
            args = tuple(own(value) for value in args)
            kwargs = {key: own(value) for key, value in kwargs.items()}
        name, call = self.names[module], self._calls[module] - 1
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        for item, tensor in enumerate(tensors):
            self._see(name, call, "input", None if len(tensors) == 1 else item, tensor, None)
        return args, kwargs

    @without_torch_function
    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        name, call = self.names[module], self._calls[module] - 1
        dim = _channel_dim(module)
        if isinstance(module, EMBEDDINGS) and self._is_input(args[0] if args else None):
            leaf = output.detach().requires_grad_()
            self.leaves.append(leaf)
            with not_recorded():
                looked_up: Tensor = leaf.clone()
            self._see(name, call, "output", None, looked_up, dim)
            return looked_up
        if isinstance(output, Tensor):
            self._see(name, call, "output", None, output, dim)
            if not module._modules and _step_hook(module) is None:
                self._check_covered(module, name, args, output)
            return None
        items = output if isinstance(output, Mapping) else dict(enumerate(output)) if _is_listed(output) else {}
        for item, value in items.items():
            if isinstance(value, Tensor):
                self._see(name, call, "output", item, value, dim)
        return None

    def _is_input(self, index: Any) -> bool:
        """Whether an embedding looks up one of the inputs: by value, since models reshape, convert and pad them."""
        return isinstance(index, Tensor) and any(_is_same(index, given.to(index.device)) for given in self._indices)

    def _see(self, name: str, call: int, side: str, item: Item | None, tensor: Tensor, dim: int | None) -> None:
        self._keep(name, call, side, item, tensor)
        if name and tensor.grad_fn is not None and tensor.is_floating_point():
            node, number = written(tensor.grad_fn, tensor.output_nr)
            if not self.batched and dim is not None and dim > 0:
                dim += 1
            self._seen.append(_Seen(name, call, side, item, node, number, tensor.shape, dim))

    def _check_covered(self, module: nn.Module, name: str, args: tuple[Any, ...], output: Tensor) -> None:
        """A leaf module without a rule may only route."""
        stop = {value.grad_fn for value in args if isinstance(value, Tensor)}
        stack = [output.grad_fn]
        while stack:
            node = stack.pop()
            if node is None or node in stop or isinstance(getattr(node, "step", None), Step):
                continue
            if not is_route_node(node):
                raise UncoveredLayerError(
                    f"layer {name!r} ({type(module).__name__}) has no rule in this composite, and is no 0/1 route "
                    f"(its operation is {operation(node)}). Zennit would use its plain gradient, which does not "
                    "conserve relevance. Map the layer to a rule in the composite's layer_map, or pass "
                    "Normalized(composite, uncovered='gradient') to account for what its gradient loses."
                )
            stop.add(node)
            stack += [below for below, _ in node.next_functions]

    def _keep(self, name: str, call: int, side: str, item: Item | None, tensor: Tensor) -> None:
        """Keeps the tensor that the measure is to start at, safe from what the model does to it later."""
        wanted = self._wanted
        if wanted is None or self.name_of(wanted.layer) != name or wanted.side != side:
            return
        if (wanted.call or 0) == call and wanted.item in (None, item) and self._started is None:
            with not_recorded():
                self._started = tensor.clone()

    def _inner_output(self, output: Atom) -> Tensor:
        if output.index is not None or output.side == "sink" or output.call == "any":
            raise EventError(
                f"output={output} is no tap that a measure can start at. Give at(layer), and its neurons by start=."
            )
        if self._started is None:
            name = self.name_of(output.layer)
            known = [seen.name for seen in self._seen if seen.side == output.side]
            raise UnknownLayerError(unknown_layer(name, dict.fromkeys(known)))
        return self._started

    # -- afterwards -------------------------------------------------------------------------------------------

    def _check_joined(self) -> None:
        """The graph of an output that depends on something else than the inputs ends at other leaves."""
        if not any(vertex.leaf is leaf for vertex in self.graph.vertices for leaf in self.leaves):
            raise InputError(NOT_JOINED)

    def _audit(self) -> None:
        """Every vertex is a step or a known route; anything else would be a wrong number."""
        for vertex in self.graph.vertices:
            if vertex.step is None and not is_route_node(vertex.node):
                raise UnsupportedOperationError(
                    f"relevance would pass the operation {operation(vertex.node)} (autograd node "
                    f"{vertex.node.name()}{self._near(vertex.node)}), which has no kernel: it is neither a step nor a "
                    "0/1 route, for it is computed with complex numbers, in place, in a script or in an "
                    "autograd.Function. Give the module that does so a rule in the composite's layer_map: "
                    "zennit.rules.Epsilon() where it is linear, Pass() where it maps each element on its own."
                )

    def _near(self, node: Any) -> str:
        names = [seen.name for seen in self._seen if seen.node is node and seen.name not in (INPUT, OUTPUT)]
        return f", in {names[0]!r}" if names else ""

    def _make_taps(self) -> None:
        position = self.graph.position
        found: dict[Place, Tap] = {}
        self._named: dict[tuple[str, str, int, Item | None], Tap] = {}
        for seen in self._seen:
            if seen.node not in position:
                continue
            place = Buffer(position[seen.node], seen.number)
            self._register(found, place, seen.shape, (seen.name, seen.side, seen.call, seen.item), seen.channel_dim)
        for index, vertex in enumerate(self.graph.vertices):
            if vertex.step is None:
                continue
            for number, edge in enumerate(vertex.edges):
                if edge is not None:
                    item = None if len(vertex.edges) == 1 else number
                    key = (vertex.step.name, "input", vertex.step.call, item)
                    self._register(found, (index, number), self.graph.shape(edge), key, None)
        self._items_of: dict[tuple[str, str], dict[int, list[Item | None]]] = {}
        for name, side, call, which in self._named:
            self._items_of.setdefault((name, side), {}).setdefault(call, []).append(which)
        self.taps = sorted(found.values(), key=lambda tap: tap.order)
        self.index = {tap.place: number for number, tap in enumerate(self.taps)}
        self.sinks = {(v.step.name, v.step.call): n for n, v in enumerate(self.graph.vertices) if v.step is not None}
        self._infer_channels()
        buffers = {place: 1 << number for place, number in self.index.items() if isinstance(place, Buffer)}
        edges = {place: 1 << number for place, number in self.index.items() if isinstance(place, tuple)}
        self.below, self.through = self.graph.reach(buffers, edges)

    def _register(
        self,
        found: dict[Place, Tap],
        place: Place,
        shape: torch.Size,
        key: tuple[str, str, int, Item | None],
        channel_dim: int | None,
    ) -> None:
        tap = found.setdefault(place, Tap(place, self.lifted(shape), channel_dim=0))
        if key[1] == "output" and key[0] not in tap.names:
            tap.names.append(key[0])
        if channel_dim is not None:
            tap.channel_dim = channel_dim
        self._named.setdefault(key, tap)

    def _infer_channels(self) -> None:
        """A tap that no layer lays out has the layout of the nearest tap of its shape, else dimension 1."""
        known: dict[object, list[int]] = {}
        for number, tap in enumerate(self.taps):
            if tap.channel_dim:
                for key in (tuple(tap.shape), len(tap.shape)):
                    known.setdefault(key, []).append(number)
        inferred = {}
        for number, tap in enumerate(self.taps):
            if not tap.channel_dim:
                numbers = known.get(tuple(tap.shape), known.get(len(tap.shape), []))
                at = bisect.bisect(numbers, number)
                near = [
                    (abs(other - number), self.taps[other].channel_dim) for other in numbers[max(0, at - 1) : at + 1]
                ]
                inferred[number] = min(near, default=(0, 1 if self.batched else -1))[1] % max(len(tap.shape), 2)
        for number, dim in inferred.items():
            self.taps[number].channel_dim = dim

    # -- looking up -------------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Names of the output taps, in execution order."""
        return [name for tap in reversed(self.taps) for name in self._labels(tap)]

    def _labels(self, tap: Tap) -> Iterator[str]:
        for name in dict.fromkeys(tap.names):
            if any(name.startswith(f"{other}.") for other in tap.names):
                continue  # the function inside a layer that returns the same tensor: an alias nobody asks for
            calls = self._calls_of(name)
            for call in calls:
                items = self._items(name, "output", call)
                for item in items:
                    if self._named.get((name, "output", call, item)) is tap:
                        yield name + (f":{call}" if len(calls) > 1 else "") + (f"[{item}]" if len(items) > 1 else "")

    def _calls_of(self, name: str, side: str = "output") -> list[int]:
        return sorted(self._items_of.get((name, side), ()))

    def _items(self, name: str, side: str, call: int) -> list[Item | None]:
        return list(self._items_of.get((name, side), {}).get(call, ()))

    def name_of(self, layer: str | nn.Module) -> str:
        """The name of a layer that was given by name or as a module."""
        if isinstance(layer, str):
            return layer
        if layer not in self.names:
            raise UnknownLayerError(
                f"the given {type(layer).__name__} is not a module of the measured model. Pass one of "
                "`model.modules()`, not a copy of it, or its name."
            )
        name = self.names[layer]
        return name if name else OUTPUT

    def find(
        self, layer: str | nn.Module, side: str = "output", call: Any = None, item: Item | None = None
    ) -> list[Tap]:
        """The taps that a layer name, side, call and item speak of; several for ``call="any"``.

        Raises:
            UnknownLayerError: None, with near names.
        """
        if isinstance(layer, str):
            layer, own = self._split_item(layer, side)
            item = own if item is None else item
        name, chosen = self.called(layer, side, call)
        return [self._item(name, side, number, item) for number in chosen]

    def items(self, layer: str | nn.Module, side: str, call: Any = None) -> list[Item | None]:
        """Which tensors a layer handed out or was handed: ``[None]`` for a single one."""
        if isinstance(layer, str):
            layer, item = self._split_item(layer, side)
            if item is not None:
                return [item]
        name, chosen = self.called(layer, side, call)
        return self._items(name, side, chosen[0])

    def _split_item(self, name: str, side: str) -> tuple[str, Item | None]:
        """``"lstm[0]"``, as :attr:`layers` lists it, to layer and item."""
        stem, bracket, item = name.removesuffix("]").rpartition("[")
        if not bracket or not name.endswith("]") or self._calls_of(name, side):
            return name, None
        return stem, int(item) if item.isdigit() else item

    def called(self, layer: str | nn.Module, side: str, call: Any) -> tuple[str, list[int]]:
        """The name of a layer and its calls that are spoken of."""
        name = self.name_of(layer)
        if call is None and ":" in name and name.rpartition(":")[2].isdigit() and not self._calls_of(name, side):
            name, _, number = name.rpartition(":")
            call = int(number)
        calls = self._calls_of(name, side)
        if not calls:
            raise self._missing(name, side)
        if call is None and len(calls) > 1:
            raise UnknownLayerError(
                f"{name!r} was called {len(calls)} times, so it has {len(calls)} taps. Say which: "
                f"at({name!r}, call=0), or call='any' for the walks through one of them."
            )
        chosen = calls if call == "any" else [calls[0] if call is None else call]
        if not set(chosen) <= set(calls):
            raise UnknownLayerError(f"{name!r} has no call {call}; its calls are {calls}.")
        return name, chosen

    def calls_of(self, name: str) -> list[int]:
        """The calls of a layer of which there are taps."""
        return self._calls_of(name)

    def find_sink(self, layer: str | nn.Module, call: Any = None) -> list[int]:
        """The vertices whose sinks a layer name and call speak of.

        Raises:
            UnknownLayerError: The layer is no step, so it absorbs nothing.
        """
        name = self.name_of(layer)
        calls = sorted(number for known, number in self.sinks if known == name)
        if not calls:
            steps = dict.fromkeys(known for known, _ in self.sinks)
            if self._calls_of(name):
                raise UnknownLayerError(
                    f"{name!r} only routes relevance, so it has no sink. The steps are {', '.join(map(repr, steps))}."
                )
            raise self._missing(name, "output")
        if call is None and len(calls) > 1:
            raise UnknownLayerError(f"{name!r} was called {len(calls)} times: say call=0, …, or call='any'.")
        chosen = calls if call == "any" else [calls[0] if call is None else call]
        if not set(chosen) <= set(calls):
            raise UnknownLayerError(f"{name!r} has no call {call}; its calls are {calls}.")
        return [self.sinks[name, number] for number in chosen]

    def _item(self, name: str, side: str, call: int, item: Item | None) -> Tap:
        items = self._items(name, side, call)
        if item not in items:
            if item is None and len(items) == 1:
                item = items[0]
            elif item == 0 and items == [None]:
                item = None
            elif items == [None]:
                raise UnknownLayerError(f"the {side} of {name!r} is one tensor, so leave item= out; got item={item!r}.")
            else:
                raise UnknownLayerError(
                    f"the {side} of {name!r} has {len(items)} tensors: say which by item=, one of "
                    f"{', '.join(map(repr, items))}; got {item!r}."
                )
        return self._named[name, side, call, item]

    def _missing(self, name: str, side: str) -> UnknownLayerError:
        for container in self._containers:
            if container == "" or name.startswith(f"{container}."):
                return HookedContainerError(
                    f"{name!r} lies inside {container or 'the model'!r}, to which the composite gives one rule, so "
                    "that it is a single step without taps inside. Ask for its input or output, or map rules to the "
                    "modules inside it."
                )
        known = [known for known, at, _, _ in self._named if at == side]
        return UnknownLayerError(unknown_layer(name, dict.fromkeys([*self.layers, *known])))

    def name_at(self, vertex: int) -> str:
        """A name for a vertex: of its step, else of its tap, else of the nearest tap above it."""
        step = self.graph.vertices[vertex].step
        if step is not None:
            several = sum(name == step.name for name, _ in self.sinks) > 1
            return f"{step.name}:{step.call}" if several else step.name
        for tap in reversed([tap for tap in self.taps if tap.order[0] <= vertex]):
            if tap.names:
                return tap.names[0]
        return "constants"

    def lifted(self, shape: torch.Size) -> torch.Size:
        """The shape of a tensor with a dimension of samples, which it lacks where the inputs have none."""
        return shape if self.batched else torch.Size((1, *shape))

    def with_samples(self, values: Tensor, at: int = 0) -> Tensor:
        """Values at a tensor with the dimension of samples of :meth:`lifted`."""
        return values if self.batched else values.unsqueeze(at)

    def without_samples(self, values: Tensor) -> Tensor:
        """The inverse of :meth:`with_samples`."""
        return values if self.batched else values.squeeze(0)

    def per_sample(self, tensor: Tensor, what: str, place: Place | None = None) -> Tensor:
        """Sums of the entries of each sample, ``(N,)``.

        Raises:
            FoldingError: They cannot be told apart.
        """
        found = self.folding.sums(tensor, place)
        if found is None:
            raise self.not_told_apart(what)
        return found

    def not_told_apart(self, what: str) -> FoldingError:
        """What to raise where entries of several samples are added up."""
        return FoldingError(
            f"the entries of {what} cannot be told apart by sample: its first dimension is not the batch of "
            f"{self.batch}, or its entries belong to several samples. Take the measure of one sample at a time."
        )


def _step_hook(module: nn.Module) -> StepHook | None:
    """The step hook that a composite has registered on a module."""
    for hook in module._forward_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, StepHook):
            return owner
    return None


def _is_same(index: Tensor, given: Tensor) -> bool:
    """Whether one holds the numbers of the other, or those padded at one end with one other number."""
    if index.numel() == given.numel():
        return torch.equal(index.flatten(), given.flatten().to(index.dtype))
    if index.ndim < 2 or index.shape[:-1] != given.shape[:-1] or index.shape[-1] < given.shape[-1]:
        return False
    length = given.shape[-1]
    for own, rest in ((index[..., :length], index[..., length:]), (index[..., -length:], index[..., :-length])):
        if torch.equal(own, given.to(index.dtype)) and bool((rest == rest.flatten()[0]).all()):
            return True
    return False


def _is_listed(value: Any) -> bool:
    return isinstance(value, (tuple, list))


def _channel_dim(module: nn.Module) -> int | None:
    """Where a layer puts its channels: last for layers over features, 1 for layers over images."""
    own: int | None = getattr(type(module), "nrm_channel_dim", None)
    if own is not None:
        return own
    if isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding)):
        return -1
    kinds = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.pooling._MaxPoolNd)
    return 1 if isinstance(module, kinds) else None


__all__ = ["INPUT", "OUTPUT", "Recording", "Tap"]
