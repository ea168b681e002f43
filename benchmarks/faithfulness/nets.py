"""The explained nets and their samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.default_composite import Net, basic, digits, draw_shapes, fit_shapes, shapes_net
from benchmarks.train_demo import reproducible
from benchmarks.vgg16_joint import load_image
from nrm_plugin.demo.model import load_digits, load_model


@cache
def digits_net(samples: int) -> Net:
    """Returns the embedded net of the demo on held-out digits."""
    model = load_model()
    images, group = digits(samples)
    held_out, labels = load_digits()
    return Net("digits", model, images, group, torch.zeros(1, 1, 1, 1), accuracy(model, held_out, labels))


@cache
def residual_net(samples: int) -> Net:
    """Returns a residual net trained on generated colored shapes, with further shapes as samples."""
    with reproducible(0):
        model = fit_shapes(shapes_net(basic, 12))
        images, labels = draw_shapes(samples)
    fill = images.mean((0, 2, 3), keepdim=True)
    return Net("shapes, residual", model, images, torch.arange(samples), fill, accuracy(model, images, labels))


class Block(nn.Module):
    """Attention and two dense layers of a vision transformer, each with a norm and a skip, ``(N, C, H, W)``.

    Channels come first and tokens are positions, so that dense layers are 1 × 1 convolutions.
    """

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = nn.GroupNorm(1, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.between = nn.GroupNorm(1, channels)
        self.up = nn.Conv2d(channels, 4 * channels, 1)
        self.act = nn.ReLU()
        self.down = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)``."""
        parts = self.qkv(self.before(x)).flatten(2).unflatten(1, (3, self.heads, -1)).transpose(3, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[:, 0], parts[:, 1], parts[:, 2])
        x = x + self.out(mixed.transpose(2, 3).flatten(1, 2).unflatten(2, x.shape[2:]))
        result: Tensor = x + self.down(self.act(self.up(self.between(x))))
        return result


class SmallTransformer(nn.Module):
    """A vision transformer of 64 tokens and three blocks, for images ``(N, 3, 16, 16)``."""

    def __init__(self, channels: int = 32) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, channels, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(1, channels, 8, 8))
        self.blocks = nn.Sequential(*(Block(channels, 4) for _ in range(3)))
        self.norm = nn.GroupNorm(1, channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits ``(N, 5)``."""
        logits: Tensor = self.head(self.pool(self.norm(self.blocks(self.embed(images) + self.places))).flatten(1))
        return logits


@cache
def transformer_net(samples: int) -> Net:
    """Returns a small vision transformer trained on the same shapes."""
    with reproducible(0):
        model = fit_shapes(SmallTransformer(), steps=1000)
        images, labels = draw_shapes(samples)
    fill = images.mean((0, 2, 3), keepdim=True)
    return Net("shapes, transformer", model, images, torch.arange(samples), fill, accuracy(model, images, labels))


NETS: dict[str, Callable[[int], Net]] = {
    "digits": digits_net,
    "shapes, residual": residual_net,
    "shapes, transformer": transformer_net,
}


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Returns the share of correct predictions."""
    return float((model(images).argmax(1) == labels).double().mean())


def own_net(name: str, weights: Path, folder: Path, samples: int) -> Net:
    """Returns a torchvision classifier with weights from a file, on images of a folder; targets are its predictions.

    Args:
        name: Name in torchvision, such as ``vgg16`` or ``resnet50``.
        weights: A state dict, from ``torch.save`` or safetensors.
        folder: Images as JPEG, PNG or WebP.
        samples: Number of images, in the order of their names.

    Raises:
        ValueError: The file is not a state dict of that net, or the folder has no images.
    """
    state = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights, weights_only=True)
    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        last = [key for key, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
        classes = len(state.get(f"{last}.bias", torch.empty(1000)))
        model = torchvision.models.get_model(name, weights=None, num_classes=classes)
    try:
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold a state dict of torchvision's {name}: {error}") from error
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    if not files:
        raise ValueError(f"no image found in {folder}; it should contain .jpg, .png or .webp files.")
    images = torch.cat([load_image(path).tensor for path in files[:samples]])
    # Zero is the mean of normalized images. The true labels are unknown.
    net = Net(name, model.float().eval(), images, torch.arange(len(images)), torch.zeros(1, 3, 1, 1), float("nan"))
    net.layers = activation_layers(net.model, images[:1])
    return net


@torch.no_grad()
def activation_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Returns every ReLU; for a ReLU with several calls, the enclosing module, as the blocks of ResNet."""
    calls: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name:

                def note(module: nn.Module, args: object, output: object, name: str = name) -> None:
                    calls.append(name)

                stack.callback(module.register_forward_hook(note).remove)
        model(images)
    relus = {name for name, module in model.named_modules() if isinstance(module, nn.ReLU)}
    layers = [name if calls.count(name) == 1 else name.rpartition(".")[0] for name in calls if name in relus]
    return list(dict.fromkeys(layers))
