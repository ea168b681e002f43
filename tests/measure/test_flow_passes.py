"""Flows and heat maps from shared passes, against queries of the measure."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from nrm_plugin import RelevanceMeasure, at, find_groups, patches
from nrm_plugin.measure import flow_passes
from nrm_plugin.measure.flow_heat_maps import flow_maps_and_pairs, mapped_flow

LAYERS = ["input", "2", "5", "output"]
OVER = {"input": patches((12, 12), 2)}


class Skip(nn.Module):
    """A convolution, and a connection around it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, C, H, W)``."""
        result: torch.Tensor = x + self.inner(x).relu()
        return result


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), Skip(5), nn.ReLU(), nn.Conv2d(5, 7, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(7, 3),
    ).double()  # fmt: skip
    x = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
    return RelevanceMeasure(net, x, 1, residual="sink")


@pytest.fixture
def few(monkeypatch):
    """A tap with five positions along each side is enough for heat maps."""
    monkeypatch.setattr(flow_passes, "POSITIONS", 5)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("top", [3, 20])
@pytest.mark.parametrize(
    "layers", [LAYERS, ["input", "5", "output"], ["2", "5"], ["input", "5"], ["input"], ["5"], ["input", "7"]]
)
def test_a_mapped_flow_is_the_flow_of_the_measure(mu, layers, top):
    graph = mu.flow(layers, OVER, top=top, sample=1)
    flow = mapped_flow(mu, layers, OVER, top=top, sample=1)
    assert flow.graph.layers == graph.layers
    assert flow.graph.carried == pytest.approx(graph.carried, abs=1e-12)
    for own, asked in zip(flow.graph.joints, graph.joints, strict=True):
        assert np.allclose(own, asked, atol=1e-12)
    _, pairs = flow_maps_and_pairs(mu, graph, OVER, sample=1)
    assert flow.pairs == pytest.approx(pairs, abs=1e-12)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("layer", ["5", "7"])
def test_heat_maps_at_a_layer_are_joint_relevance_with_its_positions(mu, layer):
    flow = mapped_flow(mu, ["input", layer, "output"], OVER, top=3, sample=1)
    assert flow.positions == (6, 6)
    for node in (node for node in flow.graph.nodes if node.layer == layer and node.kind == "group"):
        asked = mu.marginal(flow.layer, joint=at(layer)[node.group])[1].sum(0) / abs(node.mass)
        cells = flow.maps[node.key].reshape(6, 2, 6, 2)
        assert np.allclose(cells.sum((1, 3)), asked.numpy(), atol=1e-12)
        assert np.ptp(cells, (1, 3)).max() == 0
    part = flow.graph.layers[-1].nodes[0]
    pixels = (mu.marginal("input")[1].sum(0) * (OVER["input"] == part.group)).numpy() / abs(part.mass)
    assert np.allclose(flow.maps[part.key], pixels)


@pytest.mark.usefixtures("few")
def test_the_tap_of_the_heat_maps_is_crossed_by_all_walks(mu):
    assert flow_passes.map_tap(mu, [mu._tap("output")], "input")[0] in ("5", "6")
    branch = [mu._tap("5"), mu._tap("3.inner")]  # the connection goes around the second one
    assert flow_passes.map_tap(mu, branch[1:], "input")[1].place == mu._tap("2").place  # not inside of a block
    assert flow_passes.map_tap(mu, branch, "input")[1].place == mu._tap("2").place
    upper = [mu._tap("1")]
    assert flow_passes.map_tap(mu, upper, "input")[1].place == mu._tap("1").place


def test_small_images_have_heat_maps_of_pixels(mu):
    assert mapped_flow(mu, LAYERS, OVER, sample=0).positions == ()


@pytest.mark.usefixtures("few")
def test_groups_of_the_positions_of_another_layer_are_groups_of_the_image(mu):
    groups = find_groups(RelevanceMeasure(mu_model(), images(), 1), ["5", "input"], 3, {"input": patches((12, 12), 4)})
    assert len(groups.labels[1]) == 16
    assert sum(groups.masses[1]) == pytest.approx(1, abs=1e-9)


def mu_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(5, 5, 3, padding=1), nn.ReLU(),
        nn.Conv2d(5, 12, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 3),
    ).double()  # fmt: skip


def images() -> torch.Tensor:
    return torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(1)).double()
