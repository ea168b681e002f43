"""The demo's numbers are the measure's own, and plain Zennit's; its pictures show them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.commands import demo
from nrm_plugin.commands.demo import LAYERS, LOWER, MISREAD, UPPER, DemoError, choose, layer_rows, plain_sums
from nrm_plugin.commands.demo_joint import joint_heat_maps, joint_relevance
from nrm_plugin.demo import load_digits, load_model
from tests.conftest import untouched

README_PICTURE = Path(__file__).parents[2] / "docs/images/demo.png"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, list[int]]:
    """A few digits, one of them misread, and what the net reads."""
    images, labels = load_digits()
    samples, _ = choose(load_model(), images, labels, ["6", "0", MISREAD])
    return images[[sample.index for sample in samples]], [sample.read for sample in samples]


@pytest.fixture(scope="module")
def mu(model: nn.Module) -> RelevanceMeasure:
    images, labels = load_digits()
    (sample,), _ = choose(model, images, labels, ["6"])
    return RelevanceMeasure(model, images[sample.index : sample.index + 1], sample.read)


# -- which digits -------------------------------------------------------------------------------------------------


def test_of_each_kind_the_net_is_surest_of_the_chosen_one(model: nn.Module):
    images, labels = load_digits()
    samples, accuracy = choose(model, images, labels, ["3", MISREAD, "3"])
    sure, read = model(images).detach().double().softmax(1).max(1)
    first, wrong, second = samples
    threes = ((labels == 3) & (read == 3)).nonzero()[:, 0].tolist()
    assert sorted(threes, key=lambda index: -sure[index])[:2] == [first.index, second.index]
    assert (first.label, first.read, first.name, second.name) == (3, 3, "3", "3-2")
    assert wrong.label == labels[wrong.index] != wrong.read == read[wrong.index]
    assert accuracy == sum(int(a == b) for a, b in zip(labels, read, strict=True)) / 450


@pytest.mark.parametrize("wanted", [[], ["10"], ["seven"], [MISREAD] * 20], ids=["none", "10", "word", "too many"])
def test_digits_that_are_not_there_are_refused(wanted: list[str], model: nn.Module):
    with pytest.raises(DemoError, match="neither a digit" if wanted in (["10"], ["seven"]) else "wanted"):
        choose(model, *load_digits(), wanted)


# -- the table ----------------------------------------------------------------------------------------------------


def zennit_sum(model: nn.Module, images: Tensor, target: list[int], layer: str) -> Tensor:
    """Through Zennit's own attributor: the relevance that comes to one layer's output, summed for each sample."""
    seen = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda relevance: seen.update(found=relevance))

    with Gradient(model, EpsilonPlus()) as attributor:
        handle = None if layer == "input" else model.get_submodule(layer).register_forward_hook(keep)
        _, relevance = attributor(images, torch.eye(10)[target])
        if handle is not None:
            handle.remove()
    return seen.get("found", relevance).flatten(1).sum(1)


def test_plain_column_is_what_zennits_attributor_says(model: nn.Module, digits: tuple[Tensor, list[int]]):
    rows = layer_rows(model, *digits)
    assert [row.layer for row in rows] == list(LAYERS)
    for row in rows:
        torch.testing.assert_close(row.plain, zennit_sum(model, *digits, row.layer), rtol=1e-5, atol=1e-6)
    assert (rows[-1].plain < 0.85).all()  # the leak that the table is there to show


def test_plain_column_is_the_mass_where_the_sink_takes_the_rest(model: nn.Module, digits: tuple[Tensor, list[int]]):
    mu = RelevanceMeasure(model, *digits, composite=EpsilonPlus(), residual="sink")
    for row in layer_rows(model, *digits):
        torch.testing.assert_close(row.plain, mu.marginal(row.layer).flatten(1).sum(1), rtol=1e-5, atol=1e-5)


def test_other_columns_are_those_of_each_digit_alone(model: nn.Module, digits: tuple[Tensor, list[int]]):
    images, target = digits
    rows = layer_rows(model, images, target)
    for number, (image, read) in enumerate(zip(images, target, strict=True)):
        mu = RelevanceMeasure(model, image[None], read, composite=EpsilonPlus())
        for row in rows:
            own = (
                mu.marginal(row.layer).sum(),
                mu.sink(row.layer)[0],
                mu.bypass(row.layer)[0],
                mu.variation(row.layer)[0],
            )
            shown = (row.mass[number], row.sink[number], row.bypass[number], row.variation[number])
            torch.testing.assert_close(torch.stack(shown), torch.stack(own), rtol=1e-4, atol=1e-5)
            assert shown[0] + shown[1] + shown[2] == pytest.approx(1, abs=1e-4)


def test_plain_sums_leave_the_model_alone(model: nn.Module, digits: tuple[Tensor, list[int]]):
    with untouched(model, digits[0]):
        plain_sums(model, *digits, EpsilonPlus(), LAYERS)


# -- joint relevance ----------------------------------------------------------------------------------------------


def test_joint_relevance_is_the_mass_of_each_event(mu: RelevanceMeasure):
    layers = ["features.5", "features.12", "features.7"]
    found = joint_relevance(mu, layers, 3)
    assert found.layers == ("features.12", "features.7", "features.5")
    assert found.values.shape == (3, 3, 3)
    for place in [(0, 0, 0), (2, 1, 0), (1, 2, 2)]:
        a, b, c = (channels[index] for channels, index in zip(found.channels, place, strict=True))
        event = at("features.12")[a] & at("features.7")[b] & at("features.5")[c]
        torch.testing.assert_close(found.values[place], mu(event)[0], rtol=1e-4, atol=1e-7)


def test_joint_relevance_of_all_channels_is_the_joint_matrix(mu: RelevanceMeasure):
    found = joint_relevance(mu, [UPPER, LOWER], 1000)
    matrix = mu.joint(UPPER, LOWER)[0]
    assert found.sizes == tuple(matrix.shape)
    torch.testing.assert_close(found.values, matrix[list(found.channels[0])][:, list(found.channels[1])])
    strongest = [(found.channels[0][a], found.channels[1][b]) for a, b in found.strongest(4)]
    order = matrix.abs().flatten().argsort(descending=True)[:4]
    assert strongest == [divmod(int(place), matrix.shape[1]) for place in order]


def test_channels_are_the_most_relevant_ones(mu: RelevanceMeasure):
    found = joint_relevance(mu, [LOWER, UPPER], 5)
    for layer, channels, marginals in zip(found.layers, found.channels, found.marginals, strict=True):
        mass = mu.marginal(layer, over="channel")[0]
        torch.testing.assert_close(marginals, mass[list(channels)])
        assert marginals.abs().min() >= mass.abs().sort(descending=True).values[4]
        assert len(set(channels)) == 5


def test_joint_heat_maps_sum_to_the_joint_relevance_that_is_not_absorbed_below(mu: RelevanceMeasure):
    found = joint_relevance(mu, [UPPER, LOWER], 3)
    events = [found.event(place) for place in found.strongest(2)]
    below = [at(layer, side="sink") for layer in ("features.0", "features.2", "features.5")]
    absorbed = torch.stack([sum(mu(event & sink)[0] for sink in below) for event in events])
    sums = joint_heat_maps(mu, events).flatten(1).sum(1)
    values = torch.stack([found.values[place] for place in found.strongest(2)])
    torch.testing.assert_close(sums + absorbed, values, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("layers", [[], [UPPER], [UPPER, UPPER]])
def test_joint_relevance_needs_two_different_layers(layers: list[str], mu: RelevanceMeasure):
    with pytest.raises(ValueError, match="two or more different layers"):
        joint_relevance(mu, layers, 3)


def test_joint_relevance_needs_one_sample(model: nn.Module):
    with pytest.raises(ValueError, match="one sample, not of 2"):
        joint_relevance(RelevanceMeasure(model, load_digits()[0][:2], [1, 2]), [UPPER, LOWER], 3)


# -- the pictures -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_pictures_show_what_the_measure_says(monkeypatch: pytest.MonkeyPatch, mu: RelevanceMeasure, tmp_path: Path):
    drawn: dict[str, tuple] = {}
    for name in ("joint_figure", "image_and_heat_map", "heat_maps", "budgets"):
        original = getattr(demo, name)

        def spy(*args, name=name, original=original, **kwargs):
            drawn[name] = args
            return original(*args, **kwargs)

        monkeypatch.setattr(demo, name, spy)
    report = demo.run(["6"], tmp_path)
    relevance = mu.marginal("input")[0].sum(0)
    torch.testing.assert_close(drawn["image_and_heat_map"][1], relevance)
    torch.testing.assert_close(drawn["joint_figure"][2], relevance)
    mass = mu.marginal(UPPER, over="channel")[0]
    for shown, title in zip(*drawn["heat_maps"][:2], strict=True):
        channel = int(title.split()[1])
        assert f"({100 * mass[channel]:.2g}%)" in title
        torch.testing.assert_close(shown, mu.marginal("input", given=at(UPPER)[channel])[0].sum(0))
    (panel,) = drawn["budgets"][1]
    assert panel.mass == pytest.approx([float(row.mass) for row in report.rows])
    assert panel.reference == pytest.approx([float(row.plain) for row in report.rows])


@pytest.mark.slow
def test_run_writes_pictures_of_sensible_size(tmp_path: Path):
    report = demo.run(["1", MISREAD], tmp_path)
    names = [f"{sample}-{kind}.png" for sample in ("1", MISREAD) for kind in ("joint", "pixels", "channels")]
    assert [path.name for path in report.files] == [*names, "budgets.png"]
    assert [path.name for path in report.flow] == ["1-flow.png", "1-flow.html"]
    assert sorted(tmp_path.iterdir()) == sorted([*report.files, *report.flow])
    for path in [*report.files, report.flow[0]]:
        with Image.open(path) as picture:
            assert picture.format == "PNG"
            assert 600 < picture.width < 2000
            assert 400 < picture.height < 1200
            assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 50
        assert path.stat().st_size < 500_000


def test_number_of_threads_is_put_back_also_after_an_error(tmp_path: Path):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with pytest.raises(DemoError):
            demo.run(["none"], tmp_path)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_picture_of_the_readme_is_one_of_the_demo(tmp_path: Path):
    path = next(path for path in demo.run(["6"], tmp_path).files if path.name == "6-joint.png")
    assert README_PICTURE.stat().st_size < 300_000
    with Image.open(README_PICTURE) as shown, Image.open(path) as written:
        assert shown.size == written.size
        # Fonts differ from machine to machine; the heat map of the pixels, at the lower left, does not.
        box = (20, 450, 320, 740)
        a, b = (torch.tensor(bytearray(one.convert("RGB").crop(box).tobytes())).float() for one in (shown, written))
        assert (a - b).abs().mean() < 8
