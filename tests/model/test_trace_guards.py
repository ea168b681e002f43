"""Checks that a trace records for the values on which a computation depends."""

import pytest
import torch

from nrm_plugin.model.trace_guards import ACTIVE, audit, holds, is_traced, repeated, untraced, without_shortcuts
from nrm_plugin.plan.tracer import Tracer


def reads(tracer: Tracer) -> list[str]:
    """The checks of a trace."""
    return [one.origin for one in tracer.trace.operations if one.expected is not None]


@pytest.fixture
def traced():
    tracer, x = Tracer(), torch.tensor([1.0, 2.0])
    tracer.placeholder(x)
    return tracer, x


def test_a_shortcut_is_compared_only_if_it_was_taken(traced):
    tracer, x = traced
    with tracer:
        assert is_traced()
        assert holds("positive", lambda: x.min() > 0)
        assert not holds("negative", lambda: x.max() < 0)
    assert not is_traced()
    assert reads(tracer) == ["positive in the graph"]


def test_a_shortcut_is_named_by_the_step_and_may_be_disabled(traced):
    tracer, x = traced
    with without_shortcuts(frozenset(["positive in layer:0"])), tracer:
        with repeated("layer:0"):
            assert not holds("positive", lambda: x.min() > 0)
        with repeated("layer:1"):
            assert holds("positive", lambda: x.min() > 0)
    assert reads(tracer) == ["positive in layer:1"]


def test_an_audit_is_not_repeated_but_a_computation_inside_it_is(traced):
    tracer, x = traced
    with tracer, audit():
        assert bool(x.sum() > 0)
        with repeated("layer:0"):
            assert bool(x.sum() > 1)
        assert holds("positive", lambda: x.min() > 0)
    found = reads(tracer)
    assert len(found) == 2
    assert "positive" in found[1]


def test_operations_of_a_check_are_not_traced(traced):
    tracer, x = traced
    with tracer:
        x.exp()
        with untraced():
            assert not is_traced()
            assert bool(x.sin().sum() > 0)
        x.cos()
    assert [str(one.function) for one in tracer.trace.operations] == ["aten.exp.default", "aten.cos.default"]


def test_the_state_is_restored_after_an_error(traced):
    tracer, _ = traced
    for block in (audit(), repeated("a"), untraced(), without_shortcuts(frozenset("b")), tracer):
        before = dict(ACTIVE.__dict__)
        with pytest.raises(KeyError), block:
            raise KeyError
        assert ACTIVE.__dict__ == before or not set(ACTIVE.__dict__) - {
            "tracer",
            "audits",
            "place",
            "disabled_shortcuts",
        }
        assert ACTIVE.tracer is None
        assert ACTIVE.audits == 0
        assert ACTIVE.disabled_shortcuts == frozenset()


def test_without_a_trace_a_condition_is_read_once():
    calls = []
    assert holds("any", lambda: calls.append(1) is None)
    assert calls == [1]


def test_a_trace_that_is_entered_twice_ends_with_the_outer_context(traced):
    tracer, _ = traced
    with tracer, tracer:
        assert is_traced()
    assert not is_traced()
