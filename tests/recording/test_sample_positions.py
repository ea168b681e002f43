"""Samples that are not the rows of a tensor: windows, heads and time in front. A batch has the values of its samples.

Covers: nrm_plugin.functional.function_kernels, nrm_plugin.recording.structure.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from zennit.composites import EpsilonPlus, NameMapComposite
from zennit.rules import ZPlus

from nrm_plugin import ABSORBED, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import FoldingError

TARGETS = [1, 0, 2]


class Windows(nn.Module):
    """Four windows of three tokens each, folded into the batch: window first, or sample first."""

    def __init__(self, window_first: bool) -> None:
        super().__init__()
        self.window_first = window_first
        self.embed, self.mix, self.head = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 4)
        self.token = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        folded = y.unflatten(1, (4, 3))
        folded = folded.transpose(0, 1) if self.window_first else folded
        lead = folded.shape[:2]
        folded = self.mix(folded.flatten(0, 1))
        folded = torch.cat([folded, self.token.expand(len(folded), 1, 6)], 1).relu()
        folded = folded.unflatten(0, lead)
        folded = folded.transpose(0, 1) if self.window_first else folded
        return self.head(folded.mean((1, 2)) + y.mean(1))


class TimeFirst(nn.Module):
    """As many tokens as samples, so that the shape does not tell which comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attention, self.head = nn.Linear(5, 6), nn.MultiheadAttention(6, 2), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x.transpose(0, 1))
        y = y + self.attention(y, y, y)[0]
        return self.head(y.mean(0))


def built(name: str) -> tuple[nn.Module, Tensor, str]:
    """A net, three samples, and a folded tap."""
    torch.manual_seed(0)
    net, length, tap = {
        "sample first": (lambda: Windows(False), 12, "mix"),
        "window first": (lambda: Windows(True), 12, "mix"),
        "time first": (TimeFirst, 3, "embed"),
    }[name]
    model = net().double().eval()
    for name_, parameter in model.named_parameters():
        if "bias" in name_:
            nn.init.normal_(parameter, std=0.3)
    return model, torch.randn(3, length, 5, dtype=torch.double), tap


def each(model: nn.Module, x: Tensor) -> tuple[RelevanceMeasure, list[RelevanceMeasure]]:
    settings = {"composite": NRMDefault(), "residual": "sink"}
    singles = [RelevanceMeasure(model, x[k : k + 1], TARGETS[k], **settings) for k in range(3)]
    return RelevanceMeasure(model, x, TARGETS, **settings), singles


FOLDED = ["sample first", "window first", "time first"]
# The floor of absolute shares is taken over a row, and a row of a time-first tensor holds all samples.
TOLERANCE = {"sample first": 1e-12, "window first": 1e-12, "time first": 1e-6}


@pytest.mark.parametrize("name", FOLDED)
def test_the_books_of_a_batch_are_those_of_its_samples(name):
    model, x, tap = built(name)
    mu, singles = each(model, x)
    assert mu.shape(tap)[0] == 3
    assert mu.shape(tap) != mu._tap(tap).tensor_shape or name == "time first"
    for layer in mu.layers:
        for ask in ("sink", "bypass", "variation"):
            whole = getattr(mu, ask)(layer)
            torch.testing.assert_close(
                whole, torch.cat([getattr(one, ask)(layer) for one in singles]), atol=TOLERANCE[name], rtol=0
            )
    torch.testing.assert_close(
        mu.walk_variation(), torch.cat([one.walk_variation() for one in singles]), atol=TOLERANCE[name], rtol=0
    )
    for kind in ("residual", "constants"):
        sinks = [one.sinks(kind) for one in singles]
        for step, value in mu.sinks(kind).items():
            torch.testing.assert_close(value, torch.cat([one[step] for one in sinks]), atol=TOLERANCE[name], rtol=0)


@pytest.mark.parametrize("name", FOLDED)
def test_events_at_folded_taps_are_those_of_the_samples(name):
    model, x, tap = built(name)
    mu, singles = each(model, x)
    events = [at(tap).channel([0, 3]), at(tap).channel(1) & at("input")[0], ~at(tap).channel(2), at(tap, side="sink")]
    for event in events:
        torch.testing.assert_close(mu(event), torch.cat([one(event) for one in singles]), atol=TOLERANCE[name], rtol=0)
    given = mu.marginal("input", given=events[0])
    torch.testing.assert_close(
        given, torch.cat([one.marginal("input", given=events[0]) for one in singles]), atol=10 * TOLERANCE[name], rtol=0
    )
    # Maps at the folded tap itself, divided by one number for each sample.
    below = at("input")[[0, 1, 2]] & ~ABSORBED
    mass = torch.stack([one.marginal(tap, given=below).sum() for one in singles])
    marginal = mu.marginal(tap, given=below)
    torch.testing.assert_close(marginal.sum(), mass.sum(), atol=10 * TOLERANCE[name], rtol=0)
    assert bool(torch.isfinite(marginal).all())


def test_as_many_tokens_as_samples_are_not_samples():
    """The rows of a time-first tensor were once mistaken for samples, which broke conservation."""
    model, x, _ = built("time first")
    mu, _ = each(model, x)
    total = mu(at("embed")) + mu.sink("embed") + mu.bypass("embed")
    torch.testing.assert_close(total, torch.ones(3, dtype=torch.double))
    torch.testing.assert_close(mu.marginal("embed").sum((1, 2)), mu(at("embed")))


def test_entries_of_several_samples_are_an_error():
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.a(x)
            return self.b(hidden + hidden.roll(1, 0))

    torch.manual_seed(0)
    with pytest.raises(FoldingError, match="one sample at a time"):
        RelevanceMeasure(Mixing().double().eval(), torch.randn(3, 5, dtype=torch.double), TARGETS)


def test_nets_that_keep_the_samples_in_their_rows_pay_nothing():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)).eval()
    mu = RelevanceMeasure(net, torch.randn(2, 1, 4, 4), 1)
    mu.marginal("input")
    assert mu.cost.steps == 3


class TimeFirstOfSmallActivations(nn.Module):
    """Time first, with activations so small that the stabilizer of each layer absorbs nearly all relevance."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(5, 5, bias=False) for _ in range(9))

    def forward(self, x: Tensor) -> Tensor:
        y = x.transpose(0, 1) * 1e-8
        for layer in self.layers:
            y = layer(y).relu()
        return y.mean(0)


def test_samples_are_found_where_stabilizers_absorb_nearly_all_relevance():
    torch.manual_seed(1)
    model, x = TimeFirstOfSmallActivations().eval(), torch.randn(3, 4, 5)
    composite = NameMapComposite([([f"layers.{k}" for k in range(9)], ZPlus(stabilizer=1e-2))])
    batch = RelevanceMeasure(model, x, 1, composite=composite)
    single = [RelevanceMeasure(model, x[k : k + 1], 1, composite=composite) for k in range(3)]
    for layer in ("layers.0", "layers.4", "layers.8"):
        alone = torch.cat([mu.marginal(layer) for mu in single])
        torch.testing.assert_close(batch.marginal(layer), alone, rtol=1e-4, atol=0.0)


class Sparse(nn.Module):
    """A layer whose ReLU passes few entries, in a layout of its own."""

    def __init__(self, layout: str, is_fixed: bool = False) -> None:
        super().__init__()
        self.layout, self.is_fixed = layout, is_fixed
        self.layer, self.head = nn.Linear(4, 4, bias=False), nn.Linear(4, 3)
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        count = 2 if self.is_fixed else len(x)
        if self.layout == "folded":
            h = self.layer(x.flatten(0, 1)).relu().view(count, 3, 4)
        elif self.layout == "folded, time first":
            h = self.layer(x.transpose(0, 1).flatten(0, 1)).relu().unflatten(0, (3, count)).transpose(0, 1)
        elif self.layout == "batch in the middle":
            h = self.layer(x.transpose(0, 1).unsqueeze(0)).relu()[0].transpose(0, 1)
        else:
            h = self.layer(x.transpose(0, 1)).relu().transpose(0, 1)
        return self.head((x + h).mean(1))


def few_entries() -> Tensor:
    """Two samples that are positive at different channels, so that channels could be taken for samples."""
    x = -torch.ones(2, 3, 4)
    x[0, 0, 0], x[0, 1, 2], x[1, 1, 1] = 1.0, 2.0, 1.5
    return x


@pytest.mark.parametrize("composite", [NRMDefault, EpsilonPlus])
@pytest.mark.parametrize("is_fixed", [False, True])  # a model that is written for two samples
@pytest.mark.parametrize("layout", ["folded", "folded, time first", "batch in the middle", "time first"])
@pytest.mark.recorded
def test_the_samples_are_known_where_relevance_reaches_few_entries(layout, is_fixed, composite):
    torch.manual_seed(0)
    net, x = Sparse(layout, is_fixed).eval(), few_entries()
    mu = RelevanceMeasure(net, x, 1, composite=composite())
    net.is_fixed = False
    alone = [RelevanceMeasure(net, row[None], 1, composite=composite()) for row in x]
    assert mu.shape("layer") == (2, *alone[0].shape("layer")[1:])
    for ask in (
        lambda mu: mu.marginal("layer"),
        lambda mu: mu.marginal("layer", over="channel"),
        lambda mu: mu(at("layer").channel([0, 1])),
        lambda mu: mu.joint("layer", "input"),
        lambda mu: mu.variation("layer"),
    ):
        torch.testing.assert_close(ask(mu), torch.cat([ask(one) for one in alone]))


class Pooled(nn.Module):
    """An activation in place on a map of one pixel, as at the end of a MobileNetV3; counts its runs."""

    def __init__(self, inplace):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 4, 1), nn.Identity(), nn.Hardswish(inplace)
        self.flat, self.head = nn.Flatten(), nn.Linear(4, 2)
        self.runs = []

    def forward(self, x):
        self.runs.append(x.shape)
        y = self.flat(self.act(self.norm(self.conv(x.mean((2, 3), keepdim=True)))))
        return nn.functional.linear(y, self.head.weight, self.head.bias)


@pytest.mark.recorded
def test_one_sample_with_an_activation_in_place_needs_no_second_run():
    torch.manual_seed(0)
    x, maps = torch.randn(1, 3, 4, 4), []
    for inplace in (True, False):
        torch.manual_seed(1)
        net = Pooled(inplace).eval()
        mu = RelevanceMeasure(net, x, 1)
        maps.append(mu.marginal(mu.layers))
        assert net.runs == [x.shape]
    assert {name: one.shape for name, one in maps[0].items()} == {name: one.shape for name, one in maps[1].items()}
    torch.testing.assert_close(maps[0]["input"], maps[1]["input"])


@pytest.mark.parametrize("reference", [False, True])
def test_positions_do_not_follow_from_a_pattern_that_the_known_entries_fit_by_coincidence(reference):
    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(4, 6).double(), nn.Linear(6, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            # Two of the six entries of each sample are replaced, and have no relevance in the tensor that holds all.
            return self.b(h.slice_scatter(2 * h[:, :2], 1, 2, 4))

    net, x = Written().eval(), torch.randn(2, 4, dtype=torch.float64)
    other = 0.3 * x + 0.1 if reference else None
    mu = RelevanceMeasure(net, x, 1, reference=other)
    for sample in range(2):
        row = slice(sample, sample + 1)
        one = RelevanceMeasure(net, x[row], 1, reference=None if other is None else other[row])
        for layer in mu.layers:
            torch.testing.assert_close(mu.marginal(layer)[row].flatten(), one.marginal(layer).flatten())
