"""Accumulation of relevance vectors and their restriction to the neurons in a mask."""

from __future__ import annotations

from collections.abc import Hashable
from typing import TypeVar

from torch import Tensor

Key = TypeVar("Key", bound=Hashable)


def masked(vector: Tensor, mask: Tensor | None) -> Tensor:
    """Returns a relevance vector with zeros outside a mask, or the vector itself if no mask is given."""
    return vector if mask is None else vector * mask.to(vector.device)


def add_to(vectors: dict[Key, Tensor], key: Key, vector: Tensor) -> None:
    """Adds a vector to the sum ``vectors[key]``, which starts at zero."""
    vectors[key] = vectors[key] + vector if key in vectors else vector
