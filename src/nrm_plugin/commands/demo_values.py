"""Digits of the demo and the relevance of each layer in the normalized measure and in Zennit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus
from zennit.core import Composite

from ..errors import NRMError
from ..measure.measure import RelevanceMeasure
from .options import MISCLASSIFIED

LAYERS = (
    "classifier.3", "classifier.0", "features.12", "features.10", "features.7", "features.5", "features.2",
    "features.0", "input",
)  # fmt: skip
"""Layers of the table, from the output to the input. The layers in between pass relevance on unchanged."""
TABLE_COMPOSITE = EpsilonPlus
"""Composite of the table and the layer budgets.

It is one of Zennit's composites because the default composite absorbs no relevance. All other figures use the default.
"""


class DemoError(NRMError, ValueError):
    """Raised if the requested digits are invalid or if more of them are requested than are held out."""


@dataclass(frozen=True)
class Sample:
    """Held-out digit.

    Attributes:
        name: Prefix of the file names.
        index: Index among the held-out digits.
        label: True class.
        predicted: Predicted class, to be explained.
    """

    name: str
    index: int
    label: int
    predicted: int

    def __str__(self) -> str:
        return f"held-out digit {self.index}: a {self.label}, classified as {self.predicted}"


@dataclass(frozen=True)
class Row:
    """Relevance quantities of one layer, each a dimensionless tensor of shape ``(N,)``.

    Attributes:
        layer: Name of the tap.
        plain: Total relevance in Zennit, for an initial relevance of 1 at the output.
        mass: Mass of the walks that cross the layer; ``mass + sink + bypass == 1``.
        sink: Mass absorbed above the layer.
        bypass: Mass of the walks that bypass the layer.
        variation: Tap variation, at least 1.
    """

    layer: str
    plain: Tensor
    mass: Tensor
    sink: Tensor
    bypass: Tensor
    variation: Tensor


@torch.no_grad()
def choose(model: nn.Module, images: Tensor, labels: Tensor, kinds: Sequence[str]) -> tuple[list[Sample], float]:
    """Selects the most confidently predicted digits of each kind and computes the accuracy on all digits.

    Raises:
        DemoError: If no kind is given, a kind is neither a digit nor ``"misread"``, or a kind has too few digits.
    """
    confidence, predicted = model(images).double().log_softmax(1).max(1)
    samples: list[Sample] = []
    for kind in kinds:
        if kind == MISCLASSIFIED:
            candidates = (predicted != labels).nonzero()[:, 0]
        elif kind in {str(digit) for digit in range(10)}:
            candidates = ((labels == int(kind)) & (predicted == labels)).nonzero()[:, 0]
        else:
            raise DemoError(f"{kind!r} is neither a digit from 0 to 9 nor {MISCLASSIFIED!r}.")
        number = sum(sample.name.split("-")[0] == kind for sample in samples)
        if number >= len(candidates):
            raise DemoError(f"{number + 1} digits {kind!r} are requested, but only {len(candidates)} are held out.")
        index = int(candidates[confidence[candidates].argsort(descending=True, stable=True)[number]])
        name = kind if number == 0 else f"{kind}-{number + 1}"
        samples.append(Sample(name, index, int(labels[index]), int(predicted[index])))
    if not samples:
        raise DemoError("no digits were requested.")
    return samples, float((predicted == labels).double().mean())


def layer_rows(model: nn.Module, images: Tensor, target: Sequence[int]) -> list[Row]:
    """Computes Zennit's relevance and the normalized measure at each layer, both with :data:`TABLE_COMPOSITE`.

    Args:
        model: The digit classifier.
        images: Images of the digits, of shape ``(N, 1, 16, 16)``.
        target: The class to explain for each image.
    """
    mu = RelevanceMeasure(model, images, list(target), composite=TABLE_COMPOSITE())
    plain = plain_sums(model, images, target, TABLE_COMPOSITE(), LAYERS)
    masses = mu.marginal(list(LAYERS))
    return [
        Row(layer, plain[layer], masses[layer].flatten(1).sum(1), mu.sink(layer), mu.bypass(layer), mu.variation(layer))
        for layer in LAYERS
    ]


def plain_sums(
    model: nn.Module, images: Tensor, target: Sequence[int], composite: Composite, layers: Sequence[str]
) -> dict[str, Tensor]:
    """Computes the total relevance at each layer with Zennit alone, as tensors of shape ``(N,)``.

    The initial relevance at the target is 1.

    Args:
        model: The digit classifier.
        images: Inputs of shape ``(N, …)``.
        target: Explained class of each image.
        composite: The composite, without normalization.
        layers: Module names or ``"input"``.
    """
    model = copy.deepcopy(model)  # Zennit 1.0 replaces parameters of the model
    inputs = images.clone().requires_grad_()
    activations = {"input": inputs}
    with composite.context(model):
        handles = [
            module.register_forward_hook(lambda _, inputs, output, name=name: activations.update({name: output}))
            for name, module in model.named_modules()
            if name in layers
        ]
        try:
            output = model(inputs)
        finally:
            for handle in handles:
                handle.remove()
        start = torch.nn.functional.one_hot(torch.tensor(target), output.shape[1]).to(output)
        relevances = torch.autograd.grad(output, list(activations.values()), start)
    return {name: relevance.flatten(1).sum(1) for name, relevance in zip(activations, relevances, strict=True)}
