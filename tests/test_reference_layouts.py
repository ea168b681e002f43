"""Differences in networks of unusual layout, against multipliers that are written out for one sample at a time.

Covers: nrm_plugin.measure.difference_start, nrm_plugin.functional.recurrent, nrm_plugin.functional.attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import RelevanceMeasure, at
from tests.conftest import slow_but
from tests.differences import Product, Times, draw, layer_norm, multipliers, slope, softmax

TIGHT = {"rtol": 0.0, "atol": 1e-10}
Pairs = Callable[[Tensor], Tensor]


def check(mu: RelevanceMeasure, x: Tensor, reference: Tensor, functions: list[Pairs], tap=None) -> None:
    """Compares marginals and outputs with the function of pairs of each sample."""
    relevance = mu.marginal(at("input") if tap is None else tap)
    for n, function in enumerate(functions):
        multiplier, difference = multipliers(function, x[n], reference[n])
        torch.testing.assert_close(mu.output[n], difference, **TIGHT)
        expected = multiplier * (x[n] - reference[n]) / difference
        size = float(expected.abs().max().clamp(min=1))
        torch.testing.assert_close(relevance[n], expected, rtol=0, atol=1e-10 * size)


# -- recurrent layers with the time in the first dimension ------------------------------------------------------------


class Recurrent(nn.Module):
    """Two bidirectional layers in torch's default layout, and a linear layer on some of their outputs."""

    def __init__(self, read: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.out, self.read = nn.LSTM(3, 4, 2, bidirectional=True).double(), nn.Linear(8, 2).double(), read

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        if self.read == "packed":
            x = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 4]), enforce_sorted=False)
        outputs, (hidden, _) = self.layers(x)
        if self.read == "packed":
            return self.out(nn.utils.rnn.pad_packed_sequence(outputs)[0].sum(0))
        return self.out(outputs[-1] if self.read == "last time" else hidden[-2:].transpose(0, 1).flatten(1))


def direction(lstm: nn.LSTM, x: Tensor, suffix: str) -> Tensor:
    """One direction of one layer, for pairs ``(2, T, F)``."""
    w, u, b, c = (getattr(lstm, name + suffix).detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    times = list(range(x.shape[1]))
    hidden, cell, outputs = x.new_zeros(2, lstm.hidden_size), None, {}
    for t in times[::-1] if suffix.endswith("reverse") else times:
        i, f, g, o = (x[:, t] @ w.T + b + hidden @ u.T + c).chunk(4, -1)
        written = Times.apply(slope(i, torch.sigmoid), slope(g, torch.tanh))
        cell = written if cell is None else Times.apply(slope(f, torch.sigmoid), cell) + written
        outputs[t] = hidden = Times.apply(slope(o, torch.sigmoid), slope(cell, torch.tanh))
    return torch.stack([outputs[t] for t in times], 1)


def recurrent_pairs(net: Recurrent, length: int) -> Pairs:
    def function(pair: Tensor) -> Tensor:
        h = pair[:, :length]
        for number in range(2):
            h = torch.cat([direction(net.layers, h, f"_l{number}{end}") for end in ("", "_reverse")], -1)
        read = {
            "last time": lambda: h[:, -1],
            "last states": lambda: torch.cat([h[:, -1, :4], h[:, 0, 4:]], -1),
            "packed": lambda: h.sum(1),
        }[net.read]()
        return read @ net.out.weight.detach()[1]

    return function


@pytest.mark.medium
@pytest.mark.parametrize("read", ["last time", "last states", "packed"])
def test_recurrent_layers_with_time_first(read):
    net, x, x0 = Recurrent(read).eval(), draw(3, 5, 3, seed=1), draw(3, 5, 3, seed=2)
    functions = [recurrent_pairs(net, length) for length in ((5, 3, 4) if read == "packed" else (5, 5, 5))]
    check(RelevanceMeasure(net, x, 1, reference=x0), x, x0, functions)
    shared = RelevanceMeasure(net, x, 1, reference=x0[:1])
    check(shared, x, x0[:1].expand_as(x), functions)


# -- a transformer with the samples in the second dimension -----------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(4, 2, 6, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
        self.out = nn.Linear(4, 2).double()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(self.encoder(x.transpose(0, 1), src_key_padding_mask=mask).mean(0))


def encoder_pairs(net: Encoder, keep: Tensor, norm_first: bool) -> Pairs:
    def linear(z: Tensor, layer: nn.Linear) -> Tensor:
        return z @ layer.weight.detach().T + layer.bias.detach()

    def norm(z: Tensor, layer: nn.LayerNorm) -> Tensor:
        return layer_norm(z) * layer.weight.detach() + layer.bias.detach()

    def attention(z: Tensor, layer: nn.MultiheadAttention) -> Tensor:
        q, k, v = (z @ layer.in_proj_weight.detach().T + layer.in_proj_bias.detach()).chunk(3, -1)
        heads = []
        for part in (slice(0, 2), slice(2, 4)):
            scores = Product.apply(q[..., part], k[:, keep, part].mT) / math.sqrt(2)
            heads.append(Product.apply(softmax(scores), v[:, keep, part]))
        return linear(torch.cat(heads, -1), layer.out_proj)

    def block(z: Tensor, layer: nn.TransformerEncoderLayer) -> Tensor:
        def feed(z: Tensor) -> Tensor:
            return linear(slope(linear(z, layer.linear1), torch.relu), layer.linear2)

        if norm_first:
            z = z + attention(norm(z, layer.norm1), layer.self_attn)
            return z + feed(norm(z, layer.norm2))
        z = norm(z + attention(z, layer.self_attn), layer.norm1)
        return norm(z + feed(z), layer.norm2)

    def function(pair: Tensor) -> Tensor:
        for layer in net.encoder.layers:
            pair = block(pair, layer)
        return pair.mean(1) @ net.out.weight.detach()[1]

    return function


@pytest.mark.medium
@pytest.mark.parametrize("norm_first", slow_but([False, True], False))
def test_a_transformer_with_the_samples_in_the_second_dimension_and_padding(norm_first):
    net, x, x0 = Encoder(norm_first).eval(), draw(3, 5, 4, seed=1), draw(3, 5, 4, seed=2)
    mask = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
    functions = [encoder_pairs(net, ~row, norm_first) for row in mask]
    named = RelevanceMeasure(net, {"x": x, "mask": mask}, 1, reference={"x": x0, "mask": mask.clone()})
    check(named, x, x0, functions, at("input", item="x"))
    check(RelevanceMeasure(net, x, 1, reference=x0, additional_forward_args=mask), x, x0, functions)


# -- reused modules and inputs without a difference -------------------------------------------------------------------


class Reused(nn.Module):
    """The same layers in three steps, gated by a second input."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.gate, self.act = nn.Linear(4, 4).double(), nn.Linear(4, 4).double(), nn.Tanh()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for _ in range(3):
            x = self.act(self.inner(x)) * self.act(self.gate(y)) + x
        return x

    def pairs(self, pair: Tensor) -> Tensor:
        h, y = pair.chunk(2, -1)
        for _ in range(3):
            inner, gate = (z @ f.weight.detach().T + f.bias.detach() for z, f in ((h, self.inner), (y, self.gate)))
            h = Times.apply(slope(inner, torch.tanh), slope(gate, torch.tanh)) + h
        return h[:, 2]


def test_reused_modules_under_two_inputs_given_by_keyword():
    net, (x, x0, y, y0) = Reused().eval(), (draw(3, 4, seed=seed) for seed in range(4))
    mu = RelevanceMeasure(net, {"y": y, "x": x}, 2, reference={"x": x0, "y": y0})
    for n in range(3):
        both, other = torch.cat([x[n], y[n]]), torch.cat([x0[n], y0[n]])
        multiplier, difference = multipliers(net.pairs, both, other)
        expected = multiplier * (both - other) / difference
        found = torch.cat([mu.marginal(at("input", item=item))[n] for item in "xy"])
        torch.testing.assert_close(found, expected, **TIGHT)
    same = RelevanceMeasure(net, {"y": y, "x": x}, 2, reference={"x": x0, "y": y})
    torch.testing.assert_close(same.marginal(at("input", item="x")).sum(1), torch.ones(3).double(), **TIGHT)
    assert bool((same.marginal(at("input", item="y")).abs() < 1e-80).all())
