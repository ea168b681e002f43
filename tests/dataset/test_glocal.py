"""Mean flows equal averages of single samples, also from a sweep; differences sum to 0.

Covers: nrm_plugin.dataset.glocal_plots, nrm_plugin.dataset.sweep_flow.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from zennit.composites import EpsilonPlus

from nrm_plugin import Groups, RelevanceMeasure, at, find_groups, patches
from nrm_plugin.dataset import Bypass, Joint, Marginal, Sink, sweep
from nrm_plugin.dataset.glocal import difference, flow_of_sweep, flow_queries, mean_flow, mixed
from nrm_plugin.dataset.glocal_plots import difference_figure
from nrm_plugin.errors import InputError, NRMError
from nrm_plugin.measure.flow_graph import FlowError, FlowGraph
from nrm_plugin.plots.flow import flow_figure
from tests.conftest import untouched
from tests.dataset import sweep_nets
from tests.dataset.sweep_nets import OPTIONS, Data


class Skip(nn.Module):
    """A branch with biases and a skip connection, so that sink and bypass have mass."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=1))
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(32, 6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(x + self.body(x)))


LAYERS = ["output", "head.1", "body.0", "input"]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Skip().double().eval()


@pytest.fixture(scope="module")
def data():
    draw = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn((14, 2, 4, 4), generator=draw, dtype=torch.float64), torch.randint(0, 3, (14,), generator=draw)
    )


def measure(net, x, target):
    return RelevanceMeasure(net, x, target, composite=EpsilonPlus(), residual="sink")


def batches(net, data, sizes, keep=lambda label: True):
    images, labels = data.tensors
    kept = torch.tensor([keep(int(label)) for label in labels])
    for x, y in zip(images[kept].split(sizes), labels[kept].split(sizes), strict=True):
        yield measure(net, x, y)


def cuts(graph: FlowGraph):
    return [sum(layer.masses) + layer.rest + layer.sink + layer.bypass for layer in graph.layers]


def same(graph: FlowGraph, expected: FlowGraph, rtol=1e-9, carried=True):
    for ours, theirs in zip(graph.layers, expected.layers, strict=True):
        assert (ours.name, ours.groups, ours.labels, ours.others) == (
            theirs.name, theirs.groups, theirs.labels, theirs.others
        )  # fmt: skip
        for key in ("masses", "rest", "sink", "bypass"):
            np.testing.assert_allclose(getattr(ours, key), getattr(theirs, key), rtol=rtol, atol=1e-12)
    for ours, theirs in zip(graph.joints, expected.joints, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=1e-11)
    if carried:
        assert graph.carried == pytest.approx(expected.carried)


@pytest.mark.medium
def test_a_mean_flow_is_that_of_events_of_single_samples(net, data):
    """Every number is a mean of masses of events over samples that are measured separately."""
    with untouched(net):
        graph = mean_flow(batches(net, data, 5), LAYERS, {"input": patches((4, 4), 2)}, top=None)
    assert cuts(graph) == pytest.approx([1] * 4)
    assert [layer.name for layer in graph.layers] == LAYERS
    assert min(abs(graph.layers[2].bypass), abs(graph.layers[2].sink)) > 1e-3
    singles = [measure(net, x[None], int(y)) for x, y in data]

    def mean(event):
        return float(torch.stack([mu(event) for mu in singles]).mean())

    quarter = at("input")[patches((4, 4), 2).expand(2, 4, 4) == 3]
    channel, unit, classes = at("body.0")[2], at("head.1")[4], at("output")[1]
    assert graph.layers[0].masses[1] == pytest.approx(mean(classes))
    assert graph.layers[2].masses[2] == pytest.approx(mean(channel))
    assert graph.layers[3].masses[3] == pytest.approx(mean(quarter))
    assert graph.layers[2].sink + graph.layers[2].bypass == pytest.approx(mean(~at("body.0")))
    assert graph.joints[0][1, 4] == pytest.approx(mean(classes & unit))
    assert graph.joints[1][4, 2] == pytest.approx(mean(unit & channel))
    assert graph.joints[1][4, -1] == pytest.approx(mean(unit & ~at("body.0")))
    assert graph.joints[2][-1, 3] == pytest.approx(mean(quarter & ~at("body.0")))
    assert graph.joints[2][-1, -1] == pytest.approx(mean(~at("input") & ~at("body.0")))
    assert graph.carried == pytest.approx(mean(at("output") & at("head.1") & at("body.0") & at("input")))


@pytest.mark.slow
def test_a_mean_flow_does_not_depend_on_the_batches(net, data):
    whole = mean_flow(next(batches(net, data, 14)), LAYERS, top=None)
    same(mean_flow(batches(net, data, 3), LAYERS[::-1], top=None), whole)
    graphs = [next(batches(net, data, 14)).flow(LAYERS, top=None, sample=sample) for sample in range(14)]
    same(mixed(graphs, [1] * 14), whole)
    few = mean_flow(batches(net, data, 14), LAYERS, top=2)
    assert [len(layer.groups) for layer in few.layers] == [2, 2, 2, 2]
    same(few, whole.smaller(top=2), carried=False)


@pytest.mark.medium
def test_chosen_groups_keep_their_numbers(net, data):
    chosen = {"head.1": [4, 1], "body.0": [3]}
    graph = mean_flow(batches(net, data, 5), LAYERS, groups=chosen, top=None, names={"body.0": list("abcd")})
    whole = mean_flow(batches(net, data, 5), LAYERS, top=None)
    assert graph.layers[1].groups == (4, 1)
    assert graph.layers[1].labels == ("4", "1")
    assert graph.layers[1].others == 4
    assert graph.layers[2].labels == ("d",)
    assert cuts(graph) == pytest.approx([1] * 4)
    assert graph.joints[1][0, 0] == pytest.approx(whole.joints[1][4, 3])
    assert graph.layers[1].rest == pytest.approx(sum(whole.layers[1].masses) - whole.layers[1].masses[4]
                                                 - whole.layers[1].masses[1])  # fmt: skip
    for wrong in ([], [1, 1], [6], [-1]):
        with pytest.raises(InputError, match="distinct indices from 0 to 5"):
            mean_flow(batches(net, data, 5), LAYERS, groups={"head.1": wrong})


@pytest.mark.medium
def test_a_difference_is_signed_and_sums_to_zero(net, data):
    first, second = (mean_flow(batches(net, data, 5, lambda y, c=c: y == c), LAYERS, top=None) for c in (0, 1))
    graph = difference(first, second)
    assert cuts(graph) == pytest.approx([0] * 4, abs=1e-12)
    assert graph.layers[0].masses == pytest.approx((1, -1, 0))
    np.testing.assert_allclose(graph.joints[1], first.joints[1] - second.joints[1])
    np.testing.assert_allclose(graph.joints[1][:-2].sum(1), graph.layers[1].masses, atol=1e-12)
    few = graph.smaller(top=3)
    order = np.argsort(-np.abs(graph.layers[1].masses), kind="stable")[:3]
    assert few.layers[1].groups == tuple(order)
    assert cuts(few) == pytest.approx([0] * 4, abs=1e-12)
    with pytest.raises(FlowError, match="different layers or groups"):
        difference(first.smaller(top=2), second.smaller(top=2))
    with pytest.raises(FlowError, match="as many non-negative weights"):
        mixed([first, second], [1, -1])
    with pytest.raises(FlowError, match="as many non-negative weights"):
        mixed([], [])
    with pytest.raises(FlowError, match="no measure to average"):
        mean_flow(iter(()), LAYERS)
    figure = difference_figure(few, "class 0", "class 1")
    figure.canvas.draw()
    assert any("class 0" in text.get_text() for text in figure.axes[0].texts)
    assert FlowGraph.from_json(few.to_json()) == few


# -- from a sweep ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored(net, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep") / "out"
    queries = [Marginal("body.0", joint=at("output")[1]), *flow_queries(LAYERS, {"input": patches((4, 4), 2)})]
    options = {"target": "label", "batch_size": 4, "shard": 4, "composite": EpsilonPlus(), "residual": "sink"}
    sweep(net, data, queries, folder, **options, progress=False)
    return folder


@pytest.mark.medium
@pytest.mark.parametrize("target", [None, 0, 1, 2])
def test_the_flow_of_a_sweep_is_that_of_the_measures(net, data, stored, target):
    over = {"input": patches((4, 4), 2)}
    expected = mean_flow(batches(net, data, 5, lambda y: target in (None, y)), LAYERS, over, top=None)
    graph = flow_of_sweep(stored, LAYERS, target, top=None)
    assert graph.carried is None
    same(graph, expected, carried=False)
    assert cuts(graph) == pytest.approx([1] * 4)
    same(flow_of_sweep(stored, LAYERS, target, top=2), expected.smaller(top=2), carried=False)


@pytest.mark.medium
def test_some_samples_of_a_sweep_and_names(net, data, stored):
    wanted = [1, 5, 6, 13]
    graphs = [measure(net, *(part[n : n + 1] for part in data.tensors)).flow(
        LAYERS[1:3], top=None) for n in wanted]  # fmt: skip
    same(flow_of_sweep(stored, LAYERS[1:3], samples=wanted, top=None), mixed(graphs, [1] * 4), carried=False)
    named = flow_of_sweep(stored, ["output"], names={"output": ["a", "b", "c"]})
    assert "b" in named.layers[0].labels
    groups = find_groups(measure(net, *data.tensors), LAYERS[1:3], k=2)
    groups.save(stored.parent / "few.safetensors")
    read = Groups.load(stored.parent / "few.safetensors")
    assert flow_of_sweep(stored, LAYERS, groups=read).origin == "few.safetensors, where they were found on 14 samples"
    flow_figure(named).canvas.draw()


@pytest.mark.medium
def test_missing_queries_and_samples_raise(net, data, stored, tmp_path):
    with pytest.raises(FlowError, match=r"no Marginal\('head.3'\) and no Sink\('head.3'\)"):
        flow_of_sweep(stored, ["head.3", "body.0"])
    with pytest.raises(FlowError, match=r"no Joint\('output', 'body.0'\)"):
        flow_of_sweep(stored, ["output", "body.0"])
    with pytest.raises(FlowError, match="distinct layers"):
        flow_of_sweep(stored, ["output", "output"])
    with pytest.raises(FlowError, match="has 1 of the requested samples"):
        flow_of_sweep(stored, LAYERS, samples=[3, 99])
    with pytest.raises(FlowError, match="has 0 of the requested samples with target 7"):
        flow_of_sweep(stored, LAYERS, 7)
    with pytest.raises(NRMError, match="no sweep"):
        flow_of_sweep(tmp_path, LAYERS)
    other = [Marginal("body.0"), Sink("body.0"), Bypass("body.0"), Marginal("input"), Sink("input"), Bypass("input")]
    other.append(Joint("body.0", "input", over=("channel", "position")))
    sweep(net, data, other, tmp_path / "other", batch_size=7, progress=False)
    with pytest.raises(FlowError, match="with the same groups"):
        flow_of_sweep(tmp_path / "other", ["body.0", "input"])


@pytest.mark.medium
def test_flows_of_differences_are_added_with_their_signs(tmp_path):
    """By hand: the mean of μ times the sign of each difference; stored and computed at once."""
    model, x = sweep_nets.net().double(), Data(10).x.double()
    mu = RelevanceMeasure(model, x, 0, against="rest")
    assert 0 < (mu.sign > 0).sum() < 10
    layers = ["output", "4", "2"]
    stored = sweep(model, TensorDataset(x), flow_queries(layers), tmp_path, target=0, against="rest", **OPTIONS)
    for graph in (mean_flow(mu, layers, top=None), flow_of_sweep(stored, layers, top=None)):
        expected = (mu.sign[:, None] * mu.marginal("4", "channel")).mean(0)
        np.testing.assert_allclose(graph.layers[1].masses, expected, atol=1e-9)
        joint = (mu.sign[:, None, None] * mu.joint("4", "2")).mean(0)
        np.testing.assert_allclose(graph.joints[1][:-2, :-2], joint, atol=1e-9)
        assert graph.layers[0].masses == pytest.approx([float(mu.sign.mean())], abs=1e-9)


def test_the_flow_of_a_negative_difference_has_negative_masses():
    model, x = sweep_nets.net().double(), Data(10).x.double()
    mu = RelevanceMeasure(model, x, 0, against="rest")
    sample = int((mu.sign < 0).nonzero()[0])
    graph = mu.flow(["output", "4"], top=None, sample=sample)
    assert graph.layers[0].masses == (-1.0,)
    np.testing.assert_allclose(graph.layers[1].masses, -mu.marginal("4", "channel")[sample], atol=1e-9)
    assert graph.carried == pytest.approx(-1)
