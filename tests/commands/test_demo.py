"""The command `demo`: table, files, and errors."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from zennit.composites import EpsilonPlus

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands import demo_figures
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.demo_report import Report
from nrm_plugin.commands.demo_values import LAYERS, DemoError, Row, Sample, choose
from nrm_plugin.demo import load_digits, load_model
from tests.commands.shell import fails

FLOAT = r"(-?\d+\.\d+)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "missing" / "parent"


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """Output of the demo, run as a process."""
    command = [sys.executable, "-m", "nrm_plugin", "demo", "--digits", "4", "8", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_the_table_has_means_of_the_measure(printed: str):
    images, labels = load_digits()
    model = load_model()
    samples, _ = choose(model, images, labels, ["4", "8"])
    indices = [int(number) for number in re.findall(r"held-out digit (\d+)", printed)]
    assert indices == [sample.index for sample in samples]
    mu = RelevanceMeasure(model, images[indices], [4, 8], composite=EpsilonPlus())
    plain = RelevanceMeasure(model, images[indices], [4, 8], composite=EpsilonPlus(), residual="sink")
    rows = re.findall(rf"^(\S+) +{FLOAT} +{FLOAT} +{FLOAT} +{FLOAT}$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == list(LAYERS)
    for layer, *numbers in rows:
        means = [
            plain.marginal(layer).sum() / 2,
            mu.marginal(layer).sum() / 2,
            mu.sink(layer).mean(),
            mu.variation(layer).mean(),
        ]
        torch.testing.assert_close(
            torch.tensor([float(number) for number in numbers]), torch.stack(means), rtol=0, atol=6e-4
        )


@pytest.mark.slow
def test_the_legend_describes_every_column(printed: str):
    header = re.search(r"^layer (.*)$", printed, re.MULTILINE)
    assert header is not None
    names = header[1].split()
    assert names == ["plain", "mass", "sink", "variation"]  # no walk bypasses a layer of this network
    assert re.findall(r"^(\w+) +(?=sum|mass of|mass that)", printed, re.MULTILINE) == names


def test_bypass_is_a_column_if_there_is_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    rows = [Row("layer", *(torch.full((1,), share) for share in (0.5, 0.6, 0.1, 0.3, 1.0)))]
    report = Report(
        [Sample("1", 0, 1, 1)], 1.0, rows, [tmp_path / f"{name}.png" for name in "abc"], [tmp_path / "flow.png"]
    )
    monkeypatch.setattr("nrm_plugin.commands.demo_report.demo_report", lambda kinds, out, against: report)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^layer +0\.500 +0\.600 +0\.100 +0\.300 +1\.000$", text, re.MULTILINE)
    assert "mass + sink + bypass = 1" in text


@pytest.mark.slow
def test_the_files_are_listed(printed: str, folder: Path):
    named = re.findall(r"^  (.*\.png)$", printed, re.MULTILINE)
    assert Path(named[0]) == folder / "4-joint.png"
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in named)
    page = folder / "4-flow.html"
    assert page.is_file()
    assert f"8 figures and a page are in {folder}, of " in printed
    assert len(list(folder.glob("*.png"))) == 8
    assert str(page) in printed


def test_defaults_are_those_of_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = []

    def record(kinds, out, against):
        calls.append((list(kinds), out, against))
        raise DemoError("enough")

    monkeypatch.setattr("nrm_plugin.commands.demo_report.demo_report", record)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    assert calls == [(["6", "3", "9", "misread"], Path("nrm-demo"), "rest")]
    assert (tmp_path / "nrm-demo").is_dir()


def test_too_many_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = fails(capsys, "demo", "--out", str(tmp_path), "--digits", *["misread"] * 9)
    assert "5 digits 'misread' are requested, but only 4" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "deeper"], ids=["is a file", "below a file"])
def test_an_unwritable_folder_is_reported_before_anything_is_computed(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("nrm_plugin.commands.demo_report.demo_report", lambda *_: pytest.fail("computed"))
    blocked = tmp_path / "taken"
    blocked.write_text("mine")
    line = fails(capsys, "demo", "--out", str(blocked / inside))
    assert str(blocked) in line
    assert "--out DIR" in line
    assert blocked.read_text() == "mine"


@pytest.mark.slow
def test_a_full_disk_is_reported_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(figure, path, *args, **kwargs):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(demo_figures, "save_figure", full)
    assert "No space left on device" in fails(capsys, "demo", "--digits", "1", "--out", str(tmp_path))
