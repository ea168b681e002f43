"""Matrices of kernels, computed column by column, and the formulas with which they are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from zennit.composites import LayerMapComposite
from zennit.core import Composite
from zennit.rules import Epsilon
from zennit.types import Linear

from nrm_plugin import Normalized, NRMAbsolute, RelevanceMeasure, at

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
    """Signed numbers, no two of which are equal."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def measure(
    op: Op | nn.Module, inputs: list[Tensor], composite: Composite | None = None, sums: Any = "absolute"
) -> RelevanceMeasure:
    """The measure of one operation on inputs without a batch dimension, with one sample per entry of the output."""
    net = op if isinstance(op, nn.Module) else Apply(op)
    shape = net(*(value[None] for value in inputs)).shape[1:]
    units = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    batch = tuple(value.expand(len(units), *value.shape) for value in inputs)
    rules = Normalized(composite or NRMAbsolute(), residual="sink", sums=sums)
    return RelevanceMeasure(net.eval(), batch, start=units, composite=rules)


def columns(
    op: Op | nn.Module,
    inputs: list[Tensor],
    composite: Composite | None = None,
    sums: Any = "absolute",
    is_transposed: bool = True,
) -> list[Tensor]:
    """``T[j, i]`` for each input; checks the sink of each column, and the transposed kernel on half of each input.

    Functions whose gradient torch cannot differentiate have no transposed kernel.
    """
    mu = measure(op, inputs, composite, sums)
    taps = ["input"] if len(inputs) == 1 else [f"input[{number}]" for number in range(len(inputs))]
    marginals = [mu.marginal(tap).flatten(1) if tap in mu.layers else None for tap in taps]
    parts = [
        torch.zeros(mu.batch, value.numel(), dtype=value.dtype) if part is None else part
        for part, value in zip(marginals, inputs, strict=True)
    ]
    total = torch.stack([part.sum(1) for part in parts]).sum(0)
    absorbed = torch.stack(list(mu.sinks().values()) or [torch.zeros(mu.batch).double()]).sum(0)
    assert float((total + absorbed - 1).abs().max()) <= TOLERANCE
    for tap, part, value in zip(taps, marginals, inputs, strict=True):
        if part is not None and is_transposed:
            half = (torch.arange(value.numel()) % 2 == 0).reshape(value.shape)
            transposed = mu.marginal("output", joint=at(tap)[half]).reshape(mu.batch, -1).sum(1)
            assert float((transposed - part[:, half.flatten()].sum(1)).abs().max()) <= TOLERANCE
    return parts


def check(actual: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.shape == other.shape
        assert float((one - other).abs().max()) <= TOLERANCE


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def routed(output: Tensor, source: Tensor) -> Tensor:
    """The 0/1 matrix of an operation that copies entries; values are distinct, so each identifies its source."""
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


def blocks(channels: int, *weights: Tensor) -> Tensor:
    """The same weights for every channel, along every dimension."""
    matrix = eye(channels)
    for weight in weights:
        matrix = torch.kron(matrix, weight)
    return matrix


A, B, C = draw(2, 3), draw(2, 3, seed=1), draw(2, 3, seed=2)
ROW = draw(1, 3, seed=3)
ZERO = torch.zeros(2, 3, dtype=torch.float64)
K = draw(2, 3, seed=9)  # a constant
NONE = torch.zeros(6, 6, dtype=torch.float64)
IMAGE, LINE, VOLUME = draw(2, 4, 5), draw(2, 7), draw(1, 3, 4, 2)
W, V, BIAS = draw(3, 5, seed=4), draw(4, 2, seed=5), draw(5, seed=6)
EPSILON = 0.25


def by_epsilon(weight: Tensor, a: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """``a_i w_ji / (z_j + ε sign z_j)`` with ``z_j`` the output with its bias."""
    part = weight * a.reshape(-1)
    z = part.sum(1, keepdim=True) + (bias.reshape(-1, 1) if isinstance(bias, Tensor) else bias)
    return part / (z + EPSILON * torch.where(z >= 0, 1.0, -1.0))


def linear_rules() -> Composite:
    return LayerMapComposite([(Linear, Epsilon(epsilon=EPSILON))])


def rows_of(share: Tensor) -> Tensor:
    """``T[j, i]`` of a function that reduces each row of ``(rows, columns)`` to one number."""
    rows, width = share.shape
    matrix = torch.zeros(rows, rows * width, dtype=torch.float64)
    for j in range(rows):
        for i in range(width):
            matrix[j, j * width + i] = share[j, i]
    return matrix


def alone(op: Op, x: Tensor, composite: Composite | None = None) -> Tensor:
    """The matrix of an operation that mixes samples, row by row."""
    units = torch.eye(Apply(op)(x[None]).numel(), dtype=torch.float64)
    rules = Normalized(composite or NRMAbsolute(), residual="sink")
    start = [unit.reshape(Apply(op)(x[None]).shape) for unit in units]
    measures = [RelevanceMeasure(Apply(op).eval(), x[None], start=one, composite=rules) for one in start]
    torch.testing.assert_close(torch.cat([mu.output for mu in measures]), op(x[None]).flatten())
    return torch.cat([mu.marginal("input").flatten(1) for mu in measures])
