"""Kernels of methods with rules for attention and sums that are not defaults of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nrm_plugin.functional import SplitKernel
from nrm_plugin.kernels.base import Kernel


class FixedAttention(Kernel):
    """LRP-0 of ``O = A V`` with constant weights."""

    def __init__(self, weights: Tensor, value: Tensor) -> None:
        self.weights, self.value, self.output = weights, value, weights @ value

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        passed = self.value * (self.weights.transpose(-2, -1) @ (relevance / self.output))
        return 0 * passed, 0 * passed, passed

    def pull_absolute(self, relevance: Tensor) -> tuple[Tensor, ...]:
        passed = self.value.abs() * (self.weights.transpose(-2, -1) @ (relevance / self.output.abs()))
        return 0 * passed, 0 * passed, passed


def fixed_attention(call: Any) -> Kernel:
    """Kernel function to register."""
    q, k, v = call.values
    return FixedAttention((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1), v)


class MeanAttention(Kernel):
    """Redistributes the relevance of each head over the values by the mean attention of all heads."""

    is_stochastic = True

    def __init__(self, weights: Tensor) -> None:
        self.weights = weights.mean(1, keepdim=True)

    def pull(self, relevance: Tensor) -> tuple[Tensor, ...]:
        passed = self.weights.transpose(-2, -1) @ relevance
        return torch.zeros_like(passed), torch.zeros_like(passed), passed

    pull_absolute = pull


def mean_attention(call: Any) -> Kernel:
    """Kernel function to register."""
    q, k, _ = call.values
    return MeanAttention((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1))


def halves(call: Any) -> Kernel:
    """Returns the kernel of a skip connection: each branch receives half."""
    shapes = [value.shape for value in call.values]
    return SplitKernel([torch.full_like(call.values[0], 0.5)] * 2, shapes, None, is_stochastic=True)


class AttentionOnly(nn.TransformerEncoderLayer):
    """``x + attention(x)``, the layers that rollout covers."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return src + self.self_attn(src, src, src, need_weights=False)[0]  # type: ignore[no-any-return]
