"""Attention in every spelling against matrices that are written out here."""

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

from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.conftest import slow_but
from tests.functional.kernel_matrices import FLOOR, TOLERANCE, Apply, draw

DOUBLE = torch.float64


def columns(op: Callable[..., Tensor], inputs: list[Tensor], **settings: Any) -> list[Tensor]:
    """``T[j, i]`` for each input without batch; what is missing in a column must be in the sink."""
    net = Apply(op)
    shape = net(*(value[None] for value in inputs)).shape[1:]
    rows: list[list[Tensor]] = []
    # One by one: samples of a batch might mix.
    for unit in torch.eye(shape.numel(), dtype=DOUBLE).reshape(-1, 1, *shape):
        rules = Normalized(NRMAbsolute(), residual="sink", **settings)
        mu = RelevanceMeasure(net.eval(), tuple(value[None] for value in inputs), start=unit, composite=rules)
        taps = [f"input[{number}]" if len(inputs) > 1 else "input" for number in range(len(inputs))]
        found = mu.marginal([tap for tap in taps if tap in mu.layers])
        decomposed = [
            found[tap][0] if tap in found else torch.zeros_like(v) for tap, v in zip(taps, inputs, strict=True)
        ]
        absorbed = sum(float(value) for value in mu.sinks().values())
        assert abs(sum(float(part.sum()) for part in decomposed) + absorbed - 1) <= TOLERANCE
        rows.append([part.flatten() for part in decomposed])
    return [torch.stack(column) for column in zip(*rows, strict=True)]


HEADS, GROUPS, LENGTH, SOURCES, WIDTH = 4, 2, 3, 5, 2
Q, K, V = draw(HEADS, LENGTH, WIDTH), draw(HEADS, SOURCES, WIDTH, seed=1), draw(HEADS, SOURCES, WIDTH, seed=2)
FEW_K, FEW_V = draw(GROUPS, SOURCES, WIDTH, seed=3), draw(GROUPS, SOURCES, WIDTH, seed=4)
BIAS = draw(HEADS, LENGTH, SOURCES, seed=5)
MASK = torch.tensor([[1, 1, 0, 1, 0], [0, 1, 1, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def weights(q: Tensor, k: Tensor, mask: Any = None, causal: bool = False, scale: float | None = None) -> Tensor:
    """``A[h, i, j]``, entry by entry."""
    actual = torch.zeros(HEADS, LENGTH, SOURCES, dtype=DOUBLE)
    for h in range(HEADS):
        group = h * len(k) // HEADS
        for i in range(LENGTH):
            sizes = torch.zeros(SOURCES, dtype=DOUBLE)
            for j in range(SOURCES):
                score = (q[h, i] @ k[group, j]) * (1 / math.sqrt(WIDTH) if scale is None else scale)
                if mask is not None and mask.dtype != torch.bool:
                    score = score + mask.expand(HEADS, LENGTH, SOURCES)[h, i, j]
                scored = not (causal and j > i) and (mask is None or mask.dtype != torch.bool or bool(mask[i, j]))
                sizes[j] = score.exp() if scored else 0.0
            actual[h, i] = sizes / sizes.sum()
    return actual


def value_shares(a: Tensor, v: Tensor, by_head: bool = False) -> Tensor:
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


def unfused(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(WIDTH), -1) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    a = torch.einsum("nhik,nhjk->nhij", q, k).mul(1 / math.sqrt(WIDTH)).softmax(-1)
    return torch.einsum("nhij,nhjk->nhik", a, v)


def heads_in_batch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch, and the scores by ``baddbmm``, as in BLOOM."""
    size = q.shape[:2]
    q, k, v = (tensor.flatten(0, 1) for tensor in (q, k, v))
    empty = torch.full((1, 1, 1), math.nan, dtype=q.dtype).expand(len(q), q.shape[1], k.shape[1])  # not read
    scores = empty.baddbmm(batch1=q, batch2=k.transpose(1, 2), beta=0.0, alpha=1 / math.sqrt(WIDTH))
    return torch.bmm(nn.functional.dropout(scores.softmax(-1), 0.3, False), v).unflatten(0, size)


sdpa = F.scaled_dot_product_attention


SPELLINGS: dict[str, tuple[Callable[..., Tensor], list[Tensor], Tensor]] = {
    "fused": (sdpa, [Q, K, V], weights(Q, K)),
    "by keyword": (lambda q, k, v: sdpa(value=v, key=k, query=q), [Q, K, V], weights(Q, K)),
    "unfused": (unfused, [Q, K, V], weights(Q, K)),
    "einsum": (by_einsum, [Q, K, V], weights(Q, K)),
    "heads in the batch": (heads_in_batch, [Q, K, V], weights(Q, K)),
    "causal": (lambda q, k, v: sdpa(q, k, v, is_causal=True), [Q, K, V], weights(Q, K, causal=True)),
    "mask": (lambda q, k, v: sdpa(q, k, v, MASK), [Q, K, V], weights(Q, K, MASK)),
    "position bias": (lambda q, k, v: sdpa(q, k, v, BIAS), [Q, K, V], weights(Q, K, BIAS)),
    "scale": (lambda q, k, v: sdpa(q, k, v, scale=0.3), [Q, K, V], weights(Q, K, scale=0.3)),
    "groups of queries": (lambda q, k, v: sdpa(q, k, v, enable_gqa=True), [Q, FEW_K, FEW_V], weights(Q, FEW_K)),
    "groups, repeated": (
        lambda q, k, v: unfused(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
        [Q, FEW_K, FEW_V],
        weights(Q, FEW_K),
    ),
}


@pytest.mark.parametrize("name", slow_but(SPELLINGS, "fused", "unfused", "einsum", "mask", "groups of queries"))
def test_attention_passes_all_relevance_to_the_values_by_absolute_share(name):
    op, (q, k, v), a = SPELLINGS[name]
    of_queries, of_keys, of_values = columns(op, [q, k, v])
    assert not of_queries.any()
    assert not of_keys.any()
    assert float((of_values - value_shares(a, v, name == "heads in the batch")).abs().max()) <= TOLERANCE


@pytest.mark.medium
def test_learned_queries_and_fixed_keys_are_constants():
    """Cross-attention from parameters, and attention over a memory with computed values only."""
    for op in (lambda v: sdpa(Q[None], K[None], v), lambda v: unfused(Q[None], K[None], v)):
        (actual,) = columns(op, [V])
        assert float((actual - value_shares(weights(Q, K), V)).abs().max()) <= TOLERANCE
    # If the values are constants, the output depends on the queries alone.
    for op in (lambda q: sdpa(q, K[None], V[None]), lambda q: unfused(q, K[None], V[None])):
        (actual,) = columns(op, [Q])
        torch.testing.assert_close(actual.sum(1), torch.ones(len(actual), dtype=DOUBLE))


@pytest.mark.medium
def test_fixed_values_are_the_same_fused_and_eager():
    fused = columns(lambda q: sdpa(q, K[None], V[None]), [Q])[0]
    plain = columns(lambda q: unfused(q, K[None], V[None]), [Q])[0]
    assert float((fused - plain).abs().max()) <= TOLERANCE


def test_relevance_of_a_fully_masked_query_is_absorbed():
    mask = MASK.clone()
    mask[1] = False
    (actual,) = columns(lambda v: sdpa(Q[None], K[None], v, mask), [V])
    rows = actual.reshape(HEADS, LENGTH, WIDTH, -1)
    assert not rows[:, 1].any()
    torch.testing.assert_close(rows[:, [0, 2]].sum(-1), torch.ones(HEADS, 2, WIDTH, dtype=DOUBLE))


def test_dropout_that_is_always_active_raises():
    mu = RelevanceMeasure(
        Apply(lambda v: sdpa(v, v, v, dropout_p=0.2)).eval(), V[None], start=V[None] * 0 + 1, composite=NRMDefault()
    )
    with pytest.raises(UnsupportedOperationError, match=r"which is random.*dropout_p=self.p if self.training"):
        mu.marginal("input")


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


@pytest.mark.parametrize("name", ["fused", "unfused", "einsum", "softmax module"])
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
    actual = mu.marginal("input") * mu.output[:, None, None]
    torch.testing.assert_close(actual, gradient * leaf.detach(), atol=1e-8, rtol=1e-6)
    by_values = Normalized(rules, residual="sink", sums="signed")
    other = RelevanceMeasure(block, x, 1, composite=by_values)
    assert float((other.marginal("input") * other.output[:, None, None] - actual).abs().max()) > 1e-3


@pytest.mark.parametrize("attention", ["half", "", None, True])
def test_an_unknown_attention_setting_raises(attention):
    with pytest.raises(ValueError, match="choose 'value' or 'halves'"):
        Normalized(NRMAbsolute(), attention=attention)


@pytest.mark.medium
def test_rotary_embeddings_of_queries_and_keys_receive_no_relevance():
    angle = torch.arange(LENGTH, dtype=DOUBLE)[:, None] * torch.tensor([0.3, 0.7], dtype=DOUBLE)

    def rotated(x: Tensor) -> Tensor:
        turned = torch.cat([-x[..., 1:], x[..., :1]], -1)
        return x * angle.cos() + turned * angle.sin()

    x = draw(HEADS, LENGTH, WIDTH)
    (actual,) = columns(lambda x: sdpa(rotated(x), rotated(x), x), [x])
    scores = torch.einsum("hik,hjk->hij", rotated(x), rotated(x)) / math.sqrt(WIDTH)
    rows = torch.zeros(HEADS, LENGTH, WIDTH, HEADS, LENGTH, WIDTH, dtype=DOUBLE)
    size = x.abs() + FLOOR * x.abs().mean()
    for h in range(HEADS):
        for i in range(LENGTH):
            for k in range(WIDTH):
                part = scores.softmax(-1)[h, i] * size[h, :, k]
                rows[h, i, k, h, :, k] = part / part.sum()
    assert float((actual - rows.reshape(actual.shape)).abs().max()) <= TOLERANCE


def decomposed(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention in operations of torch; the output of a fully masked query is zero."""
    k, v = (tensor.repeat_interleave(HEADS // tensor.shape[1], 1) for tensor in (k, v))
    scores = q @ k.transpose(-2, -1) / math.sqrt(WIDTH)
    if mask is None:
        return scores.softmax(-1) @ v
    if mask.dtype != torch.bool:
        return (scores + mask).softmax(-1) @ v
    scored = scores.masked_fill(~mask, -math.inf).softmax(-1)
    return scored.masked_fill(~mask, 0.0) @ v


FULLY_MASKED = MASK.clone()


FULLY_MASKED[1] = False


DECOMPOSED: dict[str, tuple[dict[str, Any], Tensor | None, tuple[Tensor, Tensor, Tensor]]] = {
    "causal": ({"is_causal": True}, torch.ones(LENGTH, SOURCES).tril().bool(), (Q, K, V)),
    "mask": ({"attn_mask": MASK}, MASK, (Q, K, V)),
    "a fully masked query": ({"attn_mask": FULLY_MASKED}, FULLY_MASKED, (Q, K, V)),
    "position bias": ({"attn_mask": BIAS}, BIAS, (Q, K, V)),
    "groups of queries": ({"enable_gqa": True}, None, (Q, FEW_K, FEW_V)),
}


@pytest.mark.parametrize("name", DECOMPOSED)
def test_the_fused_function_with_halves_equals_its_decomposition(name):
    options, mask, inputs = DECOMPOSED[name]
    inputs = tuple(value[None] for value in inputs)
    start = draw(1, *sdpa(*inputs, **options).shape[1:])
    rules = Normalized(NRMAbsolute(), residual="sink", attention="halves")
    fused, unfused = (
        RelevanceMeasure(Apply(op), inputs, start=start, composite=rules)
        for op in (lambda q, k, v: sdpa(q, k, v, **options), lambda q, k, v: decomposed(q, k, v, mask))
    )
    explained = (start * sdpa(*inputs, **options)).sum() / start.sum()
    torch.testing.assert_close(fused.output, explained[None])
    for number in range(3):
        actual, expected = (mu.marginal(f"input[{number}]") for mu in (fused, unfused))
        assert bool(expected.any())
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=TOLERANCE)
