"""Functions that consist of others have the kernels of their decompositions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import (
    BIAS,
    IMAGE,
    NONE,
    A,
    Apply,
    B,
    C,
    K,
    Op,
    V,
    W,
    alone,
    by_epsilon,
    by_size,
    check,
    columns,
    draw,
    eye,
    linear_rules,
    spread,
)


def test_lerp_and_addcmul_are_their_sums_and_products():
    total = (0.3 * A).abs() + (0.7 * B).abs()
    shares = [(0.7 * B).abs() / total, (0.3 * A).abs() / total]
    check(columns(lambda a, b: torch.lerp(b, a, 0.3), [A, B]), [spread(shares[1], A), spread(shares[0], B)])
    total = A.abs() + (2 * B * C).abs()
    expected = [spread(A.abs() / total, A), *[spread((2 * B * C).abs() / total / 2, B)] * 2]
    check(columns(lambda a, b, c: torch.addcmul(a, b, c, value=2), [A, B, C]), expected)
    total = A.abs() + (B / C).abs()
    check(columns(torch.addcdiv, [A, B, C]), [spread(A.abs() / total, A), spread((B / C).abs() / total, B), NONE])


def test_addmm_is_a_layer_with_a_bias_and_baddbmm_a_product_plus_a_bias():
    x = draw(3)
    check(columns(lambda x: torch.addmm(BIAS, x, W), [x], linear_rules()), [by_epsilon(W.T, x, BIAS)])
    check(columns(lambda x: torch.addmm(BIAS, x, W, alpha=2), [x], linear_rules()), [by_epsilon(W.T, x)])
    x, weight = draw(2, 4), torch.kron(eye(2), V.T.contiguous())

    def batched(x: Tensor) -> Tensor:
        return torch.baddbmm(K[None, :, :2].expand(len(x), -1, -1), x, V.expand(len(x), -1, -1))

    check(columns(batched, [x]), [by_size(weight, x)])


def test_a_bilinear_form_splits_by_products_and_then_among_their_factors():
    net, a, b = nn.Bilinear(3, 4, 2).double(), draw(3), draw(4, seed=1)
    product = a[:, None] * b
    share = by_size(net.weight.detach().flatten(1), product).reshape(2, 3, 4)
    larger = [torch.zeros(2, 3).double(), share.sum(1)]  # the larger factor is the signal
    check(columns(net, [a, b]), larger)
    net, b = nn.Bilinear(3, 3, 2, bias=False).double(), draw(3, seed=1)
    share = by_size(net.weight.detach().flatten(1), a[:, None] * b).reshape(2, 3, 3)
    check(columns(net, [a, b]), [share.sum(2) / 2, share.sum(1) / 2])
    weight = net.weight.detach()
    gated = columns(lambda a, b: F.bilinear(a, b.sigmoid(), weight), [a, b])
    share = by_size(weight.flatten(1), a[:, None] * b.sigmoid()).reshape(2, 3, 3)
    check(gated, [share.sum(2), torch.zeros(2, 3).double()])
    expected = by_epsilon(weight @ b, a)  # a constant factor goes into the weights
    check(columns(lambda a: F.bilinear(a, b.expand(len(a), -1), weight), [a], linear_rules()), [expected])


def test_nanmean_and_nansum_split_among_the_numbers():
    image = IMAGE.clone()
    holes = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.3

    def with_holes(a: Tensor) -> Tensor:
        return a.masked_fill(holes, math.nan)

    share = image.abs().masked_fill(holes, 0).flatten(1)
    share = share / share.sum(1, keepdim=True)
    expected = torch.block_diag(*share[:, None])
    for op in (lambda a: with_holes(a).nanmean((2, 3)), lambda a: torch.nansum(with_holes(a), dim=(2, 3))):
        (actual,) = columns(op, [image])
        assert float((actual - expected).abs().max()) <= 1e-5  # the rule has a floor


def test_diff_is_its_differences():
    a, first = draw(2, 5), draw(1, 5, seed=1)
    check(columns(lambda a: a.diff(), [a]), columns(lambda a: a[..., 1:] - a[..., :-1], [a]))

    def twice(a: Tensor, b: Tensor) -> Tensor:
        a = torch.cat([b, a], 1)
        a = a[:, 1:] - a[:, :-1]
        return a[:, 1:] - a[:, :-1]

    check(columns(lambda a, b: torch.diff(a, 2, 1, prepend=b), [a, first]), columns(twice, [a, first]))


VARIANCES: dict[str, tuple[Op, Op]] = {
    "var": (lambda a: a.var(2), lambda a: (a - a.mean(2, keepdim=True)).square().sum(2) / 2),
    "var by name": (
        lambda a: torch.var(a, dim=(1, 2), correction=0, keepdim=True),
        lambda a: (a - a.mean((1, 2), keepdim=True)).square().sum((1, 2), keepdim=True) / 6,
    ),
    "biased std": (lambda a: a.std(2, False), lambda a: ((a - a.mean(2, keepdim=True)) ** 2).sum(2).div(3).sqrt()),
    "std_mean": (
        lambda a: torch.cat(torch.std_mean(a, 2), 1),
        lambda a: torch.cat([((a - a.mean(2, keepdim=True)) ** 2).sum(2).div(2).sqrt(), a.mean(2)], 1),
    ),
    "var_mean": (
        lambda a: torch.stack(torch.var_mean(a, (1, 2), unbiased=False), 1),
        lambda a: torch.stack([((a - a.mean((1, 2), True)) ** 2).sum((1, 2)).div(6), a.mean((1, 2))], 1),
    ),
}


@pytest.mark.parametrize("name", VARIANCES)
def test_a_variance_is_its_decomposition(name):
    op, decomposed = VARIANCES[name]
    assert torch.allclose(op(A[None]), decomposed(A[None]))
    check(columns(op, [A]), columns(decomposed, [A]))


def test_variance_and_mean_over_all_dimensions():
    for op in (lambda a: a.var(False)[None], lambda a: a.std()[None], lambda a: a.nanmean()[None]):
        mu = RelevanceMeasure(Apply(op), A[None], composite=Normalized(NRMAbsolute()))
        assert float(mu.output) == pytest.approx(float(op(A[None])))
        assert float(mu.marginal("input").sum()) == pytest.approx(1)


def test_a_trace_is_a_sum_and_an_inner_product_a_product():
    x, fixed = draw(3, 3), draw(2, 3, seed=3)
    size = x.diagonal().abs()
    weight = torch.zeros(1, 9, dtype=torch.float64)
    weight[0, [0, 4, 8]] = size / size.sum()
    check(columns(lambda x: x[0].trace().reshape(1, 1), [x]), [weight])
    y = draw(3, seed=8)
    check(columns(lambda y: torch.inner(y, fixed), [y]), [by_size(fixed, y)])


VECTOR, CUBE, BLOCKS = draw(4, seed=11), draw(2, 2, 2, seed=12), draw(2, 4, 4, seed=13).float()
DECOMPOSED: dict[str, tuple[Op, Op]] = {
    "inner with a number": (lambda x: torch.inner(x, torch.tensor(2.0).double()), lambda x: x * 2),
    "vecdot": (lambda x: torch.linalg.vecdot(x, x.flip(-1), dim=1), lambda x: (x * x.flip(-1)).sum(1)),
    "addmv": (
        lambda x: torch.addmv(x[0, :, 0], x[0], VECTOR, beta=0.5, alpha=2)[None],
        lambda x: (0.5 * x[0, :, 0] + 2 * (x[0] @ VECTOR))[None],
    ),
    "addbmm": (
        lambda x: torch.addbmm(x[0, :, :2], x[0].reshape(2, 2, 2), CUBE)[None],
        lambda x: (x[0, :, :2] + (x[0].reshape(2, 2, 2) @ CUBE).sum(0))[None],
    ),
    "grouped_mm of batches": (
        lambda x: F.grouped_mm(x.float().reshape(2, 1, 4), BLOCKS)[None],
        lambda x: torch.stack([x[0, :1].float() @ BLOCKS[0], x[0, 1:].float() @ BLOCKS[1]])[None],
    ),
    "linear with a computed weight": (lambda x: F.linear(x, 2 * x[0]), lambda x: x @ (2 * x[0]).T),
    "linear with a computed bias": (
        lambda x: F.linear(x, CUBE.reshape(2, 4), 3 * x[0, 0, :2]),
        lambda x: x @ CUBE.reshape(2, 4).T + 3 * x[0, 0, :2],
    ),
    "by keyword, with a constant weight and bias for a computed one": (
        lambda x: F.linear(input=x, weight=2 * x[0], bias=VECTOR[:2]),
        lambda x: x @ (2 * x[0]).T + VECTOR[:2],
    ),
    "conv1d with a computed bias": (
        lambda x: F.conv1d(x, CUBE, 3 * x[0, 0, :2], padding=1),
        lambda x: F.conv1d(x, CUBE, padding=1) + 3 * x[0, 0, :2, None],
    ),
    "conv_transpose1d with a computed bias": (
        lambda x: torch.conv_transpose1d(x, CUBE, 3 * x[0, 0, :2], 2),
        lambda x: torch.conv_transpose1d(x, CUBE, None, 2) + 3 * x[0, 0, :2, None],
    ),
    "bilinear with a computed bias": (
        lambda x: F.bilinear(x, x, BLOCKS[:, :2].double().reshape(1, 4, 4), x[0, 0, :1]),
        lambda x: F.bilinear(x, x, BLOCKS[:, :2].double().reshape(1, 4, 4)) + x[0, 0, :1],
    ),
    "maximum with zero": (lambda x: torch.maximum(x, torch.zeros(())), F.relu),
    "slice_scatter": (
        lambda x: x.slice_scatter(3 * x[:, :, :2], 2, 1, 3),
        lambda x: torch.cat([x[:, :, :1], 3 * x[:, :, :2], x[:, :, 3:]], 2),
    ),
    "put": (
        lambda x: x.put(torch.tensor([1, 6]), 3 * x[0, 0, :2]),
        lambda x: torch.stack([x[0, 0, 0], 3 * x[0, 0, 0], *x[0, 0, 2:], *x[0, 1, :2], 3 * x[0, 0, 1], x[0, 1, 3]])
        .reshape(1, 2, 4),
    ),
    "index_add of a constant": (
        lambda x: x.index_add(2, torch.tensor([1, 1]), CUBE[:1, :, :2]),
        lambda x: x + torch.nn.functional.pad(CUBE[:1].sum(2, keepdim=True), (1, 2)),
    ),
    "scatter_add of a constant": (
        lambda x: x.scatter_add(2, torch.ones(1, 2, 2, dtype=torch.long), CUBE[:1]),
        lambda x: x + torch.nn.functional.pad(CUBE[:1].sum(2, keepdim=True), (1, 2)),
    ),
}  # fmt: skip


if not hasattr(F, "grouped_mm"):
    del DECOMPOSED["grouped_mm of batches"]


@pytest.mark.parametrize("name", DECOMPOSED)
def test_a_decomposed_function_equals_its_decomposition(name):
    x = draw(2, 4)
    for one, other in (DECOMPOSED[name], DECOMPOSED[name][::-1]):
        torch.testing.assert_close(one(x[None]), other(x[None]))
    actual, expected = (alone(op, x) for op in DECOMPOSED[name])
    assert bool(expected.any())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_other_grouped_products_raise_with_advice():
    with pytest.raises(UnsupportedOperationError, match="Multiply group by group"):
        alone(
            lambda x: F.grouped_mm(x[0].float().T, x[0].float(), offs=torch.tensor([1, 2], dtype=torch.int32))[None],
            draw(2, 4),
        )


@pytest.mark.parametrize("name", [name for name in DECOMPOSED if "computed" in name])
@pytest.mark.parametrize("composite", [NRMAbsolute, None])
def test_no_relevance_is_lost_where_the_model_computes_a_weight_or_bias(name, composite):
    x = draw(2, 4)[None]
    for start in torch.eye(DECOMPOSED[name][0](x).numel(), dtype=torch.float64):
        start = start.reshape(DECOMPOSED[name][0](x).shape)
        mu = RelevanceMeasure(Apply(DECOMPOSED[name][0]).eval(), x, start=start, composite=composite and composite())
        total = mu.marginal("input").sum() + sum(value.sum() for value in mu.sinks().values())
        assert float(total) == pytest.approx(1, abs=1e-9)
