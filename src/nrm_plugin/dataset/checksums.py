"""Checksums of stored files. Every byte belongs to a segment. A segment is verified before its content is used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .sweep_layout import ShardError, json_checksum

BLOCK = 1 << 20
"""Number of bytes read at a time."""


@dataclass(frozen=True)
class Segments:
    """Consecutive segments of a file and their hashes.

    Attributes:
        ends: End offset of each segment. The last one is the file size.
        hashes: Hash of each segment.
    """

    ends: tuple[int, ...]
    hashes: tuple[str, ...]

    @classmethod
    def of(cls, path: Path, ends: Sequence[int] = ()) -> Segments:
        """Splits a file into segments and hashes each of them.

        Args:
            path: The file to hash.
            ends: End offset of each segment but the last.
        """
        edges = (*ends, path.stat().st_size)
        return cls(edges, tuple(_hashes(path, pairwise((0, *edges)))))

    @classmethod
    def from_json(cls, entries: Mapping[str, Any]) -> Segments:
        """Restores segments from the result of :meth:`to_json`."""
        ends, hashes = tuple(entries["ends"]), tuple(entries["hashes"])
        if not ends or len(ends) != len(hashes):
            raise ValueError("its checksums are incomplete")
        return cls(ends, hashes)

    def to_json(self) -> dict[str, Any]:
        """Converts the segments to JSON."""
        return {"ends": list(self.ends), "hashes": list(self.hashes)}

    def check(self, path: Path, numbers: Iterable[int] | None = None) -> None:
        """Verifies segments of a file.

        Args:
            path: The file to verify.
            numbers: Indices of the segments, or None for all.

        Raises:
            ShardError: If the hash of a segment or the file size differs.
        """
        size = path.stat().st_size
        if size != self.ends[-1]:
            raise ShardError(f"{path} is damaged: it has {size} bytes, and had {self.ends[-1]} when it was written.")
        starts = (0, *self.ends)
        chosen = range(len(self.ends)) if numbers is None else list(numbers)
        parts = ((starts[number], self.ends[number]) for number in chosen)
        for number, actual in zip(chosen, _hashes(path, parts), strict=True):
            if actual != self.hashes[number]:
                raise ShardError(
                    f"{path} is damaged: its bytes {starts[number]} to {self.ends[number]} differ from their checksum."
                )


def _hashes(path: Path, parts: Iterable[tuple[int, int]]) -> Iterable[str]:
    with path.open("rb") as file:
        for start, end in parts:
            content, left = hashlib.blake2b(digest_size=16), end - start
            file.seek(start)
            while left > 0 and (block := file.read(min(BLOCK, left))):
                content.update(block)
                left -= len(block)
            yield content.hexdigest()


def row_group_ends(metadata: Any) -> list[int]:
    """Returns the end offset of each row group in a Parquet file. The footer follows the last row group."""
    ends = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        ends.append(max(_end(group.column(column)) for column in range(group.num_columns)))
    return ends


def _end(column: Any) -> int:
    starts = [start for start in (column.dictionary_page_offset, column.data_page_offset) if start]
    return int(min(starts) + column.total_compressed_size)


def to_bytes(entries: Mapping[str, Any]) -> bytes:
    """Serializes checksums, including a checksum of the checksums themselves."""
    return json.dumps({**entries, "checksum": json_checksum(entries)}).encode()


def read_sums(path: Path) -> dict[str, Any] | None:
    """Reads a checksum file. Returns None if it does not exist.

    Raises:
        ShardError: If the file is damaged.
    """
    try:
        entries = json.loads(path.read_bytes())
        if not isinstance(entries, dict):
            raise TypeError("it is not a JSON object")
        if entries.pop("checksum", None) != json_checksum(entries):
            raise ValueError("its own checksum differs")
        return entries
    except FileNotFoundError:
        return None
    except (OSError, TypeError, ValueError, RecursionError) as error:
        raise ShardError(f"{path} is damaged: {error}.") from error


__all__ = ["Segments", "read_sums", "row_group_ends", "to_bytes"]
