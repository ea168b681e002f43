"""Models that draw random numbers in evaluation mode: a warning that names the function, and one draw for all passes.

Covers: nrm_plugin.recording.recording, nrm_plugin.model.checks, nrm_plugin.model.model_protection.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from nrm_plugin import Plan, RelevanceMeasure
from nrm_plugin.errors import ModelStateError, RandomnessWarning

X, X0 = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)), torch.zeros(1, 4)


class Noisy(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last, self.function = nn.Linear(4, 4), nn.Linear(4, 3), function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.first(x)))


DRAWS = {
    "gumbel_softmax": F.gumbel_softmax,
    "rand_like": lambda h: h * torch.rand_like(h),
    "randn": lambda h: h * torch.randn(h.shape),
    "bernoulli": lambda h: h * (torch.bernoulli(torch.full_like(h, 0.5)) + 1),
    "normal_": lambda h: h * torch.empty_like(h).normal_(),
    "multinomial": lambda h: h[:, torch.multinomial(torch.ones(4), 4)],
    "randperm": lambda h: h[:, torch.randperm(4)],
}


@pytest.mark.parametrize("reference", [None, X0])
@pytest.mark.parametrize("name", DRAWS)
def test_a_draw_in_evaluation_mode_is_named(name, reference):
    with pytest.warns(RandomnessWarning, match=f"evaluation mode: '{name}' in 'the model'"):
        RelevanceMeasure(Noisy(DRAWS[name]).eval(), X, 1, reference=reference)


def test_models_that_draw_nothing_give_no_warning():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), Noisy(lambda h: F.dropout(h, training=False))).eval()
    with warnings.catch_warnings(action="error"):
        RelevanceMeasure(net, X, 1)


@pytest.mark.medium
@pytest.mark.parametrize("reference", [None, X0])
@pytest.mark.parametrize("name", DRAWS)
@pytest.mark.filterwarnings("ignore::nrm_plugin.errors.RandomnessWarning")
def test_all_passes_repeat_one_draw(name, reference):
    net = Noisy(DRAWS[name]).eval()
    state = torch.get_rng_state()
    expected = RelevanceMeasure(net, X, 1, reference=reference)
    assert torch.equal(torch.get_rng_state(), state)
    outputs = net(X)
    torch.testing.assert_close(expected.outputs, outputs)
    torch.set_rng_state(state)
    total = expected.marginal("first").sum(1) + expected.sink("first") + expected.bypass("first")
    torch.testing.assert_close(total, torch.ones(3), rtol=0, atol=1e-4)
    parts = RelevanceMeasure(net, X, 1, reference=reference, max_memory=100)
    assert parts.parts > 1
    torch.testing.assert_close(parts.marginal("input"), expected.marginal("input"), rtol=0, atol=1e-4)


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore::nrm_plugin.errors.RandomnessWarning")
@pytest.mark.parametrize("name", DRAWS)
def test_plans_do_not_freeze_a_draw(name):
    net = Noisy(DRAWS[name]).eval()
    plan = Plan(net, X)
    for seed in range(5):
        torch.manual_seed(seed)
        expected = RelevanceMeasure(net, X, 1)
        mu = plan(X, 1)
        torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"), rtol=0, atol=1e-6)
        torch.testing.assert_close(mu.outputs, expected.outputs)


@pytest.mark.parametrize("reference", [None, X0])
@pytest.mark.parametrize("function", [lambda h: F.dropout(h, 0.5, True), lambda h: F.rrelu(h, training=True)])
def test_functions_in_training_mode_raise(function, reference):
    with pytest.raises(ModelStateError, match="called with training=True"):
        RelevanceMeasure(Noisy(function).eval(), X, 1, reference=reference)
