"""Index of a sweep: the rows of each query sorted by group and value, for fast access to the top samples."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import extra
from .atomic_files import sync, write_bytes
from .checksums import Segments, read_sums, row_group_ends, to_bytes
from .shard_file import Shard
from .stored_sweep import Sweep
from .sweep_layout import BY_QUERY, SCALAR, SUMS, QueryInfo, ShardError, arrow, path_inside, schema

if TYPE_CHECKING:
    import pyarrow as pa

MAX_SORTED = 1 << 22
"""Maximum number of rows sorted at once unless a single group has more."""
CHUNK = 1 << 15
"""Maximum number of rows in a row group unless a single neuron group has more."""
CODED = ["query", "group", "lower", "target", "prediction"]
"""Dictionary-encoded columns. They have few distinct values."""


def write_index(sweep: Sweep) -> Path:
    """Writes the index, with one file per query and the columns of :func:`~nrm_plugin.dataset.sweep_layout.schema`.

    Rows are sorted by group and decreasing value, with null values last. Joint matrices are omitted because
    they have so many rows that sorting could take longer than computing the measure. The rows of a group are contiguous
    in each shard anyway.

    Args:
        sweep: The sweep whose rows to sort. It must be complete.

    Raises:
        ShardError: If a shard is damaged or incomplete.
    """
    target = sweep.path / BY_QUERY
    unfinished = sweep.path / f".{BY_QUERY}.{platform.node()}.{os.getpid()}.tmp"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    sums: dict[str, Any] = {"settings": sweep.manifest.fingerprint}
    try:
        parquet = extra("pyarrow.parquet", "dataset")
        for number, info in enumerate(sweep.queries.values()):
            if info.is_map or info.groups is None or len(info.groups) > 1:
                continue
            layout = schema(sweep.manifest.value)
            name = f"{number:04}.parquet"
            with parquet.ParquetWriter(
                unfinished / name, layout, compression="zstd", use_dictionary=CODED, write_page_checksum=True
            ) as writer:
                groups: list[tuple[int, int]] = []
                for table, size in _sorted(sweep.shards, info, layout):
                    writer.write_table(table, row_group_size=size)
                    group = table["group"].to_numpy()
                    groups += [(int(group[k]), int(group[k : k + size][-1])) for k in range(0, len(group), size)]
            sync(unfinished / name)
            ends = row_group_ends(parquet.read_metadata(unfinished / name))
            sums[name] = Segments.of(unfinished / name, ends).to_json() | {"groups": groups}
        write_bytes(unfinished / SUMS, to_bytes(sums))
        try:
            unfinished.rename(target)
        except OSError:
            if not target.exists():  # otherwise, another process has written the same index
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return target


def remove_index(folder: Path) -> None:
    """Removes the index of a sweep folder if it exists."""
    shutil.rmtree(folder / BY_QUERY, ignore_errors=True)


def is_intact(sweep: Sweep) -> bool:
    """Returns True if the index of a sweep exists and is undamaged."""
    try:
        sums = read_sums(path_inside(sweep.path, f"{BY_QUERY}/{SUMS}")) or {}
        if sums.pop("settings", None) != sweep.manifest.fingerprint:
            return False
        for name, entries in sums.items():
            Segments.from_json(entries).check(path_inside(sweep.path, f"{BY_QUERY}/{name}"))
    except (ShardError, OSError, KeyError, TypeError, ValueError):
        return False
    return True


def _sorted(shards: Sequence[Shard], info: QueryInfo, layout: pa.Schema) -> Iterator[tuple[pa.Table, int]]:
    """Yields sorted tables of consecutive groups with the row-group size of each."""
    count = max(1, sum(_samples(shard) for shard in shards))
    groups = (*(info.groups or ()), 1)[0]
    step = max(1, MAX_SORTED // count)
    for first in range(0, groups, step):
        columns = _columns(shards, info, first, min(groups, first + step) - 1)
        if columns is not None:
            yield _table(columns, info, first, layout), max(1, CHUNK // count) * count


def _samples(shard: Shard) -> int:
    return shard.last - shard.first + 1 - len(shard.failed) if shard.chunks else 0


def _columns(shards: Sequence[Shard], info: QueryInfo, first: int, last: int) -> dict[str, Any] | None:
    """Reads ``value`` with shape ``(groups, samples)`` and all other columns with shape ``(samples,)``.

    Returns None if there are no rows.
    """
    groups = last - first + 1
    parts: dict[str, list[Any]] = {"sample": [], "target": [], "prediction": [], "value": []}
    for shard in shards:
        count = _samples(shard)
        if not count:
            continue
        rows = shard.rows(info.name, (first, last) if info.groups else (SCALAR, SCALAR), list(parts))
        if len(rows) != groups * count:
            raise ShardError(f"{shard.path} is incomplete: rows of {info.name!r} are missing.")
        for name in ("sample", "target", "prediction"):
            parts[name].append(rows[name].slice(0, count).to_numpy())
        parts["value"].append(rows["value"].to_numpy().reshape(groups, count))
    return {name: np.concatenate(columns, axis=-1) for name, columns in parts.items()} if parts["value"] else None


def _table(columns: dict[str, Any], info: QueryInfo, first: int, layout: pa.Schema) -> pa.Table:
    pa = arrow()
    values = columns["value"]
    groups, count = values.shape
    order = np.argsort(-values, axis=1, kind="stable")  # NaN last
    numbers = np.arange(first, first + groups) if info.groups else np.array([SCALAR])
    arrays = [
        *(columns[name][order.reshape(-1)] for name in ("sample", "target", "prediction")),
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(values.size, np.int32)), pa.array([info.name], pa.string())),
        np.repeat(numbers.astype(np.int32), count),
        np.full(values.size, SCALAR, np.int32),
        pa.array(np.take_along_axis(values, order, 1).reshape(-1), from_pandas=True),
    ]
    return pa.table(arrays, schema=layout)


__all__ = ["is_intact", "remove_index", "write_index"]
