"""The command: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from zennit.composites import EpsilonPlus

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands import demo
from nrm_plugin.commands.cli import main
from nrm_plugin.demo import load_digits, load_model

FLOAT = r"(-?\d+\.\d+)"


def fails(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line on stderr of a command that ends with 2 and prints nothing else."""
    try:
        code: object = main(argv)
    except SystemExit as end:
        code = end.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    assert printed.err.endswith("\n")
    assert printed.err.count("\n") == 1
    return printed.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "made" / "on the way"


@pytest.fixture(scope="module")
def printed(folder: Path) -> str:
    """What the demo prints, in a process of its own."""
    command = [sys.executable, "-m", "nrm_plugin", "demo", "--digits", "4", "8", "--out", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_demo_prints_the_means_of_the_measure(printed: str):
    images, labels = load_digits()
    model = load_model()
    samples, _ = demo.choose(model, images, labels, ["4", "8"])
    indices = [int(number) for number in re.findall(r"held-out digit (\d+)", printed)]
    assert indices == [sample.index for sample in samples]
    mu = RelevanceMeasure(model, images[indices], [4, 8], composite=EpsilonPlus())
    plain = RelevanceMeasure(model, images[indices], [4, 8], composite=EpsilonPlus(), residual="sink")
    found = re.findall(rf"^(\S+) +{FLOAT} +{FLOAT} +{FLOAT} +{FLOAT}$", printed, re.MULTILINE)
    assert [row[0] for row in found] == list(demo.LAYERS)
    for layer, *numbers in found:
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
def test_demo_explains_every_column_and_no_other(printed: str):
    header = re.search(r"^layer (.*)$", printed, re.MULTILINE)
    assert header is not None
    names = header[1].split()
    assert names == ["plain", "ours", "sink", "variation"]  # no walk bypasses a layer of this net
    assert re.findall(r"^(\w+) +(?=sum|mass)", printed, re.MULTILINE) == names


def test_bypass_is_shown_where_there_is_any(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    rows = [demo.Row("layer", *(torch.full((1,), share) for share in (0.5, 0.6, 0.1, 0.3, 1.0)))]
    report = demo.Report([demo.Sample("1", 0, 1, 1)], 1.0, rows, [tmp_path / f"{name}.png" for name in "abcd"])
    monkeypatch.setattr("nrm_plugin.commands.cli.run", lambda wanted, out: report)
    assert main(["demo", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^layer +0\.500 +0\.600 +0\.100 +0\.300 +1\.000$", text, re.MULTILINE)
    assert "ours + sink + bypass = 1" in text


@pytest.mark.slow
def test_demo_says_where_the_pictures_are(printed: str, folder: Path):
    named = re.findall(r"^  (.*\.png)$", printed, re.MULTILINE)
    assert Path(named[0]) == folder / "4-joint.png"
    assert all(Path(path).read_bytes().startswith(b"\x89PNG") for path in named)
    page = folder / "4-flow.html"
    assert page.is_file() == bool(find_spec("plotly"))
    assert f"8 pictures{' and a page' if page.is_file() else ''} are in {folder}." in printed
    assert len(list(folder.glob("*.png"))) == 8
    assert str(page if page.is_file() else folder / "4-flow.png") in printed


def test_defaults_are_those_of_the_readme(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    asked = []

    def refuse(wanted, out):
        asked.append((list(wanted), out))
        raise demo.DemoError("enough")

    monkeypatch.setattr("nrm_plugin.commands.cli.run", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["demo"]) == 2
    assert asked == [(["6", "3", "9", "misread"], Path("nrm-demo"))]
    assert (tmp_path / "nrm-demo").is_dir()


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"nrm-plugin {version('nrm-plugin')}\n"


def test_the_first_help_says_what_to_begin_with(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert " ".join(capsys.readouterr().out.split()).endswith("To begin with: nrm-plugin demo")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "required: COMMAND"),
        (["draw"], "'draw'"),
        (["exlain", "cat.jpg"], "did you mean explain?"),
        (["demo", "--digits"], "--digits"),
        (["demo", "--digits", "11"], "'11' is neither a digit from 0 to 9 nor 'misread'"),
        (["demo", "--digits", "-1"], "--digits"),
        (["demo", "--digits", "²"], "'²' is neither"),
        (["demo", "--size", "3"], "--size"),
    ],
)  # fmt: skip
def test_bad_arguments_take_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert words in fails(capsys, *argv)


def test_more_digits_than_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    line = fails(capsys, "demo", "--out", str(tmp_path), "--digits", *["misread"] * 9)
    assert "'misread' is wanted 5 times, but only 4" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("inside", ["", "deeper"], ids=["is a file", "below a file"])
def test_folder_that_cannot_be_written_is_known_before_anything_is_computed(
    inside: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("nrm_plugin.commands.cli.run", lambda *_: pytest.fail("computed"))
    blocked = tmp_path / "taken"
    blocked.write_text("mine")
    line = fails(capsys, "demo", "--out", str(blocked / inside))
    assert str(blocked) in line
    assert "--out DIR" in line
    assert blocked.read_text() == "mine"


@pytest.mark.slow
def test_disk_that_fills_up_takes_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    def full(figure, path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(demo, "save", full)
    assert "No space left on device" in fails(capsys, "demo", "--digits", "1", "--out", str(tmp_path))
