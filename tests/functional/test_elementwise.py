"""Kernels of activations, norms and arithmetic against matrices that are written out here.

Covers: nrm_plugin.functional.gates.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import LayerMapComposite
from zennit.rules import AlphaBeta, Epsilon, Gamma
from zennit.types import Activation, Linear

from nrm_plugin.functional.elementwise import ACTIVATIONS
from tests.functional.kernel_matrices import (
    NONE,
    ROW,
    TOLERANCE,
    ZERO,
    A,
    B,
    C,
    K,
    Op,
    alone,
    check,
    columns,
    draw,
    eye,
    spread,
)


def add_in_place(a: Tensor, b: Tensor) -> Tensor:
    a = a * 1.0
    a += b
    return a


SUMS: dict[str, tuple[Op, list[Tensor], list[float]]] = {
    "a + b": (lambda a, b: a + b, [A, B], [1, 1]),
    "torch.add": (torch.add, [A, B], [1, 1]),
    "Tensor.add": (lambda a, b: a.add(b), [A, B], [1, 1]),
    "add alpha": (lambda a, b: torch.add(a, b, alpha=-2.5), [A, B], [1, -2.5]),
    "a += b": (add_in_place, [A, B], [1, 1]),
    "a - b": (lambda a, b: a - b, [A, B], [1, -1]),
    "sub alpha": (lambda a, b: a.sub(b, alpha=3), [A, B], [1, -3]),
    "rsub": (lambda a, b: torch.rsub(a, b, alpha=2), [A, B], [-2, 1]),
    "broadcast": (lambda a, b: a + b, [A, ROW], [1, 1]),
    "broadcast minus": (lambda a, b: b - a, [ROW, A], [-1, 1]),
    "one is zero": (lambda a, b: a + b, [ZERO, B], [1, 1]),
    "all zero": (lambda a, b: a + b, [ZERO, ZERO], [1, 1]),
    "(a + b) + c": (lambda a, b, c: (a + b) + c, [A, B, C], [1, 1, 1]),
    "a + (b + c)": (lambda a, b, c: a + (b + c), [A, B, C], [1, 1, 1]),
    "sum of a list": (lambda a, b, c: sum([a, b, c]), [A, B, C], [1, 1, 1]),
    "a + b that cancel, + c": (lambda a, b, c: a + b + c, [A, -A, C], [1, 1, 1]),
    "stack, sum": (lambda a, b, c: torch.stack([a, b, c]).sum(0), [A, B, C], [1, 1, 1]),
    "stack, sum last": (lambda a, b: torch.stack([a, b], -1).sum(-1), [A, B], [1, 1]),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_split_by_absolute_contribution(name):
    op, inputs, factors = SUMS[name]
    contributions = [(f * value).expand(2, 3) for f, value in zip(factors, inputs, strict=True)]
    total = torch.stack([part.abs() for part in contributions]).sum(0)
    dead = total == 0
    shares = [torch.where(dead, 1 / len(inputs), part.abs() / torch.where(dead, 1.0, total)) for part in contributions]
    tolerant = "stack" in name  # the rule of a reduction has a floor
    actual = columns(op, inputs)
    for matrix, share, value in zip(actual, shares, inputs, strict=True):
        assert float((matrix - spread(share, value)).abs().max()) <= (1e-5 if tolerant else TOLERANCE)


@pytest.mark.parametrize("name", ["a + b", "a - b", "rsub", "add alpha", "broadcast"])
def test_signed_sums_split_by_contribution(name):
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


PRODUCTS: dict[str, tuple[Op, list[Tensor], list[Tensor]]] = {
    "signal * gate": (lambda a, b: a * b.sigmoid(), [A, B], [eye(6), NONE]),
    "gate * signal": (lambda a, b: torch.softmax(a, 1) * b, [A, B], [NONE, eye(6)]),
    "gate in place": (lambda a, b: (a * 1.0).mul_(F.hardsigmoid(b)), [A, B], [eye(6), NONE]),
    "module gate": (lambda a, b: a * nn.Sigmoid()(b), [A, B], [eye(6), NONE]),
    "1 - gate": (lambda a, b: a * (1 - b.sigmoid()), [A, B], [eye(6), NONE]),
    "gate / sum": (lambda a, b: a * (b.exp() / b.exp().sum(1, keepdim=True)), [A, B], [eye(6), NONE]),
    "product of gates": (lambda a, b: a * (b.sigmoid() * b.exp()), [A, B], [eye(6), NONE]),
    "gate times signal is not a gate": (
        lambda a, b: a * (a.sigmoid() * b)[:, :1],
        [A, B],
        [eye(6), NONE],  # the signal is the larger operand
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
    "hypot of zeros": (torch.hypot, [ZERO, ZERO], [eye(6) / 2, eye(6) / 2]),
    "glu": (
        lambda a: F.glu(a, 1),
        [draw(4, 3)],
        [torch.cat([eye(6), NONE], 1)],
    ),
    "GLU": (lambda a: nn.GLU(1)(a), [draw(4, 3)], [torch.cat([eye(6), NONE], 1)]),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_passes_all_relevance_to_the_signal(name):
    op, inputs, expected = PRODUCTS[name]
    check(columns(op, inputs), expected)


@pytest.mark.parametrize("op", [torch.maximum, torch.max, torch.Tensor.min, torch.fmin])
def test_a_maximum_of_equal_values_is_split_in_half(op):
    (first, second) = columns(op, [A, A.clone()])
    check([first, second], [eye(6) / 2, eye(6) / 2])


@pytest.mark.parametrize("op", [torch.maximum, torch.max, lambda a, k: a.max(other=k), lambda a, k: torch.min(k, a)])
def test_a_constant_of_a_maximum_is_a_threshold_as_in_relu(op):
    assert 0 < int((A > K).sum()) < 6
    check(columns(lambda a: op(a, K), [A]), [eye(6)])


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
def test_unary_functions_are_the_identity_in_every_spelling(name):
    a = 0.2 + 0.1 * POSITIVE
    spellings = [getattr(torch, name), lambda a: getattr(a, name)()]
    if hasattr(Tensor, f"{name}_"):
        spellings.append(lambda a: getattr(a.clone(), f"{name}_")())
    for op in spellings:
        assert torch.equal(columns(op, [a])[0], eye(6))


@pytest.mark.parametrize("name", IDENTITIES)
def test_elementwise_functions_and_norms_are_the_identity(name):
    assert torch.equal(columns(IDENTITIES[name], [A])[0], eye(6))


def test_a_rule_for_activations_applies_to_their_functions():
    """Epsilon on an activation: relevance times its slope, by what it returned."""
    rules = LayerMapComposite(layer_map=[(torch.nn.ReLU, Epsilon(epsilon=1e-9)), (Linear, Epsilon())])
    x = draw(2, 4)
    expected = torch.diag((x > 0).double().flatten())
    torch.testing.assert_close(alone(F.relu, x, rules), expected, atol=1e-6, rtol=0)


CURVED = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "silu": nn.SiLU, "leaky_relu": nn.LeakyReLU, "softplus": nn.Softplus}


@pytest.mark.parametrize("name", CURVED)
def test_epsilon_on_an_activation_is_its_slope_times_input_by_what_it_returned(name):
    x, function = draw(2, 3), getattr(F, name)
    slopes = torch.func.vmap(torch.func.grad(function))(x.flatten())
    expected = torch.diag(x.flatten() * slopes / function(x).flatten())
    rules = LayerMapComposite(layer_map=[(Activation, Epsilon(epsilon=1e-9)), (Linear, Epsilon())])
    torch.testing.assert_close(columns(function, [x], rules)[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", [lambda: Gamma(0.5), lambda: AlphaBeta(2, 1)], ids=["gamma", "alpha beta"])
@pytest.mark.parametrize("name", CURVED)
def test_a_rule_for_activations_treats_functions_like_modules(name, rule):
    rules = LayerMapComposite(layer_map=[(Activation, rule()), (Linear, Epsilon())])
    check(columns(getattr(F, name), [A], rules), columns(CURVED[name](), [A], rules))
