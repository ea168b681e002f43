"""Comparison of candidates for the default composite, on four trained nets and on untrained ones.

``python -m benchmarks.default_composite`` measures, writes the results as JSON, and renders the tables and the figure
of the docs; ``--render`` only renders. Training needs the digits of scikit-learn.
"""

import argparse
import json
import math
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from tqdm import tqdm
from zennit.composites import (
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    LayerMapComposite,
    layer_map_base,
)
from zennit.core import Composite, Stabilizer
from zennit.layer import Sum
from zennit.rules import Epsilon, Flat, Gamma, Norm, WSquare, ZBox
from zennit.types import AvgPool, Convolution, Linear

from benchmarks.default_composite_page import CHOSEN, FAITHFULNESS, POLICY, ZENNIT, render
from benchmarks.train_demo import reproducible, shift, split_digits, train
from nrm_plugin import Absolute, ConservingEpsilon, FuseBatchNorm, NRMAbsolute, NRMDefault, RelevanceMeasure
from nrm_plugin.composites import Depthwise, Normalized
from nrm_plugin.demo.model import DigitsCNN, enlarge, load_digits, load_model

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/default_composite.json"

POLICIES: dict[str, dict[str, Any]] = {
    "sink": {"residual": "sink"},
    "G = 2": {"residual": "redistribute", "gain_limit": 2.0},
    "G = ∞": {"residual": "redistribute", "gain_limit": math.inf},
}
UNTRAINED = (
    *("alexnet", "vgg11_bn", "resnet18", "densenet121", "googlenet", "squeezenet1_1", "mobilenet_v2", "mnasnet0_5"),
    *("shufflenet_v2_x0_5", "efficientnet_b0", "regnet_y_400mf", "convnext_tiny"),
)
CHUNK = 128  # batch size; the walk variation is computed for the first chunk only
PATCH, AT_ONCE = 2, 4  # side of a patch; patches replaced between two forward passes
RESAMPLES = 2000


# -- candidates -----------------------------------------------------------------------------------------------------


def candidates(channels: int) -> dict[str, Composite]:
    """Returns the composites to compare, by name; pixels lie in [0, 1]."""
    low, high = torch.zeros(1, channels, 1, 1), torch.ones(1, channels, 1, 1)

    def everywhere(epsilon: Any) -> Composite:
        return LayerMapComposite([*layer_map_base(), (Linear, Epsilon(epsilon=epsilon))])

    def first(rule: Any) -> Composite:
        return NRMDefault(first_map=[(Convolution, rule)])

    return {
        "EpsilonPlus": EpsilonPlus(),
        "EpsilonPlusFlat": EpsilonPlusFlat(canonizers=[FuseBatchNorm()]),
        "EpsilonGammaBox": EpsilonGammaBox(low, high),
        "LRP-0": everywhere(1e-6),
        "ε 0.25 everywhere": everywhere(Stabilizer(epsilon=0.25, norm_scale=True)),
        "γ 0.25, ε, Flat": flat_gamma(0.25),
        "γ 0.1, ε, Flat": flat_gamma(0.1),
        CHOSEN: NRMDefault(),
        **{f"… ε {epsilon}": NRMDefault(epsilon) for epsilon in (0.05, 0.1, 0.3, 0.5)},
        "… shared by contribution": NRMDefault(layer_map=[(Depthwise, Absolute()), (Linear, by_contribution())]),
        "… first ZBox": first(ZBox(low, high)),
        "… first WSquare": first(WSquare()),
        "… first the same ε": first(ConservingEpsilon()),
        "… depthwise the same ε": NRMDefault(layer_map=[(Depthwise, ConservingEpsilon())]),
        "… signed pools, sums": NRMDefault(layer_map=[(Sum, Norm()), (AvgPool, Norm())]),
        "NRMAbsolute": NRMAbsolute(),
    }


def by_contribution() -> ConservingEpsilon:
    """Redistributes the share of ε in proportion to ``|a_i w_ij|`` instead of ``|a_i|``."""
    rule = ConservingEpsilon()
    rule.param_modifiers = [rule.param_modifiers[0], Absolute().param_modifiers[0]]
    return rule


def flat_gamma(gamma: float) -> Composite:
    """Returns γ on convolutions, scaled ε on linear layers, Flat first, absolute shares at sums and pooling."""
    rules = [(Convolution, Gamma(gamma)), (nn.Linear, Epsilon(Stabilizer(epsilon=0.25, norm_scale=True)))]
    return NRMDefault(layer_map=rules, first_map=[(Convolution, Flat())])


# -- nets -----------------------------------------------------------------------------------------------------------


@dataclass
class Net:
    """A trained net with its samples: images ``(N, C, H, W)``, targets ``(N,)``.

    ``group`` marks copies of one digit, which are resampled together; ``fill`` replaces patches.
    """

    name: str
    model: nn.Module
    images: Tensor
    group: Tensor
    fill: Tensor
    accuracy: float

    def __post_init__(self) -> None:
        with torch.no_grad():
            self.target = torch.cat([self.model(part).argmax(1) for part in torch.split(self.images, CHUNK)])
        self.layers = [name for name, module in self.model.named_modules() if isinstance(module, nn.ReLU)]

    @torch.no_grad()
    def logit(self, images: Tensor) -> Tensor:
        """Returns the target logit ``(N,)`` of modified images."""
        logits = torch.cat([self.model(part) for part in torch.split(images, CHUNK)])
        return logits.gather(1, self.target[:, None])[:, 0]


class Skip(nn.Module):
    """Layers with a skip connection, joined by a module so that Zennit's rules apply to the sum."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(*layers)
        self.join = Sum()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.join(torch.stack([x, self.inner(x)], -1))
        return result


def basic(channels: int) -> list[nn.Module]:
    """Returns a residual block with a ReLU after the sum, as in ResNet."""
    convolutions = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2)]
    return [Skip(convolutions[0], nn.ReLU(), convolutions[1]), nn.ReLU()]


def inverted(channels: int) -> list[nn.Module]:
    """Returns a residual block with a depthwise convolution and no activation after the sum, as in MobileNetV2."""
    wide = 3 * channels
    depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide)
    return [Skip(nn.Conv2d(channels, wide, 1), nn.ReLU(), depthwise, nn.ReLU(), nn.Conv2d(wide, channels, 1))]


def shapes_net(block: Callable[[int], list[nn.Module]], channels: int) -> nn.Sequential:
    """Returns four such blocks with average pooling, for images ``(N, 3, 16, 16)``."""
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), *block(channels), *block(channels), nn.AvgPool2d(2)),
        *(nn.Conv2d(channels, 2 * channels, 3, padding=1), nn.ReLU(), *block(2 * channels), *block(2 * channels)),
        *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(2 * channels * 4 * 4, 5)),
    )


def draw_shapes(count: int) -> tuple[Tensor, Tensor]:
    """Draws discs, squares, triangles, crosses and rings on noisy backgrounds, ``(N, 3, 16, 16)`` in [0, 1]."""
    axis = torch.arange(16.0)
    centre, radius = 5.5 + 4 * torch.rand(2, count, 1, 1), 4 + 1.5 * torch.rand(count, 1, 1)
    y, x = (axis[:, None] - centre[0]) / radius, (axis[None, :] - centre[1]) / radius
    distance = (x**2 + y**2).sqrt()
    square = (x.abs() < 0.85) & (y.abs() < 0.85)
    triangle = (y < 0.8) & (y > 2 * x.abs() - 1)
    cross = (torch.minimum(x.abs(), y.abs()) < 0.3) & (torch.maximum(x.abs(), y.abs()) < 1)
    masks = torch.stack([distance < 1, square, triangle, cross, (distance < 1) & (distance > 0.55)])
    labels = torch.randint(len(masks), (count,))
    ground = torch.rand(count, 3, 1, 1)
    colour = (ground + 0.35 + 0.3 * torch.rand(count, 3, 1, 1)) % 1  # differs from the background in every channel
    images = torch.where(masks[labels, torch.arange(count)][:, None], colour, ground)
    return (images + 0.05 * torch.randn(count, 3, 16, 16)).clamp(0, 1), labels


def nets(samples: int) -> Iterator[Net]:
    """Yields the embedded net on held-out digits, a second one trained on the other digits, two on generated shapes."""
    images, group = digits(samples)
    labels = load_digits()[1]
    black = torch.zeros(1, 1, 1, 1)
    yield Net("digits, VGG", load_model(), images, group, black, _accuracy(load_model(), *load_digits()))
    training, held_out = split_digits(0)
    with reproducible(0):
        cnn = DigitsCNN()
        train(cnn, training, epochs=60)
    yield Net("digits, CNN", cnn, images, group, black, _accuracy(cnn, enlarge(held_out.images), labels))
    for name, block, channels in (("shapes, residual", basic, 12), ("shapes, depthwise", inverted, 12)):
        with reproducible(0):
            model = fit_shapes(shapes_net(block, channels))
            images, labels = draw_shapes(samples)
        fill = images.mean((0, 2, 3), keepdim=True)
        yield Net(name, model, images, torch.arange(samples), fill, _accuracy(model, images, labels))


def digits(samples: int) -> tuple[Tensor, Tensor]:
    """Returns held-out digits, then copies shifted by up to two pixels; and the index of the original digit."""
    images = load_digits()[0]
    group = torch.arange(samples) % len(images)
    with reproducible(0):
        return torch.cat([images, shift(images)])[:samples], group


def fit_shapes(model: nn.Module, steps: int = 400, batch: int = 64) -> nn.Module:
    """Trains a net on shapes that are generated during training."""
    optimizer = torch.optim.Adam(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=6e-3, total_steps=steps)
    for _ in tqdm(range(steps), unit="step"):
        images, labels = draw_shapes(batch)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images), labels))
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).double().mean())


# -- measures -------------------------------------------------------------------------------------------------------


def measure(net: Net, composite: Composite, policy: dict[str, Any], drops: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns all metrics of one candidate, ``(N,)`` each (``walk``: for the first chunk).

    Args:
        net: The net and its samples.
        composite: The candidate.
        policy: Settings of :class:`Normalized`.
        drops: Logit drop of every channel, ``(N, K)`` by layer.
    """
    settings = Normalized(composite, **policy)
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(net.images), CHUNK):
        rows = slice(start, start + CHUNK)
        mu = RelevanceMeasure(net.model, net.images[rows], net.target[rows], composite=settings)
        maps = mu.marginal(["input", *net.layers])
        totals = {
            "heat": maps["input"].sum(1, keepdim=True),
            "sink": mu.sink("input"),
            "variation": torch.stack([mu.variation(name) for name in mu.layers]).amax(0),
        }
        parts.append(totals | {name: maps[name].reshape(*maps[name].shape[:2], -1).sum(2) for name in net.layers})
        if start == 0:
            walk = mu.walk_variation()
    metrics = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    masses = [metrics.pop(name) for name in net.layers]
    heat = metrics.pop("heat")
    most, least = flip(net, heat, most_first=True), flip(net, heat, most_first=False)
    return metrics | {
        "walk": walk,
        "flip": most,
        "span": least - most,
        "pooled": correlation(torch.cat(masses, 1), torch.cat([drops[name] for name in net.layers], 1)),
    }


def flip(net: Net, heat: Tensor, most_first: bool) -> Tensor:
    """Computes the area under the target logit during patch flipping, in units of the mean logit, ``(N,)``.

    Args:
        net: The net and its samples.
        heat: ``(N, 1, H, W)``.
        most_first: The most relevant patches first, or the least relevant.
    """
    grid = nn.functional.avg_pool2d(heat, PATCH)
    rank = grid.flatten(1).argsort(dim=1, descending=most_first, stable=True).argsort(dim=1).reshape(grid.shape)
    rank = rank.repeat_interleave(PATCH, 2).repeat_interleave(PATCH, 3)
    steps = range(0, grid[0].numel() + 1, AT_ONCE)
    curve = torch.stack([net.logit(torch.where(rank < replaced, net.fill, net.images)) for replaced in steps])
    return torch.trapezoid(curve, dim=0) / (len(curve) - 1) / curve[0].mean()


def logit_drops(net: Net) -> dict[str, Tensor]:
    """Returns the drop of the target logit when one channel is zeroed, ``(N, K)`` by layer."""
    before = net.logit(net.images)
    with torch.no_grad():
        widths = {name: width(net.model, name, net.images[:1]) for name in net.layers}
    with tqdm(total=sum(widths.values()), desc=f"{net.name}: ablations", unit="channel", leave=False) as progress:
        by_layer: dict[str, list[Tensor]] = {name: [] for name in net.layers}
        for name in net.layers:
            for channel in range(widths[name]):
                by_layer[name].append(before - ablated(net, name, channel))
                progress.update()
    return {name: torch.stack(drops, 1) for name, drops in by_layer.items()}


def ablated(net: Net, layer: str, channel: int) -> Tensor:
    """Returns the target logit ``(N,)`` without one channel of a layer."""

    def zero(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, channel] = 0
        return output

    handle = net.model.get_submodule(layer).register_forward_hook(zero)
    try:
        return net.logit(net.images)
    finally:
        handle.remove()


def width(model: nn.Module, layer: str, images: Tensor) -> int:
    """Returns the number of channels of a layer."""
    seen: list[int] = []
    hook = model.get_submodule(layer).register_forward_hook(lambda module, args, output: seen.append(output.shape[1]))
    try:
        model(images)
    finally:
        hook.remove()
    return seen[0]


def correlation(one: Tensor, other: Tensor) -> Tensor:
    """Returns the Pearson correlation along the last dimension; NaN where one of them is constant."""
    one, other = one - one.mean(-1, keepdim=True), other - other.mean(-1, keepdim=True)
    return (one * other).sum(-1) / (one.square().sum(-1) * other.square().sum(-1)).sqrt()


# -- results --------------------------------------------------------------------------------------------------------


def run(samples: int) -> dict[str, Any]:
    """Measures all candidates under all policies on all nets."""
    started = time.perf_counter()
    return {
        "environment": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "zennit")},
            "threads": torch.get_num_threads(),
        },
        "settings": {
            "samples": samples,
            "chosen": [CHOSEN, POLICY],
            "patch": PATCH,
            "patches_at_once": AT_ONCE,
            "walk_variation_samples": min(CHUNK, samples),
            "resamples": RESAMPLES,
        },
        "nets": {net.name: compare(net) for net in nets(samples)},
        "untrained": {name: untrained(name) for name in tqdm(UNTRAINED, unit="net")},
        "seconds": round(time.perf_counter() - started),
    }


def compare(net: Net) -> dict[str, Any]:
    """Measures all candidates under all policies on one net, and paired differences from the chosen one."""
    weights = resamples(net.group)
    drops = logit_drops(net)
    names = candidates(net.images.shape[1])
    todo = [(name, policy) for name in names for policy in POLICIES if policy == POLICY or name in ZENNIT]
    metrics = {
        pair: measure(net, names[pair[0]], POLICIES[pair[1]], drops)
        for pair in tqdm(todo, desc=net.name, unit="candidate")
    }
    chosen = metrics[CHOSEN, POLICY]
    with reproducible(0):
        chance = flip(net, torch.rand(len(net.images), 1, *net.images.shape[2:]), most_first=True)
    return {
        "accuracy": round(net.accuracy, 4),
        "images": int(net.group.max()) + 1,
        "channels": sum(drop.shape[1] for drop in drops.values()),
        "flip_random_order": interval(chance, weights),
        "rows": [
            {
                "composite": name,
                "policy": policy,
                **summary(metrics[name, policy], weights),
                "chosen_minus_this": {
                    key: interval(chosen[key] - metrics[name, policy][key], weights) for key in FAITHFULNESS
                },
            }
            for name, policy in todo
        ],
    }


def summary(metrics: dict[str, Tensor], weights: Tensor) -> dict[str, Any]:
    """Summarizes the sink, the variations and the faithfulness metrics over samples."""
    return {
        "sink": rounded(metrics["sink"].median()),
        **{key: [rounded(metrics[key].median()), rounded(metrics[key].max())] for key in ("variation", "walk")},
        **{key: interval(metrics[key], weights) for key in FAITHFULNESS},
    }


def untrained(name: str, size: int = 96) -> dict[str, list[float]]:
    """Returns the residual sink and variation at the input of a torchvision net with random weights, by candidate.

    The largest over two images, and over biases at their initial values and drawn from N(0, 0.1²). The statistics of
    batch norm are those of one batch of noise.
    """
    variants = ("… ε 0.1", "… shared by contribution", "… depthwise the same ε")
    names = ("EpsilonPlusFlat", "γ 0.25, ε, Flat", CHOSEN, *variants)
    composites = {key: value for key, value in candidates(3).items() if key in names}
    largest = {key: [0.0, 1.0] for key in composites}
    for deviation in (0.0, 0.1):
        with reproducible(0):
            model = random_net(name, deviation, torch.randn(8, 3, size, size))
            images = torch.randn(2, 3, size, size)
        with torch.no_grad():
            target = model(images).argmax(1)
        for key, composite in composites.items():
            mu = RelevanceMeasure(model, images, target, composite=composite)
            sink, variation = mu.sink("input", kind="residual").abs().max(), mu.variation("input").max()
            largest[key] = [max(largest[key][0], rounded(sink)), max(largest[key][1], rounded(variation))]
    return largest


def random_net(name: str, deviation: float, batch: Tensor) -> nn.Module:
    """Returns a net of torchvision in evaluation mode."""
    further: dict[str, Any] = {"aux_logits": False, "init_weights": True} if name == "googlenet" else {}
    model: nn.Module = torchvision.models.get_model(name, weights=None, **further).eval()
    for module in model.modules():
        if deviation and isinstance(getattr(module, "bias", None), Tensor):
            module.bias.data.normal_(0, deviation)
        if isinstance(module, nn.BatchNorm2d):
            module.train().momentum = 1.0
    with torch.no_grad():
        model(batch)
    return model.eval()


def resamples(group: Tensor) -> Tensor:
    """Returns the weight of each sample in every bootstrap resample, ``(B, N)``; copies of one image share it."""
    count = int(group.max()) + 1
    drawn = torch.randint(count, (RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    counts = torch.zeros(RESAMPLES, count).scatter_add(1, drawn, torch.ones(RESAMPLES, count))[:, group]
    return counts / counts.sum(1, keepdim=True)


def interval(values: Tensor, weights: Tensor) -> list[float]:
    """Returns the mean, and the bounds of its 95% bootstrap interval."""
    if not bool(values.isfinite().all()):
        raise ValueError("the value of a sample is not finite; the mean would hide this.")
    low, high = torch.quantile(weights @ values, torch.tensor([0.025, 0.975]))
    return [rounded(values.mean()), rounded(low), rounded(high)]


def rounded(value: Tensor) -> float:
    """Rounds to four significant digits and at most five decimals."""
    return round(float(f"{float(value):.4g}"), 5)


def main(arguments: list[str] | None = None) -> None:
    """Measures the candidates and renders the page, or only renders it."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.default_composite", description=main.__doc__)
    parser.add_argument("--samples", type=int, default=512, help="per net (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to write, or to read with --render")
    parser.add_argument("--render", action="store_true", help="only rewrite the pages and the figure from the JSON")
    options = parser.parse_args(arguments)
    if not options.render:
        results = run(options.samples)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    render(json.loads(options.out.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
