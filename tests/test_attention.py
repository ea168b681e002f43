"""Attention in every spelling against matrices that are written out here, and pairs of equal models."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import LayerMapComposite
from zennit.rules import Epsilon, Pass
from zennit.types import Activation, Linear

from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, at, register_kernel
from nrm_plugin.errors import UnsupportedOperationError
from nrm_plugin.functional import SplitKernel
from nrm_plugin.kernels.base import Kernel

TOLERANCE = 1e-10
FLOOR = 1e-6
DOUBLE = torch.float64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=DOUBLE)


class Apply(nn.Module):
    """A function as a model."""

    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.op = op

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.op(*inputs)


def columns(op: Callable[..., Tensor], inputs: list[Tensor], **settings: Any) -> list[Tensor]:
    """``T[j, i]`` for each input without batch; what is missing in a column must be in the sink."""
    net = Apply(op)
    shape = net(*(value[None] for value in inputs)).shape[1:]
    rows: list[list[Tensor]] = []
    for unit in torch.eye(shape.numel(), dtype=DOUBLE).reshape(-1, 1, *shape):  # one by one: a batch might mix
        rules = Normalized(NRMAbsolute(), residual="sink", **settings)
        mu = RelevanceMeasure(net.eval(), tuple(value[None] for value in inputs), start=unit, composite=rules)
        taps = [f"input[{number}]" if len(inputs) > 1 else "input" for number in range(len(inputs))]
        parts = [
            mu.marginal(tap)[0] if tap in mu.layers else torch.zeros_like(v)
            for tap, v in zip(taps, inputs, strict=True)
        ]
        absorbed = sum(float(value) for value in mu.sinks().values())
        assert abs(sum(float(part.sum()) for part in parts) + absorbed - 1) <= TOLERANCE
        rows.append([part.flatten() for part in parts])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


# -- the matrix of attention ----------------------------------------------------------------------------------------

HEADS, GROUPS, LENGTH, SOURCES, WIDTH = 4, 2, 3, 5, 2
Q, K, V = draw(HEADS, LENGTH, WIDTH), draw(HEADS, SOURCES, WIDTH, seed=1), draw(HEADS, SOURCES, WIDTH, seed=2)
FEW_K, FEW_V = draw(GROUPS, SOURCES, WIDTH, seed=3), draw(GROUPS, SOURCES, WIDTH, seed=4)
BIAS = draw(HEADS, LENGTH, SOURCES, seed=5)
HIDDEN = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def weights(q: Tensor, k: Tensor, mask: Any = None, causal: bool = False, scale: float | None = None) -> Tensor:
    """``A[h, i, j]``, entry by entry."""
    found = torch.zeros(HEADS, LENGTH, SOURCES, dtype=DOUBLE)
    for h in range(HEADS):
        group = h * len(k) // HEADS
        for i in range(LENGTH):
            sizes = torch.zeros(SOURCES, dtype=DOUBLE)
            for j in range(SOURCES):
                score = (q[h, i] @ k[group, j]) * (1 / math.sqrt(WIDTH) if scale is None else scale)
                if mask is not None and mask.dtype != torch.bool:
                    score = score + mask.expand(HEADS, LENGTH, SOURCES)[h, i, j]
                seen = not (causal and j > i) and (mask is None or mask.dtype != torch.bool or bool(mask[i, j]))
                sizes[j] = score.exp() if seen else 0.0
            found[h, i] = sizes / sizes.sum()
    return found


def attended(a: Tensor, v: Tensor, by_head: bool = False) -> Tensor:
    """``|A_ij V_jk| / Σ |A_ij V_jk|`` from output ``(h, i, k)`` to value ``(h, j, k)``, with the floor of the rule."""
    size = v.abs() + FLOOR * (v.abs().mean((1, 2), keepdim=True) if by_head else v.abs().mean())
    matrix = torch.zeros(HEADS, LENGTH, WIDTH, *v.shape, dtype=DOUBLE)
    for h in range(HEADS):
        group = h * len(v) // HEADS
        for i in range(LENGTH):
            for k in range(WIDTH):
                part = a[h, i] * size[group, :, k]
                matrix[h, i, k, group, :, k] = part / part.sum()
    return matrix.reshape(HEADS * LENGTH * WIDTH, -1)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(WIDTH), -1) @ v


def by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("nhik,nhjk->nhij", q, k).mul(1 / math.sqrt(WIDTH)).softmax(-1)
    return torch.einsum("nhij,nhjk->nhik", a, v)


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch, and the scores by ``baddbmm``, as BLOOM has it."""
    size = q.shape[:2]
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    empty = torch.full((1, 1, 1), math.nan, dtype=q.dtype).expand(len(q), q.shape[1], k.shape[1])  # not read
    scores = empty.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(WIDTH))
    return torch.bmm(nn.functional.dropout(scores.softmax(-1), 0.3, False), v).unflatten(0, size)


sdpa = F.scaled_dot_product_attention
SPELLINGS: dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]] = {
    "fused": (sdpa, [Q, K, V], weights(Q, K)),
    "by keyword": (lambda q, k, v: sdpa(value=v, key=k, query=q), [Q, K, V], weights(Q, K)),
    "eager": (eager, [Q, K, V], weights(Q, K)),
    "einsum": (by_letters, [Q, K, V], weights(Q, K)),
    "heads in the batch": (folded, [Q, K, V], weights(Q, K)),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), [Q, K, V], weights(Q, K, causal=True)),
    "mask": (lambda q, k, v: sdpa(q, k, v, HIDDEN), [Q, K, V], weights(Q, K, HIDDEN)),
    "position bias": (lambda q, k, v: sdpa(q, k, v, BIAS), [Q, K, V], weights(Q, K, BIAS)),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), [Q, K, V], weights(Q, K, scale=0.3)),
    "groups of queries": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [Q, FEW_K, FEW_V], weights(Q, FEW_K)),
    "groups, repeated": (
        lambda q, k, v: eager(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
        [Q, FEW_K, FEW_V],
        weights(Q, FEW_K),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_attention_hands_all_to_the_values_by_absolute_share(name):
    op, (q, k, v), a = SPELLINGS[name]
    of_queries, of_keys, of_values = columns(op, [q, k, v])
    assert not of_queries.any()
    assert not of_keys.any()
    assert float((of_values - attended(a, v, name == "heads in the batch")).abs().max()) <= TOLERANCE


def test_learned_queries_and_fixed_keys_are_constants():
    """Cross-attention from parameters, and attention over a memory of which only the values are computed."""
    for op in (lambda v: sdpa(Q[None], K[None], v), lambda v: eager(Q[None], K[None], v)):
        (found,) = columns(op, [V])
        assert float((found - attended(weights(Q, K), V)).abs().max()) <= TOLERANCE
    # Where the values are the constants, the queries are what the output depends on.
    for op in (lambda q: sdpa(q, K[None], V[None]), lambda q: eager(q, K[None], V[None])):
        (found,) = columns(op, [Q])
        torch.testing.assert_close(found.sum(1), torch.ones(len(found), dtype=DOUBLE))


def test_fixed_values_are_the_same_fused_and_eager():
    fused = columns(lambda q: sdpa(q, K[None], V[None]), [Q])[0]
    plain = columns(lambda q: eager(q, K[None], V[None]), [Q])[0]
    assert float((fused - plain).abs().max()) <= TOLERANCE


def test_a_query_that_sees_nothing_is_absorbed():
    mask = HIDDEN.clone()
    mask[1] = False
    (found,) = columns(lambda v: sdpa(Q[None], K[None], v, mask), [V])
    rows = found.reshape(HEADS, LENGTH, WIDTH, -1)
    assert not rows[:, 1].any()
    torch.testing.assert_close(rows[:, [0, 2]].sum(-1), torch.ones(HEADS, 2, WIDTH, dtype=DOUBLE))


def test_dropout_that_is_always_on_is_an_error():
    mu = RelevanceMeasure(
        Apply(lambda v: sdpa(v, v, v, dropout_p=0.2)), V[None], start=V[None] * 0 + 1, composite=NRMDefault()
    )
    with pytest.raises(UnsupportedOperationError, match=r"draws at random.*dropout_p=self.p if self.training"):
        mu.marginal("input")


# -- the halves of AttnLRP ------------------------------------------------------------------------------------------


def halves_by_hand(q: Tensor, k: Tensor, v: Tensor, relevance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """AttnLRP (arXiv 2402.05602): bilinear products by halves (eq. 15), softmax by its Taylor expansion (eq. 13)."""
    scores = torch.einsum("hik,hjk->hij", q, k) / math.sqrt(WIDTH)
    a = scores.softmax(-1)
    o = torch.einsum("hij,hjk->hik", a, v)
    of_a, of_v = torch.zeros_like(a), torch.zeros_like(v)
    of_scores, of_q, of_k = torch.zeros_like(a), torch.zeros_like(q), torch.zeros_like(k)
    for h in range(HEADS):
        for i in range(LENGTH):
            for j in range(SOURCES):
                for c in range(WIDTH):
                    part = a[h, i, j] * v[h, j, c] * relevance[h, i, c] / (2 * o[h, i, c])
                    of_a[h, i, j] += part
                    of_v[h, j, c] += part
            for j in range(SOURCES):
                of_scores[h, i, j] = scores[h, i, j] * (of_a[h, i, j] - a[h, i, j] * of_a[h, i].sum())
            for j in range(SOURCES):
                for c in range(WIDTH):
                    part = q[h, i, c] * k[h, j, c] / math.sqrt(WIDTH) * of_scores[h, i, j] / (2 * scores[h, i, j])
                    of_q[h, i, c] += part
                    of_k[h, j, c] += part
    return of_q, of_k, of_v


@pytest.mark.parametrize("name", ["fused", "eager", "einsum", "softmax module"])
def test_halves_are_the_rules_of_attnlrp(name):
    module = nn.Softmax(-1)
    ops = {name: spelled[0] for name, spelled in SPELLINGS.items()}
    ops["softmax module"] = lambda q, k, v: module(q @ k.transpose(-2, -1) / math.sqrt(WIDTH)) @ v
    net: nn.Module = Apply(ops[name])
    if name == "softmax module":
        net.module = module
    relevance = draw(HEADS, LENGTH, WIDTH, seed=7).abs()
    relevance = relevance / relevance.sum()
    rules = Normalized(NRMAbsolute(), residual="sink", attention="halves")
    mu = RelevanceMeasure(net.eval(), tuple(t[None] for t in (Q, K, V)), start=relevance[None], composite=rules)
    for number, expected in enumerate(halves_by_hand(Q, K, V, relevance)):
        torch.testing.assert_close(mu.marginal(f"input[{number}]")[0], expected, atol=1e-9, rtol=1e-9)


class Block(nn.Module):
    """A pre-norm transformer block on projected inputs, and a head: gradient × input is AttnLRP on its twin below."""

    def __init__(self, halved: bool = False) -> None:
        super().__init__()
        self.halved = halved
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8, bias=False) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False), nn.Linear(8, 3)
        nn.init.zeros_(self.head.bias)

    def half(self, x: Tensor) -> Tensor:
        return x / 2 + (x / 2).detach() if self.halved else x

    def norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        return x * (norm(x) / x).detach() if self.halved else norm(x)  # the identity rule

    def act(self, x: Tensor) -> Tensor:
        return x * (F.gelu(x) / x).detach() if self.halved else F.gelu(x)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.norm1, x)
        q, k, v = (self.half(m(y).unflatten(-1, (2, 4)).transpose(1, 2)) for m in (self.q, self.k, self.v))
        a = self.half((q @ k.transpose(-2, -1) / 2).softmax(-1)) if self.halved else None
        mixed = a @ v if self.halved else sdpa(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        y = self.down(self.act(self.up(self.norm(self.norm2, x))))
        return self.head((x + y)[:, 0])


def test_a_transformer_block_with_halves_is_gradient_times_input_of_attnlrp():
    torch.manual_seed(0)
    block, twin = Block().double(), Block(halved=True).double()
    twin.load_state_dict(block.state_dict())
    x = draw(2, 5, 8)
    torch.testing.assert_close(block(x), twin(x))
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(twin(leaf)[:, 1].sum(), leaf)
    rules = LayerMapComposite([(Linear, Epsilon(1e-12)), (Activation, Pass())])
    composite = Normalized(rules, residual="sink", sums="signed", attention="halves")
    mu = RelevanceMeasure(block.eval(), x, 1, composite=composite)
    found = mu.marginal("input") * mu.output[:, None, None]
    torch.testing.assert_close(found, gradient * leaf.detach(), atol=1e-8, rtol=1e-6)
    by_values = Normalized(rules, residual="sink", sums="signed")
    other = RelevanceMeasure(block, x, 1, composite=by_values)
    assert float((other.marginal("input") * other.output[:, None, None] - found).abs().max()) > 1e-3


@pytest.mark.parametrize("attention", ["half", "", None, True])
def test_an_unknown_way_of_attention_is_an_error(attention):
    with pytest.raises(ValueError, match="choose 'value' or 'halves'"):
        Normalized(NRMAbsolute(), attention=attention)


# -- attention rollout ----------------------------------------------------------------------------------------------


class MeanOfHeads(Kernel):
    """A query hands each head's relevance to the values by the mean attention of all heads."""

    is_stochastic = True

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights.mean(1)

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        handed = torch.einsum("nij,knhic->knhjc", self.weights, relevance)
        return torch.zeros_like(handed), torch.zeros_like(handed), handed

    pull_absolute = pull


def test_attention_rollout_is_the_marginal_under_mean_kernels(own_kernels):
    r"""Abnar and Zuidema (arXiv 2005.00928): :math:`T = (A + I) / 2` with the mean of the heads, block by block."""

    @register_kernel(sdpa)
    def attention(call: Any) -> Kernel:
        q, k, _ = call.values
        return MeanOfHeads((q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1))

    @register_kernel(torch.add)
    def halves(call: Any) -> Kernel:
        shapes = [value.shape for value in call.values]
        return SplitKernel([torch.full_like(call.values[0], 1 / len(shapes))] * len(shapes), shapes, None, True)

    net = encoder(layers=3)
    x = draw(2, 5, 8)
    mu = RelevanceMeasure(net, x, start=torch.eye(5, dtype=DOUBLE)[1][:, None].expand(2, 5, 8), composite=NRMAbsolute())
    expected = torch.eye(5, dtype=DOUBLE).expand(2, 5, 5)
    hidden = x
    for layer in net.layers:
        a = layer.self_attn(*[layer.norm1(hidden) if layer.norm_first else hidden] * 3, need_weights=True)[1]
        expected = (a + torch.eye(5, dtype=DOUBLE)) / 2 @ expected
        hidden = layer(hidden)
    torch.testing.assert_close(mu.marginal("input").sum(-1), expected[:, 1].detach(), atol=1e-6, rtol=0)


# -- layers of torch ------------------------------------------------------------------------------------------------


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


def alike(first: RelevanceMeasure, second: RelevanceMeasure, layers: list[str], tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(first.output, second.output)
    for layer in layers:
        torch.testing.assert_close(first.marginal(layer), second.marginal(layer), atol=tolerance, rtol=0)
        torch.testing.assert_close(first.sink(layer), second.sink(layer), atol=tolerance, rtol=0)


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("attention", ["value", "halves"])
def test_a_transformer_encoder_is_what_its_parts_are(norm_first, attention):
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
    alike(*measures, ["input", "body"])
    with torch.no_grad():  # the fast path
        torch.testing.assert_close(measures[0].output, Sequence(fused).eval()(x)[[0, 1], [0, 2]])


def test_a_time_first_encoder_and_one_that_returns_its_weights_are_the_same():
    batch_first, time_first = encoder(), encoder(batch_first=False)
    time_first.load_state_dict(batch_first.state_dict())
    x = draw(2, 5, 8)
    one = RelevanceMeasure(Sequence(batch_first).eval(), x, 1)
    two = RelevanceMeasure(Sequence(time_first, time_first=True).eval(), x, 1)
    alike(one, two, ["input"])

    class Weighing(nn.Module):
        def __init__(self, **options: Any) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.attention, self.options = nn.MultiheadAttention(8, 2, batch_first=True).double(), options

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, **self.options)[0]

    pair = [RelevanceMeasure(Sequence(Weighing(need_weights=w)).eval(), x, 1) for w in (True, False)]
    alike(*pair, ["input"])


def test_a_batch_is_its_samples():
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


def test_padded_keys_get_nothing():
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
def test_cross_attention_hands_relevance_to_what_is_attended(options):
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
    asked, given = (mu.marginal(name) for name in ("input[0]", "input[1]"))
    assert not asked.any()
    total = given.sum((1, 2)) + mu.sink("input[1]") + mu.bypass("input[1]")
    torch.testing.assert_close(total, torch.ones(2, dtype=DOUBLE))
    kept = mu.sink("input[1]", kind="constants").abs()
    assert bool((kept > 1e-3).all()) if "add_bias_kv" in options else bool((kept < 1e-5).all())


def test_an_encoder_and_decoder_balance_their_books():
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
        torch.testing.assert_close(total, torch.ones(2, dtype=DOUBLE))
    assert mu.marginal("input").abs().sum() > 0.1


# -- parts of transformers ------------------------------------------------------------------------------------------


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
    (found,) = columns(norm, [x])
    torch.testing.assert_close(found, torch.eye(18, dtype=DOUBLE), atol=1e-12, rtol=0)


def test_a_gated_unit_shares_between_its_halves_and_a_sigmoid_one_does_not():
    a, b = draw(2, 3), draw(2, 3, seed=1)
    eye, none = torch.eye(6, dtype=DOUBLE), torch.zeros(6, 6, dtype=DOUBLE)
    for op, expected in {
        (lambda a, b: F.silu(a) * b, (eye / 2, eye / 2)),  # SwiGLU
        (lambda a, b: F.gelu(a) * b, (eye / 2, eye / 2)),  # GEGLU
        (lambda a, b: F.glu(torch.cat([a, b], -1), -1), (eye, none)),
    }:
        for found, wanted in zip(columns(op, [a, b]), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


def test_rotations_of_queries_and_keys_move_no_relevance():
    angle = torch.arange(LENGTH, dtype=DOUBLE)[:, None] * torch.tensor([0.3, 0.7], dtype=DOUBLE)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., 1:], x[..., :1]], -1)
        return x * angle.cos() + turned * angle.sin()

    x = draw(HEADS, LENGTH, WIDTH)
    (found,) = columns(lambda x: sdpa(rotated(x), rotated(x), x), [x])
    scores = torch.einsum("hik,hjk->hij", rotated(x), rotated(x)) / math.sqrt(WIDTH)
    rows = torch.zeros(HEADS, LENGTH, WIDTH, HEADS, LENGTH, WIDTH, dtype=DOUBLE)
    size = x.abs() + FLOOR * x.abs().mean()
    for h in range(HEADS):
        for i in range(LENGTH):
            for k in range(WIDTH):
                part = scores.softmax(-1)[h, i] * size[h, :, k]
                rows[h, i, k, h, :, k] = part / part.sum()
    assert float((found - rows.reshape(found.shape)).abs().max()) <= TOLERANCE


# -- a constant matrix ----------------------------------------------------------------------------------------------

WEIGHT = draw(6, 5)
PRODUCTS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "x @ W": lambda m, x: x @ m.turned,
    "x @ W.T": lambda m, x: x @ m.weight.T,
    "addmm": lambda m, x: torch.addmm(torch.zeros(6, dtype=DOUBLE), x.flatten(0, 1), m.turned).unflatten(
        0, x.shape[:2]
    ),
    "einsum": lambda m, x: torch.einsum("nti,oi->nto", x, m.weight),
    "einsum, turned": lambda m, x: torch.einsum("io,nti->nto", m.turned, x),
    "tensordot": lambda m, x: torch.tensordot(x, m.turned, 1),
    "einsum by head": lambda m, x: torch.einsum("nti,ihk->nthk", x, m.turned.unflatten(1, (2, 3))).flatten(2),
    "bmm": lambda m, x: torch.bmm(x, m.turned.expand(len(x), -1, -1)),
}


class Product(nn.Module):
    def __init__(self, spelled: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(WEIGHT.clone()), nn.Parameter(WEIGHT.T.clone())
        self.spelled, self.act, self.head = spelled, nn.ReLU(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.spelled(self, x)).mean(1))


def product(spelled: Callable[[nn.Module, Tensor], Tensor]) -> RelevanceMeasure:
    torch.manual_seed(6)
    return RelevanceMeasure(Product(spelled).eval(), draw(2, 4, 5), 1, composite=NRMDefault(canonizers=[]))


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_constant_matrix_has_a_row_for_each_output(name):
    """The default rule has the mean weight of an output: over a column of what is multiplied from the right."""
    layer, written = product(lambda m, x: F.linear(x, m.weight)), product(PRODUCTS[name])
    torch.testing.assert_close(layer.marginal("input"), written.marginal("input"), atol=1e-7, rtol=0)
    if name in ("x @ W", "x @ W.T", "einsum", "einsum, turned", "tensordot"):  # the others do not tell the channels
        torch.testing.assert_close(layer.joint("act", "input"), written.joint("act", "input"), atol=1e-7, rtol=0)
        assert written.cost == layer.cost
    torch.testing.assert_close(layer.walk_variation(), written.walk_variation(), atol=1e-6, rtol=0)


def test_a_product_over_tokens_has_no_channel_matrix_of_its_own():
    mixing = draw(5, 5)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.act = nn.Parameter(mixing.clone()), nn.ReLU()
            self.embed, self.head = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.mix @ self.embed(x)).mean(1))

    torch.manual_seed(7)
    mu = RelevanceMeasure(Mixer().eval(), draw(2, 5, 5), 1, composite=NRMAbsolute())
    joint = mu.joint("act", "embed")
    each = torch.stack([mu.marginal("embed", "channel", joint=at("act").channel(c)) for c in range(5)], 1)
    torch.testing.assert_close(joint, each)
    assert float((joint - torch.diag_embed(joint.diagonal(dim1=1, dim2=2))).abs().max()) <= 1e-12


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_experts_by_group_are_products_one_by_one():
    experts, offsets = draw(3, 5, 6), torch.tensor([2, 2, 4], dtype=torch.int32)

    def grouped(m: nn.Module, x: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x.flatten(0, 1), m.experts, offs=offsets).unflatten(0, (1, 4))

    def apart(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2] @ m.experts[0], x[:, 2:] @ m.experts[2]], 1)

    def measure(spelled: Callable[[nn.Module, Tensor], Tensor]) -> RelevanceMeasure:
        torch.manual_seed(6)
        net = Product(spelled).float().eval()
        net.experts = nn.Parameter(experts.float())
        return RelevanceMeasure(net, draw(1, 4, 5).float(), 1)

    one, other = measure(grouped), measure(apart)
    torch.testing.assert_close(one.marginal("input"), other.marginal("input"), atol=1e-5, rtol=0)


# -- what models do to ids, and complex numbers ---------------------------------------------------------------------


class Padding(nn.Module):
    """Fills its ids up to a multiple of four, as attention over windows does, and has a table of positions beside."""

    def __init__(self, left: bool) -> None:
        super().__init__()
        self.left, self.tokens, self.places, self.head = left, nn.Embedding(9, 6), nn.Embedding(8, 6), nn.Linear(6, 2)

    def forward(self, ids: Tensor) -> Tensor:
        missing = -ids.shape[1] % 4
        ids = nn.functional.pad(ids, (missing, 0) if self.left else (0, missing), value=8)
        found = self.tokens(ids) + self.places(torch.arange(ids.shape[1])[None].expand(len(ids), -1))
        return self.head(sdpa(found, found, found).mean(1))


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("length", [2, 4, 6])
def test_ids_that_the_model_fills_up_are_known_as_its_input(left, length):
    ids = torch.tensor([[3, 1, 4, 1, 5, 0], [2, 6, 5, 3, 5, 1]])[:, :length]
    mu = RelevanceMeasure(Padding(left).eval(), ids, 1)
    assert "tokens" in mu.layers
    assert "places" not in mu.layers
    assert mu.shape("tokens")[1] % 4 == 0
    torch.testing.assert_close(mu.marginal("tokens").sum((1, 2)) + mu.sink("tokens"), torch.ones(2))


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
        return sdpa(q, q, self.turn(v) if self.on_values else v).mean(1)


def test_complex_numbers_do_no_harm_on_the_way_to_a_gate():
    net, x = Rotated(on_values=False).double().eval(), draw(2, 5, 8)
    mu = RelevanceMeasure(net, x, 1)
    for layer in mu.layers:
        error = mu(at(layer)) + mu.sink(layer) + mu.bypass(layer) - 1
        assert float((error.abs() / mu.variation(layer)).max()) <= 1e-9
    torch.testing.assert_close(mu.marginal("input"), mu.marginal("input", joint=at("v")))


def test_relevance_that_arrives_at_complex_numbers_is_an_error_that_names_who_made_them():
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
            unit = torch.zeros(1, 5, 4, dtype=DOUBLE)
            unit[0, i, j] = 1
            column = torch.fft.fftn(unit, dim=(1, 2)).real
            expected[:, i, j] = (column * hidden[:, i : i + 1, j : j + 1] / image * given).sum((1, 2))
    torch.testing.assert_close(inner, expected, atol=1e-6, rtol=1e-6)


def parts(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in torch's operations, where a query that sees nothing gets nothing."""
    k, v = (tensor.repeat_interleave(HEADS // tensor.shape[1], 1) for tensor in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH)
    if mask is None:
        return scores.softmax(-1) @ v
    if mask.dtype != torch.bool:
        return (scores + mask).softmax(-1) @ v
    seen = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return seen.masked_fill(~mask, 0.0) @ v


BLIND = HIDDEN.clone()
BLIND[1] = False
TAKEN_APART: dict[str, tuple[dict[str, Any], Tensor | None, tuple[Tensor, Tensor, Tensor]]] = {
    "causal": ({"is_causal": True}, torch.ones(LENGTH, SOURCES).tril().bool(), (Q, K, V)),
    "mask": ({"attn_mask": HIDDEN}, HIDDEN, (Q, K, V)),
    "a query that sees nothing": ({"attn_mask": BLIND}, BLIND, (Q, K, V)),
    "position bias": ({"attn_mask": BIAS}, BIAS, (Q, K, V)),
    "groups of queries": ({"enable_gqa": True}, None, (Q, FEW_K, FEW_V)),
}


@pytest.mark.parametrize("name", TAKEN_APART)
def test_the_fused_function_with_halves_is_that_of_its_parts(name):
    options, mask, inputs = TAKEN_APART[name]
    inputs = tuple(value[None] for value in inputs)
    start = draw(1, *sdpa(*inputs, **options).shape[1:])
    rules = Normalized(NRMAbsolute(), residual="sink", attention="halves")
    fused, eager = (
        RelevanceMeasure(Apply(op), inputs, start=start, composite=rules)
        for op in (lambda q, k, v: sdpa(q, k, v, **options), lambda q, k, v: parts(q, k, v, mask))
    )
    explained = (start * sdpa(*inputs, **options)).sum() / start.sum()
    torch.testing.assert_close(fused.output, explained[None])
    for number in range(3):
        found, expected = (mu.marginal(f"input[{number}]") for mu in (fused, eager))
        assert bool(expected.any())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=TOLERANCE)
