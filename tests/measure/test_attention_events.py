"""Heads, tokens and pairs of query and key as events, for every implementation of attention, compared with sums."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import EventError, UnknownLayerError

DOUBLE = torch.float64
SAMPLES, HEADS, TOKENS, WIDTH = 2, 3, 5, 4
FEATURES = HEADS * WIDTH
TOLERANCE = 1e-5
"""The floor of the rule under small values, relative to their mean, which spellings take over other sets of heads."""


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def weights(q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(WIDTH)).softmax(-1)


def fused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge(F.scaled_dot_product_attention(split(q), split(k), split(v)))


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return merge(F.dropout(weights(split(q), split(k)), 0.1, False) @ split(v))


def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Values on the left, tokens in the last dimension."""
    a = weights(split(q), split(k))
    return merge((split(v).transpose(-2, -1) @ a.transpose(-2, -1)).transpose(-2, -1))


def folded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch."""
    q, k, v = (split(x).flatten(0, 1) for x in (q, k, v))
    return merge(torch.bmm(weights(q, k), v).unflatten(0, (-1, HEADS)))


def by_letters(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Tokens before samples, as XLNet has them."""
    q, k, v = (x.unflatten(-1, (HEADS, WIDTH)).transpose(0, 1) for x in (q, k, v))
    a = (torch.einsum("ibnd,jbnd->bnij", q, k) / math.sqrt(WIDTH)).softmax(3)
    return torch.einsum("bnij,jbnd->ibnd", a, v).transpose(0, 1).flatten(2)


def by_dots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = weights(split(q), split(k))
    return merge(torch.einsum("...ij,...jd->...id", a, split(v)))


SPELLINGS: dict[str, Callable[..., Tensor]] = {
    "fused": fused,
    "eager": eager,
    "turned": turned,
    "folded": folded,
    "letters": by_letters,
    "dots": by_dots,
}


class Attention(nn.Module):
    def __init__(self, op: Callable[..., Tensor]) -> None:
        super().__init__()
        self.op = op
        self.q, self.k, self.v, self.out = (nn.Linear(FEATURES, FEATURES) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.op(self.q(x), self.k(x), self.v(x)))


class Net(nn.Module):
    """A skip around the attention, so that some walks bypass it."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention
        self.head = nn.Linear(FEATURES, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x + self.attn(x)).mean(1))


def draw() -> Tensor:
    return torch.randn(SAMPLES, TOKENS, FEATURES, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)


def net(op: Callable[..., Tensor] = fused) -> nn.Module:
    torch.manual_seed(0)
    return Net(Attention(op)).double().eval()


def by_hand(model: nn.Module, mu: RelevanceMeasure) -> Tensor:
    """``(N, H, query, key)`` of the default kernel: relevance of what a query was given, shared by |A V|."""
    x, layer = draw(), model.attn
    a, v = weights(split(layer.q(x)), split(layer.k(x))), split(layer.v(x))
    given = split(mu.marginal(at("attn.out", side="input")))
    pairs = torch.zeros(SAMPLES, HEADS, TOKENS, TOKENS, dtype=DOUBLE)
    for n in range(SAMPLES):
        for h in range(HEADS):
            for i in range(TOKENS):
                for d in range(WIDTH):
                    part = a[n, h, i] * v[n, h, :, d].abs()
                    pairs[n, h, i] += given[n, h, i, d] * part / part.sum()
    return pairs.detach()


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_heads_tokens_and_pairs_are_sums_over_the_matrix_of_attention(spelling):
    model = net(SPELLINGS[spelling])
    mu = RelevanceMeasure(model, draw(), 1)
    pairs, attn = by_hand(model, mu), at("attn")
    questions = [
        *[(attn.head(h), pairs[:, h].sum((1, 2))) for h in range(HEADS)],
        *[(attn.token(i), pairs[:, :, i].sum((1, 2))) for i in range(TOKENS)],
        *[(attn.pair(i, j), pairs[:, :, i, j].sum(1)) for i in range(TOKENS) for j in range(TOKENS)],
        (attn.head(2).pair(1, 3), pairs[:, 2, 1, 3]),
        (attn.pair(1, 3).head(2), pairs[:, 2, 1, 3]),
        (attn.head([0, 2]).token(slice(1, 3)), pairs[:, [0, 2], 1:3].sum((1, 2, 3))),
        (attn.head(slice(None)).pair(slice(None), torch.tensor([False, True, False, True, False])),
         pairs[..., [1, 3]].sum((1, 2, 3))),
        (attn.head(1) | attn.head(2), pairs[:, 1:].sum((1, 2, 3))),
        (attn.head(1) & attn.token(2), pairs[:, 1, 2].sum(1)),
        (~attn.head(1), 1 - pairs[:, 1].sum((1, 2))),
        (attn.pair(1, 3) - attn.head(0), pairs[:, 1:, 1, 3].sum(1)),
    ]  # fmt: skip
    masses = mu([event for event, _ in questions])
    for (event, expected), mass in zip(questions, masses, strict=True):
        torch.testing.assert_close(mass, expected, atol=TOLERANCE, rtol=0, msg=f"{event}: {mass}, {expected}")
    assert float(pairs.sum((1, 2, 3)).abs().min()) > 0.01


def test_a_map_may_be_conditional_on_a_head_or_a_pair():
    model = net()
    mu = RelevanceMeasure(model, draw(), 1)
    attn = at("attn")
    by_head = sum(mu.marginal("input", joint=attn.head(h)) for h in range(HEADS))
    torch.testing.assert_close(by_head, mu.marginal("input", joint=at("attn.scaled_dot_product_attention")))
    drawn = mu.marginal("input", joint=attn.pair(1, 3))
    others = [i for i in range(TOKENS) if i != 3]
    assert not drawn[:, others].any()
    assert float(drawn[:, 3].abs().min()) > 0
    given = mu.marginal("input", given=attn.pair(1, 3))
    torch.testing.assert_close(given.sum((1, 2)) * mu(attn.pair(1, 3)), drawn.sum((1, 2)))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_with_halves_a_pair_crosses_the_value_or_the_weight(spelling):
    rules = Normalized(NRMAbsolute(), attention="halves")
    mu = RelevanceMeasure(net(SPELLINGS[spelling]), draw(), 1, composite=rules)
    reference = RelevanceMeasure(net(), draw(), 1, composite=rules)
    attn = at("attn")
    tokens = torch.stack([mu(attn.token(i)) for i in range(TOKENS)])
    pairs = torch.stack([mu([attn.pair(i, j) for j in range(TOKENS)]) for i in range(TOKENS)])
    torch.testing.assert_close(pairs.sum(1), tokens, atol=1e-6, rtol=0)
    torch.testing.assert_close(mu(attn.head(1).pair(2, 0)), reference(attn.head(1).pair(2, 0)), atol=1e-6, rtol=0)
    by_values = RelevanceMeasure(net(), draw(), 1, composite=NRMAbsolute())
    assert float((by_values(attn.pair(2, 0)) - mu(attn.pair(2, 0))).abs().max()) > 1e-4


class Wrapped(nn.Module):
    """torch's layer, which returns a tuple."""

    def __init__(self, need_weights: bool, batch_first: bool, **options: Any) -> None:
        super().__init__()
        self.need_weights, self.batch_first = need_weights, batch_first
        self.inner = nn.MultiheadAttention(FEATURES, HEADS, batch_first=batch_first, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        y = self.inner(x, x, x, need_weights=self.need_weights)[0]
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_of_torch_has_the_same_events(need_weights, batch_first):
    torch.manual_seed(0)
    model = Net(Wrapped(need_weights, batch_first)).double().eval()
    twin = net()
    own, inner = twin.attn, model.attn.inner
    with torch.no_grad():
        for part, layer in zip(range(3), (own.q, own.k, own.v), strict=True):
            layer.weight.copy_(inner.in_proj_weight.unflatten(0, (3, -1))[part])
            layer.bias.copy_(inner.in_proj_bias.unflatten(0, (3, -1))[part])
    own.out.load_state_dict(inner.out_proj.state_dict())
    twin.head.load_state_dict(model.head.state_dict())
    mu, nu = (RelevanceMeasure(each, draw(), 1) for each in (model, twin))
    for name in ("attn", "attn.inner"):
        for h in range(HEADS):
            torch.testing.assert_close(mu(at(name).head(h)), nu(at("attn").head(h)), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(
            mu(at(name).head(1).pair(2, 4)), nu(at("attn").head(1).pair(2, 4)), atol=TOLERANCE, rtol=0
        )
    with pytest.raises(EventError, match="no head 3; the attention has 3 heads"):
        mu(at("attn").head(3))


def test_groups_of_queries_keep_their_heads():
    class Grouped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, v = x.unflatten(-1, (6, 2)).transpose(1, 2), x[..., :4].unflatten(-1, (2, 2)).transpose(1, 2)
            return merge(F.scaled_dot_product_attention(q, v, v, enable_gqa=True))

    mu = RelevanceMeasure(Net(Grouped()).double().eval(), draw(), 1)
    heads = torch.stack([mu(at("attn").head(h)) for h in range(6)])
    tap = mu.marginal("attn.scaled_dot_product_attention")
    torch.testing.assert_close(heads, tap.sum((2, 3)).T)
    # Heads 0 to 2 draw on the first two features, the others on the next two.
    drawn = mu.marginal("input", joint=at("attn").head(4).pair(slice(None), 1))
    assert not drawn[:, [0, 2, 3, 4]].any()
    assert not drawn[:, 1, [0, 1, *range(4, FEATURES)]].any()


def test_one_sample_without_a_batch_dimension():
    model = net()
    x = draw()[:1]
    mu = RelevanceMeasure(model, x, 1)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            layer = self.inner.attn
            q, k, v = (f(x).unflatten(-1, (HEADS, WIDTH)).transpose(0, 1) for f in (layer.q, layer.k, layer.v))
            y = x + layer.out(F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1))
            return self.inner.head(y.mean(0))

    nu = RelevanceMeasure(Whole().eval(), x[0], 1, batched=False)
    attn, whole = at("attn").head(1), at("scaled_dot_product_attention").head(1)
    torch.testing.assert_close(mu(attn), nu(whole))
    torch.testing.assert_close(mu(attn.pair(0, 4)), nu(whole.pair(0, 4)))


class Twice(nn.Module):
    """One layer called twice, and another that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.idle, self.head = Attention(eager), Attention(eager), nn.Linear(FEATURES, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attn(self.attn(x))
        return self.head(y.mean(1)) + 0 * self.idle(x).detach().sum()


def test_a_layer_that_is_called_twice_has_two_attentions():
    torch.manual_seed(0)
    mu = RelevanceMeasure(Twice().double().eval(), draw(), 1)
    layers = [name for name in mu.layers if name.startswith("attn.matmul")]
    first, second = at("attn", call=0).head(1), at("attn", call=1).head(1)
    # Two products in each call, of which the second is that of weights and values.
    torch.testing.assert_close(mu(first), mu(at("attn.matmul", call=1)[1]))
    torch.testing.assert_close(mu(second), mu(at("attn.matmul", call=3)[1]))
    torch.testing.assert_close(mu(at("attn.matmul", call=3).head(1)), mu(second))
    assert "attn.matmul:3" in layers
    torch.testing.assert_close(mu(at("attn.matmul:3").head(1)), mu(second))
    torch.testing.assert_close(mu(at("attn", call="any").head(1)), mu(first | second))
    with pytest.raises(UnknownLayerError, match="called 2 times"):
        mu(at("attn").head(1))


def test_the_whole_model_may_be_the_attention():
    model = nn.Sequential(Attention(fused)).double().eval()
    mu = RelevanceMeasure(model, draw(), (0, 1))
    torch.testing.assert_close(mu(at(model).head(1)), mu(at("0").head(1)))


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Attention(fused), Attention(eager)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x))


def test_unknown_heads_tokens_and_layers_raise():
    torch.manual_seed(0)
    model = nn.Sequential(Two(), nn.Flatten(), nn.Linear(TOKENS * FEATURES, 2)).double().eval()
    mu = RelevanceMeasure(model, draw(), 1)
    for event, message in (
        (at("0").head(1), r"'0' has 2 attention calls; choose one of: at\('0.a'\), at\('0.b'\)"),
        (at("2").head(0), r"'2' computes no attention on which the output depends. These layers do: at\('0.a'\)"),
        (at("0.a").head(HEADS), "no head 3; the attention has 3 heads, 0 to 2"),
        (at("0.a").head(-HEADS - 1), "no head -4"),
        (at("0.a").head([0, 7]), r"no head \[0, 7\]"),
        (at("0.b").token(TOKENS), "no token 5"),
        (at("0.b").pair(0, TOKENS), "no token 5"),
        (at("0.b").head(torch.tensor([True, False])), "no head mask of 1 in"),
    ):
        with pytest.raises(EventError, match=message):
            mu(event)
    with pytest.raises(UnknownLayerError, match="no tap named 'nowhere'"):
        mu(at("nowhere").head(0))
    plain = RelevanceMeasure(nn.Sequential(nn.Linear(3, 2)), torch.randn(1, 3), 0)
    with pytest.raises(EventError, match="No layer does"):
        plain(at("0").head(0))


def test_heads_need_a_layer_and_are_given_once():
    for make, message in (
        (lambda: at("a", side="input").head(0), "refers to neurons of one tap"),
        (lambda: at("a")[2].head(0), "refers to neurons of one tap"),
        (lambda: at("a", item=1).token(0), "refers to neurons of one tap"),
        (lambda: at("a").head(0).head(1), "is already restricted"),
        (lambda: at("a").token(0).pair(1, 2), "is already restricted"),
        (lambda: at("a").head((0, 1)), "give an int, a slice, a list or one mask"),
        (lambda: at("a").head(torch.ones(2, 2, dtype=torch.bool)), r"mask of 4 in \(2, 2\)\): give an int"),
        (lambda: at("a").head(...), "give an int, a slice, a list or one mask"),
        (lambda: at("a").token(0.5), "neurons are indexed by ints"),
    ):
        with pytest.raises(EventError, match=message):
            make()
    event = at("a", call=1).head(2).pair(3, slice(0, 2))
    assert str(event) == "at('a', call=1).head(2).pair(3, slice(0, 2))"
    assert event == at("a", call=1).pair(3, slice(0, 2)).head(2)
    assert len({event, at("a", call=1).head(2).pair(3, slice(0, 2))}) == 1
    mu = RelevanceMeasure(net(), draw(), 1)
    with pytest.raises(EventError, match=r"at\('attn'\).head\(1\) is an event, but a layer is needed here"):
        mu.marginal(at("attn").head(1))
    assert "pass through the attention of 'attn' in head 1 from query token 2 to key token 0" in mu.explain(
        at("attn").head(1).pair(2, 0)
    )


def test_heads_that_cannot_be_distinguished_from_samples_raise():
    class Odd(nn.Module):
        """The first sample twice."""

        def forward(self, x: Tensor) -> Tensor:
            q = torch.cat([x, x[:1]])
            return F.scaled_dot_product_attention(q, q, q)[: len(x)]

    x = torch.randn(2, TOKENS, FEATURES)
    mu = RelevanceMeasure(nn.Sequential(Odd(), nn.Flatten(), nn.Linear(TOKENS * FEATURES, 2)), x, 1)
    with pytest.raises(EventError, match="cannot be distinguished from the 2 samples in its dimension of 3"):
        mu(at("0").head(0))


def test_the_default_composite_gives_the_same_heads_fused_and_eager():
    mu, nu = (RelevanceMeasure(net(op), draw(), 2, composite=NRMDefault()) for op in (fused, eager))
    for h in range(HEADS):
        torch.testing.assert_close(mu(at("attn").head(h)), nu(at("attn").head(h)), atol=1e-12, rtol=0)
        torch.testing.assert_close(
            mu(at("attn").head(h).pair(0, 1)), nu(at("attn").head(h).pair(0, 1)), atol=1e-12, rtol=0
        )
