r"""Glocal pictures: what local explanations say together of a class or a group of samples.

The mean flow of some samples is the flow of the mean of their measures, which is a measure itself:

.. math:: \bar\mu(A \cap B) = \sum_n w_n \mu_n(A \cap B), \qquad \sum_n w_n = 1, \qquad \bar\mu(\Omega) = 1

So every cut still sums to 1. The difference of two mean flows is signed, with a sum of 0. All of this is ours.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InputError
from ..events.event import Event
from ..measure.flow import flow_graph
from ..measure.flow_graph import TOP, FlowError, FlowGraph, FlowLayer, check_thresholds
from ..measure.measure import RelevanceMeasure
from ..measure.partitions import Names, Partition, partition
from .queries import Bypass, Joint, Marginal, Query, Sink, from_json
from .shard_file import Shard
from .stored_sweep import Sweep
from .sweep_layout import QueryInfo, ShardError

Array = NDArray[np.float64]
Chosen = Mapping[str, Sequence[int]]
OFF_BY = 1e-3
"""How far from 1 a cut of a stored sweep may sum up."""


def mean_flow(
    measures: RelevanceMeasure | Iterable[RelevanceMeasure],
    layers: Sequence[str],
    over: Any = "channel",
    *,
    groups: Chosen | None = None,
    top: int | None = TOP,
    min_mass: float | None = None,
    coverage: float | None = None,
    names: Mapping[str, Names] | None = None,
) -> FlowGraph:
    """The mean flow of all samples of one measure, or of several that come one after the other.

    Args:
        measures: A measure, or a generator of them, each of a batch.
        layers: As in :meth:`~nrm_plugin.RelevanceMeasure.flow`.
        over: As there.
        groups: Of some layers, by name, only these groups; the others are the rest. A joint matrix of a wide layer with
            one far away takes a pass for each group.
        top: Most groups of a layer that are shown, of largest absolute mean; None for all. All are computed, as which
            they are is known at the end.
        min_mass: As there, of the mean.
        coverage: As there, of the mean.
        names: As there.

    Returns:
        The graph; ``carried`` is None where it shows fewer groups than were computed.

    Raises:
        FlowError, InputError, EventError: As there; or no measure comes.

    Examples:
        >>> from nrm_plugin.dataset.glocal import mean_flow
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> batches = (RelevanceMeasure(net, torch.randn(8, 3), 1) for _ in range(3))
        >>> graph = mean_flow(batches, ["output", "1", "input"], top=2)
        >>> round(sum(graph.layers[1].masses) + graph.layers[1].rest + graph.layers[1].sink, 5)
        1.0
    """
    check_thresholds(top, min_mass, coverage)
    total: FlowGraph | None = None
    count = 0
    for mu in [measures] if isinstance(measures, RelevanceMeasure) else measures:
        graph = _batch_flow(mu, layers, over, groups or {}, names)
        total = graph if total is None else mixed([total, graph], [count, mu.batch])
        count += mu.batch
    if total is None:
        raise FlowError("there is no measure to take the mean of.")
    return _shown(total, top, min_mass, coverage)


def _shown(graph: FlowGraph, top: int | None, min_mass: float | None, coverage: float | None) -> FlowGraph:
    return graph if top is min_mass is coverage is None else graph.smaller(top, min_mass, coverage)


def _batch_flow(
    mu: RelevanceMeasure, layers: Sequence[str], over: Any, groups: Chosen, names: Mapping[str, Names] | None
) -> FlowGraph:
    known = {name: place for place, name in enumerate(mu.layers)}
    if all(layer in known for layer in layers):
        layers = sorted(layers, key=lambda layer: -known[layer])
    taps = [(layer, mu._tap(layer)) for layer in layers]
    asked: dict[str, Any] = {}
    wholes: dict[str, Partition] = {}
    for layer, tap in taps:
        asked[layer] = over.get(layer, "channel") if isinstance(over, Mapping) else over
        if layer in groups:
            whole = wholes[layer] = partition(tap, asked[layer], (names or {}).get(layer))
            _check_groups(layer, groups[layer], whole.count)
            asked[layer] = {str(group): whole.labels == group for group in groups[layer]}
    graph = flow_graph(_Mean(mu), taps, asked, top=None, names=names)
    shown = [
        _numbered(shown, groups[layer], wholes[layer]) if layer in groups else shown
        for layer, shown in zip(layers, graph.layers, strict=True)
    ]
    return replace(graph, layers=tuple(shown))


def _check_groups(layer: str, chosen: Sequence[int], count: int) -> None:
    if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= group < count for group in chosen):
        raise InputError(f"groups= of {layer!r} must be different numbers from 0 to {count - 1}, got {list(chosen)}.")


def _numbered(layer: FlowLayer, chosen: Sequence[int], whole: Partition) -> FlowLayer:
    """With the numbers and names that the groups have among all of the layer."""
    names = tuple(whole.names(group) for group in chosen)
    return replace(layer, groups=tuple(chosen), labels=names, others=whole.count - len(chosen))


class _Mean:
    """The mean of the measures of a batch, asked as if it were the measure of one sample.

    Args:
        mu: The measure.
    """

    batch = 1

    def __init__(self, mu: RelevanceMeasure) -> None:
        self.mu = mu

    def __call__(self, event: Event) -> Tensor:
        return self._mean(self.mu(event))

    def marginal(self, layer: Any, over: Any = None, *, joint: Any = None) -> Any:
        found = self.mu.marginal(layer, over=over, joint=joint)
        if isinstance(found, dict):
            return {name: self._mean(values) for name, values in found.items()}
        return self._mean(found)

    def joints(self, layers: Any, over: Any = "channel") -> list[Tensor]:
        return [self._mean(values) for values in self.mu.joints(layers, over)]

    def sink(self, layer: Any) -> Tensor:
        return self._mean(self.mu.sink(layer))

    def bypass(self, layer: Any) -> Tensor:
        return self._mean(self.mu.bypass(layer))

    @staticmethod
    def _mean(values: Tensor) -> Tensor:
        return values.double().mean(0, keepdim=True)


def mixed(graphs: Sequence[FlowGraph], weights: Sequence[float]) -> FlowGraph:
    """The weighted mean of graphs that show the same groups.

    Args:
        graphs: The graphs.
        weights: One for each, such as numbers of samples; they are divided by their sum.

    Raises:
        FlowError: No graphs, other groups, or weights that are negative or all zero.

    Examples:
        >>> from nrm_plugin.dataset.glocal import mixed
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(2, 3), 1)
        >>> graphs = [mu.flow(["1", "input"], top=None, sample=sample) for sample in range(2)]
        >>> mixed(graphs, [1, 1])
        FlowGraph(1: 4, input: 3)
    """
    if len(graphs) != len(weights) or not graphs or min(weights) < 0 or not sum(weights) > 0:
        raise FlowError(f"{len(graphs)} graphs take as many weights of at least 0, not all of them 0; got {weights}.")
    return _combined(graphs, [weight / sum(weights) for weight in weights])


def difference(first: FlowGraph, second: FlowGraph) -> FlowGraph:
    """What the first graph has more than the second: signed, and every cut sums to 0.

    Of mean flows of two groups of samples it tells which channels and edges the groups differ in. Ask both for all
    groups, ``top=None``, and the difference for those that differ most: ``difference(a, b).smaller(top=8)``.

    Raises:
        FlowError: They show other groups.

    Examples:
        >>> from nrm_plugin.dataset.glocal import difference
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> mu = RelevanceMeasure(net, torch.randn(2, 3), 1)
        >>> a, b = (mu.flow(["1", "input"], top=None, sample=sample) for sample in range(2))
        >>> abs(sum(node.mass for node in difference(a, b).nodes)) < 1e-5
        True
    """
    return _combined([first, second], [1.0, -1.0])


def _combined(graphs: Sequence[FlowGraph], factors: Sequence[float]) -> FlowGraph:
    first = graphs[0]
    shown = [[(layer.name, layer.groups, layer.others) for layer in graph.layers] for graph in graphs]
    if any(other != shown[0] for other in shown):
        raise FlowError(
            "graphs with other layers or groups cannot be combined, as the rest of each would be of other groups. "
            "Take all of them with top=None, and show fewer afterwards: graph.smaller(top=8)."
        )

    layers = [_combined_layer([graph.layers[at] for graph in graphs], factors) for at in range(len(first.layers))]
    joints = [_total([graph.joints[at] for graph in graphs], factors) for at in range(len(first.joints))]
    carried = [graph.carried for graph in graphs if graph.carried is not None]
    is_known = len(carried) == len(graphs)
    return FlowGraph(tuple(layers), tuple(joints), float(_total(carried, factors)) if is_known else None)


def _combined_layer(layers: Sequence[FlowLayer], factors: Sequence[float]) -> FlowLayer:
    rest, sink, bypass = (
        float(_total([getattr(layer, key) for layer in layers], factors)) for key in ("rest", "sink", "bypass")
    )
    masses = _total([layer.masses for layer in layers], factors)
    return replace(layers[0], masses=tuple(masses.tolist()), rest=rest, sink=sink, bypass=bypass)


def _total(values: Sequence[Any], factors: Sequence[float]) -> Array:
    found: Array = np.tensordot(np.asarray(factors), np.asarray(values, dtype=float), 1)
    return found


# -- of a sweep -----------------------------------------------------------------------------------------------------


def flow_queries(layers: Sequence[str], over: Mapping[str, Any] | None = None) -> list[Query]:
    """What a sweep must ask so that :func:`flow_of_sweep` can draw its flow.

    Args:
        layers: From the output down.
        over: Groups of some layers, as in ``Marginal``; the others have channels.

    Examples:
        >>> from nrm_plugin.dataset.glocal import flow_queries
        >>> [query.name for query in flow_queries(["output", "input"])][:3]
        ['marginal(output)', 'sink(output)', 'bypass(output)']
    """
    of = {layer: (over or {}).get(layer, "channel") for layer in layers}
    found: list[Query] = []
    for layer in layers:
        found += [Marginal(layer, over=of[layer]), Sink(layer), Bypass(layer)]
    return [*found, *(Joint(upper, lower, over=(of[upper], of[lower])) for upper, lower in pairwise(layers))]


def flow_of_sweep(
    sweep: Sweep | str | os.PathLike[str],
    layers: Sequence[str],
    target: int | None = None,
    samples: Iterable[int] | None = None,
    *,
    top: int | None = TOP,
    min_mass: float | None = None,
    coverage: float | None = None,
    names: Mapping[str, Names] | None = None,
) -> FlowGraph:
    """The mean flow of samples of a sweep; no model is needed.

    The sweep asked for the marginals, sink and bypass of each layer and for the joint relevance of each two
    consecutive ones: :func:`flow_queries` lists these. Walks that leave a layer's groups for none of the next are what
    the marginals have more than the joint relevance.

    Args:
        sweep: The sweep, or its folder.
        layers: From the output down.
        target: Only samples of which this was explained.
        samples: Only these.
        top: As in :func:`mean_flow`.
        min_mass: As there.
        coverage: As there.
        names: As there.

    Raises:
        FlowError: The sweep lacks a query or a sample, or its layers do not sum up to 1.
        SweepError: There is no sweep, or a file of it is damaged.
    """
    check_thresholds(top, min_mass, coverage)
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.open(sweep)
    if not layers or len(set(layers)) < len(layers):
        raise FlowError(f"a flow needs different layers, from the output down; got {list(layers)}.")
    asked = _asked(sweep, layers)
    wanted = None if samples is None else np.unique(np.fromiter(samples, np.int64))
    sums = _Sums({info.name: info.groups or () for infos in asked.values() for info in infos})
    for shard in sweep.shards:
        try:
            sums.add(shard, target, wanted)
        except ShardError:
            if sweep.on_error == "raise":
                raise
    if not sums.count or (wanted is not None and target is None and sums.count < len(wanted)):
        within = "" if target is None else f" with target {target}"
        raise FlowError(f"the sweep has {sums.count} of the samples{within} that were asked for.")
    found = [_layer(layer, sums, asked[layer], (names or {}).get(layer)) for layer in layers]
    pairs = (asked[pair][0].name for pair in pairwise(layers))
    joints = tuple(_joint(up, low, sums.mean(name)) for (up, low), name in zip(pairwise(found), pairs, strict=True))
    return _shown(FlowGraph(tuple(found), joints), top, min_mass, coverage)


def _asked(sweep: Sweep, layers: Sequence[str]) -> dict[Any, list[QueryInfo]]:
    """The queries of each layer, and of each pair of layers."""
    found: dict[Any, list[QueryInfo]] = {}
    missing: list[str] = []

    def of(kind: str, about: tuple[str, ...], over: Any = None) -> QueryInfo | None:
        for info in sweep.queries.values():
            fits = info.kind == kind and info.layers == about and info.groups is not None
            plain = all(info.spec.get(key) is None for key in ("joint", "given"))
            if fits and plain and (over is None or _over(info) == over):
                return info
        missing.append(f"{kind}({', '.join(map(repr, about))})")
        return None

    for layer in layers:
        found[layer] = [info for kind in ("Marginal", "Sink", "Bypass") if (info := of(kind, (layer,))) is not None]
    for pair in pairwise(layers) if not missing else ():
        over = tuple(_over(found[layer][0])[0] for layer in pair)
        found[pair] = [info] if (info := of("Joint", pair, over)) is not None else []
    if missing:
        raise FlowError(
            f"the sweep has no {' and no '.join(missing)}, with the same groups. Sweep with "
            f"queries=flow_queries({list(layers)!r}), the layers from the output down."
        )
    return found


def _over(info: QueryInfo) -> tuple[Any, ...]:
    over = getattr(from_json(info.spec), "over")  # noqa: B009  (marginals and joints have it, queries need not)
    return over if isinstance(over, tuple) else (over,) * len(info.layers)


class _Sums:
    """Sums over samples of the values of some queries, shard by shard.

    Args:
        groups: Shape of each query, by name.
    """

    def __init__(self, groups: Mapping[str, tuple[int, ...]]) -> None:
        self._totals = {name: np.zeros(shape) for name, shape in groups.items()}
        self.count = 0

    def add(self, shard: Shard, target: int | None, wanted: NDArray[np.int64] | None) -> None:
        counts, parts = set(), {}
        for name, total in self._totals.items():
            rows = shard.rows(name, columns=["sample", "target", "group", "lower", "value"])
            sample, of, group, lower, value = (rows[key].to_numpy() for key in rows.column_names)
            keep = np.ones(len(value), bool) if target is None else of == target
            if wanted is not None:
                keep &= np.isin(sample, wanted)
            width = total.shape[1] if total.ndim == 2 else 1
            key = group[keep].astype(np.int64).clip(0) * width + lower[keep].clip(0)
            parts[name] = np.bincount(key, value[keep].astype(float), total.size).reshape(total.shape)
            counts.add(int(keep.sum()) // total.size)
        if len(counts) != 1:
            raise ShardError(f"{shard.path} has rows of other samples for different queries.")
        for name, part in parts.items():
            self._totals[name] += part
        self.count += counts.pop()

    def mean(self, name: str) -> Array:
        found: Array = self._totals[name] / self.count
        return found


def _layer(name: str, sums: _Sums, asked: Sequence[QueryInfo], names: Names | None) -> FlowLayer:
    masses, sink, bypass = (sums.mean(info.name) for info in asked)
    total = float(masses.sum() + sink + bypass)
    if not abs(total - 1) < OFF_BY:
        raise FlowError(
            f"mass, sink and bypass of {name!r} sum up to {total:.6f} and not to 1: its groups in the sweep leave out "
            "neurons, or count some twice."
        )
    given = dict(enumerate(names)) if names is not None and not isinstance(names, Mapping) else names or {}
    labels = tuple(given.get(group, str(group)) for group in range(len(masses)))
    groups = tuple(range(len(masses)))
    return FlowLayer(name, groups, labels, tuple(masses.tolist()), 0.0, 0, float(sink), float(bypass))


def _joint(upper: FlowLayer, lower: FlowLayer, both: Array) -> Array:
    """``(K_upper + 2, K_lower + 2)``: what the marginals have more than the joint relevance is off the other layer."""
    found = np.zeros((len(upper.groups) + 2, len(lower.groups) + 2))
    found[:-2, :-2] = both
    found[:-2, -1] = np.array(upper.masses) - both.sum(1)
    found[-1, :-2] = np.array(lower.masses) - both.sum(0)
    found[-1, -1] = upper.sink + upper.bypass - found[-1, :-2].sum()
    return found


__all__ = ["difference", "flow_of_sweep", "flow_queries", "mean_flow", "mixed"]
