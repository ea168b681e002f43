"""A model as it is built by name, before its preprocessing is chosen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import NRMError

SEED = 0


class ModelError(NRMError, ValueError):
    """No model has this name, or it cannot be built."""


@dataclass(frozen=True)
class BuiltModel:
    """A model and what belongs to its weights.

    Attributes:
        model: The model.
        weights: Where its weights are from.
        transforms: torchvision's preset of the preprocessing.
        categories: Class names, empty if they are not known.
        notes: What the user should know.
    """

    model: nn.Module
    weights: str
    transforms: Callable[..., Any]
    categories: Sequence[str] = ()
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Random weights that are the same in every call; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        yield
