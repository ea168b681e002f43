"""Mean flow over the samples of a stored sweep, without the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import InputError
from ..measure.dependence import group_sums
from ..measure.flow_graph import TOP, FlowError, FlowGraph, FlowLayer, check_thresholds
from ..measure.layer_groups import Groups
from ..measure.partitions import Names
from .queries import Bypass, Joint, Marginal, Query, Sink
from .stored_sweep import Sweep
from .sweep_layout import QueryInfo
from .sweep_sums import Sums, flow_queries_of, sums_of

Array = NDArray[np.float64]
TOLERANCE = 1e-3
"""Maximum deviation of the sum over a cut from 1."""


def flow_queries(layers: Sequence[str], over: Mapping[str, Any] | None = None) -> list[Query]:
    """Returns the queries that a sweep must contain for :func:`flow_of_sweep`.

    Args:
        layers: Names of the layers, from the output to the input.
        over: Groups keyed by layer, as in ``Marginal``. Defaults to channels.

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
    groups: Groups | None = None,
) -> FlowGraph:
    """Computes the mean flow over samples of a sweep, without the model.

    The sweep must contain the marginals, sink and bypass of each layer, and the joint relevance of consecutive layers;
    see :func:`flow_queries`. The mass of the walks that cross a group of one layer but no group of the next is computed
    as the marginal minus the sum of joint relevance.

    Args:
        sweep: The sweep, or its folder.
        layers: Names of the layers, from the output to the input.
        target: Only use samples for which this class was explained, or None for all samples.
        samples: Indices of the samples to use, or None for all samples.
        top: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.
        min_mass: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.
        coverage: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.
        names: As in :func:`~nrm_plugin.dataset.glocal.mean_flow`.
        groups: Groups of the stored channels from :func:`~nrm_plugin.find_groups`, which apply to all layers that they
            contain.

    Raises:
        InputError: If the members of the groups differ from the members in the sweep.
        FlowError: If a query or sample is missing or if a cut does not sum to 1.
        SweepError: If the folder does not contain a sweep or if a file is damaged.
    """
    check_thresholds(top, min_mass, coverage)
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.open(sweep)
    if not layers or len(set(layers)) < len(layers):
        raise FlowError(f"a flow needs distinct layers, from the output to the input; got {list(layers)}.")
    queries = flow_queries_of(sweep, layers)
    selected = None if samples is None else np.unique(np.fromiter(samples, np.int64))
    sums = sums_of(sweep, [info for infos in queries.values() for info in infos], target, selected)
    if not sums.count or (selected is not None and target is None and sums.count < len(selected)):
        suffix = "" if target is None else f" with target {target}"
        raise FlowError(f"the sweep has {sums.count} of the requested samples{suffix}.")
    total = sums.total(queries[layers[0]]) if "against" in sweep.manifest.settings else 1.0
    flow_layers = [_layer(layer, sums, queries[layer], (names or {}).get(layer), total) for layer in layers]
    joints = tuple(
        _joint(upper, lower, sums.mean(queries[upper.name, lower.name][0].name))
        for upper, lower in pairwise(flow_layers)
    )
    graph = FlowGraph(tuple(flow_layers), joints)
    return reduced(graph if groups is None else grouped(graph, groups), top, min_mass, coverage)


def grouped(graph: FlowGraph, groups: Groups) -> FlowGraph:
    """Aggregates a flow over single channels to a flow over groups of channels.

    Raises:
        InputError: If the members of the groups differ from the nodes of a layer.
    """
    layers, sums = [], []
    for layer in graph.layers:
        count = len(layer.groups)
        if layer.name not in groups.layers:
            layers.append(layer)
            sums.append(np.eye(count + 2))
            continue
        place = groups.layers.index(layer.name)
        labels, names = groups.labels[place].numpy(), groups.names[place]
        if len(labels) != count:
            raise InputError(f"the groups of {layer.name!r} have {len(labels)} members, but the sweep stores {count}.")
        ends = np.array([len(names), len(names) + 1])
        members = group_sums(np.eye(count + 2), np.concatenate([labels, ends]))
        masses = tuple((members[:-2, :-2] @ np.array(layer.masses)).tolist())
        layers.append(replace(layer, groups=tuple(range(len(names))), labels=names, masses=masses))
        sums.append(members)
    pairs = zip(graph.joints, pairwise(sums), strict=True)
    joints = tuple(up @ joint @ down.T for joint, (up, down) in pairs)
    return FlowGraph(tuple(layers), joints, origin=groups.origin)


def reduced(graph: FlowGraph, top: int | None, min_mass: float | None, coverage: float | None) -> FlowGraph:
    """Applies :meth:`FlowGraph.smaller`. Returns the graph unchanged if there are no thresholds."""
    return graph if top is min_mass is coverage is None else graph.smaller(top, min_mass, coverage)


def _layer(name: str, sums: Sums, queries: Sequence[QueryInfo], names: Names | None, expected: float) -> FlowLayer:
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
    """Extends a joint matrix to shape ``(K_upper + 2, K_lower + 2)`` with an empty rest and all other walks."""
    matrix = np.zeros((len(upper.groups) + 2, len(lower.groups) + 2))
    matrix[:-2, :-2] = joint
    matrix[:-2, -1] = np.array(upper.masses) - joint.sum(1)
    matrix[-1, :-2] = np.array(lower.masses) - joint.sum(0)
    matrix[-1, -1] = upper.sink + upper.bypass - matrix[-1, :-2].sum()
    return matrix


__all__ = ["flow_of_sweep", "flow_queries", "reduced"]
