"""The result of building a model from its name.

It contains the model and the metadata of its weights, before preprocessing is chosen.
"""

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
    """Raised if no model has the given name, or the model cannot be built."""


@dataclass(frozen=True)
class BuiltModel:
    """A model with the metadata of its weights.

    Attributes:
        model: The model.
        weights: Where the weights come from, as text.
        transforms: torchvision's preprocessing preset.
        categories: Class names; empty if unknown.
        notes: Messages to the user.
    """

    model: nn.Module
    weights: str
    transforms: Callable[..., Any]
    categories: Sequence[str] = ()
    notes: tuple[str, ...] = ()


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Context manager that makes random weights equal in every call, without changing the caller's random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        yield
