"""What Quantus measures of heat maps: ROAD, sensitivity to noise, and to the parameters and the output of the net.

Its metrics take and return arrays; here they take a :class:`Question` and return one value per sample. Pixel flipping
is here too, as an oracle of :func:`benchmarks.faithfulness.pixels.flipped`, which has logits and softmax outputs of one
forward pass, where Quantus needs two.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.faithfulness.metrics import rank_correlation, same_noise

IS_HERE = find_spec("quantus") is not None
PERCENTAGES = (20, 50, 80)
"""Of the pixels, that ROAD takes away."""

RADIUS, TRIES, MOST = 0.05, 3, 10.0
"""Noise of pixels, how often, and the largest relative change that counts."""

STAGES = 8
"""Steps in which all layers get new parameters."""

METRICS = {
    "ROAD, most first": -1,
    "ROAD, least first": 1,
    "sensitivity": -1,
    "random logit": -1,
    "cascade, area": -1,
    "cascade, end": -1,
}


@dataclass
class Question:
    """A net, its samples and their heat maps.

    Args:
        model: The net, which keeps its parameters.
        images: ``(N, C, H, W)``.
        target: Explained outputs, ``(N,)``.
        heat: Heat maps, ``(N, 1, H, W)``.
        explain: Model, images and targets to heat maps.
        batch: Samples that are explained at once.
    """

    model: nn.Module
    images: Tensor
    target: Tensor
    heat: Tensor
    explain: Callable[[nn.Module, Tensor, Tensor], Tensor]
    batch: int

    def ask(self, metric: Any, model: nn.Module, heat: Tensor, softmax: bool = False) -> Any:
        """What a metric of Quantus returns; random numbers are the same in each call, and are as before afterwards."""

        def explained(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Any:
            model = model.net if isinstance(model, Staged) else model
            return self.explain(model, torch.as_tensor(inputs).to(self.images), torch.as_tensor(targets)).numpy()

        with same_noise(), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return metric(
                model, self.images.numpy(), self.target.numpy(), a_batch=heat.numpy(), explain_func=explained,
                channel_first=True, softmax=softmax, batch_size=self.batch,
            )  # fmt: skip


def measured(question: Question) -> dict[str, Tensor]:
    """All of ``METRICS``, ``(N,)`` each."""
    curve = cascade(question)
    return {
        "ROAD, most first": road(question, most_first=True),
        "ROAD, least first": road(question, most_first=False),
        "sensitivity": sensitivity(question),
        "random logit": random_logit(question),
        "cascade, area": curve[1:].mean(0),
        "cascade, end": curve[-1],
    } | {f"cascade, {step}": values for step, values in enumerate(curve)}


def settings() -> dict[str, bool]:
    """Of all metrics: heat maps as they are."""
    return {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}


def road(question: Question, most_first: bool) -> Tensor:
    """Share of ``PERCENTAGES`` at which the prediction is the same, pixels imputed from neighbours, ``(N,)``.

    ROAD in Quantus 0.6 reads a map of fewer channels than the image as one of all of them, and then fails; so the other
    channels come last here, and do not count. It averages over the samples of the first batch; so that is taken away.

    Source: Rong et al., arXiv 2202.00449.
    """
    from quantus import ROAD

    metric = ROAD(percentages=list(PERCENTAGES), **settings())
    metric.custom_postprocess, metric.a_size = lambda **data: None, question.heat[0].numel()
    heat = question.heat - question.heat.amin() if most_first else question.heat.amax() - question.heat
    last = (heat.amin() - 1).expand(len(heat), question.images.shape[1] - 1, *heat.shape[2:])
    same = question.ask(metric, question.model, torch.cat([heat, last], 1))
    return torch.as_tensor(np.concatenate(same)).float().mean(1)


def sensitivity(question: Question) -> Tensor:
    """Largest relative change of a heat map under uniform noise of the input, in the 2-norm, ``(N,)``.

    Changes above ``MOST`` count as that: a map that is zero all over changes without bound.

    Source: Yeh et al., arXiv 1901.09392.
    """
    from quantus import MaxSensitivity

    def size(a: Any) -> Any:
        return np.maximum(np.linalg.norm(a, axis=-1), 1e-12)

    metric = MaxSensitivity(nr_samples=TRIES, lower_bound=RADIUS, norm_denominator=size, **settings())
    found = question.ask(metric, question.model, question.heat)
    return torch.as_tensor(np.asarray(found)).float().clamp(max=MOST)


def random_logit(question: Question) -> Tensor:
    """Absolute rank correlation with the heat map of another output, drawn for each sample, ``(N,)``.

    Source: Sixt et al., arXiv 1912.09818.
    """
    from quantus import RandomLogit

    with torch.no_grad():
        outputs = question.model(question.images[:1]).shape[1]
    metric = RandomLogit(similarity_func=similarity, num_classes=outputs, seed=0, **settings())
    return torch.as_tensor(np.asarray(question.ask(metric, question.model, question.heat))).float()


def cascade(question: Question) -> Tensor:
    """Absolute rank correlation with the heat maps of nets that lose their parameters from the top, ``(S + 1, N)``.

    Source: Adebayo et al., arXiv 1810.03292; Quantus calls it MPRT.
    """
    from quantus import MPRT

    metric = MPRT(similarity_func=similarity, layer_order="top_down", seed=0, **settings())
    found = question.ask(metric, Staged(question.model).eval(), question.heat)
    return torch.tensor(list(found.values()))


def similarity(a: Any, b: Any, batched: bool = True) -> Any:
    """Absolute rank correlation of rows; Quantus's own fails where a map is constant."""
    return rank_correlation(torch.as_tensor(a), torch.as_tensor(b)).abs().numpy()


def pixel_flipping(question: Question, order: Tensor, at_once: int, other: Tensor, softmax: bool) -> Tensor:
    """Target output after each step of pixel flipping, ``(S, N)``.

    Args:
        question: The net and its samples.
        order: When each pixel goes, ``(N, 1, H, W)``.
        at_once: Pixels that go in a step.
        other: What comes in their place, as broadcast to images.
        softmax: Softmax outputs, or logits.

    Source: Bach et al., doi 10.1371/journal.pone.0130140.
    """
    from quantus import PixelFlipping

    fill = other.expand_as(question.images).flatten(1).numpy()
    done = 0

    def replaced(arr: Any, indices: Any, **options: Any) -> Any:
        nonlocal done
        rows = (done // steps) * question.batch + np.arange(len(arr))[:, None]
        done += 1
        arr = arr.copy()
        arr[np.arange(len(arr))[:, None], indices] = fill[rows, indices]
        return arr

    channels = question.images.shape[1]
    steps = -(-order[0].numel() // at_once)
    metric = PixelFlipping(features_in_step=at_once * channels, perturb_func=replaced, **settings())
    metric.custom_preprocess = lambda **data: None  # it asks for steps that divide the pixels of one channel
    return torch.tensor(question.ask(metric, question.model, -order, softmax)).T


class Staged(nn.Module):
    """A net that Quantus redraws in few steps.

    Its MPRT redraws every module that has ``reset_parameters``, one after the other, and explains all samples after
    each. Here the last layer comes first and alone, and the others in groups of about equal size.
    """

    def __init__(self, net: nn.Module, stages: int = STAGES) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        self.stages = stages

    def forward(self, x: Tensor) -> Tensor:
        """That of the net."""
        result: Tensor = self.net(x)
        return result

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        """Groups of layers, the lowest first."""
        layers = [module for module in self.net.modules() if hasattr(module, "reset_parameters")]
        count = min(self.stages, len(layers)) - 1
        bounds = [round(step * (len(layers) - 1) / count) for step in range(count + 1)] if count else [0]
        for number, (start, end) in enumerate(zip(bounds, [*bounds[1:], len(layers)], strict=True)):
            yield f"stage {number}", Stage(layers[start:end])


@dataclass
class Stage:
    """Layers that get new parameters together."""

    layers: list[Any]

    def reset_parameters(self) -> None:
        """New initial values."""
        for layer in self.layers:
            layer.reset_parameters()
