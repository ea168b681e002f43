"""Complex numbers may feed a gate, and raise where relevance arrives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.rules import Epsilon

from nrm_plugin import NRMAbsolute, RelevanceMeasure, at
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import Apply, draw


class Rotated(nn.Module):
    """Rotary positions by complex numbers, on queries and keys or on values."""

    def __init__(self, on_values: bool) -> None:
        super().__init__()
        self.on_values, self.q, self.v = on_values, nn.Linear(8, 8), nn.Linear(8, 8)

    def turn(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.3, 0.1, 0.03], dtype=x.dtype)
        turned = torch.view_as_complex(x.unflatten(-1, (4, 2))) * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        q, v = self.turn(self.q(x)), self.v(x)
        return F.scaled_dot_product_attention(q, q, self.turn(v) if self.on_values else v).mean(1)


def test_complex_numbers_may_feed_a_gate():
    net, x = Rotated(on_values=False).double().eval(), draw(2, 5, 8)
    mu = RelevanceMeasure(net, x, 1)
    for layer in mu.layers:
        error = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1
        assert float((error.abs() / mu.variation(layer)).max()) <= 1e-9
    torch.testing.assert_close(mu.marginal("input"), mu.marginal("input", joint=at("v")))


def test_relevance_that_arrives_at_complex_numbers_raises_and_names_their_function():
    mu = RelevanceMeasure(Rotated(on_values=True).double().eval(), draw(2, 5, 8), 1)
    with pytest.raises(UnsupportedOperationError, match=r"(?s)'view_as_complex'.*It makes complex numbers.*layer_map"):
        mu.marginal("input")
    for op, name in (
        (lambda x: torch.fft.fftn(torch.fft.fft(x), dim=1).real, "fft_fft"),
        (lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j), "fft_rfft"),
        (lambda x: torch.stack([torch.complex(x, x), torch.polar(x, x)]).abs()[0], "complex"),
    ):
        with pytest.raises(UnsupportedOperationError, match=f"'{name}'.*It makes complex numbers"):
            RelevanceMeasure(Apply(op).eval(), draw(2, 4, 4), (1, 1)).marginal("input")


class Mixing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.fftn(x, dim=(1, 2)).real


def test_a_module_with_complex_numbers_inside_may_have_a_rule():
    net = nn.Sequential(nn.Linear(4, 4), Mixing(), nn.Flatten(), nn.Linear(20, 2)).double().eval()
    rules = NRMAbsolute(layer_map=[(Mixing, Epsilon(1e-9))])
    x = draw(2, 5, 4)
    mu = RelevanceMeasure(net, x, 1, composite=rules)
    inner, given = mu.marginal(at("1", side="input")), mu.marginal("1")
    hidden = net[0](x).detach()
    image = torch.fft.fftn(hidden, dim=(1, 2)).real
    expected = torch.zeros_like(hidden)
    for i in range(5):
        for j in range(4):
            unit = torch.zeros(1, 5, 4, dtype=torch.float64)
            unit[0, i, j] = 1
            column = torch.fft.fftn(unit, dim=(1, 2)).real
            expected[:, i, j] = (column * hidden[:, i : i + 1, j : j + 1] / image * given).sum((1, 2))
    torch.testing.assert_close(inner, expected, atol=1e-6, rtol=1e-6)
