"""Kernels of matrix products and other contractions against matrices that are written out here."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import LayerMapComposite
from zennit.rules import Pass

from nrm_plugin import Normalized, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import UncoveredLayerError
from tests.functional.kernel_matrices import (
    BIAS,
    FLOOR,
    Apply,
    Op,
    V,
    W,
    by_epsilon,
    by_size,
    check,
    columns,
    draw,
    eye,
    linear_rules,
    routed,
)

TOKENS = draw(4, 3)
LEFT = draw(5, 4, seed=7)
KERNEL2D = draw(2, 2, 3, 3, seed=8)


def convolution(weight: Tensor, height: int, width: int) -> Tensor:
    """``w[j, i]`` of a convolution with padding 1, one weight at a time."""
    outputs, channels, rows, cols = weight.shape
    matrix = torch.zeros(outputs, height, width, channels, height, width, dtype=torch.float64)
    for o, c, r, s, y, x in itertools.product(*map(range, (outputs, channels, rows, cols, height, width))):
        if 0 <= y + r - 1 < height and 0 <= x + s - 1 < width:
            matrix[o, y, x, c, y + r - 1, x + s - 1] = weight[o, c, r, s]
    return matrix.reshape(outputs * height * width, -1)


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


def value_shares(a: Tensor, v: Tensor) -> Tensor:
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
def test_a_product_with_softmax_weights_passes_all_relevance_to_the_values(product):
    scores = draw(5, 4)
    actual = columns(lambda s, v: product(s.softmax(-1), v), [scores, V])
    check(actual, [torch.zeros(10, 20).double(), value_shares(scores.softmax(-1), V)])


def test_without_a_gate_the_larger_factor_receives_all_and_equal_ones_half():
    left, right = draw(5, 4), draw(4, 2, seed=1)
    swapped = value_shares(right.T, left.T).reshape(2, 5, 4, 5).permute(1, 0, 3, 2).reshape(10, 20)
    check(columns(torch.matmul, [left, right]), [swapped, torch.zeros(10, 8).double()])
    left, right = draw(3, 4), draw(4, 3, seed=1)
    upper = value_shares(right.T, left.T).reshape(3, 3, 4, 3).permute(1, 0, 3, 2).reshape(9, 12)
    check(columns(torch.matmul, [left, right]), [upper / 2, value_shares(left, right) / 2])


def test_einsum_of_one_tensor_sums_and_transposes():
    x = draw(3, 3)
    check(columns(lambda x: torch.einsum("nij->nji", x), [x]), [routed(x.T, x)])
    check(
        columns(lambda x: torch.einsum("nij->ni", x), [x]), [by_size(torch.kron(eye(3), torch.ones(1, 3).double()), x)]
    )
    diagonal = torch.zeros(3, 9, dtype=torch.float64)
    diagonal[[0, 1, 2], [0, 4, 8]] = 1
    check(columns(lambda x: torch.einsum("nii->ni", x), [x]), [diagonal])


WEIGHT = draw(6, 5)
CONSTANT_MATRICES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "x @ W": lambda m, x: x @ m.turned,
    "x @ W.T": lambda m, x: x @ m.weight.T,
    "addmm": lambda m, x: torch.addmm(torch.zeros(6, dtype=torch.float64), x.flatten(0, 1), m.turned).unflatten(
        0, x.shape[:2]
    ),
    "einsum": lambda m, x: torch.einsum("nti,oi->nto", x, m.weight),
    "einsum, transposed": lambda m, x: torch.einsum("io,nti->nto", m.turned, x),
    "tensordot": lambda m, x: torch.tensordot(x, m.turned, 1),
    "einsum by head": lambda m, x: torch.einsum("nti,ihk->nthk", x, m.turned.unflatten(1, (2, 3))).flatten(2),
    "bmm": lambda m, x: torch.bmm(x, m.turned.expand(len(x), -1, -1)),
}


class Product(nn.Module):
    def __init__(self, spelled: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.turned = nn.Parameter(WEIGHT.clone()), nn.Parameter(WEIGHT.T.clone())
        self.spelled, self.act, self.head = spelled, nn.ReLU(), nn.Linear(6, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.spelled(self, x)).mean(1))


def product(spelled: Callable[[nn.Module, Tensor], Tensor]) -> RelevanceMeasure:
    torch.manual_seed(6)
    return RelevanceMeasure(Product(spelled).eval(), draw(2, 4, 5), 1, composite=NRMDefault(canonizers=[]))


@pytest.mark.parametrize("name", CONSTANT_MATRICES)
def test_a_constant_matrix_has_a_row_for_each_output(name):
    """The default rule reads the mean weight of an output, over a column of a right factor."""
    layer, written = product(lambda m, x: F.linear(x, m.weight)), product(CONSTANT_MATRICES[name])
    torch.testing.assert_close(layer.marginal("input"), written.marginal("input"), atol=1e-7, rtol=0)
    if name in ("x @ W", "x @ W.T", "einsum", "einsum, transposed", "tensordot"):  # the others have no channels
        torch.testing.assert_close(layer.joint("act", "input"), written.joint("act", "input"), atol=1e-7, rtol=0)
        assert written.cost == layer.cost
    torch.testing.assert_close(layer.walk_variation(), written.walk_variation(), atol=1e-6, rtol=0)


def test_a_product_over_tokens_has_no_channel_matrix():
    mixing = draw(5, 5)

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix, self.act = nn.Parameter(mixing.clone()), nn.ReLU()
            self.embed, self.head = nn.Linear(5, 5).double(), nn.Linear(5, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act(self.mix @ self.embed(x)).mean(1))

    torch.manual_seed(7)
    mu = RelevanceMeasure(Mixer().eval(), draw(2, 5, 5), 1, composite=NRMAbsolute())
    joint = mu.joint("act", "embed")
    each = torch.stack([mu.marginal("embed", "channel", joint=at("act").channel(c)) for c in range(5)], 1)
    torch.testing.assert_close(joint, each)
    assert float((joint - torch.diag_embed(joint.diagonal(dim1=1, dim2=2))).abs().max()) <= 1e-12


@pytest.mark.skipif(not hasattr(torch.nn.functional, "grouped_mm"), reason="this torch has no grouped_mm")
def test_grouped_experts_equal_their_products():
    experts, offsets = draw(3, 5, 6), torch.tensor([2, 2, 4], dtype=torch.int32)

    def grouped(m: nn.Module, x: Tensor) -> Tensor:
        return torch.nn.functional.grouped_mm(x.flatten(0, 1), m.experts, offs=offsets).unflatten(0, (1, 4))

    def apart(m: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([x[:, :2] @ m.experts[0], x[:, 2:] @ m.experts[2]], 1)

    def measure(spelled: Callable[[nn.Module, Tensor], Tensor]) -> RelevanceMeasure:
        torch.manual_seed(6)
        net = Product(spelled).float().eval()
        net.experts = nn.Parameter(experts.float())
        return RelevanceMeasure(net, draw(1, 4, 5).float(), 1)

    one, other = measure(grouped), measure(apart)
    torch.testing.assert_close(one.marginal("input"), other.marginal("input"), atol=1e-5, rtol=0)
