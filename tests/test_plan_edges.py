"""Plans of unusual PyTorch computations, which give correct results or record the model with a reason.

The plan is made on one input, and asked about others; measures that are recorded are the reference.
"""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from zennit.composites import EpsilonPlus

from nrm_plugin import RelevanceMeasure
from nrm_plugin.errors import NRMError, UnsupportedOperationError
from nrm_plugin.plan.plan import Plan

LONG = torch.float64


def drawn(seed: int, *shape: int, dtype: torch.dtype = LONG) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=LONG).to(dtype)


def images(seed: int, dtype: torch.dtype = LONG) -> Tensor:
    return drawn(seed, 2, 3, 8, 8, dtype=dtype)


def conv_net(dtype: torch.dtype = LONG) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4)
    nn.init.uniform_(norm.weight, 0.5, 2)
    nn.init.normal_(norm.running_mean)
    layers = [nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 3)).to(dtype).eval()


def agree(
    plan: Plan, inputs: list[Any], layers: list[str], tolerance: float = 1e-10, settings: dict[str, Any] | None = None
) -> None:
    """Compares a plan with recorded measures of other inputs, relative to the variation."""
    for values in inputs:
        ours = plan(values, 1)
        recorded = RelevanceMeasure(plan.model, values, 1, **(settings or {}))
        torch.testing.assert_close(ours.outputs, recorded.outputs, rtol=tolerance, atol=tolerance)
        for layer in layers:
            one, other = ours.marginal(layer), recorded.marginal(layer)
            assert one.dtype == other.dtype
            size = float(recorded.variation(layer).max())
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * size)


def answered_by_programs(plan: Plan) -> bool:
    return any(len(programs) and not programs.reason_not_replayable for programs in plan._forms.values())


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["plain", "channels_last", "transposed", "expanded"])
def test_layouts_of_images(kind):
    def laid_out(x: Tensor) -> Tensor:
        if kind == "channels_last":
            return x.to(memory_format=torch.channels_last)
        if kind == "expanded":
            return x[:, :1].expand(-1, 3, -1, -1)
        return x.transpose(2, 3) if kind == "transposed" else x

    net = conv_net()
    plan = Plan(net, laid_out(images(0)))
    agree(plan, [laid_out(images(seed)) for seed in range(4)], ["input", "0", "3"])
    assert answered_by_programs(plan)
    agree(plan, [images(5)], ["input"])  # another layout is another form


@pytest.mark.medium
def test_weights_in_channels_last():
    plan = Plan(conv_net().to(memory_format=torch.channels_last), images(0))
    agree(plan, [images(seed).to(memory_format=torch.channels_last) for seed in range(3)], ["input", "0"])
    agree(plan, [images(seed) for seed in range(3)], ["input", "0"])


@pytest.mark.medium
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_formats(dtype):
    net = conv_net(dtype)
    plan = Plan(net, images(0, dtype))
    # Batch norms are fused, so that their outputs are rounded once less: a unit in the last place of the format.
    agree(plan, [images(seed, dtype) for seed in range(4)], ["input", "0", "3"], 16 * torch.finfo(dtype).eps)
    assert answered_by_programs(plan)


@pytest.mark.medium
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_formats_without_fused_layers_agree_to_rounding(dtype):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype).eval()
    plan = Plan(net, drawn(0, 4, 6, dtype=dtype))
    agree(plan, [drawn(seed, 4, 6, dtype=dtype) for seed in range(4)], ["input", "0"], 1e-5)


@pytest.mark.medium
def test_autocast_has_programs_of_its_own():
    net = conv_net(torch.float32)
    plan = Plan(net, images(0, torch.float32))
    short, exact = [], []
    for seed in range(4):
        x = images(seed, torch.float32)
        agree(plan, [x], ["input", "0"], 1e-5)
        with torch.autocast("cpu", torch.bfloat16):
            agree(plan, [x], ["input", "0"], 0.05)
            short.append(plan(x, 1).outputs)
        exact.append(plan(x, 1).outputs)
    assert any(not torch.equal(one, other.to(one.dtype)) for one, other in zip(short, exact, strict=True))
    assert len(plan._forms) == 2


class Packed(nn.Module):
    """An LSTM over packed sequences whose lengths are an argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
        self.double().eval()

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        return self.head(hidden.sum(1))


@pytest.mark.medium
@pytest.mark.parametrize("given", [[5, 3], [3, 5], [2, 2], [5, 5]])
def test_packed_sequences_follow_their_lengths(given):
    net, lengths, first = Packed(), torch.tensor(given), torch.tensor([5, 3])
    plan = Plan(net, drawn(0, 2, 5, 3), additional_forward_args=(first,))
    for seed in range(3):
        plan(drawn(seed, 2, 5, 3), 1, additional_forward_args=(first,)).marginal("input")
    recorded = RelevanceMeasure(net, drawn(7, 2, 5, 3), 1, additional_forward_args=(lengths,))
    for _ in range(2):
        mu = plan(drawn(7, 2, 5, 3), 1, additional_forward_args=(lengths.clone(),))
        torch.testing.assert_close(mu.marginal("input"), recorded.marginal("input"))
    assert "tolist" in plan.explain()


def test_packed_inputs_are_refused_as_by_a_measure():
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)
            self.double().eval()

        def forward(self, packed: PackedSequence) -> Tensor:
            return self.head(self.lstm(packed)[1][0][0])

    def packed(seed: int) -> PackedSequence:
        return pack_padded_sequence(drawn(seed, 2, 5, 3), torch.tensor([5, 3]), batch_first=True)

    with pytest.raises(NRMError) as recorded:
        RelevanceMeasure(Whole(), packed(0), 1)
    with pytest.raises(recorded.type):
        Plan(Whole(), packed(0))


class Written(nn.Module):
    """Overwrites its input, as preprocessing in the model may do."""

    def __init__(self, write: Callable[[Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.write = nn.Linear(4, 5), nn.Linear(5, 3), write
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        self.write(x)
        return self.b(torch.relu(self.a(x)))


@pytest.mark.parametrize(
    "write", [lambda x: x.mul_(2), lambda x: x[:, 0].zero_(), lambda x: x.data.add_(1)], ids=["all", "entries", "data"]
)
def test_models_that_overwrite_their_inputs(write):
    net = Written(write)
    plan = Plan(net, drawn(9, 2, 4))
    for seed in range(4):
        x = drawn(seed, 2, 4)
        expected = RelevanceMeasure(net, x.clone(), 1)
        mu = plan(x, 1)
        torch.testing.assert_close(mu.outputs, expected.outputs)
        torch.testing.assert_close(mu.marginal("input"), expected.marginal("input"))
    assert answered_by_programs(plan)


@pytest.mark.medium
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_copies_of_a_planned_model_are_independent(duplicate):
    net = conv_net()
    plan = Plan(net, images(0))
    for seed in range(3):
        plan(images(seed), 1).marginal("input")
    other = duplicate(net)
    with torch.no_grad():
        other[0].weight.mul_(-1)
    agree(plan, [images(4)], ["input", "0"])
    agree(Plan(other, images(0)), [images(4)], ["input", "0"])
    with torch.no_grad():
        net[0].weight.copy_(other[0].weight)
    torch.testing.assert_close(
        plan(images(5), 1).marginal("input"), RelevanceMeasure(other, images(5), 1).marginal("input")
    )


@pytest.mark.medium
def test_a_composite_that_is_changed_in_place_is_planned_anew():
    net, composite = conv_net(), EpsilonPlus(epsilon=1e-6)
    plan = Plan(net, images(0), composite=composite)
    agree(plan, [images(seed) for seed in range(3)], ["input", "0"], settings={"composite": composite})
    before = plan(images(4), 1).marginal("input")
    composite.layer_map = EpsilonPlus(epsilon=0.5).layer_map
    agree(plan, [images(4)], ["input", "0"], settings={"composite": composite})
    assert not torch.equal(before, plan(images(4), 1).marginal("input"))
    linear = next(rule for kind, rule in composite.layer_map if kind is nn.Linear)
    other = next(rule for kind, rule in EpsilonPlus(epsilon=3.0).layer_map if kind is nn.Linear)
    linear.gradient_mapper = other.gradient_mapper
    after = plan(images(4), 1).marginal("input")
    agree(plan, [images(4)], ["input", "0"], settings={"composite": composite})
    assert not torch.equal(after, before)


class Spectral(nn.Module):
    """Filters in the frequency domain."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.a, self.b = kind, nn.Linear(8, 8), nn.Linear(8, 3)
        self.gain = nn.Parameter(torch.rand(5, dtype=LONG))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        if self.kind == "rfft":
            h = torch.fft.irfft(torch.fft.rfft(h) * self.gain, n=8)
        elif self.kind == "fft":
            h = torch.fft.ifft(torch.fft.fft(h).conj()).real + torch.fft.fft(h).imag
        else:
            spectrum = torch.fft.rfft(h)
            h = torch.cat([spectrum.real, spectrum.imag[:, 1:4]], 1)
        return self.b(h)


@pytest.mark.medium
@pytest.mark.parametrize("kind", ["rfft", "fft", "parts"])
def test_fourier_transforms(kind):
    plan = Plan(Spectral(kind), drawn(0, 2, 8))
    agree(plan, [drawn(seed, 2, 8) for seed in range(4)], ["input", "a"])
    assert "recorded every time" in plan.explain()  # the layer is found by random inputs, which differ from run to run


def written(h: Tensor) -> Tensor:
    out = h.clone()
    out[:, :2] = h[:, 2:4] * 3
    return out


def added(h: Tensor) -> Tensor:
    out = h.clone()
    out[:, :3].add_(h[:, 3:6]).mul_(2)
    return out


LATE = {
    "written": written,
    "added": added,
    "squared magnitude": lambda h: (lambda z: (z * z.conj()).real)(torch.fft.rfft(h)),
    "conjugate": lambda h: torch.view_as_real(torch.fft.rfft(h).conj().resolve_conj()).flatten(1),
    "correlation": lambda h: torch.fft.irfft(torch.fft.rfft(h).conj() * torch.fft.rfft(torch.ones(8).to(h)), n=8),
}
"""Operations that write to a tensor before the last layer reads it, or read entries that are marked as conjugated."""


@pytest.mark.medium
@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("is_difference", [False, True])
def test_writes_and_conjugates_before_the_last_layer(name, is_difference):
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(8, 8)
            self.b = nn.LazyLinear(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(LATE[name](self.a(x)))

    net = Late().eval()
    net(torch.ones(1, 8))
    net.double()
    if name == "squared magnitude" and not is_difference:
        with pytest.raises(UnsupportedOperationError):
            RelevanceMeasure(net, drawn(0, 2, 8), 1).marginal("input")
        return
    plan = Plan(net, drawn(0, 2, 8), reference=drawn(9, 2, 8) if is_difference else None)
    for seed in range(4):
        x, reference = drawn(seed, 2, 8), drawn(seed + 20, 2, 8) if is_difference else None
        mu, oracle = plan(x, 1, reference=reference), RelevanceMeasure(net, x, 1, reference=reference)
        torch.testing.assert_close(mu.output, oracle.output, rtol=1e-9, atol=1e-12)
        for layer in ("input", "a"):
            torch.testing.assert_close(mu.marginal(layer), oracle.marginal(layer), rtol=1e-9, atol=1e-11)


def test_inference_mode_and_no_grad_ask_the_same_programs():
    plan = Plan(conv_net(), images(0))
    expected = [RelevanceMeasure(plan.model, images(seed), 1).marginal("input") for seed in range(3)]
    for context in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        for seed, values in enumerate(expected):
            x = images(seed)
            with context():
                torch.testing.assert_close(plan(x, 1).marginal("input"), values)


def test_planning_leaves_the_collector_as_it_was():
    for is_enabled in (False, True):
        (gc.enable if is_enabled else gc.disable)()
        try:
            Plan(conv_net(), images(0))(images(0), 1).marginal("input")
            assert gc.isenabled() == is_enabled
        finally:
            gc.enable()
