"""Programs return what the traced computation returns for other inputs.

Covers: nrm_plugin.plan.simplify, nrm_plugin.plan.merging, nrm_plugin.plan.reshapes, nrm_plugin.plan.fused_norms,
nrm_plugin.plan.operators.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nrm_plugin.plan.program import ChangedValueError, Program
from nrm_plugin.plan.tracer import Tracer

Stage = Callable[[Tensor], tuple[Tensor, ...]]


def program_of(first: Stage, second: Callable[..., tuple[Tensor, ...]], shape: tuple[int, ...]) -> Program:
    """Traces two stages: ``first(x)`` makes the state, whose first tensor is the output, ``second(state, start)``."""
    tracer = Tracer()
    x = torch.randn(shape, dtype=torch.float64)
    inputs = [tracer.placeholder(x)]
    with torch.no_grad(), tracer:
        state = first(x)
        output = state[0].clone()
    start = torch.randn_like(output)
    starts = [tracer.placeholder(start)]
    with torch.no_grad(), tracer:
        results = second(state, start)
    return Program(
        tracer.trace, inputs, [tracer.number(output)], starts, [[tracer.number(result) for result in results]]
    )


def check(
    first: Stage, second: Callable[..., tuple[Tensor, ...]], shape: tuple[int, ...], atol: float = 0.0
) -> Program:
    """Compares a program with the plain computation at three other inputs."""
    torch.manual_seed(0)
    program = program_of(first, second, shape)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64)
        with torch.no_grad():
            state = first(x.clone())
            start = torch.randn_like(state[0])
            expected = (state[0].clone(), *second(state, start.clone()))
        (output,), kept = program.forward([x])
        actual = (output, *program.relevance(kept, [start]))
        for one, other in zip(actual, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=atol)
    return program


def names(program: Program) -> list[str]:
    return [str(one.function) for one in program.operations]


def test_what_depends_on_constants_is_computed_once():
    weight = torch.randn(4, 3, dtype=torch.float64)
    program = check(lambda x: (x @ (weight.abs() + 1).T,), lambda s, r: ((r @ weight.clamp(min=0)) * 2,), (5, 3))
    assert not {"aten.abs.default", "aten.clamp.default"} & set(names(program))


def test_a_filled_tensor_of_any_size_has_its_values():
    size = 200  # 40,000 entries, more than are stored

    def first(x: Tensor) -> tuple[Tensor, ...]:
        return (x + torch.ones_like(x) * 3 + x.new_full(x.shape, 2.0),)

    check(first, lambda s, r: (r * torch.ones_like(r).cumsum(0), r.new_empty(r.shape).copy_(r)), (size, size))


def test_repeated_operations_run_once_unless_their_memory_was_overwritten():
    def second(state: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
        memory = start.exp()
        before = memory.abs()
        again = memory.abs()
        memory.mul_(-3)
        return before, again, memory.abs() + 1, memory

    program = check(lambda x: (x.sin(),), second, (4, 3))
    assert names(program).count("aten.abs.default") == 2


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_copy_is_kept_if_its_source_is_overwritten(overwrite):
    def second(state: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
        source = start * 2
        copy = source.clone()
        if overwrite:
            source.add_(1)
        return copy + 1, source

    program = check(lambda x: (x,), second, (3, 2))
    assert ("aten.clone.default" in names(program)) == overwrite


def test_writes_through_views_reach_the_whole_tensor():
    def second(state: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
        memory = start.exp()
        memory[1:] += 5
        memory.view(-1)[0] = 7
        memory.T[2].mul_(state[1][:, 0])
        return memory, memory.sum(0)

    check(lambda x: (x, x.cos()), second, (4, 3))


def test_a_tensor_that_is_completely_overwritten_is_replaced():
    def second(state: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
        memory = torch.empty_like(start)
        memory.copy_(start * 2)
        other = start.exp()
        other.copy_(state[0])
        kept = other * 3
        other.copy_(start)
        return memory + 1, kept, other * 2

    check(lambda x: (x * x,), second, (4, 3))


def test_leading_dimensions_of_size_one_are_removed():
    def second(state: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
        rows = start.unsqueeze(0)
        scaled = (rows * state[0]).abs().add_(1)
        single = scaled.unbind(0)[0]
        return single.reshape(1, *single.shape).squeeze(0) * 2, scaled, scaled.sum((0, 1))

    program = check(lambda x: (x + 1,), second, (4, 3))
    assert not {"aten.unsqueeze.default", "aten.unbind.int", "aten.squeeze.dim"} & set(names(program))


def test_views_of_tensors_with_other_strides_are_kept():
    check(lambda x: (x,), lambda s, r: (r.T.unsqueeze(0) * 2, r.T.reshape(1, -1).view(3, 4), r.expand(2, 4, 3)), (4, 3))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("reader", ["none", "image", "output"])
def test_batch_normalization_is_fused_with_the_convolution(bias, reader):
    torch.manual_seed(1)
    conv, norm = nn.Conv2d(2, 3, 3, bias=bias).double(), nn.BatchNorm2d(3).double()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    conv.eval(), norm.eval()
    scale = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    fused = (conv.weight * scale.reshape(-1, 1, 1, 1)).detach()

    def first(x: Tensor) -> tuple[Tensor, ...]:
        before = F.conv2d(x, conv.weight, conv.bias)
        after = F.batch_norm(before, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        return (F.relu(after), x, before) if reader == "output" else (F.relu(after), x)

    def second(state: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
        if reader == "image":
            return (F.conv2d(state[1], fused) * start,)
        return (start * (state[2] if reader == "output" else 2),)

    program = check(first, second, (2, 2, 6, 6), atol=1e-12)
    is_fused = reader != "output"
    assert ("aten.native_batch_norm.default" in names(program)) != is_fused
    assert names(program).count("aten.convolution.default") == 1


def test_results_have_memory_of_their_own():
    constant = torch.randn(3, dtype=torch.float64)

    def second(state: tuple[Tensor, ...], start: Tensor) -> tuple[Tensor, ...]:
        return start, start.view(-1), constant, constant.expand(2, 3), state[0]

    program = check(lambda x: (x * 2,), second, (4, 3))
    x, start = torch.randn(4, 3, dtype=torch.float64), torch.ones(4, 3, dtype=torch.float64)
    _, state = program.forward([x])
    first = program.relevance(state, [start])
    expected = [result.clone() for result in first]
    for result in first:
        if all(result.stride()):
            result.fill_(9)
    _, state = program.forward([x])
    for one, other in zip(program.relevance(state, [torch.ones_like(start)]), expected, strict=True):
        assert torch.equal(one, other)


def test_a_value_that_was_read_is_compared():
    def first(x: Tensor) -> tuple[Tensor, ...]:
        return (x + 1,) if x.sum() > 0 else (x - 1,)

    torch.manual_seed(0)
    tracer = Tracer()
    x = torch.ones(3)
    inputs = [tracer.placeholder(x)]
    with tracer:
        (output,) = first(x)
    start = torch.ones(3)
    starts = [tracer.placeholder(start)]
    with tracer:
        result = output * start
    program = Program(tracer.trace, inputs, [tracer.number(output)], starts, [[tracer.number(result)]])
    (found,), state = program.forward([torch.full((3,), 2.0)])
    assert torch.equal(found, torch.full((3,), 3.0))
    assert torch.equal(program.relevance(state, [torch.full((3,), 2.0)])[0], torch.full((3,), 6.0))
    with pytest.raises(ChangedValueError, match="test_program"):
        program.forward([torch.full((3,), -2.0)])


@pytest.mark.parametrize("operation", [torch.rand_like, torch.bernoulli])
def test_random_numbers_cannot_be_replayed(operation):
    program = program_of(lambda x: (x.abs().clamp(max=1),), lambda s, r: (operation(s[0]) * r,), (2, 2))
    assert "random" in program.reason_not_replayable


def test_sums_and_broadcasts_inside_a_sample_need_no_view():
    def first(x):
        return (x.abs(),)

    def second(state, start):
        (x,) = state
        shares = (x * start).unsqueeze(0)
        total = shares.sum(-1, keepdim=True).expand(1, *x.shape)
        return ((shares + total * x.unsqueeze(0)).squeeze(0),)

    program = check(first, second, (3, 5))
    assert not any("view" in name or "unsqueeze" in name or "expand" in name for name in names(program))
    assert "aten.sum.dim_IntList" in names(program)


def test_a_broadcast_that_sets_the_shape_or_is_overwritten_later_remains():
    def first(x):
        return (x * 2,)

    def second(state, start):
        column = start.sum(-1, keepdim=True)
        wide = column.expand(3, 5)
        doubled = wide * 2  # its shape comes from the broadcast
        column.mul_(3)  # changes the broadcast tensor, too
        return doubled, wide * start

    program = check(first, second, (3, 5))
    assert "aten.expand.default" in names(program)


def test_a_program_is_compiled_when_it_first_runs():
    program = program_of(lambda x: (x * 2,), lambda s, r: (r + s[0],), (2, 2))
    assert "_code" not in vars(program)
    _, state = program.forward([torch.ones(2, 2, dtype=torch.float64)])
    code = program._code
    program.relevance(state, [torch.ones(2, 2, dtype=torch.float64)])
    assert program._code is code
