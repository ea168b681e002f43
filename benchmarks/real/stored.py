"""Arrays that are computed once and kept in the cache, so that runs resume."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import packages


def stored(name: str, digest: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays from the cache; computed and stored there the first time.

    Args:
        name: What is computed; part of the name of the file.
        digest: Of everything else that the arrays depend on.
        compute: Returns the arrays.
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
