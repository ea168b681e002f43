"""A recording in parts answers every question as one that holds all of its tensors.

Covers: nrm_plugin.recording.stored_outputs.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from zennit.composites import EpsilonGammaBox, EpsilonPlusFlat

from nrm_plugin import ABSORBED, FuseBatchNorm, NRMDefault, RelevanceMeasure, at
from nrm_plugin.errors import DifferenceError, StaleMeasureError
from nrm_plugin.recording.parts import divided
from tests.conftest import slow_but
from tests.nets import Case, tiny_nets, zennit_composite

pytestmark = pytest.mark.recorded
LIMITS = [1, 1300, 2000]


class Block(nn.Module):
    """Attention and a gated unit, each after a norm and with a skip connection."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up, self.down = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        y = self.inner(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    """A few blocks between an embedding of ids and a layer of logits."""

    def __init__(self, blocks: int = 4, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 11)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[:, -1]


IDS = torch.randint(0, 11, (2, 6), generator=torch.Generator().manual_seed(2))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return make().double().eval()


def convolutions() -> nn.Module:
    def block(first: int, last: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(first, last, 3, padding=1), nn.BatchNorm2d(last), nn.ReLU())

    net = nn.Sequential(block(2, 4), block(4, 4), nn.MaxPool2d(2), block(4, 6), nn.Flatten(), nn.Linear(54, 3))
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2), module.weight.data.normal_()
    return net


class Written(nn.Module):
    """A block whose output is overwritten by its reader, and one that overwrites its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 5)) for _ in range(3))
        self.over, self.last = Overwriting(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x *= 2
        x = self.over(x) + x
        y = self.b(x)
        y += x
        return self.last(self.c(y.relu_()))


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(5, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.last(self.inner(x).relu())
        x *= 3
        return y


class Gated(nn.Module):
    """A block that returns a gate, one that returns a view, and one that returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 5), nn.Sigmoid())
        self.view = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 10), nn.Unflatten(1, (2, 5)))
        self.pair, self.last = Pair(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.gate(x) * self.last(x.sum(1, keepdim=True).expand(-1, 5)).sum(1, keepdim=True) * x
        x = x + self.view(x).sum(1)
        pair = self.pair(x)
        return self.last(pair["a"] + pair["b"][0])


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.a, self.b = nn.Linear(5, 60), nn.Linear(60, 5), nn.Linear(60, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.inner(x).relu()
        return {"a": self.a(x), "b": (self.b(x), None)}


FLAT = torch.randn((2, 5), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
IMAGES = torch.randn((2, 2, 6, 6), generator=torch.Generator().manual_seed(4), dtype=torch.float64)
NETS: dict[str, tuple[Callable[[], nn.Module], Tensor, Callable[[], Any]]] = {
    "decoder": (Decoder, IDS, NRMDefault),
    "batch norm": (convolutions, IMAGES, lambda: NRMDefault(canonizers=[FuseBatchNorm()])),
    "batch norm, flat": (convolutions, IMAGES, lambda: EpsilonPlusFlat(canonizers=[FuseBatchNorm()])),
    "box": (convolutions, IMAGES, lambda: EpsilonGammaBox(-3.0, 3.0)),
    "written": (Written, FLAT, NRMDefault),
    "gated": (Gated, FLAT, NRMDefault),
}


def both(name: str, limit: int, **settings_: Any) -> tuple[RelevanceMeasure, RelevanceMeasure]:
    """The measure whole and in parts."""
    make, x, composite = NETS[name]
    whole = RelevanceMeasure(seeded(make), x, 1, composite=composite(), **settings_)
    return whole, RelevanceMeasure(seeded(make), x, 1, composite=composite(), max_memory=limit, **settings_)


def assert_equal(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-14)


@pytest.mark.medium
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", NETS)
def test_all_questions_have_the_answers_of_the_whole_recording(name, limit):
    whole, mu = both(name, limit)
    assert mu.layers == whole.layers
    assert mu.sites == whole.sites
    assert len(mu._recording.parts.ranges) > 1
    assert_equal(mu.marginal(mu.layers), whole.marginal(mu.layers))
    upper, lower = (mu.layers[len(mu.layers) * k // 5] for k in (4, 1))
    assert_equal(mu.sinks(), whole.sinks())
    assert_equal(mu.walk_variation(), whole.walk_variation())
    event = at(lower).channel(1) & ~at(upper).channel(0) - ABSORBED
    assert_equal(mu(event), whole(event))
    assert_equal(
        mu.marginal(lower, given=at(upper).channel(1), min_ratio=0),
        whole.marginal(lower, given=at(upper).channel(1), min_ratio=0),
    )
    assert_equal(mu.conditional(at(lower).channel(0)), whole.conditional(at(lower).channel(0)))
    assert_equal(mu.joint(upper, lower), whole.joint(upper, lower))
    assert mu._recording.parts._uses_stored  # no kept output stood for a module that does more


@pytest.mark.medium
@settings(max_examples=25, deadline=None)
@given(case=tiny_nets(), limit=st.integers(1, 2000), chosen=st.data())
def test_parts_of_random_nets(case: Case, limit: int, chosen: st.DataObject):
    def measure(limit: int | None) -> RelevanceMeasure:
        return RelevanceMeasure(
            case.net, case.x, start=case.start, composite=zennit_composite(case.spec), max_memory=limit
        )

    whole, mu = measure(None), measure(limit)
    assert_equal(mu.marginal(mu.layers), whole.marginal(whole.layers))
    lower, upper = (chosen.draw(st.sampled_from(mu.layers)) for _ in range(2))
    event = at(upper).channel(0) & ~at(lower).channel(0)
    assert_equal(mu(event), whole(event))


STARTS: dict[str, dict[str, Any]] = {
    "against": {"target": 1, "against": 2},
    "start": {"start": lambda outputs: outputs},
    "inside": {"output": at("blocks.2"), "start": torch.ones_like},
}


@pytest.mark.medium
@pytest.mark.parametrize("name", STARTS)
def test_starts(name):
    whole, mu = (RelevanceMeasure(seeded(Decoder), IDS[:1], **STARTS[name], max_memory=limit) for limit in (None, 800))
    assert len(mu._recording.parts.ranges) > 1
    assert_equal(mu.output, whole.output)
    assert_equal(mu.marginal(mu.layers), whole.marginal(whole.layers))


REFERENCES: dict[str, dict[str, Any]] = {
    "secants": {"target": 1, "against": 2},
    "tangents": {"target": 1, "slopes": "tangent"},
    "rules": {"target": 1, "composite": EpsilonPlusFlat()},
}


@pytest.mark.medium
@pytest.mark.parametrize("limit", slow_but([3000, 30_000], 30_000))
@pytest.mark.parametrize("name", REFERENCES)
def test_references(name, limit):
    settings_ = REFERENCES[name] | {"reference": torch.full_like(IDS[:1], 4)}
    nets = [seeded(lambda: Decoder(3)) for _ in range(2)]
    whole, mu = (
        RelevanceMeasure(net, IDS[:1], **settings_, max_memory=one)
        for net, one in zip(nets, (None, limit), strict=True)
    )
    assert mu.parts > 1
    assert mu.layers == whole.layers
    assert_equal(mu.output, whole.output)
    assert_equal(mu.marginal(mu.layers), whole.marginal(whole.layers))
    event = at("blocks.1").channel(1) & ~at("blocks.0").channel(3)
    assert_equal(mu(event), whole(event))
    assert mu._recording.parts._uses_stored


@pytest.mark.medium
def test_several_references():
    others = [torch.full_like(IDS[:1], 4), torch.full_like(IDS[:1], 7)]
    whole, mu = (
        RelevanceMeasure(seeded(Decoder), IDS[:1], 1, reference=others, max_memory=one) for one in (None, 40_000)
    )
    assert mu.parts > 1
    assert_equal(mu.marginal(mu.layers), whole.marginal(whole.layers))


def test_a_reference_on_another_path_raises_as_without_a_limit():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(5, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(x).relu() if bool(x.sum() > 0) else self.first(x))

    x = torch.ones(1, 5, dtype=torch.float64)
    for limit in (None, 1):
        with pytest.raises(DifferenceError, match="runs different operations"):
            RelevanceMeasure(Branching().double(), x, 1, reference=-x, max_memory=limit)


def tensors_of(mu: RelevanceMeasure) -> int:
    """Number of steps that hold tensors."""
    steps = [vertex.step for vertex in mu._recording.graph.vertices if vertex.step is not None]
    return sum(step is not None and step.number in (mu._recording.parts.current or ()) for step in steps)


@pytest.mark.medium
def test_the_blocks_of_a_decoder_do_not_run_again():
    runs = []
    net, ids = seeded(lambda: Decoder(6)), IDS[:1]
    for number, block in enumerate(net.blocks):
        block.out.register_forward_hook(lambda *_, number=number: runs.append(number))
    first = RelevanceMeasure(net, ids, 1, max_memory=1)._recording.parts._first
    inside = sum(size for step, size in zip(first.steps, first.sizes, strict=True) if "blocks.0" in step.name)
    mu = RelevanceMeasure(net, ids, 1, max_memory=1.5 * inside)
    runs.clear()
    mu = RelevanceMeasure(net, ids, 1, max_memory=1.5 * inside)
    stored = [call.name for call in mu._recording.parts._first.stored]
    assert stored == [f"blocks.{k}" for k in range(6)]
    assert runs == [*range(6)]
    mu.marginal("tokens")
    assert sorted(runs) == sorted([*range(6)] * 2)  # every block once more, in the pass that needs it
    assert tensors_of(mu) < 40


def test_a_recording_within_the_limit_is_not_divided():
    mu = RelevanceMeasure(seeded(Decoder), IDS, 1, max_memory=10**8)
    assert mu._recording.parts is None
    assert all(vertex.step is None or vertex.step.holder is None for vertex in mu._recording.graph.vertices)


@pytest.mark.medium
def test_parts_lie_within_the_limit_and_cover_all_steps():
    mu = RelevanceMeasure(seeded(Decoder), IDS, 1, max_memory=3000)
    first, ranges = mu._recording.parts._first, mu._recording.parts.ranges
    assert [k for part in ranges for k in part] == [*range(len(first.steps))]
    assert all(len(part) == 1 or sum(first.sizes[part.start : part.stop]) <= 3000 for part in ranges)
    assert ranges == divided(first)


class Counting(nn.Module):
    """A block with state: its output depends on the number of its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.calls = nn.Linear(5, 30), nn.Linear(30, 5), []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(x)
        return self.last(self.first(x).relu() * len(self.calls))


def test_a_model_that_computes_something_else_when_it_runs_again_raises():
    net = nn.Sequential(Counting(), nn.Linear(5, 3)).double().eval()
    mu = RelevanceMeasure(net, FLAT, 1, max_memory=1)
    with pytest.raises(StaleMeasureError, match=r"max_memory.*runs again"):
        mu.marginal("input")


class Cached(nn.Module):
    """Blocks that pass tensors to later blocks outside of their outputs, as a cache does."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last, self.cache = nn.ModuleList(Keeping(self) for _ in range(3)), nn.Linear(5, 3), []

    def forward(self, x: Tensor) -> Tensor:
        self.cache = []
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Keeping(nn.Module):
    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.first, self.last, self.owner = nn.Linear(5, 30), nn.Linear(30, 5), [owner]

    def forward(self, x: Tensor) -> Tensor:
        kept = self.owner[0].cache
        kept.append(x)
        return self.last(self.first(x).relu()) + sum(kept)


def test_blocks_with_other_effects_than_their_outputs_run_again():
    whole = RelevanceMeasure(seeded(Cached), FLAT, 1)
    mu = RelevanceMeasure(seeded(Cached), FLAT, 1, max_memory=2000)
    assert mu._recording.parts._first.stored
    assert_equal(mu.marginal(mu.layers), whole.marginal(whole.layers))
    assert not mu._recording.parts._uses_stored  # without the earlier blocks, values differ


@pytest.mark.medium
def test_inputs_may_change_after_the_recording_but_weights_may_not():
    net, x = seeded(Gated), FLAT.clone()
    whole, mu = RelevanceMeasure(net, FLAT, 1), RelevanceMeasure(net, x, 1, max_memory=1)
    x.zero_()
    assert_equal(mu.marginal("input"), whole.marginal("input"))
    with torch.no_grad():
        net.last.weight.mul_(2)
    with pytest.raises(StaleMeasureError, match="Construct the measure again"):
        mu.marginal("input")


@pytest.mark.medium
def test_the_model_is_unchanged_after_a_pass():
    net = seeded(Decoder)
    net.blocks[1].forward = net.blocks[1].forward  # as wrappers of device maps set it
    before = {name: dict(module.__dict__) for name, module in net.named_modules()}
    mu = RelevanceMeasure(net, IDS, 1, max_memory=1)
    mu.marginal("tokens")
    for name, module in net.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert all(module.__dict__[key] is value for key, value in before[name].items())
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.medium
def test_the_precision_is_that_of_the_first_run():
    make = lambda: seeded(Decoder).float()  # noqa: E731
    with torch.autocast("cpu", torch.bfloat16):
        whole, mu = RelevanceMeasure(make(), IDS, 1), RelevanceMeasure(make(), IDS, 1, max_memory=2000)
    assert_equal(mu.marginal(mu.layers), whole.marginal(whole.layers))
    short = [RelevanceMeasure(make().bfloat16(), IDS, 1, max_memory=limit) for limit in (None, 1000)]
    assert_equal(short[1].marginal(short[1].layers), short[0].marginal(short[0].layers))


@pytest.mark.medium
def test_several_threads_ask_one_measure():
    whole, mu = both("decoder", 200)
    layers, found = mu.layers[::4], {}
    threads = [threading.Thread(target=lambda k=k: found.update({k: mu.marginal(k)})) for k in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_equal(found, {k: whole.marginal(k) for k in layers})
