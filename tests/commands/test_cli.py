"""The command line: commands, help, version, unknown commands; none of which imports torch."""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest

from nrm_plugin.commands import flow, references
from nrm_plugin.commands.cli import COMMANDS, main, parser
from nrm_plugin.commands.image_flow import FlowOptions
from nrm_plugin.dataset import reference_plots
from nrm_plugin.plots import flow_columns
from tests.commands.shell import fails

FLOAT = r"(-?\d+\.\d+)"


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"nrm-plugin {version('nrm-plugin')}\n"


def test_the_help_says_where_to_start(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert " ".join(capsys.readouterr().out.split()).endswith("Start with: nrm-plugin demo")


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
def test_bad_arguments_are_reported_in_one_line(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert words in fails(capsys, *argv)


@pytest.mark.parametrize("argv", [["--version"], ["--help"], *([name, "--help"] for name in COMMANDS)], ids=" ".join)
def test_help_and_version_do_not_import_torch(argv: list[str]):
    code = (
        "import sys\nfrom nrm_plugin.commands.cli import main\n"
        f"try:\n    main({argv})\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "sys.exit([name for name in ('torch', 'numpy', 'PIL', 'matplotlib') if name in sys.modules] or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout


def test_every_command_has_a_module():
    for name in COMMANDS:
        module = importlib.import_module(f"nrm_plugin.commands.{name.replace('-', '_')}")
        assert module.DESCRIPTION
        assert "nrm-plugin" in module.EXAMPLES
        assert callable(module.add_arguments)
        assert callable(module.run)


def test_limits_of_options_are_those_of_the_figures():
    """They are repeated in modules that do not import torch."""
    assert references.MOST_IMAGES == reference_plots.MOST
    assert flow.MOST_CHANNELS == flow_columns.MAX_GROUPS
    assert (default("flow", "--layers", "a").top, default("flow", "--layers", "a").patches) == (
        FlowOptions.top,
        FlowOptions.patches,
    )


def default(*argv: str) -> argparse.Namespace:
    return parser().parse_args(argv)


def test_an_interrupted_command_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nrm_plugin.commands.demo_report.demo_report", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("text", ["half", "0.5", "nan"])
def test_a_limit_of_the_gain_is_a_number(text: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as end:
        main(["explain", "x.png", "--model", "vgg16", "--gain-limit", text])
    assert end.value.code == 2
    assert f"{text!r} is not a number of at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_the_prose_of_the_help_fits_a_terminal_of_80_columns(name, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if line.startswith(("  nrm-plugin ", "  torchrun "))]
    assert [line for line in lines if len(line) > 80 and line not in commands] == []
    if name:
        module = importlib.import_module(f"nrm_plugin.commands.{name.replace('-', '_')}")
        assert " ".join(module.DESCRIPTION.split()) in " ".join(" ".join(lines).split())
        assert " ".join(module.EXAMPLES.split()) in " ".join(" ".join(lines).split())
        assert commands == [line for line in module.EXAMPLES.splitlines() if line in commands]
