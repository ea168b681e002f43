"""Reading of shards: Parquet files with the results of consecutive samples and a description in the footer."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import extra
from .checksums import Segments, read_sums
from .sweep_layout import KEY, MAPS, PART, ROWS, ShardError, arrow, path_inside, schema

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Shard:
    """Results of consecutive samples in a stored sweep (a shard), as described in the footer of their file.

    Attributes:
        path: The row file.
        rank: Rank of the process that wrote the shard.
        number: Index of the shard.
        settings: Fingerprint of the sweep settings.
        first: Index of the first sample.
        last: Index of the last sample, inclusive.
        failed: Samples in this range that have no rows, with their errors.
        replaces: Damaged files that the shard replaces, with their errors.
        groups: Groups of each query, as in :class:`~nrm_plugin.dataset.QueryInfo`.
        chunks: ``(query, first group, last group)`` of each row group.
        value: Arrow type of stored values, ``"float"`` or ``"double"``.
        content: Hash of each sample, as in :class:`~nrm_plugin.dataset.shard_writer.ShardInfo`. Empty for sweeps of
            earlier versions.
        stamps: Modification stamp of each sample, as in :class:`~nrm_plugin.dataset.shard_writer.ShardInfo`. Empty for
            sweeps of earlier versions.
        sums: Checksums of the row file, or None for sweeps of earlier versions.
        map_sums: Checksums of the map file, or None if the sweep stores no maps.
    """

    path: Path
    rank: int
    number: int
    settings: str
    first: int
    last: int
    failed: tuple[Mapping[str, Any], ...]
    replaces: tuple[Mapping[str, Any], ...]
    groups: Mapping[str, tuple[int, ...]]
    chunks: tuple[tuple[str, int, int], ...]
    value: str
    content: tuple[str, ...] = ()
    stamps: tuple[str, ...] = ()
    sums: Segments | None = None
    map_sums: Segments | None = None

    @classmethod
    def read(cls, path: Path) -> Shard:
        """Reads the footer of a row file and verifies its checksum.

        Raises:
            ShardError: If the file is damaged.
        """
        parquet = extra("pyarrow.parquet", "dataset")
        path_inside(path.parent.parent, f"{ROWS}/{path.name}")
        match = PART.fullmatch(path.name)
        sums_path = path_inside(path.parent.parent, f"{ROWS}/_{path.stem}.json")
        sums = read_sums(sums_path)
        try:
            rows_sums, map_sums = (_segments(sums, name) for name in ("rows", "maps"))
            if rows_sums is not None:
                rows_sums.check(path, [len(rows_sums.ends) - 1])
            metadata = parquet.read_metadata(path)
            info = json.loads(metadata.metadata[KEY])
            if rows_sums is None and info.get("has_sums"):
                raise ValueError(f"its checksums {sums_path.name} are missing")
            if match is not None and info.get("number", int(match[2])) != int(match[2]):
                raise ValueError(f"it contains shard {info['number']}")
            if match is None or metadata.num_row_groups != len(info["chunks"]):
                raise ValueError("its row groups differ from those listed in its footer")
            rows = sum(math.prod(info["groups"][name]) for name in {name for name, *_ in info["chunks"]})
            if metadata.num_rows != rows * (info["last"] - info["first"] + 1 - len(info["failed"])):
                raise ValueError(f"it has {metadata.num_rows} rows, which differs from its footer")
            return cls(
                path,
                int(match[1]),
                int(match[2]),
                info["settings"],
                info["first"],
                info["last"],
                tuple(info["failed"]),
                tuple(info["replaces"]),
                {name: tuple(groups) for name, groups in info["groups"].items()},
                tuple((name, first, last) for name, first, last in info["chunks"]),
                info["value"],
                tuple(info.get("content", ())),
                tuple(info.get("stamps", ())),
                rows_sums,
                map_sums,
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, (FileNotFoundError, ShardError)):
                raise
            raise ShardError(f"{path} is damaged: {error}.") from error

    def check_content(self) -> None:
        """Verifies every byte of the row and map files.

        Raises:
            ShardError: If a file is damaged.
        """
        if self.sums is not None:
            self.sums.check(self.path)
        if self.map_sums is not None:
            self.check_map_content()

    def check_map_content(self) -> None:
        """Raises :class:`ShardError` if the map file is missing or does not match its checksum."""
        try:
            if self.map_sums is not None:
                self.map_sums.check(self.maps)
        except OSError as error:
            raise ShardError(f"{self.maps} is damaged: {error}.") from error

    def check_settings(self, fingerprint: str) -> None:
        """Raises :class:`ShardError` if the shard belongs to a sweep with different settings."""
        if self.settings != fingerprint:
            raise ShardError(f"{self.path} belongs to another sweep, with different settings.")

    def check_maps(self) -> None:
        """Raises :class:`ShardError` if the map file is missing, damaged, or has the wrong number of samples."""
        try:
            with safe_open(self.maps, "np") as file:
                size = file.get_slice("sample").get_shape()[0]
        except (OSError, SafetensorError) as error:
            raise ShardError(f"{self.maps} is damaged: {error}.") from error
        if size != self.last - self.first + 1 - len(self.failed):
            raise ShardError(f"{self.maps} contains {size} samples, which differs from {self.path.name}.")

    @property
    def maps(self) -> Path:
        """Path of the map file.

        Raises:
            ShardError: If the file is a link to a path outside the folder.
        """
        return path_inside(self.path.parent.parent, f"{MAPS}/{self.path.stem}.safetensors")

    def rows(
        self,
        query: str | None = None,
        groups: tuple[int, int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Reads all rows, or only the rows of a query or of an inclusive range of groups.

        Raises:
            ShardError: If the file is damaged.
        """
        pa, parquet = arrow(), extra("pyarrow.parquet", "dataset")
        compute = extra("pyarrow.compute", "dataset")
        chosen = [
            number
            for number, (name, first, last) in enumerate(self.chunks)
            if query in (None, name) and (groups is None or (first <= groups[1] and groups[0] <= last))
        ]
        names = list(schema().names if columns is None else columns)
        read = list(dict.fromkeys([*names, *([] if groups is None else ["group"])]))
        try:
            if self.sums is not None:
                self.sums.check(self.path, chosen)
            with parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                # Some versions of pyarrow fail to read an empty list of row groups.
                table = file.read_row_groups(chosen, columns=read) if chosen else file.schema_arrow.empty_table()
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{self.path} is damaged: {error}.") from error
        if groups is not None and any(
            not groups[0] <= edge <= groups[1] for number in chosen for edge in self.chunks[number][1:]
        ):
            group = table["group"]
            is_inside = compute.and_(compute.greater_equal(group, groups[0]), compute.less_equal(group, groups[1]))
            table = table.filter(is_inside)
        return table.select(names).replace_schema_metadata(None)


def _segments(sums: Mapping[str, Any] | None, name: str) -> Segments | None:
    return None if sums is None or sums[name] is None else Segments.from_json(sums[name])


def shards_in(folder: Path) -> dict[int, Path]:
    """Returns the row file of each shard, keyed by index. If there are several, the file of the lowest rank counts."""
    paths: dict[int, Path] = {}
    for path in sorted((folder / ROWS).glob("part-*.parquet"), reverse=True):
        match = PART.fullmatch(path.name)
        if match is not None:
            paths[int(match[2])] = path
    return dict(sorted(paths.items()))
