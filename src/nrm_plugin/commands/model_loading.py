"""Loading of models by name: torchvision models or the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..composites import Normalized
from ..dataset.preprocessing import Preprocessing, preprocessing
from .torchvision_models import DEFAULT, torchvision_model
from .user_models import own_model


@dataclass(frozen=True)
class LoadedModel:
    """Model ready to be explained, with preprocessing and metadata.

    Attributes:
        name: Model name, as given by the user.
        weights: Origin of the weights.
        model: The float32 model in evaluation mode.
        preprocessing: Conversion of images to inputs.
        categories: Class names, or empty if unknown.
        notes: Messages for the user.
        rules: Cache of composites, keyed by the settings of a request.
        has_late_layers: Cache of whether the model has layers for a coarse heat map, keyed by input shape.
    """

    name: str
    weights: str
    model: nn.Module
    preprocessing: Preprocessing
    categories: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    rules: dict[Any, Normalized] = field(default_factory=dict, compare=False, repr=False)
    has_late_layers: dict[tuple[int, ...], bool] = field(default_factory=dict, compare=False, repr=False)

    @property
    def parameter(self) -> Tensor:
        """Any model parameter, which determines device and dtype, or an empty tensor if there is none."""
        return next(self.model.parameters(), torch.empty(0))

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The inputs for a black and a white image, with the device and dtype of the model."""
        return self.preprocessing.bounds(self.parameter)


def load(
    name: str,
    weights: str | None = None,
    size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    categories: Sequence[str] = (),
    fit: str = "crop",
) -> LoadedModel:
    """Loads a model by name.

    Args:
        name: Name of a torchvision classification model, or ``package.module:factory`` or ``file.py:factory``.
        weights: Name of a torchvision weights entry, path to a checkpoint file, or ``"none"`` for random weights. None
            uses torchvision's default, or keeps the weights of the user's own model.
        size: As in :func:`~nrm_plugin.dataset.preprocessing.preprocessing`.
        mean: As in :func:`~nrm_plugin.dataset.preprocessing.preprocessing`.
        std: As in :func:`~nrm_plugin.dataset.preprocessing.preprocessing`.
        categories: Class names to use instead of those stored with the weights.
        fit: As in :func:`~nrm_plugin.dataset.preprocessing.preprocessing`.

    Raises:
        ModelError: If the model does not exist, is not a classifier, or cannot be built.
        WeightsError: If the weights do not exist, cannot be downloaded, or do not match the model.
        PreprocessingError: If the size, mean or standard deviation is invalid.
    """
    if ":" in name:
        built = own_model(name, weights)
    else:
        built = torchvision_model(name, DEFAULT if weights is None else weights)
    return LoadedModel(
        name,
        built.weights,
        built.model.eval().float(),
        preprocessing(built.transforms, size, mean, std, fit),
        tuple(categories or built.categories),
        built.notes,
    )
