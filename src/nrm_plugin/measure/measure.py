"""The normalized relevance measure of a model at some inputs, and what it can be asked."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal, ParamSpec, TypeVar, overload

import torch
from torch import Tensor, nn
from zennit.core import Composite

from ..composites import Normalized, NRMDefault, Uncovered, check_composite
from ..errors import CancellationError, EventError, NRMError, NullEventError, StaleMeasureError, samples
from ..events.event import ABSORBED, Atom, Event, Side, at
from ..kernels.normalization import Residual
from ..model.autocast import exact
from ..model.inputs import Call, Inputs, Output
from ..model.targets import normalized, sample_sums, start_vector
from ..recording.passes import Cost
from ..recording.places import Buffer, Edge, Place, Sink
from ..recording.recording import Recording
from ..recording.taps import OUTPUT, Tap
from .attention_events import plain
from .decision_diagram import Formulas
from .description import explanation
from .flow import flow_graph
from .flow_graph import TOP, FlowGraph
from .groups import Over, pair_of, summed
from .joints import joint_matrix, neighbour_matrix
from .memory import check_memory, in_chunks, width_of
from .partitions import Names
from .totals import Below, Books, Decided, Decisions, books

Layer = str | nn.Module | Atom
Kind = Literal["residual", "constants"]

P = ParamSpec("P")
T = TypeVar("T")


def _query(method: Callable[P, T]) -> Callable[P, T]:
    """A query may be asked under any gradient mode; it is refused when the model is not what it was."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        args[0]._check_fresh()  # type: ignore[attr-defined]
        with torch.inference_mode(False), torch.no_grad(), exact(args[0]._start.device):  # type: ignore[attr-defined]
            return method(*args, **kwargs)

    return wrapped


class RelevanceMeasure:
    r"""Relevance as a normalized signed measure over the walks of a network, one for each sample.

    .. math:: \mu(w) = \mu(n_L) \prod_l \tilde T_{n_l n_{l+1}}, \qquad
              \mu(A) = \sum_{w \in A} \mu(w), \qquad \mu(\Omega) = 1

    The model is run once and left as it was; all questions are answered from the recording.

    Args:
        model: The network, in evaluation mode.
        inputs: ``(N, …)``, or a tuple of such tensors, or a mapping that the model takes by keyword; of a mapping,
            only floating point tensors carry relevance.
        target: Output to explain, in Captum's forms: int, tuple, list, tensor; None for a single output.
        composite: A Zennit composite; None for :class:`~nrm_plugin.composites.NRMDefault`. A ``Normalized`` one
            brings its own settings.
        residual: What happens to relevance that a rule does not hand down: ``"redistribute"`` (the default) or
            ``"sink"``.
        gain_limit: Largest gain ``G`` of a column, 2 by default; ``math.inf`` undoes ε and bias altogether.
        start: Signed vector over the outputs, instead of a target, or a function that makes it from the outputs.
        additional_forward_args: Further positional arguments of the model; a tuple of them, or one.
        additional_forward_kwargs: Further keyword arguments.
        output: Where the model returns several tensors, which of them is explained: its key, its position, or a
            function of what the model returns. By default the only tensor, or ``"logits"``, or ``"out"``. A tap of the
            model, ``at(layer)``, is taken for its output, so that the measure starts inside.
        batched: False where the first dimension of the inputs are no samples but the nodes of a graph, or the times of
            one sequence: all of them are one sample. Events and targets then index tensors as the model has them,
            ``at("conv1")[node, feature]``, and what is returned has a dimension of one sample before those.
        uncovered: ``"error"`` (the default) or ``"gradient"``, for layers without a rule.
        max_memory: Bytes that a pass may carry where many events or groups are asked for; by default 128 MiB on a CPU,
            where more is slower, else 1 GiB. More of them are carried one after the other, and fewer at once where
            memory runs out all the same.

    Raises:
        TypeError: Settings given beside a ``Normalized`` composite.
        InputError, TargetError, ModelStateError, GradModeError: What they were given does not fit.
        UncoveredLayerError, UnsupportedOperationError, UnsupportedRuleError: The model has no measure with these rules.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
        >>> mu(at("0")[2]).shape, mu.marginal("input", given=at("input")).shape
        (torch.Size([5]), torch.Size([5, 3]))

    Source: arXiv 2606.00557 for the measure; MEASURE for everything that is ours.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Inputs,
        target: Any = None,
        *,
        composite: Composite | None = None,
        residual: Residual | None = None,
        gain_limit: float | None = None,
        start: Any = None,
        additional_forward_args: Any = None,
        additional_forward_kwargs: Mapping[str, Any] | None = None,
        output: Output | Atom | None = None,
        batched: bool = True,
        uncovered: Uncovered | None = None,
        max_memory: float | None = None,
    ) -> None:
        self._max_memory = check_memory(max_memory)
        self.composite = normalize(composite, residual, gain_limit, uncovered)
        call = Call(inputs, additional_forward_args, additional_forward_kwargs, batched)
        self._recording = Recording(model, call, self.composite, output)
        values = self._recording.samples.with_samples(self._recording.output.detach())
        vector = start_vector(values, target if batched else _in_row(target, values), start)
        self._start = self._recording.samples.without_samples(normalized(vector))
        self._output = sample_sums(vector * values) / sample_sums(vector)
        self._books: Books | None = None
        self.cost = Cost()

    # -- what there is ----------------------------------------------------------------------------------------

    @property
    def layers(self) -> list[str]:
        """Names of the taps, in execution order.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> mu.layers
            ['input', '0', '1', '2', 'output']
        """
        return self._recording.taps.layers

    @property
    def output(self) -> Tensor:
        r""":math:`\sum_k s_k f_k / \sum s`, ``(N,)``: measure times this is the usual LRP score.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> mu.output.shape
            torch.Size([5])
        """
        return self._output.clone()

    @property
    def batch(self) -> int:
        """Number of samples.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> mu.batch
            5
        """
        return self._recording.samples.count

    def shape(self, layer: Layer) -> torch.Size:
        """Shape of a tap, ``(N, …)``.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> mu.shape("1")
            torch.Size([5, 4])
        """
        return self._tap(layer).shape

    def channel_dim(self, layer: Layer) -> int:
        """The dimension of a tap that has the channels: 1 of ``(N, C, H, W)``, 2 of ``(N, tokens, C)``.

        Raises:
            UnknownLayerError: No tap of that name; the message lists near names.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> RelevanceMeasure(net, torch.randn(5, 3), 1).channel_dim("1")
            1
        """
        tap = self._tap(layer)
        return tap.channel_dim % len(tap.shape)

    def taps_of(self, layer: Layer, side: Side = "output") -> list[Atom]:
        """The taps of a layer: one, or one for each tensor of a tuple.

        Raises:
            UnknownLayerError: None.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> mu.taps_of("1")
            [at('1')]
        """
        atom = layer if isinstance(layer, Atom) else _atom(layer, side)
        if atom.side == "sink":
            raise EventError(f"{atom} is no tap: walks end there. Ask mu({atom}), or sinks() for all steps.")
        items = self._recording.taps.items(atom.layer, atom.side, atom.call)
        return [Atom(atom.layer, atom.side, atom.call, item) for item in items]

    def __repr__(self) -> str:
        rules = type(self.composite.composite).__name__
        settings = self.composite.normalization
        return (
            f"RelevanceMeasure({self.batch} samples, {len(self._recording.taps)} taps, {rules}, "
            f"residual={settings.residual!r}, gain_limit={settings.gain_limit})"
        )

    # -- one tap ----------------------------------------------------------------------------------------------

    @overload
    def marginal(
        self,
        layer: Layer,
        over: Over | None = ...,
        *,
        given: Any = ...,
        joint: Any = ...,
        min_ratio: float | None = ...,
    ) -> Tensor: ...
    @overload
    def marginal(
        self,
        layer: list[Any],
        over: Over | None = ...,
        *,
        given: Any = ...,
        joint: Any = ...,
        min_ratio: float | None = ...,
    ) -> dict[Any, Tensor]: ...
    @_query
    def marginal(
        self,
        layer: Any,
        over: Over | None = None,
        *,
        given: Event | Sequence[Event] | None = None,
        joint: Event | Sequence[Event] | None = None,
        min_ratio: float | None = None,
    ) -> Tensor | dict[Any, Tensor]:
        r"""Mass of the walks through each neuron of one tap.

        .. math:: \mu(n_l = i) = \mu(\{w : w \text{ crosses } i\})

        Args:
            layer: Tap name, module or ``at(…)``; a list of them is answered by one pass.
            over: ``"channel"`` sums over everything but batch and channels, ``"position"`` over channels. An integer
                tensor that holds a label for every neuron sums up those with the same, ``(N, groups)``.
            given: Divide by the mass of this event: ``μ(n_l = i | event)``. A list gives one map for each.
            joint: ``μ(n_l = i and event)``, undivided.
            min_ratio: Smallest ``|μ(event)|`` in units of its variation for which ``given`` divides.

        Returns:
            ``(N, *shape)``, dimensionless, with a leading dimension for a list of events; a dictionary for a list of
            layers. With the sink above and the bypass, each sample sums to 1.

        Raises:
            UnknownLayerError: No tap of that name; the message lists near names.
            NullEventError, CancellationError: The mass of ``given`` is zero, or cancels.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> maps = mu.marginal(["1", "input"])
            >>> maps["input"].shape
            torch.Size([5, 3])
            >>> each = mu.marginal("input", joint=[at("1")[k] for k in range(4)])
            >>> torch.allclose(each.sum(0), maps["input"], atol=1e-5)
            True

        Source: MEASURE, sections 3 and 4.
        """
        if given is not None and joint is not None:
            raise TypeError("give given= or joint=, not both: μ(i & B | A) is marginal(layer, joint=A & B) / μ(A).")
        single = not isinstance(layer, list)
        layers = [layer] if single else layer
        taps = [self._tap(item) for item in layers]
        maps = self._maps(taps, given, joint, min_ratio)
        reduced = maps if over is None else [summed(v, tap, over) for v, tap in zip(maps, taps, strict=True)]
        return reduced[0] if single else dict(zip(layers, reduced, strict=True))

    def _maps(self, taps: list[Tap], given: Any, joint: Any, min_ratio: float | None) -> list[Tensor]:
        if given is None and joint is None:
            found = books(self._recording, self._start, [tap.place for tap in taps])
            self._books = self._books or found
            self.cost = found.cost
            maps = [self._map(found, tap) for tap in taps]
            found.maps = {}
            return _apart(maps, self._start)
        events, single = _listed(joint if given is None else given)
        places = [tap.place for tap in taps]
        decided = self._decided(events, places)
        if given is not None:
            self._check_conditions(events, [one.mass for one in decided], [one.variation for one in decided], min_ratio)
        results = []
        for number, tap in enumerate(taps):
            rows = [
                one.maps[number] if given is None else self._divided(one.maps[number], one.mass, tap) for one in decided
            ]
            stacked = torch.stack(rows) if rows else self._start.new_zeros((0, *tap.shape))
            results.append(stacked[0] if single else stacked)
        return results

    def _span(self, events: Sequence[Event], places: Sequence[Place]) -> list[Place] | None:
        """The places that events and questions speak of; None where it may be any."""
        spoken = [part for event in events for atom in event.atoms() for part in plain(atom, self._recording).atoms()]
        atoms = {replace(atom, index=None) for atom in spoken if isinstance(atom, Atom) and atom.side != "sink"}
        if not all(isinstance(atom, Atom) and atom.side != "sink" for atom in spoken):
            return None
        found = [self._recording.taps.find(atom.layer, atom.side, atom.call, atom.item) for atom in atoms]
        return [*places, *(tap.place for taps in found for tap in taps)]

    def _decided(self, events: Sequence[Event], places: Sequence[Place] = ()) -> list[Decided]:
        """Mass, variation and maps of each event, as many at once as memory allows."""
        spent: list[Cost] = []

        def run(chunk: Sequence[Event]) -> list[Decided]:
            decisions = Decisions(Formulas(self._recording, chunk), self._start, places)
            found = [decisions.decided(number, places) for number in range(len(chunk))]
            spent.append(decisions.cost)
            return found

        width = width_of(self._recording, self._max_memory, self._span(events, places))
        found = in_chunks(list(events), width, run, "events")
        self.cost = sum(spent, start=Cost())
        return found

    @_query
    def sink(self, layer: Layer, kind: Kind | None = None) -> Tensor:
        """Mass absorbed above a tap, ``(N,)``.

        Args:
            layer: Tap name, module or ``at(…)``.
            kind: Only what rules do not hand down (``"residual"``), or only what ends at parameters, buffers and other
                constants (``"constants"``); both by default.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> total = mu.marginal("1").sum(1) + mu.sink("1") + mu.bypass("1")
            >>> torch.allclose(total, torch.ones(5), atol=1e-5)
            True
        """
        return self._absorbed([self._tap(layer)], kind, absolute=False)

    @_query
    def sink_above(self, taps: Sequence[Atom]) -> Tensor:
        """Mass absorbed above at least one of several taps, such as the tensors of a tuple, ``(N,)``.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> torch.equal(mu.sink_above(mu.taps_of("0")), mu.sink("0"))
            True
        """
        return self._absorbed([self._tap(tap) for tap in taps], None, absolute=False)

    @_query
    def bypass(self, layer: Layer) -> Tensor:
        """Mass of the walks that reach the input, or a sink elsewhere, without crossing the tap, ``(N,)``.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> mu.bypass("1")
            tensor([0., 0., 0., 0., 0.])
        """
        return self._bypassing(self._tap(layer))

    @_query
    def sinks(self, kind: Kind | None = None) -> dict[str, Tensor]:
        """Mass absorbed in each step that absorbs any, ``(N,)`` each: where the measure leaks.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1, residual="sink", composite=NRMEpsilonPlus().composite)
            >>> sorted(mu.sinks())
            ['0', '2']
        """
        _check_kind(kind)
        found: dict[str, Tensor] = {}
        for (vertex, kept), value in reversed(self._plain().sinks.items()):
            if kind in (None, kept):
                name = self._recording.taps.name_at(vertex)
                mass = self._told_apart(value, name)
                found[name] = found[name] + mass if name in found else mass.clone()
        return found

    @_query
    def variation(self, layer: Layer) -> Tensor:
        r"""Tap variation ``Σ_j |μ(j)| + Σ|absorbed above| + |bypass|``, ``(N,)``, at least 1.

        Above 1, neurons of opposite sign share the tap.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> bool((mu.variation("1") >= 0.999).all())
            True
        """
        tap = self._tap(layer)
        crossing = self._told_apart(self._plain().absolute.get(tap.place), "the tap") if self._reaches(tap) else 0
        return crossing + self._absorbed([tap], None, absolute=True) + self._bypassing(tap).abs()

    @_query
    def walk_variation(self, surviving: bool = False) -> Tensor:
        r"""``|μ|(Ω) = Σ_w |μ(w)|``, ``(N,)``: 1 exactly when no walk is negative.

        It bounds every ``|μ(A)|`` and the rounding of every sum, and grows with depth for signed rules.

        Args:
            surviving: That of the measure given survival: walks that are absorbed are left out, and what is left is
                divided by the absolute mass of all that survive.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> bool((mu.walk_variation() >= mu.variation("1") - 1e-4).all())
            True
        """
        found = books(self._recording, self._start.abs(), absolute=True)
        self.cost = found.cost
        ends = [number for number, vertex in enumerate(self._recording.graph.vertices) if vertex.leaf is not None]
        total = self._start.new_zeros(self.batch)
        for place, mass in found.mass.items():
            if isinstance(place, Buffer) and place.vertex in self._input_vertices(ends):
                total = total + self._told_apart(mass, "the input")
        if surviving:
            return total / self._survival().abs()
        for value in found.sinks.values():
            total = total + self._told_apart(value, "a sink")
        return total

    def _survival(self) -> Tensor:
        """Mass of the walks that reach an input, ``(N,)``."""
        leaves = [number for number, vertex in enumerate(self._recording.graph.vertices) if vertex.leaf is not None]
        ends, total = self._input_vertices(leaves), self._start.new_zeros(self.batch)
        for place, mass in self._plain().mass.items():
            if isinstance(place, Buffer) and place.vertex in ends:
                total = total + self._told_apart(mass, "the input")
        return total

    def _input_vertices(self, leaves: list[int]) -> set[int]:
        """The taps right above the leaves: where walks that are not absorbed end."""
        graph = self._recording.graph
        return {
            number
            for number, vertex in enumerate(graph.vertices)
            if any(edge is not None and edge.vertex in leaves for edge in vertex.edges)
        }

    # -- events -----------------------------------------------------------------------------------------------

    @_query
    def __call__(
        self, event: Event | Sequence[Event], given: Event | None = None, *, min_ratio: float | None = None
    ) -> Tensor:
        r"""Mass of an event, ``μ(A)``, or given another, ``μ(A | B) = μ(A & B) / μ(B)``.

        Args:
            event: One event, or a list of them that is answered by one pass.
            given: The condition.
            min_ratio: Smallest ``|μ(B)|`` in units of its variation for which it divides; by default 1e-3 in float32
                and 1e-8 in float64. 0 divides wherever the mass is not zero.

        Returns:
            ``(N,)``, or ``(E, N)`` for a list of ``E`` events.

        Raises:
            NullEventError: No walk with a mass satisfies the condition.
            CancellationError: Its positive and negative walks cancel.
        """
        events, single = _listed(event)
        if not events:
            return self._start.new_zeros((0, self.batch))
        if given is not None:
            _check_event(given, "given= takes one event; for several conditions ask once for each. ")
        asked = events if given is None else [*(item & given for item in events), given]
        decided = self._decided(asked)
        mass = torch.stack([one.mass for one in decided])
        if given is not None:
            self._check_conditions([given], [mass[-1]], [decided[-1].variation], min_ratio)
            mass = mass[:-1] / mass[-1]
        return mass[0] if single else mass

    @overload
    def conditional(self, event: Event, layer: Layer) -> Tensor: ...
    @overload
    def conditional(self, event: Event, layer: None = ...) -> dict[str, Tensor]: ...
    @_query
    def conditional(self, event: Event, layer: Layer | None = None) -> Tensor | dict[str, Tensor]:
        """``μ(event given j)`` for every neuron ``j`` of a tap above all taps of the event, ``(N, *shape)``.

        One transposed pass; defined also where ``μ(j)`` is zero.

        Args:
            event: An event over taps below.
            layer: The tap; None for all taps above the event, by name.

        Raises:
            EventError: The event speaks of a tap that is not below this one.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> below = mu.conditional(at("input")[0], "2")
            >>> torch.allclose(below[:, 1], mu(at("input")[0]), atol=1e-5)
            True
        """
        wanted = None if layer is None else self._tap(layer)
        formulas = self._formulas([event])
        if wanted is None:
            every = {name: self._tap(name) for name in self.layers}
            taps = {name: tap for name, tap in every.items() if not self._not_below(formulas, tap)}
        else:
            if self._not_below(formulas, wanted):
                name = wanted.names[0] if wanted.names else layer
                raise EventError(
                    f"{event} speaks of a tap that is not below {name!r}; the conditional given each neuron of a tap "
                    "needs taps below it. For taps above, use marginal(layer, given=event)."
                )
            taps = {"": wanted}
        below = Below(formulas, [tap.place for tap in taps.values()], formulas.roots, self._start)
        self.cost = below.cost
        lift = self._recording.samples.with_samples
        found = {name: lift(below.value(tap.place, formulas.roots[0]).clone()) for name, tap in taps.items()}
        return found if layer is None else found[""]

    def _not_below(self, formulas: Formulas, tap: Tap) -> list[object]:
        return [key for key in formulas.levels if not self._is_below(key, tap)]

    @_query
    def joint(self, upper: Layer, lower: Layer, over: Over | tuple[Over, Over] = "channel") -> Tensor:
        """Joint relevance of every channel of one tap with every channel of a tap below it, ``(N, upper, lower)``.

        Args:
            upper: The tap that walks cross first.
            lower: A tap below it.
            over: ``"channel"``, ``"position"``, ``"neuron"``, or an integer tensor with the group of every neuron; a
                pair of them for groups of the upper and of the lower tap.

        Raises:
            EventError: ``lower`` is not below ``upper``.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> joint = mu.joint("2", "0")
            >>> joint.shape, torch.allclose(joint.sum(1), mu.marginal("0"), atol=1e-5)
            (torch.Size([5, 2, 4]), True)
        """
        pair = pair_of(over)
        above, below = self._tap(upper), self._tap(lower)
        if not self._is_below(below.place, above):
            raise EventError(f"{lower!r} is not below {upper!r}; a joint matrix goes from an upper tap to a lower one.")
        return self._joint([(above, below)], [pair])[0]

    @_query
    def joints(self, layers: Sequence[Layer], over: Over | Sequence[Over] = "channel") -> list[Tensor]:
        """Joint relevance of the channels of each two consecutive layers, ``(N, upper, lower)`` each.

        The marginals of all layers are found by one pass. Where one linear layer lies between two of them, and else
        only what keeps channels (ReLU, max pooling), all pairs cost one weight gradient.

        Args:
            layers: Two or more, each below the one before.
            over: ``"channel"``, ``"position"``, ``"neuron"`` or labels, for all layers or a list of one for each.

        Raises:
            EventError: A layer is not below the one before.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> [tuple(joint.shape) for joint in mu.joints(["2", "0", "input"])]
            [(5, 2, 4), (5, 4, 3)]
        """
        kinds = [over] * len(layers) if isinstance(over, (str, Tensor)) else list(over)
        if len(kinds) != len(layers):
            raise ValueError(f"over= has {len(kinds)} entries for {len(layers)} layers; give one, or one for each.")
        taps = [self._tap(layer) for layer in layers]
        pairs = list(pairwise(taps))
        for (above, below), names in zip(pairs, pairwise(layers), strict=True):
            if not self._is_below(below.place, above):
                raise EventError(f"{names[1]!r} is not below {names[0]!r}; list layers from the output to the input.")
        return self._joint(pairs, [pair_of(pair) for pair in pairwise(kinds)])

    def _joint(self, pairs: list[tuple[Tap, Tap]], overs: list[tuple[Over, Over]]) -> list[Tensor]:
        found = books(self._recording, self._start, [above.place for above, _ in pairs])
        self._books = self._books or found
        cost, matrices = found.cost, []
        for (above, below), over in zip(pairs, overs, strict=True):
            relevance = self._map(found, above)
            by_channel = all(isinstance(one, str) and one == "channel" for one in over)
            direct = neighbour_matrix(self._recording, above, below, relevance) if by_channel else None
            width = width_of(self._recording, self._max_memory, [above.place, below.place])
            matrix, spent = direct or joint_matrix(self._recording, above, below, relevance, over, width)
            cost += spent
            matrices.append(matrix)
        found.maps = {}
        self.cost = cost
        return matrices

    def _map(self, found: Books, tap: Tap) -> Tensor:
        """The relevance of a tap; zeros where none arrived."""
        return found.maps[tap.place] if tap.place in found.maps else self._start.new_zeros(tap.shape)

    def flow(
        self,
        layers: Sequence[Layer],
        over: Any = "channel",
        *,
        top: int | None = TOP,
        min_mass: float | None = None,
        coverage: float | None = None,
        names: Mapping[str, Names] | None = None,
        sample: int | None = None,
    ) -> FlowGraph:
        """How relevance flows between groups of neurons of some layers: a graph of joint relevance.

        Args:
            layers: Each above or below the others; names may come in any order.
            over: The groups: ``"channel"``, ``"position"``, ``"neuron"``, integer labels, or boolean masks by name; or
                a dictionary that says this for some layers by name, where the others have channels.
            top: Most groups of a layer that are shown, those of largest absolute mass; None for no such limit. The
                other neurons are one node, the rest.
            min_mass: Smallest absolute mass of a group that is shown.
            coverage: Of each layer the fewest groups that hold this share of its absolute mass, such as 0.9.
            names: Of the groups of some layers: lists or dictionaries by name of the layer, such as
                ``{"output": classes}``.
            sample: Which sample, where the measure has several.

        Raises:
            FlowError, InputError: Thresholds or sample do not fit.
            EventError: A layer is not below the one before, or groups do not fit.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> graph = mu.flow(["output", "1", "input"], top=2, names={"output": ["cat", "dog"]}, sample=0)
            >>> graph.nodes[0].label, len(graph.joints)
            ('dog', 2)

        Source: MEASURE, section 4; which groups are shown, and the rest, is ours.
        """
        known = {name: place for place, name in enumerate(self.layers)}
        if all(isinstance(layer, str) and layer in known for layer in layers):
            layers = sorted(layers, key=lambda layer: -known[layer])  # type: ignore[index]
        taps = [(layer, self._tap(layer)) for layer in layers]
        limits = {"top": top, "min_mass": min_mass, "coverage": coverage}
        return flow_graph(self, taps, over, **limits, names=names, sample=sample)  # type: ignore[arg-type]

    def explain(self, event: Event, given: Event | None = None) -> str:
        """What quantity this is, in words and as a formula, and what it costs.

        Examples:
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> mu = RelevanceMeasure(net, torch.randn(5, 3), 1)
            >>> print(mu.explain(at("0")[1] & at("input")[2]))
            μ(at('0')[1] & at('input')[2])
            The share of relevance carried by the walks that cross '0' at [1] and cross 'input' at [2].
            Cost: ...
        """
        _check_event(event)
        if given is not None:
            _check_event(given, "given= takes one event. ")
        events = [event] if given is None else [event & given, given]
        return explanation(self._formulas(events), event, given)

    # -- inside -----------------------------------------------------------------------------------------------

    def _formulas(self, events: Sequence[Event]) -> Formulas:
        for event in events:
            _check_event(event)
        return Formulas(self._recording, events)

    def _tap(self, layer: Layer) -> Tap:
        atom = layer if isinstance(layer, Atom) else _atom(layer)
        if atom.index is not None:
            raise EventError(f"{atom} is an event; a layer is needed here. Use at(layer) without an index, or joint=.")
        if atom.side == "sink" or atom.call == "any":
            raise EventError(f"{atom} is not one tap. Ask mu({atom}) for its mass.")
        (tap,) = self._recording.taps.find(atom.layer, atom.side, atom.call, atom.item)
        return tap

    def _plain(self) -> Books:
        if self._books is None:
            self._books = books(self._recording, self._start)
            self.cost = self._books.cost
        return self._books

    def _reaches(self, tap: Tap) -> bool:
        output = self._recording.graph.output
        bit = 1 << self._recording.taps.index[tap.place]
        return tap.place == output or bool(self._recording.taps.marks.below_vertex[output.vertex] & bit)

    def _absorbed(self, taps: list[Tap], kind: Kind | None, absolute: bool) -> Tensor:
        _check_kind(kind)
        plain = self._plain()
        bits = 0
        for tap in taps:
            bits |= 1 << self._recording.taps.index[tap.place]
        total = self._start.new_zeros(self.batch)
        for (vertex, kept), value in (plain.absolute_sinks if absolute else plain.sinks).items():
            if kind in (None, kept) and self._recording.taps.marks.below_vertex[vertex] & bits:
                # Names are made for the message only: to make them all takes longer than the pass.
                total = total + (
                    self._told_apart(None, self._recording.taps.name_at(vertex)) if value is None else value
                )
        return total

    def _bypassing(self, tap: Tap) -> Tensor:
        plain = self._plain()
        if not self._reaches(tap):
            return self._recording.samples.checked_sums(self._start, "the output", self._recording.graph.output)
        bit = 1 << self._recording.taps.index[tap.place]
        total = self._start.new_zeros(self.batch)
        marks = self._recording.taps.marks
        for edge, value in plain.flows.items():
            if marks.below_vertex[edge.vertex] & bit and not marks.below_edge[edge.vertex][edge.number] & bit:
                total = total + self._told_apart(value, "an edge")
        return total

    def _told_apart(self, value: Tensor | None, what: str) -> Tensor:
        if value is None:
            raise self._recording.samples.error(what)
        return value

    def _divided(self, values: Tensor, mass: Tensor, tap: Tap) -> Tensor:
        """Relevance at a tap divided by one number for each sample, ``(N,)``; zeros stay what they are."""
        quotient = values / self._recording.samples.spread(mass, tap.place, tap.shape)
        return torch.where(values == 0, 0.0, quotient) if self._recording.samples.is_needed else quotient

    def _is_below(self, place: Buffer | Edge | Sink, tap: Tap) -> bool:
        """Whether a walk can cross a place, or be absorbed in a sink, after it has crossed a tap."""
        vertex, taps = tap.place.vertex, self._recording.taps
        if isinstance(place, Sink):
            return place.vertex >= vertex if isinstance(tap.place, Buffer) else place.vertex > vertex
        bit = 1 << taps.index[place]
        if isinstance(tap.place, Buffer):
            return bool(taps.marks.below_vertex[vertex] & bit)
        own = 1 << taps.index[tap.place]
        return bool(taps.marks.below_edge[vertex][tap.place.number] & bit & ~own)

    def _check_conditions(
        self, events: Sequence[Event], mass: Sequence[Tensor], variation: Sequence[Tensor], min_ratio: float | None
    ) -> None:
        ratio = (1e-3 if self._start.dtype == torch.float32 else 1e-8) if min_ratio is None else min_ratio
        if not isinstance(ratio, numbers.Real) or not float(ratio) >= 0:
            raise ValueError(f"min_ratio={min_ratio!r} is unknown; give a number of at least 0, or None.")
        for event, value, spread in zip(events, mass, variation, strict=True):
            _check_condition(event, value, spread, ratio)

    def _check_fresh(self) -> None:
        changed = self._recording.fingerprint.changed()
        if changed:
            raise StaleMeasureError(
                f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''} changed in place since the measure "
                "was taken, and the measure shares its memory. Take the measure again."
            )


def normalize(
    composite: Composite | None, residual: Residual | None, gain_limit: float | None, uncovered: Uncovered | None
) -> Normalized:
    """A normalized composite of these settings.

    Raises:
        TypeError: The composite is normalized and settings are given as well.
    """
    settings = {"residual": residual, "gain_limit": gain_limit, "uncovered": uncovered}
    given = {key: value for key, value in settings.items() if value is not None}
    if isinstance(composite, Normalized):
        if given:
            raise TypeError(
                f"the composite is Normalized and brings its own settings, but {', '.join(given)} "
                f"{'is' if len(given) == 1 else 'are'} given too. Say it in one place: "
                f"Normalized(composite, {', '.join(f'{key}={value!r}' for key, value in given.items())})."
            )
        return composite
    if composite is not None:
        check_composite(composite)
    return Normalized(NRMDefault() if composite is None else composite, **given)  # type: ignore[arg-type]


def _in_row(target: Any, values: Tensor) -> Any:
    """The target of an output ``(1, 1, C)``, the row of scores of a whole graph, where it names the class alone."""
    is_number = isinstance(target, int) or (isinstance(target, (list, Tensor)) and torch.as_tensor(target).numel() == 1)
    is_row = values.ndim == 3 and values.shape[1] == 1
    return (0, int(torch.as_tensor(target))) if is_number and is_row else target


def _apart(maps: list[Tensor], start: Tensor) -> list[Tensor]:
    """The same maps, each in memory of its own: steps that hand relevance through as it is share theirs."""
    taken = {start.untyped_storage().data_ptr()}
    result = []
    for values in maps:
        memory = values.untyped_storage().data_ptr()
        result.append(_copied(values) if memory in taken else values)
        taken.add(memory)
    return result


def _copied(values: Tensor) -> Tensor:
    """A copy; where torch can, one that is only made when either is written to."""
    lazily = getattr(torch, "_lazy_clone", None)
    copy: Tensor = values.clone() if lazily is None or values.device.type != "cpu" else lazily(values)
    return copy


def _atom(layer: Any, side: Side = "output") -> Atom:
    """The tap of a layer.

    Raises:
        EventError: It is no layer.
    """
    if isinstance(layer, Event):
        raise EventError(f"{layer} is an event; a layer is needed here. Use its layer, and joint= or given= for it.")
    if isinstance(layer, (list, tuple)):
        raise EventError(f"one layer is needed here, got {layer!r}; only marginal() takes several, in a list.")
    return at(layer, side)


def _check_event(event: object, remedy: str = "") -> None:
    if not isinstance(event, Event):
        raise EventError(
            f"expected an event such as at('layer')[3], got {type(event).__name__}: {event!r}. {remedy}".rstrip()
        )


def _check_kind(kind: object) -> None:
    if kind not in (None, "residual", "constants"):
        raise ValueError(f"kind={kind!r} is unknown; choose None, 'residual' or 'constants'.")


def _listed(event: Event | Sequence[Event]) -> tuple[list[Event], bool]:
    if isinstance(event, Event):
        return [event], True
    if not isinstance(event, Iterable) or isinstance(event, (str, Tensor)):
        raise EventError(f"expected an event such as at('layer')[3], or a list of them, got {type(event).__name__}.")
    events = list(event)
    for item in events:
        _check_event(item)
    return events, False


def _check_condition(event: Event, mass: Tensor, variation: Tensor, ratio: float) -> None:
    null = (variation == 0).tolist()
    if any(null):
        raise NullEventError(
            f"cannot condition on {event}: no walk with a mass satisfies it ({samples(null)}), so μ(· | {event}) is "
            "0/0. Condition on an event with a mass; mu(event) tells it."
        )
    weak = (mass.abs() <= ratio * variation).tolist()
    if any(weak):
        first = weak.index(True)
        anyway = ", or pass min_ratio=0 to divide anyway" if ratio > 0 else ""
        raise CancellationError(
            f"cannot condition on {event}: its mass is {float(mass[first]):.2g} but its variation is "
            f"{float(variation[first]):.2g}. Positive and negative walks cancel, so dividing by the mass is unstable "
            f"({samples(weak)}). Condition on a smaller event{anyway}."
        )


__all__ = ["ABSORBED", "OUTPUT", "NRMError", "Place", "RelevanceMeasure", "normalize"]
