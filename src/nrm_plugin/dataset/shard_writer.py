"""Writing shards: each file is whole, on the disk, and only then has its name."""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from ..errors import extra
from .evaluation import Evaluated
from .queries import Maps, Query
from .sample_batches import Failure
from .sweep_layout import KEY, MAPS, ROWS, SCALAR, Replacing, SweepError, arrow, schema

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1 << 16
"""Rows of a row group, at most, where one group of neurons has fewer."""
CODED = ["query", "group", "lower", "target", "prediction", "sample"]
"""Columns with few values, which are stored as a dictionary."""


def name_of(rank: int, number: int) -> str:
    """The name of a shard, without the end."""
    return f"part-{rank:04}-{number:06}"


def write_shard(
    folder: Path,
    rank: int,
    number: int,
    queries: Sequence[Query],
    parts: Sequence[Evaluated],
    said: Mapping[str, Any],
    value: str,
) -> Path:
    """Writes the maps and then the rows of a shard: where there are rows, there are maps.

    Args:
        folder: Of the sweep.
        rank: Who writes.
        number: Of the shard.
        queries: What was asked.
        parts: The answers for each batch.
        said: What its footer says: fingerprint, first and last sample, failures.
        value: ``"float"`` or ``"double"``.

    Raises:
        OSError: The disk is full, or cannot be written to.
        SweepError: Queries have other groups in one batch than in another.
    """
    ordered = sorted(queries, key=lambda query: query.name)
    whole = joined(parts, ordered)
    shapes = {query.name: list(whole.values[query.name].shape[1:]) for query in ordered} if parts else {}
    maps = {query.name: whole.values[query.name] for query in ordered if isinstance(query, Maps) and parts}
    if maps:
        columns: dict[str, NDArray[Any]] = {
            "sample": whole.sample,
            "target": whole.target,
            "prediction": whole.prediction,
        }
        with Replacing(folder / MAPS / f"{name_of(rank, number)}.safetensors") as path:
            safetensors.numpy.save_file({**columns, **maps}, path)
    names = [query.name for query in ordered if not isinstance(query, Maps)]
    chunks: list[tuple[str, int, int]] = []
    target = folder / ROWS / f"{name_of(rank, number)}.parquet"
    parquet = extra("pyarrow.parquet", "dataset")
    with (
        Replacing(target) as path,
        parquet.ParquetWriter(
            path, schema(value), compression="zstd", use_dictionary=CODED, write_page_checksum=True
        ) as writer,
    ):
        for name in names if len(whole.sample) else ():
            for first, table in tables(whole, name, names, value):
                chunks.append((name, first, _last(table)))
                writer.write_table(table, row_group_size=max(1, len(table)))
        entries = {**said, "groups": shapes, "chunks": chunks, "value": value}
        writer.add_key_value_metadata({KEY: json.dumps(entries)})
    return target


def joined(parts: Sequence[Evaluated], queries: Sequence[Query]) -> Evaluated:
    """The batches of a shard as one.

    Raises:
        SweepError: Queries have other groups in one batch than in another.
    """
    if not parts:
        none = np.empty(0, np.int32)
        return Evaluated(none.astype(np.int64), none, none, {})
    values = {}
    for query in queries:
        columns = [part.values[query.name] for part in parts]
        shapes = {column.shape[1:] for column in columns}
        if len(shapes) > 1:
            raise SweepError(
                f"{query.name} has groups of shape {' and '.join(map(str, sorted(shapes)))}: samples differ in size. "
                "Resize them in the data set, or ask for channels."
            )
        values[query.name] = np.concatenate(columns)
    sample, target, prediction = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("sample", "target", "prediction")
    )
    return Evaluated(sample, target, prediction, values)


def tables(whole: Evaluated, name: str, names: Sequence[str], value: str) -> Iterator[tuple[int, pa.Table]]:
    """The rows of one query by group, lower group and sample, in pieces of whole groups, with their first group."""
    values = whole.values[name]
    groups = values.shape[1] if values.ndim > 1 else 1
    by_group = np.moveaxis(values.reshape(len(values), groups, -1), 0, 2)
    step = max(1, CHUNK // max(1, by_group[0].size))
    for first in range(0, groups, step):
        piece = by_group[first : first + step]
        yield first if values.ndim > 1 else SCALAR, table_of(whole, piece, values.ndim, first, name, names, value)


def table_of(
    whole: Evaluated, piece: NDArray[Any], ndim: int, first: int, name: str, names: Sequence[str], value: str
) -> pa.Table:
    """Rows of ``(groups, lower, samples)``."""
    pa = arrow()
    groups, lower, count = piece.shape
    numbers = np.arange(first, first + groups) if ndim > 1 else np.array([SCALAR])
    lowers = np.arange(lower) if ndim > 2 else np.array([SCALAR])
    queries = np.full(piece.size, names.index(name), np.int32)
    columns = [
        np.tile(whole.sample, groups * lower),
        np.tile(whole.target, groups * lower),
        np.tile(whole.prediction, groups * lower),
        pa.DictionaryArray.from_arrays(pa.array(queries), pa.array(list(names), pa.string())),
        np.repeat(numbers.astype(np.int32), lower * count),
        np.tile(np.repeat(lowers.astype(np.int32), count), groups),
        pa.array(piece.reshape(-1), from_pandas=True).cast(schema(value).field("value").type),
    ]
    return pa.table(columns, schema=schema(value))


def _last(table: pa.Table) -> int:
    return int(table["group"][-1].as_py())


def remove_unfinished(folder: Path) -> None:
    """Removes what dead processes of this machine have left unfinished."""
    mark = f".{platform.node()}."
    for path in (path for inner in (folder, folder / ROWS, folder / MAPS) for path in inner.glob(".*.tmp")):
        owner = path.name.removesuffix(".tmp").rpartition(".")[2]
        if mark in path.name and owner.isdecimal() and not _is_alive(int(owner)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def failures(failed: Sequence[Failure]) -> list[dict[str, Any]]:
    """Failures as JSON, by sample."""
    return [{"sample": one.sample, "why": one.why} for one in sorted(failed, key=lambda one: one.sample)]


__all__ = ["name_of", "remove_unfinished", "write_shard"]
