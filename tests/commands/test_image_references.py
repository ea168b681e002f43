"""Reference images in the shell, including the plain background of an image."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image, ImageDraw

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands import explanation_files
from nrm_plugin.commands.image_references import ReferenceImageError, ground_name, reference_image, reference_words
from nrm_plugin.commands.model_loading import load
from nrm_plugin.composites import NRMDefault
from nrm_plugin.measure import pixel_maps
from nrm_plugin.measure.layer_averages import layer_average, layer_map
from nrm_plugin.measure.pixel_maps import pixel_map
from tests.commands.shell import OWN, PHOTO, SIZE, explain, result

DEEP = ("--model", "own_nets:deep", "--size", str(SIZE), "--target", "2")
STORED = "nrm-explained/disc-relevance.safetensors"
WORDS = "  reference: the plain background of the image, compared with a white image\n"


def inputs_of(loaded) -> torch.Tensor:
    return loaded.preprocessing(Image.open("china.png").convert("RGB"))


def references(loaded, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The references by plain formulas."""
    deviation = SIZE / 8
    steps = torch.arange(-12.0, 13.0)
    kernel = torch.exp(-0.5 * (steps / deviation) ** 2)
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1).expand(3, 1, 1, -1)
    padded = torch.nn.functional.pad(inputs, (12, 12, 12, 12), mode="reflect")
    rows = torch.nn.functional.conv2d(padded, kernel, groups=3)
    blurred = torch.nn.functional.conv2d(rows, kernel.transpose(2, 3), groups=3)
    black = loaded.preprocessing(Image.new("RGB", (SIZE, SIZE), "black"))
    white = loaded.preprocessing(Image.new("RGB", (SIZE, SIZE), "white"))
    mean = inputs.mean((2, 3), keepdim=True).expand_as(inputs)
    return {"blur": blurred, "mean": mean, "black": black, "white": white}


def test_named_references_are_images(here: Path):
    loaded = load("own_nets:make", size=SIZE)
    inputs = inputs_of(loaded)
    for name, expected in references(loaded, inputs).items():
        torch.testing.assert_close(reference_image(loaded, inputs, name), expected, atol=1e-5, rtol=1e-5)
    Image.new("RGB", (50, 40), (10, 200, 30)).save("green.png")
    green = loaded.preprocessing(Image.open("green.png"))
    torch.testing.assert_close(reference_image(loaded, inputs, "green.png"), green)
    with pytest.raises(ReferenceImageError, match="gone is neither blur, mean, black, white, a color such as #f0"):
        reference_image(loaded, inputs, "gone")


def test_words():
    assert reference_words(None) == ""
    assert reference_words("blur") == ", compared with the blurred image"
    assert reference_words("a/b/cat.png") == ", compared with cat.png"


@pytest.mark.medium
@pytest.mark.parametrize(("options", "composite"), [([], None), (["--composite", "nrm_default"], NRMDefault())])
def test_the_command_explains_the_difference_to_the_reference(here: Path, options, composite, capsys):
    explain("china.png", *OWN, "--target", "2", "--reference", "mean", *options)
    loaded = load("own_nets:make", size=SIZE)
    inputs = inputs_of(loaded)
    reference = references(loaded, inputs)["mean"]
    mu = RelevanceMeasure(loaded.model, inputs, 2, against="rest", reference=reference, composite=composite)
    stored = safetensors.torch.load_file("nrm-explained/china-relevance.safetensors")
    torch.testing.assert_close(stored["relevance"], mu.sign * mu.marginal("input")[0], atol=1e-5, rtol=1e-4)
    printed = capsys.readouterr().out
    assert "compared with its mean color" in printed
    with safetensors.safe_open("nrm-explained/china-relevance.safetensors", "pt") as file:
        assert file.metadata()["reference"] == "mean"
        assert file.metadata()["composite"] == ("secants" if composite is None else "nrm_default")


@pytest.fixture
def disc(fast: Path) -> Image.Image:
    """A photograph cut to a disc on white, in a file of its own."""
    mask = Image.new("L", (SIZE, SIZE))
    ImageDraw.Draw(mask).ellipse((6, 8, 24, 26), fill=255)
    image = Image.composite(PHOTO.convert("RGB").resize((SIZE, SIZE)), Image.new("RGB", (SIZE, SIZE), "white"), mask)
    image.save("disc.png")
    return image


@pytest.fixture
def titles(monkeypatch) -> list[list[str]]:
    """Titles of the heat maps of every figure."""
    found: list[list[str]] = []
    figure = explanation_files.image_and_heat_map

    def drawn(image, maps, names, *rest, **more):
        found.append([name.splitlines()[0] for name in names[1:]])
        return figure(image, maps, names, *rest, **more)

    monkeypatch.setattr(explanation_files, "image_and_heat_map", drawn)
    return found


def prepared(image: Image.Image) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    loaded = load("own_nets:deep", size=SIZE)
    white = loaded.preprocessing(Image.new("RGB", (SIZE, SIZE), "white"))
    return loaded.model, loaded.preprocessing(image), white


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 1e-3 * float(expected.abs().max())


@pytest.mark.medium
def test_the_ground_is_the_reference_and_the_pixels_come_first(disc, titles, capsys):
    explain("disc.png", *DEEP)
    model, inputs, white = prepared(disc)
    mu = RelevanceMeasure(model, inputs, 2, against="rest", reference=white)
    tensors, about = result(STORED)
    close(tensors["pixel_map"], pixel_map(model, inputs, 2, reference=white)[0])
    alone = RelevanceMeasure(model, inputs, 2, reference=white)
    plain = float(alone.sign) * alone.marginal("input")[0].sum(0)
    assert not torch.allclose(tensors["pixel_map"], plain, atol=1e-3)
    close(tensors["layer_map"], layer_average(mu, ["3", "1"])[0])
    close(tensors["relevance"], mu.sign * mu.marginal("input")[0])
    assert (about["reference"], about["composite"]) == ("white", "secants")
    assert json.loads(about["layer_map"])["reference"] == "white"
    assert titles == [["the evidence, pixel by pixel", "where the evidence is, by late layers"]]
    printed = capsys.readouterr().out
    assert WORDS in printed
    assert "--reference blur compares with the blurred image" in printed


@pytest.mark.parametrize("name", ["layers", "pixels"])
def test_one_map_on_a_plain_ground(disc, titles, name):
    explain("disc.png", *DEEP, "--map", name)
    tensors, about = result(STORED)
    assert about["reference"] == "white"
    assert ("layer_map" in tensors, "pixel_map" in tensors) == (name == "layers", name == "pixels")
    assert [len(names) for names in titles] == [1]


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        (["--reference", "blur"], "blur"),
        (["--reference", "black"], "black"),
        (["--reference", "none"], None),
        (["--composite", "nrm_default"], None),
        (["--residual", "sink"], None),
    ],
)
def test_a_given_reference_or_rules_win(disc, titles, options, reference, capsys):
    explain("disc.png", *DEEP, *options)
    tensors, about = result(STORED)
    assert about.get("reference") == reference
    assert "pixel_map" not in tensors
    assert titles[0][0].startswith("where the evidence is, by late layers")
    assert WORDS not in capsys.readouterr().out


@pytest.mark.medium
def test_without_a_reference_the_maps_are_those_of_a_photograph(disc):
    explain("disc.png", *DEEP, "--reference", "none")
    model, inputs, _ = prepared(disc)
    mu = RelevanceMeasure(model, inputs, 2, against="rest")
    tensors, _ = result(STORED)
    close(tensors["layer_map"], layer_map(model, inputs, 2)[0])
    close(tensors["relevance"], mu.sign * mu.marginal("input")[0])


def test_late_layers_stay_first_if_the_relevance_of_pixels_cancels(disc, titles, monkeypatch, capsys):
    monkeypatch.setattr(pixel_maps, "CANCELS", 0.0)
    explain("disc.png", *DEEP)
    _, about = result(STORED)
    assert "reference" not in about
    assert json.loads(about["layer_map"])["reference"] == "blur"
    assert titles[0][0].startswith("where the evidence is, by late layers")
    printed = capsys.readouterr().out
    assert "  note: the plain background of the image, white, is not its reference: most relevance of single" in printed


@pytest.mark.medium
def test_a_photograph_has_no_ground(fast, titles, capsys):
    explain("china.png", *DEEP)
    assert "ground" not in capsys.readouterr().out
    assert titles[0][0].startswith("where the evidence is, by late layers")


@pytest.mark.parametrize(
    ("colour", "name"), [((0, 0, 0), "black"), ((255, 255, 255), "white"), ((10, 200, 30), "#0ac81e")]
)
@pytest.mark.parametrize("model", ["deep", "grey"])
def test_the_name_of_a_ground_is_a_reference_of_its_colour(fast, colour, name, model):
    means = {"deep": {}, "grey": {"mean": (0.4,), "std": (0.2,)}}[model]
    loaded = load(f"own_nets:{model}", size=SIZE, **means)
    image = Image.new("RGB", (SIZE, SIZE), colour)
    plain = loaded.preprocessing(image)
    ImageDraw.Draw(image).ellipse((6, 8, 24, 26), fill=(120, 30, 220))
    inputs = loaded.preprocessing(image)
    torch.testing.assert_close(reference_image(loaded, inputs, name), plain, atol=0.02, rtol=0)
    found = ground_name(loaded, inputs)
    torch.testing.assert_close(reference_image(loaded, inputs, found), plain, atol=1e-5, rtol=0)
    if model == "deep":
        assert found == name


def test_words_of_a_colour():
    assert reference_words("#0ac81e") == ", compared with a plain image of #0ac81e"
