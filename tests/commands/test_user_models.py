"""Models of a user's own, by module or file.

Covers: nrm_plugin.commands.built_model, nrm_plugin.commands.model_loading.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch

from nrm_plugin.commands.built_model import ModelError
from nrm_plugin.commands.cli import main
from nrm_plugin.commands.model_loading import load
from nrm_plugin.commands.user_models import imported
from tests.commands.shell import NETS, OWN, PHOTO, SIZE, explain, fails, own_net, prepared, result


@pytest.mark.medium
@pytest.mark.parametrize(
    "spec", ["own_nets:ready", "own_nets:Net", "own_nets.py:make", "sub/other_nets.py:make", "sub.inner:make"]
)
def test_own_models_are_found(spec: str, fast: Path):
    Path("sub").mkdir()
    for name in ("other_nets.py", "inner.py"):
        Path("sub", name).write_text(NETS)
    before = list(sys.path)
    explain("china.png", "--model", spec, "--size", SIZE)
    assert sys.path == before
    tensors, metadata = result("nrm-explained/china-relevance.safetensors")
    assert metadata["model"] == spec
    if spec != "own_nets:Net":
        torch.testing.assert_close(tensors["outputs"], own_net()(prepared(PHOTO))[0], rtol=1e-2, atol=2e-3)
    for name in ("sub", "sub.inner"):
        sys.modules.pop(name, None)


def test_an_own_model_loads_weights_of_a_file(fast: Path):
    state = {key: value * 2 for key, value in own_net().state_dict().items()}
    safetensors.torch.save_file({f"model.{key}": value for key, value in state.items()}, "mine.safetensors")
    explain("china.png", *OWN, "--weights", "mine.safetensors")
    net = own_net()
    net.load_state_dict(state)
    tensors, _ = result("nrm-explained/china-relevance.safetensors")
    torch.testing.assert_close(tensors["outputs"], net(prepared(PHOTO))[0], rtol=1e-2, atol=2e-2)


def test_a_syntax_error_names_its_place_once(here: Path, capsys: pytest.CaptureFixture[str]):
    line = fails(capsys, "explain", "china.png", "--model", "wrong.py:make")
    assert line.endswith("importing wrong.py failed: SyntaxError: invalid syntax (wrong.py, line 1)")


def test_a_missing_import_is_not_a_missing_module(here: Path, capsys: pytest.CaptureFixture[str]):
    Path("other_nets.py").write_text("import no_such_module_either\n")
    line = fails(capsys, "explain", "china.png", "--model", "other_nets:make")
    assert "importing other_nets failed" in line
    assert "no_such_module_either" in line


def test_models_are_in_evaluation_mode_and_float32(here: Path):
    loaded = load("own_nets:make")
    assert not loaded.model.training
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}


def test_errors_in_a_module_are_reported_with_their_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken_nets.py").write_text("import torch\n1 / 0\n")
    for name in ("broken_nets.py:make", "broken_nets:make"):
        with pytest.raises(ModelError, match=r"importing broken_nets\S* failed: ZeroDivisionError.*line 2\)"):
            imported(name)


def test_a_script_that_ends_the_program_is_reported(here: Path, capsys: pytest.CaptureFixture[str]):
    Path("script.py").write_text("import sys\nsys.exit('no GPU')\n")
    for name in ("script.py:make", "script:make"):
        assert f"importing {name[:-5]} ended by sys.exit('no GPU')" in fails(capsys, "layers", "--model", name)


def test_a_model_that_ends_the_program_is_an_error(here: Path, capsys: pytest.CaptureFixture[str]):
    with Path("own_nets.py").open("a") as file:
        file.write("\n\nclass Quits(Net):\n    def forward(self, x):\n        raise SystemExit(0)\n")
    assert main(["layers", "--model", "own_nets:Quits"]) == 1
    assert "sys.exit(0) was called" in capsys.readouterr().err
