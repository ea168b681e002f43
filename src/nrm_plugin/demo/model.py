"""Demo networks, and the weights and digits bundled with the package."""

from importlib.resources import files

import safetensors.torch
import torch
from torch import Tensor, nn

WEIGHTS = "digits_vgg.safetensors"
DATA = "digits_test.safetensors"


class DigitsVGG(nn.Module):
    """Small VGG with three blocks of two 3x3 convolutions and max pooling, followed by two linear layers.

    Taps: ``features.0``, ``.2``, ``.5``, ``.7``, ``.10``, ``.12`` (convolutions), ``classifier.0`` and
    ``.3`` (linear).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_vgg_block(1, 16), *_vgg_block(16, 32), *_vgg_block(32, 64))
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(64 * 2 * 2, 64), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(64, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits of shape ``(N, 10)`` for images of shape ``(N, 1, 16, 16)``."""
        logits: Tensor = self.classifier(self.flatten(self.features(images)))
        return logits


class DigitsCNN(nn.Module):
    """CNN for comparison, with 5x5 kernels, average pooling, a single linear layer and no dropout.

    Its weights are not bundled: train them with ``python -m benchmarks.train_demo --net cnn5`` and load them with
    ``safetensors.torch.load_model``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*_cnn_block(1, 12), *_cnn_block(12, 24), *_cnn_block(24, 40))
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(40 * 2 * 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Computes the logits of shape ``(N, 10)`` for images of shape ``(N, 1, 16, 16)``."""
        logits: Tensor = self.classifier(self.flatten(self.features(images)))
        return logits


def enlarge(images: Tensor) -> Tensor:
    """Resizes and scales digits for use as inputs of the demo networks.

    Args:
        images: Digits of shape ``(N, 8, 8)`` of any dtype, with gray levels from 0 to 16.

    Returns:
        Bilinearly interpolated float32 images of shape ``(N, 1, 16, 16)`` with values in [0, 1].
    """
    grey = images.to(torch.float32).unsqueeze(1) / 16
    return nn.functional.interpolate(grey, scale_factor=2, mode="bilinear", align_corners=False)


def load_model() -> DigitsVGG:
    """Loads the trained :class:`DigitsVGG` in evaluation mode, without changing the random state."""
    # Building on the meta device draws no initial weights from the caller's generator.
    with torch.device("meta"):
        model = DigitsVGG()
    model.load_state_dict(_embedded(WEIGHTS), strict=True, assign=True)
    return model.eval()


def load_digits() -> tuple[Tensor, Tensor]:
    """Loads the digits held out from training.

    Returns:
        Float32 images of shape ``(450, 1, 16, 16)`` with values in [0, 1], and int64 labels of shape ``(450,)``.
    """
    data = _embedded(DATA)
    return enlarge(data["images"]), data["labels"].to(torch.int64)


def _embedded(name: str) -> dict[str, Tensor]:
    """Reads a safetensors file from this package, even if the package is zipped."""
    return safetensors.torch.load(files("nrm_plugin.demo").joinpath(name).read_bytes())


def _vgg_block(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Returns two 3x3 convolutions with ReLU and max pooling. The output has shape ``(N, out, H / 2, W / 2)``."""
    return [
        nn.Conv2d(channels_in, channels_out, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels_out, channels_out, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
    ]


def _cnn_block(channels_in: int, channels_out: int) -> list[nn.Module]:
    """Returns a 5x5 convolution with ReLU and average pooling. The output has shape ``(N, out, H / 2, W / 2)``."""
    return [nn.Conv2d(channels_in, channels_out, 5, padding=2), nn.ReLU(inplace=True), nn.AvgPool2d(2)]
