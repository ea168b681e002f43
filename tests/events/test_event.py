"""Indices of events: what is accepted, and the errors for everything else.

Covers: nrm_plugin.measure.located_events.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from nrm_plugin import ABSORBED, at
from nrm_plugin.errors import EventError, NullEventError
from tests.conftest import untouched
from tests.error_cases import MeasuredNet, error_cases, mask


@pytest.fixture(scope="module")
def measured():
    return MeasuredNet()


KINDS = "neurons are indexed by ints, slices, lists and tuples of them, integer tensors or boolean masks"


@error_cases(
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
    ("two ellipses", lambda: at("conv")[..., ..., 0], EventError, "at('conv')", "only one `...`"),
    ("indexed twice", lambda: at("conv")[1][2], EventError, "at('conv')[1] is already indexed", "with & or |"),
)
def test_an_invalid_index_raises(measured, case, error, words):
    with measured.raises(error, *words):
        measured.mu(case())


@pytest.mark.medium
def test_every_query_rejects_an_invalid_index(measured):
    invalid = at("conv")[3]
    for query in (
        lambda mu: mu([at("pool"), invalid]),
        lambda mu: mu(at("pool"), given=invalid),
        lambda mu: mu.marginal("pool", joint=invalid),
        lambda mu: mu.marginal("pool", given=[at("pool"), invalid]),
        lambda mu: mu.conditional(invalid, "head"),
        lambda mu: mu.explain(at("pool"), given=invalid),
    ):
        with measured.raises(EventError, "at('conv')[3]", "(3, 4, 4)"):
            query(measured.mu)


@pytest.mark.parametrize(
    ("index", "equivalent"),
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
def test_indices_from_numpy_and_torch_are_accepted(measured, index, equivalent):
    torch.testing.assert_close(measured.mu(at("conv")[index]), measured.mu(at("conv")[equivalent]), rtol=0, atol=0)


def test_an_event_copies_its_mask(measured):
    index = mask(3, 4, 4)
    event = at("conv")[index]
    index[:] = False
    torch.testing.assert_close(measured.mu(event), measured.mu(at("conv")))


@pytest.mark.parametrize("index", [[], mask(3, 4, 4) & False, mask(2, 3, 4, 4) & False, slice(0, 0), np.empty(0, int)])
def test_an_empty_mask_is_allowed_and_has_zero_mass(measured, index):
    mu, empty = measured.mu, at("conv")[index]
    zeros, ones = torch.zeros(2), torch.ones(2)
    with untouched(measured.net, measured.x):
        assert torch.equal(mu(empty), zeros)
        assert torch.equal(mu(empty & at("pool")), zeros)
        torch.testing.assert_close(mu(~empty), ones)
        torch.testing.assert_close(mu(empty | at("pool")), mu(at("pool")))
        assert torch.equal(mu(empty, given=at("pool"), min_ratio=0), zeros)
        assert not mu.marginal("input", joint=empty).any()
        assert not mu.marginal("head", joint=empty).any()
        assert not mu.conditional(empty, "head").any()
        assert "conv" in mu.explain(empty)
    with measured.raises(NullEventError, "no walk with nonzero mass", "samples 0, 1"):
        mu(at("pool"), given=empty)


A = at("conv")[0]


@pytest.mark.parametrize(
    "event",
    [A, ~A, A & at("pool"), A | at("pool"), ABSORBED, A.index, at("conv").head(1)],
    ids=lambda e: type(e).__name__,
)
def test_events_are_immutable_and_hashable(event):
    for field in dataclasses.fields(event):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(event, field.name, None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.other = None
    assert event in {event}
