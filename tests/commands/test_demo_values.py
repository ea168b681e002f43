"""The digits of the demo and the numbers of its layers, which are those of the measure and of plain Zennit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zennit.attribution import Gradient
from zennit.composites import EpsilonPlus

from nrm_plugin import RelevanceMeasure
from nrm_plugin.commands.demo_values import LAYERS, DemoError, choose, layer_rows, plain_sums
from nrm_plugin.commands.options import MISCLASSIFIED
from nrm_plugin.demo import load_digits, load_model
from tests.conftest import untouched


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return load_model()


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, list[int]]:
    """A few digits, one of them misclassified, and their predicted classes."""
    images, labels = load_digits()
    samples, _ = choose(load_model(), images, labels, ["6", "0", MISCLASSIFIED])
    return images[[sample.index for sample in samples]], [sample.predicted for sample in samples]


def test_of_each_kind_the_most_confident_prediction_is_chosen(model: nn.Module):
    images, labels = load_digits()
    samples, accuracy = choose(model, images, labels, ["3", MISCLASSIFIED, "3"])
    confidence, predicted = model(images).detach().double().softmax(1).max(1)
    first, wrong, second = samples
    threes = ((labels == 3) & (predicted == 3)).nonzero()[:, 0].tolist()
    assert sorted(threes, key=lambda index: -confidence[index])[:2] == [first.index, second.index]
    assert (first.label, first.predicted, first.name, second.name) == (3, 3, "3", "3-2")
    assert wrong.label == labels[wrong.index] != wrong.predicted == predicted[wrong.index]
    assert accuracy == sum(int(a == b) for a, b in zip(labels, predicted, strict=True)) / 450


@pytest.mark.parametrize("kinds", [[], ["10"], ["seven"], [MISCLASSIFIED] * 20], ids=["none", "10", "word", "too many"])
def test_unavailable_digits_are_rejected(kinds: list[str], model: nn.Module):
    with pytest.raises(DemoError, match="neither a digit" if kinds in (["10"], ["seven"]) else "requested"):
        choose(model, *load_digits(), kinds)


def zennit_sum(model: nn.Module, images: Tensor, target: list[int], layer: str) -> Tensor:
    """Relevance at the output of a layer by Zennit's attributor, summed for each sample."""
    seen = {}

    def keep(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda relevance: seen.update(relevance=relevance))

    with Gradient(model, EpsilonPlus()) as attributor:
        handle = None if layer == "input" else model.get_submodule(layer).register_forward_hook(keep)
        _, relevance = attributor(images, torch.eye(10)[target])
        if handle is not None:
            handle.remove()
    return seen.get("relevance", relevance).flatten(1).sum(1)


@pytest.mark.medium
def test_plain_column_is_that_of_zennits_attributor(model: nn.Module, digits: tuple[Tensor, list[int]]):
    rows = layer_rows(model, *digits)
    assert [row.layer for row in rows] == list(LAYERS)
    for row in rows:
        torch.testing.assert_close(row.plain, zennit_sum(model, *digits, row.layer), rtol=1e-5, atol=1e-6)
    assert (rows[-1].plain < 0.85).all()  # the leak that the table shows


def test_plain_column_is_the_mass_with_a_sink(model: nn.Module, digits: tuple[Tensor, list[int]]):
    mu = RelevanceMeasure(model, *digits, composite=EpsilonPlus(), residual="sink")
    for row in layer_rows(model, *digits):
        torch.testing.assert_close(row.plain, mu.marginal(row.layer).flatten(1).sum(1), rtol=1e-5, atol=1e-5)


@pytest.mark.medium
def test_other_columns_are_those_of_each_digit_alone(model: nn.Module, digits: tuple[Tensor, list[int]]):
    images, target = digits
    rows = layer_rows(model, images, target)
    for number, (image, predicted) in enumerate(zip(images, target, strict=True)):
        mu = RelevanceMeasure(model, image[None], predicted, composite=EpsilonPlus())
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
