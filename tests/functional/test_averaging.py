"""Kernels of averages, sums and interpolations against matrices that are written out here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonPlusFlat

from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure
from nrm_plugin.errors import UnsupportedOperationError
from tests.functional.kernel_matrices import (
    FLOOR,
    IMAGE,
    LINE,
    VOLUME,
    Apply,
    Op,
    blocks,
    by_sign,
    by_size,
    check,
    columns,
    draw,
    eye,
)


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
    """``w[j, i]`` of cubic interpolation along one dimension, which is negative at the second neighbors."""

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
    return blocks(len(image), weight)


POOLINGS: dict[str, tuple[Op, Tensor, Tensor]] = {
    "mean over the image": (
        lambda a: a.mean((2, 3)),
        IMAGE,
        blocks(2, torch.full((1, 20), 1 / 20).double()),
    ),
    "mean keepdim": (
        lambda a: torch.mean(a, 2, keepdim=True),
        IMAGE,
        blocks(2, torch.full((1, 4), 0.25), eye(5)),
    ),
    "mean over channels": (lambda a: a.mean(1), IMAGE, torch.kron(torch.full((1, 2), 0.5), eye(20))),
    "sum": (lambda a: a.sum(-1), IMAGE, blocks(2, eye(4), torch.ones(1, 5))),
    "cumsum": (lambda a: a.cumsum(2), LINE, blocks(2, torch.ones(7, 7).tril())),
    "avg_pool1d": (lambda a: F.avg_pool1d(a, 3, 2), LINE, blocks(2, windows(7, 3, 2))),
    "avg_pool2d": (lambda a: F.avg_pool2d(a, 2), IMAGE, blocks(2, windows(4, 2, 2), windows(5, 2, 2))),
    "avg_pool2d strided, padded": (
        lambda a: F.avg_pool2d(a, 3, (1, 2), 1),
        IMAGE,
        blocks(2, windows(4, 3, 1, 1), windows(5, 3, 2, 1)),
    ),
    "avg_pool2d, padding not counted": (
        lambda a: F.avg_pool2d(a, 3, 1, 1, count_include_pad=False),
        IMAGE,
        blocks(2, windows(4, 3, 1, 1, False), windows(5, 3, 1, 1, False)),
    ),
    "avg_pool3d": (
        lambda a: F.avg_pool3d(a, 2, 1),
        VOLUME,
        blocks(1, windows(3, 2, 1), windows(4, 2, 1), windows(2, 2, 1)),
    ),
    "adaptive_avg_pool1d": (lambda a: F.adaptive_avg_pool1d(a, 3), LINE, blocks(2, bins(7, 3))),
    "adaptive_avg_pool2d": (
        lambda a: F.adaptive_avg_pool2d(a, (3, 2)),
        IMAGE,
        blocks(2, bins(4, 3), bins(5, 2)),
    ),
    "adaptive_avg_pool2d that enlarges": (
        lambda a: F.adaptive_avg_pool2d(a, (6, 6)),
        IMAGE,
        blocks(2, bins(4, 6), bins(5, 6)),
    ),
    "adaptive_avg_pool3d": (
        lambda a: F.adaptive_avg_pool3d(a, (2, 3, 1)),
        VOLUME,
        blocks(1, bins(3, 2), bins(4, 3), bins(2, 1)),
    ),
    "interpolate linear": (
        lambda a: F.interpolate(a, 10, mode="linear"),
        LINE,
        blocks(2, between(7, 10, False)),
    ),
    "interpolate bilinear": (
        lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"),
        IMAGE,
        blocks(2, between(4, 8, False), between(5, 10, False)),
    ),
    "interpolate bilinear, corners": (
        lambda a: F.interpolate(a, size=(3, 7), mode="bilinear", align_corners=True),
        IMAGE,
        blocks(2, between(4, 3, True), between(5, 7, True)),
    ),
    "interpolate trilinear": (
        lambda a: F.interpolate(a, size=(6, 8, 4), mode="trilinear"),
        VOLUME,
        blocks(1, between(3, 6, False), between(4, 8, False), between(2, 4, False)),
    ),
    "interpolate area": (
        lambda a: F.interpolate(a, size=(2, 3), mode="area"),
        IMAGE,
        blocks(2, bins(4, 2), bins(5, 3)),
    ),
    "interpolate bicubic": (
        lambda a: F.interpolate(a, size=(8, 10), mode="bicubic"),
        IMAGE,
        blocks(2, cubic(4, 8), cubic(5, 10)),
    ),
    "interpolate bicubic down": (
        lambda a: F.interpolate(a, size=(3, 2), mode="bicubic"),
        IMAGE,
        blocks(2, cubic(4, 3), cubic(5, 2)),
    ),
    "Upsample bicubic": (
        nn.Upsample(scale_factor=2, mode="bicubic"),
        IMAGE,
        blocks(2, cubic(4, 8), cubic(5, 10)),
    ),
    "Upsample bilinear": (
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
        IMAGE,
        blocks(2, between(4, 8, True), between(5, 10, True)),
    ),
    "UpsamplingBilinear2d": (
        nn.UpsamplingBilinear2d(scale_factor=2),
        IMAGE,
        blocks(2, between(4, 8, True), between(5, 10, True)),
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
def test_the_weights_written_out_here_are_those_of_torch(name):
    op, a, weight = POOLINGS[name]
    assert torch.allclose(op(a[None]).flatten(), weight.double() @ a.flatten(), atol=1e-12)


@pytest.mark.parametrize("name", POOLINGS)
def test_pooling_splits_by_absolute_contribution(name):
    op, a, weight = POOLINGS[name]
    check(columns(op, [a]), [by_size(weight.double(), a)])


@pytest.mark.parametrize("name", [name for name in POOLINGS if name not in SIGNED])
def test_pooling_has_the_rule_that_the_composite_gives_to_average_pooling(name):
    op, a, weight = POOLINGS[name]
    check(columns(op, [a], EpsilonPlusFlat()), [by_sign(weight.double(), a)])


def test_power_average_pooling_splits_by_powers():
    a = draw(1, 1, 7).abs()
    size = a.flatten() + FLOOR * a.mean()
    part = (windows(7, 3, 2) > 0) * size**3
    check(columns(lambda a: F.lp_pool2d(a, 3.0, (1, 3), (1, 2)), [a]), [part / part.sum(1, keepdim=True)])


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0, 2.5])
def test_power_average_pooling_of_zeros_absorbs_relevance(power):
    a = draw(1, 1, 7).abs()
    a[..., 2:5] = 0  # the second of three windows
    part = (windows(7, 3, 2) > 0) * a.flatten() ** power
    expected = part / part.sum(1, keepdim=True).clamp(min=1e-300)
    for pool in (lambda a: F.lp_pool2d(a, power, (1, 3), (1, 2)), nn.LPPool2d(power, (1, 3), (1, 2))):
        (found,) = columns(pool, [a], EpsilonPlusFlat(), is_transposed=False)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # the rule has a stabilizer
    ceiled = columns(lambda a: F.lp_pool2d(a, power, (1, 4), (1, 3), ceil_mode=True), [a], EpsilonPlusFlat())
    assert all(column.isfinite().all() for column in ceiled)


def test_power_average_pooling_of_infinite_power_routes_to_maxima():
    a = draw(1, 1, 6).abs()
    (found,) = columns(lambda a: F.lp_pool2d(a, float("inf"), (1, 3)), [a], EpsilonPlusFlat())
    assert found.argmax(1).tolist() == [int(a[0, 0, :3].argmax()), 3 + int(a[0, 0, 3:].argmax())]


@pytest.mark.parametrize("aligned", [False, True])
def test_region_of_interest_pooling_splits_by_absolute_contribution(aligned):
    image = draw(2, 5, 6)
    box = torch.tensor([[0, 0.7, 0.4, 4.6, 3.9]], dtype=torch.float64)

    def pooled(a: Tensor) -> Tensor:
        return torchvision.ops.roi_align(a, box, (2, 2), 1.0, 2, aligned)

    weight = torch.zeros(4, 5, 6, dtype=torch.float64)
    x0, y0, x1, y1 = (value - (0.5 if aligned else 0) for value in box[0, 1:].tolist())
    for cell, (r, c) in enumerate(itertools.product(range(2), range(2))):
        for i, j in itertools.product(range(2), range(2)):  # two by two points in blocks cell
            y, x = y0 + (y1 - y0) / 2 * (r + (i + 0.5) / 2), x0 + (x1 - x0) / 2 * (c + (j + 0.5) / 2)
            for p, q in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
                weight[cell, p, q] += (1 - abs(y - p)) * (1 - abs(x - q)) / 4
    weight = blocks(2, weight.flatten(1))
    assert torch.allclose(pooled(image[None]).flatten(), weight @ image.flatten())
    expected = by_size(weight, image)
    for number, row in enumerate(expected):
        start = eye(8)[number].reshape(1, 2, 2, 2)
        mu = RelevanceMeasure(Apply(pooled), image[None], start=start, composite=Normalized(NRMAbsolute()))
        check([mu.marginal("input").flatten(1)], [row[None]])


def test_bicubic_sampling_at_points_raises_with_advice():
    def cubic_at(image: Tensor) -> Tensor:
        return F.grid_sample(image, GRID.expand(len(image), -1, -1, -1), mode="bicubic", align_corners=True)

    with pytest.raises(UnsupportedOperationError, match=r"mode='bicubic'.* negative.*mode='bilinear'"):
        columns(cubic_at, [IMAGE])
