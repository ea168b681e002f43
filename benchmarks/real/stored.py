"""Arrays that are computed once and stored in the cache, so that runs can be resumed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

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
