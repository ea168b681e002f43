"""What a sweep looks like on disk.

- ``manifest.json``: what was asked, of which model, with which settings, and how far it came
- ``rows/part-RRRR-NNNNNN.parquet``: shard ``N``, written by rank ``R``: one row for each sample, query and group
- ``maps/part-RRRR-NNNNNN.safetensors``: tensors of the same samples, where a query asks for maps
- ``by-query/NNNN.parquet``: the rows of one query, but for joint matrices, by group, those of largest value first; once
  a sweep is complete

A shard is the file with its number, whichever rank wrote it. Files whose names start with a dot are unfinished.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import NRMError, extra

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "nrm-plugin sweep 1"
MANIFEST, ROWS, MAPS, BY_QUERY = "manifest.json", "rows", "maps", "by-query"
PART = re.compile(r"part-(\d{4,})-(\d{6,})\.parquet")
KEY = b"nrm-plugin"
"""Where the metadata of a Parquet file hold what is said of the shard, as JSON."""
SCALAR = -1
"""``group`` of a query with one number for each sample, and ``lower`` of one that has no lower layer."""

State = Literal["running", "interrupted", "complete"]
OnError = Literal["raise", "skip"]


class SweepError(NRMError, ValueError):
    """A sweep that cannot be run, continued or read."""


class SettingsError(SweepError):
    """A folder that holds a sweep with other settings."""


class ShardError(SweepError):
    """A file of a sweep that is damaged, or is not of this sweep."""


def arrow() -> Any:
    """pyarrow, with its module for Parquet.

    Raises:
        MissingExtraError: It is not installed.
    """
    extra("pyarrow.parquet", "dataset")
    return extra("pyarrow", "dataset")


def schema(value: str = "float") -> pa.Schema:
    """Columns of the rows.

    Args:
        value: ``"float"`` or ``"double"``, as the measure has it.

    Returns:
        ``sample`` is the place in the data set; ``target`` the class that is explained and ``prediction`` that of the
        largest output, -1 where there is none; ``group`` the channel, position or label of a layer and ``lower`` that
        of the lower layer of a joint matrix, else -1. ``value`` is null where it would be a quotient by (almost) zero.
    """
    pa = arrow()
    return pa.schema(
        [
            ("sample", pa.int64()),
            ("target", pa.int32()),
            ("prediction", pa.int32()),
            ("query", pa.dictionary(pa.int32(), pa.string())),
            ("group", pa.int32()),
            ("lower", pa.int32()),
            ("value", pa.float64() if value == "double" else pa.float32()),
        ]
    )


@dataclass(frozen=True)
class QueryInfo:
    """One query of a sweep, as its manifest tells it.

    Attributes:
        name: Its name; unique in the sweep.
        kind: Its class, such as ``"Marginal"``.
        layers: Names of its layers, the upper one first; empty for events.
        groups: How many groups it has, ``(C,)``, ``(upper, lower)`` for joint relevance, ``()`` for one number, or the
            shape of a map; None where no shard is written yet.
        spec: Everything about it, as JSON; ``dataset.queries.from_json`` makes the query of it.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    groups: tuple[int, ...] | None
    spec: Mapping[str, Any]

    @property
    def is_map(self) -> bool:
        """Whether its tensors are in ``maps/``, and not among the rows."""
        return self.kind == "Maps"


@dataclass(frozen=True)
class Manifest:
    """What a sweep says of itself.

    Attributes:
        settings: All that changes numbers: versions, fingerprint of the model, composite, data, queries. A sweep that
            differs in any of them is another one.
        fingerprint: Hash of the settings, which each shard carries.
        queries: What was asked.
        state: ``"running"`` (also after a kill), ``"interrupted"`` or ``"complete"``.
        samples: How many the data set has; None where it does not tell before it ends.
        value: ``"float"`` or ``"double"``.
        ranks: Processes that wrote shards.
        failed: Samples without rows, as ``{"sample": 3, "why": "…"}``.
        bad_shards: Files that were found damaged and evaluated again, as ``{"file": "…", "why": "…"}``.
        environment: What was there and changes no setting: threads, devices.
    """

    settings: Mapping[str, Any]
    fingerprint: str
    queries: tuple[QueryInfo, ...]
    state: State = "running"
    samples: int | None = None
    value: str = "float"
    ranks: tuple[int, ...] = (0,)
    failed: tuple[Mapping[str, Any], ...] = ()
    bad_shards: tuple[Mapping[str, Any], ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Replaces the manifest of a folder in one step."""
        write_bytes(
            folder / MANIFEST, json.dumps({"format": FORMAT, **asdict(self)}, indent=1, ensure_ascii=False).encode()
        )

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The manifest of a folder.

        Raises:
            SweepError: There is none, or it is of another format.
        """
        path = inside(folder, MANIFEST)
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            if entries.pop("format") != FORMAT:
                raise SweepError(
                    f"{path} is of another format than {FORMAT!r}, which this version of the package reads."
                )
            queries = tuple(
                QueryInfo(**{**query, "layers": tuple(query["layers"]), "groups": _shape(query["groups"])})
                for query in entries.pop("queries")
            )
            lists: dict[str, Any] = {key: tuple(entries.pop(key)) for key in ("ranks", "failed", "bad_shards")}
            return cls(queries=queries, **lists, **entries)
        except FileNotFoundError:
            raise SweepError(f"there is no sweep in {folder}: it has no {MANIFEST}.") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, SweepError):
                raise
            raise SweepError(f"{path} is damaged and cannot be read as the manifest of a sweep: {error!r}.") from error


def _shape(groups: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if groups is None else tuple(int(size) for size in groups)


def inside(folder: Path, name: str) -> Path:
    """What has a name in the folder of a sweep, which a stranger may have made.

    Raises:
        ShardError: It is a link that leads out of the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShardError(
            f"{path} is a link that leads out of {folder}. Nothing outside is read or written; copy it there."
        )
    return path


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file in one step: whoever reads it finds the old one or the new one, whole."""
    with Replacing(path) as unfinished, unfinished.open("wb") as file:
        file.write(content)


class Replacing:
    """A path to write to, in a context; only what is whole and on the disk gets the name of the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.unfinished = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        self.unfinished.unlink(missing_ok=True)  # a link would be followed
        return self.unfinished

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None:
                to_disk(self.unfinished)
                self.unfinished.replace(self.path)
                if os.name == "posix":  # elsewhere a folder cannot be opened
                    to_disk(self.path.parent)
        finally:
            self.unfinished.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Waits until what was written to a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = ["Manifest", "OnError", "QueryInfo", "SettingsError", "ShardError", "State", "SweepError", "schema"]
