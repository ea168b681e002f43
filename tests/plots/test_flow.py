"""Figures of flow graphs."""

from __future__ import annotations

import itertools
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.patches import PathPatch, Rectangle
from PIL import Image
from torch import nn
from zennit.composites import EpsilonPlus

from nrm_plugin import FlowGraph, RelevanceMeasure, at, patches
from nrm_plugin.measure.flow_graph import FlowError
from nrm_plugin.measure.flow_heat_maps import flow_maps
from nrm_plugin.measure.layer_profile import profile
from nrm_plugin.plots.flow import flow_figure, profile_figure
from nrm_plugin.plots.flow_html import sankey_figure
from nrm_plugin.plots.ribbons import DARK, LIGHT
from tests.conftest import slow_but
from tests.flows import X, drawn, full_graph, measure, net


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return measure()


@pytest.fixture(scope="module")
def full() -> FlowGraph:
    return full_graph()


def texts(figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def shapes(figure, kind) -> list:
    return [patch for axes in figure.axes for patch in axes.patches if isinstance(patch, kind)]


@pytest.mark.parametrize("dark", [False, True])
def test_a_figure_has_a_bar_for_each_node_and_a_ribbon_for_each_edge(full, dark, tmp_path):
    graph = full.smaller(top=3)
    figure = flow_figure(graph, "heading", dark=dark)
    nodes = [node for node in graph.nodes if node.kind == "group" or abs(node.mass) > 1e-6]
    bars, ribbons = shapes(figure, Rectangle), shapes(figure, PathPatch)
    assert (len(bars), len(ribbons)) == (len(nodes), len(drawn(graph)))
    written = texts(figure)
    assert {"input", "0", "2", "output", *(node.label for node in nodes)} <= set(written)
    # One scale for all: the height of a ribbon where it starts is the size of its joint relevance.
    heights = sorted(float(v[0] - v[7]) for v in (ribbon.get_path().vertices[:, 1] for ribbon in ribbons))
    largest = max(abs(mass) for mass in drawn(graph))
    expected = sorted(max(abs(mass) / largest * heights[-1], 0.0015) for mass in drawn(graph))
    np.testing.assert_allclose(heights, expected, rtol=1e-6)
    palette = DARK if dark else LIGHT
    colors = {to_hex(bar.get_facecolor()) for bar in bars}
    assert colors == {palette.positive, palette.negative, palette.other, palette.off}
    figure.savefig(tmp_path / "flow.png", facecolor=figure.get_facecolor())
    with Image.open(tmp_path / "flow.png") as image:
        assert image.convert("RGB").getpixel((2, 2)) == tuple(int(palette.paper[at : at + 2], 16) for at in (1, 3, 5))


def test_labels_of_long_columns_do_not_overlap():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 30), nn.ReLU(), nn.Linear(30, 2)).eval()
    figure = flow_figure(RelevanceMeasure(model, torch.randn(1, 30), 0).flow(["1", "input"], top=None))
    figure.canvas.draw()
    labels = [text for text in figure.axes[0].texts if text.get_text().isdecimal() and text.get_ha() == "right"]
    boxes = sorted((text.get_window_extent() for text in labels), key=lambda box: box.y0)
    assert len(boxes) == 30
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))


@pytest.mark.parametrize("dark", [False, True])
def test_each_group_has_its_conditional_heat_map_below_its_layer(mu, full, dark):
    graph = full.smaller(top=2)
    maps = flow_maps(mu, graph, sample=1)
    shown = {node.key: node for node in graph.nodes if node.kind == "group" and node.layer != "input"}
    assert set(maps) == set(shown)
    for key, values in maps.items():
        expected = mu.marginal("input", given=at(shown[key].layer).channel(shown[key].group), min_ratio=0)[1].sum(0)
        np.testing.assert_allclose(values, expected, atol=1e-12)
    panels = [axes for axes in flow_figure(graph, dark=dark, maps=maps).axes[0].child_axes if axes.images]
    drawn_maps = {axes.get_title(): np.asarray(axes.images[0].get_array()) for axes in panels}
    assert len(panels) == len(maps)
    np.testing.assert_allclose(drawn_maps["2"], maps["output/2"], atol=1e-12)
    places = [axes.get_position() for axes in panels]
    assert not any(one.overlaps(other) for one, other in itertools.combinations(places, 2))


SHAPES = [(1, 12, 12), (3, 12, 12), (1, 6, 6, 6), (2, 24), (20,)]


@pytest.mark.slow
@pytest.mark.parametrize("shape", slow_but(SHAPES, (1, 6, 6, 6)), ids=str)
@pytest.mark.parametrize("kind", slow_but(["plain", "black"], "plain"))
def test_flows_to_inputs_of_every_shape_are_plotted(shape, kind, tmp_path):
    torch.manual_seed(0)
    conv = {1: nn.Linear, 2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    first = conv(shape[0], 5) if len(shape) == 1 else conv(shape[0], 5, 3)
    model = nn.Sequential(first, nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)).eval()
    x = torch.rand(1, *shape) * (kind == "plain")
    model(x)
    mu = RelevanceMeasure(model, x, 1, composite=EpsilonPlus(), residual="sink")
    over = {"input": patches(shape[1:], 2)} if len(shape) > 1 else {}
    graph = mu.flow(["output", "1", "input"], over)
    for layer in graph.layers:
        assert sum(node.mass for node in layer.nodes) == pytest.approx(1, abs=1e-5)
    maps = flow_maps(mu, graph, over)
    spots = {1: 0, 2: (1, 24), 3: (12, 12), 4: (6, 6)}[len(shape)]
    assert {values.shape for values in maps.values()} == ({spots} if spots else set())
    figure = flow_figure(graph, "any", maps=maps)
    figure.savefig(tmp_path / "any.png")
    assert ("no relevance crosses it" in texts(figure)) == (kind == "black")
    if find_spec("plotly"):
        assert len(sankey_figure(graph, "any", maps).layout.images) == len(maps)
        assert FlowGraph.from_json(graph.to_json()) == graph
    profile_figure(profile(mu)).savefig(tmp_path / "layers.png")


def test_layers_without_relevance_are_plotted_and_too_wide_ones_raise():
    black = RelevanceMeasure(net(), 0 * X[:1], 1, residual="sink", composite=EpsilonPlus())
    figure = flow_figure(black.flow(["output", "0", "input"]))
    assert {"no relevance crosses it", "absorbed"} <= set(texts(figure))
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    graph = RelevanceMeasure(wide, torch.randn(1, 8), 0).flow(["0", "input"], top=None)
    with pytest.raises(FlowError, match=r"0 shows 4096 groups, and a figure has room for 40\. Show fewer"):
        flow_figure(graph)
    assert len(shapes(flow_figure(graph.smaller(top=5)), Rectangle)) == 6 + 6
