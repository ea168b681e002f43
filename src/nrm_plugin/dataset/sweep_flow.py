"""The mean flow of the samples of a stored sweep, without the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..measure.flow_graph import TOP, FlowError, FlowGraph, FlowLayer, check_thresholds
from ..measure.partitions import Names
from .queries import Bypass, Joint, Marginal, Query, Sink, from_json
from .shard_file import Shard
from .stored_sweep import Sweep
from .sweep_layout import QueryInfo, ShardError

Array = NDArray[np.float64]
TOLERANCE = 1e-3
"""Largest deviation from 1 in the sum of a cut of a stored sweep."""


def flow_queries(layers: Sequence[str], over: Mapping[str, Any] | None = None) -> list[Query]:
    """Returns the queries that a sweep needs for :func:`flow_of_sweep`.

    Args:
        layers: The layers, from the output to the input.
        over: Groups of layers, as in ``Marginal``; by default channels.

    Examples:
        >>> from nrm_plugin.dataset.glocal import flow_queries
        >>> [query.name for query in flow_queries(["output", "input"])][:3]
        ['marginal(output)', 'sink(output)', 'bypass(output)']
    """
    groups = {layer: (over or {}).get(layer, "channel") for layer in layers}
    queries: list[Query] = []
    for layer in layers:
        queries += [Marginal(layer, over=groups[layer]), Sink(layer), Bypass(layer)]
    pairs = pairwise(layers)
    return [*queries, *(Joint(upper, lower, over=(groups[upper], groups[lower])) for upper, lower in pairs)]


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
    """Computes the mean flow of samples of a sweep, without the model.

    The sweep needs the marginals, sink and bypass of each layer and the joint relevance of consecutive layers
    (:func:`flow_queries`). The mass of walks through a group of one layer and no group of the next layer is the
    marginal minus the sum of the joint relevance.

    Args:
        sweep: The sweep, or its folder.
        layers: The layers, from the output to the input.
        target: Restriction to explanations of this class.
        samples: Restriction to these samples.
        top: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.
        min_mass: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.
        coverage: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.
        names: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.

    Raises:
        FlowError: If a query or sample is missing, or a cut does not sum to 1.
        SweepError: If the folder holds no sweep, or a file is damaged.
    """
    check_thresholds(top, min_mass, coverage)
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.open(sweep)
    if not layers or len(set(layers)) < len(layers):
        raise FlowError(f"a flow needs distinct layers, from the output to the input; got {list(layers)}.")
    queries = _flow_queries_of(sweep, layers)
    selected = None if samples is None else np.unique(np.fromiter(samples, np.int64))
    sums = _Sums({info.name: info.groups or () for infos in queries.values() for info in infos})
    for shard in sweep.shards:
        try:
            sums.add(shard, target, selected)
        except ShardError:
            if sweep.on_error == "raise":
                raise
    if not sums.count or (selected is not None and target is None and sums.count < len(selected)):
        suffix = "" if target is None else f" with target {target}"
        raise FlowError(f"the sweep has {sums.count} of the requested samples{suffix}.")
    total = sums.total(queries[layers[0]]) if "against" in sweep.manifest.settings else 1.0
    flow_layers = [_layer(layer, sums, queries[layer], (names or {}).get(layer), total) for layer in layers]
    joints = tuple(
        _joint(upper, lower, sums.mean(queries[upper.name, lower.name][0].name))
        for upper, lower in pairwise(flow_layers)
    )
    return reduced(FlowGraph(tuple(flow_layers), joints), top, min_mass, coverage)


def reduced(graph: FlowGraph, top: int | None, min_mass: float | None, coverage: float | None) -> FlowGraph:
    """Returns the graph with fewer groups, as in :meth:`FlowGraph.smaller`; unchanged without thresholds."""
    return graph if top is min_mass is coverage is None else graph.smaller(top, min_mass, coverage)


def _flow_queries_of(sweep: Sweep, layers: Sequence[str]) -> dict[Any, list[QueryInfo]]:
    """Returns the queries of each layer, and of each pair of consecutive layers."""
    queries: dict[Any, list[QueryInfo]] = {}
    missing: list[str] = []

    def matching(kind: str, names: tuple[str, ...], over: Any = None) -> list[QueryInfo]:
        for info in sweep.queries.values():
            is_plain = info.groups is not None and not info.has_event
            if (info.kind, info.layers) == (kind, names) and is_plain and (over is None or over == _over(info)):
                return [info]
        missing.append(f"{kind}({', '.join(map(repr, names))})")
        return []

    for layer in layers:
        queries[layer] = [info for kind in ("Marginal", "Sink", "Bypass") for info in matching(kind, (layer,))]
    for pair in pairwise(layers) if not missing else ():
        queries[pair] = matching("Joint", pair, tuple(_over(queries[layer][0])[0] for layer in pair))
    if missing:
        raise FlowError(
            f"the sweep has no {' and no '.join(missing)}, with the same groups. Sweep with "
            f"queries=flow_queries({list(layers)!r}), the layers from the output to the input."
        )
    return queries


def _over(info: QueryInfo) -> tuple[Any, ...]:
    over = getattr(from_json(info.spec), "over")  # noqa: B009  (marginals and joints have it, queries need not)
    return over if isinstance(over, tuple) else (over,) * len(info.layers)


class _Sums:
    """Sums over samples of the values of queries, shard by shard.

    Args:
        groups: Shape of each query, by name.
    """

    def __init__(self, groups: Mapping[str, tuple[int, ...]]) -> None:
        self._totals = {name: np.zeros(shape) for name, shape in groups.items()}
        self.count = 0

    def add(self, shard: Shard, target: int | None, selected: NDArray[np.int64] | None) -> None:
        counts, parts = set(), {}
        for name, total in self._totals.items():
            rows = shard.rows(name, columns=["sample", "target", "group", "lower", "value"])
            sample, targets, group, lower, value = (rows[key].to_numpy() for key in rows.column_names)
            keep = np.ones(len(value), bool) if target is None else targets == target
            if selected is not None:
                keep &= np.isin(sample, selected)
            width = total.shape[1] if total.ndim == 2 else 1
            key = group[keep].astype(np.int64).clip(0) * width + lower[keep].clip(0)
            parts[name] = np.bincount(key, value[keep].astype(float), total.size).reshape(total.shape)
            counts.add(int(keep.sum()) // total.size)
        if len(counts) != 1:
            raise ShardError(f"{shard.path} has rows of different samples for different queries.")
        for name, part in parts.items():
            self._totals[name] += part
        self.count += counts.pop()

    def mean(self, name: str) -> Array:
        mean: Array = self._totals[name] / self.count
        return mean

    def total(self, queries: Sequence[QueryInfo]) -> float:
        """Returns the sum of the means of some queries."""
        return sum(float(self.mean(info.name).sum()) for info in queries)


def _layer(name: str, sums: _Sums, queries: Sequence[QueryInfo], names: Names | None, expected: float) -> FlowLayer:
    masses, sink, bypass = (sums.mean(info.name) for info in queries)
    total = sums.total(queries)
    if not (abs(total - expected) < TOLERANCE and abs(total) < 1 + TOLERANCE):
        raise FlowError(
            f"mass, sink and bypass of {name!r} sum to {total:.6f} instead of {expected:.6g}: its groups in the sweep "
            "are not a partition of its neurons."
        )
    given = dict(enumerate(names)) if names is not None and not isinstance(names, Mapping) else names or {}
    labels = tuple(given.get(group, str(group)) for group in range(len(masses)))
    groups = tuple(range(len(masses)))
    return FlowLayer(name, groups, labels, tuple(masses.tolist()), 0.0, 0, float(sink), float(bypass))


def _joint(upper: FlowLayer, lower: FlowLayer, joint: Array) -> Array:
    """Extends joint relevance to ``(K_upper + 2, K_lower + 2)`` by marginals minus sums, for walks outside a layer."""
    matrix = np.zeros((len(upper.groups) + 2, len(lower.groups) + 2))
    matrix[:-2, :-2] = joint
    matrix[:-2, -1] = np.array(upper.masses) - joint.sum(1)
    matrix[-1, :-2] = np.array(lower.masses) - joint.sum(0)
    matrix[-1, -1] = upper.sink + upper.bypass - matrix[-1, :-2].sum()
    return matrix


__all__ = ["flow_of_sweep", "flow_queries", "reduced"]
