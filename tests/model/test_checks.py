"""Models that cannot be measured in their present state."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import StochasticDepth
from zennit.composites import EpsilonPlus

from nrm_plugin import NRM, Normalized, RelevanceMeasure, at, coverage
from nrm_plugin.errors import InputError, ModelStateError, UnknownLayerError
from nrm_plugin.model.checks import unwrapped
from tests.error_cases import Calls, MeasuredNet, Net, build, error_cases, through


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


@error_cases(
    ("none", lambda: None, InputError, "NoneType", "torch.nn.Module"),
    ("function", lambda: lambda x: x, InputError, "function", "wrap it in a module"),
    ("class", lambda: Net, InputError, "the class Net", "Pass an instance: Net("),
    ("tensor", lambda: torch.ones(2), InputError, "Tensor", "torch.nn.Module"),
)
def test_an_object_that_is_not_a_model_raises(measured, case, error, words):
    for make in (
        lambda model: RelevanceMeasure(model, measured.x, 1),
        lambda model: coverage(model, measured.x),
        lambda model: NRM(model).attribute(measured.x, target=1),
    ):
        with measured.raises(error, *words):
            make(case())


def test_meta_and_lazy_parameters_raise(measured):
    model = Net().to("meta").eval()
    identities = [id(parameter) for parameter in model.parameters()]
    with measured.raises(ModelStateError, "'conv.weight'", "meta", "load_state_dict"):
        RelevanceMeasure(model, measured.x, 1)
    assert identities == [id(parameter) for parameter in model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()
    with measured.raises(ModelStateError, "'1.weight'", "lazy", "model(inputs)"):
        RelevanceMeasure(lazy, measured.x, 1)


@pytest.mark.parametrize("tensor", ["weight", "buffer"])
def test_a_model_made_in_inference_mode_raises_and_its_copy_is_measured(measured, tensor):
    model = nn.Sequential(nn.Flatten(), nn.Linear(measured.x[0].numel(), 3)).eval()
    with torch.inference_mode():
        if tensor == "weight":
            model[1].weight = nn.Parameter(model[1].weight.clone())
        else:
            model[1].register_buffer("scale", torch.ones(3))
    with measured.raises(ModelStateError, f"'1.{'weight' if tensor == 'weight' else 'scale'}'", "copy.deepcopy(model)"):
        RelevanceMeasure(model, measured.x, 1)
    RelevanceMeasure(copy.deepcopy(model), measured.x, 1).marginal("input")


def test_a_model_on_another_device_raises(measured):
    """Without parameters, the device is that of the buffers."""
    model = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten()).eval()
    model[0].running_mean, model[0].running_var = model[0].running_mean.to("meta"), model[0].running_var.to("meta")
    with measured.raises(InputError, "the input is on cpu", "the model on meta", "inputs.to("):
        RelevanceMeasure(model, measured.x, 1)


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda net: net.double(), ("float32", "the model torch.float64", "inputs.double()")),
        (lambda net: net.half(), ("float32", "the model torch.float16", "`.float()` for both")),
        (lambda net: net.bfloat16(), ("float32", "the model torch.bfloat16")),
    ],
)
def test_a_model_of_another_dtype_raises(measured, convert, words):
    model = convert(build())
    before = copy.deepcopy(model.state_dict())
    with measured.raises(InputError, *words):
        RelevanceMeasure(model, measured.x, 1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_weights_raise_and_are_named(measured, value):
    model = build()
    with torch.no_grad():
        model.lin.bias[3] = value
    with measured.raises(ModelStateError, "'lin.bias'", "nan or inf", "Load or train", model=model):
        RelevanceMeasure(model, measured.x, 1)


def test_large_weights_are_not_mistaken_for_infinite_ones(measured):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
    model.register_parameter("large", nn.Parameter(torch.full((9,), 1e38)))
    assert not model.large.sum().isfinite()
    assert RelevanceMeasure(model, measured.x, 1).batch == 2


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.trace(build(), torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (scripted, ("the model", "TorchScript", "Python module that it was compiled from")),
        (lambda: nn.Sequential(scripted()), ("layer '0'", "TorchScript")),
        (lambda: torch.compile(build(), backend="eager"), ("the model", "torch.compile", "_orig_mod")),
    ],
)
def test_compiled_models_raise(measured, make, words):
    model = make()
    with measured.raises(ModelStateError, *words):
        RelevanceMeasure(model, measured.x, 1)


# -- training mode --------------------------------------------------------------------------------------------------


@error_cases(
    ("batch norm", lambda: through(nn.BatchNorm1d(4)), ModelStateError, "'inner' (BatchNorm1d)", "training", "eval()"),
    ("dropout", lambda: through(nn.Dropout(0.3)), ModelStateError, "'inner' (Dropout)", "p=0.3", "model.eval()"),
    ("alpha", lambda: through(nn.AlphaDropout(0.3)), ModelStateError, "(AlphaDropout)", "p=0.3", "model.eval()"),
    ("random relu", lambda: through(nn.RReLU()), ModelStateError, "'inner' (RReLU)", "random", "model.eval()"),
    ("depth", lambda: through(StochasticDepth(0.2, "row")), ModelStateError, "(StochasticDepth)", "p=0.2"),
    (
        "attention",
        lambda: Calls(lambda self, x: self.inner(x, x, x)[0], nn.MultiheadAttention(4, 2, dropout=0.1)),
        ModelStateError,
        "(MultiheadAttention)",
        "p=0.1",
    ),
    (
        "recurrent",
        lambda: Calls(lambda self, x: self.inner(x)[0], nn.LSTM(4, 4, num_layers=2, dropout=0.4)),
        ModelStateError,
        "(LSTM)",
        "p=0.4",
    ),
    (
        "dropout function",
        lambda: Calls(lambda self, x: functional.dropout(x, 0.3, self.training)),
        ModelStateError,
        "'dropout' in 'the model'",
        "training=True",
        "self.training",
    ),
    (
        "dropout function of torch",
        lambda: Calls(lambda self, x: torch.dropout(x, 0.3, self.training)),
        ModelStateError,
        "'dropout'",
        "training=True",
    ),
    (
        "rrelu function",
        lambda: Calls(lambda self, x: functional.rrelu(x, training=self.training)),
        ModelStateError,
        "'rrelu'",
    ),
    (
        "batch norm function",
        lambda: Calls(lambda self, x: functional.batch_norm(x, torch.zeros(4), torch.ones(4), training=self.training)),
        ModelStateError,
        "'batch_norm'",
        "mixes the samples",
    ),
)
def test_layers_that_are_random_or_mix_samples_in_training_mode_raise(measured, case, error, words):
    torch.manual_seed(0)
    model = case().train()
    with measured.raises(error, *words, model=model):
        RelevanceMeasure(model, measured.x, 1)


@pytest.mark.parametrize(
    "model",
    [
        through(nn.BatchNorm1d(4)),
        through(nn.Dropout(0.3)),
        through(StochasticDepth(0.2, "row")),
        Calls(lambda self, x: functional.dropout(x, 0.3, self.training)),
        Calls(lambda self, x: functional.rrelu(x, training=self.training)),
    ],
)
def test_the_same_layers_are_allowed_in_evaluation_mode(measured, model):
    mu = RelevanceMeasure(model.eval(), measured.x, 1)
    torch.testing.assert_close(mu(at("lin")) + mu.sink("lin"), torch.ones(2))


def test_dropout_of_zero_is_allowed_in_training_mode(measured):
    model = Calls(lambda self, x: functional.dropout(self.inner(x), 0.0, training=True), nn.Dropout(0.0)).train()
    assert RelevanceMeasure(model, measured.x, 1).batch == 2


def test_functional_dropout_that_ignores_the_mode_raises(measured):
    model = Calls(lambda self, x: functional.dropout(x)).eval()
    with measured.raises(ModelStateError, "'dropout'", "training=self.training", model=model):
        RelevanceMeasure(model, measured.x, 1)


def test_batch_norm_without_running_statistics_raises(measured):
    model = through(nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with measured.raises(ModelStateError, "'inner'", "no running statistics", "mixes the samples", model=model):
        RelevanceMeasure(model, measured.x, 1)


def test_a_model_with_hooks_of_a_composite_raises(measured):
    for rules in (EpsilonPlus(), Normalized(EpsilonPlus())):
        with rules.context(measured.net), pytest.raises(ModelStateError, match=r"'conv' .*outside .*composite="):
            RelevanceMeasure(measured.net, measured.x, 1)
    with measured.raises(UnknownLayerError, "'con'"):
        measured.mu.marginal("con")


def test_a_module_inside_a_wrapper_is_measured():
    class Wrapper:
        def __init__(self, module: nn.Module) -> None:
            self._module = module

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(2, 3)
    expected = RelevanceMeasure(net, x, 1).marginal("input")
    torch.testing.assert_close(RelevanceMeasure(Wrapper(net), x, 1).marginal("input"), expected)
    assert unwrapped(net) is net
    assert unwrapped(Wrapper) is Wrapper
