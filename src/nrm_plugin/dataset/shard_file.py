"""One file of rows, and what its footer says of it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ..errors import extra
from .sweep_layout import KEY, MAPS, PART, ROWS, ShardError, arrow, inside, schema

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class Shard:
    """One file of rows, by what its footer says.

    Attributes:
        path: The file.
        rank, number: As in its name.
        settings: Fingerprint of the sweep that it belongs to.
        first, last: Its samples lie in this range, both ends included.
        failed: Samples of the range without rows, and why.
        replaces: Damaged files in the place of which it was written, and what was wrong with them.
        groups: Of each query, as in :class:`QueryInfo`.
        chunks: ``(query, first group, last group)`` of each row group of the file.
        value: ``"float"`` or ``"double"``.
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

    @classmethod
    def read(cls, path: Path) -> Shard:
        """What the footer of a file says.

        Raises:
            ShardError: It is damaged.
        """
        parquet = extra("pyarrow.parquet", "dataset")
        inside(path.parent.parent, f"{ROWS}/{path.name}")
        found = PART.fullmatch(path.name)
        try:
            metadata = parquet.read_metadata(path)
            said = json.loads(metadata.metadata[KEY])
            if found is None or metadata.num_row_groups != len(said["chunks"]):
                raise ValueError("its parts are not those that it lists")
            rows = sum(math.prod(said["groups"][name]) for name in {name for name, *_ in said["chunks"]})
            if metadata.num_rows != rows * (said["last"] - said["first"] + 1 - len(said["failed"])):
                raise ValueError(f"it has {metadata.num_rows} rows, and not those that it lists")
            return cls(
                path,
                int(found[1]),
                int(found[2]),
                said["settings"],
                said["first"],
                said["last"],
                tuple(said["failed"]),
                tuple(said["replaces"]),
                {name: tuple(groups) for name, groups in said["groups"].items()},
                tuple((name, first, last) for name, first, last in said["chunks"]),
                said["value"],
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            raise ShardError(f"{path} is damaged: {error}") from error

    def check_maps(self) -> None:
        """Raises :class:`ShardError` where the file with its maps is missing or damaged."""
        try:
            with safe_open(self.maps, "np") as file:
                size = file.get_slice("sample").get_shape()[0]
        except (OSError, SafetensorError) as error:
            raise ShardError(f"{self.maps} is damaged: {error}.") from error
        if size != self.last - self.first + 1 - len(self.failed):
            raise ShardError(f"{self.maps} holds {size} samples, and not those of {self.path.name}.")

    @property
    def maps(self) -> Path:
        """The file with its maps.

        Raises:
            ShardError: It is a link that leads out of the folder.
        """
        return inside(self.path.parent.parent, f"{MAPS}/{self.path.stem}.safetensors")

    def rows(
        self,
        query: str | None = None,
        groups: tuple[int, int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> pa.Table:
        """Rows of one query, and of the first to the last of some groups; of all by default.

        Raises:
            ShardError: The file is damaged.
        """
        pa, parquet = arrow(), extra("pyarrow.parquet", "dataset")
        compute = extra("pyarrow.compute", "dataset")
        chosen = [
            place
            for place, (name, first, last) in enumerate(self.chunks)
            if query in (None, name) and (groups is None or (first <= groups[1] and groups[0] <= last))
        ]
        wanted = list(schema().names if columns is None else columns)
        read = list(dict.fromkeys([*wanted, *([] if groups is None else ["group"])]))
        try:
            with parquet.ParquetFile(self.path, page_checksum_verification=True) as file:
                # Not every version of pyarrow reads nothing when asked for nothing.
                table = file.read_row_groups(chosen, columns=read) if chosen else file.schema_arrow.empty_table()
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{self.path} is damaged: {error}") from error
        if groups is not None and any(
            not groups[0] <= edge <= groups[1] for place in chosen for edge in self.chunks[place][1:]
        ):
            group = table["group"]
            inside = compute.and_(compute.greater_equal(group, groups[0]), compute.less_equal(group, groups[1]))
            table = table.filter(inside)
        return table.select(wanted).replace_schema_metadata(None)


def shards_in(folder: Path) -> dict[int, Path]:
    """The files of rows by the number of their shard; of two that hold the same one, that of the lowest rank."""
    found: dict[int, Path] = {}
    for path in sorted((folder / ROWS).glob("part-*.parquet"), reverse=True):
        name = PART.fullmatch(path.name)
        if name is not None:
            found[int(name[2])] = path
    return dict(sorted(found.items()))
