"""The relative rule compared with LRP-0, ε and γ: walk variation, pixel flipping, and activations of 1e-30.

    python -m benchmarks.relative

A small CNN is trained on the digits of scikit-learn; VGG16, VGG19 and ResNet-50 have random weights and small images;
their rows assess numerics, not heat maps. Writes the figures with the environment to benchmarks/results/relative.json,
and the table of docs/relative.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Gamma, Norm, Pass
from zennit.types import Activation, AvgPool, BatchNorm, Linear

from benchmarks import tables
from nrm_plugin import ABSORBED, FuseBatchNorm, Normalized, NRMRelative, RelevanceMeasure
from nrm_plugin.errors import CancellationError, NullEventError

RESULTS = Path(__file__).parent / "results" / "relative.json"
RULES = {
    "relative": None,
    "LRP-0": lambda: Epsilon(0.0),
    "LRP-ε": lambda: Epsilon(0.1),
    "LRP-γ": lambda: Gamma(0.25),
}


def composite(name: str) -> Normalized:
    """Returns a composite that applies one rule to all layers with weights, without redistribution."""
    if RULES[name] is None:
        return NRMRelative()
    rules = [(Activation, Pass()), (BatchNorm, Pass()), (AvgPool, Norm()), (Linear, RULES[name]())]
    return Normalized(LayerMapComposite(rules, canonizers=[FuseBatchNorm()]), residual="sink")


def simple_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns images and classes for training, then held-out ones."""
    from sklearn.datasets import load_digits  # takes long to import

    data = load_digits()
    x = torch.as_tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.as_tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return x[train], y[train], x[test], y[test]


def trained(x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(0)
    net = simple_cnn()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(25):
        for batch in torch.randperm(len(x)).split(100):
            optimizer.zero_grad()
            functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


def large(name: str) -> nn.Module:
    """Returns a torchvision net with random weights, narrow dense layers, and the statistics of one batch."""
    torch.manual_seed(0)
    net = getattr(torchvision.models, name)(weights=None, num_classes=10)
    if name.startswith("vgg"):
        net.classifier = nn.Sequential(nn.Linear(25088, 256), nn.ReLU(), nn.Linear(256, 10))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net.train()(torch.randn(16, 3, 64, 64))
    return net.eval()


def without_biases(net: nn.Module) -> nn.Module:
    """Returns a bias-free copy, homogeneous in its input; batch norms only retain their scale."""
    twin = copy.deepcopy(net)
    for module in twin.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.zero_()
    return twin


def heat(net: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """Computes input relevance given survival, which sums to 1; without the condition if it cancels."""
    mu = RelevanceMeasure(net, x, y, composite=composite(name))
    try:
        return mu.marginal("input", given=~ABSORBED, min_ratio=0)
    except (CancellationError, NullEventError):
        return mu.marginal("input")


def walk_variation(net: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """Returns the walk variation of the measure given survival, ``(N,)``."""
    return RelevanceMeasure(net.double(), x.double(), y, composite=composite(name)).walk_variation(surviving=True)


def pixel_flipping(net: nn.Module, x: Tensor, y: Tensor, relevance: Tensor) -> float:
    """Returns the mean probability of the class during pixel flipping, most relevant first; lower is better."""
    order = relevance.flatten(1).argsort(1, descending=True)
    flat, total = x.flatten(1).clone(), []
    with torch.no_grad():
        for step in range(order.shape[1] + 1):
            total.append(net(flat.reshape(x.shape)).softmax(1).gather(1, y[:, None]).mean())
            if step < order.shape[1]:
                flat.scatter_(1, order[:, step : step + 1], 0.0)
    return float(torch.stack(total).mean())


def tiny(net: nn.Module, x: Tensor, y: Tensor, name: str) -> dict[str, float | bool]:
    """Checks that the map is finite at activations of 1e-30, and compares it with the original scale."""
    twin = without_biases(net)
    full, small = heat(twin, x, y, name), heat(twin, x * 1e-30, y, name)
    error = float((small - full).norm() / full.norm())
    return {"finite": bool(torch.isfinite(small).all()), "error": error}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    train_x, train_y, x, y = digits()
    nets = {"simple CNN": (trained(train_x, train_y), x, y)}
    images = torch.randn((2, 3, 64, 64), generator=torch.Generator().manual_seed(1))
    for name in ("vgg16", "vgg19", "resnet50"):
        nets[name] = (large(name), images, torch.tensor([3, 7]))
    rows: dict[str, dict[str, dict[str, object]]] = {}
    with torch.no_grad():
        accuracy = float((nets["simple CNN"][0](x).argmax(1) == y).float().mean())
    print(f"held-out accuracy {accuracy:.3f} on {len(x)} digits\n")
    for net_name, (net, inputs, targets) in nets.items():
        print(f"{net_name:10}  largest walk variation  pixel flipping  finite at 1e-30  difference at 1e-30")
        for rule in RULES:
            began = time.perf_counter()
            variation = walk_variation(copy.deepcopy(net), inputs, targets, rule)
            row: dict[str, object] = {"variation": float(variation.nan_to_num(float("inf")).max())}
            if net_name == "simple CNN":
                row["pixel flipping"] = pixel_flipping(net, inputs, targets, heat(net, inputs, targets, rule))
            row.update(tiny(net, inputs[:32], targets[:32], rule))
            row["seconds"] = time.perf_counter() - began
            rows.setdefault(net_name, {})[rule] = row
            flipping = f"{row['pixel flipping']:.3f}" if "pixel flipping" in row else "-"
            print(f"{rule:10}  {row['variation']:22.3g}  {flipping:>14}  {row['finite']!s:>15}  {row['error']:20.2g}")
        print()
    random = torch.rand(x.shape, generator=torch.Generator().manual_seed(2))
    chance = pixel_flipping(nets["simple CNN"][0], x, y, random)
    print(f"pixel flipping in random order: {chance:.3f}")
    environment = {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "zennit", "captum")},
    }
    RESULTS.write_text(
        json.dumps({"environment": environment, "accuracy": accuracy, "random order": chance, "rows": rows}, indent=1)
        + "\n"
    )
    tables.write("relative")


if __name__ == "__main__":
    main()
