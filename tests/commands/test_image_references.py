"""Reference images in the shell."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from PIL import Image

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands.image_references import ReferenceImageError, reference_image, reference_words
from nrm_plugin.commands.model_loading import load
from nrm_plugin.composites import NRMDefault
from tests.commands.shell import OWN, SIZE, explain


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
    with pytest.raises(ReferenceImageError, match="gone is neither blur, mean, black, white, a colour such as #f0"):
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
    assert "compared with its mean colour" in printed
    with safetensors.safe_open("nrm-explained/china-relevance.safetensors", "pt") as file:
        assert file.metadata()["reference"] == "mean"
        assert file.metadata()["composite"] == ("secants" if composite is None else "nrm_default")
