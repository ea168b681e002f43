"""The source of a program reuses variables, and its constants have the values of the trace."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nrm_plugin.plan.program import Program
from nrm_plugin.plan.tracer import Tracer


def program_of(compute, x: Tensor) -> Program:
    tracer = Tracer()
    inputs = [tracer.placeholder(x)]
    with torch.no_grad(), tracer:
        output = compute(x)
    start = torch.ones_like(output)
    starts = [tracer.placeholder(start)]
    with torch.no_grad(), tracer:
        result = output * start
    return Program(tracer.trace, inputs, [tracer.number(output)], starts, [[tracer.number(result)]])


def test_a_chain_of_operations_needs_one_variable_and_frees_its_tensors():
    def compute(x: Tensor) -> Tensor:
        for _ in range(20):
            x = torch.exp(-x.abs())
        return x

    x = torch.rand(3, dtype=torch.float64)
    program = program_of(compute, x)
    (output,), _ = program.forward([x])
    assert torch.equal(output, compute(x))
    assert program._code.forward.__code__.co_nlocals <= 3  # the input, the values and the list of checks


def test_branches_that_live_at_the_same_time_have_variables_of_their_own():
    def compute(x: Tensor) -> Tensor:
        parts = [torch.sin(x * factor) for factor in (2.0, 3.0, 5.0)]
        first, *rest = (part / sum(parts) for part in parts)
        return first.exp() + sum(one * first for one in rest) - parts[1]

    x, other = torch.rand(2, 5, dtype=torch.float64)
    program = program_of(compute, x)
    (output,), state = program.forward([other])
    assert torch.equal(output, compute(other))
    assert torch.equal(program.relevance(state, [torch.full_like(x, 2)])[0], 2 * output)


def test_zeros_of_both_signs_and_infinite_values_remain():
    def compute(x: Tensor) -> Tensor:
        largest = (x / 0.0).max().item()
        return torch.stack([1 / (x * 0.0), 1 / (x * -0.0)]) if math.isinf(largest) else x

    x = torch.tensor([1.0, 2.0])
    (output,), _ = program_of(compute, x).forward([x * 3])
    assert torch.equal(output, compute(x))
