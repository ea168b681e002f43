"""A trace holds what depends on its placeholders, whatever memory the values pass through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin.plan.program import ChangedValueError, Program
from nrm_plugin.plan.tracer import Tracer

Computation = Callable[[Tensor], Tensor]
INPUTS = [torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(4)]
WEIGHT = torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(3, 4)


def program_of(compute: Computation) -> tuple[Program, Tracer]:
    tracer = Tracer()
    x, start = INPUTS[0].clone(), torch.ones(3, 4, dtype=torch.float64)
    inputs = [tracer.placeholder(x)]
    with torch.no_grad(), tracer:
        output = compute(x) + 0
    starts = [tracer.placeholder(start)]
    with torch.no_grad(), tracer:
        result = output * start
    return Program(tracer.trace, inputs, [tracer.number(output)], starts, [[tracer.number(result)]]), tracer


def filled_by_row(x: Tensor) -> Tensor:
    memory = torch.zeros(3, 4, dtype=x.dtype)
    memory[1].copy_(x[0])
    return memory * 2


def constant_read_and_then_overwritten(x: Tensor) -> Tensor:
    memory = WEIGHT * 3
    before = memory * x
    row = memory[2]
    memory[1] = x[1]
    row.mul_(x[2])
    return before + memory + memory.T.reshape(3, 4)


def constants_overwritten_by_constants(x: Tensor) -> Tensor:
    memory = WEIGHT.abs()
    first = x * memory
    memory.mul_(2)
    other = WEIGHT.clone()
    other[0] = 5
    return first + x * memory + other


def result_of_constants_filled_later(x: Tensor) -> Tensor:
    memory = torch.empty_like(WEIGHT)
    torch.abs(WEIGHT, out=memory)
    view = memory.view(-1)[4:8]
    view += x[0]
    return memory + WEIGHT.abs()


def views_of_views(x: Tensor) -> Tensor:
    rows = x.unsqueeze(0).expand(1, 3, 4).squeeze(0)
    (same,) = rows.unsqueeze(0).unbind()
    return same.view(3, 4).detach() * nn.Parameter(rows, requires_grad=False) + x.T.T


@pytest.mark.parametrize(
    "compute",
    [
        filled_by_row,
        constant_read_and_then_overwritten,
        constants_overwritten_by_constants,
        result_of_constants_filled_later,
        views_of_views,
    ],
)
def test_programs_repeat_the_computation(compute):
    program, _ = program_of(compute)
    assert not program.reason_not_replayable
    for x in INPUTS:
        expected = compute(x)
        (found,), _ = program.forward([x])
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        found.zero_()


def test_known_views_and_constants_are_not_traced():
    _, tracer = program_of(lambda x: views_of_views(x) + WEIGHT.abs().sum() * WEIGHT.cumsum(0))
    names = [str(one.function) for one in tracer.trace.operations]
    assert not {"aten.detach.default", "aten.abs.default", "aten.cumsum.default", "aten.unbind.int"} & set(names)


def test_a_value_read_through_another_view_is_compared():
    def compute(x: Tensor) -> Tensor:
        memory = torch.zeros(2, 3, 4, dtype=x.dtype)
        memory[0].copy_(x)
        return x + 1 if memory.sum() > 0 else x - 1

    program, _ = program_of(compute)
    sign = torch.sign(INPUTS[0].sum())
    program.forward([INPUTS[0].abs() * sign])
    with pytest.raises(ChangedValueError):
        program.forward([INPUTS[0].abs() * -sign])


def test_overwritten_constants_from_before_cannot_be_replayed():
    memory = WEIGHT.clone()
    program, _ = program_of(lambda x: x * memory.add_(1))
    assert "overwrites" in program.reason_not_replayable
    torch.testing.assert_close(memory, WEIGHT + 1)  # the trace itself, and nothing else, has written
