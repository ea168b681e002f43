"""Transformers: encoders, decoders, attention rollout and padded ids, across the package."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, at, register_kernel
from nrm_plugin.functional import SplitKernel
from nrm_plugin.kernels.base import Kernel
from tests.functional.kernel_matrices import Apply, columns, draw


class MeanOfHeads(Kernel):
    """A query passes the relevance of each head to the values by the mean attention of all heads."""

    is_stochastic = True

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights.mean(1)

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        lower = torch.einsum("nij,knhic->knhjc", self.weights, relevance)
        return torch.zeros_like(lower), torch.zeros_like(lower), lower

    pull_absolute = pull


@pytest.mark.medium
def test_attention_rollout_is_the_marginal_under_mean_kernels(own_kernels):
    r"""Abnar and Zuidema (arXiv 2005.00928): :math:`T = (A + I) / 2` with the mean of the heads, block by block."""

    @register_kernel(F.scaled_dot_product_attention)
    def attention(call: Any) -> Kernel:
        q, k, _ = call.values
        return MeanOfHeads((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1))

    @register_kernel(torch.add)
    def halves(call: Any) -> Kernel:
        shapes = [value.shape for value in call.values]
        return SplitKernel([torch.full_like(call.values[0], 1 / len(shapes))] * len(shapes), shapes, None, True)

    net = encoder(layers=3)
    x = draw(2, 5, 8)
    mu = RelevanceMeasure(
        net, x, start=torch.eye(5, dtype=torch.float64)[1][:, None].expand(2, 5, 8), composite=NRMAbsolute()
    )
    expected = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    hidden = x
    for layer in net.layers:
        a = layer.self_attn(*[layer.norm1(hidden) if layer.norm_first else hidden] * 3, need_weights=True)[1]
        expected = (a + torch.eye(5, dtype=torch.float64)) / 2 @ expected
        hidden = layer(hidden)
    torch.testing.assert_close(mu.marginal("input").sum(-1), expected[:, 1].detach(), atol=1e-6, rtol=0)


def encoder(layers: int = 2, **options: Any) -> nn.TransformerEncoder:
    torch.manual_seed(1)
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.1, **{"batch_first": True, **options})
    net = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).double().eval()
    for name, parameter in net.named_parameters():
        if parameter.ndim == 1 and "bias" in name:
            nn.init.normal_(parameter, std=0.2)
    return net


class Sequence(nn.Module):
    """An encoder of sequences and a head."""

    def __init__(self, body: nn.Module, time_first: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.body, self.head = body, nn.Linear(8, 3).double()
        self.time_first, self.options = time_first, options

    def forward(self, x: Tensor) -> Tensor:
        y = (
            self.body(x.transpose(0, 1), **self.options).transpose(0, 1)
            if self.time_first
            else self.body(x, **self.options)
        )
        return self.head(y.mean(1))


def check_same_measure(
    first: RelevanceMeasure, second: RelevanceMeasure, layers: list[str], tolerance: float = 1e-6
) -> None:
    torch.testing.assert_close(first.output, second.output)
    for layer in layers:
        torch.testing.assert_close(first.marginal(layer), second.marginal(layer), atol=tolerance, rtol=0)
        torch.testing.assert_close(first.sink(layer), second.sink(layer), atol=tolerance, rtol=0)


@pytest.mark.medium
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("attention", ["value", "halves"])
def test_a_transformer_encoder_equals_its_matrix_products(norm_first, attention):
    """The layer of torch, which has a fused path, against the same written with matrix products."""

    class Plain(nn.Module):
        def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
            super().__init__()
            self.layer = layer

        def attend(self, x: Tensor) -> Tensor:
            own = self.layer.self_attn
            q, k, v = (x @ own.in_proj_weight.T + own.in_proj_bias).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            a = (q @ k.transpose(-2, -1) / 2).softmax(-1)
            return own.out_proj((a @ v).transpose(1, 2).flatten(2))

        def forward(self, x: Tensor) -> Tensor:
            own = self.layer
            feed = lambda x: own.linear2(F.relu(own.linear1(x)))  # noqa: E731
            if norm_first:
                x = x + self.attend(own.norm1(x))
                return x + feed(own.norm2(x))
            x = own.norm1(x + self.attend(x))
            return own.norm2(x + feed(x))

    fused = encoder(norm_first=norm_first)
    plain = nn.Sequential(*[Plain(layer) for layer in fused.layers])
    x = draw(2, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
    rules = Normalized(NRMDefault(), attention=attention)
    measures = [RelevanceMeasure(Sequence(net).eval(), x, [0, 2], composite=rules) for net in (fused, plain)]
    check_same_measure(*measures, ["input", "body"])
    with torch.no_grad():  # the fast path
        torch.testing.assert_close(measures[0].output, Sequence(fused).eval()(x)[[0, 1], [0, 2]])


@pytest.mark.medium
def test_time_first_encoders_and_returned_weights_change_nothing():
    batch_first, time_first = encoder(), encoder(batch_first=False)
    time_first.load_state_dict(batch_first.state_dict())
    x = draw(2, 5, 8)
    one = RelevanceMeasure(Sequence(batch_first).eval(), x, 1)
    two = RelevanceMeasure(Sequence(time_first, time_first=True).eval(), x, 1)
    check_same_measure(one, two, ["input"])

    class Weighing(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.attention, self.options = nn.MultiheadAttention(8, 2, batch_first=True).double(), options

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, **self.options)[0]

    pair = [RelevanceMeasure(Sequence(Weighing(need_weights=w)).eval(), x, 1) for w in (True, False)]
    check_same_measure(*pair, ["input"])


@pytest.mark.medium
def test_a_batch_has_the_measures_of_its_samples():
    net, x = Sequence(encoder()).eval(), draw(3, 5, 8)
    mu = RelevanceMeasure(net, x, [0, 1, 2])
    for number in range(3):
        one = RelevanceMeasure(net, x[number : number + 1], number)
        for layer in ("input", "body.layers.0", "body.layers.1.self_attn"):
            torch.testing.assert_close(mu.marginal(layer)[number], one.marginal(layer)[0], atol=1e-6, rtol=0)


def test_heads_and_pairs_of_query_and_key_are_events():
    mu = RelevanceMeasure(Sequence(encoder()).eval(), draw(2, 5, 8), 1)
    name = "body.layers.1.self_attn.scaled_dot_product_attention"
    attention, values = at(name), at(name, side="input", item=2)
    assert tuple(mu.shape(attention)) == tuple(mu.shape(values)) == (2, 2, 5, 4)
    torch.testing.assert_close(mu(attention[0]) + mu(attention[1]), mu(attention))
    pairs = torch.stack([mu(attention[1, 3] & values[1, key]) for key in range(5)])
    assert bool((pairs.abs() > 1e-6).all())
    torch.testing.assert_close(pairs.sum(0), mu(attention[1, 3]), atol=1e-9, rtol=0)
    assert not mu(attention[1, 3] & values[0, 2]).any()  # another head


def test_padded_keys_receive_no_relevance():
    hidden = torch.tensor([[False, False, False, True, True], [False] * 5])
    net = Sequence(encoder()).eval()
    x = draw(2, 5, 8)

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return self.net.body(x, src_key_padding_mask=hidden)[:, 0]

    mu = RelevanceMeasure(First().eval(), x, 1)
    tokens = mu.marginal("input").abs().sum(-1)
    assert not tokens[0, 3:].any()
    assert bool((tokens[0, :3] > 0).all())
    assert bool((tokens[1] > 0).all())


@pytest.mark.parametrize("options", [{}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"kdim": 6, "vdim": 6}])
def test_cross_attention_passes_relevance_to_the_memory(options):
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.head(self.attention(x, memory, memory)[0].mean(1))

    memory = draw(2, 4, options.get("kdim", 8))
    mu = RelevanceMeasure(Cross().double().eval(), (draw(2, 3, 8), memory), 1)
    of_queries, of_memory = (mu.marginal(name) for name in ("input[0]", "input[1]"))
    assert not of_queries.any()
    total = of_memory.sum((1, 2)) + mu.sink("input[1]") + mu.bypass("input[1]")
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))
    kept = mu.sink("input[1]", kind="constants").abs()
    assert bool((kept > 1e-3).all()) if "add_bias_kv" in options else bool((kept < 1e-5).all())


@pytest.mark.medium
def test_an_encoder_and_decoder_conserve_relevance():
    torch.manual_seed(5)
    net = nn.Transformer(8, 2, 1, 1, 12, batch_first=True).double().eval()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.token, self.head = net, nn.Parameter(draw(1, 2, 8)), nn.Linear(8, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.net(x, self.token.expand(len(x), -1, -1)).mean(1))

    mu = RelevanceMeasure(Model().eval(), draw(2, 4, 8), 1)
    for layer in mu.layers:
        total = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer)
        torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))
    assert mu.marginal("input").abs().sum() > 0.1


class RMSNorm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(6).double(), nn.RMSNorm(6).double(), RMSNorm(), Apply(lambda x: F.layer_norm(x, (6,)))],
    ids=["LayerNorm", "RMSNorm", "by hand", "F.layer_norm"],
)
def test_norms_of_tokens_are_the_identity(norm):
    x = draw(3, 6)
    (actual,) = columns(norm, [x])
    torch.testing.assert_close(actual, torch.eye(18, dtype=torch.float64), atol=1e-12, rtol=0)


def test_gated_linear_units_split_between_their_halves_unless_one_is_a_sigmoid():
    a, b = draw(2, 3), draw(2, 3, seed=1)
    eye, none = torch.eye(6, dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for op, expected in {
        (lambda a, b: F.silu(a) * b, (eye / 2, eye / 2)),  # SwiGLU
        (lambda a, b: F.gelu(a) * b, (eye / 2, eye / 2)),  # GEGLU
        (lambda a, b: F.glu(torch.cat([a, b], -1), -1), (eye, none)),
    }:
        for actual, wanted_matrix in zip(columns(op, [a, b]), expected, strict=True):
            torch.testing.assert_close(actual, wanted_matrix, atol=1e-12, rtol=0)


class Padding(nn.Module):
    """Pads its ids to a multiple of four, as attention over windows does, and has a table of positions."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.left, self.tokens, self.places, self.head = left, nn.Embedding(9, 6), nn.Embedding(8, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        missing = -ids.shape[1] % 4
        ids = nn.functional.pad(ids, (missing, 0) if self.left else (0, missing), value=8)
        actual = self.tokens(ids) + self.places(torch.arange(ids.shape[1])[None].expand(len(ids), -1))
        return self.head(F.scaled_dot_product_attention(actual, actual, actual).mean(1))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("length", [2, 4, 6])
def test_padded_ids_are_recognized_as_the_input(left, length):
    ids = torch.tensor([[3, 1, 4, 1, 5, 0], [2, 6, 5, 3, 5, 1]])[:, :length]
    mu = RelevanceMeasure(Padding(left).eval(), ids, 1)
    assert "tokens" in mu.layers
    assert "places" not in mu.layers
    assert mu.shape("tokens")[1] % 4 == 0
    torch.testing.assert_close(mu.marginal("tokens").sum((1, 2)) + mu.sink("tokens"), torch.ones(2))
