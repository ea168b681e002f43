"""Reading of stored sweeps, complete or not, without the model."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import extra
from ..measure.mean_joints import MeanJoints
from .checksums import Segments, read_sums
from .shard_file import Shard, shards_in
from .sweep_layout import (
    BY_QUERY,
    ROWS,
    SCALAR,
    SUMS,
    Manifest,
    OnError,
    QueryInfo,
    ShardError,
    SweepError,
    arrow,
    path_inside,
    schema,
)
from .sweep_sums import joints_of_sweep

if TYPE_CHECKING:
    import pyarrow as pa


class Sweep:
    """Stored sweep, complete or not, as opened by :meth:`open`.

    Attributes:
        path: Folder of the sweep.
        manifest: Manifest of the sweep.
        bad_shards: Damaged files that were skipped.
    """

    def __init__(self, path: Path, manifest: Manifest, on_error: OnError = "raise") -> None:
        self.path, self.manifest, self.on_error = path, manifest, on_error
        self.bad_shards: list[Mapping[str, Any]] = []
        self._checked_maps: set[Path] = set()

    @classmethod
    def open(cls, path: str | os.PathLike[str], on_error: OnError = "raise") -> Sweep:
        """Opens the sweep in a folder.

        Args:
            path: The folder of the sweep.
            on_error: ``"raise"`` to raise an error for damaged files, or ``"skip"`` to skip them and list them in
                ``bad_shards``.

        Raises:
            SweepError: If the folder does not contain a sweep.
            MissingExtraError: If pyarrow is not installed.
        """
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} is unknown; choose 'raise' or 'skip'.")
        arrow()
        return cls(Path(path), Manifest.read(Path(path)), on_error)

    def __repr__(self) -> str:
        return f"Sweep({str(self.path)!r}, {self.manifest.state}, {len(self.manifest.queries)} queries)"

    @property
    def is_complete(self) -> bool:
        """True if all shards have been evaluated, even if some samples failed."""
        return self.manifest.state == "complete"

    @cached_property
    def queries(self) -> dict[str, QueryInfo]:
        """Queries keyed by name. Their groups are None until a shard has been written."""
        queries = {query.name: query for query in self.manifest.queries}
        if all(query.groups is not None for query in queries.values()):
            return queries
        groups = next((shard.groups for shard in self.shards if shard.groups), None)
        if groups is None:
            return queries
        return {name: replace(query, groups=groups.get(name)) for name, query in queries.items()}

    @cached_property
    def shards(self) -> list[Shard]:
        """The stored shards in order.

        Raises:
            ShardError: If a file is damaged or belongs to a different sweep.
        """
        shards: list[Shard] = []
        for path in shards_in(self.path).values():
            try:
                shard = Shard.read(path)
                shard.check_settings(self.manifest.fingerprint)
                if shards and shard.first <= shards[-1].last:
                    raise ShardError(f"{path} repeats samples of {shards[-1].path.name}.")
            except ShardError as error:
                self._skip(path, error)
            else:
                shards.append(shard)
        if self.is_complete and not self.bad_shards:
            self._check_coverage(shards)
        return shards

    def _check_coverage(self, shards: Sequence[Shard]) -> None:
        """Reports samples that are in no shard of a complete sweep."""
        expected = 0
        for first, last in (*((shard.first, shard.last) for shard in shards), (self.manifest.samples or 0, 0)):
            if first != expected:
                name = self.path / ROWS
                self._skip(name, ShardError(f"{name} is incomplete: samples {expected} to {first - 1} are missing."))
            expected = last + 1

    def _skip(self, path: Path, error: ShardError) -> None:
        if self.on_error == "raise":
            raise ShardError(
                f"{error} Resume the sweep with on_error='skip' to evaluate it again, or read the other shards by "
                "Sweep.open(path, on_error='skip')."
            ) from error
        entry = {"file": str(path.relative_to(self.path)), "why": str(error)}
        if entry not in self.bad_shards:
            self.bad_shards.append(entry)

    def query(self, name: str) -> QueryInfo:
        """Returns the query with the given name.

        Raises:
            SweepError: If the query is unknown.
        """
        if name not in self.queries:
            raise SweepError(f"{self.path} has no query {name!r}. It has {', '.join(map(repr, self.queries))}.")
        return self.queries[name]

    def mean_joints(self, layers: Sequence[str], target: int | None = None) -> MeanJoints:
        """Computes the mean joint relevance of consecutive layers, as required by :func:`~nrm_plugin.find_groups`.

        Args:
            layers: Names of the layers, from the output to the input. The sweep must contain the queries of
                :func:`~nrm_plugin.dataset.glocal.flow_queries`.
            target: Only use samples for which this class was explained, or None for all samples.

        Raises:
            FlowError: If a query is missing or if there are no samples.
        """
        return joints_of_sweep(self, layers, target)

    def rows(
        self, query: str | None = None, group: int | None = None, columns: Sequence[str] | None = None
    ) -> pa.Table:
        """Reads rows, ordered by shard and then by query, group, lower group and sample.

        Args:
            query: Name of a query, or None for all.
            group: Group of the query, or None for all.
            columns: Column names, or None for all columns of :func:`~nrm_plugin.dataset.sweep_layout.schema`.

        Raises:
            SweepError: If the query or column is unknown or if a shard is damaged.
        """
        pa = arrow()
        if query is not None:
            self.query(query)
        names = schema().names
        unknown = [column for column in columns or () if column not in names]
        if unknown:
            raise SweepError(f"no column named {unknown[0]!r}; columns are {', '.join(names)}.")
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
        """Reads ``sample``, ``target`` and ``prediction`` of all samples that did not fail, ordered by sample."""
        pa = arrow()
        with_rows = [query for query in self.queries.values() if not query.is_map and query.groups is not None]
        if with_rows:
            query = min(with_rows, key=lambda query: math.prod(query.groups or ()))
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
        """Reads the samples with the largest values of a group, in decreasing order.

        Args:
            query: Name of a query.
            group: The group, or None for a query with one value per sample.
            k: Number of samples.
            lower: For a joint matrix, only return rows of this group in the lower layer.
            target: Only return samples for which this class was explained, or None for all samples.
            largest: Whether to return the largest values. Otherwise, the smallest values are returned in increasing
                order.

        Returns:
            At most ``k`` rows. Ties are broken by sample index, and null values are excluded.

        Raises:
            SweepError: If the query is unknown or has no rows.
        """
        compute = extra("pyarrow.compute", "dataset")
        info = self.query(query)
        if info.is_map:
            raise SweepError(f"{query!r} has maps instead of rows; read them with maps().")
        rows = self._group_rows(info, SCALAR if group is None else group)
        for column, value in (("lower", lower), ("target", target)):
            if value is not None:
                rows = rows.filter(compute.equal(rows[column], value))
        rows = rows.filter(compute.is_valid(rows["value"]))
        order = [("value", "descending" if largest else "ascending"), ("lower", "ascending"), ("sample", "ascending")]
        return rows.take(compute.select_k_unstable(rows, k, order)) if len(rows) else rows

    def _group_rows(self, info: QueryInfo, group: int) -> pa.Table:
        path = path_inside(self.path, f"{BY_QUERY}/{list(self.queries).index(info.name):04}.parquet")
        try:
            sums = read_sums(path_inside(self.path, f"{BY_QUERY}/{SUMS}"))
            if sums is None or path.name not in sums:
                return self.rows(info.name, group)
            return self._indexed(path, sums, group)
        except (OSError, KeyError, TypeError, ValueError, arrow().ArrowException) as error:
            raise ShardError(
                f"{path} is damaged: {error}. Delete the folder {BY_QUERY} to read the shards instead, or resume the "
                "sweep to write it again."
            ) from error

    def _indexed(self, path: Path, sums: Mapping[str, Any], group: int) -> pa.Table:
        compute, parquet = extra("pyarrow.compute", "dataset"), extra("pyarrow.parquet", "dataset")
        if sums["settings"] != self.manifest.fingerprint:
            raise ShardError("it belongs to another sweep, with different settings")
        segments = Segments.from_json(sums[path.name])
        chosen = [k for k, (first, last) in enumerate(sums[path.name]["groups"]) if first <= group <= last]
        segments.check(path, [*chosen, len(segments.ends) - 1])
        with parquet.ParquetFile(path, page_checksum_verification=True) as file:
            table = file.read_row_groups(chosen) if chosen else file.schema_arrow.empty_table()
        return table.filter(compute.equal(table["group"], group))

    def maps(self, query: str, samples: Collection[int]) -> Tensor:
        """Reads the stored maps of samples as an array of shape ``(len(samples), *shape)``.

        Args:
            query: Name of a ``Maps`` query.
            samples: Sample indices, in the order of the result.

        Raises:
            SweepError: If no ``Maps`` query has this name or if a sample failed or has not been evaluated yet.
        """
        info = self.query(query)
        if not info.is_map:
            raise SweepError(f"{query!r} has rows instead of maps; read them with rows().")
        maps: dict[int, Tensor] = {}
        for shard in self.shards:
            in_shard = {sample for sample in samples if shard.first <= sample <= shard.last}
            if in_shard:
                tensors = self._tensors(shard, ["sample", query])
                pairs = zip(tensors["sample"].tolist(), tensors[query], strict=True)
                maps |= {sample: values for sample, values in pairs if sample in in_shard}
        missing = [sample for sample in samples if sample not in maps]
        if missing:
            raise SweepError(f"no map of sample {missing[0]}: it failed, has not been evaluated yet, or is unknown.")
        shape = info.groups or ()
        return torch.stack([maps[sample] for sample in samples]) if maps else torch.empty(0, *shape)

    def _tensors(self, shard: Shard, names: Sequence[str]) -> dict[str, Tensor]:
        path = shard.path
        try:
            path = shard.maps
            if path not in self._checked_maps:
                shard.check_map_content()
                self._checked_maps.add(path)
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in names}
        except ShardError as error:
            self._skip(path, error)
        except (OSError, SafetensorError) as error:
            self._skip(path, ShardError(f"{path} is damaged: {error}"))
        return {name: torch.empty(0, dtype=torch.int64) for name in names}


__all__ = ["Sweep"]
