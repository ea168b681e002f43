"""Arrays that are computed once and stored in the cache, so that runs can be resumed, and results of several parts."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from nrm_plugin.dataset.atomic_files import write_bytes

from . import packages


def stored(name: str, digest: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Returns arrays from the cache; at the first call, they are computed and stored there.

    Args:
        name: Name of the computation, which is part of the file name.
        digest: Digest of everything else on which the arrays depend.
        compute: Function that returns the arrays.
    """
    folder = packages.cache() / "results"
    folder.mkdir(exist_ok=True)
    file = folder / f"{name.replace('/', '-').replace(' ', '_')}-{digest[:12]}.npz"
    if not file.exists():
        partial = file.with_suffix(".part.npz")
        np.savez(partial, **compute())  # type: ignore[arg-type]
        partial.replace(file)
    with np.load(file) as arrays:
        return dict(arrays)


def locked(path: Path) -> FileLock:
    """Returns a lock of a file or folder, whose parent is created: only one process at a time computes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(f"{path}.lock")


def update(file: Path, net: str, found: dict[str, Any], order: Iterable[str], **others: Any) -> dict[str, Any]:
    """Stores the results of one net in a file; results of other nets and other sections in it are kept.

    Args:
        file: A JSON file, which other processes may update as well.
        net: Name of the net.
        found: Its results.
        order: Names of all nets in the order of the tables.
        others: Further sections of the file.

    Returns:
        The content of the file.
    """
    with locked(packages.cache() / file.name):
        results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        nets = {**results.get("nets", {}), net: found}
        places = {name: place for place, name in enumerate(order)}
        ordered = sorted(nets, key=lambda name: places.get(name, len(places)))
        results |= {"nets": {name: nets[name] for name in ordered}, **others}
        write_bytes(file, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    return results
