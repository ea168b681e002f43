"""Heat maps: pixel flipping, deletion and insertion; metrics of Quantus are in ``quantus_metrics``."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from captum.attr import (
    LRP,
    DeepLift,
    GradientShap,
    GuidedGradCam,
    InputXGradient,
    IntegratedGradients,
    LayerAttribution,
    LayerGradCam,
    Saliency,
)
from captum.attr._utils.lrp_rules import EpsilonRule
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur
from tqdm import tqdm
from zennit.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat
from zennit.core import Composite
from zennit.layer import Sum

from benchmarks.default_composite import Net
from benchmarks.faithfulness import quantus_metrics
from benchmarks.faithfulness.metrics import Comparison, area, at_once, ranks, same_noise
from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure

GRID, AT_ONCE = 8, 8
"""Patches along each side of an image, and patches replaced between two forward passes."""

STEPS, BASELINES = 24, 16
COMPARED = 32
"""Samples for the comparison of pixel flipping with Quantus."""

FILLS = ("zero", "mean", "blur")
COMPARISON = Comparison(
    ours=("NRMDefault", "EpsilonPlusFlat, normalized", "EpsilonGammaBox, normalized", "NRMAbsolute"),
    better={
        **{
            f"logit, {order}, {fill}": sign
            for fill in FILLS
            for order, sign in (("most first", -1), ("least first", 1))
        },
        "deletion": -1,
        "insertion": 1,
        **quantus_metrics.METRICS,
    },
    pairs={f"{name}, normalized": f"Zennit {name}" for name in ("EpsilonPlusFlat", "EpsilonGammaBox")},
)


@dataclass
class Setting:
    """Settings of explainers for a net: the last layer with maps, a baseline, other samples, bounds."""

    last: str
    baseline: Tensor
    others: Tensor
    low: Tensor
    high: Tensor

    @classmethod
    def of(cls, net: Net) -> Setting:
        shapes: dict[str, int] = {}
        hooks = [
            net.model.get_submodule(layer).register_forward_hook(
                lambda module, args, output, layer=layer: shapes.__setitem__(layer, output.ndim)
            )
            for layer in net.layers
        ]
        with torch.no_grad():
            net.model(net.images[:1])
        for hook in hooks:
            hook.remove()
        last = [layer for layer, count in shapes.items() if count == 4][-1]
        bounds = (net.images.amin((0, 2, 3), keepdim=True), net.images.amax((0, 2, 3), keepdim=True))
        return cls(last, net.fill, net.images[:BASELINES], *bounds)


Explainer = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Maps model, images ``(N, C, H, W)`` and targets to a heat map ``(N, C or 1, H, W)``."""


def zennit_map(make: Callable[[], Composite]) -> Explainer:
    """Returns an explainer that computes Zennit's relevance of the input."""

    def explain(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        leaf = images.clone().requires_grad_()
        with make().context(model):
            output = model(leaf)
            start = torch.zeros_like(output).scatter(1, target[:, None], 1.0)
            return torch.autograd.grad(output, leaf, start)[0]

    return explain


def measure_map(make: Callable[[], Composite]) -> Explainer:
    """Returns an explainer that computes the marginal of the input."""
    return lambda model, images, target: RelevanceMeasure(model, images, target, composite=make()).marginal("input")


def captum_lrp(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Returns LRP of Captum with its default rule ε, also on Flatten and sums, for which Captum has no rule."""
    model = copy.deepcopy(model)  # Captum leaves attributes on the modules
    for module in model.modules():
        if isinstance(module, (nn.Flatten, Sum)):
            module.rule = EpsilonRule()
    return LRP(model).attribute(images.clone().requires_grad_(), target=target)  # type: ignore[no-any-return]


def explainers(setting: Setting) -> dict[str, Explainer]:
    """Returns all methods by name."""

    def base(images: Tensor) -> Tensor:
        return setting.baseline.expand_as(images)

    def grad_cam(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        layer = model.get_submodule(setting.last)
        values = LayerGradCam(model, layer).attribute(images, target=target, relu_attributions=True)
        return LayerAttribution.interpolate(values, images.shape[2:], "bilinear")

    def gamma_box() -> Composite:
        return EpsilonGammaBox(setting.low, setting.high)

    return {
        "NRMDefault": measure_map(NRMDefault),
        "EpsilonPlusFlat, normalized": measure_map(lambda: Normalized(EpsilonPlusFlat())),
        "EpsilonGammaBox, normalized": measure_map(lambda: Normalized(gamma_box())),
        "NRMAbsolute": measure_map(NRMAbsolute),
        "Saliency": lambda model, x, t: Saliency(model).attribute(x, target=t),
        "InputXGradient": lambda model, x, t: InputXGradient(model).attribute(x, target=t),
        "IntegratedGradients": lambda model, x, t: IntegratedGradients(model).attribute(
            x, baselines=base(x), target=t, n_steps=STEPS, internal_batch_size=at_once(x)
        ),
        "GradientShap": lambda model, x, t: GradientShap(model).attribute(
            x, baselines=setting.others, target=t, n_samples=8, stdevs=0.05
        ),
        "DeepLift": lambda model, x, t: DeepLift(model).attribute(x, baselines=base(x), target=t),
        "GradCAM": grad_cam,
        "GuidedGradCam": lambda model, x, t: GuidedGradCam(model, model.get_submodule(setting.last)).attribute(
            x, target=t, interpolate_mode="bilinear"
        ),
        "Captum LRP": captum_lrp,
        "Zennit EpsilonPlus": zennit_map(EpsilonPlus),
        "Zennit EpsilonPlusFlat": zennit_map(EpsilonPlusFlat),
        "Zennit EpsilonGammaBox": zennit_map(gamma_box),
        "chance": lambda model, x, t: torch.rand(len(x), 1, *x.shape[2:]),
    }


def plain_copy(model: nn.Module) -> nn.Module:
    """Returns a copy without in-place operations, which some methods of Captum do not support."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return model


def heat_map(explain: Explainer, model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
    """Returns heat maps ``(N, 1, H, W)``, summed over colors; every batch uses the same random numbers."""
    parts = []
    for part in zip(torch.split(images, at_once(images)), torch.split(target, at_once(images)), strict=True):
        with same_noise():  # Captum also draws from NumPy
            parts.append(explain(model, *part).detach().sum(1, keepdim=True))
    return torch.cat(parts)


def patch_ranks(heat: Tensor, most_first: bool) -> Tensor:
    """Returns the rank of each pixel, equal to the rank of its patch, ``(N, 1, H, W)``."""
    means = nn.functional.adaptive_avg_pool2d(heat, GRID)
    order = ranks(means.flatten(1), most_first).reshape(means.shape)
    return nn.functional.interpolate(order.float(), size=heat.shape[2:], mode="nearest")


def filled(net: Net, fill: str) -> Tensor:
    """Returns the replacement values of pixels, ``(N or 1, C, H or 1, W or 1)``."""
    if fill == "zero":
        return torch.zeros(1, 1, 1, 1)
    if fill == "mean":
        return net.images.mean(0, keepdim=True)
    width = net.images.shape[-1] // 4
    return gaussian_blur(net.images, [2 * width + 1, 2 * width + 1], [width / 2, width / 2])


@torch.no_grad()
def flipped(net: Net, heat: Tensor, most_first: bool, other: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the target logit and softmax output after each step, ``(S, N)`` both."""
    order = patch_ranks(heat, most_first)
    logits, shares = [], []
    for replaced in range(0, GRID * GRID + 1, AT_ONCE):
        images = torch.where(order < replaced, other, net.images)
        output = torch.cat([net.model(part) for part in torch.split(images, at_once(images))])
        logits.append(output.gather(1, net.target[:, None])[:, 0])
        shares.append(output.softmax(1).gather(1, net.target[:, None])[:, 0])
    return torch.stack(logits), torch.stack(shares)


def flipping(net: Net, heat: Tensor) -> dict[str, Tensor]:
    """Returns the areas under the curves for both orders and all fills, ``(N,)``.

    Deletion and insertion use the same curves of softmax outputs. Deletion sets the most relevant patches to zero
    first. Insertion restores patches of a blurred image, the most relevant first, which is the reversed curve of
    blurring the least relevant first.
    """
    areas = {}
    shares = [step / GRID**2 for step in range(0, GRID * GRID + 1, AT_ONCE)]
    for fill in FILLS:
        other = filled(net, fill)
        for most_first, order in ((True, "most first"), (False, "least first")):
            logits, outputs = flipped(net, heat, most_first, other)
            areas[f"logit, {order}, {fill}"] = area(logits / logits[0].mean(), shares)
            if (fill, most_first) == ("zero", True):
                areas["deletion"] = area(outputs, shares)
            if (fill, most_first) == ("blur", False):
                areas["insertion"] = area(outputs, shares)
    return areas


def measured(
    net: Net, only: Iterable[str] | None = None
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[float]], dict[str, float]]:
    """Returns the values by method and metric, ``(N,)``; cascade curves; differences from Quantus.

    Methods that do not run on this net are omitted, and so are metrics, curves and differences if Quantus is missing.
    """
    by_method: dict[str, dict[str, Tensor]] = {}
    curves: dict[str, list[float]] = {}
    model = plain_copy(net.model)
    methods = explainers(Setting.of(net))
    for name in tqdm(list(only or methods), desc=f"{net.name}: heat maps", leave=False):
        try:
            heat, values = of_method(net, model, methods[name])
        except (TypeError, RuntimeError, ValueError, AssertionError) as error:
            # Captum raises for layers without a rule or with several calls, Quantus for maps of zeros.
            print(f"{net.name}: omitted {name}, which does not run on this net: {error}", file=sys.stderr)
            continue
        by_method[name] = {key: values[key] for key in COMPARISON.better if key in values}
        if quantus_metrics.IS_INSTALLED:
            steps = [values[key] for key in values if key not in COMPARISON.better]
            curves[name] = [round(float(step.mean()), 4) for step in steps]
    return by_method, curves, differences(net, heat) if curves else {}


def of_method(net: Net, model: nn.Module, explain: Explainer) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns heat maps of a method, and all their metrics, ``(N,)``.

    Raises:
        ValueError: A metric is not finite.
    """
    heat = heat_map(explain, model, net.images, net.target)
    values = flipping(net, heat)
    if quantus_metrics.IS_INSTALLED:
        values |= quantus_metrics.measured(evaluation(net, model, explain, heat))
    invalid = [key for key, value in values.items() if not bool(value.isfinite().all())]
    if invalid:
        raise ValueError(f"not finite: {', '.join(invalid)}")
    return heat, values


def evaluation(net: Net, model: nn.Module, explain: Explainer, heat: Tensor) -> quantus_metrics.Evaluation:
    """Returns the inputs for Quantus."""

    def maps(model: nn.Module, images: Tensor, target: Tensor) -> Tensor:
        return heat_map(explain, model, images, target)

    return quantus_metrics.Evaluation(model, net.images, net.target, heat, maps, at_once(net.images))


def differences(net: Net, heat: Tensor) -> dict[str, float]:
    """Returns the largest difference from pixel flipping by Quantus, over a few samples, both orders and all fills."""
    few = Net(net.name, net.model, net.images[:COMPARED], net.group[:COMPARED], net.fill, net.accuracy)
    heat = heat[:COMPARED]
    inputs = evaluation(few, few.model, lambda *parts: parts[1], heat)
    at_once = heat[0].numel() // GRID**2 * AT_ONCE
    largest = {"logit": 0.0, "softmax": 0.0}
    for fill in FILLS:
        for most_first in (True, False):
            other = filled(few, fill)
            for values, key in zip(flipped(few, heat, most_first, other), largest, strict=True):
                order = patch_ranks(heat, most_first)
                theirs = quantus_metrics.pixel_flipping(inputs, order, at_once, other, softmax=key == "softmax")
                largest[key] = max(largest[key], float((values[1:] - theirs).abs().max()))
    return largest
