"""Reading a sweep, finished or not; no model is needed for that."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import extra
from .shard_file import Shard, shards_in
from .sweep_layout import BY_QUERY, SCALAR, Manifest, OnError, QueryInfo, ShardError, SweepError, arrow, inside, schema

if TYPE_CHECKING:
    import pyarrow as pa


def _are_known(queries: Sequence[QueryInfo]) -> bool:
    return all(query.groups is not None for query in queries)


class Sweep:
    """A stored sweep, complete or as far as it came. Made by :meth:`open`.

    Attributes:
        path: Its folder.
        manifest: What it says of itself.
        bad_shards: Files that could not be read so far, where they are skipped.
    """

    def __init__(self, path: Path, manifest: Manifest, on_error: OnError = "raise") -> None:
        self.path, self.manifest, self.on_error = path, manifest, on_error
        self.bad_shards: list[Mapping[str, Any]] = []

    @classmethod
    def open(cls, path: str | os.PathLike[str], on_error: OnError = "raise") -> Sweep:
        """The sweep in a folder.

        Args:
            path: The folder.
            on_error: ``"raise"``, or ``"skip"`` for what can be read of it; ``bad_shards`` then lists the others.

        Raises:
            SweepError: There is none.
            MissingExtraError: pyarrow is not installed.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} is unknown; choose 'raise' or 'skip'.")
        arrow()
        return cls(Path(path), Manifest.read(Path(path)), on_error)

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r}, {self.manifest.state}, {len(self.manifest.queries)} queries)"

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to evaluate; some samples may have failed."""
        return self.manifest.state == "complete"

    @cached_property
    def queries(self) -> dict[str, QueryInfo]:
        """The queries by name, with their groups where any shard is written."""
        known = self.manifest.queries
        groups = {} if _are_known(known) else next((shard.groups for shard in self.shards if shard.groups), {})
        if groups:
            known = tuple(QueryInfo(q.name, q.kind, q.layers, groups.get(q.name), q.spec) for q in known)
        return {query.name: query for query in known}

    @cached_property
    def shards(self) -> list[Shard]:
        """What is written, by number.

        Raises:
            ShardError: A file is damaged, or of another sweep.
        """
        found = []
        for path in shards_in(self.path).values():
            try:
                shard = Shard.read(path)
                if shard.settings != self.manifest.fingerprint:
                    raise ShardError(f"{path} is of another sweep, with other settings.")
            except ShardError as error:
                self._skip(path, error)
            else:
                found.append(shard)
        return found

    def _skip(self, path: Path, error: ShardError) -> None:
        if self.on_error == "raise":
            raise ShardError(
                f"{error} Go on with the sweep by on_error='skip', which evaluates it again, or read what is left by "
                "Sweep.open(path, on_error='skip')."
            ) from error
        entry = {"file": str(path.relative_to(self.path)), "why": str(error)}
        if entry not in self.bad_shards:
            self.bad_shards.append(entry)

    def query(self, name: str) -> QueryInfo:
        """One query.

        Raises:
            SweepError: There is none of this name.
        """
        if name not in self.queries:
            raise SweepError(f"{self.path} has no query {name!r}. It has {', '.join(map(repr, self.queries))}.")
        return self.queries[name]

    def rows(
        self, query: str | None = None, group: int | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Rows, in the order of the shards; inside of each by query, group, lower group and sample.

        Args:
            query: Name of a query; None for all.
            group: A group of it; None for all.
            columns: Names of those to read; None for all of :func:`schema`.

        Raises:
            SweepError: No such query or column, or a damaged shard.
        """
        pa = arrow()
        if query is not None:
            self.query(query)
        names = schema().names
        unknown = [column for column in columns or () if column not in names]
        if unknown:
            raise SweepError(f"there is no column {unknown[0]!r}; there are {', '.join(names)}.")
        parts = []
        for shard in self.shards:
            try:
                parts.append(shard.rows(query, None if group is None else (group, group), columns))
            except ShardError as error:
                self._skip(shard.path, error)
        if parts:
            return pa.concat_tables(parts).unify_dictionaries()
        return schema(self.manifest.value).empty_table().select(names if columns is None else list(columns))

    def samples(self) -> pa.Table:
        """``sample``, ``target`` and ``prediction`` of all that did not fail, by sample."""
        pa = arrow()
        asked = [query for query in self.queries.values() if not query.is_map and query.groups is not None]
        if asked:
            query = min(asked, key=lambda query: math.prod(query.groups or ()))
            rows = self.rows(query.name, 0 if query.groups else SCALAR, ["sample", "target", "prediction", "lower"])
            lower = extra("pyarrow.compute", "dataset").less_equal(rows["lower"], 0)
            return rows.filter(lower).drop_columns("lower").sort_by("sample")
        columns: dict[str, list[int]] = {"sample": [], "target": [], "prediction": []}
        for shard in self.shards:
            for name, values in self._tensors(shard, list(columns)).items():
                columns[name] += values.tolist()
        return pa.table(columns, schema=schema().remove(3).remove(3).remove(3).remove(3))

    def top(
        self,
        query: str,
        group: int | None = None,
        k: int = 9,
        *,
        lower: int | None = None,
        target: int | None = None,
        largest: bool = True,
    ) -> pa.Table:
        """The samples in which a group has its largest values, the largest first.

        Args:
            query: Name of a query.
            group: Which group; None for a query with one number for each sample.
            k: How many.
            lower: Only of this group of the lower layer, of a joint matrix.
            target: Only among samples with this target.
            largest: False for the smallest values, the smallest first.

        Returns:
            At most ``k`` rows; of equal values the first samples. Rows without a value are left out.

        Raises:
            SweepError: No such query, or it has no rows.
        """
        compute = extra("pyarrow.compute", "dataset")
        info = self.query(query)
        if info.is_map:
            raise SweepError(f"{query!r} has maps and no rows; read them with maps().")
        rows = self._of_group(info, SCALAR if group is None else group)
        for column, wanted in (("lower", lower), ("target", target)):
            if wanted is not None:
                rows = rows.filter(compute.equal(rows[column], wanted))
        rows = rows.filter(compute.is_valid(rows["value"]))
        order = [("value", "descending" if largest else "ascending"), ("lower", "ascending"), ("sample", "ascending")]
        return rows.take(compute.select_k_unstable(rows, k, order)) if len(rows) else rows

    def _of_group(self, info: QueryInfo, group: int) -> pa.Table:
        path = inside(self.path, f"{BY_QUERY}/{list(self.queries).index(info.name):04}.parquet")
        if not path.exists():
            return self.rows(info.name, group)
        pa, parquet = arrow(), extra("pyarrow.parquet", "dataset")
        try:
            return parquet.read_table(path, filters=[("group", "==", group)])
        except (OSError, pa.ArrowException) as error:
            raise ShardError(
                f"{path} is damaged: {error}. Delete the folder {BY_QUERY}, and the shards are read instead."
            ) from error

    def maps(self, query: str, samples: Collection[int]) -> Tensor:
        """Stored maps of some samples, ``(len(samples), *shape)``.

        Args:
            query: Name of a query that asks for maps.
            samples: Which samples; in this order.

        Raises:
            SweepError: No such query or maps, or a sample failed or is not evaluated yet.
        """
        info = self.query(query)
        if not info.is_map:
            raise SweepError(f"{query!r} has rows and no maps; read them with rows().")
        found: dict[int, Tensor] = {}
        for shard in self.shards:
            wanted = [sample for sample in samples if shard.first <= sample <= shard.last]
            if wanted:
                tensors = self._tensors(shard, ["sample", query])
                places = {sample: place for place, sample in enumerate(tensors["sample"].tolist())}
                found |= {sample: tensors[query][places[sample]] for sample in wanted if sample in places}
        missing = [sample for sample in samples if sample not in found]
        if missing:
            raise SweepError(f"there is no map of sample {missing[0]}: it failed, is not evaluated yet, or not there.")
        shape = info.groups or ()
        return torch.stack([found[sample] for sample in samples]) if found else torch.empty(0, *shape)

    def _tensors(self, shard: Shard, names: Sequence[str]) -> dict[str, Tensor]:
        path = shard.path
        try:
            path = shard.maps
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except ShardError as error:
            self._skip(path, error)
        except (OSError, SafetensorError) as error:
            self._skip(path, ShardError(f"{path} is damaged: {error}"))
        return {name: torch.empty(0, dtype=torch.int64) for name in names}
