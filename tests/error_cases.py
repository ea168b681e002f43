"""Cases of invalid arguments: each must raise one error with an informative message and change nothing."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, at
from tests.conftest import untouched


class Halves(nn.Module):
    def forward(self, x):
        return x[:, :6], x[:, 6:]


class Net(nn.Module):
    """Image to five scores; ``lin`` is called twice, ``halves`` returns a tuple, ``unused`` is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu, self.pool = nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2)
        self.flat, self.lin, self.halves = nn.Flatten(), nn.Linear(12, 12), Halves()
        self.block = nn.Sequential(nn.Linear(12, 4), nn.ReLU())
        self.head, self.unused = nn.Linear(4, 5), nn.Linear(1, 1)

    def forward(self, x):
        x = self.flat(self.pool(self.relu(self.conv(x))))
        x = self.relu(self.lin(self.relu(self.lin(x))))
        return self.head(self.block(torch.cat(self.halves(x), 1)))


def build() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def answers(mu):
    event = at("conv")[1] | ~at("block")[2]
    return [*mu.marginal(mu.layers).values(), mu(event), mu(event, given=at("pool"), min_ratio=0), mu.sink("input")]


class MeasuredNet:
    """A model, its input, and an existing measure with its answers to some queries."""

    def __init__(self) -> None:
        self.net = build()
        self.x = torch.randn((2, 1, 4, 4), generator=torch.Generator().manual_seed(1))
        self.mu = RelevanceMeasure(self.net, self.x, 1)
        self.expected = answers(self.mu)

    @contextmanager
    def raises(self, error, *words, model=None):
        """Context that asserts that its body raises exactly this error, with these words, and changes nothing."""
        other = self.net if model is None else model
        with untouched(self.net, self.x), untouched(other), pytest.raises(error) as caught:
            yield
        message = str(caught.value)
        assert type(caught.value) is error, repr(caught.value)
        missing = [word for word in words if word not in message]
        assert not missing, f"{missing} not in: {message}"
        assert len(message) < 700, "a message must be short"
        for old, new in zip(self.expected, answers(self.mu), strict=True):
            torch.testing.assert_close(new, old, rtol=0, atol=0)
        assert not torch.overrides._get_current_function_mode_stack()


def error_cases(*cases):
    """Parametrizes a test over cases ``(name, case, error, *words)``."""
    assert len({name for name, *_ in cases}) == len(cases)
    values = [pytest.param(case, error, words, id=name) for name, case, error, *words in cases]
    return pytest.mark.parametrize(("case", "error", "words"), values)


def mask(*shape):
    return torch.ones(shape, dtype=torch.bool)


class Calls(nn.Module):
    """A linear layer followed by a function or module."""

    def __init__(self, function, module=None) -> None:
        super().__init__()
        self.lin, self.function, self.inner = nn.Linear(16, 4), function, module

    def forward(self, x):
        return self.function(self, self.lin(x.flatten(1)))


def through(module):
    return Calls(lambda self, x: self.inner(x), module)
