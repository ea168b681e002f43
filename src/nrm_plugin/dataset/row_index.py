"""The rows of each query by group and value, so that the samples of largest value are read without the others."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import extra
from .shard_file import Shard
from .stored_sweep import Sweep
from .sweep_layout import BY_QUERY, SCALAR, QueryInfo, ShardError, arrow, schema, to_disk

if TYPE_CHECKING:
    import pyarrow as pa

AT_ONCE = 1 << 22
"""Rows that are sorted at once, where one group has fewer."""
CHUNK = 1 << 15
"""Rows of a row group, where one group of neurons has fewer."""
CODED = ["query", "group", "lower", "target", "prediction"]
"""Columns with few values, which are stored as a dictionary."""


def write_index(sweep: Sweep) -> Path:
    """Writes one file for each query but joint matrices, with rows of :func:`~nrm_plugin.dataset.sweep_layout.schema`.

    They come by group and value, the largest first; those without a value last. Joint matrices are left out: there are
    so many rows of them that to sort them may take longer than the measure, and those of one group lie together anyway.

    Args:
        sweep: A complete sweep.

    Raises:
        ShardError: A shard is damaged, or lacks rows.
    """
    target = sweep.path / BY_QUERY
    made = sweep.path / f".{BY_QUERY}.{platform.node()}.{os.getpid()}.tmp"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        parquet = extra("pyarrow.parquet", "dataset")
        for place, info in enumerate(sweep.queries.values()):
            if info.is_map or info.groups is None or len(info.groups) > 1:
                continue
            kind = schema(sweep.manifest.value)
            name = f"{place:04}.parquet"
            with parquet.ParquetWriter(
                made / name, kind, compression="zstd", use_dictionary=CODED, write_page_checksum=True
            ) as writer:
                for table, size in _sorted(sweep.shards, info, kind):
                    writer.write_table(table, row_group_size=size)
            to_disk(made / name)
        try:
            made.rename(target)
        except OSError:
            if not target.exists():  # else another process was faster, with the same
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def remove_index(folder: Path) -> None:
    """Removes it, where there is one."""
    shutil.rmtree(folder / BY_QUERY, ignore_errors=True)


def _sorted(shards: Sequence[Shard], info: QueryInfo, kind: pa.Schema) -> Iterator[tuple[pa.Table, int]]:
    """Some groups after the other, with the number of rows that a row group is to have."""
    count = max(1, sum(_samples(shard) for shard in shards))
    groups = (*(info.groups or ()), 1)[0]
    step = max(1, AT_ONCE // count)
    for first in range(0, groups, step):
        columns = _columns(shards, info, first, min(groups, first + step) - 1)
        if columns is not None:
            yield _table(columns, info, first, kind), max(1, CHUNK // count) * count


def _samples(shard: Shard) -> int:
    return shard.last - shard.first + 1 - len(shard.failed) if shard.chunks else 0


def _columns(shards: Sequence[Shard], info: QueryInfo, first: int, last: int) -> dict[str, Any] | None:
    """``value`` as ``(groups, samples)``, and the columns of the samples; None where there is none."""
    groups = last - first + 1
    parts: dict[str, list[Any]] = {"sample": [], "target": [], "prediction": [], "value": []}
    for shard in shards:
        count = _samples(shard)
        if not count:
            continue
        rows = shard.rows(info.name, (first, last) if info.groups else (SCALAR, SCALAR), list(parts))
        if len(rows) != groups * count:
            raise ShardError(f"{shard.path} lacks rows of {info.name!r}.")
        for name in ("sample", "target", "prediction"):
            parts[name].append(rows[name].slice(0, count).to_numpy())
        parts["value"].append(rows["value"].to_numpy().reshape(groups, count))
    return {name: np.concatenate(columns, axis=-1) for name, columns in parts.items()} if parts["value"] else None


def _table(columns: dict[str, Any], info: QueryInfo, first: int, kind: pa.Schema) -> pa.Table:
    pa = arrow()
    values = columns["value"]
    groups, count = values.shape
    order = np.argsort(-values, axis=1, kind="stable")  # what is not a number comes last
    numbers = np.arange(first, first + groups) if info.groups else np.array([SCALAR])
    arrays = [
        *(columns[name][order.reshape(-1)] for name in ("sample", "target", "prediction")),
        pa.DictionaryArray.from_arrays(pa.array(np.zeros(values.size, np.int32)), pa.array([info.name], pa.string())),
        np.repeat(numbers.astype(np.int32), count),
        np.full(values.size, SCALAR, np.int32),
        pa.array(np.take_along_axis(values, order, 1).reshape(-1), from_pandas=True),
    ]
    return pa.table(arrays, schema=kind)


__all__ = ["remove_index", "write_index"]
