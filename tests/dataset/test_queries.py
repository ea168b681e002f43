"""Queries and events can be restored from JSON, and anything that is not a query raises an error."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nrm_plugin import ABSORBED, at
from nrm_plugin.dataset import (
    Activation,
    Marginal,
    Peak,
    SweepError,
)
from nrm_plugin.dataset.queries import check_queries, from_json
from nrm_plugin.errors import EventError
from nrm_plugin.events.serialization import event_from_json, event_to_json
from tests.dataset.sweep_nets import EVENT, EVERY_QUERY

indices = st.one_of(
    st.integers(-3, 5),
    st.lists(st.integers(0, 5), max_size=3),
    st.builds(slice, st.none() | st.integers(0, 3), st.none() | st.integers(3, 6), st.none() | st.integers(1, 2)),
    st.just(...),
    st.tuples(st.integers(0, 2), st.just(...), st.integers(0, 2)),
    st.lists(st.booleans(), min_size=1, max_size=4).map(torch.tensor),
    st.just(torch.tensor([[1, 2], [0, 3]], dtype=torch.int32)),
)


atoms = st.builds(
    at, st.sampled_from("abc"), st.sampled_from(["input", "output", "sink"]), st.none() | st.just("any") | st.just(1),
    st.none() | st.just(0) | st.just("key"),
)  # fmt: skip


leaves = st.one_of(
    atoms,
    st.just(ABSORBED),
    st.builds(lambda atom, index: atom[index], atoms, indices),
    st.builds(lambda atom, index: atom.channel(index), atoms, st.integers(0, 3) | st.just([1, 2])),
)


events = st.recursive(
    leaves, lambda e: st.builds(lambda a, b: a & b, e, e) | st.builds(lambda a, b: a | b, e, e) | e.map(lambda a: ~a)
)


@settings(deadline=None)
@given(events)
def test_an_event_survives_json(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize(
    "event",
    [
        at("attn").head(2),
        at("attn", call=1).token([0, 3]),
        ~at("attn").pair(slice(1, 3), 0) & at("attn").head([0, 1]).token(torch.tensor([True, False, True])),
    ],
    ids=str,
)
def test_heads_and_tokens_survive_json(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


@pytest.mark.parametrize(
    "data",
    [
        *(None, 3, {}, {"at": 3}, {"or": []}, {"all": []}, {"at": "a", "side": "up"}, {"at": "a", "index": {"x": 1}}),
        *({"attention": "a", "keys": 1}, {"attention": "a", "side": "input"}, {"attention": "a", "heads": {"x": 1}}),
    ],
)
def test_what_is_not_an_event_raises(data):
    with pytest.raises(EventError):
        event_from_json(data)


def test_a_module_has_no_name_in_json():
    with pytest.raises(EventError, match="Use its name"):
        event_to_json(at(nn.ReLU()))


@pytest.mark.parametrize("query", EVERY_QUERY.values(), ids=EVERY_QUERY)
def test_a_query_survives_json(query):
    again = from_json(json.loads(json.dumps(query.to_json())))
    assert again == query
    assert hash(again) == hash(query)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Marginal(3), "name of a layer"),
        (lambda: Marginal(at("a")[3]), "without an index"),
        (lambda: Marginal("a", over="row"), "choose 'channel'"),
        (lambda: Marginal("a", torch.rand(3)), "integer labels"),
        (lambda: Marginal("a", joint=EVENT, given=EVENT), "not both"),
        (lambda: Activation("a", "median"), "choose 'max'"),
        (lambda: Peak("a", "gradient"), "choose 'relevance'"),
        (lambda: check_queries([Marginal("a"), Marginal("a")]), "Give one of them another name"),
        (lambda: check_queries([]), "no query was given"),
        (lambda: check_queries(["features.28"]), r"Marginal\('layer'\)"),
        (lambda: check_queries(Marginal("a", name="sample")), "name of a column"),
        (lambda: from_json({"kind": "Median"}), "Kinds are"),
        (lambda: from_json({"kind": "Marginal"}), "not a query"),
    ],
)
def test_what_is_not_a_query_raises(make, message):
    with pytest.raises(SweepError, match=message):
        make()
