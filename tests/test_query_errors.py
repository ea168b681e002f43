"""Queries with invalid arguments, and conditioning on events without mass or with cancelling mass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon

from nrm_plugin import ABSORBED, RelevanceMeasure, at
from nrm_plugin.errors import CancellationError, EventError, NullEventError
from tests.error_cases import MeasuredNet, error_cases, mask


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


A = at("conv")[0]


@error_cases(
    ("bool", lambda mu: bool(A), TypeError, "no truth value", "`a & b`, `a | b`, `~a`"),
    ("and", lambda mu: A and at("pool"), TypeError, "no truth value", "`a & b`"),
    ("or", lambda mu: A or at("pool"), TypeError, "no truth value", "`a | b`"),
    ("not", lambda mu: not A, TypeError, "no truth value", "`~a`"),
    ("if", lambda mu: 1 if A & at("pool") else 0, TypeError, "no truth value"),
    ("absorbed", lambda mu: ABSORBED and A, TypeError, "no truth value"),
    ("in", lambda mu: 3 in at("conv"), TypeError, "not iterable"),
    ("iteration", lambda mu: list(at("conv")), TypeError, "at('conv') is an event", "[at(layer)[k] for k in"),
    ("unpacking", lambda mu: mu(*at("conv")), TypeError, "at('conv') is an event"),
    ("and a name", lambda mu: A & "pool", TypeError, "`&` combines two events", "and str", "`at(layer)`"),
    ("and a mask", lambda mu: A & mask(3), TypeError, "`&` combines two events", "and Tensor", "`at(layer)[mask]`"),
    ("a mask and", lambda mu: mask(3) & A, TypeError, "`&` combines two events", "and Tensor", "`at(layer)[mask]`"),
    ("or none", lambda mu: A | None, TypeError, "`|` combines two events", "and NoneType"),
    ("none or", lambda mu: None | A, TypeError, "`|` combines two events", "and NoneType"),
    ("minus a number", lambda mu: A - 1, TypeError, "`-` combines two events", "and int"),
    ("one minus", lambda mu: 1 - A, TypeError, "`-` combines two events", "and int"),
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
    (
        "joint with itself",
        lambda mu: mu.joint("conv", "conv"),
        EventError,
        "not below",
        "upper tap and then",
    ),
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
def test_an_invalid_query_raises(measured, case, error, words):
    with measured.raises(error, *words):
        case(measured.mu)


def test_an_empty_list_gives_an_empty_result(measured):
    assert measured.mu([]).shape == (0, 2)
    assert measured.mu([], given=A).shape == (0, 2)
    assert measured.mu.marginal([]) == {}
    assert measured.mu.marginal("conv", joint=[]).shape == (0, 2, 3, 4, 4)
    assert measured.mu.marginal("conv", "channel", given=[]).shape == (0, 2, 3)


@pytest.fixture
def signed():
    """LRP-0 on the sum of three inputs, so that the unnormalized relevance of an input is its value.

    Given the first two inputs, sample 0 cancels exactly, sample 2 cancels nearly and sample 3 has no mass.
    """
    net = nn.Sequential(nn.Linear(3, 1, bias=False)).double().eval()
    nn.init.ones_(net[0].weight)
    x = torch.tensor([[1, -1, 1], [1, 1, 1], [1, -1 + 1e-11, 2], [0, 0, 1]], dtype=torch.float64)
    rules = LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-14))])
    return net, x, RelevanceMeasure(net, x, composite=rules)


def test_conditioning_on_a_null_event_names_the_samples(measured, signed):
    net, _, mu = signed
    first = at("input")[[0, 1]]
    for query in (
        lambda: mu(at("0"), given=first),
        lambda: mu([at("0"), first], given=first),
        lambda: mu.marginal("input", given=first),
        lambda: mu.marginal("input", given=[at("0"), first]),
    ):
        with measured.raises(
            NullEventError, "at('input')[[0, 1]]", "no walk with nonzero mass", "(sample 3)", "mu(", model=net
        ):
            query()
    rows = mask(4, 3)
    rows[1:3] = False
    with measured.raises(NullEventError, "mask of 6 in (4, 3)", "(samples 1, 2)", model=net):
        mu(at("0"), given=at("input")[rows])


def test_conditioning_on_an_event_that_cancels_raises_a_different_error(measured, signed):
    net, x, _ = signed
    rules = LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-14))])
    mu = RelevanceMeasure(net, x[:3], composite=rules)
    first = at("input")[[0, 1]]
    words = "at('input')[[0, 1]]", "mass is", "variation is 2", "cancel", "(samples 0, 2)", "min_ratio=0"
    for query in (lambda: mu(at("0"), given=first), lambda: mu.marginal("input", given=first)):
        with measured.raises(CancellationError, *words, model=net):
            query()
    with measured.raises(CancellationError, "(sample 0)", "mass is 0", "smaller event", model=net):
        mu(at("0"), given=first, min_ratio=0)
    near = RelevanceMeasure(net, x[1:3], composite=rules)
    divided = near(at("input")[0], given=first, min_ratio=0)
    torch.testing.assert_close(divided, torch.tensor([0.5, 1e11], dtype=torch.float64), rtol=1e-4, atol=0)
    assert torch.equal(near(first, given=first, min_ratio=1e-13), torch.ones(2, dtype=torch.float64))


def test_the_message_does_not_suggest_what_the_caller_already_did(signed):
    net, x, _ = signed
    mu = RelevanceMeasure(net, x[:1], composite=LayerMapComposite([(nn.Linear, Epsilon(epsilon=1e-14))]))
    with pytest.raises(CancellationError) as caught:
        mu(at("0"), given=at("input")[[0, 1]], min_ratio=0)
    assert "min_ratio" not in str(caught.value)
