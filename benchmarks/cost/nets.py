"""The nets of the table: how they are built with random weights, and their inputs."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from zennit.canonizers import Canonizer
from zennit.torchvision import ResNetCanonizer, VGGCanonizer

from benchmarks.decoder import WIDTH, Decoder

STATISTICS = 8
"""Samples of the batch that sets the statistics of batch normalization."""
SIDE = 96
"""Height and width of the images of that batch, unless a net fixes the size."""


@dataclass(frozen=True)
class Net:
    """One row of the table.

    Args:
        build: Function that builds the model with random weights.
        shape: Shape of the inputs without the batch dimension.
        canonizer: Zennit's canonizer of the net.
        package: The package that the model is taken from.
        is_batched: Whether the first dimension of the inputs counts samples.
        all_rules: Whether every operation, after the canonizer, is a module with a rule, so that Zennit's relevance has
            to equal the measure with ``residual="sink"``.
        is_large: Whether results are compared in a process of their own, whose memory is free again afterwards.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    canonizer: Callable[[], Canonizer] = VGGCanonizer
    package: str = "torch"
    is_batched: bool = True
    all_rules: bool = False
    is_large: bool = False

    @property
    def is_installed(self) -> bool:
        """True if the package of the model can be imported."""
        return importlib.util.find_spec(self.package) is not None

    def made(self) -> nn.Module:
        """Returns the model in evaluation mode, with statistics of batch normalization from one training-mode batch."""
        torch.manual_seed(0)
        model = self.build().requires_grad_(False)
        draw_zeros(model)
        settle(model, self.shape)
        return model.eval()

    def inputs(self, batch: int = 1, seed: int = 1) -> Tensor:
        """Returns normally distributed inputs."""
        draw = torch.Generator().manual_seed(seed)
        return torch.randn((batch, *self.shape) if self.is_batched else self.shape, generator=draw)


def draw_zeros(model: nn.Module) -> None:
    """Draws weights and scales that are initialized with zeros, through which no relevance would pass."""
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    for module in model.modules():
        scale = getattr(module, "weight", None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and scale is not None and not scale.any():
            nn.init.constant_(scale, 0.5)


def settle(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Sets the statistics of batch normalization from one batch of noise; dropout stays disabled."""
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        try:
            model(torch.randn(STATISTICS, shape[0], *(min(size, SIDE) for size in shape[1:])))
        except (RuntimeError, AssertionError):  # the net accepts one size of images
            model(torch.randn(STATISTICS, *shape))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum


class Embedded(nn.Module):
    """A text classifier of transformers that reads embedded tokens and returns its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, embedded: Tensor) -> Tensor:
        logits: Tensor = self.model(inputs_embeds=embedded).logits
        return logits


class Recurrent(nn.Module):
    """An LSTM of two layers that classifies its last output."""

    def __init__(self, features: int = 64, width: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class Graph(nn.Module):
    """A graph convolutional network of two layers with a mean over nodes, on a fixed random graph."""

    def __init__(self, nodes: int = 10_000, degree: int = 5, features: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(features, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, classes)
        draw = torch.Generator().manual_seed(2)
        edges = torch.randint(nodes, (2, nodes * degree), generator=draw)
        source, sink = torch.cat([edges, torch.arange(nodes).expand(2, -1)], 1)
        scale = torch.bincount(sink, minlength=nodes).rsqrt()
        self.register_buffer("source", source)
        self.register_buffer("sink", sink)
        self.register_buffer("weight", (scale[source] * scale[sink])[:, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.averaged(self.first(x)).relu()
        x = self.averaged(self.second(x)).relu()
        logits: Tensor = self.head(x.mean(0, keepdim=True))
        return logits

    def averaged(self, x: Tensor) -> Tensor:
        """Returns the normalized sum over neighbors."""
        messages = x.index_select(0, self.source) * self.weight
        return torch.zeros_like(x).index_add(0, self.sink, messages)


def tiny(layers: int, width: int = 16) -> nn.Module:
    """Returns linear layers, ReLUs and a head so small that fixed costs dominate the time of each step."""
    pairs = [(nn.Linear(width, width), nn.ReLU()) for _ in range(layers // 2)]
    for linear, _ in pairs:
        nn.init.orthogonal_(linear.weight, 2**0.5)
        nn.init.normal_(linear.bias, std=0.1)
    return nn.Sequential(*(module for pair in pairs for module in pair), nn.Linear(width, 10))


def of_timm(name: str) -> nn.Module:
    """Returns a model of timm."""
    model: nn.Module = importlib.import_module("timm").create_model(name)
    return model


def bert() -> nn.Module:
    """Returns a classifier of the shape of BERT-base."""
    transformers = importlib.import_module("transformers")
    config = transformers.BertConfig(num_labels=10)
    return Embedded(transformers.BertForSequenceClassification(config))


def of_torchvision(name: str) -> nn.Module:
    """Returns a model of torchvision with random weights."""
    model: nn.Module = getattr(torchvision.models, name)(weights=None)
    return model


def image(build: Callable[[str], nn.Module], name: str, size: int = 224, **options: Any) -> Net:
    """Returns a net for images."""
    package = "timm" if build is of_timm else "torchvision"
    return Net(partial(build, name), (3, size, size), package=package, **options)


RESNET: dict[str, Any] = {"canonizer": ResNetCanonizer, "all_rules": True}
TOKENS, STEPS, NODES, LAYERS = 512, 100, 10_000, 500
NETS: dict[str, Net] = {
    "VGG16 224": image(of_torchvision, "vgg16", all_rules=True),
    **{f"ResNet-50 {size}": image(of_torchvision, "resnet50", size, **RESNET) for size in (224, 64, 32)},
    "ResNet-18 224": image(of_torchvision, "resnet18", **RESNET),
    "ViT-B/16": image(of_torchvision, "vit_b_16"),
    "DeiT-tiny": image(of_timm, "deit_tiny_patch16_224"),
    "Swin-T": image(of_torchvision, "swin_t"),
    "MobileNetV2": image(of_torchvision, "mobilenet_v2"),
    "MobileNetV3-small": image(of_timm, "mobilenetv3_small_100"),
    "EfficientNet-B0": image(of_timm, "efficientnet_b0"),
    "ConvNeXt-atto": image(of_timm, "convnext_atto"),
    "GhostNetV3-0.5": image(of_timm, "ghostnetv3_050"),
    "BERT-base, 128 tokens": Net(bert, (128, 768), package="transformers"),
    f"decoder, {TOKENS} tokens": Net(Decoder, (TOKENS, WIDTH), is_large=True),
    f"LSTM, {STEPS} steps": Net(Recurrent, (STEPS, 64)),
    f"GCN, {NODES:,} nodes": Net(partial(Graph, NODES), (NODES, 64), is_batched=False),
    f"{LAYERS} tiny layers": Net(partial(tiny, LAYERS), (16,), all_rules=True),
}
BATCHED = (
    *("ResNet-50 64", "ResNet-18 224", "DeiT-tiny", "MobileNetV2", "MobileNetV3-small", "ConvNeXt-atto"),
    *("GhostNetV3-0.5", "500 tiny layers"),
)
"""The nets that are also timed with more than one sample."""
BATCHES = (2, 8)


def double(model: nn.Module) -> nn.Module:
    """Returns a copy in double precision."""
    return copy.deepcopy(model).double()
