"""Trained networks, images and layers of the benchmark of groups."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.real import networks, photos
from benchmarks.train_demo import reproducible


@dataclass(frozen=True)
class Case:
    """A network with its inputs.

    Args:
        model: In evaluation mode.
        inputs: ``(N, …)``.
        layers: The layers whose channels are grouped, from the output down.
        tails: For each layer, the part of the network from the layer to the output, where it can be cut.
    """

    model: nn.Module
    inputs: Tensor
    layers: tuple[str, ...]
    tails: dict[str, Callable[[Tensor], Tensor]]

    def ablated(self, layer: str, x: Tensor, masks: Tensor) -> Tensor:
        """Returns outputs ``(M, K)`` for one input, with the output of a layer multiplied by each mask ``(M, …)``."""
        kept: list[Tensor] = []

        def multiply(module: nn.Module, args: object, output: Tensor) -> Tensor:
            kept.append(output)
            return output * masks

        tail = self.tails.get(layer)
        module = self.model.get_submodule(layer)
        with torch.no_grad():
            if tail is None:
                handle = module.register_forward_hook(multiply)
                result: Tensor = self.model(x.expand(len(masks), *x.shape[1:]))
            else:
                handle = module.register_forward_hook(lambda module, args, output: kept.append(output))
                self.model(x)
                handle.remove()
                result = tail(kept[0] * masks)
        handle.remove()
        return result


def chosen_photos(count: int) -> list[photos.Stamp]:
    """Returns photographs of single objects, spread evenly over the folders of animals, plants, food and things."""
    chosen = [stamp for stamp in photos.stamps() if stamp.label in networks.FOLDERS]
    step = len(chosen) / count
    return [chosen[int(number * step)] for number in range(count)]


def _photos(net: networks.Network, count: int) -> Tensor:
    """Returns the photographs on gray."""
    height, width = net.size
    ground = photos.background("grey", height, width)
    images = [photos.placed(stamp.cut_out(height, width), ground)[0] for stamp in chosen_photos(count)]
    return net.normalized(torch.stack(images))


def vgg16(count: int) -> Case:
    """Returns VGG16 with convolutions trained on ImageNet."""
    net = networks.vgg16_folders()
    model = net.model

    def tail(number: int) -> Callable[[Tensor], Tensor]:
        def run(values: Tensor) -> Tensor:
            result: Tensor = model.classifier(model.avgpool(model.features[number + 1 :](values)).flatten(1))
            return result

        return run

    numbers = (28, 26, 24)
    layers = tuple(f"features.{number}" for number in numbers)
    return Case(model, _photos(net, count), layers, {f"features.{number}": tail(number) for number in numbers})


def efficientnet(count: int) -> Case:
    """Returns EfficientNet-Lite0, trained on ImageNet."""
    net = networks.efficientnet_lite(0)
    return Case(net.model, _photos(net, count), ("_blocks.14", "_blocks.10", "_blocks.4"), {})


def residual(count: int) -> Case:
    """Returns a residual network trained on Fashion-MNIST."""
    net = networks.fashion("residual")
    images, _ = photos.fashion("t10k")
    return Case(net.model, net.normalized(images[:count]), ("0.13", "0.8", "0.3"), {})


class Transformer(nn.Module):
    """A transformer over the rows of 2 × 2 patches of a digit."""

    def __init__(self, width: int = 64, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Unfold(2, stride=2)
        self.embedding = nn.Linear(4, width)
        self.positions = nn.Parameter(torch.randn(16, width) / 2)
        self.blocks = nn.Sequential(*(
            nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        ))  # fmt: skip
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, 1, 8, 8)``."""
        tokens = self.embedding(self.patches(x).transpose(1, 2)) + self.positions
        result: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return result


def transformer(count: int) -> Case:
    """Returns a transformer trained here on the digits of scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 16
    labels = torch.from_numpy(digits.target).long()
    with reproducible(0):
        model = Transformer()
        model.load_state_dict(networks._stored("digits-transformer", lambda: _fit(model, images[:1400], labels[:1400])))
    with torch.no_grad():
        right = (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean()
    print(f"transformer: {float(right):.3f} of held-out digits correct")
    layers = ("blocks.2.linear1", "blocks.1.linear1", "blocks.0.linear1")
    return Case(model.requires_grad_(False), images[1400 : 1400 + count], layers, {})


def _fit(model: nn.Module, images: Tensor, labels: Tensor, steps: int = 1500) -> dict[str, Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    for step in range(steps):
        rows = torch.randint(len(images), (64,))
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(model(images[rows]), labels[rows]))
        optimizer.step()
    return {name: value.contiguous() for name, value in model.state_dict().items()}


CASES: dict[str, Callable[[int], Case]] = {
    "VGG16": vgg16,
    "EfficientNet-Lite0": efficientnet,
    "residual": residual,
    "transformer": transformer,
}
