"""Models that mix formats: the measure is that of the same model in float64, to the rounding of its tensors.

Covers: nrm_plugin.model.autocast, nrm_plugin.recording.graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonPlus
from zennit.core import Composite

from nrm_plugin import NRM, NRMAbsolute, NRMDefault, RelevanceMeasure, at
from tests.conftest import in_turn

Op = Callable[[Tensor], Tensor]
DOUBLE = torch.float64
C = torch.tensor([0.5, -1.0, 2.0, 0.25, 1.5, -0.75], dtype=DOUBLE)
W = torch.randn((6, 6), generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
INTO = torch.tensor([0, 0, 1, 1, 1, 2])


def part_written(h: Tensor) -> Tensor:
    result = (h * C).clone()
    result[:, :2] = h[:, 2:4]
    return result


PROMOTIONS: dict[str, Op] = {
    "mul": lambda h: h * C,
    "add": lambda h: C + h,
    "sub": lambda h: h - C,
    "div": lambda h: h / C,
    "parameter": lambda h: h * nn.Parameter(C),
    "sum of two": lambda h: h + h.double().flip(1),
    "gate": lambda h: h.double().sigmoid() * h,
    "cat": lambda h: torch.cat([h, h.double() * 2], 1)[:, ::2],
    "cat with a constant": lambda h: torch.cat([h, C.expand(len(h), 6)], 1)[:, 3:9],
    "stack": lambda h: torch.stack([h, h.double()], 1).sum(1),
    "where": lambda h: torch.where(h > 0, h, C),
    "where, broadcast": lambda h: torch.where(C > 0, h, h.double()[:, :1]),
    "softmax": lambda h: torch.softmax(h, 1, dtype=DOUBLE),
    "mean": lambda h: h.unflatten(1, (3, 2)).mean(2, dtype=DOUBLE).repeat(1, 2),
    "matmul": lambda h: h.double() @ W,
    "linear": lambda h: F.linear(h.to(DOUBLE), W, C),
    "einsum": lambda h: torch.einsum("ni,ij->nj", h.type_as(W), W),
    "addmm": lambda h: torch.addmm(C, h.double(), W),
    "maximum": lambda h: torch.maximum(h, h.double().flip(1)),
    "written": part_written,
    "copied": lambda h: torch.zeros(h.shape, dtype=DOUBLE).copy_(h),
    "back": lambda h: (h.double() * C).to(h.dtype),
    "numbers": lambda h: h * 2.5 + torch.tensor(0.5, dtype=DOUBLE) * torch.arange(6) * (C > 0),
    "added in place": lambda h: h.clone().add_(C),
}
TIES: dict[str, Op] = {
    "relu": torch.relu,
    "scatter amax": lambda h: h.new_zeros(len(h), 3).scatter_reduce(1, INTO.expand_as(h), h, "amax").repeat(1, 2),
    "scatter amin": lambda h: h.new_zeros(len(h), 3).index_reduce(1, INTO, h, "amin", include_self=False).repeat(1, 2),
    "amax": lambda h: h.unflatten(1, (2, 3)).amax(2).repeat(1, 3),
    "maximum": lambda h: torch.maximum(h, h.flip(1)),
    "max_pool": lambda h: F.max_pool1d(h[:, None], 3, 1, 1)[:, 0],
    "clamp": lambda h: h.clamp(0, 1),
    "sort": lambda h: h.sort(1)[0],
    "cummax": lambda h: h.cummax(1)[0],
}


class Mixing(nn.Module):
    """Functions between two layers."""

    def __init__(self, ops: Sequence[Op], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.ops, self.inner = ops, inner or nn.Identity()
        self.first, self.mixed, self.last = nn.Linear(4, 6), nn.Identity(), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        inner = next((parameter.dtype for parameter in self.inner.parameters()), h.dtype)
        h = self.inner(h.to(inner))
        for op in self.ops:
            h = op(h)
        return self.last(self.mixed(h).to(self.last.weight.dtype))


def drawn(ops: Sequence[Op], seed: int, inner: nn.Module | None = None) -> tuple[Mixing, Tensor]:
    torch.manual_seed(seed)
    return Mixing(ops, inner).eval(), torch.randn(3, 4)


def check_same(mu: RelevanceMeasure, twin: RelevanceMeasure, tolerance: float) -> None:
    """Totals, marginals, joints, events and conditionals; relevance has the format of its tensor, or float32."""
    for layer in mu.layers:
        marginal = mu.marginal(layer)
        total = marginal.flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer)
        assert float((total - 1).abs().max()) <= 2e-5
        assert marginal.dtype in (torch.float32, DOUBLE)
    assert mu.marginal("input").dtype == mu.marginal("first").dtype == torch.float32
    event = (at("mixed")[[0, 3]] & at("first")[[1, 2, 4]]) | ~at("input")[2]
    queries: list[Callable[[RelevanceMeasure], Tensor]] = [
        lambda one: one.marginal("first"),
        lambda one: one.marginal("input"),
        lambda one: one.joint("mixed", "input"),
        lambda one: one.joint("last", "first"),
        lambda one: one(event),
        lambda one: one.conditional(at("input")[1], "mixed") * one.marginal("mixed"),
    ]
    for query in queries:
        assert float((query(mu).double() - query(twin)).abs().max()) <= tolerance


@pytest.mark.medium
@pytest.mark.filterwarnings("ignore:index_reduce")
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    first=st.sampled_from(sorted(PROMOTIONS)),
    second=st.sampled_from(sorted(TIES)),
    third=st.sampled_from(sorted(PROMOTIONS)),
    seed=st.integers(0, 20),
)
def test_promotions_and_ties_have_the_measure_of_the_model_in_float64(
    first: str, second: str, third: str, seed: int
) -> None:
    net, x = drawn([PROMOTIONS[first], TIES[second], PROMOTIONS[third]], seed)
    mu = RelevanceMeasure(net, x, 1, composite=NRMAbsolute())
    twin = RelevanceMeasure(copy.deepcopy(net).double(), x.double(), 1, composite=NRMAbsolute())
    check_same(mu, twin, 2e-4)


@pytest.mark.parametrize("name", PROMOTIONS)
def test_each_promotion_with_the_default_rules(name: str) -> None:
    net, x = drawn([PROMOTIONS[name]], 1)
    mu, twin = RelevanceMeasure(net, x, 1), RelevanceMeasure(copy.deepcopy(net).double(), x.double(), 1)
    check_same(mu, twin, 1e-4 * max(1.0, float(twin.walk_variation().max())))


def test_a_composite_in_place_of_a_measure_converts_as_well() -> None:
    """Zennit's attributors run autograd itself."""
    net, x = drawn([PROMOTIONS["mul"], PROMOTIONS["matmul"]], 2)
    twin = copy.deepcopy(net).double()
    torch.testing.assert_close(
        NRM(net).attribute(x, target=1).double(), NRM(twin).attribute(x.double(), target=1), rtol=0, atol=1e-4
    )


# -- layers in formats shorter than float32 ---------------------------------------------------------------------------

SHORT = {torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""Rounding of two layers, one entry each."""
COMPOSITES: dict[str, Callable[[], Composite]] = {
    "NRMDefault": NRMDefault,
    "NRMAbsolute": NRMAbsolute,
    "EpsilonPlus": EpsilonPlus,
}


@pytest.mark.parametrize("short", SHORT)
@pytest.mark.parametrize("name", COMPOSITES)
def test_a_layer_in_a_short_format_has_its_kernel_in_float32(name: str, short: torch.dtype) -> None:
    inner = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6)).to(short)
    net, x = drawn([lambda h: h.float()], 3, inner)
    mu = RelevanceMeasure(net, x, 1, composite=COMPOSITES[name]())
    double = copy.deepcopy(net).double()
    double.ops = [lambda h: h]
    twin = RelevanceMeasure(double, x.double(), 1, composite=COMPOSITES[name]())
    check_same(mu, twin, SHORT[short] * max(1.0, float(twin.walk_variation().max())))


class Decoder(nn.Module):
    """Attention, a norm in float32, a gated unit and writes, as in language models; ``short`` runs on token ids."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.q, self.k, self.v, self.up = (nn.Linear(6, 6, bias=False) for _ in range(4))
        self.norm, self.head = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.embed(ids)
        scores = torch.softmax(self.q(h) @ self.k(h).transpose(1, 2), -1, dtype=torch.float32).to(h.dtype)
        h = h + scores @ self.v(h)
        wide = h.to(torch.promote_types(h.dtype, torch.float32))
        h = self.norm * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(h.dtype)
        h = h + F.silu(self.up(h)) * h
        last = h[torch.arange(len(h)), torch.full((len(h),), -1)]
        written = torch.zeros_like(last)
        written[:, :3], written[:, 3:] = last[:, 3:], last[:, :3]
        return self.head(written)  # type: ignore[no-any-return]


class Images(nn.Sequential):
    """Convolutions, batch normalization and pooling."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(6, 6, 2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


@pytest.mark.medium
@pytest.mark.parametrize(("name", "short"), in_turn(COMPOSITES, SHORT))
@pytest.mark.parametrize("kind", [Decoder, Images])
def test_a_model_in_a_short_format_has_totals_in_float32(kind: type[nn.Module], name: str, short: torch.dtype) -> None:
    torch.manual_seed(0)
    net = kind().eval().to(short)
    x = torch.randint(11, (3, 4)) if kind is Decoder else torch.randn(3, 1, 10, 10).to(short)
    mu = RelevanceMeasure(net, x, 1, composite=COMPOSITES[name]())
    exact = x if kind is Decoder else x.double()
    twin = RelevanceMeasure(copy.deepcopy(net).double(), exact, 1, composite=COMPOSITES[name]())
    start = "embed" if kind is Decoder else "input"
    for layer in mu.layers:
        assert mu.marginal(layer).dtype == torch.float32
        total = mu.marginal(layer).flatten(1).sum(1) + mu.sink(layer) + mu.bypass(layer)
        assert float((total - 1).abs().max()) <= 1e-5
    error = float((mu.marginal(start).double() - twin.marginal(start)).abs().max())
    assert error <= 4 * SHORT[short] * max(1.0, float(twin.walk_variation().max()))
    assert mu.outputs.dtype == short


def test_a_captum_class_takes_a_model_in_a_short_format() -> None:
    torch.manual_seed(0)
    net, x = Images().eval(), torch.randn(2, 1, 10, 10)
    expected = NRM(net).attribute(x, target=1)
    actual = NRM(net.bfloat16()).attribute(x.bfloat16(), target=1)
    assert float((actual.float() - expected).abs().max()) <= 0.1 * float(expected.abs().max())
