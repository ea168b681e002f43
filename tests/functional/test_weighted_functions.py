"""Layers with weights that are called as functions, against matrices that are written out here."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torchvision

from tests.functional.kernel_matrices import by_epsilon, check, columns, draw, linear_rules, measure


@pytest.mark.parametrize("gated", [False, True])
def test_a_deformable_convolution_reads_its_input_at_the_offsets(gated):
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
    check(columns(net, inputs, linear_rules(), is_transposed=False), [by_epsilon(matrix, a), *nothing])
    mu = measure(net, inputs, linear_rules())
    expected = by_epsilon(matrix, a).abs().sum(1) + (1 - by_epsilon(matrix, a).sum(1)).abs()
    assert torch.allclose(mu.walk_variation(), expected)
