"""Every kernel of the table of operations, column by column, against a matrix that is written out here.

Sums of mass cannot see relevance that goes to the wrong place, so nothing here is a sum: ``T[j, i]`` is what output
``j`` hands to input ``i`` when all relevance starts at ``j``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonPlusFlat, LayerMapComposite
from zennit.core import Composite
from zennit.rules import Epsilon, Pass
from zennit.types import Linear

from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure
from nrm_plugin.errors import UncoveredLayerError, UnsupportedOperationError
from nrm_plugin.functional.elementwise import ACTIVATIONS

TOLERANCE = 1e-10
FLOOR = 1e-6
Op = Callable[..., Any]


class Apply(nn.Module):
    """A function as a model."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, *inputs: Tensor) -> Any:
        return self.op(*inputs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Signed numbers of which no two are equal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def measure(
    op: Op | nn.Module, inputs: list[Tensor], composite: Composite | None = None, sums: Any = "absolute"
) -> RelevanceMeasure:
    """The measure of one operation on inputs without batch, with one sample for each entry of its output."""
    net = op if isinstance(op, nn.Module) else Apply(op)
    shape = net(*(value[None] for value in inputs)).shape[1:]
    units = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    batch = tuple(value.expand(len(units), *value.shape) for value in inputs)
    rules = Normalized(composite or NRMAbsolute(), residual="sink", sums=sums)
    return RelevanceMeasure(net.eval(), batch, start=units, composite=rules)


def columns(
    op: Op | nn.Module, inputs: list[Tensor], composite: Composite | None = None, sums: Any = "absolute"
) -> list[Tensor]:
    """``T[j, i]`` for each input; checks that what is missing in a column is in the sink."""
    mu = measure(op, inputs, composite, sums)
    taps = ["input"] if len(inputs) == 1 else [f"input[{number}]" for number in range(len(inputs))]
    found = [mu.marginal(tap).flatten(1) if tap in mu.layers else None for tap in taps]
    parts = [
        torch.zeros(mu.batch, value.numel(), dtype=value.dtype) if part is None else part
        for part, value in zip(found, inputs, strict=True)
    ]
    total = torch.stack([part.sum(1) for part in parts]).sum(0)
    absorbed = torch.stack(list(mu.sinks().values()) or [torch.zeros(mu.batch).double()]).sum(0)
    assert float((total + absorbed - 1).abs().max()) <= TOLERANCE
    return parts


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= TOLERANCE


# -- the formulas ---------------------------------------------------------------------------------------------------


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def routed(output: Tensor, source: Tensor) -> Tensor:
    """The 0/1 matrix of an operation that copies: values are distinct, so each tells where it came from."""
    return (output.reshape(-1, 1) == source.reshape(1, -1)).double()


def spread(share: Tensor, source: Tensor) -> Tensor:
    """``T[j, i]`` of an input that is broadcast to the shape of the shares: its entries by number."""
    number = torch.arange(source.numel()).reshape(source.shape).expand(share.shape).reshape(-1)
    matrix = torch.zeros(share.numel(), source.numel(), dtype=torch.float64)
    matrix[torch.arange(share.numel()), number] = share.reshape(-1)
    return matrix


def by_size(weight: Tensor, a: Tensor) -> Tensor:
    """``|a_i| w_ji / Σ_i |a_i| w_ji`` with the floor of the rule: absolute shares of a linear operation."""
    size = a.reshape(-1).abs() + FLOOR * a.abs().mean()
    part = weight.abs() * size
    return part / part.sum(1, keepdim=True)


def by_sign(weight: Tensor, a: Tensor, epsilon: float = 1e-6) -> Tensor:
    """``a_i w_ji / (z_j + ε sign z_j)``: the rule Norm, and ε without a bias."""
    part = weight * a.reshape(-1)
    z = part.sum(1, keepdim=True)
    return part / (z + epsilon * torch.where(z >= 0, 1.0, -1.0))


def windows(length: int, size: int, stride: int, padding: int = 0, counted: bool = True) -> Tensor:
    """``w[j, i]`` of average pooling along one dimension."""
    count = (length + 2 * padding - size) // stride + 1
    weight = torch.zeros(count, length, dtype=torch.float64)
    for j in range(count):
        inside = [i for i in range(j * stride - padding, j * stride - padding + size) if 0 <= i < length]
        weight[j, inside] = 1 / (size if counted else len(inside))
    return weight


def bins(length: int, count: int) -> Tensor:
    """``w[j, i]`` of adaptive average pooling along one dimension."""
    weight = torch.zeros(count, length, dtype=torch.float64)
    for j in range(count):
        first, last = j * length // count, -(-(j + 1) * length // count)
        weight[j, first:last] = 1 / (last - first)
    return weight


def between(length: int, count: int, corners: bool) -> Tensor:
    """``w[j, i]`` of linear interpolation along one dimension."""
    weight = torch.zeros(count, length, dtype=torch.float64)
    for j in range(count):
        place = j * (length - 1) / (count - 1) if corners else max((j + 0.5) * length / count - 0.5, 0.0)
        low = min(int(place), length - 1)
        weight[j, low] += 1 - (place - low)
        weight[j, min(low + 1, length - 1)] += place - low
    return weight


def cubic(length: int, count: int) -> Tensor:
    """``w[j, i]`` of cubic interpolation along one dimension, which is negative at the second neighbours."""

    def value(x: float, a: float = -0.75) -> float:
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0

    weight = torch.zeros(count, length, dtype=torch.float64)
    for j in range(count):
        place = (j + 0.5) * length / count - 0.5
        for i in range(math.floor(place) - 1, math.floor(place) + 3):
            weight[j, min(max(i, 0), length - 1)] += value(place - i)
    return weight


def each(channels: int, *weights: Tensor) -> Tensor:
    """The same along every dimension, and for every channel."""
    matrix = eye(channels)
    for weight in weights:
        matrix = torch.kron(matrix, weight)
    return matrix


# -- sums -----------------------------------------------------------------------------------------------------------

A, B, C = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
ROW = draw(1, 3, seed=3)
ZERO = torch.zeros(2, 3, dtype=torch.float64)
K = draw(2, 3, seed=9)  # a constant


def in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a * 1.0
    a += b
    return a


SUMS: dict[str, tuple[Op, list[Tensor], list[float]]] = {
    "a + b": (lambda a, b: a + b, [A, B], [1, 1]),
    "torch.add": (torch.add, [A, B], [1, 1]),
    "Tensor.add": (lambda a, b: a.add(b), [A, B], [1, 1]),
    "add alpha": (lambda a, b: torch.add(a, b, alpha=-2.5), [A, B], [1, -2.5]),
    "a += b": (in_place, [A, B], [1, 1]),
    "a - b": (lambda a, b: a - b, [A, B], [1, -1]),
    "sub alpha": (lambda a, b: a.sub(b, alpha=3), [A, B], [1, -3]),
    "rsub": (lambda a, b: torch.rsub(a, b, alpha=2), [A, B], [-2, 1]),
    "broadcast": (lambda a, b: a + b, [A, ROW], [1, 1]),
    "broadcast minus": (lambda a, b: b - a, [ROW, A], [-1, 1]),
    "one is zero": (lambda a, b: a + b, [ZERO, B], [1, 1]),
    "all are zero": (lambda a, b: a + b, [ZERO, ZERO], [1, 1]),
    "(a + b) + c": (lambda a, b, c: (a + b) + c, [A, B, C], [1, 1, 1]),
    "a + (b + c)": (lambda a, b, c: a + (b + c), [A, B, C], [1, 1, 1]),
    "sum of a list": (lambda a, b, c: sum([a, b, c]), [A, B, C], [1, 1, 1]),
    "a + b that cancel, + c": (lambda a, b, c: a + b + c, [A, -A, C], [1, 1, 1]),
    "stack, sum": (lambda a, b, c: torch.stack([a, b, c]).sum(0), [A, B, C], [1, 1, 1]),
    "stack, sum last": (lambda a, b: torch.stack([a, b], -1).sum(-1), [A, B], [1, 1]),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_share_by_absolute_contribution(name):
    op, inputs, factors = SUMS[name]
    contributions = [(f * value).expand(2, 3) for f, value in zip(factors, inputs, strict=True)]
    total = torch.stack([part.abs() for part in contributions]).sum(0)
    dead = total == 0
    shares = [torch.where(dead, 1 / len(inputs), part.abs() / torch.where(dead, 1.0, total)) for part in contributions]
    tolerant = "stack" in name  # the rule of a reduction has a floor
    actual = columns(op, inputs)
    for found, share, value in zip(actual, shares, inputs, strict=True):
        assert float((found - spread(share, value)).abs().max()) <= (1e-5 if tolerant else TOLERANCE)


@pytest.mark.parametrize("name", ["a + b", "a - b", "rsub", "add alpha", "broadcast"])
def test_signed_sums_share_by_contribution(name):
    op, inputs, factors = SUMS[name]
    contributions = [(f * value).expand(2, 3) for f, value in zip(factors, inputs, strict=True)]
    total = torch.stack(contributions).sum(0)
    shares = [part / (total + 1e-12 * total.sign()) for part in contributions]
    check(columns(op, inputs, sums="signed"), [spread(p, v) for p, v in zip(shares, inputs, strict=True)])


@pytest.mark.parametrize(
    "op",
    [
        lambda a: a + K,
        lambda a: K - a,
        lambda a: a - 3,
        lambda a: 2 + a,
        lambda a: a + a,
        lambda a: a - 0.5 * a,
        lambda a: torch.add(a, K, alpha=2),
    ],
    ids=["a + k", "k - a", "a - 3", "2 + a", "a + a", "a - a/2", "add alpha"],
)
def test_a_constant_in_a_sum_is_a_bias(op):
    check(columns(op, [A]), [eye(6)])


# -- products and quotients -----------------------------------------------------------------------------------------

NONE = torch.zeros(6, 6, dtype=torch.float64)
PRODUCTS: dict[str, tuple[Op, list[Tensor], list[Tensor]]] = {
    "signal * gate": (lambda a, b: a * b.sigmoid(), [A, B], [eye(6), NONE]),
    "gate * signal": (lambda a, b: torch.softmax(a, 1) * b, [A, B], [NONE, eye(6)]),
    "gate in place": (lambda a, b: (a * 1.0).mul_(F.hardsigmoid(b)), [A, B], [eye(6), NONE]),
    "module gate": (lambda a, b: a * nn.Sigmoid()(b), [A, B], [eye(6), NONE]),
    "1 - gate": (lambda a, b: a * (1 - b.sigmoid()), [A, B], [eye(6), NONE]),
    "gate / sum": (lambda a, b: a * (b.exp() / b.exp().sum(1, keepdim=True)), [A, B], [eye(6), NONE]),
    "product of gates": (lambda a, b: a * (b.sigmoid() * b.exp()), [A, B], [eye(6), NONE]),
    "gate times signal is no gate": (
        lambda a, b: a * (a.sigmoid() * b)[:, :1],
        [A, B],
        [eye(6), NONE],  # a[:, :] is the larger operand
    ),
    "reshaped gate": (lambda a, b: a * b.sigmoid().flatten(1).reshape(-1, 2, 3), [A, B], [eye(6), NONE]),
    "broadcast gate": (lambda a, b: a * b.sigmoid(), [A, ROW], [eye(6), torch.zeros(6, 3).double()]),
    "small signal, large gate": (
        lambda a, b: a * b.sigmoid(),
        [ROW, A],
        [spread(torch.ones(2, 3).double(), ROW), NONE],
    ),
    "no gate, equal size": (lambda a, b: a * b, [A, B], [eye(6) / 2, eye(6) / 2]),
    "no gate, larger first": (lambda a, b: a * b, [A, ROW], [eye(6), torch.zeros(6, 3).double()]),
    "no gate, larger last": (lambda a, b: a * b, [ROW, A], [torch.zeros(6, 3).double(), eye(6)]),
    "times a constant": (lambda a: a * K, [A], [eye(6)]),
    "a constant times": (lambda a: -2 * a, [A], [eye(6)]),
    "squared": (lambda a: a * a, [A], [eye(6)]),
    "broadcast against a constant": (lambda a: a * K, [ROW], [spread(torch.ones(2, 3).double(), ROW)]),
    "a / b": (lambda a, b: a / b, [A, B], [eye(6), NONE]),
    "torch.div": (lambda a, b: torch.div(a, b), [A, ROW], [eye(6), torch.zeros(6, 3).double()]),
    "a / 2": (lambda a: a / 2, [A], [eye(6)]),
    "1 / a": (lambda a: 1 / a, [A], [eye(6)]),
    "fmod of two": (torch.fmod, [A, B], [eye(6), NONE]),
    "a % b": (lambda a, b: a % b, [A, ROW], [eye(6), torch.zeros(6, 3).double()]),
    "hypot": (torch.hypot, [A, B], [spread(v**2 / (A**2 + B**2), v) for v in (A, B)]),
    "hypot broadcast": (
        lambda a, b: a.hypot(b),
        [A, ROW],
        [spread(A**2 / (A**2 + ROW**2), A), spread(ROW**2 / (A**2 + ROW**2), ROW)],
    ),
    "hypot of nothing": (torch.hypot, [ZERO, ZERO], [eye(6) / 2, eye(6) / 2]),
    "glu": (
        lambda a: F.glu(a, 1),
        [draw(4, 3)],
        [torch.cat([eye(6), NONE], 1)],
    ),
    "GLU": (lambda a: nn.GLU(1)(a), [draw(4, 3)], [torch.cat([eye(6), NONE], 1)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_hand_all_to_the_signal(name):
    op, inputs, expected = PRODUCTS[name]
    check(columns(op, inputs), expected)


def test_what_is_made_of_sums_and_products_shares_like_them():
    total = (0.3 * A).abs() + (0.7 * B).abs()
    shares = [(0.7 * B).abs() / total, (0.3 * A).abs() / total]
    check(columns(lambda a, b: torch.lerp(b, a, 0.3), [A, B]), [spread(shares[1], A), spread(shares[0], B)])
    total = A.abs() + (2 * B * C).abs()
    expected = [spread(A.abs() / total, A), *[spread((2 * B * C).abs() / total / 2, B)] * 2]
    check(columns(lambda a, b, c: torch.addcmul(a, b, c, value=2), [A, B, C]), expected)
    total = A.abs() + (B / C).abs()
    check(columns(torch.addcdiv, [A, B, C]), [spread(A.abs() / total, A), spread((B / C).abs() / total, B), NONE])


# -- pooling --------------------------------------------------------------------------------------------------------

IMAGE, LINE, VOLUME = draw(2, 4, 5), draw(2, 7), draw(1, 3, 4, 2)
GRID = torch.rand(1, 3, 3, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 1.6 - 0.8


def sampled(image: Tensor, grid: Tensor) -> Tensor:
    """``w[j, i]`` of bilinear sampling at points inside, ``align_corners=True``; for every channel."""
    _, height, width = image.shape
    weight = torch.zeros(grid[0, ..., 0].numel(), height * width, dtype=torch.float64)
    for j, (x, y) in enumerate(grid.reshape(-1, 2).tolist()):
        column, row = (x + 1) / 2 * (width - 1), (y + 1) / 2 * (height - 1)
        left, top = math.floor(column), math.floor(row)
        for r, c in itertools.product((top, top + 1), (left, left + 1)):
            weight[j, r * width + c] = (1 - abs(row - r)) * (1 - abs(column - c))
    return each(len(image), weight)


POOLINGS: dict[str, tuple[Op, Tensor, Tensor]] = {
    "mean over the image": (lambda a: a.mean((2, 3)), IMAGE, each(2, torch.full((1, 20), 1 / 20).double())),
    "mean keepdim": (lambda a: torch.mean(a, 2, keepdim=True), IMAGE, each(2, torch.full((1, 4), 0.25), eye(5))),
    "mean over channels": (lambda a: a.mean(1), IMAGE, torch.kron(torch.full((1, 2), 0.5), eye(20))),
    "sum": (lambda a: a.sum(-1), IMAGE, each(2, eye(4), torch.ones(1, 5))),
    "cumsum": (lambda a: a.cumsum(2), LINE, each(2, torch.ones(7, 7).tril())),
    "avg_pool1d": (lambda a: F.avg_pool1d(a, 3, 2), LINE, each(2, windows(7, 3, 2))),
    "avg_pool2d": (lambda a: F.avg_pool2d(a, 2), IMAGE, each(2, windows(4, 2, 2), windows(5, 2, 2))),
    "avg_pool2d strided, padded": (
        lambda a: F.avg_pool2d(a, 3, (1, 2), 1),
        IMAGE,
        each(2, windows(4, 3, 1, 1), windows(5, 3, 2, 1)),
    ),
    "avg_pool2d, padding not counted": (
        lambda a: F.avg_pool2d(a, 3, 1, 1, count_include_pad=False),
        IMAGE,
        each(2, windows(4, 3, 1, 1, False), windows(5, 3, 1, 1, False)),
    ),
    "avg_pool3d": (
        lambda a: F.avg_pool3d(a, 2, 1),
        VOLUME,
        each(1, windows(3, 2, 1), windows(4, 2, 1), windows(2, 2, 1)),
    ),
    "adaptive_avg_pool1d": (lambda a: F.adaptive_avg_pool1d(a, 3), LINE, each(2, bins(7, 3))),
    "adaptive_avg_pool2d": (lambda a: F.adaptive_avg_pool2d(a, (3, 2)), IMAGE, each(2, bins(4, 3), bins(5, 2))),
    "adaptive_avg_pool2d that enlarges": (
        lambda a: F.adaptive_avg_pool2d(a, (6, 6)),
        IMAGE,
        each(2, bins(4, 6), bins(5, 6)),
    ),
    "adaptive_avg_pool3d": (
        lambda a: F.adaptive_avg_pool3d(a, (2, 3, 1)),
        VOLUME,
        each(1, bins(3, 2), bins(4, 3), bins(2, 1)),
    ),
    "interpolate linear": (lambda a: F.interpolate(a, 10, mode="linear"), LINE, each(2, between(7, 10, False))),
    "interpolate bilinear": (
        lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"),
        IMAGE,
        each(2, between(4, 8, False), between(5, 10, False)),
    ),
    "interpolate bilinear, corners": (
        lambda a: F.interpolate(a, size=(3, 7), mode="bilinear", align_corners=True),
        IMAGE,
        each(2, between(4, 3, True), between(5, 7, True)),
    ),
    "interpolate trilinear": (
        lambda a: F.interpolate(a, size=(6, 8, 4), mode="trilinear"),
        VOLUME,
        each(1, between(3, 6, False), between(4, 8, False), between(2, 4, False)),
    ),
    "interpolate area": (lambda a: F.interpolate(a, size=(2, 3), mode="area"), IMAGE, each(2, bins(4, 2), bins(5, 3))),
    "interpolate bicubic": (
        lambda a: F.interpolate(a, size=(8, 10), mode="bicubic"),
        IMAGE,
        each(2, cubic(4, 8), cubic(5, 10)),
    ),
    "interpolate bicubic down": (
        lambda a: F.interpolate(a, size=(3, 2), mode="bicubic"),
        IMAGE,
        each(2, cubic(4, 3), cubic(5, 2)),
    ),
    "Upsample bicubic": (nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE, each(2, cubic(4, 8), cubic(5, 10))),
    "Upsample bilinear": (
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        IMAGE,
        each(2, between(4, 8, True), between(5, 10, True)),
    ),
    "UpsamplingBilinear2d": (
        nn.UpsamplingBilinear2d(scale_factor=2),
        IMAGE,
        each(2, between(4, 8, True), between(5, 10, True)),
    ),
    "grid_sample": (
        lambda a: F.grid_sample(a, GRID.expand(len(a), -1, -1, -1), align_corners=True),
        IMAGE,
        sampled(IMAGE, GRID),
    ),
}
POOLINGS["fold"] = (
    lambda a: F.fold(a.flatten(2), (3, 3), 2),
    draw(4, 2, 2),
    torch.stack(
        [
            # Entry (r, c) of patch (p, q) is added to pixel (p + r, q + c).
            torch.tensor([float((p + r, q + c) == divmod(pixel, 3)) for r, c, p, q in itertools.product(*[(0, 1)] * 4)])
            for pixel in range(9)
        ]
    ),
)
SIGNED = ("interpolate bicubic", "interpolate bicubic down", "Upsample bicubic")


@pytest.mark.parametrize("name", POOLINGS)
def test_the_weights_written_here_are_those_of_torch(name):
    op, a, weight = POOLINGS[name]
    assert torch.allclose(op(a[None]).flatten(), weight.double() @ a.flatten(), atol=1e-12)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_shares_by_absolute_contribution(name):
    op, a, weight = POOLINGS[name]
    check(columns(op, [a]), [by_size(weight.double(), a)])


@pytest.mark.parametrize("name", [name for name in POOLINGS if name not in SIGNED])
def test_pooling_has_the_rule_that_the_composite_gives_to_average_pooling(name):
    op, a, weight = POOLINGS[name]
    check(columns(op, [a], EpsilonPlusFlat()), [by_sign(weight.double(), a)])


def test_a_pool_of_powers_shares_by_powers():
    a = draw(1, 1, 7).abs()
    size = a.flatten() + FLOOR * a.mean()
    part = (windows(7, 3, 2) > 0) * size**3
    check(columns(lambda a: F.lp_pool2d(a, 3.0, (1, 3), (1, 2)), [a]), [part / part.sum(1, keepdim=True)])


# -- constant and computed matrices ---------------------------------------------------------------------------------

TOKENS, W, V = draw(4, 3), draw(3, 5, seed=4), draw(4, 2, seed=5)
BIAS = draw(5, seed=6)
LEFT = draw(5, 4, seed=7)
KERNEL2D = draw(2, 2, 3, 3, seed=8)
EPSILON = 0.25


def by_epsilon(weight: Tensor, a: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """``a_i w_ji / (z_j + ε sign z_j)`` with ``z_j`` the output with its bias."""
    part = weight * a.reshape(-1)
    z = part.sum(1, keepdim=True) + (bias.reshape(-1, 1) if isinstance(bias, Tensor) else bias)
    return part / (z + EPSILON * torch.where(z >= 0, 1.0, -1.0))


def convolution(weight: Tensor, height: int, width: int) -> Tensor:
    """``w[j, i]`` of a convolution with padding 1, one weight at a time."""
    outputs, channels, rows, cols = weight.shape
    matrix = torch.zeros(outputs, height, width, channels, height, width, dtype=torch.float64)
    for o, c, r, s, y, x in itertools.product(*map(range, (outputs, channels, rows, cols, height, width))):
        if 0 <= y + r - 1 < height and 0 <= x + s - 1 < width:
            matrix[o, y, x, c, y + r - 1, x + s - 1] = weight[o, c, r, s]
    return matrix.reshape(outputs * height * width, -1)


def linear_rules() -> Composite:
    return LayerMapComposite([(Linear, Epsilon(epsilon=EPSILON))])


PER_TOKEN = torch.kron(eye(4), W.T.contiguous())
CONTRACTIONS: dict[str, tuple[Op, Tensor, Tensor, Any]] = {
    "x @ W": (lambda x: x @ W, TOKENS, PER_TOKEN, 0.0),
    "torch.matmul": (lambda x: torch.matmul(x, W), TOKENS, PER_TOKEN, 0.0),
    "torch.bmm": (lambda x: torch.bmm(x, W.expand(len(x), -1, -1)), TOKENS, PER_TOKEN, 0.0),
    "W @ x": (lambda x: LEFT @ x, TOKENS, torch.kron(LEFT, eye(3)), 0.0),
    "einsum": (lambda x: torch.einsum("nti,io->nto", x, W), TOKENS, PER_TOKEN, 0.0),
    "tensordot": (lambda x: torch.tensordot(x, W, 1), TOKENS, PER_TOKEN, 0.0),
    "F.linear": (lambda x: F.linear(x, W.T, BIAS), TOKENS, PER_TOKEN, BIAS.repeat(4)),
    "F.linear by keyword": (lambda x: F.linear(input=x, weight=W.T), TOKENS, PER_TOKEN, 0.0),
    "F.conv2d": (lambda x: F.conv2d(x, KERNEL2D, padding=1), draw(2, 3, 4), convolution(KERNEL2D, 3, 4), 0.0),
}


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_a_constant_matrix_is_a_linear_layer(name):
    op, x, weight, bias = CONTRACTIONS[name]
    check(columns(op, [x], linear_rules()), [by_epsilon(weight, x, bias)])
    check(columns(op, [x]), [by_size(weight, x)])


@pytest.mark.parametrize("name", CONTRACTIONS)
def test_a_constant_matrix_needs_a_rule_for_layers(name):
    op, x, weight, _ = CONTRACTIONS[name]
    rules = LayerMapComposite([(nn.ReLU, Pass())])
    with pytest.raises(UncoveredLayerError, match=r"(Linear|Conv2d), called as .*layer_map"):
        RelevanceMeasure(Apply(op), x[None], start=op(x[None]) * 0 + 1, composite=rules).marginal("input")
    mu = RelevanceMeasure(
        Apply(op), x[None], start=op(x[None]) * 0 + 1, composite=Normalized(rules, "sink", uncovered="gradient")
    )
    plain = weight.sum(0) / len(weight)  # as Zennit has it, the gradient alone
    assert torch.allclose(mu.marginal("input").flatten(), plain)


def test_addmm_is_a_layer_with_a_bias_and_baddbmm_a_product_to_which_one_is_added():
    x = draw(3)
    check(columns(lambda x: torch.addmm(BIAS, x, W), [x], linear_rules()), [by_epsilon(W.T, x, BIAS)])
    check(columns(lambda x: torch.addmm(BIAS, x, W, alpha=2), [x], linear_rules()), [by_epsilon(W.T, x)])
    x, weight = draw(2, 4), torch.kron(eye(2), V.T.contiguous())

    def batched(x: Tensor) -> Tensor:
        return torch.baddbmm(K[None, :, :2].expand(len(x), -1, -1), x, V.expand(len(x), -1, -1))

    check(columns(batched, [x]), [by_size(weight, x)])


def attended(a: Tensor, v: Tensor) -> Tensor:
    """``|A_ij V_jk| / Σ_j |A_ij V_jk|`` from output ``(i, k)`` to ``V[j, k]``, with the floor of the rule."""
    size = v.abs() + FLOOR * v.abs().mean()
    rows, inner, cols = len(a), len(v), v.shape[1]
    matrix = torch.zeros(rows, cols, inner, cols, dtype=torch.float64)
    for i, j, k in itertools.product(range(rows), range(inner), range(cols)):
        matrix[i, k, j, k] = a[i, j].abs() * size[j, k]
    matrix = matrix.reshape(rows * cols, inner * cols)
    return matrix / matrix.sum(1, keepdim=True)


@pytest.mark.parametrize(
    "product",
    [torch.matmul, torch.bmm, lambda a, v: torch.einsum("nij,njk->nik", a, v)],
    ids=["matmul", "bmm", "einsum"],
)
def test_attention_hands_all_to_the_values(product):
    scores = draw(5, 4)
    actual = columns(lambda s, v: product(s.softmax(-1), v), [scores, V])
    check(actual, [torch.zeros(10, 20).double(), attended(scores.softmax(-1), V)])


def test_of_two_factors_without_a_gate_the_larger_gets_all_and_equal_ones_half():
    left, right = draw(5, 4), draw(4, 2, seed=1)
    swapped = attended(right.T, left.T).reshape(2, 5, 4, 5).permute(1, 0, 3, 2).reshape(10, 20)
    check(columns(torch.matmul, [left, right]), [swapped, torch.zeros(10, 8).double()])
    left, right = draw(3, 4), draw(4, 3, seed=1)
    upper = attended(right.T, left.T).reshape(3, 3, 4, 3).permute(1, 0, 3, 2).reshape(9, 12)
    check(columns(torch.matmul, [left, right]), [upper / 2, attended(left, right) / 2])


def test_a_bilinear_form_shares_by_products_and_then_among_their_factors():
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


def test_a_mean_over_what_is_a_number():
    image = IMAGE.clone()
    holes = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.3

    def with_holes(a: Tensor) -> Tensor:
        return a.masked_fill(holes, math.nan)

    share = image.abs().masked_fill(holes, 0).flatten(1)
    share = share / share.sum(1, keepdim=True)
    expected = torch.block_diag(*share[:, None])
    for op in (lambda a: with_holes(a).nanmean((2, 3)), lambda a: torch.nansum(with_holes(a), dim=(2, 3))):
        (found,) = columns(op, [image])
        assert float((found - expected).abs().max()) <= 1e-5  # the rule has a floor


def test_differences_are_what_they_are_made_of():
    a, first = draw(2, 5), draw(1, 5, seed=1)
    check(columns(lambda a: a.diff(), [a]), columns(lambda a: a[..., 1:] - a[..., :-1], [a]))

    def twice(a: Tensor, b: Tensor) -> Tensor:
        a = torch.cat([b, a], 1)
        a = a[:, 1:] - a[:, :-1]
        return a[:, 1:] - a[:, :-1]

    check(columns(lambda a, b: torch.diff(a, 2, 1, prepend=b), [a, first]), columns(twice, [a, first]))


@pytest.mark.parametrize("gated", [False, True])
def test_a_deformed_convolution_reads_where_its_offsets_say(gated):
    net = torchvision.ops.DeformConv2d(2, 3, 2, bias=False).double()
    a, offset, mask = draw(2, 4, 4), draw(8, 3, 3, seed=1) / 2, draw(4, 3, 3, seed=2).sigmoid()
    weight = torch.zeros(3, 3, 3, 2, 4, 4, dtype=torch.float64)
    for o, y, x, c, r, s in itertools.product(range(3), range(3), range(3), range(2), range(2), range(2)):
        point, part = r * 2 + s, net.weight[o, c, r, s].item() * (mask[r * 2 + s, y, x].item() if gated else 1)
        row, col = y + r + offset[2 * point, y, x].item(), x + s + offset[2 * point + 1, y, x].item()
        for p, q in itertools.product((math.floor(row), math.floor(row) + 1), (math.floor(col), math.floor(col) + 1)):
            if 0 <= p < 4 and 0 <= q < 4:
                weight[o, y, x, c, p, q] += (1 - abs(row - p)) * (1 - abs(col - q)) * part
    matrix = weight.reshape(27, 32)
    inputs = [a, offset, mask] if gated else [a, offset]
    assert torch.allclose(net(*(value[None] for value in inputs)).flatten(), matrix @ a.flatten())
    nothing = [torch.zeros(27, value.numel()).double() for value in inputs[1:]]
    check(columns(net, inputs, linear_rules()), [by_epsilon(matrix, a), *nothing])
    mu = measure(net, inputs, linear_rules())
    expected = by_epsilon(matrix, a).abs().sum(1) + (1 - by_epsilon(matrix, a).sum(1)).abs()
    assert torch.allclose(mu.walk_variation(), expected)


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
def test_a_variance_is_what_it_is_made_of(name):
    op, written_out = VARIANCES[name]
    assert torch.allclose(op(A[None]), written_out(A[None]))
    check(columns(op, [A]), columns(written_out, [A]))


def test_variance_and_mean_over_everything():
    for op in (lambda a: a.var(False)[None], lambda a: a.std()[None], lambda a: a.nanmean()[None]):
        mu = RelevanceMeasure(Apply(op), A[None], composite=Normalized(NRMAbsolute()))
        assert float(mu.output) == pytest.approx(float(op(A[None])))
        assert float(mu.marginal("input").sum()) == pytest.approx(1)


@pytest.mark.parametrize("aligned", [False, True])
def test_regions_of_interest_share_by_absolute_contribution(aligned):
    image = draw(2, 5, 6)
    box = torch.tensor([[0, 0.7, 0.4, 4.6, 3.9]], dtype=torch.float64)

    def pooled(a: Tensor) -> Tensor:
        return torchvision.ops.roi_align(a, box, (2, 2), 1.0, 2, aligned)

    weight = torch.zeros(4, 5, 6, dtype=torch.float64)
    x0, y0, x1, y1 = (value - (0.5 if aligned else 0) for value in box[0, 1:].tolist())
    for cell, (r, c) in enumerate(itertools.product(range(2), range(2))):
        for i, j in itertools.product(range(2), range(2)):  # two by two points in each cell
            y, x = y0 + (y1 - y0) / 2 * (r + (i + 0.5) / 2), x0 + (x1 - x0) / 2 * (c + (j + 0.5) / 2)
            for p, q in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
                weight[cell, p, q] += (1 - abs(y - p)) * (1 - abs(x - q)) / 4
    weight = each(2, weight.flatten(1))
    assert torch.allclose(pooled(image[None]).flatten(), weight @ image.flatten())
    expected = by_size(weight, image)
    for number, row in enumerate(expected):
        start = eye(8)[number].reshape(1, 2, 2, 2)
        mu = RelevanceMeasure(Apply(pooled), image[None], start=start, composite=Normalized(NRMAbsolute()))
        check([mu.marginal("input").flatten(1)], [row[None]])


# -- routes ---------------------------------------------------------------------------------------------------------

DATA = draw(4, 4, 6)
FLAT = draw(6)
PICK = torch.tensor([2, 0, 0])
MASK = torch.tensor([[True, False, True], [False, False, True]])
ROUTES: dict[str, tuple[Op, list[Tensor]]] = {
    "reshape": (lambda a: a.reshape(len(a), -1, 3), [DATA]),
    "view": (lambda a: a.view(len(a), 8, 12), [DATA]),
    "flatten": (lambda a: torch.flatten(a, 1), [DATA]),
    "unflatten": (lambda a: a.unflatten(1, (2, 2)), [DATA]),
    "permute": (lambda a: a.permute(0, 3, 1, 2), [DATA]),
    "transpose": (lambda a: a.transpose(1, 3), [DATA]),
    "movedim": (lambda a: a.movedim(1, -1), [DATA]),
    "squeeze": (lambda a: a.unsqueeze(2).squeeze(2), [DATA]),
    "chunk": (lambda a: a.chunk(2, 1)[1], [DATA]),
    "split": (lambda a: torch.split(a, [1, 3], 1)[1], [DATA]),
    "unbind": (lambda a: a.unbind(2)[3], [DATA]),
    "select": (lambda a: a[:, 2], [DATA]),
    "slice": (lambda a: a[:, 1:3, ::2, 4:], [DATA]),
    "index": (lambda a: a[:, PICK], [DATA]),
    "index_select": (lambda a: a.index_select(1, PICK), [DATA]),
    "gather": (lambda a: a.gather(1, PICK.expand(len(a), 3)), [FLAT]),
    "narrow": (lambda a: a.narrow(1, 1, 2), [DATA]),
    "roll": (lambda a: a.roll((1, -2), (2, 3)), [DATA]),
    "flip": (lambda a: a.flip(3, 1), [DATA]),
    "rot90": (lambda a: a.rot90(1, (2, 3)), [DATA]),
    "expand": (lambda a: a.unsqueeze(1).expand(-1, 3, -1), [FLAT]),
    "repeat": (lambda a: a.repeat(1, 2, 1, 1), [DATA]),
    "repeat_interleave": (lambda a: a.repeat_interleave(2, 1), [FLAT]),
    "tile": (lambda a: torch.tile(a, (1, 2)), [FLAT]),
    "broadcast_to": (lambda a: torch.broadcast_to(a.unsqueeze(1), (len(a), 2, 6)), [FLAT]),
    "contiguous": (lambda a: a.transpose(1, 2).contiguous(), [DATA]),
    "clone": (lambda a: a.clone(), [DATA]),
    "dropout": (lambda a: F.dropout(a, 0.5, training=False), [DATA]),
    "pixel_shuffle": (lambda a: F.pixel_shuffle(a, 2), [DATA]),
    "pixel_unshuffle": (lambda a: F.pixel_unshuffle(a, 2), [DATA]),
    "PixelShuffle": (nn.PixelShuffle(2), [DATA]),
    "channel_shuffle": (lambda a: F.channel_shuffle(a, 2), [DATA]),
    "ChannelShuffle": (nn.ChannelShuffle(2), [DATA]),
    "shuffle by views": (lambda a: a.view(len(a), 2, 2, 4, 6).transpose(1, 2).reshape(a.shape), [DATA]),
    "pad with zeros": (lambda a: F.pad(a, (1, 0, 2, 1)), [DATA]),
    "pad with numbers": (lambda a: F.pad(a, (1, 1), value=100.0), [FLAT]),
    "pad that crops": (lambda a: F.pad(a, (-1, 1, 0, -2)), [DATA]),
    "pad by reflection": (lambda a: F.pad(a, (1, 2, 2, 1), mode="reflect"), [DATA]),
    "pad by replication": (lambda a: F.pad(a, (1, 2, 2, 1), mode="replicate"), [DATA]),
    "pad around": (lambda a: F.pad(a, (1, 2, 2, 1), mode="circular"), [DATA]),
    "ZeroPad2d": (nn.ZeroPad2d((1, 2, 0, 1)), [DATA]),
    "ReflectionPad2d": (nn.ReflectionPad2d(1), [DATA]),
    "ReplicationPad2d": (nn.ReplicationPad2d(2), [DATA]),
    "ConstantPad1d": (nn.ConstantPad1d(1, 7.0), [draw(2, 3)]),
    "interpolate nearest": (lambda a: F.interpolate(a, scale_factor=2), [DATA]),
    "interpolate nearest down": (lambda a: F.interpolate(a, size=(3, 4), mode="nearest"), [DATA]),
    "interpolate nearest-exact": (lambda a: F.interpolate(a, size=(3, 4), mode="nearest-exact"), [DATA]),
    "Upsample nearest": (nn.Upsample(scale_factor=2), [DATA]),
    "UpsamplingNearest2d": (nn.UpsamplingNearest2d(scale_factor=3), [DATA]),
    "max_pool1d": (lambda a: F.max_pool1d(a, 2), [draw(2, 6)]),
    "max_pool2d": (lambda a: F.max_pool2d(a, 3, 2, 1), [DATA]),
    "max_pool2d dilated": (lambda a: F.max_pool2d(a, 2, 1, dilation=2, ceil_mode=True), [DATA]),
    "max_pool3d": (lambda a: F.max_pool3d(a[:, None], 2), [DATA]),
    "MaxPool2d": (nn.MaxPool2d(2), [DATA]),
    "adaptive_max_pool2d": (lambda a: F.adaptive_max_pool2d(a, (3, 2)), [DATA]),
    "adaptive_max_pool1d": (lambda a: F.adaptive_max_pool1d(a, 4), [draw(2, 6)]),
    "amax": (lambda a: a.amax((2, 3)), [DATA]),
    "amin": (lambda a: a.amin(1), [DATA]),
    "max": (lambda a: a.max(1).values, [DATA]),
    "min": (lambda a: torch.min(a, 1)[0], [DATA]),
    "sort": (lambda a: a.sort(2, descending=True).values, [DATA]),
    "median": (lambda a: a.flatten(2).median(2).values, [DATA]),
    "nanmedian": (lambda a: a.nanmedian(1).values, [DATA]),
    "kthvalue": (lambda a: a.kthvalue(3, 3).values, [DATA]),
    "mode": (lambda a: a.mode(1).values, [DATA]),
    "cummax": (lambda a: a.cummax(3).values, [DATA]),
    "cummin": (lambda a: torch.cummin(a, 1)[0], [DATA]),
    "aminmax": (lambda a: torch.stack(torch.aminmax(a, dim=1), 1), [DATA]),
    "topk": (lambda a: a.topk(2, 1).values, [DATA]),
    "maximum": (torch.maximum, [A, B]),
    "torch.max": (torch.max, [A, B]),
    "minimum": (torch.minimum, [A, B]),
    "cat": (lambda a, b: torch.cat([a, b], 1), [A, B]),
    "cat with a constant": (lambda a: torch.cat([a, K.expand(len(a), -1, -1)], 1), [A]),
    "cat twice": (lambda a: torch.cat([a, a], 1), [A]),
    "hstack": (lambda a, b: torch.hstack([a, b]), [A, B]),
    "stack": (lambda a, b: torch.stack([a, b], 1), [A, B]),
    "stack with a constant": (lambda a: torch.stack([K.expand_as(a), a], 2), [A]),
    "where": (lambda a, b: torch.where(MASK, a, b), [A, B]),
    "where by value": (lambda a, b: torch.where(a > 0, a, b), [A, B]),
    "where with a tensor": (lambda a: torch.where(MASK, K, a), [A]),
    "cat with a copy that is cut off": (lambda a: torch.cat([a, -a.detach()], 1), [A]),
    "where with a constant": (lambda a: torch.where(MASK, a, 5.0), [A]),
    "masked_fill": (lambda a: a.masked_fill(MASK, -9.0), [A]),
    "masked_fill_": (lambda a: a.clone().masked_fill_(MASK, -9.0), [A]),
    "tril": (lambda a: a.tril(), [DATA]),
    "triu": (lambda a: torch.triu(a, 1), [DATA]),
    "diagonal": (lambda a: a.diagonal(dim1=2, dim2=3), [DATA]),
    "unfold": (lambda a: F.unfold(a, 2, stride=2), [DATA]),
    "Tensor.unfold": (lambda a: a.unfold(1, 3, 2), [FLAT]),
    "unfold, padded": (lambda a: F.unfold(a, 3, padding=1, stride=2), [DATA]),
    "write a slice": (lambda a, b: _written(a, b), [A, B]),
    "fill a slice": (lambda a: _filled(a), [A]),
    "double": (lambda a: a.to(torch.float64), [A]),
}
if type(torch.aminmax(torch.ones(2, requires_grad=True)).min.grad_fn).__name__ != "AminmaxBackward0":
    del ROUTES["aminmax"]  # torch had no derivative of it at first, and so no place in the graph


def _written(a: Tensor, b: Tensor) -> Tensor:
    a = a.clone()
    a[:, 0] = b[:, 1]
    return a


def _filled(a: Tensor) -> Tensor:
    a = a.clone()
    a[:, :, 1] = 0.0
    return a


@pytest.mark.parametrize("name", ROUTES)
def test_a_route_is_the_matrix_of_zeros_and_ones(name):
    op, inputs = ROUTES[name]
    output = op(*(value[None] for value in inputs))
    expected = [routed(output, value) for value in inputs]
    assert int(torch.stack([part.sum() for part in expected]).sum()) > 0
    for one, other in zip(columns(op, inputs), expected, strict=True):
        assert torch.equal(one, other)
    mu = measure(op, inputs)
    constant = 1 - torch.stack([part.sum(1) for part in expected]).sum(0)
    absorbed = torch.stack(list(mu.sinks("constants").values()) or [torch.zeros(mu.batch)]).sum(0)
    assert torch.equal(absorbed.double(), constant)
    assert not any(bool(value.any()) for value in mu.sinks("residual").values())


def test_equal_ones_share_a_maximum():
    (first, second) = columns(torch.maximum, [A, A.clone()])
    check([first, second], [eye(6) / 2, eye(6) / 2])


# -- elementwise ----------------------------------------------------------------------------------------------------

POSITIVE = A.abs() + 0.1
IDENTITIES: dict[str, Op] = {
    **{name: getattr(F, name) for name in ACTIVATIONS if name not in ("batch_norm", "prelu", "threshold", "rrelu")},
    "prelu": lambda a: F.prelu(a, torch.tensor([0.1, 0.2]).double()),
    "threshold": lambda a: F.threshold(a, 0.0, 0.0),
    "rrelu": lambda a: F.rrelu(a, training=False),
    "batch_norm": lambda a: F.batch_norm(a, K[:, 0], K[:, 1].abs(), K[:, 2], K[:, 1]),
    "softmax": lambda a: F.softmax(a, 1),
    "Tensor.softmax": lambda a: a.softmax(-1),
    "log_softmax": lambda a: F.log_softmax(a, 1),
    "layer_norm": lambda a: F.layer_norm(a, (3,), K[0], K[1]),
    "LayerNorm": nn.LayerNorm(3).double(),
    "group_norm": lambda a: F.group_norm(a, 2),
    "GroupNorm": nn.GroupNorm(1, 2).double(),
    "rms_norm": lambda a: F.rms_norm(a, (3,)),
    "instance_norm": lambda a: F.instance_norm(a),
    "InstanceNorm1d": nn.InstanceNorm1d(2).double(),
    "local_response_norm": lambda a: F.local_response_norm(a, 2),
    "normalize": lambda a: F.normalize(a, dim=1),
    "pow": lambda a: a**2,
    "fmod": lambda a: torch.fmod(a, K),
    "a % k": lambda a: a % 0.3,
    "remainder": lambda a: a.remainder(K),
    "hypot with a constant": lambda a: torch.hypot(a, K),
    "exp": torch.exp,
    "sqrt": lambda a: torch.sqrt(a.abs()),
    "log": lambda a: torch.log(a.abs()),
    "neg": lambda a: -a,
    "abs": abs,
    "clamp": lambda a: a.clamp(-0.1, 0.1),
    "clamp_": lambda a: a.clone().clamp_(min=0),
    "square": torch.square,
    "reciprocal": torch.reciprocal,
    "rpow": lambda a: 2**a,
    "sin": torch.sin,
    "erf": torch.erf,
    "relu_": lambda a: a.clone().relu_(),
    "F.relu in place": lambda a: F.relu(a.clone(), inplace=True),
    "sigmoid method": lambda a: a.sigmoid(),
    "tanh method": lambda a: a.tanh(),
    "scaled": lambda a: a.mul(3).div(2),
    "float_power": lambda a: torch.float_power(a.abs(), 1.5),
}


UNARY = (
    "exp exp2 expm1 sqrt rsqrt neg abs log log2 log10 log1p square reciprocal erf sin cos sinh cosh tan atan asinh "
    "nan_to_num round floor ceil trunc frac sign logit sigmoid tanh relu"
).split()


@pytest.mark.parametrize("name", UNARY)
def test_functions_of_one_element_hand_it_through_in_every_spelling(name):
    a = 0.2 + 0.1 * POSITIVE
    spellings = [getattr(torch, name), lambda a: getattr(a, name)()]
    if hasattr(Tensor, f"{name}_"):
        spellings.append(lambda a: getattr(a.clone(), f"{name}_")())
    for op in spellings:
        assert torch.equal(columns(op, [a])[0], eye(6))


@pytest.mark.parametrize("name", IDENTITIES)
def test_elementwise_operations_and_norms_hand_each_element_through(name):
    assert torch.equal(columns(IDENTITIES[name], [A])[0], eye(6))


# -- the table is covered -------------------------------------------------------------------------------------------


def test_cubic_sampling_at_points_says_what_to_do():
    def cubic_at(image: Tensor) -> Tensor:
        return F.grid_sample(image, GRID.expand(len(image), -1, -1, -1), mode="bicubic", align_corners=True)

    with pytest.raises(UnsupportedOperationError, match=r"mode='bicubic'.* negative.*mode='bilinear'"):
        columns(cubic_at, [IMAGE])


def test_an_operation_without_a_kernel_is_named():
    with pytest.raises(UnsupportedOperationError, match=r"'logcumsumexp'"):
        columns(lambda a: torch.logcumsumexp(a, 1), [A])
    with pytest.raises(UnsupportedOperationError, match=r"'cumprod'"):
        columns(lambda a: a.cumprod(1), [A])


# -- many to one ----------------------------------------------------------------------------------------------------


def rows_of(share: Tensor) -> Tensor:
    """``T[j, i]`` of a function that makes each row of ``(rows, columns)`` one number."""
    rows, width = share.shape
    matrix = torch.zeros(rows, rows * width, dtype=torch.float64)
    for j in range(rows):
        for i in range(width):
            matrix[j, j * width + i] = share[j, i]
    return matrix


def test_logsumexp_and_logaddexp_share_by_softmax():
    x = draw(2, 4)
    share = torch.stack([row.exp() / row.exp().sum() for row in x])
    check(columns(lambda x: x.logsumexp(-1), [x]), [rows_of(share)])
    check(
        columns(lambda x: torch.special.logsumexp(x, dim=(1, 2), keepdim=True), [x]),
        [(x.exp() / x.exp().sum()).reshape(1, -1)],
    )
    a, b = draw(3), draw(3, seed=5)
    for op, base in ((torch.logaddexp, math.e), (torch.logaddexp2, 2.0)):
        share = base**a / (base**a + base**b)
        check(columns(op, [a, b]), [torch.diag(share), torch.diag(1 - share)])
    check(columns(lambda a: torch.logaddexp(a, torch.ones_like(a)), [a]), [eye(3)])


def test_a_norm_shares_by_powers():
    x = draw(2, 4)
    for op, p in (
        (lambda x: x.norm(dim=-1), 2),
        (lambda x: torch.linalg.vector_norm(x, 3, -1), 3),
        (lambda x: torch.norm(x, 1, -1), 1),
    ):
        share = x.abs() ** p / (x.abs() ** p).sum(1, keepdim=True)
        check(columns(op, [x]), [rows_of(share)])
    check(
        columns(lambda x: torch.linalg.vector_norm(x, dim=-1), [torch.zeros(2, 4).double()]),
        [rows_of(torch.ones(2, 4) / 4)],
    )
    with pytest.raises(UnsupportedOperationError, match="norm of order inf"):
        columns(lambda x: torch.linalg.vector_norm(x, math.inf, -1), [x])


def test_a_trace_is_a_sum_and_an_inner_product_a_product():
    x, fixed = draw(3, 3), draw(2, 3, seed=3)
    size = x.diagonal().abs()
    weight = torch.zeros(1, 9, dtype=torch.float64)
    weight[0, [0, 4, 8]] = size / size.sum()
    check(columns(lambda x: x[0].trace().reshape(1, 1), [x]), [weight])
    y = draw(3, seed=8)
    check(columns(lambda y: torch.inner(y, fixed), [y]), [by_size(fixed, y)])


def test_einsum_of_one_tensor_adds_up_and_turns():
    x = draw(3, 3)
    check(columns(lambda x: torch.einsum("nij->nji", x), [x]), [routed(x.T, x)])
    check(
        columns(lambda x: torch.einsum("nij->ni", x), [x]), [by_size(torch.kron(eye(3), torch.ones(1, 3).double()), x)]
    )
    diagonal = torch.zeros(3, 9, dtype=torch.float64)
    diagonal[[0, 1, 2], [0, 4, 8]] = 1
    check(columns(lambda x: torch.einsum("nii->ni", x), [x]), [diagonal])


def test_entries_beside_a_diagonal_are_constants():
    x = draw(3)
    matrix = torch.zeros(9, 3, dtype=torch.float64)
    matrix[[0, 4, 8], [0, 1, 2]] = 1
    check(columns(lambda x: torch.diag_embed(x), [x]), [matrix])


ALIKE: dict[str, tuple[Op, Op]] = {
    "expit": (torch.special.expit, torch.sigmoid),
    "arctan": (torch.arctan, torch.atan),
    "softmax": (lambda x: torch.special.softmax(x, -1), lambda x: x.softmax(-1)),
    "matmul": (lambda x: torch.linalg.matmul(x, V), lambda x: x @ V),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_namespace_is_another_spelling(name):
    x = draw(2, 4)
    one, other = (columns(lambda x, op=op: op(x) * x if op(x).shape == x.shape else op(x), [x]) for op in ALIKE[name])
    check(one, other)


def alone(op: Op, x: Tensor, composite: Composite | None = None) -> Tensor:
    """The matrix of an operation that knows no samples, row by row."""
    units = torch.eye(Apply(op)(x[None]).numel(), dtype=torch.float64)
    rules = Normalized(composite or NRMAbsolute(), residual="sink")
    start = [unit.reshape(Apply(op)(x[None]).shape) for unit in units]
    measures = [RelevanceMeasure(Apply(op).eval(), x[None], start=one, composite=rules) for one in start]
    torch.testing.assert_close(torch.cat([mu.output for mu in measures]), op(x[None]).flatten())
    return torch.cat([mu.marginal("input").flatten(1) for mu in measures])


VECTOR, CUBE, BLOCKS = draw(4, seed=11), draw(2, 2, 2, seed=12), draw(2, 4, 4, seed=13).float()
WRITTEN_OUT: dict[str, tuple[Op, Op]] = {
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
    del WRITTEN_OUT["grouped_mm of batches"]


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_what_is_made_of_other_operations_shares_like_them(name):
    x = draw(2, 4)
    for one, other in (WRITTEN_OUT[name], WRITTEN_OUT[name][::-1]):
        torch.testing.assert_close(one(x[None]), other(x[None]))
    found, expected = (alone(op, x) for op in WRITTEN_OUT[name])
    assert bool(expected.any())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_products_of_other_forms_say_what_to_do():
    with pytest.raises(UnsupportedOperationError, match="Multiply group by group"):
        alone(
            lambda x: F.grouped_mm(x[0].float().T, x[0].float(), offs=torch.tensor([1, 2], dtype=torch.int32))[None],
            draw(2, 4),
        )


def test_a_rule_for_activations_is_that_of_their_functions():
    """Epsilon on an activation: relevance times its slope, by what it returned."""
    rules = LayerMapComposite(layer_map=[(torch.nn.ReLU, Epsilon(epsilon=1e-9)), (Linear, Epsilon())])
    x = draw(2, 4)
    expected = torch.diag((x > 0).double().flatten())
    torch.testing.assert_close(alone(F.relu, x, rules), expected, atol=1e-6, rtol=0)


def test_a_constant_competes_in_a_scattered_maximum():
    """What it wins ends there."""
    x, rivals = draw(2, 4), draw(2, 4, seed=5)
    place = torch.tensor([[3, 2, 1, 0]]).expand(2, 4)
    found = alone(lambda x: x.scatter_reduce(2, place[None], rivals[None], "amax"), x)
    wins = x > rivals.flip(1)
    assert 0 < int(wins.sum()) < 8
    torch.testing.assert_close(found, torch.diag(wins.double().flatten()))


@pytest.mark.parametrize("name", [name for name in WRITTEN_OUT if "computed" in name])
@pytest.mark.parametrize("composite", [NRMAbsolute, None])
def test_nothing_is_lost_where_the_model_computes_a_weight_or_bias(name, composite):
    x = draw(2, 4)[None]
    for start in torch.eye(WRITTEN_OUT[name][0](x).numel(), dtype=torch.float64):
        start = start.reshape(WRITTEN_OUT[name][0](x).shape)
        mu = RelevanceMeasure(Apply(WRITTEN_OUT[name][0]).eval(), x, start=start, composite=composite and composite())
        total = mu.marginal("input").sum() + sum(value.sum() for value in mu.sinks().values())
        assert float(total) == pytest.approx(1, abs=1e-9)
