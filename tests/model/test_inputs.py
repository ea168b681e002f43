"""Model inputs and outputs that a measure cannot be computed for."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from nrm_plugin import NRM, RelevanceMeasure, at, coverage
from nrm_plugin.errors import EventError, GradModeError, InputError, TargetError
from tests.error_cases import Calls, MeasuredNet, build, error_cases


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


def with_entry(x, value):
    x = x.clone()
    x[1, 0, 2, 2] = value
    return x


@error_cases(
    ("nan", lambda x: with_entry(x, math.nan), InputError, "nan or inf", "(sample 1)", "nan_to_num"),
    ("inf", lambda x: with_entry(x, -math.inf), InputError, "nan or inf", "(sample 1)", "Leave these samples out"),
    ("empty batch", lambda x: x[:0], InputError, "(0, 1, 4, 4)", "no sample to explain"),
    ("empty images", lambda x: x[:, :, :0], InputError, "(2, 1, 0, 4)", "no sample to explain"),
    ("scalar", lambda x: x.sum(), InputError, "shape ()", "no sample to explain"),
    ("complex", lambda x: x * 1j, InputError, "complex64", "real floating point", ".float()"),
    ("integer", lambda x: x.long(), InputError, "int64", "real floating point", ".float()", "embedding"),
    ("bool", lambda x: x > 0, InputError, "torch.bool", "real floating point", ".float()"),
    ("half", lambda x: x.half(), InputError, "float16", "lose their digits", "float32 or float64"),
    ("bfloat16", lambda x: x.bfloat16(), InputError, "bfloat16", "lose their digits", "float32 or float64"),
    ("double", lambda x: x.double(), InputError, "float64", "the model torch.float32", "model.double()"),
    ("meta", lambda x: x.to("meta"), InputError, "on device meta", "holds values"),
    ("sparse", lambda x: x.to_sparse(), InputError, "sparse", "dense tensor"),
    ("numpy", lambda x: x.numpy(), InputError, "ndarray", "expected a tensor of shape (N, …)"),
    ("none", lambda x: None, InputError, "NoneType", "expected a tensor of shape (N, …)"),
    ("word", lambda x: "image.png", InputError, "str", "expected a tensor of shape (N, …)"),
    ("numbers", lambda x: [1.0, 2.0], InputError, "input 0 is float", "expected a tensor of shape (N, …)"),
    ("nothing", lambda x: (), InputError, "no input", "Pass a tensor"),
    ("no tensors by name", lambda x: {"x": 3}, InputError, "'x' (int)", ".float()"),
    ("batches that differ", lambda x: (x, x[:1]), InputError, "input 1 has 1 samples", "the first one has 2"),
    ("second one bad", lambda x: (x, with_entry(x, math.nan)), InputError, "input 1 has nan", "(sample 1)"),
    ("model first", lambda x: build(), InputError, "the input is Net", "expected a tensor"),
)
def test_an_invalid_input_raises(measured, case, error, words):
    bad = case(measured.x)
    with measured.raises(error, *words):
        RelevanceMeasure(measured.net, bad, 1)
    with measured.raises(error, *words):
        coverage(measured.net, bad)


def test_an_inference_tensor_as_input_raises(measured):
    with torch.inference_mode():
        x = measured.x.clone()
    with measured.raises(InputError, "torch.inference_mode", ".clone()"):
        RelevanceMeasure(measured.net, x, 1)


@pytest.mark.parametrize(("mode", "name"), [(torch.no_grad, "no_grad"), (torch.inference_mode, "inference_mode")])
def test_a_measure_without_gradients_raises(measured, mode, name):
    for query in (
        lambda: RelevanceMeasure(measured.net, measured.x, 1),
        lambda: coverage(measured.net, measured.x),
    ):
        with measured.raises(GradModeError, f"torch.{name}", "with gradients on", "outside"), mode():
            query()


def test_errors_of_the_model_itself_propagate(measured):
    """They are passed on unchanged, and nothing is left behind on the model."""
    for inputs, arguments, error in (
        (torch.randn(2, 3, 4, 4), {}, RuntimeError),
        ((measured.x, measured.x), {}, TypeError),
        (measured.x, {"additional_forward_args": 3}, TypeError),
        (measured.x, {"additional_forward_kwargs": {"mask": 3}}, TypeError),
    ):
        with measured.raises(error):
            RelevanceMeasure(measured.net, inputs, 1, **arguments)


def test_a_list_of_inputs_is_treated_as_a_tuple(measured):
    relevance = RelevanceMeasure(measured.net, [measured.x], 1).marginal("input")
    torch.testing.assert_close(relevance, measured.mu.marginal("input"), rtol=0, atol=0)
    assert coverage(measured.net, [measured.x]).is_complete


# -- outputs ------------------------------------------------------------------------------------------------------

JOINED = "does not depend on the inputs", "detach"


@error_cases(
    ("tuple", lambda self, x: (x, x), InputError, "tuple of 0 (float32 (2, 4)), 1", "output="),
    ("none", lambda self, x: None, InputError, "NoneType", "one tensor of shape (N, …)"),
    ("words", lambda self, x: "cat", InputError, "str", "one tensor of shape (N, …)"),
    ("scalar", lambda self, x: x.sum(), InputError, "2 inputs", "shape ()", "must be the batch"),
    ("no batch", lambda self, x: x.sum(0), InputError, "2 inputs", "shape (4,)", "must be the batch"),
    ("transposed", lambda self, x: x.T, InputError, "2 inputs", "shape (4, 2)", "must be the batch"),
    ("repeated", lambda self, x: torch.cat([x, x]), InputError, "shape (4, 4)", "must be the batch"),
    ("no outputs", lambda self, x: x[:, :0], InputError, "shape (2, 0)", "scores"),
    ("classes", lambda self, x: x.argmax(1), InputError, "int64", "Let the model return its scores"),
    ("decisions", lambda self, x: x > 0, InputError, "torch.bool", "Let the model return its scores"),
    ("complex", lambda self, x: torch.complex(x, x), InputError, "complex64", "real numbers"),
    ("half", lambda self, x: x.half(), InputError, "float16", "float32 or float64"),
    ("constant", lambda self, x: torch.ones(2, 4), InputError, *JOINED),
    ("detached", lambda self, x: x.detach(), InputError, *JOINED),
    ("data", lambda self, x: x.data, InputError, *JOINED),
    ("parameter", lambda self, x: self.lin.bias.expand(2, 4), InputError, *JOINED),
    ("own leaf", lambda self, x: torch.ones(2, 4, requires_grad=True) * 2, InputError, *JOINED),
    ("no gradients", torch.no_grad()(lambda self, x: x * 2), InputError, *JOINED, "torch.no_grad"),
    ("not finite", lambda self, x: x / 0.0, InputError, "nan or inf", "(samples 0, 1)", "division by zero"),
)
def test_an_invalid_model_output_raises(measured, case, error, words):
    torch.manual_seed(0)
    model = Calls(case).eval()
    with measured.raises(error, *words, model=model):
        RelevanceMeasure(model, measured.x, 1)


def test_an_invalid_choice_of_output_raises(measured):
    model = Calls(lambda self, x: {"scores": x, "classes": x.argmax(1), "other": x * 2}).eval()
    with measured.raises(InputError, "'scores' (float32 (2, 4))", "output=", model=model):
        RelevanceMeasure(model, measured.x, 1)
    with measured.raises(InputError, "output='score'", "'scores' (float32 (2, 4))", model=model):
        RelevanceMeasure(model, measured.x, 1, output="score")
    with measured.raises(InputError, "int64", "Let the model return its scores", model=model):
        RelevanceMeasure(model, measured.x, 1, output="classes")
    assert RelevanceMeasure(model, measured.x, 1, output="scores").batch == 2


def test_a_scalar_output_needs_no_target_and_no_second_dimension(measured):
    model = Calls(lambda self, x: x[:, 1]).eval()
    twin = copy.deepcopy(model)
    twin.function = lambda self, x: x
    twin = RelevanceMeasure(twin, measured.x, 1)
    mu = RelevanceMeasure(model, measured.x)
    assert mu.shape("output") == (2,)
    torch.testing.assert_close(mu.output, model(measured.x).detach())
    torch.testing.assert_close(mu(at("lin")) + mu.sink("lin") + mu.bypass("lin"), torch.ones(2))
    torch.testing.assert_close(mu.marginal("output") + mu.sink("output") + mu.bypass("output"), torch.ones(2))
    torch.testing.assert_close(mu.marginal("output", "channel"), torch.ones(2))
    torch.testing.assert_close(mu.variation("output"), torch.ones(2))
    torch.testing.assert_close(mu.joint("output", "lin").shape, torch.Size([2, 1, 4]))
    torch.testing.assert_close(mu.marginal("input"), twin.marginal("input"))
    assert NRM(model).attribute(measured.x, return_convergence_delta=True)[1].abs().max() < 1e-5
    with measured.raises(TargetError, "target 0 has 1 index", "(2,)", "leave target= out", model=model):
        RelevanceMeasure(model, measured.x, 0)
    with measured.raises(EventError, "no channels", model=model):
        mu(at("output").channel(0))
