r"""Reference examples: the samples in which a group has the largest relevance or activation.

.. math:: \text{references}(g) = \operatorname{top}_k \mu_n(g)

For the channels of a layer, this is relevance maximization (Achtibat et al., 2023). References are computed in one pass
over the data by :func:`~nrm_plugin.dataset.example_search.find_references`, or read from a stored sweep by
:func:`references`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import NRMError, extra
from .ranking import NO_SAMPLE, TopSamples
from .stored_sweep import Sweep
from .sweep_layout import QueryInfo

if TYPE_CHECKING:
    import pyarrow as pa

By = Literal["relevance", "activation"]
EVENTS = "events"
"""Name under which the references of events are stored. Events do not belong to a layer."""
FORMAT = "nrm-plugin references 1"
FIELDS = ("values", "samples", "targets", "positions")


class ReferencesError(NRMError, ValueError):
    """Raised if reference examples cannot be computed, read or plotted."""


@dataclass(frozen=True, eq=False)
class References:
    """Reference examples for each group of a layer, in decreasing order of value.

    Attributes:
        name: Name of the layer, or of the query in a sweep.
        by: ``"relevance"`` or ``"activation"``.
        groups: Group of each row: a channel index or an event name.
        samples: Indices in the dataset, of shape ``(K, k)``, or -1 in empty slots.
        values: Relevance or activation, of shape ``(K, k)``, or NaN in empty slots.
        targets: Explained classes, of shape ``(K, k)``, or -1 if unknown.
        positions: Position of the largest value within the group, as a flat (row-major) index, of shape ``(K, k)``, or
            -1 if unknown.
        target: Explained class of all references, or None if they are not restricted to a class.
        layer: Layer of the channels, if ``name`` is the name of a query.
    """

    name: str
    by: By
    groups: tuple[int | str, ...]
    samples: Tensor
    values: Tensor
    targets: Tensor
    positions: Tensor
    target: int | None = None
    layer: str | None = None

    @classmethod
    def of_ranking(
        cls, name: str, by: By, groups: Sequence[int | str], top: TopSamples, target: int | None
    ) -> References:
        """Converts a ranking to references."""
        is_empty = top.samples == NO_SAMPLE
        return cls(
            name,
            by,
            tuple(groups),
            top.samples.masked_fill(is_empty, -1),
            top.values.masked_fill(is_empty, torch.nan),
            top.targets.long(),
            top.positions.long(),
            target,
        )

    def row(self, group: int | str) -> int:
        """Returns the row index of a group.

        Raises:
            ReferencesError: If the group is unknown.
        """
        if group not in self.groups:
            raise ReferencesError(
                f"no group {group!r} in the references of {self.name!r}, which have {len(self.groups)}, "
                f"{self.groups[0]!r} to {self.groups[-1]!r}."
            )
        return self.groups.index(group)

    def of(self, group: int | str) -> list[int]:
        """Returns the indices of the reference samples of a group.

        They are sorted by the relevance or activation of the group, from largest to smallest.

        Raises:
            ReferencesError: If the group is unknown.

        Examples:
            >>> from nrm_plugin.dataset.example_search import find_references
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> found = find_references(net, [(torch.randn(8, 3), torch.ones(8, dtype=torch.long))], ["0"], k=2)
            >>> references_of_layer = found.of("0")
            >>> len(references_of_layer.of(3))
            2
        """
        return [sample for sample in self.samples[self.row(group)].tolist() if sample >= 0]

    def __repr__(self) -> str:
        within = "" if self.target is None else f", target {self.target}"
        return f"References({self.name!r} by {self.by}, {len(self.groups)} groups × {self.samples.shape[1]}{within})"


class FoundReferences:
    """Reference samples found for several layers and events, both over all samples and for each target.

    Args:
        groups: The ranked channels of each layer, or the names of the events, keyed by layer name or :data:`EVENTS`.
        rankings: Rankings, keyed by ``(name, by, target)``. If the target is None, all samples are ranked.
        count: Number of ranked samples.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int | str]],
        rankings: Mapping[tuple[str, By, int | None], TopSamples],
        count: int,
    ) -> None:
        self._groups, self._rankings, self.count = dict(groups), dict(rankings), count

    def __repr__(self) -> str:
        return f"FoundReferences({self._names()}; {self.count} samples, {len(self.targets)} targets)"

    def _names(self) -> str:
        return ", ".join(f"{name!r} by {by}" for name, by, target in self._rankings if target is None)

    @property
    def targets(self) -> list[int]:
        """The targets for which samples were ranked separately."""
        return sorted({target for _, _, target in self._rankings if target is not None})

    def of(self, name: str = EVENTS, by: By = "relevance", target: int | None = None) -> References:
        """Returns the references found for a layer or for the events.

        Args:
            name: Name of the layer.
            by: ``"relevance"`` or ``"activation"``.
            target: Only return samples for which this class was explained. Defaults to all samples.

        Raises:
            ReferencesError: If the layer was not ranked or there are no samples with this target.
        """
        top = self._rankings.get((name, by, target))
        if top is not None:
            return References.of_ranking(name, by, self._groups[name], top, target)
        if (name, by, None) in self._rankings:
            known = ", ".join(map(str, self.targets)) or "none, because find_references had per_target=False"
            raise ReferencesError(f"no references of target {target!r}. Targets: {known}.")
        raise ReferencesError(f"{name!r} by {by} was not ranked; these were: {self._names()}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Saves all references as a safetensors file.

        Examples:
            >>> from nrm_plugin.dataset.example_search import find_references
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> references = find_references(net, [(torch.randn(8, 3), torch.ones(8, dtype=torch.long))], ["0"], k=2)
            >>> references.save("references.safetensors")
            >>> FoundReferences.load("references.safetensors").of("0").of(3) == references.of("0").of(3)
            True
        """
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        for (name, by, target), top in self._rankings.items():
            for field, part in zip(FIELDS, top.parts, strict=True):
                tensors[f"{len(entries)}.{field}"] = part.contiguous()
            entries.append({"name": name, "by": by, "target": target})
        metadata = {"format": FORMAT, "entries": entries, "groups": self._groups, "count": self.count}
        save_file(tensors, Path(path), {"nrm-plugin": json.dumps(metadata)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FoundReferences:
        """Loads references from a file written by :meth:`save`.

        Raises:
            ReferencesError: If the file was not written by :meth:`save`.
        """
        try:
            with safe_open(Path(path), "pt") as file:
                metadata = json.loads((file.metadata() or {})["nrm-plugin"])
                if metadata["format"] != FORMAT:
                    raise ValueError(f"its format is {metadata['format']!r}")
                rankings = {
                    (entry["name"], entry["by"], entry["target"]): TopSamples(
                        *(file.get_tensor(f"{number}.{field}") for field in FIELDS)
                    )
                    for number, entry in enumerate(metadata["entries"])
                }
                return cls(metadata["groups"], rankings, metadata["count"])
        except FileNotFoundError:
            raise
        except Exception as error:  # damaged files raise errors of safetensors, json and Python
            raise ReferencesError(f"{path} is not a file of FoundReferences.save(): {error}.") from error


# -- from a sweep ---------------------------------------------------------------------------------------------------

KINDS: dict[By, tuple[str, ...]] = {
    "relevance": ("Marginal", "Joint", "EventMass", "Conditional", "Sink", "Bypass", "Variation"),
    "activation": ("Activation",),
}
"""Query types that can rank samples. A layer name selects a query of the first type."""

COLUMNS = ("sample", "target", "group", "lower", "value")
"""Columns of a sweep that rankings require."""


def references(
    sweep: Sweep | str | os.PathLike[str],
    query: str,
    group: int | tuple[int, int] | None = None,
    k: int = 9,
    by: By = "relevance",
    target: int | None = None,
) -> References:
    """Reads reference examples from a complete sweep, without the model.

    Args:
        sweep: The sweep, or the path of its folder.
        query: Name of a query or a layer.
        group: A group, or a pair of an upper and a lower group for joint relevance. Defaults to all groups.
        k: Number of samples per group.
        by: ``"relevance"``, or ``"activation"`` for activation queries.
        target: Only use samples for which this class was explained, or None for all samples.

    Returns:
        The references, with ties broken by sample index. Their positions are known if the sweep has a ``Peak`` query
        for the layer.

    Raises:
        ReferencesError: If the query, group or target is unknown or if the query is of type ``Maps``, which has no
            rows.
        SweepError: If the folder does not contain a sweep or if a file is damaged.
    """
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.open(sweep)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ReferencesError(f"k={k!r} must be an integer of at least 1.")
    info = _ranked_query(sweep, query, by)
    is_joint = len(info.groups or ()) == 2
    width = info.groups[-1] if info.groups and is_joint else 1
    columns = _matrices(_rows(sweep, info, group, k, target), width)
    values, targets = columns["value"], columns["target"]
    is_ranked = values.isfinite() & (targets == (targets if target is None else target))
    if not bool(is_ranked.any()):
        suffix = "" if target is None else f" with target {target}"
        raise ReferencesError(f"{info.name!r} has no values of samples{suffix}.")
    keys, top = columns["key"][is_ranked.any(1), 0].tolist(), TopSamples.empty((len(values), k), values.dtype)
    batch = TopSamples(values, columns["sample"], targets, torch.full_like(targets, -1)).where(is_ranked)
    names: list[int | str] = keys if info.groups else [info.name]
    if is_joint:
        names = [f"{key // width},{key % width}" for key in keys]
    ranked = References.of_ranking(info.name, by, names, top.merged(batch)[is_ranked.any(1)], target)
    return _with_positions(sweep, info, ranked, group) if is_of_channels(info) else ranked


def _ranked_query(sweep: Sweep, name: str, by: By) -> QueryInfo:
    if by not in KINDS:
        raise ReferencesError(f"by={by!r} is unknown; choose 'relevance' or 'activation'.")
    candidates = [query for query in sweep.queries.values() if query.kind in KINDS[by]]
    return query_named(name, candidates, KINDS[by][0], f"rows of {by}")


def query_named(name: str, candidates: Sequence[QueryInfo], kind: str, what: str) -> QueryInfo:
    """Returns the query of a given name or, for a layer name, the query of type ``kind`` without an event.

    Args:
        name: Name of a query or layer.
        candidates: Queries of a sweep.
        kind: Query type selected by a layer name.
        what: Description of the candidates, for the error message.

    Raises:
        ReferencesError: If none of the candidates matches.
    """
    plain = [query for query in candidates if query.kind == kind and query.layers == (name,) and not query.has_event]
    named = [query for query in candidates if query.name == name] or plain
    if not named:
        known = ", ".join(repr(query.name) for query in candidates) or "none"
        raise ReferencesError(f"the sweep has no query {name!r} with {what}. Queries with {what}: {known}.")
    return named[0]


def is_of_channels(query: QueryInfo) -> bool:
    """Returns True if a query has no event and its groups are the channels of a layer."""
    by_channel = query.spec.get("over", "channel") == "channel"
    return query.kind in ("Marginal", "Activation") and by_channel and not query.has_event


def _rows(sweep: Sweep, info: QueryInfo, group: int | tuple[int, int] | None, k: int, target: int | None) -> pa.Table:
    """Reads the rows to rank, with the same number of rows for each group."""
    sizes = info.groups or ()
    if group is None or (isinstance(group, int) and len(sizes) == 2):
        return sweep.rows(info.name, group, COLUMNS)
    indices = group if isinstance(group, tuple) else (group,)
    if len(sizes) != len(indices) or not all(0 <= index < size for index, size in zip(indices, sizes, strict=True)):
        counts = " × ".join(map(str, sizes)) or "no"
        raise ReferencesError(f"{info.name!r} has {counts} groups, counted from 0; got {group}.")
    if isinstance(group, int):
        return sweep.top(info.name, group, k, target=target)
    rows = sweep.rows(info.name, group[0], COLUMNS)
    return rows.filter(extra("pyarrow.compute", "dataset").equal(rows["lower"], group[1]))


def _matrices(rows: pa.Table, width: int = 1) -> dict[str, Tensor]:
    """Reshapes each column to shape ``(groups, samples)`` and adds ``key``, the flat index of a pair of groups."""
    columns = {name: rows[name].to_numpy() for name in COLUMNS}
    key = columns["group"].astype(np.int64).clip(0) * width + columns["lower"].clip(0)
    order, count = np.argsort(key, kind="stable"), len(np.unique(key))
    parts = {name: torch.from_numpy(values[order]) for name, values in {**columns, "key": key}.items()}
    return {name: part.reshape(count, len(part) // max(1, count)) for name, part in parts.items()}


def _with_positions(
    sweep: Sweep, info: QueryInfo, ranked: References, group: int | tuple[int, int] | None
) -> References:
    """Adds the layer to references. Also adds the position of each largest value if the sweep has a ``Peak`` query."""
    ranked = replace(ranked, layer=info.layers[0])
    peaks = [query for query in sweep.queries.values() if query.kind == "Peak" and query.layers == info.layers
             and query.spec.get("of") == ranked.by]  # fmt: skip
    rows = sweep.rows(peaks[0].name, group if isinstance(group, int) else None, COLUMNS) if peaks else ()
    if not len(rows):
        return ranked
    columns = _matrices(rows)
    row = torch.searchsorted(columns["key"][:, 0].contiguous(), torch.tensor(ranked.groups))
    samples = columns["sample"][0].contiguous()  # increasing, and the same for each group
    column = torch.searchsorted(samples, ranked.samples).clamp(max=len(samples) - 1)
    positions = columns["value"][row[:, None], column].long()
    return replace(ranked, positions=positions.masked_fill(samples[column] != ranked.samples, -1))


__all__ = [
    "EVENTS",
    "By",
    "FoundReferences",
    "References",
    "ReferencesError",
    "is_of_channels",
    "query_named",
    "references",
]
