"""Events as JSON: the round trip, and the errors for everything that is not an event."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from nrm_plugin import ABSORBED, at
from nrm_plugin.errors import EventError
from nrm_plugin.events.serialization import event_from_json, event_to_json


@pytest.mark.parametrize(
    "event",
    [
        at("a", side="input", call=1)[3] & ~at("b", item="key").channel([0, 2]) | ABSORBED,
        at("a").head(2).pair(5, [0, 1]),
        at(".input", item="0") & at("a b/c:1[x[1]]", item=0) & at("a", item="features.0"),
        at("a")[torch.tensor([[True, False]])],
        at("a")[torch.empty(0, dtype=torch.int64)],
        at("a")[torch.arange(40)],
        at("a")[1:3, ..., torch.tensor([2], dtype=torch.int32)],
    ],
    ids=repr,
)
def test_an_event_survives_the_round_trip(event):
    assert event_from_json(json.loads(json.dumps(event_to_json(event)))) == event


def test_a_long_index_is_abbreviated_only_in_the_repr():
    event = at("a")[torch.arange(40)]
    assert "40 numbers in (40,)" in repr(event)
    assert event_to_json(event)["index"] == list(range(40))


@pytest.mark.parametrize("value", ["conv", at(nn.ReLU())[0]])
def test_only_events_with_named_layers_have_a_json_form(value):
    with pytest.raises(EventError, match=r"expected an event|Use its name"):
        event_to_json(value)


@pytest.mark.parametrize(
    "data",
    [
        3,
        {"any": []},
        {"at": "a", "size": 3},
        {"at": "a", "side": "up"},
        {"at": "a", "index": {"numbers": [1], "dtype": "float32"}},
        {"attention": "a", "keys": 1},
    ],
)
def test_invalid_json_raises(data):
    with pytest.raises(EventError, match="this is not an"):
        event_from_json(data)
