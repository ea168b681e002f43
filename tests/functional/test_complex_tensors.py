"""Functions of complex numbers between real tensors are linear layers with real matrices, which are written out here.

Covers: nrm_plugin.functional.complex_kernels.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonPlus
from zennit.rules import Epsilon

from nrm_plugin import NRMAbsolute, RelevanceMeasure, at, coverage
from nrm_plugin.errors import UnsupportedOperationError
from nrm_plugin.functional import complex_kernels
from tests.conftest import in_turn
from tests.functional.kernel_matrices import Apply, Op, columns, draw, linear_rules


def waves(size: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the discrete Fourier transform: its real part, and minus its imaginary part."""
    angle = 2 * math.pi * torch.outer(torch.arange(size), torch.arange(size)).double() / size
    cosine, sine = angle.cos(), angle.sin()
    return cosine, sine.masked_fill(sine.abs() < 1e-12, 0)


(C4, S4), (C6, S6) = waves(4), waves(6)
FILTER = torch.complex(draw(4, seed=1), draw(4, seed=2))
FILTERS = torch.complex(draw(3, 4, seed=1), draw(3, 4, seed=2))
MODES = torch.complex(draw(3, 2, 2, seed=4), draw(3, 2, 2, seed=5))
HANN = torch.hann_window(4, dtype=torch.float64)


def circular(response: Tensor) -> Tensor:
    """The matrix of a filter, by the convolution with its response."""
    rows = torch.arange(6)
    impulse = (
        torch.cat([response.real, response.real[1:3].flip(0)]),
        torch.cat([response.imag, -response.imag[1:3].flip(0)]),
    )
    kernel = (C6 @ impulse[0] - S6 @ impulse[1]) / 6
    # The first and the last imaginary part do not matter for a real signal.
    kernel = kernel + (S6[:, 0] * impulse[1][0] + S6[:, 3] * impulse[1][3]) / 6
    return kernel[(rows[:, None] - rows) % 6]


def frames(x: Tensor) -> Tensor:
    """Windowed pieces of a signal that is reflected at its ends."""
    return F.pad(x, (2, 2), "reflect").unfold(-1, 4, 2) * HANN


def fourier_operator(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x)
    result = torch.zeros(len(x), 2, 4, dtype=torch.complex128)
    result[:, :, :2] = torch.einsum("nci,cdi->ndi", spectrum[:, :, :2], MODES)
    return torch.fft.irfft(result, n=6)


def fourier_matrix() -> Tensor:
    """The same as a matrix from ``(3, 6)`` to ``(2, 6)``, mode by mode."""
    matrix = torch.zeros(2, 6, 3, 6, dtype=torch.float64)
    for k, weight in ((0, 1.0), (1, 2.0)):
        real = torch.outer(C6[k], C6[k]) + torch.outer(S6[k], S6[k])
        imaginary = torch.outer(C6[k], S6[k]) - torch.outer(S6[k], C6[k])
        for c in range(3):
            for d in range(2):
                w = MODES[c, d, k]
                matrix[d, :, c] += weight / 6 * (w.real * real + w.imag * imaginary)
    return matrix.reshape(12, 18)


def two_modes(x: Tensor) -> Tensor:
    spectrum = torch.fft.rfft(x)
    result = torch.zeros_like(spectrum)
    result[..., 0] = spectrum[..., 0]
    result[..., 1] = 2 * spectrum[..., 1]
    result *= 0.5
    return torch.fft.irfft(result, n=6)


TWO_MODES = 1 / 12 + (torch.outer(C6[1], C6[1]) + torch.outer(S6[1], S6[1])) / 3

LINEAR: dict[str, tuple[Op, Op, tuple[int, ...]]] = {
    "fft.real": (lambda x: torch.fft.fft(x).real, lambda x: x @ C6, (2, 6)),
    "fft.imag": (lambda x: torch.fft.fft(x).imag, lambda x: x @ -S6, (2, 6)),
    "along the first dimension": (lambda x: torch.fft.fft(x, dim=1).real, lambda x: (x.mT @ C4).mT, (4, 3)),
    "FNet": (
        lambda x: torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real,
        lambda x: (x.flatten(1) @ (torch.kron(C4, C6) - torch.kron(S4, S6))).reshape(x.shape),
        (4, 6),
    ),
    "fft2": (
        lambda x: torch.fft.fft2(x, norm="ortho").real,
        lambda x: (x.flatten(1) @ ((torch.kron(C4, C6) - torch.kron(S4, S6)) / 24**0.5)).reshape(x.shape),
        (4, 6),
    ),
    "view_as_real": (
        lambda x: torch.view_as_real(torch.fft.rfft(x)).flatten(-2),
        lambda x: x @ torch.stack([C6[:, :4], -S6[:, :4]], -1).flatten(1),
        (2, 6),
    ),
    "there and back": (lambda x: torch.fft.irfft(torch.fft.rfft(x), n=6), lambda x: x @ torch.eye(6).double(), (2, 6)),
    "a filter": (lambda x: torch.fft.irfft(torch.fft.rfft(x) * FILTER, n=6), lambda x: x @ circular(FILTER).T, (2, 6)),
    "a bank of filters": (
        lambda x: torch.fft.irfft(torch.fft.rfft(x).unsqueeze(-2) * FILTERS, n=6),
        lambda x: (x @ torch.cat([circular(f).T for f in FILTERS], 1)).reshape(*x.shape[:-1], 3, 6),
        (2, 6),
    ),
    "conjugate and quotient": (
        lambda x: torch.fft.ifft(torch.fft.fft(x).conj() / 2j).imag,
        lambda x: x.flip(-1).roll(1, -1) @ (torch.eye(6).double() * -0.5),
        (2, 6),
    ),
    "promoted": (lambda x: (x * 1j * (2 - 3j) + 1j).real, lambda x: x @ (3 * torch.eye(6)).double(), (2, 6)),
    "to complex": (lambda x: torch.fft.fft(x.to(torch.complex128)).real, lambda x: x @ C6, (2, 6)),
    "complex weights": (lambda x: (x.to(torch.complex128) @ FILTERS).real, lambda x: x @ FILTERS.real, (2, 3)),
    "Fourier neural operator": (
        fourier_operator,
        lambda x: (x.flatten(1) @ fourier_matrix().T).reshape(len(x), 2, 6),
        (3, 6),
    ),
    "written in place": (two_modes, lambda x: x @ TWO_MODES, (2, 6)),
    "stft": (
        lambda x: torch.stft(x, 4, 2, window=HANN, return_complex=True).imag,
        lambda x: (frames(x) @ -S4[:, :3]).mT,
        (7,),
    ),
}  # fmt: skip


COMPOSITES = {"absolute": None, "epsilon": linear_rules(), "plus": EpsilonPlus()}


@pytest.mark.parametrize(("name", "rules"), in_turn(LINEAR, COMPOSITES))
def test_a_linear_map_through_complex_numbers_is_a_layer_with_a_real_matrix(name, rules):
    op, by_hand, shape = LINEAR[name]
    x = draw(*shape)
    torch.testing.assert_close(op(x[None]), by_hand(x[None]))
    (actual,), (expected,) = columns(op, [x], COMPOSITES[rules]), columns(by_hand, [x], COMPOSITES[rules])
    assert bool(expected.any())
    if name == "stft":  # its frames are steps in one map and not in the other
        actual, expected = actual.sum(1), expected.sum(1)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_an_inverse_stft_is_the_identity_where_frames_add_up():
    window = torch.hamming_window(4, dtype=torch.float64)

    def there_and_back(x: Tensor) -> Tensor:
        return torch.istft(torch.stft(x, 4, 2, window=window, return_complex=True), 4, 2, window=window)

    (actual,) = columns(there_and_back, [draw(8)], linear_rules())
    (expected,) = columns(lambda x: x @ torch.eye(8).double(), [draw(8)], linear_rules())
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_two_real_tensors_become_one_complex_tensor():
    a, b = draw(2, 6), draw(2, 6, seed=1)
    actual = columns(lambda a, b: torch.fft.fft(torch.complex(a, b)).real, [a, b], linear_rules())
    expected = columns(lambda a, b: torch.cat([a, b], -1) @ torch.cat([C6, S6]), [a, b], linear_rules())
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


MAGNITUDES: dict[str, tuple[Op, Op]] = {
    "abs": (lambda x: torch.fft.rfft(x).abs(), lambda x: torch.hypot(x @ C6[:, :4], x @ -S6[:, :4])),
    "power": (lambda x: torch.fft.rfft(x).abs() ** 2, lambda x: (x @ C6[:, :4]) ** 2 + (x @ -S6[:, :4]) ** 2),
    "of a part": (
        lambda x: torch.abs(torch.fft.rfft(x)[..., 1:3]).log1p(),
        lambda x: torch.hypot(x @ C6[:, 1:3], x @ -S6[:, 1:3]).log1p(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAGNITUDES)
def test_a_magnitude_is_the_norm_of_its_two_parts(name):
    op, by_hand = MAGNITUDES[name]
    (actual,), (expected,) = columns(op, [draw(2, 6)]), columns(by_hand, [draw(2, 6)])
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


class Spectral(nn.Module):
    """A Fourier mixer between layers; the samples of a batch are the samples one at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        x = x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real
        result: Tensor = self.head(self.b(x).relu().flatten(1))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_a_spectral_net_are_those_of_one_sample_at_a_time(dtype):
    torch.manual_seed(2)
    net, x = Spectral().to(dtype).eval(), draw(3, 4, 6).to(dtype)
    mu = RelevanceMeasure(net, x, 1)
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for layer in mu.layers:
        error = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1
        assert float((error.abs() / mu.variation(layer)).max()) <= tolerance
    alone = torch.cat([RelevanceMeasure(net, x[k : k + 1], 1).marginal("input") for k in range(3)])
    torch.testing.assert_close(mu.marginal("input"), alone, rtol=tolerance, atol=tolerance)
    assert coverage(net, x).is_complete


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


@pytest.mark.parametrize("on_values", [False, True])
def test_rotary_positions_by_complex_numbers(on_values):
    net, x = Rotated(on_values).double().eval(), draw(2, 5, 8)
    mu = RelevanceMeasure(net, x, 1)
    for layer in mu.layers:
        error = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1
        assert float((error.abs() / mu.variation(layer)).max()) <= 1e-9
    torch.testing.assert_close(mu.marginal("input"), mu.marginal("input", joint=at("v")))


NONLINEAR: dict[str, Op] = {
    "angle": lambda x: torch.fft.rfft(x).angle(),
    "fft_rfft": lambda x: torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(2 * x), n=6),
    "polar": lambda x: torch.polar(x.abs(), x).real,
    "exp": lambda x: torch.exp(x * 1j).real,
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_functions_that_are_not_linear_in_complex_numbers_raise_where_relevance_arrives(name):
    mu = RelevanceMeasure(Apply(NONLINEAR[name]).eval(), draw(2, 6), start=torch.ones_like(NONLINEAR[name](draw(2, 6))))
    with pytest.raises(UnsupportedOperationError, match=r"which returns complex numbers.*nonlinear.*separate module"):
        mu.marginal("input")


def test_a_matrix_that_is_too_large_raises(monkeypatch):
    monkeypatch.setattr(complex_kernels, "ENTRIES", 100)
    mu = RelevanceMeasure(Apply(lambda x: torch.fft.fft2(x).real).eval(), draw(2, 4, 6), start=draw(2, 4, 6))
    with pytest.raises(UnsupportedOperationError, match=r"'fft_fft2'.*too large.*layer_map"):
        mu.marginal("input")
    mu = RelevanceMeasure(Apply(lambda x: torch.fft.fft(x).real).eval(), draw(2, 4, 6), start=draw(2, 4, 6))
    assert bool(mu.marginal("input").any()), "the matrix of one row is small"


def test_a_part_that_is_overwritten_through_a_view_raises():
    def run(x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        result = torch.zeros_like(spectrum)
        result[..., 1] += spectrum[..., 1]
        return torch.fft.irfft(result, n=6)

    with pytest.raises(UnsupportedOperationError, match=r"through a view.*Write z\[0\]"):
        RelevanceMeasure(Apply(run).eval(), draw(2, 6), start=torch.ones(2, 6).double()).marginal("input")


def test_a_source_that_is_overwritten_in_between_raises():
    def run(x: Tensor) -> Tensor:
        x = x * 1
        spectrum = torch.fft.rfft(x)
        x += 1
        return torch.fft.irfft(spectrum, n=6)

    with pytest.raises(UnsupportedOperationError, match=r"overwritten in place.*Write to a copy"):
        RelevanceMeasure(Apply(run).eval(), draw(2, 6), start=torch.ones(2, 6).double())


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
