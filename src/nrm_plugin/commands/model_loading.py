"""Models by name, ready to be explained: torchvision's with their weights, or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..dataset.preprocessing import Preprocessing, preprocessing
from .own_models import own_model
from .torchvision_models import DEFAULT, torchvision_model


@dataclass(frozen=True)
class LoadedModel:
    """A model that is ready to be explained, and what belongs to it.

    Attributes:
        name: As it was given.
        weights: Where its weights are from.
        model: In evaluation mode, float32.
        preprocessing: Turns images into its inputs.
        categories: Names of its classes, empty if they are not known.
        notes: What the user should know.
    """

    name: str
    weights: str
    model: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parameter(self) -> Tensor:
        """A parameter, whose device and dtype are those of the model; an empty tensor if the model has none."""
        return next(self.model.parameters(), torch.empty(0))


def load(
    name: str,
    weights: str | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    categories: Sequence[str] = (),
) -> LoadedModel:
    """A model by its name.

    Args:
        name: Of a torchvision classification model, or ``package.module:factory`` or ``file.py:factory``.
        weights: Name of torchvision weights, a file, or ``"none"``; None for torchvision's default, or for the weights
            that the user's own factory returns.
        size: As in :func:`~nrm_plugin.dataset.preprocessing.preprocessing`.
        mean: As for ``size``.
        std: As for ``size``.
        categories: Class names, instead of those of the weights.

    Raises:
        ModelError: No such model, or it is not a classifier, or building it failed.
        WeightsError: No such weights, they could not be downloaded, or they belong to another model.
        PreprocessingError: Size, mean and standard deviation fit no image.
    """
    if ":" in name:
        built = own_model(name, weights)
    else:
        built = torchvision_model(name, DEFAULT if weights is None else weights)
    return LoadedModel(
        name,
        built.weights,
        built.model.eval().float(),
        preprocessing(built.transforms, size, mean, std),
        tuple(categories or built.categories),
        built.notes,
    )
