"""One step: MEASURE section 6, identity 0, and everything that is made from a kernel, on unit vectors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import zennit.rules
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.core import BasicHook, Hook

from nrm_plugin import Absolute, RelevanceMeasure, at
from nrm_plugin.errors import NRMError
from nrm_plugin.kernels.base import (
    BranchKernel,
    Kernel,
    VjpKernel,
    blocks,
    dense_absolute,
    gain,
    linear_in_relevance,
    scale_of,
    scales,
)
from nrm_plugin.measure.joints import edge_matrix
from tests.nets import LINEAR_RULES, SUM_RULES, zennit_rule
from tests.oracles import AbsoluteShare, Epsilon, Gamma, Route, Rule, ZPlus, normalized
from tests.test_oracles import LINEAR_MODULES, drawn

POLICIES = [("sink", 2.0), ("redistribute", 1.0), ("redistribute", 2.0), ("redistribute", math.inf)]
CASES = [
    pytest.param(name, rule, id=f"{name}-{rule}")
    for name, (module, _) in LINEAR_MODULES.items()
    for rule in (LINEAR_RULES if any(True for _ in module.parameters()) else SUM_RULES)
]
WEIGHTED = [param for param in CASES if hasattr(LINEAR_MODULES[param.values[0]][0], "weight")]


def measure(module: nn.Module, a: Tensor, hook: Hook, residual: str = "sink", limit: float = 2.0) -> RelevanceMeasure:
    """The measure of one module, started at every unit vector of its output: one sample for each column."""
    shape = module(a[None]).shape[1:]
    units = torch.eye(shape.numel(), dtype=a.dtype).reshape(-1, *shape)
    net = nn.Sequential()
    net.add_module("step", module)
    composite = NameMapComposite([(["step"], hook)])
    inputs = a.expand(len(units), *a.shape)
    return RelevanceMeasure(net, inputs, start=units, composite=composite, residual=residual, gain_limit=limit)


@pytest.mark.parametrize(("residual", "limit"), POLICIES)
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_columns_are_those_of_the_rule_times_the_gain(name: str, rule: Rule, residual: str, limit: float) -> None:
    module, a = drawn(name)
    expected, sink = normalized(rule(module, a), residual, limit)
    mu = measure(module, a, zennit_rule(rule), residual, limit)
    columns = mu.marginal("input").flatten(1)
    scale = max(1.0, float(np.abs(expected).sum(0).max()))
    assert float((columns - torch.as_tensor(expected.T)).abs().max()) <= 1e-10 * scale
    assert float((mu.sink("input") - torch.as_tensor(sink)).abs().max()) <= 1e-10 * scale
    assert float((columns.sum(1) + mu.sink("input") - 1).abs().max()) <= 1e-10 * scale


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_walk_variation_of_one_step_is_the_absolute_column_sum(name: str, rule: Rule) -> None:
    module, a = drawn(name)
    expected, sink = normalized(rule(module, a), "redistribute", 2.0)
    mu = measure(module, a, zennit_rule(rule), "redistribute", 2.0)
    columns = torch.as_tensor(np.abs(expected).sum(0) + np.abs(sink))
    assert torch.allclose(mu.walk_variation(), columns, rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_a_rule_written_by_the_user_takes_the_general_path_to_the_same_numbers(name: str, rule: Rule) -> None:
    module, a = drawn(name)
    built_in = zennit_rule(rule)

    class Own(BasicHook):
        """The same modifiers with a reducer that only fits whole tensors."""

    own = Own(
        built_in.input_modifiers,
        built_in.param_modifiers,
        built_in.output_modifiers,
        built_in.gradient_mapper,
        lambda inputs, gradients: built_in.reducer(inputs, gradients).reshape(inputs[0].shape) + 0 * inputs[0].flip(0),
    )
    fast, general = measure(module, a, built_in), measure(module, a, own)
    own.output_modifiers = [lambda output: output.clone()] * len(own.input_modifiers)
    slow = measure(module, a, own)
    assert isinstance(slow._recording.graph.vertices[0].step.kernel, VjpKernel)
    assert isinstance(fast._recording.graph.vertices[0].step.kernel, BranchKernel)
    for mu in (general, slow):
        assert torch.allclose(mu.marginal("input"), fast.marginal("input"), atol=1e-9)
        assert torch.allclose(mu.sink("input"), fast.sink("input"), atol=1e-9)


@pytest.mark.parametrize(("name", "rule"), WEIGHTED)
def test_the_edge_matrix_is_that_of_masked_passes(name: str, rule: Rule) -> None:
    module, a = drawn(name)
    mu = measure(module, a, zennit_rule(rule), "redistribute", 2.0)
    recording = mu._recording
    relevance = mu.marginal("output")
    weights = edge_matrix(recording, 0, relevance)
    masked = mu.joint("output", "input")
    assert float((weights - masked).abs().max()) <= 1e-9 * max(1.0, float(masked.abs().max()))


@pytest.mark.parametrize("name", LINEAR_MODULES)
def test_absolute_shares_are_absolute_shares(name: str) -> None:
    module, a = drawn(name)
    expected, sink = normalized(AbsoluteShare("equal")(module, a), "redistribute", 2.0)
    mu = measure(module, a, Absolute(floor=1e-12), "redistribute", 2.0)
    assert torch.allclose(mu.marginal("input").flatten(1), torch.as_tensor(expected.T), atol=1e-5)
    assert torch.allclose(mu.sink("input"), torch.as_tensor(sink), atol=1e-5)


def test_the_gain_is_continuous_bounded_and_never_less_than_one() -> None:
    c = torch.linspace(-3, 3, 60001, dtype=torch.float64)
    for limit in (1.0, 1.5, 2.0, 10.0):
        g = gain(c, limit)
        assert float(g.diff().abs().max()) < 1e-3 * limit**2
        assert float(g[c <= 1].min()) >= 1.0
        assert float(g.max()) <= limit + 1e-12
        assert torch.equal(g[c <= 0], torch.ones_like(g[c <= 0]))
        assert torch.allclose(g[c >= 1 / limit] * c[c >= 1 / limit], torch.ones_like(c[c >= 1 / limit]))
    assert torch.allclose(gain(c, math.inf)[c > 0] * c[c > 0], torch.ones_like(c[c > 0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [1.0, 1.5, 3.0, math.inf])
def test_what_the_gain_makes_up_for_leaves_nothing_to_the_sink(limit: float, dtype: torch.dtype) -> None:
    raised = torch.cat([torch.rand(500, dtype=dtype) * 4 + 1 / limit, torch.tensor([1 / limit, 0.9, 1.0]).to(dtype)])
    raised = raised[(raised >= 1 / limit) & (raised > 0)]
    rescaled = scale_of("redistribute", limit)
    factor, rest = rescaled(raised)
    assert rest is None
    assert torch.equal(factor, 1 / raised)
    mixed = torch.cat(
        [raised, torch.linspace(-2, 0, 50, dtype=dtype), torch.linspace(0, 1 / limit, 50, dtype=dtype)[1:-1]]
    )
    factor, rest = rescaled(mixed)
    assert not rest[: len(raised)].any()  # exactly, also where 1 - g c is not
    torch.testing.assert_close(factor * mixed + rest, torch.ones_like(mixed))
    for column_sum in (raised, mixed, mixed[:0]):
        factor, rest = scale_of("sink", limit)(column_sum)
        assert factor is None
        assert torch.equal(rest, 1 - column_sum)
        pieces = scales(column_sum.repeat(200, 1), rescaled)
        whole = rescaled(column_sum.repeat(200, 1))
        for piece, part in zip(pieces, whole, strict=True):
            assert (piece is None) == (part is None)
            assert part is None or torch.equal(piece, part)


def test_a_routing_step_is_its_own_jacobian() -> None:
    pool = nn.MaxPool2d(2)
    a = torch.randn(1, 4, 4, dtype=torch.float64)
    net = nn.Sequential(pool, nn.Flatten())
    units = torch.eye(4, dtype=torch.float64)
    mu = RelevanceMeasure(net, a.expand(4, 1, 4, 4), start=units, composite=NameMapComposite([]))
    assert torch.equal(mu.marginal("input").flatten(1), torch.as_tensor(Route()(pool, a).T))


@pytest.mark.parametrize("rule", [ZPlus(), Gamma()], ids=str)
def test_several_vectors_at_once_are_each_alone(rule: Rule) -> None:
    module, a = drawn("conv2d grouped")
    mu = measure(module, a, zennit_rule(rule))
    events = [at("output")[0], at("output")[1:], at("output")[:, 0]]
    together = mu.marginal("input", joint=events)
    for row, event in zip(together, events, strict=True):
        assert torch.allclose(row, mu.marginal("input", joint=event), atol=1e-13)


class Gated(Kernel):
    """Hands half of the relevance to the signal, or none, and none to a gate: constant zeros."""

    def __init__(self, share: float | Tensor | None) -> None:
        self.share = share

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        zeros = torch.zeros(relevance.shape, dtype=relevance.dtype)
        return zeros if self.share is None else self.share * relevance, zeros

    pull_absolute = pull


@pytest.mark.parametrize(("share", "expected"), [(0.5, 0.5), (None, 0.0)])
def test_column_sums_of_a_kernel_that_hands_constant_zeros_to_a_gate(share, expected):
    like = torch.ones(2, 3, dtype=torch.float64)
    assert torch.equal(Gated(share).column_sum(like), torch.full_like(like, expected))


SIGNLESS = torch.rand((2, 2, 3), dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("push", ["push", "push_bound"])
@pytest.mark.parametrize("share", [0.5, None])
def test_values_at_a_gate_are_not_handed_up(push: str, share: float | None) -> None:
    up = getattr(Gated(None if share is None else torch.tensor(share, dtype=torch.float64)), push)
    expected = SIGNLESS * (share or 0.0)
    assert torch.equal(up((SIGNLESS, SIGNLESS), SIGNLESS.shape[1:]), expected)
    assert torch.equal(up((SIGNLESS, None), SIGNLESS.shape[1:]), expected)
    assert torch.equal(up((None, SIGNLESS), SIGNLESS.shape[1:]), torch.zeros_like(SIGNLESS))


@pytest.mark.parametrize("size", [1, 4, 6, 11, 1000])
@pytest.mark.parametrize(
    "shape", [(), (7,), (20,), (3, 5), (2, 3, 4), (1, 40), (5, 1, 1), (4, 7, 3, 2), (0, 3), (9, 2)]
)
def test_blocks_have_every_entry_once(shape: tuple[int, ...], size: int) -> None:
    like = torch.zeros(shape)
    found = list(blocks(like, size))
    for block in found:
        like[block] += 1
    assert torch.equal(like, torch.ones(shape))
    assert len(found) == 1 or like.numel() > size
    if like.ndim > 1 and like.numel():
        most = max(size, math.prod(shape[2:]))
        assert all(like[block].numel() <= most for block in found)
        assert max(like[block].numel() for block in found) > min(like.numel(), size) / 2


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 64])
def test_absolute_values_are_formed_of_any_chunks_up_to_a_limit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    T, U = torch.randn((2, 5, 4), dtype=torch.float64, generator=draw)
    kernel = VjpKernel(lambda relevance: (relevance @ T.T, relevance @ U.T))
    relevance = torch.rand((3, 2, 4), dtype=torch.float64, generator=draw)
    monkeypatch.setattr("nrm_plugin.kernels.base.DENSE_LIMIT", 4)
    for found, matrix in zip(dense_absolute(kernel, relevance, chunk), (T, U), strict=True):
        assert torch.allclose(found, relevance @ matrix.abs().T)
    monkeypatch.setattr("nrm_plugin.kernels.base.DENSE_LIMIT", 3)
    with pytest.raises(NRMError, match=r"4 outputs a sample.*stops at 3"):
        dense_absolute(kernel, relevance, chunk)


@pytest.mark.parametrize(("residual", "limit"), POLICIES)
@pytest.mark.parametrize("rule", [ZPlus(), Gamma(), Epsilon(0.5)], ids=lambda rule: type(rule).__name__)
def test_a_kernel_knows_the_sums_of_its_own_columns(rule: Rule, residual: str, limit: float) -> None:
    module, a = drawn("linear")
    mu = measure(module, a, zennit_rule(rule), residual, limit)
    kernel = mu._recording.graph.vertices[0].step.kernel
    kernel.reach(None)
    like = mu._recording.output.detach()
    summed = torch.stack(
        [kernel.pull(unit.expand_as(like)[None])[0][0].sum(1) for unit in torch.eye(like.shape[1]).to(like)]
    )
    assert torch.allclose(kernel.column_sum(like), summed.T.detach(), atol=1e-12)


@pytest.mark.parametrize("second", [-0.6, 0.6])
def test_absolute_values_of_branches_that_share_entries(second: float) -> None:
    """Two branches read the same inputs by the same weights; their factors differ, and cancel or not."""
    w = torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, -1.0]], dtype=torch.float64)
    a = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    module = nn.Linear(3, 2, bias=False).double()
    module.weight.data.copy_(w)
    shared = BasicHook(
        [lambda x: x] * 2,
        [lambda weight, name: weight] * 2,
        [lambda z: z] * 2,
        lambda grad, outputs: [grad / (1 + outputs[0].abs()), second * grad / (2 + outputs[1].abs())],
        lambda inputs, gradients: sum(x * g for x, g in zip(inputs, gradients, strict=True)),
    )
    z = w @ a
    T = w * a * (1 / (1 + z.abs()) + second / (2 + z.abs()))[:, None]
    mu = measure(module, a, shared)
    assert torch.allclose(mu.marginal("input"), T)
    assert torch.allclose(mu.walk_variation(), T.abs().sum(1) + (1 - T.sum(1)).abs())


@pytest.mark.parametrize("outputs", [1, 2])
def test_absolute_values_of_weights_that_are_no_multiples(outputs: int) -> None:
    """Of each weight 0.3 more, which may turn its sign."""
    module = nn.Linear(3, outputs, bias=False).double()
    module.weight.data.copy_(torch.tensor([[1.0, -0.2, -2.0], [0.1, 2.0, -0.1]], dtype=torch.float64)[:outputs])
    a = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    moved = BasicHook(
        [lambda x: x],
        [lambda weight, name: weight + 0.3],
        [lambda z: z],
        lambda grad, outputs: [grad / (1 + outputs[0].abs())],
        lambda inputs, gradients: inputs[0] * gradients[0],
    )
    weight = module.weight.detach() + 0.3
    T = weight * a / (1 + (weight @ a).abs())[:, None]
    mu = measure(module, a, moved)
    assert torch.allclose(mu.marginal("input"), T)
    assert torch.allclose(mu.walk_variation(), T.abs().sum(1) + (1 - T.sum(1)).abs())


def waiting_for_negative_outputs() -> Kernel:
    """γ at outputs 3 and -3, before relevance arrived anywhere."""
    module = nn.Linear(2, 2, bias=False).double()
    module.weight.data.copy_(torch.tensor([[2.0, 0.5], [-2.0, -0.5]]))
    net = nn.Sequential(module)
    composite = NameMapComposite([(["0"], zennit.rules.Gamma(0.25))])
    mu = RelevanceMeasure(net, torch.tensor([[1.0, 2.0]], dtype=torch.float64), 0, composite=composite)
    return mu._recording.graph.vertices[0].step.kernel


@pytest.mark.parametrize("value", [1.0, -1.0, 1e-30])
def test_branches_are_made_where_relevance_arrives_and_not_before(value: float) -> None:
    kernel = waiting_for_negative_outputs()
    at_each = value * torch.eye(2, dtype=torch.float64)[:, None, None]  # as K = N = 1
    assert not kernel.reach(at_each[0])
    assert not kernel.reach(torch.zeros_like(at_each[0]))
    assert kernel.reach(at_each[1])
    assert not kernel.reach(at_each[1])
    assert not kernel.reach(None)
    assert waiting_for_negative_outputs().reach(None)
    told: list[bool] = []
    hidden = waiting_for_negative_outputs()
    torch.vmap(lambda relevance: [told.append(hidden.reach(relevance)), relevance][1])(at_each)
    assert told == [True], "what is carried in one go does not tell its values, so that all may be needed"


@pytest.mark.parametrize(
    ("ready", "late", "deficit"),
    [((0.3, 1.0), (1.0, 0.2), (0.3, 0.2)), (None, (1.0, 1.0), None), ((1.0, 1.0), None, None), (None, None, None)],
)
def test_the_deficit_of_branches_that_were_waited_for(ready, late, deficit) -> None:
    """Each kind of branch leaves all of the columns of the other kind; None is no deficit anywhere."""
    rest, later = (None if c is None else torch.tensor([c], dtype=torch.float64) for c in (ready, late))
    kernel = BranchKernel(([], rest), True, lambda: ([], later), torch.zeros(1, 3, dtype=torch.float64))
    assert kernel.reach(None)
    like = torch.zeros(1, 2, dtype=torch.float64)
    expected = (0.0, 0.0) if deficit is None else deficit
    assert (kernel.deficit is None) == (deficit is None)
    torch.testing.assert_close(kernel.column_sum(like), 1 - torch.tensor([expected], dtype=torch.float64))


def test_column_sums_of_branches_that_were_waited_for_are_added() -> None:
    sums = torch.tensor([[0.3, 0.0]]), torch.tensor([[0.0, -0.5]])
    kernel = BranchKernel(([], sums[0]), False, lambda: ([], sums[1]), torch.zeros(1, 3))
    assert torch.equal(kernel.column_sum(torch.zeros(1, 2)), torch.tensor([[0.3, 0.0]]))
    assert kernel.reach(None)
    assert torch.equal(kernel.column_sum(torch.zeros(1, 2)), torch.tensor([[0.3, -0.5]]))


@pytest.mark.parametrize("size", [1e-9, 1.0, 1e9])
def test_whether_a_rule_is_linear_does_not_depend_on_its_size(size: float) -> None:
    like = torch.ones((2, 5), dtype=torch.float64)
    assert linear_in_relevance(VjpKernel(lambda relevance: (size * relevance, 0 * relevance)), like)
    assert not linear_in_relevance(VjpKernel(lambda relevance: (size * relevance, size * relevance.relu())), like)
