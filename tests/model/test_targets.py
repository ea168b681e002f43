"""Targets and start vectors: the accepted forms, and the errors for others."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import NRM, RelevanceMeasure
from nrm_plugin.errors import TargetError
from tests.error_cases import MeasuredNet, error_cases


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


FORMS = "Give an int, a tuple of ints for an output of several dimensions, or a list or tensor of one for each sample"


@error_cases(
    ("missing", None, TargetError, "(2, 5)", "target=", "5 entries", "model(inputs).argmax(1)"),
    ("range", 5, TargetError, "target 5 of sample 0", "(2, 5)", "0 to 4"),
    ("below range", -6, TargetError, "target -6 of sample 0", "(2, 5)", "0 to 4"),
    ("range of one", [1, 7], TargetError, "target 7 of sample 1", "(2, 5)", "0 to 4"),
    ("range in a tensor", torch.tensor([9, 1]), TargetError, "target 9 of sample 0", "0 to 4"),
    ("word", "cat", TargetError, "target is str", FORMS),
    ("float", 1.0, TargetError, "target is float", FORMS),
    ("bool", True, TargetError, "target is bool", FORMS),
    ("dict", {}, TargetError, "target is dict", FORMS),
    ("range object", range(2), TargetError, "target is range", FORMS),
    ("function of the outputs", lambda output: output, TargetError, "float32", "is an index", FORMS),
    ("one-hot", torch.eye(5)[:2], TargetError, "float32", "is an index", FORMS),
    ("bools", torch.tensor([True, False]), TargetError, "torch.bool", "is an index", FORMS),
    ("complex", torch.tensor([1j, 1j]), TargetError, "complex64", "is an index", FORMS),
    ("float array", np.ones(2), TargetError, "float64", "is an index", FORMS),
    ("words in an array", np.array(["cat", "dog"]), TargetError, "target has dtype", FORMS),
    ("no values", torch.tensor([1, 2], device="meta"), TargetError, "meta", FORMS),
    ("words", ["cat", "dog"], TargetError, "target 'cat'", "does not consist of integers", FORMS),
    ("nones", [None, 1], TargetError, "target None", "does not consist of integers", FORMS),
    ("bools in a list", [True, False], TargetError, "target True", "does not consist of integers", FORMS),
    ("too many", [1, 2, 3], TargetError, "3 entries for 2 samples", "one for all or one for each"),
    ("too few", [], TargetError, "0 entries for 2 samples", "one for all or one for each"),
    ("tuple", (1, 2), TargetError, "target (1, 2) has 2 indices", "(2, 5)", "one int for all samples"),
    ("empty tuple", (), TargetError, "has 0 indices", "(2, 5)", "one int for all samples"),
    ("tuples", [(1, 2), (0, 1)], TargetError, "target (1, 2) has 2 indices", "(2, 5)"),
    ("two dimensions", torch.zeros(2, 2).long(), TargetError, "target (0, 0) has 2 indices", "(2, 5)"),
    ("three dimensions", torch.zeros(2, 2, 2).long(), TargetError, "does not consist of integers", FORMS),
)
def test_an_invalid_target_raises(measured, case, error, words):
    with measured.raises(error, *words):
        RelevanceMeasure(measured.net, measured.x, case)
    with measured.raises(error, *words):
        NRM(measured.net).attribute(measured.x, target=case)


@error_cases(
    ("sum 0", [1.0, -1, 0, 0, 0], TargetError, "sums to 0 (samples 0, 1)", "against=other"),
    ("sum 0 in one", torch.eye(5)[:2] * torch.tensor([[1.0], [0]]), TargetError, "sums to 0 (sample 1)", "as against="),
    ("cancelled", [1.0, -1 + 1e-8, 0, 0, 0], TargetError, "sums to 0", "To explain a difference of outputs"),
    ("zero", torch.zeros(5), TargetError, "sums to 0 (samples 0, 1)"),
    ("nan", [1.0, math.nan, 0, 0, 0], TargetError, "nan or inf", "finite numbers"),
    ("inf", [1.0, math.inf, 0, 0, 0], TargetError, "nan or inf", "finite numbers"),
    ("shape", torch.ones(4), TargetError, "shape (4,), the output (2, 5)", "with or without the batch"),
    ("batch", torch.ones(3, 5), TargetError, "shape (3, 5), the output (2, 5)", "with or without the batch"),
    ("number", 1, TargetError, "shape (), the output (2, 5)", "one entry for each output"),
    ("word", "cat", TargetError, "start is str", "one number for each output"),
    ("words", ["cat"] * 5, TargetError, "start is list", "one number for each output"),
    ("ragged", [[1], [1, 2]], TargetError, "start is list", "one number for each output"),
    ("nones", [None] * 5, TargetError, "start is list", "one number for each output"),
    ("dict", {}, TargetError, "start is dict", "one number for each output"),
    ("function", lambda output: len, TargetError, "start is builtin_function", "one number for each output"),
    ("complex", torch.ones(5) * 1j, TargetError, "complex64", "real numbers"),
    ("no values", torch.ones(5, device="meta"), TargetError, "meta", "no values"),
)
def test_an_invalid_start_vector_raises(measured, case, error, words):
    with measured.raises(error, *words):
        RelevanceMeasure(measured.net, measured.x, start=case)


def test_a_target_together_with_a_start_vector_raises(measured):
    with measured.raises(TargetError, "target= or start=, not both"):
        RelevanceMeasure(measured.net, measured.x, 1, start=torch.ones(5))


@pytest.mark.parametrize(
    "target",
    [np.int64(1), torch.tensor(1), np.array([1, 1]), [np.int64(1)] * 2, [torch.tensor(1)] * 2, (1,), -4, [[1]]],
)
def test_targets_as_returned_by_argmax_are_accepted(measured, target):
    relevance = RelevanceMeasure(measured.net, measured.x, target).marginal("input")
    torch.testing.assert_close(relevance, measured.mu.marginal("input"), rtol=0, atol=0)


def test_an_output_with_several_dimensions_needs_an_index_for_each(measured):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Unflatten(1, (2, 3))).eval()
    with measured.raises(TargetError, "target 1 has 1 index", "(2, 2, 3) has 2 dimensions", "tuple", model=net):
        RelevanceMeasure(net, measured.x, 1)
    with measured.raises(TargetError, "target (1, 3) of sample 0", "0 to 1, 0 to 2", model=net):
        RelevanceMeasure(net, measured.x, (1, 3))
