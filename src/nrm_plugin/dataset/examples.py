r"""Reference examples: the samples in which a group carries the most relevance, or is most active.

.. math:: \text{references}(g) = \operatorname{top}_k \mu_n(g)

For the channels of a layer this is relevance maximization (Achtibat et al., 2023). They are found in one pass over the
data by :func:`~nrm_plugin.dataset.maximization.find_references`, or read from a sweep.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import NRMError
from .ranking import NOBODY, Places
from .stored_sweep import Sweep
from .sweep_layout import QueryInfo

By = Literal["relevance", "activation"]
EVENTS = "events"
"""Name of the references of events, which belong to no layer."""
FORMAT = "nrm-plugin references 1"
FIELDS = ("values", "samples", "targets", "positions")


class ReferencesError(NRMError, ValueError):
    """Reference examples that cannot be found, read or drawn."""


@dataclass(frozen=True, eq=False)
class References:
    """Reference examples of some groups, the best first.

    Attributes:
        name: The layer, or the query of a sweep.
        by: ``"relevance"`` or ``"activation"``.
        groups: What each row is called: number of the channel, or name of the event.
        samples: Their numbers in the data set, ``(K, k)``; -1 where there are fewer.
        values: What they were ranked by, ``(K, k)``; not a number where there are fewer.
        targets: What was explained of each, ``(K, k)``; -1 where that is not told.
        positions: Where in the group the largest value was, counted row by row, ``(K, k)``; -1 where that is not told.
        target: The class that they were looked for in; None for all.
        layer: The layer whose channels the groups are, where the name is that of a query.
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
    def of_places(
        cls, name: str, by: By, groups: Sequence[int | str], places: Places, target: int | None
    ) -> References:
        """Those of a ranking."""
        is_free = places.samples == NOBODY
        return cls(
            name,
            by,
            tuple(groups),
            places.samples.masked_fill(is_free, -1),
            places.values.masked_fill(is_free, torch.nan),
            places.targets.long(),
            places.positions.long(),
            target,
        )

    def row(self, group: int | str) -> int:
        """Where a group is.

        Raises:
            ReferencesError: There is none.
        """
        if group not in self.groups:
            raise ReferencesError(
                f"there is no group {group!r} in the references of {self.name!r}; it has {len(self.groups)}, "
                f"{self.groups[0]!r} to {self.groups[-1]!r}."
            )
        return self.groups.index(group)

    def of(self, group: int | str) -> list[int]:
        """The samples of one group, the best first.

        Raises:
            ReferencesError: There is no such group.

        Examples:
            >>> from nrm_plugin.dataset.maximization import find_references
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> found = find_references(net, [(torch.randn(8, 3), torch.ones(8, dtype=torch.long))], ["0"], k=2)
            >>> len(found.of("0").of(3))
            2
        """
        return [sample for sample in self.samples[self.row(group)].tolist() if sample >= 0]

    def __repr__(self) -> str:
        within = "" if self.target is None else f", target {self.target}"
        return f"References({self.name!r} by {self.by}, {len(self.groups)} groups × {self.samples.shape[1]}{within})"


class FoundReferences:
    """References of several layers and events, over all samples and for each target.

    Args:
        groups: What the groups of each layer are called, by its name.
        places: By ``(name, by, target)``, where no target is all of them.
        count: Samples that were looked through.
    """

    def __init__(
        self,
        groups: Mapping[str, Sequence[int | str]],
        places: Mapping[tuple[str, By, int | None], Places],
        count: int,
    ) -> None:
        self._groups, self._places, self.count = dict(groups), dict(places), count

    def __repr__(self) -> str:
        asked = ", ".join(f"{name!r} by {by}" for name, by, target in self._places if target is None)
        return f"FoundReferences({asked}; {self.count} samples, {len(self.targets)} targets)"

    @property
    def targets(self) -> list[int]:
        """The targets that have references of their own."""
        return sorted({target for _, _, target in self._places if target is not None})

    def of(self, name: str = EVENTS, by: By = "relevance", target: int | None = None) -> References:
        """The references of one layer, or of the events.

        Args:
            name: The layer.
            by: ``"relevance"`` or ``"activation"``.
            target: Only samples of which this was explained.

        Raises:
            ReferencesError: They were not looked for, or no sample has this target.
        """
        found = self._places.get((name, by, target))
        if found is not None:
            return References.of_places(name, by, self._groups[name], found, target)
        if (name, by, None) in self._places:
            known = ", ".join(map(str, self.targets)) or "none, as they were not looked for by target"
            raise ReferencesError(f"there are no references of target {target!r}. Targets: {known}.")
        asked = ", ".join(f"{layer!r} by {how}" for layer, how, target in self._places if target is None)
        raise ReferencesError(f"{name!r} by {by} was not looked for; there are {asked}.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all of them to one safetensors file.

        Examples:
            >>> from nrm_plugin.dataset.maximization import find_references
            >>> net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
            >>> found = find_references(net, [(torch.randn(8, 3), torch.ones(8, dtype=torch.long))], ["0"], k=2)
            >>> found.save("found.safetensors")
            >>> FoundReferences.load("found.safetensors").of("0").of(3) == found.of("0").of(3)
            True
        """
        tensors: dict[str, Tensor] = {}
        entries: list[dict[str, Any]] = []
        for (name, by, target), places in self._places.items():
            for field, part in zip(FIELDS, places.parts, strict=True):
                tensors[f"{len(entries)}.{field}"] = part.contiguous()
            entries.append({"name": name, "by": by, "target": target})
        about = {"format": FORMAT, "entries": entries, "groups": self._groups, "count": self.count}
        save_file(tensors, Path(path), {"nrm-plugin": json.dumps(about)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> FoundReferences:
        """What :meth:`save` wrote.

        Raises:
            ReferencesError: It is no such file.
        """
        try:
            with safe_open(Path(path), "pt") as file:
                about = json.loads((file.metadata() or {})["nrm-plugin"])
                if about["format"] != FORMAT:
                    raise ValueError(f"its format is {about['format']!r}")
                places = {
                    (entry["name"], entry["by"], entry["target"]): Places(
                        *(file.get_tensor(f"{number}.{field}") for field in FIELDS)
                    )
                    for number, entry in enumerate(about["entries"])
                }
                return cls(about["groups"], places, about["count"])
        except FileNotFoundError:
            raise
        except Exception as error:  # damaged files raise errors of safetensors, of json, and of Python
            raise ReferencesError(f"{path} holds no references of FoundReferences.save(): {error}.") from error


# -- of a sweep -----------------------------------------------------------------------------------------------------

KINDS: dict[By, tuple[str, ...]] = {
    "relevance": ("Marginal", "Joint", "EventMass", "Conditional", "Sink", "Bypass", "Variation"),
    "activation": ("Activation",),
}
"""Kinds of the queries that samples can be ranked by; of a layer the first is meant."""


def references(
    sweep: Sweep | str | os.PathLike[str],
    query: str,
    group: int | tuple[int, int] | None = None,
    k: int = 9,
    by: By = "relevance",
    target: int | None = None,
) -> References:
    """Reference examples from a finished sweep; no model is needed.

    Args:
        sweep: The sweep, or its folder.
        query: Name of a query of it, or of a layer that it has a query of.
        group: One group; of joint relevance a pair of an upper and a lower one; None for all.
        k: How many samples of each.
        by: ``"activation"`` for a query of activations.
        target: Only samples of which this was explained.

    Returns:
        Of equal values the first samples. Positions are told where the sweep has ``Peak`` of the layer.

    Raises:
        ReferencesError: No such query, group or target; the query has maps and no rows.
        SweepError: There is no sweep, or a file of it is damaged.
    """
    sweep = sweep if isinstance(sweep, Sweep) else Sweep.open(sweep)
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise ReferencesError(f"k={k!r} must be a whole number of at least 1.")
    info = _query(sweep, query, by)
    if isinstance(group, int) and len(info.groups or ()) < 2:
        _check_group(info, (group,))
        rows = sweep.top(info.name, group, k, target=target)
    else:
        rows = sweep.rows(info.name, group[0] if isinstance(group, tuple) else group)
    columns = {name: rows[name].to_numpy() for name in ("sample", "target", "group", "lower", "value")}
    keep = np.isfinite(columns["value"])
    if target is not None:
        keep &= columns["target"] == target
    if isinstance(group, tuple):
        _check_group(info, group)
        keep &= columns["lower"] == group[1]
    columns = {name: values[keep] for name, values in columns.items()}
    if not len(columns["value"]):
        within = "" if target is None else f" with target {target}"
        raise ReferencesError(f"{info.name!r} has no values of samples{within}.")
    return _with_positions(sweep, info, _ranked(info, columns, k, by, target), group)


def _query(sweep: Sweep, name: str, by: By) -> QueryInfo:
    if by not in KINDS:
        raise ReferencesError(f"by={by!r} is unknown; choose 'relevance' or 'activation'.")
    fits = [query for query in sweep.queries.values() if query.kind in KINDS[by]]
    of_layer = [
        query for query in fits if query.kind == KINDS[by][0] and query.layers == (name,) and not _has_event(query)
    ]
    found = [query for query in fits if query.name == name] or of_layer
    if not found:
        known = ", ".join(repr(query.name) for query in fits) or "none"
        raise ReferencesError(f"the sweep has no query {name!r} with rows of {by}. Of this kind it has: {known}.")
    return found[0]


def _has_event(query: QueryInfo) -> bool:
    return any(query.spec.get(key) is not None for key in ("joint", "given"))


def is_of_channels(query: QueryInfo) -> bool:
    """Whether its groups are the channels of one layer, and no event is in it."""
    by_channel = query.spec.get("over", "channel") == "channel"
    return query.kind in ("Marginal", "Activation") and by_channel and not _has_event(query)


def _check_group(info: QueryInfo, group: tuple[int, ...]) -> None:
    sizes = info.groups or ()
    if len(sizes) != len(group) or not all(0 <= one < size for one, size in zip(group, sizes, strict=True)):
        has = " × ".join(map(str, sizes)) or "no"
        raise ReferencesError(f"{info.name!r} has {has} groups, counted from 0; got {group}.")


def _ranked(
    info: QueryInfo,
    columns: Mapping[str, np.ndarray[Any, Any]],
    k: int,
    by: By,
    target: int | None,
) -> References:
    """The first of each group, by value and then by sample."""
    sizes = info.groups or ()
    width = sizes[1] if len(sizes) == 2 else 1
    key = columns["group"].astype(np.int64).clip(0) * width + columns["lower"].clip(0)
    order = np.lexsort((columns["sample"], -columns["value"], key))
    key = key[order]
    starts = np.searchsorted(key, np.unique(key))
    rank = np.arange(len(key)) - np.repeat(starts, np.diff([*starts, len(key)]))
    order, key, rank = order[rank < k], key[rank < k], rank[rank < k]
    present, rows = np.unique(key, return_inverse=True)
    places = Places.free((len(present), k), torch.from_numpy(columns["value"][:1].copy()).dtype)
    at = (torch.from_numpy(rows), torch.from_numpy(rank))
    places.values[at] = torch.from_numpy(columns["value"][order])
    places.samples[at] = torch.from_numpy(columns["sample"][order])
    places.targets[at] = torch.from_numpy(columns["target"][order])
    names = [f"{one // width},{one % width}" if len(sizes) == 2 else int(one) for one in present]
    found = References.of_places(info.name, by, names if sizes else [info.name], places, target)
    return replace(found, layer=info.layers[0]) if is_of_channels(info) else found


def _with_positions(
    sweep: Sweep, info: QueryInfo, found: References, group: int | tuple[int, int] | None
) -> References:
    """Adds where the largest values were, where the sweep knows it."""
    peaks = [query for query in sweep.queries.values() if query.kind == "Peak" and query.layers == info.layers
             and query.spec.get("of") == found.by]  # fmt: skip
    if not peaks or not is_of_channels(info):
        return found
    rows = sweep.rows(peaks[0].name, group if isinstance(group, int) else None, ["sample", "group", "value"])
    samples, groups, values = (rows[name].to_numpy() for name in ("sample", "group", "value"))
    place = {int(name): row for row, name in enumerate(found.groups)}
    positions = found.positions.clone()
    order = np.lexsort((samples, groups))
    key = np.stack([groups[order].astype(np.int64), samples[order]])
    for name, row in place.items():
        low, high = np.searchsorted(key[0], [name, name + 1])
        wanted = found.samples[row].numpy()
        at = (low + np.searchsorted(key[1, low:high], wanted)).clip(0, max(high - 1, 0))
        told = (wanted >= 0) & (at < high) & (key[1, at] == wanted) if high > low else np.zeros(len(wanted), bool)
        positions[row, torch.from_numpy(told)] = torch.from_numpy(values[order][at[told]].astype(np.int64))
    return replace(found, positions=positions)


__all__ = ["EVENTS", "By", "FoundReferences", "References", "ReferencesError", "is_of_channels", "references"]
