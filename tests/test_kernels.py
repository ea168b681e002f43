"""One step of any rule on any layer: every query that a kernel answers, on unit vectors and against matrices.

Covers: nrm_plugin.kernels.rule_branch, nrm_plugin.kernels.rule_branch_reader, nrm_plugin.kernels.channel_pairs,
nrm_plugin.kernels.modifier_probes.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from zennit.composites import NameMapComposite
from zennit.core import BasicHook, Hook

from nrm_plugin import Absolute, RelevanceMeasure, at
from nrm_plugin.kernels.rule_branch_kernel import BranchKernel
from nrm_plugin.kernels.vjp_kernel import VjpKernel
from nrm_plugin.measure.joints import edge_matrix
from tests.conftest import slow_but
from tests.nets import LINEAR_RULES, SUM_RULES, zennit_rule
from tests.oracles import AbsoluteShare, Epsilon, Gamma, Route, Rule, ZPlus, normalized
from tests.test_oracles import LINEAR_MODULES, drawn

pytestmark = pytest.mark.zennit

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


@pytest.mark.parametrize("policy", slow_but(POLICIES, POLICIES[0], POLICIES[2]))
@pytest.mark.parametrize(("name", "rule"), CASES)
def test_columns_are_those_of_the_rule_times_the_gain(name: str, rule: Rule, policy: tuple[str, float]) -> None:
    residual, limit = policy
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
def test_a_rule_of_the_user_gives_the_same_numbers_in_the_general_form(name: str, rule: Rule) -> None:
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


def test_a_routing_step_is_its_own_jacobian() -> None:
    pool = nn.MaxPool2d(2)
    a = torch.randn(1, 4, 4, dtype=torch.float64)
    net = nn.Sequential(pool, nn.Flatten())
    units = torch.eye(4, dtype=torch.float64)
    mu = RelevanceMeasure(net, a.expand(4, 1, 4, 4), start=units, composite=NameMapComposite([]))
    assert torch.equal(mu.marginal("input").flatten(1), torch.as_tensor(Route()(pool, a).T))


@pytest.mark.parametrize("rule", [ZPlus(), Gamma()], ids=str)
def test_vectors_that_are_propagated_together_do_not_mix(rule: Rule) -> None:
    module, a = drawn("conv2d grouped")
    mu = measure(module, a, zennit_rule(rule))
    events = [at("output")[0], at("output")[1:], at("output")[:, 0]]
    together = mu.marginal("input", joint=events)
    for row, event in zip(together, events, strict=True):
        assert torch.allclose(row, mu.marginal("input", joint=event), atol=1e-13)


@pytest.mark.parametrize(("residual", "limit"), POLICIES)
@pytest.mark.parametrize("rule", [ZPlus(), Gamma(), Epsilon(0.5)], ids=lambda rule: type(rule).__name__)
def test_column_sums_are_the_sums_of_the_columns(rule: Rule, residual: str, limit: float) -> None:
    module, a = drawn("linear")
    mu = measure(module, a, zennit_rule(rule), residual, limit)
    kernel = mu._recording.graph.vertices[0].step.kernel
    kernel.complete_for(None)
    like = mu._recording.output.detach()
    summed = torch.stack(
        [kernel.pull(unit.expand_as(like)[None])[0][0].sum(1) for unit in torch.eye(like.shape[1]).to(like)]
    )
    assert torch.allclose(kernel.column_sum(like), summed.T.detach(), atol=1e-12)
