"""Bad input is refused by an error that says what, got, why and what to do, and changes nothing."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torchvision.ops import StochasticDepth
from zennit.composites import DeconvNet, EpsilonPlus, GuidedBackprop, LayerMapComposite, NameMapComposite
from zennit.core import BasicHook
from zennit.rules import Epsilon, Pass, ReLUDeconvNet, ReLUGuidedBackprop

from nrm_plugin import ABSORBED, NRM, LayerNRM, Normalized, NRMAbsolute, RelevanceMeasure, at, coverage
from nrm_plugin.errors import (
    CancellationError,
    EventError,
    GradModeError,
    HookedContainerError,
    InputError,
    ModelStateError,
    NonlinearRuleError,
    NRMError,
    NullEventError,
    TargetError,
    UncoveredLayerError,
    UnknownLayerError,
    UnsupportedOperationError,
    UnsupportedRuleError,
)
from tests.conftest import untouched


class Halves(nn.Module):
    def forward(self, x):
        return x[:, :6], x[:, 6:]


class Net(nn.Module):
    """Image to five scores; ``lin`` is called twice, ``halves`` returns a tuple, ``unused`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        self.flat, self.lin, self.halves = nn.Flatten(), nn.Linear(12, 12), Halves()
        self.block = nn.Sequential(nn.Linear(12, 4), nn.ReLU())
        self.head, self.unused = nn.Linear(4, 5), nn.Linear(1, 1)

    def forward(self, x):
        x = self.flat(self.pool(self.relu(self.conv(x))))
        x = self.relu(self.lin(self.relu(self.lin(x))))
        return self.head(self.block(torch.cat(self.halves(x), 1)))


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def answers(mu):
    event = at("conv")[1] | ~at("block")[2]
    return [*mu.marginal(mu.layers).values(), mu(event), mu(event, given=at("pool"), min_ratio=0), mu.sink("input")]


class Before:
    """A model, its input, and a measure that was there before, with what it answered."""

    def __init__(self) -> None:
        self.net = build()
        self.x = torch.randn((2, 1, 4, 4), generator=torch.Generator().manual_seed(1))
        self.mu = RelevanceMeasure(self.net, self.x, 1)
        self.expected = answers(self.mu)

    @contextmanager
    def refuses(self, error, *words, model=None):
        """The body raises exactly this error, its message holds these words, and nothing changes."""
        other = self.net if model is None else model
        with untouched(self.net, self.x), untouched(other), pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        assert type(caught.value) is error, repr(caught.value)
        missing = [word for word in words if word not in message]
        assert not missing, f"{missing} not in: {message}"
        assert len(message) < 700, "a message is read, not scrolled"
        for old, new in zip(self.expected, answers(self.mu), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0)
        assert not torch.overrides._get_current_function_mode_stack()


@pytest.fixture(scope="module")
def before():
    return Before()


def refuse(*cases):
    """Cases ``(name, ask, error, *words)``."""
    names = [case[0] for case in cases]
    assert len(set(names)) == len(names)
    return pytest.mark.parametrize(
        ("ask", "error", "words"), [pytest.param(ask, error, words, id=name) for name, ask, error, *words in cases]
    )


def mask(*shape):
    return torch.ones(shape, dtype=torch.bool)


# -- layers -------------------------------------------------------------------------------------------------------


@refuse(
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
def test_a_layer_that_is_none_is_refused(before, ask, error, words):
    with before.refuses(error, *words):
        ask(before.mu)


@pytest.mark.parametrize(
    "ask",
    [
        lambda mu: mu.marginal("block.0"),
        lambda mu: mu(at("block.1")[2]),
        lambda mu: mu(at("block.0", side="input")),
        lambda mu: mu.marginal("input", joint=at("block.0")),
        lambda mu: mu(at("block.0", side="sink")),
    ],
)
def test_a_tap_inside_a_container_with_a_rule_is_refused(before, ask):
    rules = NameMapComposite([(["block", "conv", "lin", "head", "pool"], Epsilon()), (["relu"], Pass())])
    mu = RelevanceMeasure(before.net, before.x, 1, composite=rules)
    torch.testing.assert_close(mu(at("block")) + mu.sink("block") + mu.bypass("block"), torch.ones(2))
    with before.refuses(HookedContainerError, "lies inside 'block'", "one rule", "input or output", "modules inside"):
        ask(mu)


def test_an_event_of_another_measures_layers_is_refused(before):
    other = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 5)).eval()
    mu = RelevanceMeasure(other, before.x, 1)
    assert mu(at("1")[2]).shape == (2,)
    with before.refuses(UnknownLayerError, "no tap named '1'", "measure.layers"):
        before.mu(at("1")[2])
    with before.refuses(UnknownLayerError, "Linear is not a module of the measured model", model=other):
        before.mu(at(other[1])[2])
    with before.refuses(UnknownLayerError, "no tap named 'conv'", "'input', '0'", model=other):
        mu(at("conv")[2])
    with before.refuses(EventError, "at('input')[0, 4]", "(1, 4, 4)", model=other):
        mu(at("input")[0, 4])


# -- indices ------------------------------------------------------------------------------------------------------

KINDS = "neurons are indexed by ints, slices, lists and tuples of them, integer tensors or boolean masks"


@refuse(
    ("range", lambda: at("conv")[3], EventError, "at('conv')[3]", "(3, 4, 4)", "batch is not indexed"),
    ("below range", lambda: at("conv")[-4], EventError, "at('conv')[-4]", "(3, 4, 4)", "batch is not indexed"),
    ("inner range", lambda: at("conv")[0, 4], EventError, "at('conv')[0, 4]", "(3, 4, 4)"),
    ("range in a list", lambda: at("conv")[[0, 9]], EventError, "at('conv')[[0, 9]]", "index 9", "(3, 4, 4)"),
    ("range of a tensor", lambda: at("conv")[torch.tensor([9])], EventError, "[[9]]", "index 9", "(3, 4, 4)"),
    ("range of a sink", lambda: at("pool", side="sink")[9], EventError, "side='sink')[9]", "(3, 2, 2)"),
    ("range of an input", lambda: at("pool", side="input")[9], EventError, "side='input')[9]", "(3, 4, 4)"),
    ("range of an item", lambda: at("halves", item=1)[6], EventError, "item=1)[6]", "(6,)"),
    ("range of a call", lambda: at("lin", call="any")[12], EventError, "(12,)"),
    ("range under not", lambda: ~at("conv")[3], EventError, "at('conv')[3]", "(3, 4, 4)"),
    ("huge", lambda: at("conv")[10**30], EventError, "at('conv')[1000", "(3, 4, 4)"),
    ("too many", lambda: at("conv")[0, 0, 0, 0], EventError, "at('conv')[0, 0, 0, 0]", "(3, 4, 4)", "too many"),
    ("channel range", lambda: at("conv").channel(3), EventError, "at('conv').channel(3)", "(3,)"),
    ("channel tuple", lambda: at("conv").channel((1, 2)), EventError, "channel(1, 2)", "(3,)"),
    ("channel mask", lambda: at("conv").channel(mask(4)), EventError, "channel(mask of 4 in (4,))", "(3,)"),
    ("mask of another N", lambda: at("conv")[mask(3, 3, 4, 4)], EventError, "(3, 3, 4, 4)", "2 samples (2, 3, 4, 4)"),
    ("mask of N = 1", lambda: at("conv")[mask(1, 3, 4, 4)], EventError, "(1, 3, 4, 4)", "2 samples (2, 3, 4, 4)"),
    ("mask without channels", lambda: at("conv")[mask(4, 4)], EventError, "(4, 4) does not fit", "(3, 4, 4)"),
    ("mask of channels", lambda: at("conv")[mask(3)], EventError, "(3,) does not fit", ".channel(mask)"),
    ("list as mask", lambda: at("conv")[[True, False]], EventError, "mask of 1 in (2,)", "(3, 4, 4)"),
    ("mask of the output", lambda: at("conv")[mask(2, 5)], EventError, "(2, 5) does not fit", "(3, 4, 4)"),
    ("mask of one", lambda: at("conv")[torch.tensor(True)], EventError, "at('conv')[True]", "one for each neuron"),
    ("true", lambda: at("conv")[True], EventError, "at('conv')[True]", KINDS, "Got bool"),
    ("float mask", lambda: at("conv")[torch.ones(3, 4, 4)], EventError, "float32", "(3, 4, 4)", "values > threshold"),
    ("byte mask", lambda: at("conv")[mask(3, 4, 4).byte()], EventError, "uint8", "mask.bool()", "index.long()"),
    ("bfloat", lambda: at("conv")[torch.ones(3).bfloat16()], EventError, "bfloat16", "values > threshold"),
    ("complex", lambda: at("conv")[torch.tensor([1j])], EventError, "complex64", KINDS),
    ("float array", lambda: at("conv")[np.ones(2)], EventError, "float64", "values > threshold"),
    ("words in an array", lambda: at("conv")[np.array(["a"])], EventError, "array(['a']", KINDS),
    ("no values", lambda: at("conv")[mask(3, 4, 4).to("meta")], EventError, KINDS, "no data"),
    ("float", lambda: at("conv")[0.5], EventError, "at('conv')[0.5]", KINDS, "Got float"),
    ("float in a tuple", lambda: at("conv")[0, 0.5], EventError, "[0.5]", KINDS, "Got float"),
    ("floats in a list", lambda: at("conv")[[0.0, 1.7]], EventError, "at('conv')", KINDS, "list of float32"),
    ("word", lambda: at("conv")["a"], EventError, "at('conv')['a']", KINDS, "Got str"),
    ("none", lambda: at("conv")[None], EventError, "at('conv')[None]", KINDS, "Got NoneType"),
    ("dict", lambda: at("conv")[{}], EventError, "at('conv')[{}]", KINDS, "Got dict"),
    ("set", lambda: at("conv")[{1}], EventError, "at('conv')[{1}]", KINDS, "Got set"),
    ("event", lambda: at("conv")[at("pool")], EventError, "at('conv')[at('pool')]", KINDS),
    ("words in a list", lambda: at("conv")[["a"]], EventError, "at('conv')[['a']]", KINDS),
    ("none in a list", lambda: at("conv")[[None]], EventError, "at('conv')[[None]]", KINDS),
    ("ragged", lambda: at("conv")[[[0, 1], [1]]], EventError, "[[0, 1], [1]]", KINDS),
    ("numbers and truth", lambda: at("conv")[[True, 2]], EventError, "[True, 2]", "either indices", "not both"),
    ("backwards", lambda: at("conv")[::-1], EventError, "at('conv')[::-1]", "positive step"),
    ("slice of words", lambda: at("conv")["a":"b"], EventError, "at('conv')[a:b]", "integers"),
    ("slice of floats", lambda: at("conv")[0.0:2.0], EventError, "at('conv')[0.0:2.0]", "integers"),
    ("two ellipses", lambda: at("conv")[..., ..., 0], EventError, "at('conv')", "at most one `...`"),
    ("indexed twice", lambda: at("conv")[1][2], EventError, "at('conv')[1] is indexed already", "with & or |"),
)
def test_an_index_that_does_not_fit_is_refused(before, ask, error, words):
    with before.refuses(error, *words):
        before.mu(ask())


def test_an_index_that_does_not_fit_is_refused_in_every_query(before):
    wrong = at("conv")[3]
    for ask in (
        lambda mu: mu([at("pool"), wrong]),
        lambda mu: mu(at("pool"), given=wrong),
        lambda mu: mu.marginal("pool", joint=wrong),
        lambda mu: mu.marginal("pool", given=[at("pool"), wrong]),
        lambda mu: mu.conditional(wrong, "head"),
        lambda mu: mu.explain(at("pool"), given=wrong),
    ):
        with before.refuses(EventError, "at('conv')[3]", "(3, 4, 4)"):
            ask(before.mu)


@pytest.mark.parametrize(
    ("index", "same"),
    [
        (np.int64(1), 1),
        (torch.tensor(1), 1),
        (range(2), slice(2)),
        ([0, 1], slice(0, 2)),
        (torch.tensor([0, 1], dtype=torch.int32), slice(2)),
        (np.array([True, False, True])[:, None, None] & np.ones((3, 4, 4), bool), [0, 2]),
        (mask(3, 4, 4).to_sparse(), ...),
        (mask(3, 4, 4).mT.contiguous().mT, ...),
        ((slice(np.int64(0), 2), ...), slice(2)),
        (slice(7, 9), []),
    ],
)
def test_what_numpy_and_torch_give_as_indices_is_understood(before, index, same):
    torch.testing.assert_close(before.mu(at("conv")[index]), before.mu(at("conv")[same]), rtol=0, atol=0)


def test_an_event_keeps_the_mask_it_was_made_of(before):
    own = mask(3, 4, 4)
    event = at("conv")[own]
    own[:] = False
    torch.testing.assert_close(before.mu(event), before.mu(at("conv")))


@pytest.mark.parametrize("index", [[], mask(3, 4, 4) & False, mask(2, 3, 4, 4) & False, slice(0, 0), np.empty(0, int)])
def test_an_empty_mask_is_no_error_and_has_no_mass(before, index):
    mu, empty = before.mu, at("conv")[index]
    zeros, ones = torch.zeros(2), torch.ones(2)
    with untouched(before.net, before.x):
        assert torch.equal(mu(empty), zeros)
        assert torch.equal(mu(empty & at("pool")), zeros)
        torch.testing.assert_close(mu(~empty), ones)
        torch.testing.assert_close(mu(empty | at("pool")), mu(at("pool")))
        assert torch.equal(mu(empty, given=at("pool"), min_ratio=0), zeros)
        assert not mu.marginal("input", joint=empty).any()
        assert not mu.marginal("head", joint=empty).any()
        assert not mu.conditional(empty, "head").any()
        assert "conv" in mu.explain(empty)
    with before.refuses(NullEventError, "no walk with nonzero mass", "samples 0, 1"):
        mu(at("pool"), given=empty)


# -- events -------------------------------------------------------------------------------------------------------

A = at("conv")[0]


@refuse(
    ("bool", lambda mu: bool(A), TypeError, "no truth value", "`a & b`, `a | b`, `~a`"),
    ("and", lambda mu: A and at("pool"), TypeError, "no truth value", "`a & b`"),
    ("or", lambda mu: A or at("pool"), TypeError, "no truth value", "`a | b`"),
    ("not", lambda mu: not A, TypeError, "no truth value", "`~a`"),
    ("if", lambda mu: 1 if A & at("pool") else 0, TypeError, "no truth value"),
    ("absorbed", lambda mu: ABSORBED and A, TypeError, "no truth value"),
    ("in", lambda mu: 3 in at("conv"), TypeError, "not iterable"),
    ("iteration", lambda mu: list(at("conv")), TypeError, "at('conv') is an event", "[at(layer)[k] for k in"),
    ("unpacking", lambda mu: mu(*at("conv")), TypeError, "at('conv') is an event"),
    ("and a name", lambda mu: A & "pool", TypeError, "`&` joins two events", "and str", "`at(layer)`"),
    ("and a mask", lambda mu: A & mask(3), TypeError, "`&` joins two events", "and Tensor", "`at(layer)[mask]`"),
    ("a mask and", lambda mu: mask(3) & A, TypeError, "`&` joins two events", "and Tensor", "`at(layer)[mask]`"),
    ("or none", lambda mu: A | None, TypeError, "`|` joins two events", "and NoneType"),
    ("none or", lambda mu: None | A, TypeError, "`|` joins two events", "and NoneType"),
    ("minus a number", lambda mu: A - 1, TypeError, "`-` joins two events", "and int"),
    ("one minus", lambda mu: 1 - A, TypeError, "`-` joins two events", "and int"),
    ("a name", lambda mu: mu("conv"), EventError, "expected an event such as at('layer')[3]", "got str"),
    ("none", lambda mu: mu(None), EventError, "expected an event", "got NoneType"),
    ("number", lambda mu: mu(3), EventError, "expected an event", "got int"),
    ("tensor", lambda mu: mu(mask(3)), EventError, "expected an event", "got Tensor"),
    ("list of names", lambda mu: mu([A, "conv"]), EventError, "expected an event", "got str: 'conv'"),
    ("list with a name, given", lambda mu: mu(["conv"], given=A), EventError, "expected an event", "got str: 'conv'"),
    ("list of lists", lambda mu: mu([[A]]), EventError, "expected an event", "got list: [at('conv')[0]]"),
    ("given a name", lambda mu: mu(A, given="conv"), EventError, "got str: 'conv'", "given= takes one event"),
    ("given a list", lambda mu: mu(A, given=[A]), EventError, "got list", "given= takes one event"),
    ("map of a name", lambda mu: mu.marginal("conv", joint="pool"), EventError, "expected an event", "got str"),
    ("map given a mask", lambda mu: mu.marginal("conv", given=mask(3)), EventError, "expected an event", "Tensor"),
    ("conditional name", lambda mu: mu.conditional("conv", "head"), EventError, "expected an event", "'conv'"),
    ("conditional list", lambda mu: mu.conditional([A], "head"), EventError, "expected an event", "got list"),
    ("swapped", lambda mu: mu.conditional("head", A), EventError, "at('conv')[0] is an event", "a layer is needed"),
    ("conditional above", lambda mu: mu.conditional(at("head")[0], "conv"), EventError, "not below 'conv'", "given="),
    ("conditional same", lambda mu: mu.conditional(A, "conv"), EventError, "not below 'conv'", "marginal(layer"),
    ("conditional of an atom", lambda mu: mu.conditional(A, at("conv")), EventError, "not below 'conv'"),
    ("joint upwards", lambda mu: mu.joint("conv", "head"), EventError, "'head' is not below 'conv'", "upper tap"),
    ("joint with itself", lambda mu: mu.joint("conv", "conv"), EventError, "not below", "upper tap to a lower"),
    ("joint of lists", lambda mu: mu.joint(["head"], "conv"), EventError, "one layer is needed", "['head']"),
    ("explain a name", lambda mu: mu.explain("conv"), EventError, "expected an event", "got str: 'conv'"),
    ("explain given", lambda mu: mu.explain(A, given="conv"), EventError, "got str: 'conv'", "given="),
    ("given and joint", lambda mu: mu.marginal("conv", given=A, joint=A), TypeError, "not both", "joint=A & B"),
    ("over pixels", lambda mu: mu.marginal("conv", over="pixels"), ValueError, "over='pixels'", "'channel'"),
    ("over a list", lambda mu: mu.marginal("conv", over=["channel"]), ValueError, "over=['channel']", "'channel'"),
    ("joint over", lambda mu: mu.joint("head", "conv", over="pixel"), ValueError, "'pixel'", "'channel'", "'neuron'"),
    ("kind", lambda mu: mu.sink("conv", kind="x"), ValueError, "kind='x'", "'residual' or 'constants'"),
    ("kind of sinks", lambda mu: mu.sinks("constant"), ValueError, "kind='constant'", "'residual' or 'constants'"),
    ("kind unhashable", lambda mu: mu.sinks(["x"]), ValueError, "kind=['x']", "'residual' or 'constants'"),
    ("ratio nan", lambda mu: mu(A, given=A, min_ratio=math.nan), ValueError, "min_ratio=nan", "at least 0"),
    ("ratio below 0", lambda mu: mu(A, given=A, min_ratio=-1), ValueError, "min_ratio=-1", "at least 0"),
    ("ratio word", lambda mu: mu.marginal("conv", given=A, min_ratio="a"), ValueError, "min_ratio='a'", "at least 0"),
)
def test_a_question_that_makes_no_sense_is_refused(before, ask, error, words):
    with before.refuses(error, *words):
        ask(before.mu)


def test_an_empty_list_is_answered_by_an_empty_one(before):
    assert before.mu([]).shape == (0, 2)
    assert before.mu([], given=A).shape == (0, 2)
    assert before.mu.marginal([]) == {}
    assert before.mu.marginal("conv", joint=[]).shape == (0, 2, 3, 4, 4)
    assert before.mu.marginal("conv", "channel", given=[]).shape == (0, 2, 3)


@pytest.mark.parametrize(
    "event",
    [A, ~A, A & at("pool"), A | at("pool"), ABSORBED, A.index, at("conv").head(1)],
    ids=lambda e: type(e).__name__,
)
def test_an_event_cannot_be_changed(event):
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.other = None
    assert event in {event}


# -- conditions ---------------------------------------------------------------------------------------------------


@pytest.fixture
def signed():
    """LRP-0 on the sum of three inputs, so that each input is its own relevance, unnormalized.

    Given the first two inputs: sample 0 cancels exactly, sample 1 is fine, sample 2 cancels nearly, sample 3 is dead.
    """
    net = nn.Sequential(nn.Linear(3, 1, bias=False)).double().eval()
    nn.init.ones_(net[0].weight)
    x = torch.tensor([[1, -1, 1], [1, 1, 1], [1, -1 + 1e-11, 2], [0, 0, 1]], dtype=torch.float64)
    rules = LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-14))])
    return net, x, RelevanceMeasure(net, x, composite=rules)


def test_conditioning_on_what_has_no_mass_names_the_samples(before, signed):
    net, _, mu = signed
    first = at("input")[[0, 1]]
    for ask in (
        lambda: mu(at("0"), given=first),
        lambda: mu([at("0"), first], given=first),
        lambda: mu.marginal("input", given=first),
        lambda: mu.marginal("input", given=[at("0"), first]),
    ):
        with before.refuses(
            NullEventError, "at('input')[[0, 1]]", "no walk with nonzero mass", "(sample 3)", "mu(", model=net
        ):
            ask()
    rows = mask(4, 3)
    rows[1:3] = False
    with before.refuses(NullEventError, "mask of 6 in (4, 3)", "(samples 1, 2)", model=net):
        mu(at("0"), given=at("input")[rows])


def test_conditioning_on_what_cancels_is_another_error(before, signed):
    net, x, _ = signed
    rules = LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-14))])
    mu = RelevanceMeasure(net, x[:3], composite=rules)
    first = at("input")[[0, 1]]
    words = "at('input')[[0, 1]]", "mass is", "variation is 2", "cancel", "(samples 0, 2)", "min_ratio=0"
    for ask in (lambda: mu(at("0"), given=first), lambda: mu.marginal("input", given=first)):
        with before.refuses(CancellationError, *words, model=net):
            ask()
    with before.refuses(CancellationError, "(sample 0)", "mass is 0", "smaller event", model=net):
        mu(at("0"), given=first, min_ratio=0)
    near = RelevanceMeasure(net, x[1:3], composite=rules)
    divided = near(at("input")[0], given=first, min_ratio=0)
    torch.testing.assert_close(divided, torch.tensor([0.5, 1e11], dtype=torch.float64), rtol=1e-4, atol=0)
    assert torch.equal(near(first, given=first, min_ratio=1e-13), torch.ones(2, dtype=torch.float64))


def test_nothing_is_advised_that_was_tried_already(signed):
    net, x, _ = signed
    mu = RelevanceMeasure(net, x[:1], composite=LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-14))]))
    with pytest.raises(CancellationError) as caught:
        mu(at("0"), given=at("input")[[0, 1]], min_ratio=0)
    assert "min_ratio" not in str(caught.value)


# -- inputs -------------------------------------------------------------------------------------------------------


def with_entry(x, value):
    x = x.clone()
    x[1, 0, 2, 2] = value
    return x


@refuse(
    ("nan", lambda x: with_entry(x, math.nan), InputError, "nan or inf", "(sample 1)", "nan_to_num"),
    ("inf", lambda x: with_entry(x, -math.inf), InputError, "nan or inf", "(sample 1)", "Leave these samples out"),
    ("empty batch", lambda x: x[:0], InputError, "(0, 1, 4, 4)", "no sample to explain"),
    ("empty images", lambda x: x[:, :, :0], InputError, "(2, 1, 0, 4)", "no sample to explain"),
    ("scalar", lambda x: x.sum(), InputError, "shape ()", "no sample to explain"),
    ("complex", lambda x: x * 1j, InputError, "complex64", "real floating point", ".float()"),
    ("integer", lambda x: x.long(), InputError, "int64", "real floating point", ".float()", "embedding"),
    ("bool", lambda x: x > 0, InputError, "torch.bool", "real floating point", ".float()"),
    ("half", lambda x: x.half(), InputError, "float16", "lose precision", "float32 or float64"),
    ("bfloat16", lambda x: x.bfloat16(), InputError, "bfloat16", "lose precision", "float32 or float64"),
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
def test_an_input_that_has_no_measure_is_refused(before, ask, error, words):
    bad = ask(before.x)
    with before.refuses(error, *words):
        RelevanceMeasure(before.net, bad, 1)
    with before.refuses(error, *words):
        coverage(before.net, bad)


def test_an_input_made_in_inference_mode_is_refused(before):
    with torch.inference_mode():
        x = before.x.clone()
    with before.refuses(InputError, "torch.inference_mode", ".clone()"):
        RelevanceMeasure(before.net, x, 1)


@pytest.mark.parametrize(("mode", "name"), [(torch.no_grad, "no_grad"), (torch.inference_mode, "inference_mode")])
def test_a_measure_without_gradients_is_refused(before, mode, name):
    for ask in (
        lambda: RelevanceMeasure(before.net, before.x, 1),
        lambda: coverage(before.net, before.x),
    ):
        with before.refuses(GradModeError, f"torch.{name}", "with gradients enabled", "outside"), mode():
            ask()


def test_a_model_that_cannot_take_the_input_says_so_itself(before):
    """What the model raises on its own is not ours to word, but leaves nothing behind."""
    for inputs, arguments, error in (
        (torch.randn(2, 3, 4, 4), {}, RuntimeError),
        ((before.x, before.x), {}, TypeError),
        (before.x, {"additional_forward_args": 3}, TypeError),
        (before.x, {"additional_forward_kwargs": {"mask": 3}}, TypeError),
    ):
        with before.refuses(error):
            RelevanceMeasure(before.net, inputs, 1, **arguments)


# -- targets and start vectors ------------------------------------------------------------------------------------

FORMS = "Give an int, a tuple of ints for an output of several dimensions, or a list or tensor of one for each sample"


@refuse(
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
    ("words", ["cat", "dog"], TargetError, "target 'cat'", "not made of integers", FORMS),
    ("nones", [None, 1], TargetError, "target None", "not made of integers", FORMS),
    ("bools in a list", [True, False], TargetError, "target True", "not made of integers", FORMS),
    ("too many", [1, 2, 3], TargetError, "3 entries for 2 samples", "one for all or one for each"),
    ("too few", [], TargetError, "0 entries for 2 samples", "one for all or one for each"),
    ("tuple", (1, 2), TargetError, "target (1, 2) has 2 indices", "(2, 5)", "one int for all samples"),
    ("empty tuple", (), TargetError, "has 0 indices", "(2, 5)", "one int for all samples"),
    ("tuples", [(1, 2), (0, 1)], TargetError, "target (1, 2) has 2 indices", "(2, 5)"),
    ("two dimensions", torch.zeros(2, 2).long(), TargetError, "target (0, 0) has 2 indices", "(2, 5)"),
    ("three dimensions", torch.zeros(2, 2, 2).long(), TargetError, "not made of integers", FORMS),
)
def test_a_target_that_does_not_fit_is_refused(before, ask, error, words):
    with before.refuses(error, *words):
        RelevanceMeasure(before.net, before.x, ask)
    with before.refuses(error, *words):
        NRM(before.net).attribute(before.x, target=ask)


@refuse(
    ("sum 0", [1.0, -1, 0, 0, 0], TargetError, "sums to 0 (samples 0, 1)", "take the measure of each output"),
    ("sum 0 in one", torch.eye(5)[:2] * torch.tensor([[1.0], [0]]), TargetError, "sums to 0 (sample 1)", "subtract"),
    ("cancelled", [1.0, -1 + 1e-8, 0, 0, 0], TargetError, "sums to 0", "A difference of outputs has no measure"),
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
def test_a_start_vector_that_does_not_fit_is_refused(before, ask, error, words):
    with before.refuses(error, *words):
        RelevanceMeasure(before.net, before.x, start=ask)


def test_a_target_beside_a_start_vector_is_refused(before):
    with before.refuses(TargetError, "target= or start=, not both"):
        RelevanceMeasure(before.net, before.x, 1, start=torch.ones(5))


@pytest.mark.parametrize(
    "target",
    [np.int64(1), torch.tensor(1), np.array([1, 1]), [np.int64(1)] * 2, [torch.tensor(1)] * 2, (1,), -4, [[1]]],
)
def test_targets_as_argmax_gives_them_are_understood(before, target):
    found = RelevanceMeasure(before.net, before.x, target).marginal("input")
    torch.testing.assert_close(found, before.mu.marginal("input"), rtol=0, atol=0)


def test_a_list_of_inputs_is_a_tuple_of_them(before):
    found = RelevanceMeasure(before.net, [before.x], 1).marginal("input")
    torch.testing.assert_close(found, before.mu.marginal("input"), rtol=0, atol=0)
    assert coverage(before.net, [before.x]).is_complete


def test_several_dimensions_of_outputs_need_as_many_indices(before):
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Unflatten(1, (2, 3))).eval()
    with before.refuses(TargetError, "target 1 has 1 index", "(2, 2, 3) has 2 dimensions", "tuple", model=net):
        RelevanceMeasure(net, before.x, 1)
    with before.refuses(TargetError, "target (1, 3) of sample 0", "0 to 1, 0 to 2", model=net):
        RelevanceMeasure(net, before.x, (1, 3))


# -- settings -----------------------------------------------------------------------------------------------------


@refuse(
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
def test_a_setting_that_is_none_is_refused(before, ask, error, words):
    for make in (
        lambda: RelevanceMeasure(before.net, before.x, 1, **ask),
        lambda: NRM(before.net, **ask),
        lambda: LayerNRM(before.net, "conv", **ask),
        lambda: Normalized(**{"composite": EpsilonPlus(), **ask}),
    ):
        with before.refuses(error, *words):
            make()


@pytest.mark.parametrize("setting", [{"residual": "sink"}, {"gain_limit": 3.0}, {"uncovered": "gradient"}])
def test_settings_beside_a_normalized_composite_are_refused(before, setting):
    (name,) = setting
    rules = Normalized(EpsilonPlus())
    for make in (
        lambda: RelevanceMeasure(before.net, before.x, 1, composite=rules, **setting),
        lambda: NRM(before.net, composite=rules, **setting),
    ):
        with before.refuses(TypeError, "brings its own settings", name, f"Normalized(composite, {name}="):
            make()


def test_other_settings_of_normalized_are_refused(before):
    with before.refuses(TypeError, "already Normalized", "Normalized(composite.composite, …)"):
        Normalized(Normalized(EpsilonPlus()))
    with before.refuses(TypeError, "got NoneType", "EpsilonPlusFlat()"):
        Normalized(None)
    with before.refuses(ValueError, "sums='relative'", "'absolute', 'ratio' or 'signed'"):
        Normalized(EpsilonPlus(), sums="relative")


def test_a_gain_limit_from_numpy_is_a_number(before):
    rules = Normalized(EpsilonPlus(), gain_limit=np.float32(2))
    found = RelevanceMeasure(before.net, before.x, 1, composite=rules).marginal("input")
    same = RelevanceMeasure(before.net, before.x, 1, composite=EpsilonPlus(), gain_limit=2).marginal("input")
    torch.testing.assert_close(found, same)


# -- models -------------------------------------------------------------------------------------------------------


@refuse(
    ("none", lambda: None, InputError, "NoneType", "torch.nn.Module"),
    ("function", lambda: lambda x: x, InputError, "function", "wrap it in a module"),
    ("class", lambda: Net, InputError, "the class Net", "Pass an instance: Net("),
    ("tensor", lambda: torch.ones(2), InputError, "Tensor", "torch.nn.Module"),
)
def test_a_model_that_is_none_is_refused(before, ask, error, words):
    for make in (
        lambda model: RelevanceMeasure(model, before.x, 1),
        lambda model: coverage(model, before.x),
        lambda model: NRM(model).attribute(before.x, target=1),
    ):
        with before.refuses(error, *words):
            make(ask())


def test_a_model_without_values_is_refused(before):
    model = Net().to("meta").eval()
    identities = [id(parameter) for parameter in model.parameters()]
    with before.refuses(ModelStateError, "'conv.weight'", "meta", "load_state_dict"):
        RelevanceMeasure(model, before.x, 1)
    assert identities == [id(parameter) for parameter in model.parameters()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    lazy = nn.Sequential(nn.Flatten(), nn.LazyLinear(3)).eval()
    with before.refuses(ModelStateError, "'1.weight'", "lazy", "model(inputs)"):
        RelevanceMeasure(lazy, before.x, 1)


def test_a_model_on_another_device_is_refused(before):
    """Buffers alone tell the device where there are no parameters."""
    model = nn.Sequential(nn.BatchNorm2d(1, affine=False), nn.Flatten()).eval()
    model[0].running_mean, model[0].running_var = model[0].running_mean.to("meta"), model[0].running_var.to("meta")
    with before.refuses(InputError, "the input is on cpu", "the model on meta", "inputs.to("):
        RelevanceMeasure(model, before.x, 1)


@pytest.mark.parametrize(
    ("convert", "words"),
    [
        (lambda net: net.double(), ("float32", "the model torch.float64", "inputs.double()")),
        (lambda net: net.half(), ("float32", "the model torch.float16", "`.float()` for both")),
        (lambda net: net.bfloat16(), ("float32", "the model torch.bfloat16")),
    ],
)
def test_a_model_of_another_dtype_is_refused(before, convert, words):
    model = convert(build())
    kept = copy.deepcopy(model.state_dict())
    with before.refuses(InputError, *words):
        RelevanceMeasure(model, before.x, 1)
    assert all(torch.equal(value, kept[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(before, value):
    model = build()
    with torch.no_grad():
        model.lin.bias[3] = value
    with before.refuses(ModelStateError, "'lin.bias'", "nan or inf", "Load or train", model=model):
        RelevanceMeasure(model, before.x, 1)


def test_large_weights_are_finite(before):
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)).eval()
    model.register_parameter("large", nn.Parameter(torch.full((9,), 1e38)))
    assert not model.large.sum().isfinite()
    assert RelevanceMeasure(model, before.x, 1).batch == 2


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
def test_compiled_models_are_refused(before, make, words):
    model = make()
    with before.refuses(ModelStateError, *words):
        RelevanceMeasure(model, before.x, 1)


# -- training mode ------------------------------------------------------------------------------------------------


class Calls(nn.Module):
    """A linear layer, and a function or module on what it returns."""

    def __init__(self, function, module=None) -> None:
        super().__init__()
        self.lin, self.function, self.inner = nn.Linear(16, 4), function, module

    def forward(self, x):
        return self.function(self, self.lin(x.flatten(1)))


def through(module):
    return Calls(lambda self, x: self.inner(x), module)


@refuse(
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
def test_a_model_that_is_random_or_mixes_samples_is_refused(before, ask, error, words):
    torch.manual_seed(0)
    model = ask().train()
    with before.refuses(error, *words, model=model):
        RelevanceMeasure(model, before.x, 1)


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
def test_the_same_models_are_measured_in_evaluation_mode(before, model):
    mu = RelevanceMeasure(model.eval(), before.x, 1)
    torch.testing.assert_close(mu(at("lin")) + mu.sink("lin"), torch.ones(2))


def test_harmless_layers_may_be_in_training_mode(before):
    model = Calls(lambda self, x: functional.dropout(self.inner(x), 0.0, training=True), nn.Dropout(0.0)).train()
    assert RelevanceMeasure(model, before.x, 1).batch == 2


def test_a_dropout_that_forgets_the_mode_is_refused_in_evaluation_mode(before):
    model = Calls(lambda self, x: functional.dropout(x)).eval()
    with before.refuses(ModelStateError, "'dropout'", "training=self.training", model=model):
        RelevanceMeasure(model, before.x, 1)


def test_batch_norm_without_statistics_is_refused(before):
    model = through(nn.BatchNorm1d(4, track_running_stats=False)).eval()
    with before.refuses(ModelStateError, "'inner'", "no running statistics", "mixes the samples", model=model):
        RelevanceMeasure(model, before.x, 1)


def test_a_model_that_is_hooked_already_is_refused(before):
    for rules in (EpsilonPlus(), Normalized(EpsilonPlus())):
        with rules.context(before.net), pytest.raises(ModelStateError, match=r"'conv' .*outside of.*composite="):
            RelevanceMeasure(before.net, before.x, 1)
    with before.refuses(UnknownLayerError, "'con'"):
        before.mu.marginal("con")


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
def test_rules_that_are_not_linear_are_refused_by_name(before, rules, name):
    words = name, "layer 'relu'", "not linear", "Choose a composite whose rules are linear"
    with before.refuses(NonlinearRuleError, *words):
        RelevanceMeasure(before.net, before.x, 1, composite=rules, uncovered="gradient")
    with before.refuses(NonlinearRuleError, *words):
        NRM(before.net, composite=rules, uncovered="gradient").attribute(before.x, target=1)
    rules = Normalized(rules, uncovered="gradient")
    for _ in range(2):  # also when it was refused before
        with before.refuses(NonlinearRuleError, *words), rules.context(before.net):
            before.net(before.x.clone().requires_grad_())


def test_a_rule_that_is_not_linear_is_found_among_those_of_a_user(before):
    rule = BasicHook(
        input_modifiers=[lambda x: x],
        param_modifiers=[lambda parameter, name: parameter],
        output_modifiers=[lambda x: x],
        gradient_mapper=lambda R, outputs: R.clamp(min=0),
        reducer=lambda inputs, gradients: inputs[0] * gradients[0],
    )
    with before.refuses(NonlinearRuleError, "BasicHook", "layer 'lin'"):
        RelevanceMeasure(before.net, before.x, 1, composite=NRMAbsolute(layer_map=[(nn.Linear, rule)]))


def test_a_rule_that_fits_no_kernel_is_refused(before):
    class Early(Epsilon):
        def pre_forward(self, module, input):
            return super().pre_forward(module, input)

    rules = NRMAbsolute(layer_map=[(nn.Conv2d, Early())])
    with before.refuses(UnsupportedRuleError, "Early", "'conv'", "forward hooks", "`forward` and `backward` only"):
        RelevanceMeasure(before.net, before.x, 1, composite=rules)
    with before.refuses(UnsupportedRuleError, "'conv'", "Pass", "(2, 1, 4, 4)", "(2, 3, 4, 4)", "Give it a rule"):
        RelevanceMeasure(before.net, before.x, 1, composite=NRMAbsolute(layer_map=[(nn.Conv2d, Pass())])).sinks()


def test_a_layer_without_a_rule_is_refused_unless_its_gradient_is_wanted(before):
    model = through(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))).eval()
    rules = NameMapComposite([(["lin", "inner.2"], Epsilon()), (["inner.1"], Pass())])
    words = "layer 'inner.0' (Linear", "no rule", "layer_map", "uncovered='gradient'"
    with before.refuses(UncoveredLayerError, *words, model=model):
        RelevanceMeasure(model, before.x, 1, composite=rules)
    with before.refuses(UncoveredLayerError, *words, model=model):
        RelevanceMeasure(model, before.x, 1, composite=Normalized(rules))
    for mu in (
        RelevanceMeasure(model, before.x, 1, composite=rules, uncovered="gradient"),
        RelevanceMeasure(model, before.x, 1, composite=Normalized(rules, uncovered="gradient")),
    ):
        assert mu.sinks()["inner.0"].abs().min() > 0
        for layer in mu.layers:
            total = mu.marginal(layer).flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer)
            torch.testing.assert_close(total, torch.ones(2), rtol=0, atol=1e-5)


def test_a_layer_of_several_outputs_cannot_have_a_rule(before):
    model = Calls(lambda self, x: torch.cat(self.inner(x), 1), Halves()).eval()
    rules = NRMAbsolute(layer_map=[(Halves, Epsilon())])
    with before.refuses(UnsupportedRuleError, "'inner' (Halves)", "Epsilon", "returns tuple", "wrap it", model=model):
        RelevanceMeasure(model, before.x, 1, composite=rules)


def test_an_operation_without_a_kernel_is_refused_when_relevance_arrives(before):
    model = Calls(lambda self, x: torch.special.entr(x.abs() + 0.1)).eval()
    mu = RelevanceMeasure(model, before.x, 1)
    with before.refuses(UnsupportedOperationError, "'entr'", "register_kernel", "test_bad_input.py", model=model):
        mu.marginal("input")


# -- outputs ------------------------------------------------------------------------------------------------------

JOINED = "does not depend on the inputs", "detach"


@refuse(
    ("tuple", lambda self, x: (x, x), InputError, "tuple of 0 (float32 (2, 4)), 1", "output="),
    ("none", lambda self, x: None, InputError, "NoneType", "one tensor of shape (N, …)"),
    ("words", lambda self, x: "cat", InputError, "str", "one tensor of shape (N, …)"),
    ("scalar", lambda self, x: x.sum(), InputError, "2 inputs", "shape ()", "must be the batch"),
    ("no batch", lambda self, x: x.sum(0), InputError, "2 inputs", "shape (4,)", "must be the batch"),
    ("transposed", lambda self, x: x.T, InputError, "2 inputs", "shape (4, 2)", "must be the batch"),
    ("repeated", lambda self, x: torch.cat([x, x]), InputError, "shape (4, 4)", "must be the batch"),
    ("no outputs", lambda self, x: x[:, :0], InputError, "shape (2, 0)", "scores"),
    ("classes", lambda self, x: x.argmax(1), InputError, "int64", "Make the model return its scores"),
    ("decisions", lambda self, x: x > 0, InputError, "torch.bool", "Make the model return its scores"),
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
def test_an_output_that_no_measure_can_start_at_is_refused(before, ask, error, words):
    torch.manual_seed(0)
    model = Calls(ask).eval()
    with before.refuses(error, *words, model=model):
        RelevanceMeasure(model, before.x, 1)


def test_a_choice_of_outputs_that_is_none_is_refused(before):
    model = Calls(lambda self, x: {"scores": x, "classes": x.argmax(1), "other": x * 2}).eval()
    with before.refuses(InputError, "'scores' (float32 (2, 4))", "output=", model=model):
        RelevanceMeasure(model, before.x, 1)
    with before.refuses(InputError, "output='score'", "'scores' (float32 (2, 4))", model=model):
        RelevanceMeasure(model, before.x, 1, output="score")
    with before.refuses(InputError, "int64", "Make the model return its scores", model=model):
        RelevanceMeasure(model, before.x, 1, output="classes")
    assert RelevanceMeasure(model, before.x, 1, output="scores").batch == 2


def test_one_output_for_each_sample_needs_no_target_and_no_second_dimension(before):
    model = Calls(lambda self, x: x[:, 1]).eval()
    twin = copy.deepcopy(model)
    twin.function = lambda self, x: x
    twin = RelevanceMeasure(twin, before.x, 1)
    mu = RelevanceMeasure(model, before.x)
    assert mu.shape("output") == (2,)
    torch.testing.assert_close(mu.output, model(before.x).detach())
    torch.testing.assert_close(mu(at("lin")) + mu.sink("lin") + mu.bypass("lin"), torch.ones(2))
    torch.testing.assert_close(mu.marginal("output") + mu.sink("output") + mu.bypass("output"), torch.ones(2))
    torch.testing.assert_close(mu.marginal("output", "channel"), torch.ones(2))
    torch.testing.assert_close(mu.variation("output"), torch.ones(2))
    torch.testing.assert_close(mu.joint("output", "lin").shape, torch.Size([2, 1, 4]))
    torch.testing.assert_close(mu.marginal("input"), twin.marginal("input"))
    assert NRM(model).attribute(before.x, return_convergence_delta=True)[1].abs().max() < 1e-5
    with before.refuses(TargetError, "target 0 has 1 index", "(2,)", "leave target= out", model=model):
        RelevanceMeasure(model, before.x, 0)
    with before.refuses(EventError, "no channels", model=model):
        mu(at("output").channel(0))


# -- Captum classes -----------------------------------------------------------------------------------------------


@refuse(
    ("unknown", lambda net, x: LayerNRM(net, "con").attribute(x, target=1), UnknownLayerError, "'con'", "'conv'"),
    ("another", lambda net, x: LayerNRM(net, nn.ReLU()).attribute(x, target=1), UnknownLayerError, "ReLU"),
    ("number", lambda net, x: LayerNRM(net, 3).attribute(x, target=1), EventError, "a name", "got int: 3"),
    ("tuple", lambda net, x: LayerNRM(net, ("conv", "pool")).attribute(x, target=1), EventError, "in a list"),
    ("reused", lambda net, x: LayerNRM(net, net.lin).attribute(x, target=1), UnknownLayerError, "2 times", "call="),
    ("no target", lambda net, x: NRM(net).attribute(x), TargetError, "target=", "5 entries"),
    ("unit", lambda net, x: NRM(net).attribute(x, target=1, unit="%"), ValueError, "unit='%'", "'output' or 'measure'"),
    ("nan", lambda net, x: NRM(net).attribute(x * math.nan, target=1), InputError, "nan or inf", "samples 0, 1"),
    ("function", lambda net, x: NRM(net.forward), InputError, "torch.nn.Module", "method"),
    ("both", lambda net, x: NRM(net).attribute(x, 1, given=A, joint=A), TypeError, "not both"),
    ("event", lambda net, x: NRM(net).attribute(x, 1, given="conv"), EventError, "expected an event", "got str"),
)
def test_captum_classes_refuse_the_same(before, ask, error, words):
    with before.refuses(error, *words):
        ask(before.net, before.x)


def test_every_error_of_this_package_can_be_caught_as_one():
    own = [CancellationError, EventError, GradModeError, InputError, ModelStateError, NullEventError, TargetError]
    own += [UncoveredLayerError, UnknownLayerError, UnsupportedOperationError, UnsupportedRuleError]
    assert all(issubclass(error, NRMError) for error in own)
    assert not issubclass(NullEventError, CancellationError)
    assert not issubclass(CancellationError, NullEventError)
