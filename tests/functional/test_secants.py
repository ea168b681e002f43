"""Kernels of differences of all operations: sums, slopes from their definitions, limits, and what has no kernel.

Covers: nrm_plugin.functional.secant_kernels, nrm_plugin.functional.secant_products,
nrm_plugin.functional.secant_maxima, nrm_plugin.functional.difference_steps, nrm_plugin.functional.differences,
nrm_plugin.functional.rules_on_differences, nrm_plugin.kernels.reference_pass.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

import nrm_plugin
from nrm_plugin import ABSORBED, RelevanceMeasure, at
from nrm_plugin.errors import UnsupportedOperationError
from nrm_plugin.functional.elementwise import ACTIVATIONS, ELEMENTWISE
from nrm_plugin.functional.registry import KERNELS
from nrm_plugin.functional.secant_kernels import exponential_mean
from nrm_plugin.functional.secants import change
from tests.differences import Head, draw

TIGHT = {"rtol": 0.0, "atol": 1e-12}
X, X0 = draw(3, 4, 5, seed=3), draw(3, 4, 5, seed=4)
X0[:, 1] = X[:, 1]
"""Position 1 has no difference, so that neurons without a difference are part of every test."""
MATRIX, INDEX = draw(6, 6, seed=5), torch.tensor([0, 0, 1, 2, 2, 3])
CAUSAL = torch.ones(4, 4, dtype=torch.bool).tril()


def positive(h: Tensor) -> Tensor:
    return h.sigmoid() * 0.9 + 0.05


def written(h: Tensor) -> Tensor:
    h = h * 1
    h[:, 0] = 0
    h[:, 2, INDEX[3:]] = 1.0
    return h.mul_(2).add_(3).relu_()


def grouped(h: Tensor) -> Tensor:
    query, key = h.reshape(3, 4, 3, 2).transpose(1, 2), h[..., :2].unsqueeze(1).sin()
    return F.scaled_dot_product_attention(query, key, h[..., 2:4].unsqueeze(1), enable_gqa=True)


def rotary(h: Tensor) -> Tensor:
    angle = torch.arange(4.0).double().unsqueeze(1) * torch.tensor([1.0, 0.1, 0.01]).double()
    half = torch.cat([-h[..., 3:], h[..., :3]], -1)
    q = h * angle.cos().repeat(1, 2) + half * angle.sin().repeat(1, 2)
    return (q @ q.mT / 6**0.5).softmax(-1) @ h


OPERATIONS = {
    "mul_ by a matrix": lambda h: (h * 1).mul_(MATRIX[:4]),
    **{
        f"F.{name}": getattr(F, name)
        for name in ACTIVATIONS
        if name not in ("batch_norm", "prelu", "rrelu", "threshold")
    },
    **{
        name: getattr(torch, name) for name in ELEMENTWISE if name in "exp exp2 neg abs square erf sin tan sinc".split()
    },
    **{name: lambda h, name=name: getattr(torch, name)(positive(h)) for name in "sqrt rsqrt log reciprocal".split()},
    "softmax": lambda h: h.softmax(-1),
    "softmax of large scores": lambda h: (50 * h).softmax(-1),
    "log_softmax": lambda h: F.log_softmax(h, 1),
    "softmin": lambda h: F.softmin(h, -1),
    "logsumexp": lambda h: h.logsumexp((1, 2)),
    "layer_norm": lambda h: F.layer_norm(h, (6,), MATRIX[0], MATRIX[1]),
    "layer_norm of two dimensions": lambda h: F.layer_norm(h, (4, 6)),
    "rms_norm": lambda h: F.rms_norm(h, (6,), MATRIX[0], 0.1),
    "group_norm": lambda h: F.group_norm(h.transpose(1, 2), 2, MATRIX[0]),
    "instance_norm": lambda h: F.instance_norm(h.transpose(1, 2)),
    "batch_norm": lambda h: F.batch_norm(h.transpose(1, 2), MATRIX[0], MATRIX[1].abs() + 1, MATRIX[2], MATRIX[3]),
    "local_response_norm": lambda h: F.local_response_norm(h.transpose(1, 2), 3),
    "normalize": lambda h: F.normalize(h, dim=-1),
    "norms": lambda h: h.norm(dim=-1) + h.norm(1, -1) + torch.linalg.vector_norm(h, 3, -1) + h.norm(math.inf, -1),
    "product": lambda h: h * h.sin() * h.mean(-1, keepdim=True),
    "square by itself": lambda h: h * h,
    "quotient": lambda h: h / (1 + h.square()),
    "power": lambda h: (h.square() + 0.1) ** h.sigmoid(),
    "hypot": lambda h: torch.hypot(h, h.roll(1, -1)),
    "logaddexp": lambda h: torch.logaddexp(h, h.roll(1, -1)),
    "sums": lambda h: torch.add(h, h.sin(), alpha=3) - h.cos() + (1 - h),
    "maximum": lambda h: torch.maximum(h, h.roll(1, -1)) + torch.minimum(h, h.cos()) + h.clamp(-0.2, 0.3),
    "clamp by tensors": lambda h: torch.clamp(h, h.roll(1, -1) - 0.5, h.roll(2, -1) + 0.5),
    "max": lambda h: h.max(-1)[0] + h.amax(2) + h.min(2).values + h.amin(-1),
    "max of several": lambda h: h.amax((1, 2)),
    "max_pool1d": lambda h: F.max_pool1d(h, 3, 2, 1),
    "max_pool2d": lambda h: F.max_pool2d(h, 2, return_indices=True)[0],
    "max_pool3d": lambda h: nn.MaxPool3d((1, 2, 2))(h.unsqueeze(1)),
    "adaptive_max_pool2d": lambda h: nn.AdaptiveMaxPool2d(2)(h),
    "fractional_max_pool2d": lambda h: F.fractional_max_pool2d(
        h.unsqueeze(1), 2, (2, 3), _random_samples=torch.full((3, 1, 2), 0.3).double()
    ),
    "matmul": lambda h: h @ MATRIX + h @ h.transpose(1, 2) @ h,
    "einsum": lambda h: torch.einsum("bij,jk,bik->bi", h, MATRIX, h.sin()),
    "einsum of three": lambda h: torch.einsum("bij,bik,bjk->bi", h, h.sin(), h.transpose(1, 2) @ h),
    "averages": lambda h: h.mean(1, keepdim=True) + h.sum((1, 2), keepdim=True) + h.var(1, keepdim=True) + h.cumsum(-1),
    "avg_pool2d": lambda h: F.avg_pool2d(h, 2) + F.adaptive_avg_pool2d(h, (2, 3)),
    "lp_pool2d": lambda h: F.lp_pool2d(positive(h).unsqueeze(1), 2, 2),
    "interpolate": lambda h: F.interpolate(h.unsqueeze(1), scale_factor=2, mode="bicubic"),
    "nearest": lambda h: F.interpolate(h, scale_factor=2),
    "grid_sample": lambda h: F.grid_sample(h.unsqueeze(1), draw(3, 2, 2, 2) / 4, align_corners=False),
    "attention": lambda h: F.scaled_dot_product_attention(h, h.sin(), h.cos(), CAUSAL),
    "causal attention": lambda h: F.scaled_dot_product_attention(h[:, None], h[:, None], h[:, None], is_causal=True),
    "grouped attention": grouped,
    "rotary attention": rotary,
    "masked softmax": lambda h: h.masked_fill(torch.eye(4, 6, dtype=torch.bool), -math.inf).softmax(-1),
    "glu": lambda h: F.glu(h),
    "lerp": lambda h: torch.lerp(h, h.sin(), h.sigmoid()) + torch.addcmul(h, h.sin(), h.cos()),
    "conv1d": lambda h: F.conv1d(h, draw(8, 4, 3, seed=6), draw(8), padding=1),
    "conv_transpose1d": lambda h: F.conv_transpose1d(h, draw(4, 8, 3, seed=6), draw(8), stride=2),
    "computed weight": lambda h: torch.stack([F.linear(one, one.sin(), one[:, 0]) for one in h]),
    "cat, pad, where": lambda h: torch.where(CAUSAL, F.pad(torch.cat([h[..., 1:], h], -1), (1, 0))[..., :4], 2.0),
    "gather": lambda h: h.gather(-1, INDEX.expand(3, 4, 6)) + h[..., INDEX],
    "index_add": lambda h: torch.zeros(3, 4, 4).double().index_add(2, INDEX, h),
    "scatter_add": lambda h: torch.zeros(3, 4, 6).double().scatter_add(2, INDEX.expand(3, 4, 6), h),
    "scatter_reduce": lambda h: torch.zeros(3, 4, 6).double().scatter_reduce(2, INDEX.expand(3, 4, 6), h, "amax"),
    "smallest of groups": lambda h: h.scatter_reduce(2, INDEX.expand(3, 4, 6), h.sin(), "amin", include_self=False),
    "in place": written,
    "cosine_similarity": lambda h: F.cosine_similarity(h, h.sin(), -1),
    "cdist": lambda h: torch.cdist(h, h.sin()),
    "fft": lambda h: torch.fft.rfft(h).abs() + torch.fft.fft(h).real[..., :4],
    "unfold and fold": lambda h: F.fold(F.unfold(h.unsqueeze(1), 2), (4, 6), 2),
}


@pytest.mark.medium
@pytest.mark.parametrize("name", OPERATIONS)
def test_differences_of_an_operation_add_up(name):
    net = Head(OPERATIONS[name]).eval()
    mu = RelevanceMeasure(net, X, 0, reference=X0)
    torch.testing.assert_close(mu.output, (net(X) - net(X0))[:, 0].detach(), **TIGHT)
    maps = mu.marginal(["input", "first"])
    size = float(max(mu.variation("first").max(), mu.variation("input").max()))
    for relevance in maps.values():
        torch.testing.assert_close(relevance.flatten(1).sum(1), torch.ones(3).double(), rtol=0, atol=1e-12 * size)
        assert bool((relevance[:, 1].abs() < 1e-80).all()), "no difference, no relevance"
    torch.testing.assert_close(mu(ABSORBED), torch.zeros(3).double(), rtol=0, atol=1e-10)
    # The multiplier of a neuron is its marginal by its difference; the layer above propagates multipliers.
    h, h0 = net.first(X).detach(), net.first(X0).detach()
    apart = torch.ones(4, dtype=torch.bool)
    apart[1] = False
    multiplier = (maps["first"][:, apart] / (h - h0)[:, apart]).detach()
    expected = (X - X0)[:, apart] * (multiplier @ net.first.weight.detach())
    torch.testing.assert_close(maps["input"][:, apart], expected, rtol=0, atol=1e-10 * size)
    # By the limit of a small difference, slopes are derivatives, also where there is no difference.
    near = X + 1e-4 * (X0 - X)
    close = RelevanceMeasure(net, X, 0, reference=near)
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf).sum(), leaf)
    both = (close.marginal("input") * close.output.reshape(3, 1, 1), gradient * (X - near))
    scale = float(both[1].abs().max())
    torch.testing.assert_close(*both, rtol=0, atol=0.05 * scale)


@pytest.mark.parametrize("name", OPERATIONS)
def test_tangents_of_an_operation_are_its_gradient(name):
    net = Head(OPERATIONS[name]).eval()
    mu = RelevanceMeasure(net, X, 0, reference=X0, slopes="tangent")
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf).sum(), leaf)
    expected = gradient * (X - X0)
    relevance = mu.marginal("input") * mu.output.reshape(3, 1, 1)
    torch.testing.assert_close(relevance, expected, rtol=0, atol=1e-10 * float(expected.abs().max()))
    total = relevance.flatten(1).sum(1) / mu.output + mu.sink("input")
    torch.testing.assert_close(total, torch.ones(3).double(), rtol=0, atol=1e-11 * float(mu.variation("input").max()))


MODULES = {
    "LSTM": lambda: nn.LSTM(6, 4, batch_first=True, bidirectional=True),
    "GRU": lambda: nn.GRU(6, 4, 2, batch_first=True),
    "RNN": lambda: nn.RNN(6, 4, batch_first=True),
    "MultiheadAttention": lambda: nn.MultiheadAttention(6, 3, batch_first=True),
    "TransformerEncoderLayer": lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, norm_first=True),
    "Bilinear": lambda: nn.Bilinear(6, 6, 3),
    "PReLU": lambda: nn.PReLU(4),
}


@pytest.mark.parametrize("name", MODULES)
def test_differences_of_a_module_add_up(name):
    torch.manual_seed(0)
    inner = MODULES[name]().double().eval()

    def run(h):
        several = {"MultiheadAttention": (h, h, h), "Bilinear": (h, h.sin())}.get(name, (h,))
        result = inner(*several)
        return result[0] if isinstance(result, tuple) else result

    net = Head(run)
    net.inner = inner
    mu = RelevanceMeasure(net.eval(), X, 0, reference=X0)
    torch.testing.assert_close(mu.output, (net(X) - net(X0))[:, 0].detach(), **TIGHT)
    torch.testing.assert_close(mu.marginal("input").flatten(1).sum(1), torch.ones(3).double(), rtol=0, atol=1e-11)
    torch.testing.assert_close(mu(ABSORBED), torch.zeros(3).double(), rtol=0, atol=1e-11)


def test_every_function_with_a_kernel_has_one_of_differences_or_is_decomposed():
    from nrm_plugin.functional.decompositions import DECOMPOSITIONS
    from nrm_plugin.functional.differences import SECANTS

    in_python = {"local_response_norm", "normalize", "lp_pool2d", "upsample", "upsample_bilinear", "stochastic_depth"}
    rest = KERNELS.keys() - SECANTS.keys() - DECOMPOSITIONS.keys() - in_python
    assert rest == {"scaled_dot_product_attention", "renorm"}, "the first is decomposed, the second has no kernel"


def test_the_maximum_is_divided_by_the_mean_over_both_orders_of_switching():
    a, a0 = torch.tensor([[3.0, 2.0, 0.0]]).double(), torch.tensor([[1.0, 2.5, 0.0]]).double()

    class Pool(nn.Module):
        def forward(self, x):
            return F.max_pool1d(x.unsqueeze(1), 3).squeeze(1)

    mu = RelevanceMeasure(Pool(), a, reference=a0)
    # Entry 0 first: max(3, 2.5) - 2.5 = 0.5, the rest 0. Entry 1 first: max(1, 2) - 2.5 = -0.5, the rest 1.
    expected = torch.tensor([[(0.5 + 1.0) / 2, (0.0 - 0.5) / 2, 0.0]]).double() / 0.5
    torch.testing.assert_close(mu.marginal("input"), expected, **TIGHT)

    class Spelled(nn.Module):
        def forward(self, x):
            return torch.maximum(x[:, :1], x[:, 1:2])

    for net in (Spelled(), nn.MaxPool1d(3)):
        got = RelevanceMeasure(net, a, reference=a0)
        torch.testing.assert_close(got.marginal("input"), expected, **TIGHT)


def test_slopes_of_softmax_are_those_of_its_exponentials_and_its_logarithm():
    z, z0 = draw(1, 4, seed=1) * 3, draw(1, 4, seed=2) * 3

    class Chosen(nn.Module):
        def forward(self, x):
            return x.softmax(-1)

    p, p0 = z.softmax(-1)[0], z0.softmax(-1)[0]
    mean = [(p[i] - p0[i]) / (p[i].log() - p0[i].log()) for i in range(4)]
    e, e0 = z.exp()[0], z0.exp()[0]
    share = [(e[j] - e0[j]) / (z - z0)[0, j] for j in range(4)]
    total = (e.sum() - e0.sum()) / (e.sum().log() - e0.sum().log())
    for i in range(4):
        mu = RelevanceMeasure(Chosen(), z, i, reference=z0)
        slopes = torch.stack([mean[i] * (float(i == j) - share[j] / total) for j in range(4)])
        expected = slopes * (z - z0)[0] / (p - p0)[i]
        torch.testing.assert_close(mu.marginal("input")[0], expected, **TIGHT)
        assert bool((slopes.abs() <= 1).all())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 320.0), (torch.float64, 3200.0)])
def test_softmax_of_logits_whose_exponentials_have_no_quotient(dtype, size):
    class Weighted(nn.Module):
        def forward(self, z):
            return z.softmax(-1) @ torch.tensor([[1.0], [3.0], [-2.0]]).to(z)

    z, z0 = torch.tensor([[1.0, 0.5, -1.0]]).to(dtype), torch.tensor([[0.0, 1.0, 0.5]]).to(dtype)
    mu = RelevanceMeasure(Weighted(), z + size, reference=z0)
    # e^z0 / e^z is zero, so the logarithmic mean of the two is e^z / size, and that of their sums has the same factor.
    run, run0 = (z + size - z0).double()[0], torch.logsumexp((z + size).double(), -1) - torch.logsumexp(z0.double(), -1)
    p, p0 = z.double().softmax(-1)[0], z0.double().softmax(-1)[0]
    mean = torch.where(p == p0, p, (p - p0) / (p.log() - p0.log()))
    share = p / run * run0
    above = torch.tensor([1.0, 3.0, -2.0]).double() * mean
    expected = run * (above - share * above.sum()) / ((p - p0) @ torch.tensor([1.0, 3.0, -2.0]).double())
    scale = {"rtol": 0, "atol": float(size * 1e2 * torch.finfo(dtype).eps)}
    torch.testing.assert_close(mu.marginal("input").double()[0], expected, **scale)
    torch.testing.assert_close(mu.marginal("input").double().sum(), torch.ones(()).double(), **scale)


def test_secants_and_logarithmic_means_are_stable():
    z = torch.tensor([1.0, 1.0, 1.0, 0.0, -2.0]).double()
    z0 = torch.tensor([2.0, 1.0 + 1e-13, 1.0, 0.0, 3.0]).double()
    run = torch.where(z == z0, 1.0, z - z0)
    slopes = change(torch.tanh, (z, z0), run) / run
    derivative = 1 - torch.tanh(z) ** 2
    torch.testing.assert_close(slopes[1:4], derivative[1:4], rtol=1e-9, atol=0)
    torch.testing.assert_close(slopes[[0, 4]], ((z.tanh() - z0.tanh()) / (z - z0))[[0, 4]])
    one, two = draw(1000), draw(1000, seed=1)
    assert bool((change(torch.relu, (one, two)) * (one - two) >= 0).all())
    zero, infinite = torch.zeros(1).double(), torch.full((1,), -math.inf).double()
    assert float(change(torch.sqrt, (zero, zero))) == 0
    assert float(change(torch.exp, (zero, infinite))) == 1
    assert float(change(torch.exp, (infinite, infinite))) == 0
    pairs = [(1.0, 1.0), (1.0, 1 + 1e-12), (1.0, 0.0), (0.0, 0.0), (1.0, 1e-300), (2.0, 1.0)]
    means = exponential_mean(*(torch.tensor(side, dtype=torch.float64).log() for side in zip(*pairs, strict=True)))
    expected = torch.tensor([1.0, 1.0, 0.0, 0.0, 1 / math.log(1e300), 1 / math.log(2.0)]).double()
    torch.testing.assert_close(means, expected, rtol=1e-7, atol=0)


def test_absolute_slopes_bound_the_walks():
    for name in ("product", "conv1d", "layer_norm", "attention", "maximum", "softmax", "interpolate"):
        mu = RelevanceMeasure(Head(OPERATIONS[name]), X, 0, reference=X0)
        assert bool((mu.walk_variation() >= mu.variation("first") - 1e-9).all()), name
        assert bool((mu.variation("first") >= 1 - 1e-9).all()), name


@pytest.mark.usefixtures("own_kernels")
def test_own_operations_take_part():
    @nrm_plugin.register_kernel(torch.special.entr)
    def entropy(call):
        return call.identity()

    mu = RelevanceMeasure(Head(lambda h: torch.special.entr(positive(h))), X, 0, reference=X0)
    torch.testing.assert_close(mu.marginal("input").flatten(1).sum(1), torch.ones(3).double(), rtol=0, atol=1e-11)
    net = Head(lambda h: torch.special.entr(positive(h)))
    near = RelevanceMeasure(net, X, 0, reference=X - 1e-6)
    leaf = X.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(net(leaf).sum(), leaf)
    torch.testing.assert_close(
        near.marginal("input") * near.output.reshape(3, 1, 1), gradient * 1e-6, rtol=0, atol=1e-10
    )

    @nrm_plugin.register_kernel(torch.special.zeta)
    def zeta(call):
        return call.split([0.25, 0.75])

    net = Head(lambda h: torch.special.zeta(positive(h) + 1.5, h.square() + 1))
    split = RelevanceMeasure(net, X, 0, reference=X0)
    torch.testing.assert_close(split.marginal("first").flatten(1).sum(1), torch.ones(3).double(), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda h: torch.atan2(h, h.sin()), "'atan2'"),
        (lambda h: F.grid_sample(h.unsqueeze(1), h[..., :2].unsqueeze(1), align_corners=False), "'grid_sample'"),
        (lambda h: F.layer_norm(h, (6,), h.mean((0, 1))), "'layer_norm'"),
        (lambda h: h.flatten(1).median() * h, "'median'"),
    ],
)
def test_operations_without_a_kernel_of_differences_say_so(operation, message):
    with pytest.raises(UnsupportedOperationError, match=message):
        RelevanceMeasure(Head(operation), X[:1], 0, reference=X0[:1]).marginal("input")


def test_heads_of_attention_are_events():
    torch.manual_seed(0)
    net = nn.Sequential(nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), nn.Flatten(), nn.Linear(24, 2)).double()
    mu = RelevanceMeasure(net.eval(), draw(2, 4, 6, seed=1), 1, reference=draw(2, 4, 6, seed=2))
    attention = at("0.self_attn")
    heads = torch.stack([mu(attention.head(number)) for number in range(2)])
    both = mu(attention.head(0) | attention.head(1))
    torch.testing.assert_close(heads.sum(0), both, rtol=0, atol=1e-11)
    assert bool((heads.abs() > 1e-6).all())


def test_steep_slopes_at_constants_leave_no_mass_there_in_float32():
    net = (
        Head(lambda h: F.normalize(F.pad(h, (0, 0, 0, 2)), dim=-1)).float().eval()
    )  # normalizes rows of zeros, by 1e12
    mu = RelevanceMeasure(net, X.float(), 0, reference=X0.float())
    assert bool((mu.sink("input").abs() < 1e-9).all())
    torch.testing.assert_close(mu.marginal("input").flatten(1).sum(1), torch.ones(3), rtol=0, atol=1e-4)


def test_formats_shorter_than_float32():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 2)).bfloat16().eval()
    mu = RelevanceMeasure(net, X[:, 0].bfloat16(), 1, reference=X0[:, 0].bfloat16())
    mass = mu.marginal("input").sum(1) + mu.sink("input")
    torch.testing.assert_close(mass, torch.ones(3), rtol=0, atol=0.2)
    assert mu.marginal("0").dtype == torch.float32
