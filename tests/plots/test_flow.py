"""Figures of flow graphs.

Covers: nrm_plugin.plots.flow_layout, nrm_plugin.plots.flow_bands, nrm_plugin.plots.flow_columns,
nrm_plugin.plots.flow_parts, nrm_plugin.plots.layer_profile, nrm_plugin.measure.flow_heat_maps.
"""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.transforms import Bbox
from PIL import Image
from torch import nn
from zennit.composites import EpsilonPlus

from nrm_plugin import FlowGraph, RelevanceMeasure, at, patches
from nrm_plugin.measure.flow_graph import FlowError
from nrm_plugin.measure.flow_heat_maps import flow_maps
from nrm_plugin.measure.flow_nodes import FlowLayer
from nrm_plugin.measure.layer_profile import profile
from nrm_plugin.plots.flow import flow_figure, profile_figure, walk_bands
from nrm_plugin.plots.flow_bands import DARKER, FAINT, HAIRLINE, PALER
from nrm_plugin.plots.flow_layout import flow_scene
from nrm_plugin.plots.flow_thumbnails import Photo
from nrm_plugin.plots.ribbons import DARK, LIGHT, short_percent
from tests.conftest import slow_but
from tests.flows import X, full_graph, measure, net
from tests.plots.test_flow_caption import JOINTS, LOWEST, MIDDLE
from tests.plots.test_flow_caption import layer as made_layer


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return measure()


@pytest.fixture(scope="module")
def full() -> FlowGraph:
    return full_graph()


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def shapes(figure: Figure, kind) -> list:
    return [patch for axes in figure.axes for patch in axes.patches if isinstance(patch, kind)]


def made_graph(counts: list[int], seed: int = 0, label: str = "a part of it") -> FlowGraph:
    """A graph with the given numbers of groups, signed joints of which every row and column sums to its node."""
    rng = np.random.default_rng(seed)
    joints = [rng.dirichlet(np.ones((a + 2) * (b + 2))).reshape(a + 2, b + 2) for a, b in itertools.pairwise(counts)]
    joints = [joint * np.where(rng.random(joint.shape) < 0.2, -1, 1) for joint in joints]
    joints = [joint / joint.sum() for joint in joints]
    layers = []
    for number, count in enumerate(counts):
        masses = joints[number].sum(1) if number < len(joints) else joints[-1].sum(0)
        labels = tuple(f"{label} {group}" for group in range(count))
        name = f"a.layer.with.a.long.name.{number}"
        layers.append(FlowLayer(name, tuple(range(count)), labels, tuple(masses[:count]), float(masses[-2]), 5,
                                float(masses[-1]), 0.0))  # fmt: skip
    return FlowGraph(tuple(layers), tuple(joints))


@pytest.mark.medium
@pytest.mark.parametrize("dark", [False, True])
def test_widths_of_ribbons_and_heights_of_bars_are_relevance_on_one_scale(full, dark, tmp_path):
    graph = full.smaller(top=3)
    figure = flow_figure(graph, "heading", dark=dark)
    scene = flow_scene(graph, "heading")
    edges = {(edge.lower.key, edge.upper.key): edge.mass for edge in graph.edges}
    assert all(band.value == pytest.approx(edges[band.lower, band.upper], abs=1e-12) for band in scene.bands)
    heights = sorted(float(v[7] - v[0]) for v in (one.get_path().vertices[:, 1] for one in shapes(figure, PathPatch)))
    unit = heights[-1] / max(abs(band.value) for band in scene.bands)
    np.testing.assert_allclose(heights, sorted(abs(band.value) * unit for band in scene.bands), rtol=1e-6)
    # All edges between drawn nodes are ribbons, except hairlines, which the key sums up.
    places = {node.node.key for node in scene.nodes}
    left = {pair: mass for pair, mass in edges.items() if pair not in {(b.lower, b.upper) for b in scene.bands}}
    assert all(abs(mass) * scene.unit < HAIRLINE for pair, mass in left.items() if set(pair) <= places)
    assert scene.omitted == pytest.approx(sum(map(abs, left.values())), abs=1e-9)
    written = " ".join(texts(figure))
    for node in scene.nodes:
        assert short_percent(node.node.mass) in written
    assert "channel" in written
    palette = DARK if dark else LIGHT
    colors = {
        to_hex(bar.get_edgecolor() if bar.get_hatch() else bar.get_facecolor()) for bar in shapes(figure, Rectangle)
    }
    assert colors == {palette.positive, palette.negative, palette.other, palette.off}
    figure.savefig(tmp_path / "flow.png", facecolor=figure.get_facecolor())
    with Image.open(tmp_path / "flow.png") as image:
        assert image.convert("RGB").getpixel((2, 2)) == tuple(int(palette.paper[at : at + 2], 16) for at in (1, 3, 5))


def test_ribbons_of_a_node_fill_its_bars_and_negative_ones_are_below(full):
    scene = flow_scene(full.smaller(top=3))
    for node in scene.nodes:
        for x, end in ((node.box.x, "end"), (node.box.right, "start")):
            mine = [
                band for band in scene.bands if getattr(band, end)[0] == x and node.node.key in (band.lower, band.upper)
            ]
            spans = sorted(
                (getattr(band, end)[1] - band.width / 2, getattr(band, end)[1] + band.width / 2) for band in mine
            )
            assert all(low[1] <= high[0] + 1e-6 + HAIRLINE for low, high in itertools.pairwise(spans))
            bars = [box for box, _ in node.bars if box.x == pytest.approx(x - (x == node.box.right) * 4.5)]
            if mine:
                assert spans[0][0] >= min(box.y for box in bars) - 1e-6
                assert spans[-1][1] <= max(box.bottom for box in bars) + 1e-6
            signs = [band.value > 0 for band in sorted(mine, key=lambda band: getattr(band, end)[1])]
            assert signs == sorted(signs, reverse=True)


MAPPED = {node.key: None for node in made_graph([1, 12, 12]).nodes if node.kind == "group"}
GRAPHS = [[1, 12, 12], [1, 8, 8, 8, 12], [1, 6, 6, 6, 6, 12], [12, 12], [3], [1, 40, 40]]


@pytest.mark.medium
@pytest.mark.parametrize("width", [None, 3.3])
@pytest.mark.parametrize("counts", GRAPHS, ids=str)
def test_nothing_overlaps_and_nothing_is_cut_off(counts, width):
    graph = made_graph(counts) if len(counts) > 1 else made_graph([*counts, 2]).smaller(top=3)
    maps = {node.key: np.random.default_rng(1).standard_normal((60, 60)) for node in graph.nodes if node.kind != "off"}
    figure = flow_figure(graph, "A heading that is long enough to be broken into several lines " * 2, maps=maps,
                         image=Photo(np.random.default_rng(2).random((3, 60, 60))), width=width)  # fmt: skip
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    page, renderer = figure.bbox, canvas.get_renderer()  # without it, each extent makes one, of the size of the page
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts if text.get_text()]
    assert all(page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1 for box in boxes)
    small = [Bbox.from_extents(box.x0 + 1, box.y0 + 1.5, box.x1 - 1, box.y1 - 1.5) for box in boxes]
    assert not [1 for one, other in itertools.combinations(small, 2) if one.overlaps(other)]
    images = [image.get_window_extent(renderer) for image in figure.axes[0].images]
    assert len(images) == len(maps.keys() & {node.node.key for node in flow_scene(graph).nodes}) + 1
    inner = [Bbox.from_extents(box.x0 + 1, box.y0 + 1, box.x1 - 1, box.y1 - 1) for box in images]
    assert not [1 for one, other in itertools.combinations(inner, 2) if one.overlaps(other)]
    assert not [1 for one in small for other in inner if one.overlaps(other)]


def test_channels_are_abbreviated_where_their_names_do_not_fit():
    graph = made_graph([1, 12, 12], label="")
    graph = replace(graph, layers=tuple(replace(one, labels=tuple(map(str, one.groups))) for one in graph.layers))
    columns = {width: flow_scene(graph, width=width, thumbnails=MAPPED) for width in (2.2, 12)}
    texts = {width: {label.text for node in scene.nodes for label in node.labels} for width, scene in columns.items()}
    assert any(text.startswith("ch.\u00a0") for text in texts[2.2])
    assert not any(text.startswith("ch.\u00a0") for text in texts[12])
    assert not any(text.startswith("cha…") for text in texts[2.2])


def test_channels_have_numbers_alone_where_an_abbreviation_does_not_fit_all_of_a_layer():
    joint = np.full((5, 5), 1 / 25)
    layers = tuple(made_layer(name, ("2", "1366", "8"), (0.2, 0.2, 0.2), rest=0.4) for name in ("c", "b", "a"))
    graph = FlowGraph((*layers, LOWEST), (joint, joint, joint))
    thumbnails = {node.key: None for node in graph.nodes}
    names = {}
    for width in (2.5, 9):
        scene = flow_scene(graph, width=width, thumbnails=thumbnails)
        names[width] = {node.labels[0].text for node in scene.nodes if node.node.kind == "group"}
        is_explained = any("Numbers below" in label.text for label in scene.legend)
        assert is_explained == (width == 2.5)
    assert {"2", "1366", "8"} <= names[2.5]
    assert not any("ch." in name for name in names[2.5])
    assert {"channel 2", "channel 1366"} <= names[9]
    layers = tuple(replace(one, labels=("A1 and a long name", "A2", "A3")) for one in layers)
    scene = flow_scene(FlowGraph((*layers, LOWEST), graph.joints), width=2.5, thumbnails=thumbnails)
    assert not any("Numbers below" in label.text for label in scene.legend)


def test_long_names_of_a_single_output_are_written_in_three_lines():
    output = made_layer("output", ("African bush elephant",), (1.0,))
    graph = FlowGraph((output, MIDDLE, LOWEST), JOINTS)
    for width, outputs in ((3.3, ("African", "bush", "elephant")), (9, ("African bush elephant",))):
        scene = flow_scene(graph, width=width, thumbnails={node.key: None for node in graph.nodes})
        names = next(node.labels for node in scene.nodes if node.node.layer == "output")[:-1]
        assert tuple(label.text for label in names) == outputs


def test_the_fewest_ribbons_with_half_of_the_relevance_are_strongly_coloured():
    top = made_layer("block", ("A1", "A2"), (0.6, 0.3), rest=0.1)
    low = made_layer("conv", ("B1", "B2"), (0.6, 0.3), rest=0.1)
    joint = np.array([[0.35, 0.2, 0.05, 0.0], [0.21, 0.07, 0.02, 0.0], [0.04, 0.03, 0.03, 0.0], [0.0] * 4])
    bands = {(b.upper[-1], b.lower[-1]): b.strength for b in flow_scene(FlowGraph((top, low), (joint,))).bands}
    assert {pair for pair, strength in bands.items() if strength == DARKER} == {("0", "0"), ("1", "0")}
    assert bands["1", "1"] == bands["0", "t"] == PALER
    assert bands["t", "t"] == FAINT


@pytest.mark.medium
@pytest.mark.parametrize("dark", [False, True])
def test_every_node_but_off_has_its_conditional_heat_map(mu, full, dark):
    graph = full.smaller(top=2)
    maps = flow_maps(mu, graph, sample=1)
    others = {layer.name: layer.others for layer in graph.layers}
    nodes = {
        node.key: node for node in graph.nodes if node.kind == "group" or (node.kind == "rest" and others[node.layer])
    }
    assert set(maps) == set(nodes)
    for key, values in maps.items():
        layer, kind = nodes[key].layer, nodes[key].kind
        groups = next(one.groups for one in graph.layers if one.name == layer)
        count = mu.shape(layer)[1]
        members = [nodes[key].group] if kind == "group" else [one for one in range(count) if one not in groups]
        event = at(layer).channel(members)
        joint, mass = mu.marginal("input", joint=event)[1].sum(0), float(mu(event)[1])
        expected = joint / abs(mass) if mass else joint  # of the sign of the node
        np.testing.assert_allclose(values, expected, atol=1e-12)
    figure = flow_figure(graph, dark=dark, maps=maps)
    drawn = {node.node.key for node in flow_scene(graph).nodes}
    assert len(figure.axes[0].images) == len(drawn & set(maps))


def test_small_rest_and_off_nodes_are_not_drawn():
    graph = made_graph([1, 4, 3])
    tiny = tuple(joint * np.where(np.arange(joint.shape[1]) == joint.shape[1] - 1, 1e-6, 1.0) for joint in graph.joints)
    tiny = tuple(joint * np.where(np.arange(len(joint)) == len(joint) - 1, 1e-6, 1.0)[:, None] for joint in tiny)
    layers = tuple(
        FlowLayer(one.name, one.groups, one.labels, one.masses, one.rest, one.others, 1e-5, 0.0) for one in graph.layers
    )
    scene = flow_scene(FlowGraph(layers, tiny))
    assert Counter(node.node.kind for node in scene.nodes) == {"group": 8, "rest": 3}
    assert Counter(node.node.kind for node in flow_scene(graph).nodes)["off"] == 3


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
    profile_figure(profile(mu)).savefig(tmp_path / "layers.png")


@pytest.mark.medium
def test_layers_without_relevance_are_plotted_and_too_wide_ones_raise():
    black = RelevanceMeasure(net(), 0 * X[:1], 1, residual="sink", composite=EpsilonPlus())
    figure = flow_figure(black.flow(["output", "0", "input"]))
    assert {"no relevance crosses it", "absorbed"} <= set(texts(figure))
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    graph = RelevanceMeasure(wide, torch.randn(1, 8), 0).flow(["0", "input"], top=None)
    with pytest.raises(FlowError, match=r"0 shows 4096 groups, but a figure can show 40\. Show fewer"):
        flow_figure(graph)
    assert len([node for node in flow_scene(graph.smaller(top=5)).nodes if node.node.kind == "group"]) == 5 + 5


@pytest.mark.medium
def test_named_walks_are_drawn_in_their_own_width_within_the_ribbons(monkeypatch):
    monkeypatch.setattr(sys.modules["nrm_plugin.plots.flow_caption"], "NAMED_WALK", 0.02)
    graph = made_graph([1, 2, 2])
    scene = flow_scene(graph)
    ribbons = {(band.lower, band.upper): band for band in scene.bands}
    keys = [
        (f"{graph.layers[2].name}/{a}", f"{graph.layers[1].name}/{b}", f"{graph.layers[0].name}/0")
        for a, b in itertools.product(range(2), range(2))
    ]
    walk = max(keys, key=lambda each: min(ribbons[pair].width for pair in itertools.pairwise(each) if pair in ribbons))
    widths = [ribbons[pair].width for pair in itertools.pairwise(walk)]
    mass = 0.4 * min(widths) / scene.unit
    assert mass > 0.02
    bands = walk_bands(scene, [(walk, mass), (walk, mass), (walk, mass)])
    assert [band.width for band in bands] == pytest.approx([0.4 * min(widths)] * 4)  # at most two walks are named
    for first, second in zip(bands[:2], bands[2:], strict=True):
        ribbon = ribbons[first.lower, first.upper]
        assert first.start[1] - first.width / 2 == pytest.approx(ribbon.start[1] - ribbon.width / 2)
        assert second.end[1] - second.width / 2 == pytest.approx(first.end[1] + first.width / 2)
    assert walk_bands(scene, [(walk, 0.01)]) == []
    (widest, _) = walk_bands(scene, [(walk, 2.0)])
    signs = [[band.tone for band in walk_bands(scene, [(walk, sign * mass)])] for sign in (1, -1)]
    assert signs == [["positive"] * 2, ["negative"] * 2]  # whatever the color of the ribbons
    assert widest.width == pytest.approx(widths[0])  # never wider than its ribbon
    figure = flow_figure(graph, walks=[(walk, mass)])
    assert sum(patch.get_linewidth() == 0.5 and not patch.get_fill() for patch in shapes(figure, PathPatch)) == 2


@pytest.mark.parametrize("finding", ["a finding", ""])
def test_a_line_says_how_a_figure_was_made(finding):
    figure = flow_figure(made_graph([1, 3]), "a heading", finding=finding, caption="a caption", made="net · rules")
    places = {text.get_text(): text.get_position()[1] for text in figure.axes[0].texts}
    order = ["a heading", "net · rules", *filter(None, [finding]), "a caption"]
    assert [text for text in sorted(order, key=places.__getitem__)] == order
    (line,) = (text for text in figure.axes[0].texts if text.get_text() == "net · rules")
    assert line.get_weight() == "normal"
    assert (line.get_color() == LIGHT.pale) == bool(finding)


def test_cancelling_relevance_off_a_layer_is_written_with_both_totals():
    layers = (made_layer("output", ("zebra",), (1.0,)), made_layer("conv", ("A1", "A2"), (1.0, 0.0)),
              made_layer("input", ("part 1", "part 2"), (1.0, 0.0)))  # fmt: skip
    joints = (np.zeros((3, 4)), np.zeros((4, 4)))
    joints[0][0, 0] = 1.0
    joints[1][0, 0], joints[1][3, :2] = 1.0, (0.4, -0.4)
    scene = flow_scene(FlowGraph(layers, joints), width=8)
    (off,) = (node for node in scene.nodes if node.node.kind == "off")
    assert off.labels[-1].text.endswith("±40%")
    joints[1][3, 1] = -0.3
    part = replace(layers[1], bypass=0.1)
    scene = flow_scene(FlowGraph((layers[0], part, layers[2]), joints), width=8)
    (off,) = (node for node in scene.nodes if node.node.kind == "off")
    assert off.labels[-1].text.endswith("10%")
    assert "−" not in off.labels[-1].text


def test_negative_relevance_of_a_rest_is_not_grey():
    graph = made_graph([1, 3])
    joint = np.zeros((3, 5))
    joint[0] = [0.8, 0.3, 0.1, -0.2, 0.0]
    layers = (replace(graph.layers[0], masses=(1.0,), rest=0.0, sink=0.0),
              replace(graph.layers[1], masses=(0.8, 0.3, 0.1), rest=-0.2, sink=0.0))  # fmt: skip
    scene = flow_scene(FlowGraph(layers, (joint,)))
    (band,) = (band for band in scene.bands if band.value < 0)
    assert band.tone == "negative"
    rest = next(node for node in scene.nodes if node.node.kind == "rest")
    assert {tone for _, tone in rest.bars} == {"negative"}
    assert rest.labels[-1].tone == "negative"
