"""Kernels of absolute values, for rules with closed form and without.

Covers: nrm_plugin.kernels.vjp_kernel.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zennit.core import BasicHook

from nrm_plugin.errors import NRMError
from nrm_plugin.kernels.absolute_kernels import dense_absolute
from nrm_plugin.kernels.vjp_kernel import VjpKernel
from tests.test_kernels import measure


@pytest.mark.parametrize("chunk", [1, 3, 4, 5, 64])
def test_absolute_values_are_formed_in_chunks_up_to_a_limit(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    T, U = torch.randn((2, 5, 4), dtype=torch.float64, generator=draw)
    kernel = VjpKernel(lambda relevance: (relevance @ T.T, relevance @ U.T))
    relevance = torch.rand((3, 2, 4), dtype=torch.float64, generator=draw)
    monkeypatch.setattr("nrm_plugin.kernels.absolute_kernels.DENSE_LIMIT", 4)
    for part, matrix in zip(dense_absolute(kernel, relevance, chunk), (T, U), strict=True):
        assert torch.allclose(part, relevance @ matrix.abs().T)
    monkeypatch.setattr("nrm_plugin.kernels.absolute_kernels.DENSE_LIMIT", 3)
    with pytest.raises(NRMError, match=r"4 outputs per sample.*up to 3 outputs"):
        dense_absolute(kernel, relevance, chunk)


@pytest.mark.parametrize("second", [-0.6, 0.6])
def test_absolute_values_of_branches_that_share_entries(second: float) -> None:
    """Two branches with the same inputs and weights; their factors differ, and cancel or not."""
    w = torch.tensor([[1.0, -2.0, 3.0], [2.0, 1.0, -1.0]], dtype=torch.float64)
    a = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    module = nn.Linear(3, 2, bias=False).double()
    module.weight.data.copy_(w)
    shared = BasicHook(
        [lambda x: x] * 2,
        [lambda weight, name: weight] * 2,
        [lambda z: z] * 2,
        lambda grad, outputs: [grad / (1 + outputs[0].abs()), second * grad / (2 + outputs[1].abs())],
        lambda inputs, gradients: sum(x * g for x, g in zip(inputs, gradients, strict=True)),
    )
    z = w @ a
    T = w * a * (1 / (1 + z.abs()) + second / (2 + z.abs()))[:, None]
    mu = measure(module, a, shared)
    assert torch.allclose(mu.marginal("input"), T)
    assert torch.allclose(mu.walk_variation(), T.abs().sum(1) + (1 - T.sum(1)).abs())


@pytest.mark.parametrize("outputs", [1, 2])
def test_absolute_values_of_weights_that_are_not_multiples(outputs: int) -> None:
    """Each weight is 0.3 more, which may change its sign."""
    module = nn.Linear(3, outputs, bias=False).double()
    module.weight.data.copy_(torch.tensor([[1.0, -0.2, -2.0], [0.1, 2.0, -0.1]], dtype=torch.float64)[:outputs])
    a = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    moved = BasicHook(
        [lambda x: x],
        [lambda weight, name: weight + 0.3],
        [lambda z: z],
        lambda grad, outputs: [grad / (1 + outputs[0].abs())],
        lambda inputs, gradients: inputs[0] * gradients[0],
    )
    weight = module.weight.detach() + 0.3
    T = weight * a / (1 + (weight @ a).abs())[:, None]
    mu = measure(module, a, moved)
    assert torch.allclose(mu.marginal("input"), T)
    assert torch.allclose(mu.walk_variation(), T.abs().sum(1) + (1 - T.sum(1)).abs())
