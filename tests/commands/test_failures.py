"""Errors of the commands: one line on stderr, the exit status, and no truncated files.

Covers: nrm_plugin.commands.options.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nrm_plugin.commands.cli import main
from nrm_plugin.commands.options import joined
from tests.commands.shell import OWN, PHOTO, explain, fails
from tests.conftest import in_turn, slow_but

NET = ("--model", "own_nets:make", "--size", "32")


def status(*argv: str) -> int:
    try:
        return main(argv)
    except SystemExit as end:
        return int(str(end.code))


USAGE = {
    "explain": ["explain", "china.png", *NET],
    "flow": ["flow", "china.png", *NET, "--layers", "input", "3"],
    "layers": ["layers", *NET],
    "sweep": ["sweep", "photos", *NET, "--layers", "3"],
    "references": ["references", "swept", "--query", "3"],
}
WRONG = {
    "composite": (["--composite", "epsilon_plus_flt"], "epsilon_plus_flat"),
    "size zero": (["--size", "0"], "is not a number of pixels"),
    "size negative": (["--size", "-3"], "--size"),
    "size of text": (["--size", "big"], "is not a number of pixels"),
    "mean": (["--mean", "a"], "such as 0.5 or 0.485,0.456,0.406"),
    "means": (["--mean", "0.5", "0.5", "--std", "1"], "such as 0.5 or 0.485,0.456,0.406"),
    "std": (["--mean", "0.5 0.5 0.5", "--std", "0"], "--mean 0.5,0.5,0.5 --std 0.25,0.25,0.25"),
    "model": (["--model", "resnet5"], "resnet50"),
    "factory": (["--model", "own_nets:mak"], "make"),
    "classes": (["--classes", "gone.txt"], "gone.txt"),
    "classes folder": (["--classes", "photos"], "photos"),
    "weights": (["--weights", "gone.pth"], "gone.pth"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("command", [name for name in USAGE if name != "references"])
def test_wrong_options_are_reported_in_one_line(
    command: str, wrong: str, fast: Path, capsys: pytest.CaptureFixture[str]
):
    Path("photos").mkdir()
    PHOTO.save("photos/a.png")
    options, words = WRONG[wrong]
    assert words in fails(capsys, *USAGE[command], *options)


@pytest.mark.medium
@pytest.mark.parametrize("command", ["explain", "flow", "sweep", "references"])
def test_a_file_instead_of_a_folder_for_results(command: str, fast: Path, capsys: pytest.CaptureFixture[str]):
    Path("photos").mkdir()
    PHOTO.save("photos/a.png")
    Path("file").touch()
    assert status(*USAGE[command], "--out", "file/inside") in (1, 2)
    error = capsys.readouterr().err
    assert "file" in error
    assert "Traceback" not in error


@pytest.mark.medium
@pytest.mark.parametrize(
    ("target", "number"), in_turn(["png", "safetensors", "csv"], [errno.ENOSPC, errno.EACCES, errno.EROFS])
)
def test_a_result_that_cannot_be_written(
    target: str, number: int, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """No truncated file remains, and the message names the file of the result, not the image."""
    replace = Path.replace

    def full(self: Path, to: Path) -> Path:
        if Path(to).suffix == f".{target}":
            raise OSError(number, os.strerror(number))
        return replace(self, to)

    monkeypatch.setattr(Path, "replace", full)
    explain("china.png", *OWN, "--layer", "3", "--out", "out", code=1)
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert "cannot write out/china-" in error[0]
    assert os.strerror(number) in error[0]
    assert not [path for path in Path("out").iterdir() if path.suffix in (f".{target}", ".tmp")]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")])
def test_out_of_memory_names_the_options_to_lower(
    error: Exception, fast: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr("torch.nn.functional.linear", full)
    assert status("explain", "china.png", *NET, "--quiet") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "out of memory" in line
    assert "Lower --size or --channels" in line


def test_an_unexpected_error_is_one_line_unless_debugged(
    fast: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("nrm_plugin.commands.explanation._totals", lambda *_: 1 / 0)
    assert status("explain", "china.png", *NET) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nrm-plugin explain: error: unexpected ZeroDivisionError")
    assert status("explain", "china.png", *NET, "--debug") == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.medium
@pytest.mark.parametrize("command", slow_but(["explain", "flow", "layers", "demo"], "explain", "flow", "layers"))
def test_quiet_prints_nothing(command: str, fast: Path, capfd: pytest.CaptureFixture[str]):
    argv = [*USAGE.get(command, ["demo", "--digits", "3"]), "--quiet"]
    assert status(*argv) == 0
    assert tuple(capfd.readouterr()) == ("", "")


def test_quiet_prints_errors(fast: Path, capfd: pytest.CaptureFixture[str]):
    assert status("explain", "china.png", "gone.png", *NET, "--quiet") == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "gone.png" in err


MEANS = [["0.5", "0.5", "0.5"], ["0.5,0.5,0.5"], ["0.5,", "0.5,", "0.5"], ["0.5 0.5 0.5"], ["-0.5", "0", "1e-3"]]


@pytest.mark.parametrize("words", MEANS, ids=" ".join)
def test_means_may_be_separated_by_spaces_or_commas(words: list[str]):
    numbers = [float(number) for number in " ".join(words).replace(",", " ").split()]
    (first, second) = joined(["--mean", *words, "--std=1"])
    assert [float(number) for number in first.removeprefix("--mean=").split(",")] == numbers
    assert second == "--std=1"
    assert joined(["--mean", *words, "a.png"])[-1] == "a.png"


@pytest.mark.medium
def test_an_interrupted_import_ends_without_a_traceback(here: Path):
    """Modules written in C raise an ImportError for the interrupt."""
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs in the background\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch':\n"
        "            try:\n                os.kill(os.getpid(), signal.SIGINT)\n"
        "            except KeyboardInterrupt:\n                raise ImportError('half imported') from None\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "from nrm_plugin.commands.cli import main\n"
        "sys.exit(main(['explain', 'china.png', '--model', 'own_nets:make']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


@pytest.mark.parametrize("weights", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(weights: float, fast: Path, capsys: pytest.CaptureFixture[str]):
    Path("other_nets.py").write_text(
        "import torch, own_nets\ndef make():\n    net = own_nets.make()\n"
        f"    net[0].weight.data.fill_(float('{weights}'))\n    return net\n"
    )
    assert status("explain", "china.png", "--model", "other_nets:make", "--size", "32") in (1, 2)
    assert "Traceback" not in capsys.readouterr().err


def test_signals_are_as_before(fast: Path):
    before = signal.getsignal(signal.SIGINT)
    status("layers", *NET)
    assert signal.getsignal(signal.SIGINT) is before
