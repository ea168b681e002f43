"""The network of the demo on a photograph, with toy packages in place of those that are fetched."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image

from nrm_plugin.demo import photo_network
from tests.demo.toy_packages import CLASSES, toy_packages


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_packages(tmp_path / "cache", monkeypatch)


def test_the_network_has_the_stored_weights_and_a_name_for_its_last_features():
    model = photo_network.load_photo_network()
    assert not model.training
    state = model.state_dict()
    assert state["_fc.weight"].unique().tolist() == [0.25, 0.5]
    features = []
    model.get_submodule("_avg_pooling.0").register_forward_hook(lambda module, inputs, output: features.append(output))
    with torch.no_grad():
        logits = model(torch.rand(2, 3, 32, 32))
    assert logits.shape == (2, CLASSES)
    torch.testing.assert_close(logits, model._fc(features[0].mean((2, 3))))


def test_names_are_in_the_order_of_the_classes():
    names = photo_network.imagenet_names()
    assert len(names) == 1000
    assert names[:2] == ("class 0", "class 1")


def test_the_photograph_is_in_the_package(tmp_path: Path):
    with Image.open(photo_network.photo_file(tmp_path)) as image:
        assert image.size == (451, 300)


def test_the_photograph_is_cropped_for_the_network():
    image = photo_network.load_photo()
    assert image.shape == (1, 3, photo_network.SIDE, photo_network.SIDE)
    assert 0 <= float(image.min()) < 0.1
    assert 0.8 < float(image.max()) <= 1
    inputs = photo_network.normalized(image)
    torch.testing.assert_close(inputs * photo_network.STD + photo_network.MEAN, image)


def test_the_true_packages_are_pinned():
    for package in photo_network.PHOTO_PACKAGES:
        assert len(bytes.fromhex(package.sha256)) == 32
        assert package.file.startswith(f"{package.name.replace('-', '_')}-{package.version}-")
        assert dataclasses.replace(package) == package
