"""Classes by name or index."""

from __future__ import annotations

from pathlib import Path

import pytest

from nrm_plugin.commands.request import RequestError, target_of
from tests.commands.shell import OWN, explain, fails, result


def test_class_names_of_a_file_are_targets(fast: Path, capsys: pytest.CaptureFixture[str]):
    Path("names.txt").write_text("temple\nred  flower\ncat\ncat\n\n")
    explain("china.png", *OWN, "--classes", "names.txt", "--target", "Red Flower")
    assert result("nrm-explained/china-relevance.safetensors")[1]["target"] == "1"
    assert "1 red flower" in capsys.readouterr().out
    assert "[2, 3]" in fails(capsys, "explain", "china.png", *OWN, "--classes", "names.txt", "--target", "cat")
    line = fails(capsys, "explain", "china.png", *OWN, "--classes", "names.txt", "--target", "tempel")
    assert "Near names: temple (0)" in line


def test_a_name_beyond_the_classes_of_the_model_is_rejected():
    with pytest.raises(RequestError, match="'owl' is class 2, but the model has only 2 classes"):
        target_of("owl", ["cat", "dog", "owl"], 2)
