"""The two heat maps of `explain`, and models and images that have only one.

Covers: nrm_plugin.commands.explanation_files, nrm_plugin.commands.resolved_options.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from nrm_plugin import NRMDefault, RelevanceMeasure
from nrm_plugin.commands import explanation_files
from nrm_plugin.commands.model_loading import load
from nrm_plugin.measure.layer_averages import blurred, layer_average, layer_map
from nrm_plugin.plots.heatmaps import cell_sums
from tests.commands.shell import SIZE, explain, fails, result

DEEP = ("--model", "own_nets:deep", "--size", str(SIZE), "--target", "2")
STORED = "nrm-explained/china-relevance.safetensors"


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """Figures of heat maps that are written."""
    figures: list[Figure] = []
    save = explanation_files.save_figure

    def saved(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(explanation_files, "save_figure", saved)
    return figures


def model_and_inputs() -> tuple[torch.nn.Module, torch.Tensor]:
    loaded = load("own_nets:deep", size=SIZE)
    return loaded.model, loaded.preprocessing(Image.open("china.png").convert("RGB"))


def titles(figure: Figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def values(figure: Figure) -> list[np.ndarray]:
    """The heat maps of a figure, which cover images of three channels."""
    panels = [axes for axes in figure.axes if axes.get_title()][1:]
    return [np.asarray(axes.images[-1].get_array()) for axes in panels]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.medium
def test_both_maps_are_drawn_and_stored(here: Path, drawn, capsys):
    explain("china.png", *DEEP)
    model, inputs = model_and_inputs()
    coarse = layer_map(model, inputs, 2)[0]
    mu = RelevanceMeasure(model, inputs, 2, against="rest")
    fine = mu.sign * mu.marginal("input")[0]
    tensors, about = result(STORED)
    close(tensors["layer_map"], coarse)
    close(tensors["relevance"], fine)
    assert about["map"] == "both"
    assert json.loads(about["layer_map"]) == {"layers": ["3", "1"], "reference": "blur"}
    assert about["composite"] == "nrm_default"
    (figure,) = drawn
    assert titles(figure)[1:] == [
        "where the evidence is, by late layers,\ncompared with the blurred image",
        "the evidence, pixel by pixel\nall of it reaches the pixels",
    ]
    assert figure.get_suptitle() == "relevance for class 2 rather than the other classes"
    for found, expected in zip(values(figure), (coarse, fine.sum(0)), strict=True):
        close(torch.as_tensor(found), torch.as_tensor(cell_sums(expected, SIZE)))
    limits = [axes.images[-1].get_clim()[1] for axes in figure.axes if axes.get_title()][1:]
    assert limits[0] != pytest.approx(limits[1])  # each map has its own color scale
    printed = capsys.readouterr().out
    assert "  coarse heat map: mean over 3 and 1, compared with the blurred image\n" in printed
    assert "  fine heat map: relevance 100.00% at the pixels" in printed


@pytest.mark.medium
@pytest.mark.parametrize(
    ("options", "reference", "composite"),
    [
        (["--reference", "mean"], "mean", None),
        (["--composite", "nrm_default"], None, NRMDefault()),
    ],
)
def test_a_reference_or_rules_apply_to_both_maps(here: Path, drawn, options, reference, composite):
    explain("china.png", *DEEP, *options)
    model, inputs = model_and_inputs()
    grey = inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    mu = RelevanceMeasure(
        model, inputs, 2, against="rest", reference=None if reference is None else grey, composite=composite
    )
    tensors, about = result(STORED)
    close(tensors["layer_map"], layer_average(mu, ["3", "1"])[0])
    close(tensors["relevance"], mu.sign * mu.marginal("input")[0])
    assert json.loads(about["layer_map"])["reference"] == (reference or "none")
    assert titles(drawn[0])[1] == "where the evidence is, by late layers"
    assert ("compared with its mean color" in drawn[0].get_suptitle()) == (reference is not None)


@pytest.mark.medium
def test_only_the_coarse_map_is_of_one_measure(here: Path, drawn, capsys):
    explain("china.png", *DEEP, "--map", "layers")
    model, inputs = model_and_inputs()
    mu = RelevanceMeasure(model, inputs, 2, against="rest", reference=blurred(inputs))
    tensors, about = result(STORED)
    close(tensors["layer_map"], layer_average(mu, ["3", "1"])[0])
    close(tensors["relevance"], mu.sign * mu.marginal("input")[0])
    assert (about["reference"], about["composite"], about["map"]) == ("blur", "secants", "layers")
    assert titles(drawn[0])[1:] == ["where the evidence is, by late layers"]
    assert "compared with the blurred image" in " ".join(drawn[0].get_suptitle().split())
    assert "fine heat map" not in capsys.readouterr().out


@pytest.mark.medium
def test_only_the_pixels(here: Path, drawn, capsys):
    explain("china.png", *DEEP, "--map", "pixels")
    tensors, about = result(STORED)
    assert "layer_map" not in tensors
    assert "layer_map" not in about
    assert titles(drawn[0])[1:] == ["the evidence, pixel by pixel\nall of it reaches the pixels"]
    assert "coarse heat map" not in capsys.readouterr().out
    explain("china.png", *DEEP)  # another setting, whose results do not overwrite the former
    assert Path("nrm-explained/china-2-relevance.png").exists()


@pytest.mark.medium
def test_a_model_without_late_layers_has_only_the_fine_map(here: Path, drawn, capsys):
    Path("flat.py").write_text(
        "from torch import nn\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(192, 3))\n"
    )
    explain("china.png", "--model", "flat:make", "--size", "8")
    assert len(titles(drawn[0])) == 2
    assert "layer_map" not in result(STORED)[0]
    assert "  note: no coarse heat map: flat:make has no late layers with positions" in capsys.readouterr().out
    message = fails(capsys, "explain", "china.png", "--model", "flat:make", "--size", "8", "--map", "layers")
    assert "--map layers: flat:make has no late layers with positions" in message
    assert message.endswith("Use --map pixels.")


@pytest.mark.medium
def test_an_image_that_equals_the_blurred_image_has_a_map_without_reference(here: Path, drawn, capsys):
    Image.new("RGB", (40, 40), (200, 30, 90)).save("plain.png")
    explain("plain.png", *DEEP)
    loaded = load("own_nets:deep", size=SIZE)
    inputs = loaded.preprocessing(Image.open("plain.png"))
    mu = RelevanceMeasure(loaded.model, inputs, 2, against="rest")
    tensors, about = result("nrm-explained/plain-relevance.safetensors")
    close(tensors["layer_map"], layer_average(mu, ["3", "1"])[0])
    assert json.loads(about["layer_map"])["reference"] == "none"
    assert titles(drawn[0])[1] == "where the evidence is, by late layers"
    printed = capsys.readouterr().out
    assert "  note: the coarse heat map is not compared with the blurred image: " in printed
    assert "Choose another reference" not in printed  # none was asked for
    assert "coarse heat map: mean over 3 and 1\n" in printed
