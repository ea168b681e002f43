"""A net with known, planted paths, and their recovery by attribution methods.

Three streams of channels are trained separately, on the shapes drawn in red, green and blue. They are then embedded
into one dense net, with channels shuffled in every layer and weak weights between all streams. The class is determined
by the red and the green stream together. The blue stream is as active and has no effect: half of its last channels have
no weight to the output, the others form equal pairs with opposite weights, which cancel.

A sample shows its class in red, in green, or in both; blue always shows a different shape. The planted edges of a
sample join two channels of one stream, red or green, that shows the class. An edge from a red channel to a green one is
thus wrong even if both have high relevance: joint relevance can reveal this, but products of marginals cannot.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from zennit.composites import EpsilonPlus
from zennit.core import Composite

from benchmarks.default_composite import CHUNK, Net, draw_shapes
from benchmarks.faithfulness import latent
from benchmarks.faithfulness.latent import (
    DROPS,
    HAS_CRP,
    OURS,
    all_scores,
    along_path,
    by_channel,
    gradient_rules,
    gradients,
    plain_rules,
)
from benchmarks.faithfulness.metrics import Comparison, average_precision, precision_at
from benchmarks.train_demo import reproducible
from nrm_plugin import NRMAbsolute, NRMDefault, RelevanceMeasure, activations

WIDTH, CLASSES, STREAMS = 8, 4, 3
CROSS = 0.05
"""Weights between streams, in units of the root mean square of those within."""

LAYERS = ["1", "3", "6", "8"]
BLUE = 2


def streams_net() -> nn.Sequential:
    """Returns three parallel streams, from ``(N, 3, 16, 16)`` to the features ``(N, 24)`` of all."""

    def convolution(channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels, STREAMS * WIDTH, 3, padding=1, groups=STREAMS), nn.ReLU()]

    wide = STREAMS * WIDTH
    return nn.Sequential(
        *convolution(3), *convolution(wide), nn.MaxPool2d(2), *convolution(wide), *convolution(wide),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip


def draw_cues(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns images ``(N, 3, 16, 16)``, the shape in each color ``(N, 3)``, and whether it is shown, ``(N, 3)``."""
    wanted, count = count, max(count, 64)  # a small batch may lack a second shape of some class
    shapes, parts = [], []
    for _ in range(STREAMS):
        drawn: list[tuple[Tensor, Tensor]] = []
        while sum(len(labels) for _, labels in drawn) < count:
            images, labels = draw_shapes(2 * count)
            drawn.append((images[labels < CLASSES, :1], labels[labels < CLASSES]))
        parts.append(torch.cat([images for images, _ in drawn])[:count])
        shapes.append(torch.cat([labels for _, labels in drawn])[:count])
    images, labels = torch.cat(parts, 1), torch.stack(shapes, 1)
    ground = images[:, :, :1, :1]
    images = (images - ground).abs()  # a bright shape on black, independent of its colors
    # Green shows the same class as red: each sample gets a green image of its class.
    same = (labels[:, :1] == labels[None, :, 1]).float()
    match = torch.multinomial(same, 1)[:, 0]
    images[:, 1], labels[:, 1] = images[match, 1], labels[match, 1]
    kind = torch.randint(3, (count,))
    shown = torch.stack([kind != 1, kind != 0, torch.ones(count, dtype=torch.bool)], 1)
    return (images * shown[:, :, None, None])[:wanted], labels[:wanted], shown[:wanted]


def train_streams(steps: int) -> tuple[nn.Sequential, Tensor, Tensor]:
    """Trains the streams, each on its own shapes; returns them with the weights and biases of their heads."""
    body = streams_net()
    weight = nn.Parameter(0.3 * torch.randn(STREAMS, CLASSES, WIDTH))
    bias = nn.Parameter(torch.zeros(STREAMS, CLASSES))
    optimizer = torch.optim.Adam([*body.parameters(), weight, bias])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=steps)
    for _ in tqdm(range(steps), desc="planted streams", leave=False):
        images, labels, shown = draw_cues(64)
        logits = torch.einsum("nsw,scw->nsc", body(images).unflatten(1, (STREAMS, WIDTH)), weight) + bias
        loss = nn.functional.cross_entropy(logits[shown], labels[shown]) + 0.1 * logits[~shown].square().mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
    return body, weight.detach(), bias.detach()


def plant(body: nn.Sequential, weight: Tensor, bias: Tensor, cross: float) -> tuple[nn.Sequential, list[Tensor]]:
    """Returns the dense net, and the stream of each channel of its four layers.

    Args:
        body: Trained streams.
        weight: Weights of the heads, ``(3, 4, 8)``.
        bias: Biases of the heads, ``(3, 4)``.
        cross: Strength of weights between streams.
    """
    wide = STREAMS * WIDTH
    dense = nn.Sequential(*(nn.Conv2d(3 if name == "0" else wide, wide, 3, padding=1) if isinstance(old, nn.Conv2d)
                            else old for name, old in body.named_children()), nn.Linear(wide, CLASSES))  # fmt: skip
    order_in, streams = torch.arange(3), []
    stream_in = torch.arange(STREAMS)
    with torch.no_grad():
        for name, old in body.named_children():
            if not isinstance(old, nn.Conv2d):
                continue
            own = torch.arange(wide) // WIDTH
            within = own[:, None] == stream_in[None]
            values = cross * old.weight.square().mean().sqrt() * torch.randn(wide, len(stream_in), 3, 3)
            values[within] = old.weight.flatten(0, 1)
            constants = old.bias.clone()  # type: ignore[union-attr]
            if name == "7":  # pairs of equal blue channels with opposite weights to the output
                first, second = (BLUE * WIDTH + start + torch.arange(0, 4, 2) for start in (0, 1))
                values[second], constants[second] = values[first], constants[first]
            order = torch.randperm(wide)
            dense[int(name)].weight.copy_(values[order][:, order_in])
            dense[int(name)].bias.copy_(constants[order])
            streams.append(own[order])
            order_in, stream_in = order, own
        head = torch.cat([weight[0], weight[1], torch.zeros(CLASSES, WIDTH)], 1)
        size = weight[:BLUE].square().mean().sqrt()
        for pair in (0, 2):
            head[:, BLUE * WIDTH + pair] = size * torch.randn(CLASSES)
            head[:, BLUE * WIDTH + pair + 1] = -head[:, BLUE * WIDTH + pair]
        dense[-1].weight.copy_(head[:, order_in])
        dense[-1].bias.copy_(bias[0] + bias[1])
    return dense.eval().requires_grad_(False), streams


def planted_net(samples: int, steps: int = 500) -> tuple[Net, list[Tensor], Tensor]:
    """Returns the net with samples, the stream of each channel by layer, and the relevant streams, ``(N, 3)``."""
    with reproducible(0):
        dense, streams = plant(*train_streams(steps), CROSS)
        images, labels, shown = draw_cues(samples)
    target = torch.where(shown[:, 0], labels[:, 0], labels[:, 1])
    with torch.no_grad():
        accuracy = float((dense(images).argmax(1) == target).double().mean())
    fill = torch.zeros(1, 3, 1, 1)
    net = Net("planted", dense, images, torch.arange(samples), fill, accuracy)
    net.layers = LAYERS
    carries = shown.clone()
    carries[:, BLUE] = False
    return net, streams, carries


def severed(net: Net, streams: list[Tensor], within: bool) -> float:
    """Returns the share of unchanged predictions without the weights within streams, or between streams."""
    model = net.model
    original = [model[int(name)].weight.clone() for name in ("2", "5", "7")]  # type: ignore[index]
    with torch.no_grad():
        for name, (lower, upper) in zip(("2", "5", "7"), pairwise(streams), strict=True):
            model[int(name)].weight[(upper[:, None] == lower[None]) == within] = 0  # type: ignore[index]
        same = float((model(net.images).argmax(1) == net.target).double().mean())
        for name, weight in zip(("2", "5", "7"), original, strict=True):
            model[int(name)].weight.copy_(weight)  # type: ignore[index]
    return same


# -- recovery -------------------------------------------------------------------------------------------------------


JOINTS: dict[str, Any] = {
    "NRMDefault": NRMDefault,
    "EpsilonPlus": EpsilonPlus,
    "NRMAbsolute": NRMAbsolute,
    "LRP-0": gradient_rules,
}
CONCEPTS: dict[str, Callable[[], Composite]] = {
    "zennit-crp, EpsilonPlus": EpsilonPlus,
    "zennit-crp, LRP-0": plain_rules,
}
BETTER = {"average precision": 1, "precision, half as many": 1, "precision = recall": 1}
CHANNELS = Comparison(ours=OURS, better=BETTER, unranked=("chance", DROPS), pairs=latent.COMPARISON.pairs)
EDGES = Comparison(
    ours=tuple(f"μ(A & B), {name}" for name in JOINTS),
    better=BETTER,
    pairs={f"μ(A & B), {name}": f"μ(A) μ(B), {name}" for name in JOINTS},
)


def marginals(net: Net, images: Tensor, target: Tensor) -> dict[str, list[Tensor]]:
    """Returns the scores of channels, ``(N, C)`` by layer."""
    values, slopes = activations(net.model, images, LAYERS), gradients(net.model, LAYERS, images, target)
    scores = {
        "μ(A) μ(B), " + name: list(
            RelevanceMeasure(net.model, images, target, composite=how()).marginal(LAYERS).values()
        )
        for name, how in JOINTS.items()
    }  # fmt: skip
    scores["activation, product"] = [values[layer] for layer in LAYERS]
    scores["gradient × activation, product"] = [values[name] * g for name, g in zip(LAYERS, slopes, strict=True)]
    scores["LRP EpsilonPlus, product"] = gradients(net.model, LAYERS, images, target, EpsilonPlus())
    scores["LayerConductance, product"] = along_path(net.model, LAYERS, images, target, steps=16)[0]
    return {name: [by_channel(part) for part in parts] for name, parts in scores.items()}


def edge_scores(net: Net, images: Tensor, target: Tensor, pairs: list[tuple[int, int]]) -> dict[str, Tensor]:
    """Returns the absolute score of every edge between pairs of layers (upper, lower), ``(N, E)``."""
    scores: dict[str, list[Tensor]] = {}
    for name, composite in JOINTS.items():
        mu = RelevanceMeasure(net.model, images, target, composite=composite())
        scores[f"μ(A & B), {name}"] = [mu.joint(LAYERS[upper], LAYERS[lower]) for upper, lower in pairs]
    for name, rules in CONCEPTS.items() if HAS_CRP else ():
        scores[name] = [concept_edges(net, images, target, pair, rules()) for pair in pairs]
    for name, parts in marginals(net, images, target).items():
        scores[name] = [parts[upper][:, :, None] * parts[lower][:, None] for upper, lower in pairs]
    sizes = [net.model[int(name)].weight.flatten(2).norm(dim=2) for name in ("2", "5", "7")]  # type: ignore[index]
    norms = []
    for upper, lower in pairs:
        size = sizes[lower]
        for between in sizes[lower + 1 : upper]:
            size = between @ size
        norms.append(size.expand(len(images), -1, -1))
    scores["norm of the weights"] = norms
    draw = torch.Generator().manual_seed(0)
    scores["chance"] = [torch.rand(part.shape, generator=draw) for part in norms]
    return {name: torch.cat([part.flatten(1) for part in parts], 1).abs() for name, parts in scores.items()}


def concept_edges(net: Net, images: Tensor, target: Tensor, pair: tuple[int, int], rules: Composite) -> Tensor:
    """Returns zennit-crp's relevance of lower channels under the condition of each upper one, ``(N, upper, lower)``."""
    from crp.attribution import CondAttribution

    upper, lower = (LAYERS[number] for number in pair)
    attribution, rows = CondAttribution(net.model), []
    for channel in range(STREAMS * WIDTH):
        conditions = [{upper: [channel], "y": [int(label)]} for label in target]
        leaf = images.clone().requires_grad_()
        result = attribution(leaf, conditions, rules, record_layer=[lower])
        rows.append(by_channel(result.relevances[lower]))
    return torch.stack(rows, 1)


def planted_edges(
    net: Net, streams: list[Tensor], carries: Tensor, pairs: list[tuple[int, int]]
) -> tuple[Tensor, Tensor]:
    """Returns the planted edges, ``(N, E)``, and the edges that are scored, ``(E,)``.

    An edge is planted if both ends are active in the sample and belong to one relevant stream. All edges with both ends
    active in some sample are scored.
    """
    values = activations(net.model, net.images, LAYERS)
    alive = [values[layer].flatten(2).amax(2) > 0 for layer in LAYERS]
    carrying = [carries[:, stream] & active for stream, active in zip(streams, alive, strict=True)]
    truth, scored = [], []
    for upper, lower in pairs:
        within = streams[upper][:, None] == streams[lower][None]
        truth.append((carrying[upper][:, :, None] & carrying[lower][:, None] & within).flatten(1))
        scored.append((alive[upper].any(0)[:, None] & alive[lower].any(0)[None]).flatten())
    return torch.cat(truth, 1), torch.cat(scored)


def planted_channels(net: Net, streams: list[Tensor], carries: Tensor) -> dict[str, dict[str, Tensor]]:
    """Computes how well channels of planted paths are recovered, by method and metric, ``(N,)``."""
    values = activations(net.model, net.images, LAYERS)
    active = torch.cat([values[layer].flatten(2).amax(2) > 0 for layer in LAYERS], 1)
    truth, scored = carries[:, torch.cat(streams)] & active, active.any(0)
    scores = all_scores(net)
    del scores["|μ|, NRMDefault"]  # all scores are absolute values here
    return {name: recovery_metrics(values.abs()[:, scored], truth[:, scored]) for name, values in scores.items()}


def recovery_metrics(scores: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Returns the recovery of true entries among all entries, by metric, ``(N,)``."""
    draw = torch.Generator().manual_seed(0)
    return {
        "average precision": average_precision(scores, truth, draw),
        "precision, half as many": precision_at(scores, truth, 0.5, draw),
        "precision = recall": precision_at(scores, truth, 1, draw),
    }


QUESTIONS = {"neighboring layers": [(3, 2), (2, 1), (1, 0)], "first and last layer": [(3, 0)]}


def recovery(net: Net, streams: list[Tensor], carries: Tensor) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Returns the recovery of planted edges among all edges, by question, method and metric, ``(N,)``."""
    recovered: dict[str, dict[str, dict[str, Tensor]]] = {}
    for question, pairs in QUESTIONS.items():
        truth, scored = planted_edges(net, streams, carries, pairs)
        parts = [
            edge_scores(net, *chunk, pairs)
            for chunk in zip(torch.split(net.images, CHUNK), torch.split(net.target, CHUNK), strict=True)
        ]
        recovered[question] = {}
        for name in parts[0]:
            scores = torch.cat([part[name] for part in parts])[:, scored]
            recovered[question][name] = recovery_metrics(scores, truth[:, scored])
    return recovered
