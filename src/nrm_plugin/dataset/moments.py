r"""Class-wise count, mean and sum of squared deviations, accumulated over batches in double precision.

torchmetrics provides means, but no class-wise variances that can be merged across processes. Here, two sets of samples
are merged without cancellation between large sums:

.. math:: n = n_a + n_b, \quad \delta = m_b - m_a, \quad
          m = m_a + \delta \frac{n_b}{n}, \quad
          M = M_a + M_b + \delta^2 \frac{n_a n_b}{n}

Source: Chan, Golub and LeVeque (1979), after Welford (1962).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

COUNT, MEAN, SQUARES = range(3)
"""Indices into the last dimension of a state."""


class Moments(NamedTuple):
    """Class-wise mean and variance of relevance over samples.

    Attributes:
        samples: Number of samples per class, of shape ``(classes,)``, or a scalar if samples are not divided into
            classes.
        mean: Mean relevance, of shape ``(classes, *groups)``, dimensionless. NaN for a class that has no samples.
        variance: Variance, of the same shape. NaN for a class with at most ``correction`` samples, by default one.
    """

    samples: Tensor
    mean: Tensor
    variance: Tensor


def empty(classes: int, groups: tuple[int, ...]) -> Tensor:
    """Returns the state for no samples as zeros of shape ``(classes, *groups, 3)``."""
    return torch.zeros((classes, *groups, 3), dtype=torch.float64)


def of_batch(values: Tensor, target: Tensor, classes: int) -> Tensor:
    """Computes the state of a batch.

    Args:
        values: Values to accumulate, of shape ``(N, *groups)``.
        target: Class of each sample, of shape ``(N,)``.
        classes: Number of classes.
    """
    values = values.detach().double()
    shape = (classes, *values.shape[1:])
    count = values.new_zeros(classes).index_add_(0, target, values.new_ones(len(values)))
    count = count.reshape(-1, *(1,) * (values.ndim - 1)).expand(shape)
    mean = values.new_zeros(shape).index_add_(0, target, values) / count.clamp(min=1)
    squares = values.new_zeros(shape).index_add_(0, target, (values - mean[target]).square_())
    return torch.stack((count, mean, squares), dim=-1)


def merged(states: Tensor) -> Tensor:
    """Merges ``S`` states, stacked in shape ``(S, …, 3)``, into the state of all their samples."""
    total = states[0]
    for state in states[1:]:
        count = total[..., COUNT] + state[..., COUNT]
        share = state[..., COUNT] / count.clamp(min=1)
        change = state[..., MEAN] - total[..., MEAN]
        mean = total[..., MEAN] + change * share
        squares = total[..., SQUARES] + state[..., SQUARES] + change.square() * total[..., COUNT] * share
        total = torch.stack((count, mean, squares), dim=-1)
    return total


def moments(state: Tensor, correction: int = 1) -> Moments:
    """Computes the count, mean and variance from an accumulated state.

    Args:
        state: An accumulated state of shape ``(classes, *groups, 3)``; the last dimension holds the three statistics.
        correction: Number subtracted from the count in the denominator of the variance, as in :func:`torch.var`.
    """
    count = state[..., COUNT]
    mean = state[..., MEAN].masked_fill(count == 0, torch.nan)
    variance = (state[..., SQUARES] / (count - correction)).masked_fill(count <= correction, torch.nan)
    return Moments(count.flatten(1)[:, 0].long(), mean, variance)
