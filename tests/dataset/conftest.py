"""Fixtures of the tests of datasets."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from nrm_plugin.dataset import Maps, Marginal, sweep
from tests.dataset.sweep_nets import OPTIONS, QUERIES, Data, contents, net


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    sweep(net(), Data(), QUERIES, folder, **OPTIONS)
    return contents(folder)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    sweep(net(), Data(), QUERIES, folder, **OPTIONS)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "swept"
    sweep(net(), Data(16), [Marginal("4"), Maps("input", over="position")], folder, **OPTIONS)
    return folder


@pytest.fixture
def swept(made, tmp_path):
    return shutil.copytree(made, tmp_path / "swept")


@pytest.fixture(scope="module", name="net")
def convolutional_net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3, stride=2), nn.ReLU(inplace=True), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(45, 3)).double().eval()


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(1)
    images = torch.rand((23, 1, 9, 9), generator=draw, dtype=torch.float64)
    images[11] = images[4]  # a repeated image: a tie
    labels = torch.randint(0, 3, (23,), generator=draw)
    labels[11] = labels[4]
    return TensorDataset(images, labels)
