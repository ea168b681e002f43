"""Descriptions of events in words, as returned by `explain`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nrm_plugin import ABSORBED, Event, RelevanceMeasure, at
from nrm_plugin.measure.query_description import words

A, B, C = at("a"), at("b").channel([1, 2]), at("c", side="input")
SENTENCES: list[tuple[Event, str]] = [
    (A, "cross 'a'"),
    (at("a", call=1), "cross 'a' in call 1"),
    (C, "cross the input of 'c'"),
    (at("c", side="sink"), "are absorbed in 'c'"),
    (at(nn.ReLU()), "cross 'ReLU'"),
    (ABSORBED, "are absorbed anywhere"),
    (~ABSORBED, "reach the input"),
    (A & C, "cross 'a' and cross the input of 'c'"),
    (A | C, "either cross 'a' or cross the input of 'c'"),
    (ABSORBED & (A | C), "are absorbed anywhere and (either cross 'a' or cross the input of 'c')"),
    (~A, "do not cross 'a' (they bypass it, or are absorbed above it)"),
    (~B, "do not cross 'b' in channel [1, 2] (they cross other neurons, bypass it, or are absorbed above it)"),
    (~at("c", side="sink"), "are not absorbed in 'c'"),
    (~(A & C), "do not (cross 'a' and cross the input of 'c')"),
]


@pytest.mark.parametrize(("event", "sentence"), SENTENCES)
def test_an_event_in_words(event: Event, sentence: str):
    assert words(event) == sentence


def test_a_conditional_is_described_as_a_share():
    mu = RelevanceMeasure(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(1, 3), 1)
    text = mu.explain(at("1")[2], given=~ABSORBED)
    assert "Among the walks that reach the input, the share of relevance carried by those that also cross '1'" in text
