"""Errors for files that do not contain the weights of the model."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import resnet18, squeezenet1_1

from tests.commands.shell import fails


def _pickled(path: str) -> None:
    torch.save(nn.Linear(1, 1), path)


def _scripted(path: str) -> None:
    """The names in an archive that torch.jit.save writes."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("net/data.pkl", "net/code/__torch__.py", "net/constants.pkl"):
            archive.writestr(name, b"")


FILES: dict[str, tuple[Callable[[str], object], str]] = {
    "gone.pth": (lambda path: None, "the file gone.pth does not exist"),
    "folder": (os.mkdir, "folder is a folder"),
    "model.pth": (_pickled, "torch.save(model.state_dict(), FILE)"),
    "text.pth": (lambda path: Path(path).write_text("text"), "written by neither torch.save nor safetensors"),
    "export.pt2": (lambda path: zipfile.ZipFile(path, "w").writestr("net/archive_format", "pt2"), "torch.export"),
    "cut.pth": (lambda path: Path(path).write_bytes(b"PK\x03\x04" + bytes(99)), "cut off or damaged"),
    "int.pth": (lambda path: torch.save({k: v.to(torch.int8) for k, v in squeezenet1_1().state_dict().items()}, path),
                "are not real numbers (features.0.weight torch.int8"),
    "empty.pt": (lambda path: Path(path).touch(), "cannot be read as weights"),
    "text.safetensors": (lambda path: Path(path).write_text("text" * 9), "cannot be read as weights"),
    "list.pth": (lambda path: torch.save([1, 2], path), "contains a list"),
    "other.pth": (lambda path: torch.save({"epoch": 1, "lr": 2}, path), "its keys are epoch, lr"),
    "resnet.pth": (lambda path: torch.save(resnet18().state_dict(), path),
                   "52 entries of squeezenet1_1 are missing (features.0.weight, features.0.bias"),
    "part.pth": (lambda path: torch.save({"features.0.weight": torch.zeros(1)}, path),
                 "51 entries of squeezenet1_1 are"),
    "page.pth": (lambda path: Path(path).write_text("<!DOCTYPE html><p>404"), "a page of HTML"),
    "pointer.safetensors": (lambda path: Path(path).write_text("version https://git-lfs.github.com/spec/v1"),
                            "git lfs pull"),
    "script.pt": (_scripted, "a TorchScript model"),
    "net.onnx": (lambda path: Path(path).write_bytes(b"\x08\x07\x12\x07pytorch"), "an ONNX model"),
    "llm.bin": (lambda path: Path(path).write_bytes(b"GGUF\x03" + bytes(99)), "GGUF"),
    "photos.zip": (lambda path: zipfile.ZipFile(path, "w").writestr("a.txt", "a"), "a zip archive without weights"),
    "plain.pkl": (lambda path: Path(path).write_bytes(pickle.dumps({"a": 1})), "was not written by torch.save"),
}  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize("name", FILES)
def test_files_without_the_weights_of_the_model(name: str, fast: Path, capsys: pytest.CaptureFixture[str]):
    make, words = FILES[name]
    make(name)
    assert words in fails(capsys, "explain", "china.png", "--model", "squeezenet1_1", "--weights", name)
