"""Invalid settings, composites and rules; the Captum classes raise the same errors as the measure.

Covers: nrm_plugin.recording.audit.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn
from zennit.composites import DeconvNet, EpsilonPlus, GuidedBackprop, LayerMapComposite, NameMapComposite
from zennit.core import BasicHook
from zennit.rules import Epsilon, Pass, ReLUDeconvNet, ReLUGuidedBackprop

from nrm_plugin import NRM, LayerNRM, Normalized, NRMAbsolute, RelevanceMeasure, at
from nrm_plugin.errors import (
    EventError,
    InputError,
    NonlinearRuleError,
    TargetError,
    UncoveredLayerError,
    UnknownLayerError,
    UnsupportedOperationError,
    UnsupportedRuleError,
)
from tests.error_cases import Calls, Halves, MeasuredNet, error_cases, through


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


@error_cases(
    ("class", {"composite": EpsilonPlus}, TypeError, "the class EpsilonPlus", "EpsilonPlus()"),
    ("name", {"composite": "epsilon_plus"}, TypeError, "'epsilon_plus'", "COMPOSITES['epsilon_plus']()"),
    ("rule", {"composite": Epsilon()}, TypeError, "the rule Epsilon", "LayerMapComposite(", "Epsilon()"),
    ("list", {"composite": [EpsilonPlus()]}, TypeError, "got list", "EpsilonPlusFlat()"),
    ("dict", {"composite": {}}, TypeError, "got dict", "maps layers to rules"),
    ("model", {"composite": nn.ReLU()}, TypeError, "got ReLU", "maps layers to rules"),
    ("residual", {"residual": "redistibute"}, ValueError, "'redistibute'", "'redistribute', 'sink'"),
    ("residual unhashable", {"residual": []}, ValueError, "residual=[]", "'redistribute', 'sink'"),
    ("gain below 1", {"gain_limit": 0.5}, ValueError, "gain_limit=0.5", "at least 1", "math.inf"),
    ("gain nan", {"gain_limit": math.nan}, ValueError, "gain_limit=nan", "at least 1"),
    ("gain word", {"gain_limit": "2"}, ValueError, "gain_limit='2'", "at least 1"),
    ("gain truth", {"gain_limit": True}, ValueError, "gain_limit=True", "number"),
    ("uncovered", {"uncovered": "ignore"}, ValueError, "uncovered='ignore'", "'error' or 'gradient'"),
    ("uncovered unhashable", {"uncovered": []}, ValueError, "uncovered=[]", "'error' or 'gradient'"),
)
def test_an_invalid_setting_raises(measured, case, error, words):
    for make in (
        lambda: RelevanceMeasure(measured.net, measured.x, 1, **case),
        lambda: NRM(measured.net, **case),
        lambda: LayerNRM(measured.net, "conv", **case),
        lambda: Normalized(**{"composite": EpsilonPlus(), **case}),
    ):
        with measured.raises(error, *words):
            make()


@pytest.mark.parametrize("setting", [{"residual": "sink"}, {"gain_limit": 3.0}, {"uncovered": "gradient"}])
def test_settings_in_addition_to_a_normalized_composite_raise(measured, setting):
    (name,) = setting
    rules = Normalized(EpsilonPlus())
    for make in (
        lambda: RelevanceMeasure(measured.net, measured.x, 1, composite=rules, **setting),
        lambda: NRM(measured.net, composite=rules, **setting),
    ):
        with measured.raises(TypeError, "has its own settings", name, f"Normalized(composite, {name}="):
            make()


def test_invalid_arguments_of_normalized_raise(measured):
    with measured.raises(TypeError, "already Normalized", "Normalized(composite.composite, …)"):
        Normalized(Normalized(EpsilonPlus()))
    with measured.raises(TypeError, "got NoneType", "EpsilonPlusFlat()"):
        Normalized(None)
    with measured.raises(ValueError, "sums='relative'", "'absolute', 'ratio' or 'signed'"):
        Normalized(EpsilonPlus(), sums="relative")


def test_a_gain_limit_from_numpy_is_accepted(measured):
    rules = Normalized(EpsilonPlus(), gain_limit=np.float32(2))
    relevance = RelevanceMeasure(measured.net, measured.x, 1, composite=rules).marginal("input")
    expected = RelevanceMeasure(measured.net, measured.x, 1, composite=EpsilonPlus(), gain_limit=2).marginal("input")
    torch.testing.assert_close(relevance, expected)


# -- rules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (DeconvNet(), "ReLUDeconvNet"),
        (GuidedBackprop(), "ReLUGuidedBackprop"),
        (LayerMapComposite([(nn.Linear, Epsilon()), (nn.ReLU, ReLUDeconvNet())]), "ReLUDeconvNet"),
        (NRMAbsolute(layer_map=[(nn.ReLU, ReLUGuidedBackprop())]), "ReLUGuidedBackprop"),
    ],
)
def test_nonlinear_rules_raise_and_are_named(measured, rules, name):
    words = name, "layer 'relu'", "not linear", "Choose a composite whose rules are linear"
    with measured.raises(NonlinearRuleError, *words):
        RelevanceMeasure(measured.net, measured.x, 1, composite=rules, uncovered="gradient")
    with measured.raises(NonlinearRuleError, *words):
        NRM(measured.net, composite=rules, uncovered="gradient").attribute(measured.x, target=1)
    rules = Normalized(rules, uncovered="gradient")
    for _ in range(2):  # the second time, too
        with measured.raises(NonlinearRuleError, *words), rules.context(measured.net):
            measured.net(measured.x.clone().requires_grad_())


def test_a_nonlinear_user_defined_rule_raises(measured):
    rule = BasicHook(
        input_modifiers=[lambda x: x],
        param_modifiers=[lambda parameter, name: parameter],
        output_modifiers=[lambda x: x],
        gradient_mapper=lambda R, outputs: R.clamp(min=0),
        reducer=lambda inputs, gradients: inputs[0] * gradients[0],
    )
    with measured.raises(NonlinearRuleError, "BasicHook", "layer 'lin'"):
        RelevanceMeasure(measured.net, measured.x, 1, composite=NRMAbsolute(layer_map=[(nn.Linear, rule)]))


def test_a_rule_that_cannot_be_read_as_a_kernel_raises(measured):
    class Early(Epsilon):
        def pre_forward(self, module, input):
            return super().pre_forward(module, input)

    rules = NRMAbsolute(layer_map=[(nn.Conv2d, Early())])
    with measured.raises(UnsupportedRuleError, "Early", "'conv'", "forward hooks", "`forward` and `backward` only"):
        RelevanceMeasure(measured.net, measured.x, 1, composite=rules)
    with measured.raises(UnsupportedRuleError, "'conv'", "Pass", "(2, 1, 4, 4)", "(2, 3, 4, 4)", "Assign it a rule"):
        RelevanceMeasure(measured.net, measured.x, 1, composite=NRMAbsolute(layer_map=[(nn.Conv2d, Pass())])).sinks()


@pytest.mark.medium
def test_a_layer_without_a_rule_raises_unless_its_gradient_is_requested(measured):
    model = through(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))).eval()
    rules = NameMapComposite([(["lin", "inner.2"], Epsilon()), (["inner.1"], Pass())])
    words = "layer 'inner.0' (Linear", "no rule", "layer_map", "uncovered='gradient'"
    with measured.raises(UncoveredLayerError, *words, model=model):
        RelevanceMeasure(model, measured.x, 1, composite=rules)
    with measured.raises(UncoveredLayerError, *words, model=model):
        RelevanceMeasure(model, measured.x, 1, composite=Normalized(rules))
    for mu in (
        RelevanceMeasure(model, measured.x, 1, composite=rules, uncovered="gradient"),
        RelevanceMeasure(model, measured.x, 1, composite=Normalized(rules, uncovered="gradient")),
    ):
        assert mu.sinks()["inner.0"].abs().min() > 0
        for layer in mu.layers:
            total = mu.marginal(layer).flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer)
            torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=1e-5)


def test_a_rule_on_a_layer_with_several_outputs_raises(measured):
    model = Calls(lambda self, x: torch.cat(self.inner(x), 1), Halves()).eval()
    rules = NRMAbsolute(layer_map=[(Halves, Epsilon())])
    with measured.raises(UnsupportedRuleError, "'inner' (Halves)", "Epsilon", "returns tuple", "wrap it", model=model):
        RelevanceMeasure(model, measured.x, 1, composite=rules)


def test_an_operation_without_a_kernel_raises_once_relevance_reaches_it(measured):
    model = Calls(lambda self, x: torch.special.entr(x.abs() + 0.1)).eval()
    mu = RelevanceMeasure(model, measured.x, 1)
    with measured.raises(UnsupportedOperationError, "'entr'", "register_kernel", "test_setting_errors.py", model=model):
        mu.marginal("input")


A = at("conv")[0]


# -- Captum classes -----------------------------------------------------------------------------------------------


@error_cases(
    ("unknown", lambda net, x: LayerNRM(net, "con").attribute(x, target=1), UnknownLayerError, "'con'", "'conv'"),
    ("another", lambda net, x: LayerNRM(net, nn.ReLU()).attribute(x, target=1), UnknownLayerError, "ReLU"),
    ("number", lambda net, x: LayerNRM(net, 3).attribute(x, target=1), EventError, "a name", "got int: 3"),
    ("nested", lambda net, x: LayerNRM(net, [("conv", "pool")]).attribute(x, target=1), EventError, "in a list"),
    ("reused", lambda net, x: LayerNRM(net, net.lin).attribute(x, target=1), UnknownLayerError, "2 times", "call="),
    ("no target", lambda net, x: NRM(net).attribute(x), TargetError, "target=", "5 entries"),
    ("unit", lambda net, x: NRM(net).attribute(x, target=1, unit="%"), ValueError, "unit='%'", "'output' or 'measure'"),
    ("nan", lambda net, x: NRM(net).attribute(x * math.nan, target=1), InputError, "nan or inf", "samples 0, 1"),
    ("function", lambda net, x: NRM(net.forward), InputError, "torch.nn.Module", "method"),
    ("both", lambda net, x: NRM(net).attribute(x, 1, given=A, joint=A), TypeError, "not both"),
    ("event", lambda net, x: NRM(net).attribute(x, 1, given="conv"), EventError, "expected an event", "got str"),
)
def test_captum_classes_raise_the_same_errors(measured, case, error, words):
    with measured.raises(error, *words):
        case(measured.net, measured.x)
