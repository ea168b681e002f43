"""Sums of query results over the samples of a stored sweep for flows and the search for groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..measure.flow_graph import FlowError
from ..measure.mean_joints import MeanJoints
from .queries import Labels, from_json
from .shard_file import Shard
from .sweep_layout import OnError, QueryInfo, ShardError

Array = NDArray[np.float64]


class StoredQueries(Protocol):
    """Protocol for the methods of :class:`~nrm_plugin.dataset.Sweep` that are used to compute sums."""

    on_error: OnError

    @property
    def queries(self) -> dict[str, QueryInfo]: ...
    @property
    def shards(self) -> list[Shard]: ...


def sums_of(
    sweep: StoredQueries, infos: Sequence[QueryInfo], target: int | None, selected: NDArray[np.int64] | None
) -> Sums:
    """Sums query results over samples.

    Args:
        sweep: Sweep whose results are summed.
        infos: Manifest entries of the queries.
        target: Only use samples for which this class was explained, or None for all samples.
        selected: Indices of the samples to use, or None for all samples.
    """
    sums = Sums({info.name: info.groups or () for info in infos})
    for shard in sweep.shards:
        try:
            sums.add(shard, target, selected)
        except ShardError:
            if sweep.on_error == "raise":
                raise
    return sums


def joints_of_sweep(sweep: StoredQueries, layers: Sequence[str], target: int | None = None) -> MeanJoints:
    """Computes the mean joint relevance of consecutive layers over the samples of a sweep.

    Args:
        sweep: The sweep, with the queries of :func:`~nrm_plugin.dataset.glocal.flow_queries`.
        layers: Names of the layers, from the output to the input.
        target: Only use samples for which this class was explained, or None for all samples.

    Raises:
        FlowError: If a query is missing or if there are no samples.
    """
    queries = flow_queries_of(sweep, layers)
    sums = sums_of(sweep, [info for infos in queries.values() for info in infos], target, None)
    if not sums.count:
        raise FlowError("the sweep has no samples" + ("." if target is None else f" with target {target}."))
    joints = tuple(sums.mean(queries[pair][0].name) for pair in pairwise(layers))
    masses = tuple(sums.mean(queries[layer][0].name)[None] for layer in layers)
    overs = [_over(queries[layer][0])[0] for layer in layers]
    kinds = tuple(over.tensor if isinstance(over, Labels) else over for over in overs)
    return MeanJoints(tuple(layers), kinds, joints, masses, sums.count)


def flow_queries_of(sweep: StoredQueries, layers: Sequence[str]) -> dict[Any, list[QueryInfo]]:
    """Returns the queries of each layer and of each pair of consecutive layers.

    Raises:
        FlowError: If a query is missing.
    """
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


class Sums:
    """Sums of query results over samples, accumulated shard by shard.

    Args:
        groups: Result shape of each query, keyed by query name.
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
        """Returns the sum of mean query results over all groups."""
        return sum(float(self.mean(info.name).sum()) for info in queries)
