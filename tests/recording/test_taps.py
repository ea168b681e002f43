"""Queries for layers, calls, tensors and sides of layers that a measure does not have.

Covers: nrm_plugin.measure.layer_taps.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zennit.composites import NameMapComposite
from zennit.rules import Epsilon, Pass

from nrm_plugin import RelevanceMeasure, at
from nrm_plugin.errors import EventError, HookedContainerError, UnknownLayerError
from tests.error_cases import MeasuredNet, build, error_cases


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


@error_cases(
    ("near", lambda mu: mu.marginal("con"), UnknownLayerError, "'con'", "Near names: 'conv'", "measure.layers"),
    ("near call", lambda mu: mu.marginal("block.3"), UnknownLayerError, "'block.3'", "'block.0'", "'block.1'"),
    ("far", lambda mu: mu.sink("zzzzz"), UnknownLayerError, "'zzzzz'", "'input', 'conv'", "measure.layers"),
    ("empty", lambda mu: mu.bypass(""), UnknownLayerError, "''", "measure.layers"),
    ("never called", lambda mu: mu.marginal("unused"), UnknownLayerError, "'unused'", "never called has no tap"),
    ("in an event", lambda mu: mu(at("conv")[1] & ~at("bloc")), UnknownLayerError, "'bloc'", "'block'"),
    ("in a condition", lambda mu: mu(at("conv"), given=at("pol")), UnknownLayerError, "'pol'", "'pool'"),
    ("in a list", lambda mu: mu.marginal(["conv", "pol"]), UnknownLayerError, "'pol'", "'pool'"),
    ("in a joint map", lambda mu: mu.marginal("conv", joint=at("pol")), UnknownLayerError, "'pol'", "'pool'"),
    ("in explain", lambda mu: mu.explain(at("pol")), UnknownLayerError, "'pol'", "'pool'"),
    ("in joint", lambda mu: mu.joint("head", "pol"), UnknownLayerError, "'pol'", "'pool'"),
    ("its shape", lambda mu: mu.shape("pol"), UnknownLayerError, "'pol'", "'pool'"),
    ("another model's", lambda mu: mu.marginal(build().head), UnknownLayerError, "Linear", "not a module of the"),
    ("its event", lambda mu: mu(at(build().conv)[0]), UnknownLayerError, "Conv2d", "model.modules()", "or its name"),
    ("number", lambda mu: mu.marginal(3), EventError, "a name", "or a module", "got int: 3. In quotes", "'3'"),
    ("none", lambda mu: mu.variation(None), EventError, "a name", "got NoneType"),
    ("dict", lambda mu: mu.marginal([{}]), EventError, "a name", "got dict"),
    ("tuple", lambda mu: mu.marginal(("conv", "pool")), EventError, "('conv', 'pool')", "in a list"),
    ("list", lambda mu: mu.sink(["conv"]), EventError, "one layer is needed", "['conv']"),
    ("at list", lambda mu: at(["conv"]), EventError, "a name", "got list: ['conv']"),
    ("indexed", lambda mu: mu.marginal(at("conv")[0]), EventError, "at('conv')[0] is an event", "or joint="),
    ("formula", lambda mu: mu.marginal(~at("conv")), EventError, "~at('conv') is an event", "joint="),
    ("sink side", lambda mu: mu.marginal(at("conv", side="sink")), EventError, "is not one tap", "Ask mu("),
    ("taps of a sink", lambda mu: mu.taps_of("conv", "sink"), EventError, "not a tap", "Ask mu("),
    ("taps of a number", lambda mu: mu.taps_of(3), EventError, "a name", "got int"),
    ("side", lambda mu: at("conv", side="up"), EventError, "side='up'", "'input', 'output', 'sink'"),
    ("side of taps", lambda mu: mu.taps_of("conv", "up"), EventError, "side='up'", "'input', 'output', 'sink'"),
    ("reused", lambda mu: mu.marginal("lin"), UnknownLayerError, "'lin' was called 2 times", "call=0", "'any'"),
    ("no such call", lambda mu: mu(at("lin", call=2)), UnknownLayerError, "'lin' has no call 2", "[0, 1]"),
    ("no such call by name", lambda mu: mu.marginal("lin:5"), UnknownLayerError, "'lin' has no call 5", "[0, 1]"),
    ("negative call", lambda mu: mu(at("lin", call=-1)), UnknownLayerError, "no call -1", "[0, 1]"),
    ("call by word", lambda mu: at("lin", call="each"), EventError, "call='each'", "number of the call", "'any'"),
    ("call by truth", lambda mu: at("lin", call=True), EventError, "call=True", "number of the call"),
    ("any call", lambda mu: mu.marginal(at("lin", call="any")), EventError, "call='any'", "not one tap", "Ask mu("),
    ("items", lambda mu: mu.marginal("halves"), UnknownLayerError, "'halves' has 2 tensors", "item=", "0, 1"),
    ("no such item", lambda mu: mu(at("halves", item=2)), UnknownLayerError, "2 tensors", "0, 1", "got 2"),
    ("item of one", lambda mu: mu(at("conv", item=1)), UnknownLayerError, "'conv' is one tensor", "omit item="),
    ("item unhashable", lambda mu: at("halves", item=[0]), EventError, "item=[0]", "number or key"),
    ("sink of a route", lambda mu: mu(at("flat", side="sink")), UnknownLayerError, "only routes", "steps are 'head'"),
    ("sink of none", lambda mu: mu(at("pol", side="sink")), UnknownLayerError, "'pol'", "'pool'"),
    ("sink of a call", lambda mu: mu(at("pool", side="sink", call=4)), UnknownLayerError, "no call 4", "[0]"),
    ("sink of calls", lambda mu: mu(at("lin", side="sink")), UnknownLayerError, "called 2 times", "call=0", "'any'"),
)
def test_a_query_for_an_invalid_layer_raises(measured, case, error, words):
    with measured.raises(error, *words):
        case(measured.mu)


@pytest.mark.parametrize(
    "query",
    [
        lambda mu: mu.marginal("block.0"),
        lambda mu: mu(at("block.1")[2]),
        lambda mu: mu(at("block.0", side="input")),
        lambda mu: mu.marginal("input", joint=at("block.0")),
        lambda mu: mu(at("block.0", side="sink")),
    ],
)
def test_taps_inside_a_container_with_a_rule_raise(measured, query):
    rules = NameMapComposite([(["block", "conv", "lin", "head", "pool"], Epsilon()), (["relu"], Pass())])
    mu = RelevanceMeasure(measured.net, measured.x, 1, composite=rules)
    torch.testing.assert_close(mu(at("block")) + mu.sink("block") + mu.bypass("block"), torch.ones(2))
    with measured.raises(HookedContainerError, "lies inside 'block'", "one rule", "input or output", "modules inside"):
        query(mu)


def test_events_on_layers_of_another_model_raise(measured):
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 5)).eval()
    mu = RelevanceMeasure(other, measured.x, 1)
    assert mu(at("1")[2]).shape == (2,)
    with measured.raises(UnknownLayerError, "no tap named '1'", "measure.layers"):
        measured.mu(at("1")[2])
    with measured.raises(UnknownLayerError, "Linear is not a module of the measured model", model=other):
        measured.mu(at(other[1])[2])
    with measured.raises(UnknownLayerError, "no tap named 'conv'", "'input', '0'", model=other):
        mu(at("conv")[2])
    with measured.raises(EventError, "at('input')[0, 4]", "(1, 4, 4)", model=other):
        mu(at("input")[0, 4])
