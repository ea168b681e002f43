"""File layout of a sweep folder.

- ``manifest.json``: the queries, the settings and the state
- ``rows/part-RRRR-NNNNNN.parquet``: shard ``N``, written by rank ``R``, with one row per sample, query and group
- ``maps/part-RRRR-NNNNNN.safetensors``: tensors of the same samples, if there are queries for maps
- ``by-query/NNNN.parquet``: the rows of one query, sorted by group and decreasing value; written when the sweep is
  complete, except for joint matrices
- ``rows/_part-RRRR-NNNNNN.json``, ``by-query/_sums.json``: checksums of these files; Parquet readers ignore names that
  start with an underscore
- ``locks/``: empty files that running processes lock

A shard is identified by its number, regardless of the rank that wrote it. Files whose names start with a dot are
incomplete.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import NRMError, extra
from .atomic_files import write_bytes

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = "nrm-plugin sweep 1"
MANIFEST, ROWS, MAPS, BY_QUERY = "manifest.json", "rows", "maps", "by-query"
LOCKS = "locks"
SUMS = "_sums.json"
"""Name of the file with the checksums of the index."""
PART = re.compile(r"part-(\d{4,})-(\d{6,})\.parquet")
KEY = b"nrm-plugin"
"""Parquet metadata key of the shard description (JSON)."""
SCALAR = -1
"""Value of ``group`` for queries with one value per sample and of ``lower`` for queries without a lower layer."""

REBUILT = "The same sweep with on_error='skip' writes it again; the stored rows are kept."

State = Literal["running", "interrupted", "complete"]
OnError = Literal["raise", "skip"]


class SweepError(NRMError, ValueError):
    """Raised if a sweep cannot be run, resumed or read."""


class SettingsError(SweepError):
    """Raised if the folder contains a sweep with different settings or data."""


class ShardError(SweepError):
    """Raised if a file of a sweep is damaged or belongs to a different sweep."""


class ManifestError(ShardError):
    """Raised if the manifest of a sweep is damaged or was edited."""


def arrow() -> Any:
    """Imports pyarrow and its Parquet module.

    Raises:
        MissingExtraError: If pyarrow is not installed.
    """
    extra("pyarrow.parquet", "dataset")
    return extra("pyarrow", "dataset")


def schema(value: str = "float") -> pa.Schema:
    """Returns the Arrow schema of the result rows.

    ``sample`` is the index in the dataset. ``target`` is the explained class and ``prediction`` the predicted class,
    or -1 if undefined. ``group`` is a channel, position, neuron or label. ``lower`` is the group in the lower layer of
    a joint matrix, or -1. ``value`` is null if its denominator is zero or almost zero.

    Args:
        value: Type of stored values, ``"float"`` or ``"double"``.
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
    """Manifest entry of a query.

    Attributes:
        name: Name, unique in the sweep.
        kind: Name of the query's class, such as ``"Marginal"``.
        layers: Names of the layers, from the upper to the lower, or empty for events.
        groups: Number of groups, as ``(C,)`` or, for joint relevance, ``(upper, lower)``. It is ``()`` for a single
            value and the shape of a map for maps. None until a shard is written.
        spec: The query as JSON. ``dataset.queries.from_json`` restores it.
    """

    name: str
    kind: str
    layers: tuple[str, ...]
    groups: tuple[int, ...] | None
    spec: Mapping[str, Any]

    @property
    def is_map(self) -> bool:
        """True if the results are tensors in ``maps/`` rather than rows."""
        return self.kind == "Maps"

    @property
    def has_event(self) -> bool:
        """True if the relevance is joint with an event or conditional on it."""
        return any(self.spec.get(key) is not None for key in ("joint", "given"))


@dataclass(frozen=True)
class Manifest:
    """Description of a sweep, stored in its folder.

    Attributes:
        settings: All settings that affect results: versions, model fingerprint, composite, data and queries.
        fingerprint: Hash of the settings, which is stored in each shard as well.
        queries: Manifest entries of the queries.
        state: ``"running"`` (also if the process was killed), ``"interrupted"`` or ``"complete"``.
        samples: Number of samples, or None for an iterable dataset that is not finished.
        value: Arrow type of stored values, ``"float"`` or ``"double"``.
        ranks: Ranks of the processes that wrote shards.
        failed: Samples without rows, each as ``{"sample": 3, "why": "…"}``.
        bad_shards: Damaged files that were evaluated again, each as ``{"file": "…", "why": "…"}``.
        environment: Number of threads and device. They do not count as settings.
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
        """Writes the manifest to a folder atomically."""
        entries = {"format": FORMAT, **asdict(self)}
        entries["checksum"] = json_checksum(entries)
        write_bytes(folder / MANIFEST, json.dumps(entries, indent=1, ensure_ascii=False).encode())

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Reads the manifest of a sweep folder.

        Raises:
            SweepError: If the folder has no manifest or one in another format.
            ManifestError: If the manifest is damaged or was edited.
        """
        path = path_inside(folder, MANIFEST)
        try:
            entries = json.loads(path.read_text(encoding="utf-8"))
            checksum = entries.pop("checksum", None)  # earlier versions did not store a checksum
            if entries["format"] != FORMAT:
                raise SweepError(f"{path} has a different format; this version of the package reads {FORMAT!r}.")
            if checksum is not None and checksum != json_checksum(entries):
                raise ManifestError(f"{path} is damaged or was edited: its checksum differs. {REBUILT}")
            del entries["format"]
            queries = tuple(
                QueryInfo(**{**query, "layers": tuple(query["layers"]), "groups": _shape(query["groups"])})
                for query in entries.pop("queries")
            )
            lists: dict[str, Any] = {key: tuple(entries.pop(key)) for key in ("ranks", "failed", "bad_shards")}
            return cls(queries=queries, **lists, **entries)
        except FileNotFoundError:
            raise SweepError(f"no sweep in {folder}: the folder has no {MANIFEST}.") from None
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, SweepError):
                raise
            raise ManifestError(
                f"{path} is damaged and cannot be read as the manifest of a sweep: {error!r}. {REBUILT}"
            ) from error


def json_checksum(entries: Mapping[str, Any]) -> str:
    """Hashes a JSON object, regardless of the order of its keys."""
    normal = json.loads(json.dumps(entries))  # tuples become lists, and keys become text
    return hashlib.blake2b(json.dumps(normal, sort_keys=True).encode(), digest_size=16).hexdigest()


def _shape(groups: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if groups is None else tuple(int(size) for size in groups)


def path_inside(folder: Path, name: str) -> Path:
    """Returns the path of a file in a sweep folder. The folder may come from an untrusted source.

    Raises:
        ShardError: If the file is a link to a path outside the folder.
    """
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ShardError(
            f"{path} is a link to a file outside of {folder}. Such files are neither read nor written; copy the file "
            "into the folder."
        )
    return path


__all__ = [
    "Manifest",
    "ManifestError",
    "OnError",
    "QueryInfo",
    "SettingsError",
    "ShardError",
    "State",
    "SweepError",
    "arrow",
    "json_checksum",
    "path_inside",
    "schema",
]
