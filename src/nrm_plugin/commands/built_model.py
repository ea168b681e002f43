"""Models built by name, before their preprocessing is chosen."""

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
    """Raised if no model has the given name or the model cannot be built."""


@dataclass(frozen=True)
class BuiltModel:
    """Model with the metadata of its weights.

    Attributes:
        model: The model, with its weights loaded.
        weights: Origin of the weights.
        transforms: torchvision's preprocessing preset.
        categories: Class names, or empty if unknown.
        notes: Messages for the user.
    """

    model: nn.Module
    weights: str
    transforms: Callable[..., Any]
    categories: Sequence[str] = ()
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Context manager that seeds the initialization of weights and restores the random state of the caller."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        yield
