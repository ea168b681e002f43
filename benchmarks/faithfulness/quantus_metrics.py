"""Metrics of heat maps by Quantus: ROAD, sensitivity to noise, and dependence on parameters and output of the net.

The metrics of Quantus use arrays; here they take an :class:`Evaluation` and return one value per sample. Pixel flipping
is included as a reference for :func:`benchmarks.faithfulness.pixels.flipped`, which computes logits and softmax outputs
in one forward pass, where Quantus needs two.
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

IS_INSTALLED = find_spec("quantus") is not None
PERCENTAGES = (20, 50, 80)
"""Percentages of pixels that ROAD removes."""

RADIUS, TRIES, MOST = 0.05, 3, 10.0
"""Noise of pixels, number of draws, and the cap on the relative change."""

STAGES = 8
"""Steps in which all layers are re-initialized."""

METRICS = {
    "ROAD, most first": -1,
    "ROAD, least first": 1,
    "sensitivity": -1,
    "random logit": -1,
    "cascade, area": -1,
    "cascade, end": -1,
}


@dataclass
class Evaluation:
    """A net, its samples and their heat maps.

    Args:
        model: The net; its parameters are not changed.
        images: ``(N, C, H, W)``.
        target: Explained outputs, ``(N,)``.
        heat: Heat maps, ``(N, 1, H, W)``.
        explain: Maps model, images and targets to heat maps.
        batch: Batch size.
    """

    model: nn.Module
    images: Tensor
    target: Tensor
    heat: Tensor
    explain: Callable[[nn.Module, Tensor, Tensor], Tensor]
    batch: int

    def compute(self, metric: Any, model: nn.Module, heat: Tensor, softmax: bool = False) -> Any:
        """Returns the result of a metric of Quantus, with the same random numbers in each call."""

        def explained(model: nn.Module, inputs: Any, targets: Any, **options: Any) -> Any:
            model = model.net if isinstance(model, Staged) else model
            return self.explain(model, torch.as_tensor(inputs).to(self.images), torch.as_tensor(targets)).numpy()

        with same_noise(), warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            return metric(
                model, self.images.numpy(), self.target.numpy(), a_batch=heat.numpy(), explain_func=explained,
                channel_first=True, softmax=softmax, batch_size=self.batch,
            )  # fmt: skip


def measured(evaluation: Evaluation) -> dict[str, Tensor]:
    """Returns all of ``METRICS``, ``(N,)`` each."""
    curve = cascade(evaluation)
    return {
        "ROAD, most first": road(evaluation, most_first=True),
        "ROAD, least first": road(evaluation, most_first=False),
        "sensitivity": sensitivity(evaluation),
        "random logit": random_logit(evaluation),
        "cascade, area": curve[1:].mean(0),
        "cascade, end": curve[-1],
    } | {f"cascade, {step}": values for step, values in enumerate(curve)}


def settings() -> dict[str, bool]:
    """Returns the settings of all metrics: heat maps are not modified."""
    return {"abs": False, "normalise": False, "disable_warnings": True, "display_progressbar": False}


def road(evaluation: Evaluation, most_first: bool) -> Tensor:
    """Returns the share of ``PERCENTAGES`` with an unchanged prediction, pixels imputed from neighbors, ``(N,)``.

    ROAD in Quantus 0.6 fails for maps with fewer channels than the image; the missing channels are added here with the
    lowest rank and do not count. Its average over the samples of the first batch is disabled.

    Source: Rong et al., arXiv 2202.00449.
    """
    from quantus import ROAD

    metric = ROAD(percentages=list(PERCENTAGES), **settings())
    metric.custom_postprocess, metric.a_size = lambda **data: None, evaluation.heat[0].numel()
    heat = evaluation.heat - evaluation.heat.amin() if most_first else evaluation.heat.amax() - evaluation.heat
    last = (heat.amin() - 1).expand(len(heat), evaluation.images.shape[1] - 1, *heat.shape[2:])
    same = evaluation.compute(metric, evaluation.model, torch.cat([heat, last], 1))
    return torch.as_tensor(np.concatenate(same)).float().mean(1)


def sensitivity(evaluation: Evaluation) -> Tensor:
    """Returns the largest relative change of a heat map under uniform noise on the input, in the 2-norm, ``(N,)``.

    Changes are capped at ``MOST`` because the change of a zero map is unbounded.

    Source: Yeh et al., arXiv 1901.09392.
    """
    from quantus import MaxSensitivity

    def size(a: Any) -> Any:
        return np.maximum(np.linalg.norm(a, axis=-1), 1e-12)

    metric = MaxSensitivity(nr_samples=TRIES, lower_bound=RADIUS, norm_denominator=size, **settings())
    changes = evaluation.compute(metric, evaluation.model, evaluation.heat)
    return torch.as_tensor(np.asarray(changes)).float().clamp(max=MOST)


def random_logit(evaluation: Evaluation) -> Tensor:
    """Returns the absolute rank correlation with the heat map of another output, drawn for each sample, ``(N,)``.

    Source: Sixt et al., arXiv 1912.09818.
    """
    from quantus import RandomLogit

    with torch.no_grad():
        outputs = evaluation.model(evaluation.images[:1]).shape[1]
    metric = RandomLogit(similarity_func=similarity, num_classes=outputs, seed=0, **settings())
    return torch.as_tensor(np.asarray(evaluation.compute(metric, evaluation.model, evaluation.heat))).float()


def cascade(evaluation: Evaluation) -> Tensor:
    """Returns the absolute rank correlation with heat maps of nets re-initialized from the top, ``(S + 1, N)``.

    Source: Adebayo et al., arXiv 1810.03292; Quantus calls it MPRT.
    """
    from quantus import MPRT

    metric = MPRT(similarity_func=similarity, layer_order="top_down", seed=0, **settings())
    correlations = evaluation.compute(metric, Staged(evaluation.model).eval(), evaluation.heat)
    return torch.tensor(list(correlations.values()))


def similarity(a: Any, b: Any, batched: bool = True) -> Any:
    """Returns the absolute rank correlation of rows; the function of Quantus fails for constant maps."""
    return rank_correlation(torch.as_tensor(a), torch.as_tensor(b)).abs().numpy()


def pixel_flipping(evaluation: Evaluation, order: Tensor, at_once: int, other: Tensor, softmax: bool) -> Tensor:
    """Returns the target output after each step of pixel flipping, ``(S, N)``.

    Args:
        evaluation: The net and its samples.
        order: Rank of each pixel, ``(N, 1, H, W)``.
        at_once: Pixels replaced in each step.
        other: Replacement values, broadcast to images.
        softmax: Return softmax outputs instead of logits.

    Source: Bach et al., doi 10.1371/journal.pone.0130140.
    """
    from quantus import PixelFlipping

    fill = other.expand_as(evaluation.images).flatten(1).numpy()
    done = 0

    def replaced(arr: Any, indices: Any, **options: Any) -> Any:
        nonlocal done
        rows = (done // steps) * evaluation.batch + np.arange(len(arr))[:, None]
        done += 1
        arr = arr.copy()
        arr[np.arange(len(arr))[:, None], indices] = fill[rows, indices]
        return arr

    channels = evaluation.images.shape[1]
    steps = -(-order[0].numel() // at_once)
    metric = PixelFlipping(features_in_step=at_once * channels, perturb_func=replaced, **settings())
    metric.custom_preprocess = lambda **data: None  # requires steps that divide the pixels of one channel
    return torch.tensor(evaluation.compute(metric, evaluation.model, -order, softmax)).T


class Staged(nn.Module):
    """A net that Quantus re-initializes in few steps.

    MPRT re-initializes the modules with ``reset_parameters`` one after the other, and explains all samples after each.
    Here the last layer comes first, followed by the other layers in groups of about equal size.
    """

    def __init__(self, net: nn.Module, stages: int = STAGES) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        self.stages = stages

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the net."""
        result: Tensor = self.net(x)
        return result

    def named_modules(self, *args: Any, **options: Any) -> Iterator[tuple[str, Any]]:
        """Yields groups of layers, the lowest first."""
        layers = [module for module in self.net.modules() if hasattr(module, "reset_parameters")]
        count = min(self.stages, len(layers)) - 1
        bounds = [round(step * (len(layers) - 1) / count) for step in range(count + 1)] if count else [0]
        for number, (start, end) in enumerate(zip(bounds, [*bounds[1:], len(layers)], strict=True)):
            yield f"stage {number}", Stage(layers[start:end])


@dataclass
class Stage:
    """Layers that are re-initialized together."""

    layers: list[Any]

    def reset_parameters(self) -> None:
        """Re-initializes all layers."""
        for layer in self.layers:
            layer.reset_parameters()
