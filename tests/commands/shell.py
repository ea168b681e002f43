"""Commands in a folder that contains an image and a user's own models."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torchvision
from PIL import Image
from torch import Tensor, nn

from nrm_plugin.commands.cli import main

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = 32

NETS = '''
import torch
from torch import nn


class Net(nn.Sequential):
    """Two convolutions; classes 0 to 3."""

    def __init__(self, channels=3):
        super().__init__(
            nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 4),
        )


def make():
    torch.manual_seed(3)
    return Net()


def grey():
    torch.manual_seed(4)
    return Net(1)


def deep():
    """Grids of 16 × 16 and 8 × 8 for images of 32 × 32."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 4)
    )


class Cancelling(nn.Module):
    """Channel 0 is evidence for the left half and against the right half; channel 1 for both; channel 2 is dead."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 1, bias=False)
        self.head = nn.Linear(3 * 16, 2)
        sign = torch.ones(4, 4)
        sign[:, 2:] = -1
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1, 1))
            self.head.weight.copy_(torch.stack([sign, torch.ones(4, 4), torch.ones(4, 4)]).flatten().expand(2, -1))
            self.head.bias.zero_()

    def forward(self, x):
        return self.head(self.conv(x).flatten(1))


class Map(nn.Module):
    def forward(self, x):
        return x * 2


def broken():
    raise RuntimeError("no data\\nhere")


def number():
    return 7


def needs(size):
    return size


ready = make()
word = "text"
'''


def photograph(number: int = 0, side: int = 90) -> Image.Image:
    """A resized photograph of scikit-learn, china or flower, read from its file, since imports are slow."""
    folder = Path(find_spec("sklearn").origin).parent / "datasets/images"
    return Image.open(folder / ("china.jpg", "flower.jpg")[number]).resize((side * 3 // 2, side))


PHOTO = photograph()


OWN = ("--model", "own_nets:make", "--size", str(SIZE))


def explain(*argv: str | Path, code: int = 0) -> None:
    assert main(["explain", *map(str, argv)]) == code


def fails(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """Runs a command that must exit with 2 and print one line on stderr; returns the line."""
    try:
        code: object = main([str(word) for word in argv])
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    lines = [
        line for line in printed.err.splitlines() if not line.startswith(("nrm-plugin: warning: ", "Downloading: "))
    ]
    assert code == 2
    assert len(lines) == 1
    return lines[0]


def result(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file."""
    with safetensors.safe_open(path, "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118  (no mapping)


def prepared(image: Image.Image, size: int = SIZE, resize: int | None = None) -> Tensor:
    """An image preprocessed by torchvision's functions, ``(1, 3, size, size)``."""
    functional = torchvision.transforms.functional
    tensor = functional.to_tensor(
        image.convert("RGB").resize(_scaled(image, resize or size), Image.Resampling.BILINEAR)
    )
    return functional.normalize(functional.center_crop(tensor, [size, size]), MEAN, STD)[None]


def _scaled(image: Image.Image, short: int) -> tuple[int, int]:
    width, height = image.size
    return (short, int(short * height / width)) if width < height else (int(short * width / height), short)


def own_net() -> nn.Module:
    scope: dict = {}
    exec(NETS, scope)
    return scope["make"]().eval()
