"""torchvision's models: downloaded weights, weights of a file, random weights."""

from __future__ import annotations

import re
import urllib.error
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torchvision.models import get_model_builder, get_model_weights, resnet18, squeezenet1_1

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands.model_loading import load
from tests.commands.shell import PHOTO, explain, fails, result
from tests.conftest import slow_but


@pytest.mark.medium
@pytest.mark.parametrize(
    "form", slow_but(["state dict", "safetensors", "checkpoint", "data parallel", "half"], "state dict")
)
def test_weights_of_a_file_are_loaded(form: str, fast: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(1)
    net = squeezenet1_1(weights=None, num_classes=7).eval()
    state = {key: value.half().float() for key, value in net.state_dict().items()}
    net.load_state_dict(state)
    file = "mine.safetensors" if form == "safetensors" else "mine.pth"
    if form == "safetensors":
        safetensors.torch.save_file(state, file)
    else:
        wrapped_state = {f"module.{key}": value for key, value in state.items()}
        torch.save(
            {
                "state dict": state,
                "checkpoint": {"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}},
                "data parallel": {"model": {f"_orig_mod.{key}": value for key, value in wrapped_state.items()}},
                "half": {key: value.half() for key, value in state.items()},
            }[form],
            file,
        )
    explain("china.png", "--model", "squeezenet1_1", "--weights", file, "--target", "3")
    tensors, metadata = result("nrm-explained/china-relevance.safetensors")
    inputs = get_model_weights("squeezenet1_1").DEFAULT.transforms()(PHOTO)[None]
    torch.testing.assert_close(tensors["outputs"], net(inputs)[0], rtol=1e-4, atol=1e-4)
    mu = RelevanceMeasure(net, inputs, 3, against="rest")
    torch.testing.assert_close(tensors["relevance"], mu.sign * mu.marginal("input")[0], rtol=1e-3, atol=1e-7)
    assert metadata["weights"] == file
    assert capsys.readouterr().err == ""


@pytest.mark.medium
@pytest.mark.parametrize("name", slow_but(["mnasnet0_5", "densenet121", "regnet_y_400mf", "googlenet"], "mnasnet0_5"))
def test_weight_files_of_unusual_architectures(name: str, tmp_path: Path):
    """Versions of layers, names with dots, values read while the model is built, inputs that are scaled again."""
    weights = get_model_weights(name).DEFAULT
    torch.manual_seed(0)
    arguments = {"transform_input": True, "init_weights": False} if name == "googlenet" else {}
    net = get_model_builder(name)(weights=None, **arguments).eval()
    state = net.state_dict()
    if name == "densenet121":  # as in torchvision's own file
        state = {re.sub(r"(denselayer\d+\.\w+?)([12]\.)", r"\1.\2", key): value for key, value in state.items()}
        assert "features.denseblock1.denselayer1.norm.1.weight" in state
    torch.save(dict(state), tmp_path / weights.url.rpartition("/")[2])
    loaded = load(name, str(tmp_path / weights.url.rpartition("/")[2]))
    inputs = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(loaded.model(inputs), net(inputs))
    assert len(loaded.categories) == 1000
    assert loaded.preprocessing.settings["resize"] == weights.transforms().resize_size[0]


@pytest.mark.medium
def test_a_file_of_torchvision_has_its_classes(here: Path, capsys: pytest.CaptureFixture[str]):
    torch.manual_seed(2)
    weights = get_model_weights("squeezenet1_1").IMAGENET1K_V1
    file = weights.url.rpartition("/")[2]
    torch.save(squeezenet1_1(weights=None).state_dict(), file)
    explain("china.png", "--model", "squeezenet1_1", "--weights", file, "--target", "TABBY", "--size", "64")
    tensors, metadata = result("nrm-explained/china-relevance.safetensors")
    assert (metadata["target"], metadata["target_name"]) == ("281", "tabby")
    printed = capsys.readouterr().out
    best = int(tensors["outputs"].argmax())
    assert f"{best:4} {weights.meta['categories'][best]}" in printed
    assert " 281 tabby" in printed
    assert printed.count("<- explained") == 1


@pytest.mark.medium
def test_default_weights_are_those_of_torchvision(fast: Path, monkeypatch: pytest.MonkeyPatch):
    """torchvision's builder loads them; the download is replaced."""
    torch.manual_seed(5)
    state = resnet18(weights=None).state_dict()
    requested = []
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda url, *_, **__: requested.append(url) or state
    )
    explain("china.png", "--model", "resnet18", "--size", "64")
    assert requested == [get_model_weights("resnet18").DEFAULT.url]
    tensors, metadata = result("nrm-explained/china-relevance.safetensors")
    assert metadata["weights"] == "IMAGENET1K_V1"
    assert metadata["target_name"] == get_model_weights("resnet18").DEFAULT.meta["categories"][int(metadata["target"])]
    assert int(tensors["outputs"].argmax()) == int(metadata["target"])


@pytest.mark.medium
def test_random_weights_are_reported_and_repeatable(fast: Path, capsys: pytest.CaptureFixture[str]):
    argv = ("china.png", "--model", "squeezenet1_1", "--weights", "none", "--size", "48")
    state = torch.get_rng_state()
    explain(*argv)
    assert torch.equal(torch.get_rng_state(), state)
    assert "warning: squeezenet1_1 has random weights" in capsys.readouterr().err
    first, _ = result("nrm-explained/china-relevance.safetensors")
    explain(*argv)
    again, _ = result("nrm-explained/china-relevance.safetensors")
    assert all(torch.equal(again[key], first[key]) for key in first)


def test_without_a_connection_the_remedy_is_given(here: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def disconnected(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(here))
    monkeypatch.setattr("torch.hub.download_url_to_file", disconnected)
    line = fails(capsys, "explain", "china.png", "--model", "squeezenet1_1")
    url = get_model_weights("squeezenet1_1").DEFAULT.url
    assert f"Download {url}" in line
    assert f"--weights {url.rpartition('/')[2]}" in line
    assert "--weights none" in line
    folder = here / "hub" / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / url.rpartition("/")[2]).write_text("half a file")
    assert "Delete it" in fails(capsys, "explain", "china.png", "--model", "squeezenet1_1")
