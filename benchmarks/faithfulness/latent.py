"""Neuron flipping: channels of all layers are ablated in one common ranking, and the output is recorded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from zennit.composites import EpsilonGammaBox, EpsilonPlus, EpsilonPlusFlat, LayerMapComposite, layer_map_base
from zennit.core import Composite
from zennit.rules import Epsilon
from zennit.types import Linear

from benchmarks.default_composite import Net, logit_drops
from benchmarks.faithfulness.metrics import Comparison, area, at_once, ranks
from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, ablation, activations

SHARES = (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1)
STEPS = 12
FILLS = ("zero", "mean")
DROPS = "one channel ablated"
LARGEST = 1000
"""Largest number of channels for which each channel is ablated alone."""

CRP = "zennit-crp, EpsilonPlusFlat"
HAS_CRP = find_spec("crp") is not None
OURS = ("μ, NRMDefault", "μ, EpsilonPlus", "μ, EpsilonGammaBox", "μ, NRMAbsolute", "μ, LRP-0")
ORDERS = {"logit, most first": -1, "logit, least first": 1, "same, most first": -1, "same, least first": 1}
COMPARISON = Comparison(
    ours=(*OURS, "|μ|, NRMDefault"),
    better={f"{key}, {fill}": sign for fill in FILLS for key, sign in ORDERS.items()},
    unranked=("chance", DROPS),
    pairs={
        "μ, EpsilonPlus": "LRP EpsilonPlus",
        "μ, EpsilonGammaBox": "LRP EpsilonGammaBox",
        "μ, LRP-0": "gradient × activation",
    },
)


def plain_rules() -> Composite:
    """Returns LRP-0, which equals gradient × activation in a net of ReLUs."""
    return LayerMapComposite([*layer_map_base(), (Linear, Epsilon(epsilon=1e-6))])


def gradient_rules() -> Composite:
    """Returns LRP-0 without redistribution of absorbed relevance."""
    return Normalized(plain_rules(), residual="sink")


def by_channel(values: Tensor) -> Tensor:
    """Returns the sums over positions, ``(N, C)``."""
    return values.detach().flatten(2).sum(2) if values.ndim > 2 else values.detach()


def chunks(net: Net) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images and targets in batches."""
    size = at_once(net.images)
    yield from zip(torch.split(net.images, size), torch.split(net.target, size), strict=True)


def gradients(
    model: nn.Module, layers: list[str], images: Tensor, target: Tensor, composite: Composite | None = None
) -> list[Tensor]:
    """Computes the gradient of the target logit at each layer; under a composite, Zennit's relevance."""
    return values_and_gradients(model, layers, images, target, composite)[1]


def values_and_gradients(
    model: nn.Module, layers: list[str], images: Tensor, target: Tensor, composite: Composite | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the activations of each layer, and the result of :func:`gradients`."""
    recorded: dict[str, Tensor] = {}
    with ExitStack() as stack:
        if composite is not None:
            stack.enter_context(composite.context(model))
        for layer in layers:

            def record(module: nn.Module, args: object, output: Tensor, layer: str = layer) -> None:
                recorded[layer] = output.requires_grad_()

            stack.callback(model.get_submodule(layer).register_forward_hook(record).remove)
        output = model(images.clone().requires_grad_())
        logit = output.detach().gather(1, target[:, None])
        start = torch.zeros_like(output).scatter(1, target[:, None], logit if composite else torch.ones_like(logit))
        values = [recorded[layer] for layer in layers]
        return [value.detach() for value in values], list(torch.autograd.grad(output, values, start))


def along_path(
    model: nn.Module, layers: list[str], images: Tensor, target: Tensor, steps: int = STEPS
) -> tuple[list[Tensor], list[Tensor]]:
    """Returns LayerConductance and InternalInfluence of all layers from shared passes; Captum runs them for each layer.

    Both as in Captum: Gauss-Legendre steps on the path from zero to the images, one more for conductance.
    """
    conductance, influence = [torch.zeros(())] * len(layers), [torch.zeros(())] * len(layers)
    places, weights = np.polynomial.legendre.leggauss(steps)
    for place, weight in zip((1 + places) / 2, weights / 2, strict=True):
        slopes = gradients(model, layers, images * float(place), target)
        influence = [total + float(weight) * slope for total, slope in zip(influence, slopes, strict=True)]
    before: list[tuple[Tensor, Tensor]] = []
    for place in (1 + np.polynomial.legendre.leggauss(steps + 1)[0]) / 2:
        pairs = list(zip(*values_and_gradients(model, layers, images * float(place), target), strict=True))
        if before:
            conductance = [
                total + (after - value) * slope
                for total, (value, slope), (after, _) in zip(conductance, before, pairs, strict=True)
            ]
        before = pairs
    return conductance, influence


def concept_relevance(model: nn.Module, layers: list[str], images: Tensor, target: Tensor) -> list[Tensor]:
    """Returns the relevance of channels by zennit-crp, ``(N, C)`` for each layer, in units of the layer's sum."""
    from crp.attribution import CondAttribution
    from crp.concepts import ChannelConcept

    conditions = [{"y": [int(label)]} for label in target]
    leaf = images.clone().requires_grad_()
    relevances = CondAttribution(model)(leaf, conditions, EpsilonPlusFlat(), record_layer=layers).relevances
    return [ChannelConcept().attribute(relevances[layer]) for layer in layers]


def channel_scores(net: Net) -> dict[str, list[Tensor]]:
    """Returns the score of every channel by every method, ``(N, C)`` by layer."""
    model, layers = net.model, net.layers
    scores: dict[str, list[list[Tensor]]] = {}

    def note(name: str, parts: list[Tensor]) -> None:
        scores.setdefault(name, []).append([by_channel(part) for part in parts])

    low, high = net.images.amin((0, 2, 3), keepdim=True), net.images.amax((0, 2, 3), keepdim=True)
    plain = {"LRP EpsilonPlus": EpsilonPlus(), "LRP EpsilonGammaBox": EpsilonGammaBox(low, high)}
    for images, target in tqdm(list(chunks(net)), desc=f"{net.name}: channel scores", leave=False):
        for name, composite in zip(OURS, (NRMDefault(), *plain.values(), NRMAbsolute(), gradient_rules()), strict=True):
            maps = RelevanceMeasure(model, images, target, composite=composite).marginal(layers)
            note(name, [maps[layer] for layer in layers])
        values = activations(model, images, layers)
        slopes = gradients(model, layers, images, target)
        note("activation", [values[layer] for layer in layers])
        note("gradient × activation", [values[layer] * g for layer, g in zip(layers, slopes, strict=True)])
        for name, composite in plain.items():
            note(name, gradients(model, layers, images, target, composite))
        if HAS_CRP:
            note(CRP, concept_relevance(model, layers, images, target))
        conductance, influence = along_path(model, layers, images, target)
        note("LayerConductance", conductance)
        note("InternalInfluence", influence)
    return {name: [torch.cat(parts) for parts in zip(*batches, strict=True)] for name, batches in scores.items()}


def rescaled(parts: list[Tensor]) -> list[Tensor]:
    """Returns each layer divided by its sum of absolute values."""
    return [part / part.abs().sum(1, keepdim=True).clamp(min=1e-30) for part in parts]


def all_scores(net: Net) -> dict[str, Tensor]:
    """Returns the concatenated scores of all channels, ``(N, K)``, including variants with rescaled layers."""
    layer_scores = channel_scores(net)
    for name in [name for name in layer_scores if name not in (*OURS, CRP)]:
        layer_scores[f"{name}, layers rescaled"] = rescaled(layer_scores[name])
    scores = {name: torch.cat(parts, 1) for name, parts in layer_scores.items()}
    scores["|μ|, NRMDefault"] = scores["μ, NRMDefault"].abs()
    if scores["activation"].shape[1] <= LARGEST:
        drops = logit_drops(net)
        scores[DROPS] = torch.cat([drops[layer] for layer in net.layers], 1)
    scores["chance"] = torch.rand(scores["activation"].shape, generator=torch.Generator().manual_seed(0))
    return scores


@torch.no_grad()
def flipped(net: Net, scores: Tensor, most_first: bool, fill: str, means: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Returns target logits, and a mask of unchanged predictions, for each share of ablated channels, ``(S, N)`` each.

    Args:
        net: The net and its samples.
        scores: ``(N, K)``, concatenated over layers.
        most_first: Ablate channels with the largest scores first, otherwise with the smallest.
        fill: ``"zero"`` or ``"mean"``.
        means: Mean activations of each layer, ``(1, …)``.
    """
    order = ranks(scores, most_first)
    counts = [means[layer].shape[1] for layer in net.layers]
    logits, same = [], []
    for share in SHARES:
        retained = torch.split(order >= round(share * sum(counts)), counts, 1)
        outputs = []
        for number, (images, _) in enumerate(chunks(net)):
            masks = {
                layer: torch.split(mask, at_once(net.images))[number]
                for layer, mask in zip(net.layers, retained, strict=True)
            }
            with ablation(net.model, masks, fill, means):  # type: ignore[arg-type]
                outputs.append(net.model(images))
        output = torch.cat(outputs)
        logits.append(output.gather(1, net.target[:, None])[:, 0])
        same.append((output.argmax(1) == net.target).float())
    return torch.stack(logits), torch.stack(same)


def mean_activations(net: Net) -> dict[str, Tensor]:
    """Returns the mean activations of each layer over all samples, ``(1, …)``, computed in batches."""
    sums: dict[str, Tensor] = {}
    for images, _ in chunks(net):
        for layer, values in activations(net.model, images, net.layers).items():
            sums[layer] = sums.get(layer, torch.zeros(())) + values.sum(0, keepdim=True)
    return {layer: values / len(net.images) for layer, values in sums.items()}


def neuron_flipping(net: Net) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, list[float]]]]:
    """Returns the areas under the curves by method and metric, ``(N,)``, and mean logit curves."""
    means = mean_activations(net)
    unit = net.logit(net.images).mean()
    areas: dict[str, dict[str, Tensor]] = {}
    curves: dict[str, dict[str, list[float]]] = {}
    for name, scores in tqdm(all_scores(net).items(), desc=f"{net.name}: channels flipped", leave=False):
        areas[name], curves[name] = {}, {}
        for fill in FILLS:
            for most_first, order in ((True, "most first"), (False, "least first")):
                logits, same = flipped(net, scores, most_first, fill, means)
                areas[name][f"logit, {order}, {fill}"] = area(logits / unit, SHARES)
                areas[name][f"same, {order}, {fill}"] = area(same, SHARES)
                curves[name][f"{order}, {fill}"] = [round(float(v / unit), 4) for v in logits.mean(1)]
    return areas, curves
