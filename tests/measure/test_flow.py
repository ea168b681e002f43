"""Every node and edge of a flow graph compared with its event and with enumerated walks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from zennit.composites import EpsilonAlpha2Beta1, EpsilonPlus

from nrm_plugin import FlowGraph, RelevanceMeasure, at
from nrm_plugin.errors import EventError, UnknownLayerError
from nrm_plugin.measure.flow_graph import FlowError
from tests.flows import X, edges_by_key, full_graph, measure, net
from tests.nets import Case, rule_maps, tiny_nets, zennit_composite
from tests.oracles import Walks, enumerate_walks
from tests.text_nets import text_net

slowly = settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])


def keys_of(case: Case) -> list[tuple[str, int]]:
    """Taps from the output down, without stacks, which have another name in the specification."""
    return [node.key for node in reversed(case.spec) if node.kind != "stack"]


def test_layers_may_come_in_any_order_also_as_sites():
    ids = torch.randint(4, 8, (1, 6), generator=torch.Generator().manual_seed(0))
    mu = RelevanceMeasure(text_net("class"), ids, 0)
    sites = ["blocks.0.resid_pre", "output", "blocks.0.attn", "blocks.0.mlp.neuron"]
    assert not set(sites) <= set(mu.layers)
    graph = mu.flow(sites, top=3)
    assert [layer.name for layer in graph.layers] == [
        "output", "blocks.0.mlp.neuron", "blocks.0.attn", "blocks.0.resid_pre",
    ]  # fmt: skip


def is_below(case: Case, lower: tuple[str, int], upper: tuple[str, int]) -> bool:
    parents = {node.key: node.parents for node in case.spec}
    todo, seen = [upper], set()
    while todo:
        for parent in parents[todo.pop()]:
            if parent not in seen:
                seen.add(parent)
                todo.append(parent)
    return lower in seen


@st.composite
def chains(draw: st.DrawFn) -> tuple[Case, dict, list[tuple[str, int]]]:
    """A net with rules and two to four of its taps, each below the one before."""
    case = draw(tiny_nets(max_batch=2))
    rules = draw(rule_maps(case))
    keys, taps = keys_of(case), []
    for _ in range(draw(st.integers(2, 4))):
        left = [key for key in keys if not taps or is_below(case, key, taps[-1])]
        if left:
            taps.append(draw(st.sampled_from(left)))
    return case, rules, taps


def groups_of(draw: st.DrawFn, shape: torch.Size) -> torch.Tensor:
    size = math.prod(shape)
    labels = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return torch.tensor(labels).reshape(shape)


def members(
    walks: Walks, key: tuple[str, int], labels: torch.Tensor, kept: tuple[int, ...]
) -> dict[object, np.ndarray]:
    """The walks of each node of one layer: groups, rest and off, as boolean arrays."""
    flat = labels.flatten().numpy()
    nodes: dict[object, np.ndarray] = {k: walks.crosses(*key, np.flatnonzero(flat == k)) for k in kept}
    nodes["rest"] = walks.crosses(*key, np.flatnonzero(~np.isin(flat, kept)))
    nodes["off"] = ~walks.crosses(*key)
    return nodes


@pytest.mark.slow
@slowly
@given(chains(), st.data())
def test_every_node_and_edge_is_its_event_and_the_sum_of_its_walks(drawn, data):
    case, rules, taps = drawn
    residual = data.draw(st.sampled_from(["sink", "redistribute"]))
    mu = RelevanceMeasure(
        case.net, case.x, start=case.start, composite=zennit_composite(case.spec, rules), residual=residual
    )
    sample = data.draw(st.integers(0, case.batch - 1))
    calls = [node.tap for node in case.spec]
    layers = [f"{tap}:{call}" if calls.count(tap) > 1 else tap for tap, call in taps]
    over = {layer: groups_of(data.draw, mu.shape(layer)[1:]) for layer in layers}
    top = data.draw(st.sampled_from([None, 1, 2]))
    graph = mu.flow(layers, over, top=top, sample=sample)
    walks = enumerate_walks(case.spec, case.x[sample], case.start[sample], rules, residual, 2.0)
    close = {"rel": 0, "abs": 1e-10 * max(1.0, walks.variation())}
    assert [layer.name for layer in graph.layers] == layers
    inside, events, shown = [], [], np.ones(len(walks), dtype=bool)
    for layer, key in zip(graph.layers, taps, strict=True):
        labels = over[layer.name]
        masks = members(walks, key, labels, layer.groups)
        rest = torch.isin(labels, torch.tensor(layer.groups), invert=True)
        event = {k: at(layer.name)[labels == k] for k in layer.groups}
        inside.append(masks)
        events.append({**event, "rest": at(layer.name)[rest], "off": ~at(layer.name)})
        shown &= ~masks["rest"] & ~masks["off"]
        split = walks.split(*key)
        assert (layer.sink, layer.bypass) == (
            pytest.approx(split.absorbed, **close),
            pytest.approx(split.bypass, **close),
        )
        assert math.fsum([*layer.masses, layer.rest, layer.sink, layer.bypass]) == pytest.approx(1, **close)
        for node in layer.nodes:
            name = node.kind if node.group is None else node.group
            assert node.mass == pytest.approx(walks.mass(masks[name]), **close)
            assert node.mass == pytest.approx(float(mu(events[-1][name])[sample]), **close)
    assert graph.carried == pytest.approx(walks.mass(shown), **close)
    for place, joint in enumerate(graph.joints):
        upper, lower = graph.layers[place : place + 2]
        rows, columns = list(inside[place]), list(inside[place + 1])
        masses = mu([events[place][a] & events[place + 1][b] for a in rows for b in columns])[:, sample]
        expected = [[walks.mass(inside[place][a] & inside[place + 1][b]) for b in columns] for a in rows]
        np.testing.assert_allclose(joint, expected, rtol=0, atol=close["abs"])
        np.testing.assert_allclose(joint.flatten(), masses, rtol=0, atol=close["abs"])
        np.testing.assert_allclose(joint.sum(1), [node.mass for node in upper.nodes], rtol=0, atol=close["abs"])
        np.testing.assert_allclose(joint.sum(0), [node.mass for node in lower.nodes], rtol=0, atol=close["abs"])
    listed = edges_by_key(graph)
    assert len(listed) == sum(int(np.count_nonzero(joint)) for joint in graph.joints)
    for edge in graph.edges:
        if edge.upper.mass:
            assert edge.given_upper * edge.upper.mass == pytest.approx(edge.mass)


@pytest.fixture(scope="module")
def mu() -> RelevanceMeasure:
    return measure()


@pytest.fixture(scope="module")
def full() -> FlowGraph:
    return full_graph()


def test_all_channels_need_no_pass_for_each_of_them(mu, monkeypatch):
    expected = mu.joint("2", "0")[0]
    direct, spent, joints = mu.cost.vectors, [], mu.joints

    def watched(*args, **kwargs):
        matrices = joints(*args, **kwargs)
        spent.append(mu.cost.vectors)
        return matrices

    monkeypatch.setattr(mu, "joints", watched)
    graph = mu.flow(["2", "0"], top=None, sample=0)
    assert spent == [direct]
    np.testing.assert_allclose(graph.joints[0][:-2, :-2], expected, atol=1e-12)
    mu.flow(["2", "0"], top=2, sample=0)
    assert spent[1] > direct


def counted(query, spent):
    def watched(self, *args, **kwargs):
        result = query(self, *args, **kwargs)
        spent.append(self.cost.vectors)
        return result

    return watched


def test_a_flow_takes_two_passes_and_those_between_its_layers(mu, monkeypatch):
    whole = RelevanceMeasure(net(), X[:1], 2)
    whole.marginal("input")
    plain, steps, spent = whole.cost.vectors, ["__call__", "marginal", "joints"], []
    for name in steps:
        monkeypatch.setattr(RelevanceMeasure, name, counted(getattr(RelevanceMeasure, name), spent))
    whole.flow(["output", "2", "0", "input"], top=1)
    # Two vectors between each two layers, two whole passes, and at most one pass for the walks off each layer.
    assert sum(spent) <= 2 * plain + 2 * plain + 3 * 3 * plain


def test_names_may_be_in_any_order_and_samples_are_separate(mu):
    assert mu.flow(["input", "0", "output"], sample=0) == mu.flow(["output", "0", "input"], sample=0)
    alone = RelevanceMeasure(net(), X[1:], 2, residual="sink", composite=EpsilonAlpha2Beta1()).flow(["2", "0"])
    for one, other in zip(mu.flow(["2", "0"], sample=1).joints, alone.joints, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-12)
    by_module = RelevanceMeasure(model := net(), X[:1], 2).flow([model[2], at("0")])
    assert [layer.name for layer in by_module.layers] == ["2", "0"]


def test_arguments_that_do_not_fit_raise(mu):
    with pytest.raises(FlowError, match="the measure has 2: pass sample="):
        mu.flow(["2", "0"])
    with pytest.raises(FlowError, match="samples 0 to 1"):
        mu.flow(["2", "0"], sample=2)
    with pytest.raises(FlowError, match="at least one layer"):
        mu.flow([], sample=0)
    with pytest.raises(UnknownLayerError, match="no tap named 'conv'"):
        mu.flow(["conv", "input"], sample=0)
    with pytest.raises(EventError, match="is not below"):
        mu.flow(["2", "2"], sample=0)
    with pytest.raises(ValueError, match="over='pixel' is unknown"):
        mu.flow(["2", "0"], over="pixel", sample=0)


class Dead(nn.Module):
    """A branch that is inactive, parallel to an active one."""

    def __init__(self) -> None:
        super().__init__()
        self.dead, self.live, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(1, 2, 3), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        off = torch.relu(self.dead(x) - 100).sum((1, 2, 3)).unsqueeze(1)
        return self.head(torch.relu(self.live(x)).mean((2, 3)) + off)


def test_layers_and_images_without_relevance_have_empty_groups():
    torch.manual_seed(0)
    model = Dead().eval()
    with torch.no_grad():
        model.live.bias.fill_(1.0)
    graph = RelevanceMeasure(model, torch.rand(1, 1, 8, 8), 1).flow(["output", "dead", "input"], top=4)
    dead = graph.layers[1]
    assert (dead.groups, dead.rest, dead.others) == ((), pytest.approx(0, abs=1e-20), 3)
    assert dead.sink + dead.bypass == pytest.approx(1, abs=1e-5)
    black = RelevanceMeasure(model, torch.zeros(1, 1, 8, 8), 1, residual="sink", composite=EpsilonPlus())
    graph = black.flow(["output", "live", "input"])
    assert graph.layers[-1].groups == ()
    assert graph.carried == 0
    assert graph.layers[-1].sink == pytest.approx(1, abs=1e-5)


@pytest.mark.medium
def test_wide_layers_need_one_vector_for_each_shown_group():
    torch.manual_seed(0)
    wide = nn.Sequential(nn.Linear(8, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 3)).eval()
    mu = RelevanceMeasure(wide, torch.randn(1, 8), 0)
    graph = mu.flow(["4", "2", "0", "input"], top=8)
    assert [joint.shape for joint in graph.joints] == [(3, 10), (10, 10), (10, 10)]
    assert [layer.others for layer in graph.layers] == [2, 4088, 4088, 0]
    pair = at("2")[graph.layers[1].groups[0]] & at("0")[graph.layers[2].groups[0]]
    assert graph.joints[1][0, 0] == pytest.approx(float(mu(pair)), rel=1e-3, abs=1e-7)
    for layer in graph.layers:
        assert sum(node.mass for node in layer.nodes) == pytest.approx(1, abs=1e-5)
