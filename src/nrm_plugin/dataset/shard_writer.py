"""Writing of shards, files with the results of consecutive samples.

Files receive their final names when they are complete and synced to disk.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from ..errors import extra
from .atomic_files import AtomicFile, write_bytes
from .checksums import Segments, row_group_ends, to_bytes
from .evaluation import BatchResults
from .queries import Maps, Query
from .sample_batches import FailedSample
from .sweep_layout import KEY, MAPS, ROWS, SCALAR, SweepError, arrow, schema

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1 << 16
"""Maximum number of rows in a row group unless a single neuron group has more."""
OS_ERROR = re.compile(r"(?:code:|os error) (\d+)")
"""Pattern for operating-system errors in safetensors messages."""
CODED = ["query", "group", "lower", "target", "prediction", "sample"]
"""Dictionary-encoded columns. They have few distinct values."""


@dataclass(frozen=True)
class ShardInfo:
    """Description of a shard (results of consecutive samples), stored in its row file.

    Attributes:
        settings: Fingerprint of the sweep settings.
        first: Index of the first sample.
        last: Index of the last sample, inclusive.
        failed: Samples without rows.
        replaces: Damaged files that the shard replaces.
        value: Arrow type of stored values, ``"float"`` or ``"double"``.
        content: Hash of each sample in the range, or of each batch of an iterable dataset. Empty for failed samples.
        stamps: A cheap identifier of each sample (for example, the size and modification time of its file), available
            without loading the sample.
    """

    settings: str
    first: int
    last: int
    failed: Sequence[FailedSample]
    replaces: Sequence[dict[str, str]]
    value: str
    content: Sequence[str] = ()
    stamps: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Converts the description to JSON, with failed samples sorted by index."""
        failed = sorted(self.failed, key=lambda failure: failure.sample)
        return {**vars(self), "failed": [asdict(failure) for failure in failed]}


def shard_name(rank: int, number: int) -> str:
    """Returns the file name of a shard without extension."""
    return f"part-{rank:04}-{number:06}"


def write_shard(
    folder: Path,
    rank: int,
    number: int,
    queries: Sequence[Query],
    batches: Sequence[BatchResults],
    info: ShardInfo,
) -> None:
    """Writes a shard. Maps are written before rows, and a row file never exists without its map file.

    Args:
        folder: Folder of the sweep.
        rank: Rank of the process that writes the shard.
        number: Index of the shard.
        queries: The queries of the sweep.
        batches: Results of each batch.
        info: Description of the shard.

    Raises:
        OSError: If the folder is not writable or the disk is full.
        SweepError: If the groups of a query differ between batches.
    """
    parquet = extra("pyarrow.parquet", "dataset")
    ordered = sorted(queries, key=lambda query: query.name)
    results = concatenated(batches, ordered)
    name = shard_name(rank, number)
    sums: dict[str, Any] = {"maps": None}
    maps = {query.name: results.values[query.name] for query in ordered if isinstance(query, Maps) and batches}
    if maps:
        samples: dict[str, Any] = {"sample": results.sample, "target": results.target, "prediction": results.prediction}
        with AtomicFile(folder / MAPS / f"{name}.safetensors") as path:
            _save_tensors({**samples, **maps}, path)
            sums["maps"] = Segments.of(path).to_json()
    names = [query.name for query in ordered if not isinstance(query, Maps)]
    with AtomicFile(folder / ROWS / f"{name}.parquet") as path:
        with parquet.ParquetWriter(
            path, schema(info.value), compression="zstd", use_dictionary=CODED, write_page_checksum=True
        ) as writer:
            chunks: list[tuple[str, int, int]] = []
            for query in names if len(results.sample) else ():
                for first, table in tables(results, query, names, info.value):
                    chunks.append((query, first, int(table["group"][-1].as_py())))
                    writer.write_table(table, row_group_size=max(1, len(table)))
            groups = {query.name: list(results.values[query.name].shape[1:]) for query in ordered} if batches else {}
            entries = {**info.to_json(), "number": number, "has_sums": True, "groups": groups, "chunks": chunks}
            writer.add_key_value_metadata({KEY: json.dumps(entries)})
        sums["rows"] = Segments.of(path, row_group_ends(parquet.read_metadata(path))).to_json()
        write_bytes(folder / ROWS / f"_{name}.json", to_bytes(sums))


def _save_tensors(tensors: Mapping[str, Any], path: Path) -> None:
    """Writes a safetensors file. Converts I/O errors of safetensors to :class:`OSError`.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        # safetensors writes the memory of an array, which is in a different order if the array is transposed.
        safetensors.numpy.save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)
    except SafetensorError as error:
        match = OS_ERROR.search(str(error))
        if match is None:
            raise
        raise OSError(int(match[1]), os.strerror(int(match[1]))) from error


def concatenated(batches: Sequence[BatchResults], queries: Sequence[Query]) -> BatchResults:
    """Concatenates batch results within a shard.

    Raises:
        SweepError: If the groups of a query differ between batches.
    """
    if not batches:
        none = np.empty(0, np.int32)
        return BatchResults(none.astype(np.int64), none, none, {})
    values = {}
    for query in queries:
        columns = [batch.values[query.name] for batch in batches]
        shapes = {column.shape[1:] for column in columns}
        if len(shapes) > 1:
            raise SweepError(
                f"{query.name} has groups of shape {' and '.join(map(str, sorted(shapes)))}: the samples differ in "
                "size. Resize them in the dataset, or query channels."
            )
        values[query.name] = np.concatenate(columns)
    sample, target, prediction = (
        np.concatenate([getattr(batch, name) for batch in batches]) for name in ("sample", "target", "prediction")
    )
    return BatchResults(sample, target, prediction, values)


def tables(results: BatchResults, name: str, names: Sequence[str], value: str) -> Iterator[tuple[int, pa.Table]]:
    """Yields ``(first group, table)`` for consecutive groups of a query, sorted by group, lower group and sample."""
    values = results.values[name]
    groups = values.shape[1] if values.ndim > 1 else 1
    by_group = np.moveaxis(values.reshape(len(values), groups, -1), 0, 2)
    numbers = np.arange(groups, dtype=np.int32) if values.ndim > 1 else np.array([SCALAR], np.int32)
    lowers = np.arange(by_group.shape[1], dtype=np.int32) if values.ndim > 2 else np.array([SCALAR], np.int32)
    step = max(1, CHUNK // max(1, by_group[0].size))
    for first in range(0, groups, step):
        part = slice(first, first + step)
        yield int(numbers[first]), _table(results, by_group[part], numbers[part], lowers, name, names, value)


def _table(
    results: BatchResults,
    values: NDArray[Any],
    groups: NDArray[np.int32],
    lowers: NDArray[np.int32],
    name: str,
    names: Sequence[str],
    value: str,
) -> pa.Table:
    """Creates the rows for values of shape ``(groups, lower, samples)``."""
    pa = arrow()
    repeats, count = len(groups) * len(lowers), len(results.sample)
    queries = np.full(values.size, names.index(name), np.int32)
    columns = [
        np.tile(results.sample, repeats),
        np.tile(results.target, repeats),
        np.tile(results.prediction, repeats),
        pa.DictionaryArray.from_arrays(pa.array(queries), pa.array(list(names), pa.string())),
        np.repeat(groups, len(lowers) * count),
        np.tile(np.repeat(lowers, count), len(groups)),
        pa.array(values.reshape(-1), from_pandas=True).cast(schema(value).field("value").type),
    ]
    return pa.table(columns, schema=schema(value))


def remove_unfinished(folder: Path) -> None:
    """Removes incomplete files left by terminated processes of this machine."""
    mark = f".{platform.node()}."
    for path in (path for inner in (folder, folder / ROWS, folder / MAPS) for path in inner.glob(".*.tmp")):
        owner = path.name.removesuffix(".tmp").rpartition(".")[2]
        if mark in path.name and owner.isdecimal() and not _is_running(int(owner)):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


__all__ = ["ShardInfo", "concatenated", "remove_unfinished", "shard_name", "tables", "write_shard"]
