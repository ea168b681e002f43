"""Classes by name or index."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from nrm_plugin.commands.explanation import explanation
from nrm_plugin.commands.model_loading import load
from nrm_plugin.commands.request import Request, RequestError, target_of
from nrm_plugin.dataset.images import load_image
from tests.commands.shell import OWN, SIZE, explain, fails, result


def test_class_names_of_a_file_are_targets(fast: Path, capsys: pytest.CaptureFixture[str]):
    Path("names.txt").write_text("temple\nred  flower\ncat\ncat\n\n")
    explain("china.png", *OWN, "--classes", "names.txt", "--target", "Red Flower")
    assert result("nrm-explained/china-relevance.safetensors")[1]["target"] == "1"
    assert "1 red flower" in capsys.readouterr().out
    assert "[2, 3]" in fails(capsys, "explain", "china.png", *OWN, "--classes", "names.txt", "--target", "cat")
    line = fails(capsys, "explain", "china.png", *OWN, "--classes", "names.txt", "--target", "tempel")
    assert "Similar names: temple (0)" in line


def test_a_model_with_one_output_has_one_class(here: Path):
    """Also where the output has no dimension of classes, ``(N,)``."""
    loaded, image = load("own_nets:make", size=SIZE), load_image(Path("china.png"))
    models = [nn.Sequential(*list(loaded.model.children())[:-1], nn.Linear(32, 1))]
    models.append(nn.Sequential(*models[0], nn.Flatten(0)))
    one, flat = (explanation(replace(loaded, model=model.eval()), image, Request()) for model in models)
    assert one.target == flat.target == 0
    assert one.outputs.shape == flat.outputs.shape == (1,)
    assert one.relevance.equal(flat.relevance)
    with pytest.raises(RequestError, match="--target 1 is out of range: the model has 1 classes"):
        explanation(replace(loaded, model=models[1]), image, Request("1"))


@pytest.mark.parametrize("command", [["explain", "china.png"], ["flow", "china.png", "--layers", "input", "output"],
                                     ["layers"], ["sweep", "photos", "--layers", "0"]])  # fmt: skip
@pytest.mark.parametrize("count", [1, 3, 5])
def test_class_names_must_be_as_many_as_outputs(command: list[str], count: int, fast: Path, capsys):
    """Otherwise the names would be those of other classes."""
    Path("names.txt").write_text("\n".join("abcde"[:count]))
    Path("photos").mkdir()
    Path("china.png").rename("photos/china.png")
    Path("china.png").symlink_to("photos/china.png")
    line = fails(capsys, *command, *OWN, "--classes", "names.txt")
    assert f"there are {count} class names, but own_nets:make has 4 outputs" in line


def test_without_the_number_of_classes_no_range_is_given():
    assert target_of("5", (), None) == 5
    with pytest.raises(RequestError, match="Give the index, or a file with the names"):
        target_of("cat", (), None)
    with pytest.raises(RequestError, match="out of range: the indices of classes start at 0"):
        target_of("-1", (), None)


def test_a_name_beyond_the_classes_of_the_model_is_rejected():
    with pytest.raises(RequestError, match="'owl' is class 2, but the model has only 2 classes"):
        target_of("owl", ["cat", "dog", "owl"], 2)
