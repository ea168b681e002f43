"""Operations with equal arguments, whatever their tensors, share one call."""

from __future__ import annotations

import torch

from nrm_plugin.plan.trace import HOLE, Call, Trace, Value, needed

aten = torch.ops.aten


def call_of(trace: Trace, function, *args) -> Call:
    return trace.operation(function, args, (9,)).call


def test_calls_are_shared_whatever_tensors_they_read():
    trace = Trace()
    one = trace.operation(aten.add.Tensor, (Value(1), Value(2)), (3,))
    other = trace.operation(aten.add.Tensor, (Value(4), Value(1)), (5,))
    assert one.call is other.call
    assert (one.reads, other.reads) == ((1, 2), (4, 1))
    assert one.call.args == (HOLE, HOLE)
    assert one.call is not call_of(trace, aten.mul.Tensor, Value(1), Value(2))


def test_arguments_that_python_considers_equal_are_distinguished():
    trace, multiply = Trace(), aten.mul.Tensor
    factors = [1, 1.0, True, 0.0, -0.0, None, [1, 2], (1, 2)]
    calls = [call_of(trace, multiply, Value(1), factor) for factor in factors]
    assert len(set(map(id, calls))) == len(factors)
    again = [call_of(trace, multiply, Value(7), factor) for factor in factors]
    assert all(one is other for one, other in zip(calls, again, strict=True))


def test_calls_with_arguments_that_cannot_be_hashed_are_not_shared():
    trace = Trace()
    one, other = (call_of(trace, aten.mul.Tensor, Value(1), {1}) for _ in range(2))
    assert one is not other
    assert not one.is_comparable


def test_arguments_are_restored_in_order():
    trace = Trace()
    made = trace.operation(aten.index.Tensor, (Value(5), [None, Value(2), Value(5)]), (6,))
    assert made.reads == (5, 2, 5)
    assert made.call.arguments("abc") == (("a", [None, "b", "c"]), {})


def test_only_needed_operations_and_writes_to_needed_memory_remain():
    trace = Trace(count=6, aliases={2: 1})
    made = trace.operation(aten.exp.default, (Value(0),), (1,))
    view = trace.operation(aten.view.default, (Value(1), [2]), (2,))
    write = trace.operation(aten.mul_.Tensor, (Value(2), Value(0)), (2,))
    write.writes = (2,)
    unused = trace.operation(aten.exp.default, (Value(0),), (3,))
    result = trace.operation(aten.sin.default, (Value(1),), (4,))
    operations = [made, view, write, unused, result]
    assert trace.roots() == [0, 1, 1, 3, 4, 5]
    assert needed(operations, [4], trace.roots()) == [made, view, write, result]
    assert needed(operations, [3], trace.roots()) == [unused]
