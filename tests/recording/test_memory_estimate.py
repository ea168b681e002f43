"""Estimates against the allocations of a measure, as torch's profiler counts them."""

from __future__ import annotations

import gc

import pytest
import torch
import torchvision
from torch import nn
from torch.profiler import ProfilerActivity, profile

from nrm_plugin import RelevanceMeasure, coverage
from nrm_plugin.errors import InputError
from tests.conftest import untouched
from tests.feature_nets import Decoder


def allocated(run) -> int:
    """Bytes at the peak, in addition to those before."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as result:
        run()
    changes = [event for event in result.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def long_decoder() -> nn.Module:
    net = Decoder(50, 96, heads=3, depth=2)
    net.place = nn.Parameter(torch.randn(768, 96) / 4)
    return net


HELD_OUT = {
    "vgg13_bn": (1, 128),
    "vgg19": (2, 96),
    "resnet34": (4, 128),
    "mnasnet1_0": (2, 160),
    "regnet_y_400mf": (2, 160),
    "shufflenet_v2_x0_5": (8, 96),
    "shufflenet_v2_x1_0": (4, 160),
    "convnext_small": (1, 128),
    "mobilenet_v3_large": (2, 160),
    "swin_s": (1, 160),
    "decoder": (1, 768),
}
"""Networks with batch and size of the input."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", HELD_OUT)
def test_the_peak_is_estimated_within_a_fifth(name, worst):
    batch, size = HELD_OUT[name]
    torch.manual_seed(0)
    if name == "decoder":
        net, x, tap = long_decoder().eval(), torch.randint(0, 50, (batch, size)), "embed"
        start = {"target": 1, "output": lambda y: y[:, -1]}
    else:
        net, x, tap = getattr(torchvision.models, name)().eval(), torch.randn(batch, 3, size, size), "input"
        start = {"target": 1}
    estimate = coverage(net, x, memory=True).peak
    peak = allocated(lambda: RelevanceMeasure(net, x, **start).marginal(tap))
    worst("memory estimate, relative error", abs(estimate / peak - 1))
    assert estimate == pytest.approx(peak, rel=0.2)


class TokenMixer(nn.Module):
    """Mixes tokens by a depthwise convolution and positions by a product over a vocabulary."""

    def __init__(self):
        super().__init__()
        self.embed, self.conv = nn.Embedding(600, 64), nn.Conv1d(64, 64, 5, padding=2, groups=64)
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 600, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        x = x + torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.norm(x)).mean(1)


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(40, 900), nn.ReLU(), nn.Linear(900, 900), nn.GELU(), nn.Linear(900, 3))


def convolutional() -> nn.Module:
    layers = [nn.Conv2d(3, 24, 3, padding=1), nn.BatchNorm2d(24), nn.SiLU(), nn.Conv2d(24, 24, 3, groups=24)]
    return nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 3))


@pytest.mark.medium
@pytest.mark.parametrize(
    ("make", "x"),
    [
        (wide, torch.ones(64, 40)),
        (convolutional, torch.ones(2, 3, 48, 48)),
        (TokenMixer, torch.arange(200).reshape(1, 200)),
    ],
    ids=["linear", "depthwise", "tied head over a vocabulary"],
)
def test_the_peak_is_that_of_the_allocations(make, x):
    torch.manual_seed(0)
    net = make().eval()
    x = x + torch.randn(x.shape) if x.is_floating_point() else x

    def measured():
        mu = RelevanceMeasure(net, x, target=1)
        mu.marginal(mu.ends[0])

    measured()  # fills caches of the process
    assert coverage(net, x, memory=True).peak == pytest.approx(allocated(measured), rel=0.2)


def test_conditions_on_integer_inputs_have_their_outcome():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 2)

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(x.mean(1) if bool((ids > 0).all()) else x[:, 0])

    ids = torch.ones(2, 5).long()
    ones, zeros = (coverage(Masked().eval(), values, memory=True) for values in (ids, 0 * ids))
    assert ones.peak != zeros.peak


def test_the_sums_of_the_estimate_are_those_of_the_network():
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 20)).eval()
    x = torch.randn(50, 30)
    estimate = coverage(net, x, memory=True)
    assert estimate.weights == 4 * (30 * 40 + 40 + 40 * 20 + 20)
    assert estimate.inputs == 4 * 50 * 30
    assert estimate.flops == 2 * 50 * (30 * 40 + 40 * 20)
    assert sum(estimate.bytes_by_kind.values()) == estimate.peak > 4 * 50 * (40 + 20)
    assert 0 < estimate.seconds < 10
    assert str(estimate).splitlines()[0].startswith("measure")


@pytest.mark.medium
def test_memory_grows_with_the_batch():
    net = torchvision.models.resnet18().eval()
    one, eight = (coverage(net, torch.empty(count, 3, 64, 64).zero_(), memory=True) for count in (1, 8))
    per_image = (eight.peak - one.peak) / 7
    sixteen = coverage(net, torch.zeros(16, 3, 64, 64), memory=True)
    assert sixteen.peak == pytest.approx(one.peak + 15 * per_image, rel=0.02)  # the peak may be at another step
    assert one.peak > 4e7  # fused weights, which do not depend on the batch
    assert sixteen.peak < 16 * one.peak / 2


def test_the_model_is_neither_run_nor_changed():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            assert isinstance(x, torch._subclasses.FakeTensor)
            return self.linear(x)

    net, x = Counting().eval(), torch.randn(2, 4)
    with untouched(net, x):
        coverage(net, x, memory=True)
    assert torch.backends.mha.get_fastpath_enabled()
    assert not net.linear._forward_hooks


def test_a_mapping_and_ids_are_accepted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 2)

        def forward(self, input_ids, attention_mask, scale):
            rows = self.embed(input_ids) * attention_mask.unsqueeze(-1)
            return self.head(rows.mean(1)) * scale

    ids = torch.randint(0, 10, (3, 7))
    inputs = {"input_ids": ids, "attention_mask": torch.ones(3, 7).long()}
    estimate = coverage(Model().eval(), inputs, additional_forward_kwargs={"scale": 2.0}, memory=True)
    assert estimate.inputs == ids.numel() * 8
    assert estimate.flops == 2 * 3 * 8 * 2


def test_the_weights_of_experts_are_counted_once_and_their_products_by_rows():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 16, 24))

        def forward(self, x):
            return nn.functional.grouped_mm(x, self.weight, offs=torch.tensor([8, 8, 20, 32], dtype=torch.int32))

    estimate = coverage(Experts().eval(), torch.randn(32, 16), memory=True)
    assert estimate.flops == 2 * 32 * 16 * 24
    assert estimate.peak >= 4 * 32 * 24


class Routed(nn.Module):
    """Sends each row to the expert with the largest score, so that the bounds of groups depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.experts = nn.Linear(16, 4), nn.Parameter(torch.randn(4, 16, 24))

    def forward(self, x):
        chosen, order = self.scores(x).argmax(1).sort()
        bounds = torch.histc(chosen.float(), bins=4, min=0, max=3).cumsum(0).int()
        return nn.functional.grouped_mm(x[order], self.experts, offs=bounds)


@pytest.mark.medium
def test_routing_by_values_is_estimated_for_rows_divided_evenly():
    torch.manual_seed(0)
    net, x = Routed().eval(), torch.randn(512, 16)

    def measured():
        RelevanceMeasure(net, x, (0, 1), batched=False).marginal("input")

    measured()
    assert coverage(net, x, memory=True, batched=False).peak == pytest.approx(allocated(measured), rel=0.25)


class Caching(nn.Module):
    """Stores a table at its first call, as LeViT does in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.tables, self.table = nn.Linear(300, 3), {}, None

    def forward(self, x):
        if self.table is None:
            self.table = self.tables["first"] = self.layer.weight.sum(0) + x.new_ones(300)
        return self.layer(x * self.table)


class Token(nn.Module):
    """Passes a view of a parameter to a layer, as CaiT does with its class token."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.layer = nn.Parameter(torch.randn(1, 3)), nn.Linear(3, 3)

    def forward(self, x):
        return self.layer(x) + self.layer(self.token.expand(len(x), -1))


def test_a_parameter_may_be_an_input_of_a_layer_and_requires_gradients_afterwards():
    net, x = Token().eval(), torch.randn(1, 3)
    with untouched(net, x):
        assert coverage(net, x, memory=True).flops == 2 * 2 * 9
    assert net.token.requires_grad


def test_a_model_that_stores_tensors_for_later_calls_stores_none_without_values():
    net, x = Caching().eval(), torch.randn(2, 300)
    with untouched(net, x):
        coverage(net, x, memory=True)
    assert (net.table, net.tables) == (None, {})
    assert RelevanceMeasure(net, x, 1).marginal("input").isfinite().all()


def test_a_model_that_reads_values_raises():
    class Reads(nn.Module):
        def forward(self, x):
            return x if bool(x.sum() > 0) else -x

    with pytest.raises(InputError, match="because it reads values"):
        coverage(Reads(), torch.randn(2, 3), memory=True)
