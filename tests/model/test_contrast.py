"""Weights of the outputs in a contrast: the accepted forms, and the errors for others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import TargetError
from nrm_plugin.model.contrast import contrast_vector, explained_number
from tests.error_cases import MeasuredNet

OUTPUTS = torch.tensor([[1.0, 3.0, -2.0, 0.5], [0.0, -1.0, 2.0, 4.0]], dtype=torch.float64)


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


def weights(**entries: list[float]) -> torch.Tensor:
    return torch.tensor(list(entries.values()), dtype=torch.float64)


@pytest.mark.parametrize(
    ("target", "against"),
    [
        (1, 3),
        ([1, 1], [3, 3]),
        (torch.tensor([1, 1]), (3,)),
        (np.array([1, 1]), torch.tensor([3])),
        (lambda outputs: torch.tensor([1, 1]), lambda outputs: [3, 3]),
        (None, lambda outputs: torch.tensor([0.0, 1.0, 0.0, -1.0])),
        (None, lambda outputs: np.array([[0.0, 1.0, 0.0, -1.0]] * 2)),
    ],
)
def test_the_forms_of_a_difference_of_two_outputs(target, against):
    assert torch.equal(contrast_vector(OUTPUTS, target, against), weights(a=[0, 1, 0, -1], b=[0, 1, 0, -1]))


@pytest.mark.parametrize("against", ["rest", lambda outputs: "rest"])
def test_the_rest_is_weighted_by_the_softmax_of_the_other_outputs(against):
    vector = contrast_vector(OUTPUTS, [1, 0], against)
    for row, outputs, target in zip(vector.tolist(), OUTPUTS.tolist(), [1, 0], strict=True):
        others = [number for number in range(4) if number != target]
        total = sum(np.exp(outputs[number]) for number in others)
        expected = {number: -np.exp(outputs[number]) / total for number in others} | {target: 1}
        assert row == pytest.approx([expected[number] for number in range(4)], abs=1e-12)


def test_the_rest_of_two_classes_is_the_other_class():
    assert torch.equal(contrast_vector(OUTPUTS[:, :2], 0, "rest"), weights(a=[1, -1], b=[1, -1]))


def test_the_classes_may_be_the_only_dimension_of_several():
    vector = contrast_vector(OUTPUTS[:, :, None, None], (1, 0, 0), "rest")
    assert torch.equal(vector.flatten(1), contrast_vector(OUTPUTS, 1, "rest"))


def test_without_a_batch_the_rest_is_that_of_the_row_of_the_target():
    vector = contrast_vector(OUTPUTS[None], (1, 0), "rest", batched=False)
    assert torch.equal(vector[0, 1], contrast_vector(OUTPUTS, 0, "rest")[1])
    assert not vector[0, 0].any()


def test_the_weights_are_constants():
    outputs = OUTPUTS.clone().requires_grad_()
    assert not contrast_vector(outputs.detach(), 1, "rest").requires_grad


def test_the_explained_number():
    assert torch.equal(explained_number(OUTPUTS, contrast_vector(OUTPUTS, 1, 3)), OUTPUTS[:, 1] - OUTPUTS[:, 3])


CASES = {
    "same": ([1, 2], 2, "the same output (sample 1)", 'against="rest"'),
    "word": (1, "others", "'others'", '"rest"', "an int"),
    "range": (1, 7, "target 7 of sample 0", "0 to 4"),
    "float": (1, 1.5, "target is float"),
    "nothing returned": (1, lambda outputs: None, "returned None", "an int"),
    "a word returned": (1, lambda outputs: "others", "'others'"),
    "weights and target": (1, lambda outputs: torch.ones(5), "weights of all outputs", "Omit target="),
    "weights of another shape": (None, lambda outputs: torch.ones(4), "shape (4,)", "the output (2, 5)"),
    "no target": (None, "rest", "target= must select"),
    "zero weights": (None, lambda outputs: torch.zeros(5), "0 up to rounding (samples 0, 1)"),
}


@pytest.mark.parametrize("case", CASES)
def test_an_invalid_contrast_raises(measured, case):
    target, against, *words = CASES[case]
    with measured.raises(TargetError, *words):
        RelevanceMeasure(measured.net, measured.x, target, against=against)


def test_start_and_against_raise(measured):
    with measured.raises(TargetError, "start= or against=, not both"):
        RelevanceMeasure(measured.net, measured.x, start=torch.ones(5), against=2)


def test_equal_outputs_raise():
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[1], layer.bias[1] = layer.weight[0], layer.bias[0]
    with pytest.raises(TargetError, match=r"0 up to rounding \(samples 0, 1\).*omit it"):
        RelevanceMeasure(layer, torch.randn(2, 3), 0, against=1)


@pytest.mark.parametrize(("shape", "target"), [((2, 1), 0), ((2, 3, 4), (0, 1)), ((2, 3, 2, 2), (0, 1, 1))])
def test_the_rest_of_outputs_that_are_not_scores_of_classes_raises(shape, target):
    with pytest.raises(TargetError, match=r"\(N, C\).*function of the outputs"):
        contrast_vector(torch.randn(shape), target, "rest")
