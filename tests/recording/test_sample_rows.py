"""Proofs that samples are the rows of a tensor, on small autograd graphs and models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nrm_plugin import NRMDefault, RelevanceMeasure
from nrm_plugin.errors import NRMError
from nrm_plugin.recording import structure
from nrm_plugin.recording.graph import Graph
from nrm_plugin.recording.sample_rows import all_keep_rows

N = 3


def in_place(view: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A function that writes to a view of its argument."""

    def function(x: Tensor) -> Tensor:
        whole = x.clone()
        view(whole).copy_(view(x).clone())
        return whole

    return function


KEEPING: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": lambda x: x.as_strided((N, 4, 2), (8, 1, 4)),
    "channels last": lambda x: x.contiguous().as_strided((N, 2, 4), (8, 4, 1)),
    "repeated entries": lambda x: x.as_strided((N, 5), (8, 0)),
    "overlapping windows": lambda x: x.as_strided((N, 3, 4), (8, 2, 1)),
    "written view": in_place(lambda x: x.view(N, 8)),
    "written columns": in_place(lambda x: x[:, 1]),
}
MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "samples in columns": lambda x: x.as_strided((N, 8), (1, N)),
    "windows over samples": lambda x: x.as_strided((N, 12), (4, 1)),
    "reversed pairs": lambda x: x.as_strided((N, 2, 4), (4, 12, 1)),
    "written across samples": in_place(lambda x: x.view(4, 6)),
    "written transposed": in_place(lambda x: x.view(8, N)),
}


def is_proven(function: Callable[[Tensor], Tensor]) -> bool:
    x = torch.zeros(N, 2, 4, requires_grad=True)
    return all_keep_rows(Graph(function(x), [x]), N)


@pytest.mark.parametrize("kind", KEEPING)
def test_strided_views_keep_the_samples_in_rows(kind):
    assert is_proven(KEEPING[kind])


@pytest.mark.parametrize("kind", MIXING)
def test_strided_views_that_mix_samples_are_not_proven(kind):
    assert not is_proven(MIXING[kind])


class Written(nn.Module):
    """Activations in place on views, after layers in any memory format."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).permute(0, 2, 3, 1)
        h = self.second(nn.functional.silu(h, inplace=True).permute(0, 3, 1, 2))
        h = nn.functional.dropout(h.mean((2, 3)).view(len(h), -1), 0.5, training=False, inplace=True)
        return self.head(nn.functional.relu(h.flatten(1), inplace=True))


@pytest.mark.parametrize("format_of_memory", [torch.contiguous_format, torch.channels_last])
def test_no_samples_are_tracked_after_writes_to_views(format_of_memory):
    torch.manual_seed(0)
    net = Written().eval().to(memory_format=format_of_memory)
    x = torch.randn(N, 3, 7, 7).contiguous(memory_format=format_of_memory)
    mu = RelevanceMeasure(net, x, 1, composite=NRMDefault())
    assert mu._recording.samples.is_plain
    alone = [RelevanceMeasure(net, one[None], 1, composite=NRMDefault()).marginal("input") for one in x]
    torch.testing.assert_close(mu.marginal("input"), torch.cat(alone), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    "fill", [lambda h: h.new_zeros(4), torch.ones_like, torch.empty_like, lambda h: h.new_ones(())]
)
def test_the_shape_of_a_tensor_joins_no_samples(fill):
    torch.manual_seed(0)

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            return self[1](h + 0 * fill(h).nan_to_num(0, 0, 0))

    net = Net(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    assert not RelevanceMeasure(net, torch.randn(N, 3), 1)._recording.samples.may_mix


def test_values_that_leave_the_graph_may_join_samples():
    torch.manual_seed(0)

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            h = self[0](x)
            return self[1](h * (h.detach() > 0))

    net = Net(nn.Linear(3, 4), nn.Linear(4, 2)).eval()
    assert RelevanceMeasure(net, torch.randn(N, 3), 1)._recording.samples.may_mix


class Own(nn.Linear):
    """A linear layer with its own code."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


class Renamed(nn.Linear):
    """A linear layer with the code of torch."""


class Centred(nn.Linear):
    """A layer that subtracts the mean over samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


class Reversed(nn.Linear):
    """A layer that reverses the order of samples."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flip(0))


def with_head(head: nn.Linear) -> nn.Module:
    torch.manual_seed(0)
    nn.init.normal_(head.weight)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), head).eval()


@pytest.mark.recorded
@pytest.mark.parametrize("kind", [Own, Renamed])
@pytest.mark.parametrize("shape", [(N, 3), (N, 5, 3)])
def test_linear_layers_with_their_own_class_keep_the_samples_in_rows(kind, shape):
    net, x = with_head(kind(4, 2)), torch.randn(shape)
    target = 1 if len(shape) == 2 else (2, 1)
    mu = RelevanceMeasure(net, x, target, composite=NRMDefault())
    assert mu._recording.samples.is_plain
    alone = [RelevanceMeasure(net, one[None], target, composite=NRMDefault()).marginal("input") for one in x]
    torch.testing.assert_close(mu.marginal("input"), torch.cat(alone))


@pytest.mark.recorded
@pytest.mark.parametrize("kind", [Centred, Reversed])
def test_linear_layers_that_mix_samples_are_not_proven(kind):
    seen = []

    def observed(graph: Graph, *args: Any) -> bool:
        seen.append(all_keep_rows(graph, *args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch, suppress(NRMError):
        patch.setattr(structure, "all_keep_rows", observed)
        RelevanceMeasure(with_head(kind(4, 2)), torch.randn(N, 3), 1, composite=NRMDefault())
    assert seen == [False]


@pytest.mark.recorded
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_samples_of_a_recurrent_layer_are_its_rows(kind: str) -> None:
    runs: list[int] = []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = getattr(nn, kind)(3, 4, num_layers=2, batch_first=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            runs.append(len(x))
            return self.head(self.rnn(x)[0][:, -1])

    net = Net().eval()
    for count in (1,) if kind == "GRU" else (1, N):  # a detached gate of a GRU might join samples
        runs.clear()
        mu = RelevanceMeasure(net, torch.randn(count, 5, 3), 1)
        assert mu._recording.samples.is_plain
        assert mu.marginal(mu.layers)["rnn"].shape == (count, 5, 4)
        assert runs == [count]  # no second run locates the samples
