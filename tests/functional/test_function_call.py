"""Kernels of functions of one's own: by the methods of a call, and by kernel classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus
from zennit.rules import Epsilon, Gamma, ZPlus

from nrm_plugin import Normalized, NRMAbsolute, Plan, RelevanceMeasure, register_kernel
from nrm_plugin.errors import UnsupportedRuleError
from nrm_plugin.functional import BroadcastKernel, FunctionCall, Kernel, SplitKernel
from tests.functional.kernel_matrices import NONE, ROW, A, Apply, B, alone, check, columns, draw, eye, spread

pytestmark = pytest.mark.usefixtures("own_kernels")
Factory = Callable[[FunctionCall], Kernel]


def registered(function: Callable[..., Tensor], factory: Factory) -> Callable[..., Tensor]:
    register_kernel(function)(factory)
    return function


# -- the methods of a call --------------------------------------------------------------------------------------------


def test_identity_passes_relevance_to_the_first_input():
    check(columns(registered(torch.special.entr, lambda call: call.identity()), [A.abs()]), [eye(6)])
    check(columns(registered(torch.copysign, lambda call: call.identity()), [A, B]), [eye(6), NONE])


def test_identity_may_pass_relevance_to_another_input_that_is_broadcast():
    op = registered(torch.copysign, lambda call: call.identity(to=1))
    check(columns(op, [A, ROW]), [NONE, spread(torch.ones(2, 3).double(), ROW)])


def test_split_gives_each_input_its_share():
    op = registered(torch.copysign, lambda call: call.split([0.75, 0.25]))
    check(columns(op, [A, ROW]), [0.75 * eye(6), spread(torch.full((2, 3), 0.25).double(), ROW)])
    share = A.abs() / (A.abs() + B.abs())

    def by_size(call: FunctionCall) -> Kernel:
        a, b = (value.abs() for value in call.values)
        return call.split([a / (a + b), b / (a + b)])

    check(columns(registered(torch.atan2, by_size), [A, B]), [spread(share, A), spread(1 - share, B)])


def test_what_shares_leave_of_one_is_the_residual():
    op = registered(torch.copysign, lambda call: call.split([0.5, 0.125]))
    check(columns(op, [A, B]), [eye(6) / 2, eye(6) / 8])  # the rest is in the sink
    mu = RelevanceMeasure(
        Apply(op).eval(), (A[None], B[None]), start=A[None] * 0 + 1, composite=Normalized(NRMAbsolute())
    )
    assert not mu.sink("input[0]").any()
    torch.testing.assert_close(mu.marginal("input[0]"), 4 * mu.marginal("input[1]"))


def test_split_needs_a_share_for_each_input():
    op = registered(torch.copysign, lambda call: call.split([1]))
    with pytest.raises(
        ValueError, match=r"got 1 shares, but 'copysign' has 2 inputs.*one share for each of call\.values"
    ):
        columns(op, [A, B])


def test_route_passes_relevance_to_the_entry_that_was_copied():
    op = registered(torch.maximum, lambda call: call.route())
    larger = (A > B).double()
    check(columns(op, [A, B]), [spread(larger, A), spread(1 - larger, B)])


def test_outputs_that_are_not_copied_have_a_residual():
    op = registered(torch.tril, lambda call: call.route())
    x = draw(3, 3)
    check(columns(op, [x]), [torch.diag(torch.ones(3, 3).tril().flatten()).double()])


def test_by_rule_applies_a_rule_of_zennit_to_a_linear_function():
    x, epsilon = draw(2, 4), 0.25
    op = registered(torch.logcumsumexp, lambda call: call.by_rule(Epsilon(epsilon), run=lambda x: x.cumsum(-1)))
    part = torch.kron(eye(2), torch.ones(4, 4).tril().double()) * x.flatten()
    total = part.sum(1, keepdim=True)
    expected = part / (total + epsilon * total.sign())
    check([alone(lambda x: op(x, -1), x)], [expected])


# -- kernel classes ---------------------------------------------------------------------------------------------------


def test_a_function_may_return_a_broadcast_kernel():
    op = registered(torch.copysign, lambda call: BroadcastKernel([value.shape for value in call.values], signal=1))
    check(columns(op, [A, B]), [NONE, eye(6)])


def test_a_function_may_return_a_split_kernel():
    def shares(call: FunctionCall) -> Kernel:
        a, b = call.values
        return SplitKernel([torch.ones_like(a), torch.zeros_like(b)], [a.shape, b.shape], None, is_stochastic=True)

    check(columns(registered(torch.copysign, shares), [A, B]), [eye(6), NONE])


class Reversed(Kernel):
    """Passes relevance to the entries in reverse order."""

    is_stochastic = True

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        return (relevance.flip(-1),)

    pull_absolute = pull


def test_a_function_may_return_a_kernel_of_its_own():
    op = registered(torch.special.entr, lambda call: Reversed())
    check(columns(op, [A.abs()]), [torch.kron(eye(2), eye(3).flip(1))])


# -- functions that are not linear ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["entr", "sigmoid", "softplus"])
@pytest.mark.parametrize("rule", [Epsilon(1e-6), ZPlus(), Gamma(0.25)])
def test_by_rule_rejects_functions_that_are_not_linear(name, rule):
    function = {"entr": torch.special.entr, "sigmoid": torch.sigmoid, "softplus": nn.functional.softplus}[name]
    op = registered(function, lambda call: call.by_rule(rule))
    with pytest.raises(UnsupportedRuleError, match=rf"{name}.* not linear in its input.* is_linear=False"):
        columns(op, [A.abs()])


def test_by_rule_rejects_functions_with_a_constant():
    op = registered(torch.special.entr, lambda call: call.by_rule(Epsilon(), run=lambda x: x.cumsum(-1) + 1))
    with pytest.raises(UnsupportedRuleError, match="not linear"):
        columns(op, [A.abs()])


def test_by_rule_rejects_a_function_that_is_slightly_curved():
    op = registered(torch.special.entr, lambda call: call.by_rule(Epsilon(), run=lambda x: x + 1e-3 * x * x))
    with pytest.raises(UnsupportedRuleError, match="not linear"):
        columns(op, [A.abs().float()])


def test_by_rule_accepts_zeros_and_linear_functions_of_any_size():
    op = registered(torch.special.entr, lambda call: call.by_rule(Epsilon(1e-9), run=lambda x: 3 * x.flip(-1)))
    for x in (A * 0, 1e-30 * A.abs(), 1e15 * A.abs()):
        columns(op, [x])


def test_totals_of_a_function_that_is_not_linear_are_right_when_the_kernel_says_so():
    op = registered(torch.special.entr, lambda call: call.by_rule(Epsilon(1e-6), is_linear=False))
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), Apply(op), nn.Linear(4, 2)).double()
    mu = RelevanceMeasure(net, A, 1, composite=EpsilonPlus(), residual="sink")
    for layer in mu.layers:
        total = mu.marginal(layer).flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer)
        torch.testing.assert_close(total, torch.ones(2).double())


def test_a_plan_repeats_a_kernel_by_a_rule_without_its_check():
    op = registered(torch.special.entr, lambda call: call.by_rule(Epsilon(1e-6), run=lambda x: x.cumsum(-1)))
    net = nn.Sequential(nn.Linear(3, 4), nn.Sigmoid(), Apply(op), nn.Linear(4, 2)).double()
    plan = Plan(net, A)
    for x in (A, B, -A, -B):
        torch.testing.assert_close(plan(x, 1).marginal("input"), RelevanceMeasure(net, x, 1).marginal("input"))
    assert "function_call" not in plan.explain()  # no condition on the values of the probe
